"""The kernel in the program that trains: by Triton's interpreter, since the machine may have no GPU."""

import importlib.util
from pathlib import Path

import pytest
from closeness import assert_allclose
from programs import SETTINGS, losses, one_line_error, personmae, pretrain

pytestmark = pytest.mark.integration
SMALL = ["model.img_size=[64,32]", "regions.max_shift=16", "train.global_batch_size=8", "train.total_steps=3"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with the CUDA builds of torch alone")
def test_regions_cut_by_the_kernel_give_the_losses_of_those_cut_by_torch(shard_dir: Path, tmp_path: Path) -> None:
    plain, ours = tmp_path / "torch", tmp_path / "triton"
    pretrain(shard_dir, plain, *SMALL)
    pretrain(shard_dir, ours, *SMALL, "train.crop_backend=triton", env={"TRITON_INTERPRET": "1"})
    # On a CPU the plain version rounds pixels to bytes.
    assert_allclose(losses(ours), losses(plain), rtol=1e-3)
    assert losses(ours) != losses(plain)


def test_the_kernel_is_refused_where_there_is_no_gpu(shard_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    where = [f"data.shards={shard_dir}", f"run_dir={run_dir}"]
    result = personmae("pretrain", "configs/quickstart.yaml", *where, *SETTINGS, *SMALL, "train.crop_backend=triton")
    output = "crop_backend=triton needs a GPU and there is none (the device is cpu): use torch"
    assert output in one_line_error(result)
    assert not run_dir.exists()
