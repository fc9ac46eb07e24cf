"""What the tests of this folder share: drawn people, a fine-tuned run with its result, a pre-trained one, a search."""

from pathlib import Path

import pytest
import torch
from people import draw_few_people
from saved_runs import HEAD, save

from personmae import evaluate
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid.datasets import load_benchmark
from personmae.reid.heads import ReIDModel, build_head
from personmae.visualise import search
from personmae.weights.encoder import load


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both synthetic benchmarks, of eight people to test on each."""
    return draw_few_people(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="session")
def tuned(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning with random weights, which knows its benchmark and has the result of ``evaluate``."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES["micro"])
    model = ReIDModel(encoder, build_head(encoder, 8, **HEAD)).eval()
    root = str(people / "market1501")
    state = {"head": HEAD, "num_classes": 8, "init": "random", "benchmark": "market1501", "root": root}
    save(folder, "model", {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, state)
    evaluate.run(str(folder), "market1501", root, out=folder)
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random weights, as a pre-training saves it. It has neither decoders nor a configuration."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    torch.manual_seed(1)
    weights = VisionTransformer(**SIZES["micro"]).state_dict()
    save(folder, "student", {f"encoder.{name}": tensor for name, tensor in weights.items()}, {})
    return folder


@pytest.fixture(scope="session")
def found(tuned: Path, people: Path) -> search.Search:
    """The search of the fine-tuned run on its benchmark."""
    benchmark = load_benchmark("market1501", people / "market1501", splits=("query", "gallery"))
    return search.search(benchmark, load(tuned), per_camera=None, log=lambda _: None)


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""
