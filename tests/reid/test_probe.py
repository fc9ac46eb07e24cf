"""The probe: frozen rows, linear discriminants against numpy written from their definition, and the record of both."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from closeness import assert_allclose

from personmae.errors import Stopped, UserError
from personmae.model.vit import VisionTransformer, grid_coords, patchify
from personmae.reid import probe, ranking, retrieval
from personmae.reid.datasets import Benchmark, Sample
from personmae.reid.features import extract
from personmae.reid.frozen import FrozenRows
from personmae.reid.transforms import ImageSet

IMG_SIZE = (64, 32)
PREPROCESSING = {"img_size": IMG_SIZE, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """Ten people to train on and eight others, six noisy images each, by three cameras of which each has its own colour."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    casts = rng.integers(-40, 40, (3, 3))
    found: dict[str, list[Sample]] = {"train": [], "query": [], "gallery": []}
    for pid in range(18):
        pattern = rng.integers(60, 190, (8, 4, 3))
        for number in range(6):
            noisy = np.clip(pattern + casts[number % 3] + rng.normal(0, 15, pattern.shape), 0, 255).astype(np.uint8)
            path = str(folder / f"{pid}_{number}.png")
            assert cv2.imwrite(path, cv2.resize(noisy, IMG_SIZE[::-1], interpolation=cv2.INTER_NEAREST))
            split = "train" if pid < 10 else "query" if number == 0 else "gallery"
            found[split].append(Sample(path, pid, number % 3))
    return Benchmark("folder", str(folder), tuple(found["train"]), tuple(found["query"]), tuple(found["gallery"]))


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=32, depth=2, num_heads=2)


def measure(benchmark: Benchmark, encoder: VisionTransformer, **options) -> dict:
    record = probe.measure(benchmark, encoder, **PREPROCESSING, device=torch.device("cpu"), num_threads=1, **options)
    assert record
    return record


def tokens_of(encoder: VisionTransformer, paths: list[str]) -> np.ndarray:
    """(N, 4, 2, 32): the patch tokens of images after the final norm, image by image."""
    found = []
    for path in paths:
        bgr = cv2.imread(path)
        assert bgr is not None
        image = torch.from_numpy((bgr[..., ::-1] / 255 - 0.5) / 0.5).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            tokens = encoder.eval()(patchify(image, 16), grid_coords((4, 2))[None])
        found.append(tokens[0, 1:].double().numpy().reshape(4, 2, 32))
    return np.stack(found)


def test_frozen_rows_are_the_row_means_of_the_tokens_after_the_last_norm(benchmark, encoder):
    paths = [sample.path for sample in benchmark.query]
    tokens = tokens_of(encoder, paths)
    with ThreadPoolExecutor(1) as pool:
        images = ImageSet(paths, IMG_SIZE, pool=pool)
        model = FrozenRows(encoder, IMG_SIZE, ("middle", "all"))
        got = extract(model, images, batch_size=3, device=torch.device("cpu"), mean=(0.5,) * 3, std=(0.5,) * 3)
    rows = tokens.mean(axis=2).reshape(len(paths), -1)  # of two columns the middle are both
    assert_allclose(got.numpy(), np.concatenate([rows, rows], axis=1), atol=1e-5)


def lda_by_definition(x: np.ndarray, labels: np.ndarray, dim: int) -> np.ndarray:
    """(F, K) directions, person by person, from an eigenvalue problem that is not symmetric."""
    centred = x - x.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:192]
    z = centred @ axes.T
    within, between = np.zeros((len(axes), len(axes))), np.zeros((len(axes), len(axes)))
    for label in set(labels.tolist()):
        own = z[labels == label]
        within += (own - own.mean(0)).T @ (own - own.mean(0)) / len(z)
        between += len(own) * np.outer(own.mean(0) - z.mean(0), own.mean(0) - z.mean(0)) / len(z)
    within = 0.9 * within + 0.1 * np.trace(within) / len(within) * np.eye(len(within))
    values, vectors = np.linalg.eig(np.linalg.solve(within, between))
    chosen = vectors[:, np.argsort(-values.real)[:dim]].real
    chosen /= np.sqrt(np.einsum("ik,ij,jk->k", chosen, within, chosen))
    return axes.T @ chosen


@pytest.mark.parametrize(("num_people", "num_channels", "dim"), [(12, 20, 11), (130, 260, 96), (2, 5, 1)])
def test_discriminants_equal_their_definition(num_people: int, num_channels: int, dim: int):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(3 * num_people) % num_people)
    scale = np.linspace(3, 0.3, num_channels)
    people = rng.standard_normal((num_people, num_channels)) * scale
    x = people[labels] + rng.standard_normal((len(labels), num_channels)) * scale[::-1] + 7
    mean, directions = probe.discriminants(torch.from_numpy(x), labels)
    assert_allclose(mean.numpy(), x.mean(0))
    assert directions.shape == (num_channels, dim)
    expected = (x - x.mean(0)) @ lda_by_definition(x, labels, dim)
    got = (x - mean.numpy()) @ directions.numpy()
    assert_allclose(got @ got.T, expected @ expected.T, rtol=1e-6, atol=1e-6 * np.abs(expected).max() ** 2)


@pytest.mark.parametrize(
    ("labels", "output"),
    [([0, 0, 0, 0], "4 images of 1 people"), ([0, 1, 2, 3], "4 images of 4 people")],
    ids=["one person", "one image each"],
)
def test_labels_that_tell_nothing_are_refused(labels: list[int], output: str):
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3)))
    with pytest.raises(UserError, match=f"two different images of one. Got {output}"):
        probe.discriminants(features, np.array(labels))


def test_the_record_is_a_search_by_whitened_rows_beside_the_scores_of_both_readings(benchmark, encoder):
    record = measure(benchmark, encoder)
    assert set(record["probe"]) == {"rows", "lda"}
    assert record["mAP"] == record["probe"]["rows"]["mAP"]
    assert record["counts"] == {"train": [60, 10], "query": [8, 8], "gallery": [40, 8]}
    rows = retrieval.for_each_camera(
        retrieval.model_features(FrozenRows(encoder, IMG_SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu")),
        "whiten",
    )
    same = retrieval.measure(benchmark, rows, img_size=IMG_SIZE, num_threads=1)
    assert same
    assert record["mAP"] == pytest.approx(same["mAP"], abs=1e-6)
    assert len(record["rank_lists"]) == 8


def test_the_discriminants_are_of_the_training_people_and_know_no_camera(benchmark, encoder):
    train, test = ([*benchmark.train], [*benchmark.query, *benchmark.gallery])
    rows = tokens_of(encoder, [sample.path for sample in (*train, *test)]).mean(axis=2).reshape(len(train) + len(test), -1)
    labels = np.array([sample.pid for sample in train])
    projected = (rows[len(train) :] - rows[: len(train)].mean(0)) @ lda_by_definition(rows[: len(train)], labels, 9)
    query, gallery = torch.from_numpy(projected).split([8, 40])
    columns = [
        np.array(c) for of in (benchmark.query, benchmark.gallery) for c in zip(*((s.pid, s.camid) for s in of), strict=True)
    ]
    expected = ranking.evaluate(ranking.cosine(query, gallery), ranking.Labels(*columns))
    found = measure(benchmark, encoder)["probe"]["lda"]
    assert 0.3 < found["mAP"] == pytest.approx(expected.mAP, abs=1e-3)
    assert found["rank1"] == pytest.approx(expected.rank(1), abs=1e-6)


def test_a_probe_draws_no_random_numbers_and_changes_no_weight(benchmark, encoder):
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    before = torch.get_rng_state()
    first, again = measure(benchmark, encoder), measure(benchmark, encoder)
    assert torch.equal(torch.get_rng_state(), before)
    assert first["probe"] == again["probe"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())


def test_features_that_are_not_finite_are_told_and_a_stop_is_obeyed(benchmark, encoder):
    with pytest.raises(Stopped):
        measure(benchmark, encoder, stopped=lambda: True)
    with torch.no_grad():
        encoder.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="108 of 108 features are not finite"):
        measure(benchmark, encoder)
