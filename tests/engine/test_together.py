"""Ranks that write one checkpoint together: each its share, none of them all, and any engine goes on from it."""

from pathlib import Path

import pytest
import torch
from engine_runs import Results, launch, task_of
from on_disk import write_checkpoint
from safetensors.torch import load_file
from scenario import KINDS, MIDDLE, Tensors, build_model, build_optimizer, read_flat

from personmae.checkpoint import portable
from personmae.engine.base import PortableState, own_part, owners
from personmae.engine.native import NativeEngine

SHARDED = ("zero1", "zero2", "zero3", "fsdp")


def test_every_tensor_has_one_owner_and_all_have_about_as_much():
    sizes = {f"t{number}": torch.Size([number + 1, 3]) for number in range(20)} | {"large": torch.Size([100])}
    shapes = {name: sizes[name] for name in sizes}
    assert set(owners(shapes, spread=True).values()) == {0}  # there is no process group here
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert own_part(tensors, spread=True).keys() == own_part(tensors, spread=False).keys() == tensors.keys()


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_shares_differ_by_no_more_than_the_largest_tensor(num_ranks: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    shapes = {f"t{number}": torch.Size([number % 13 + 1, 3]) for number in range(50)}
    given = owners(shapes, spread=True)
    loads = [sum(shapes[name].numel() for name, owner in given.items() if owner == rank) for rank in range(num_ranks)]
    assert sum(loads) == sum(shape.numel() for shape in shapes.values())
    assert max(loads) - min(loads) <= max(shape.numel() for shape in shapes.values())
    assert given == owners(dict(reversed(shapes.items())), spread=True)
    assert set(owners(shapes, spread=False).values()) == {0}


def parts(run_dir: Path, kind: str) -> list[Tensors]:
    folder = portable.locate(run_dir)
    return [load_file(file) for file in sorted(folder.glob(f"{kind}-*.safetensors"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two and three ranks have written together, and what one has made of it on the plain engine."""
    folder = tmp_path_factory.mktemp("together")
    for ranks in (2, 3):
        names = [(engine, f"{engine}-{ranks}") for engine in (*SHARDED, "native")]
        launch(
            [task_of(name, engine, folder, last=MIDDLE, together=str(folder / name)) for engine, name in names], ranks, folder
        )
    names = [f"{engine}-{ranks}" for engine in SHARDED for ranks in (2, 3)]
    launch([task_of(f"{name}-then", "native", folder, load=str(folder / name), first=MIDDLE) for name in names], 1, folder)
    return Results(folder)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", [*SHARDED, "native"])
def test_all_ranks_write_a_share_and_together_it_is_the_whole_state(written: Results, engine: str, ranks: int) -> None:
    run_dir, whole = written.folder / f"{engine}-{ranks}", written.state(f"{engine}-{ranks}", MIDDLE)
    together = read_flat(str(run_dir))
    assert together.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(together[name], whole[name])] == []
    for kind in KINDS:
        found = parts(run_dir, kind)
        sizes = [sum(tensor.numel() for tensor in part.values()) for part in found]
        assert len(sizes) == ranks
        assert sum(map(len, found)) == len({name for part in found for name in part})  # nothing is written twice
        assert max(sizes) < 1.3 * sum(sizes) / ranks, sizes


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", SHARDED)
def test_the_plain_engine_goes_on_from_what_ranks_have_written(written: Results, engine: str, ranks: int) -> None:
    assert written.record(f"{engine}-{ranks}-then")["came_back"]
    assert len(written.record(f"{engine}-{ranks}-then")["losses"]) > 0


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks", "killed"), [("zero3", 2, 1), ("fsdp", 3, 0)])
def test_a_rank_that_is_killed_while_it_writes_leaves_the_commit_before(
    engine: str, ranks: int, killed: int, tmp_path: Path
) -> None:
    task = task_of("run", engine, tmp_path, last=MIDDLE, together=str(tmp_path / "run"), killed_rank=killed)
    launch([task], ranks, tmp_path, killed_rank=killed)
    found = portable.newest(tmp_path / "run")
    assert found is not None
    assert portable.step_of(found.name) == MIDDLE
    saved, model = portable.read(found), build_model()
    engine_of_one = NativeEngine(model, build_optimizer(model), grad_accum_steps=1, max_norm=None)
    moments = {kind: saved.tensors[kind] for kind in ("exp_avg", "exp_avg_sq")}
    engine_of_one.load_portable(PortableState(saved.tensors["params"], moments, saved.state["num_updates"]))
    assert all(torch.equal(tensor, saved.tensors["params"][name]) for name, tensor in model.state_dict().items())
    write_checkpoint(tmp_path / "run", saved, keep_last=1)  # what the kill has left is in nobody's way
    assert [path.name for path in portable.folder(tmp_path / "run").iterdir() if path.name.startswith(".")] == []
