"""Who we are, the batch plan, and what ranks agree on."""

import subprocess
import sys

import pytest
import torch
import warm

from personmae import batch_plan, dist
from personmae.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "0")  # so that what read_world sets is taken back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("global_batch_size", "world_size"), [(1, 1), (8, 8), (96, 1), (96, 8), (2048, 2), (2048, 8)])
@pytest.mark.parametrize("most", [1, 7, 64, 256])
def test_a_plan_covers_the_global_batch_with_the_largest_micro_batch_allowed(global_batch_size, world_size, most):
    plan = batch_plan.plan_batch(global_batch_size, world_size, most)
    assert plan.world_size * plan.grad_accum_steps * plan.micro_batch_size == global_batch_size
    per_rank = plan.micro_batch_size * plan.grad_accum_steps
    assert per_rank * world_size == global_batch_size
    assert plan.micro_batch_size <= most
    larger = range(plan.micro_batch_size + 1, min(most, per_rank) + 1)
    assert not [n for n in larger if per_rank % n == 0]


def test_the_papers_batch_on_eight_ranks():
    assert batch_plan.plan_batch(2048, 8, 256) == batch_plan.BatchPlan(2048, 8, 256, 1)
    assert batch_plan.plan_batch(2048, 4, 256) == batch_plan.BatchPlan(2048, 4, 256, 2)


def test_a_world_size_that_does_not_divide_lists_those_that_do_and_the_batches_that_would():
    with pytest.raises(UserError) as caught:
        batch_plan.plan_batch(1000, 16, 64)
    message = str(caught.value)
    assert "train.global_batch_size=1000 must be a multiple of the world size 16" in message
    assert "Start 1 or 2 or 4 or 5 or 8 or 10 or 20 or 25 ranks" in message
    assert "set train.global_batch_size to 992 or 1008" in message


def test_more_ranks_than_images_suggests_no_empty_batch():
    with pytest.raises(UserError, match=r"set train\.global_batch_size to 8$"):
        batch_plan.plan_batch(5, 8, 64)


def test_without_a_launcher_there_is_one_rank(environ):
    world = dist.read_world()
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (0, 1, 0, 1)
    assert world.is_first
    assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("local", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_come_from_torchruns_or_deepspeeds_variables(environ, local):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), (local, "4")):
        environ.setenv(name, value)
    world = dist.read_world()
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 8, 1, 4)
    assert not world.is_first


def test_a_rank_without_a_group_agrees_with_itself():
    assert dist.any_rank(True) is True
    assert dist.any_rank(False) is False
    assert dist.from_first_rank("me") == "me"
    assert torch.equal(dist.mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    dist.barrier()
    dist.stop()


RANKS = """
import sys, torch
from personmae import dist
world = dist.read_world()
dist.start(world)
assert dist.any_rank(world.rank == 1) is True
assert dist.any_rank(False) is False
assert dist.from_first_rank(f"rank {world.rank}") == "rank 0"
values = torch.tensor([1.0, 10.0]) * (world.rank + 1)
assert dist.mean(values).tolist() == [1.5, 15.0]
assert values.tolist() == [world.rank + 1.0, 10.0 * (world.rank + 1)], "the argument was changed"
dist.barrier()
dist.stop()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two devices, or none")
def test_two_ranks_agree_on_flags_strings_and_means(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


ALONE = """
import torch
from personmae import dist
dist.start(dist.read_world())
assert torch.distributed.get_world_size() == 1
assert dist.any_rank(True) and dist.from_first_rank("x") == "x"
dist.stop()
"""


@pytest.mark.integration
def test_a_group_of_one_needs_no_address(environ):
    environ.delenv("MASTER_ADDR", raising=False)
    environ.delenv("MASTER_PORT", raising=False)
    done = warm.run(["-c", ALONE])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "local_ranks", "by_torchrun", "wanted"),
    [
        (None, 1, False, 6),
        (None, 3, False, 2),
        (None, 12, False, 1),
        ("4", 3, False, 4),
        ("1", 1, False, 1),
        ("1", 3, True, 2),  # torchrun's own default
        ("1", 1, True, 1),  # which it sets for several ranks alone
        ("3", 3, True, 3),
        ("0", 2, False, 3),
        ("4,2", 2, False, 3),
        ("", 2, False, 3),
    ],
)
def test_threads_are_a_share_of_the_cores_unless_somebody_says_how_many(environ, given, local_ranks, by_torchrun, wanted):
    environ.setattr(dist, "usable_cores", lambda: 6)
    for name, value in (("OMP_NUM_THREADS", given), ("TORCHELASTIC_RUN_ID", "x" if by_torchrun else None)):
        environ.setenv(name, value) if value is not None else environ.delenv(name, raising=False)
    world = dist.World(0, local_ranks, 0, local_ranks, torch.device("cpu"))
    assert dist.compute_threads(world) == wanted
