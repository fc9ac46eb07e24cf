"""Host copies: what the library reads is what was copied, in memory that is used again."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from personmae.checkpoint.host_copy import HostCopy, HostFile, write_blocks


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "flag": torch.tensor([True, False, True]),
        "weight": base.clone().requires_grad_(),
        "strided": base[::2].T,
        "tied": base,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "odd": torch.arange(5, dtype=torch.uint8),
        "double": torch.tensor([1e-300], dtype=torch.float64),
        "späť": torch.tensor([float("nan"), -0.0, 1e-42]),
    }


def test_the_library_reads_what_was_copied_and_finds_16_bit_floats_as_fp32(tmp_path):
    file = HostFile(tensors())
    file.fill(tensors())
    entry = file.write(tmp_path / "a.safetensors")
    assert entry["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        expected = tensor.detach().float() if name == "half" else tensor.detach().contiguous()
        assert (read[name].dtype, read[name].shape) == (expected.dtype, expected.shape)
        assert read[name].numpy().tobytes() == expected.numpy().tobytes()


def test_later_changes_of_the_originals_do_not_reach_the_copy(tmp_path):
    weight, taken = torch.zeros(3), HostCopy()
    taken.take({"student": {"w": weight}})
    weight.add_(1)
    taken.files["student"].write(tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [0.0] * 3


def test_memory_is_used_again_while_the_state_keeps_its_form():
    taken = HostCopy()
    taken.take({"student": {"w": torch.zeros(3)}})
    first = taken.files["student"]
    taken.take({"student": {"w": torch.ones(3)}})
    assert taken.files["student"] is first
    taken.take({"student": {"w": torch.ones(4)}, "exp_avg": {"w": torch.ones(4)}})
    assert taken.files["student"] is not first
    taken.take({"student": {"w": torch.ones(4)}})
    assert taken.files.keys() == {"student"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_told_with_the_file():
    with pytest.raises(OSError, match="No space left") as caught:
        write_blocks(Path("/dev/full"), [b"x" * 100_000])
    assert (caught.value.errno, caught.value.filename) == (28, "/dev/full")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_copied_through_pinned_memory(tmp_path):
    source = {"w": torch.randn(1000, 100, device="cuda"), "half": torch.randn(10, device="cuda", dtype=torch.bfloat16)}
    taken = HostCopy()
    taken.take({"student": source})
    taken.files["student"].write(tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert taken.files["student"]._data.is_pinned()
    assert all(torch.equal(read[name], tensor.cpu().float()) for name, tensor in source.items())
