"""``auto`` is bf16 where a device has instructions for it, and else fp32; what a checkpoint was computed in is kept."""

from pathlib import Path

import pytest
import torch

from personmae import precision
from personmae.precision import Native, Precision, choose, cpu_flags, native_cpu

SKYLAKE = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse2 avx2 avx512f avx512bw avx512vl\nbugs\t\t: spectre_v1\n"
)
ZEN4 = (
    "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
)
RAPTOR = "flags\t\t: avx2 avx_vnni\n"
SAPPHIRE = "flags\t\t: avx2 avx512f amx_bf16 amx_tile\n"
GRAVITON3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"
GRAVITON2 = "processor\t: 0\nFeatures\t: fp asimd atomics\n"
OF_NAME = "model name\t: avx512_bf16 emulator\nflags\t\t: avx2\n"  # a word elsewhere is no instruction

WITH = Native(True, "this CPU has bf16 instructions")
WITHOUT = Native(False, "this CPU has no bf16 instructions")


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((SKYLAKE, WITHOUT), (ZEN4, WITH), (RAPTOR, WITHOUT), (SAPPHIRE, WITH)),
        *((GRAVITON3, WITH), (GRAVITON2, WITHOUT), (OF_NAME, WITHOUT)),
    ],
)
def test_a_processor_is_known_by_its_flags(cpuinfo: Path, text: str, expected: Native) -> None:
    cpuinfo.write_text(text)
    assert native_cpu(cpuinfo, {}) == expected


def test_a_system_that_does_not_tell_computes_in_fp32(cpuinfo: Path) -> None:
    assert cpu_flags(cpuinfo) is None
    assert native_cpu(cpuinfo, {}).best == "fp32"
    cpuinfo.write_bytes(b"\xff\xfe no flags here\n")
    assert cpu_flags(cpuinfo) is None
    assert "does not tell" in native_cpu(cpuinfo, {}).why


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("value", ["AVX2", "avx2", "SSE41", "AVX512_CORE", "Avx512_Core_Vnni", "AVX2_VNNI_2"])
def test_a_library_that_may_not_use_bf16_is_no_native_one(cpuinfo: Path, name: str, value: str) -> None:
    cpuinfo.write_text(ZEN4)
    found = native_cpu(cpuinfo, {name: value})
    assert found == Native(False, f"{name}={value} forbids bf16 instructions")


@pytest.mark.parametrize("value", ["", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512", "DEFAULT"])
def test_a_cap_above_bf16_changes_nothing(cpuinfo: Path, value: str) -> None:
    cpuinfo.write_text(ZEN4)
    assert native_cpu(cpuinfo, {"ONEDNN_MAX_CPU_ISA": value, "ATEN_CPU_CAPABILITY": "avx2"}) == WITH


def test_the_first_rank_decides_for_all_and_what_is_given_by_hand_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Precision("bf16", WITH)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert choose("auto", "cpu").name == "fp32"
    assert choose("auto", "cpu", share=lambda _: first) is first
    for name in precision.NAMES:
        chosen = choose(name, "cpu", share=lambda _: first)
        assert (chosen.name, chosen.by_hand) == (name, True)
        assert chosen.dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def test_auto_keeps_what_a_checkpoint_has_and_what_is_given_by_hand_stays() -> None:
    slow, fast = Precision("fp32", WITHOUT), Precision("bf16", WITH)
    for own, saved in ((slow, "bf16"), (fast, "fp32")):
        kept = own.resumed(saved)
        assert (kept.name, kept.kept, kept.record()) == (saved, True, {"precision": saved, "precision_by_hand": False})
        assert kept.resumed(saved) == kept
        for same in (None, own.name, "fp8"):
            assert own.resumed(same) is own
    by_hand = Precision("fp32", WITH, by_hand=True)
    assert by_hand.resumed("bf16") is by_hand
    assert by_hand.record() == {"precision": "fp32", "precision_by_hand": True}


def test_the_line_says_why_and_what_it_costs() -> None:
    slow, fast = Precision("fp32", WITHOUT), Precision("bf16", WITH)
    assert str(slow) == "precision fp32 (auto: this CPU has no bf16 instructions)"
    assert str(fast) == "precision bf16 (auto: this CPU has bf16 instructions)"
    assert str(Precision("bf16", WITH, by_hand=True)) == "precision bf16 (as set)"
    assert "Slow here: this CPU has no bf16 instructions" in str(Precision("bf16", WITHOUT, by_hand=True))
    output = str(slow.resumed("bf16"))
    assert "kept from the checkpoint" in output
    assert "a bf16 product is many times slower" in output
    assert "checkpoint.resume=none train.precision=fp32 starts anew" in output
    assert "train.precision=bf16 starts anew" in str(fast.resumed("fp32"))


@pytest.mark.gpu
def test_a_gpu_is_asked_for_native_bf16() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = choose("auto", "cuda:0")
    assert found.native.bf16 == (torch.cuda.get_device_capability(0) >= (8, 0))
    assert torch.cuda.get_device_name(0) in str(found)
