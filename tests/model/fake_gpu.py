# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false
"""What is compiled for a GPU, compiled without one: ``python fake_gpu.py FOLDER`` prints how many kernels there were.

Inductor writes its kernels for fake tensors of a GPU, and Triton compiles them for one of capability 9.0. Backward passes ask
the driver, so they are left out. It is done with private parts of torch: where those have moved, the first line says so.
"""

import importlib.util
import itertools
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TRITON_CACHE_DIR": sys.argv[1]}
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # DeepSpeed sets it, and torch would then take the pretence for a GPU

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher

FOLDER, TARGET, NUM_IMAGES = Path(sys.argv[1]), GPUTarget("cuda", 90, 32), 64
SPEC = RegionSpec((256, 128), 16, (0.5,) * 3, (0.5,) * 3, 64, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
SIZES = {
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "major": 9,
}
HEAD = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""

try:
    from functorch.compile import make_boxed_func
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _triton
except ImportError as error:
    sys.exit(f"moved: {error}")


def pretend() -> None:
    """Let torch and Triton ask this and not a driver what the GPU is."""
    hints = DeviceProperties(type="cuda", index=0, cc=90, **SIZES)
    more = {"minor": 0, "name": "a GPU", "total_memory": 80 << 30, "L2_cache_size": 50 << 20, "gcnArchName": ""}
    shared = dict.fromkeys(
        ["shared_memory_per_block", "shared_memory_per_block_optin", "shared_memory_per_multiprocessor"], 1 << 17
    )
    found = SimpleNamespace(**SIZES, **more, **shared)
    DeviceProperties.create = classmethod(lambda *_: hints)
    for part in (CudaInterface, CudaInterface.Worker):
        part.get_device_properties = staticmethod(lambda *_: found)
        part.current_device = staticmethod(lambda: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    CudaInterface.is_available = staticmethod(lambda: True)
    torch.cuda.get_device_properties = lambda *_: found
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    device = torch.device("cuda:0")
    driver._active = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_active_torch_device=lambda: device
    )
    _triton.triton_hash_with_backend = lambda: "none"
    AsyncCompile.triton = lambda *_, **__: None
    config.fx_graph_cache = False
    torch.nn.Module.float = lambda self: self  # fake parameters cannot be swapped, and are fp32 already


built: list[str] = []
numbers = itertools.count()


def build(code: str) -> None:
    """Have Triton compile all kernels of what Inductor has written."""
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
        path = FOLDER / f"kernel_{next(numbers)}.py"
        path.write_text(HEAD + source[source.index("@triton.jit") :])
        spec: Any = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        signature = eval(re.search(r"'signature': (\{.*?\})", source)[1])  # type: ignore[index]
        blocks = {name: 1 if name == "YBLOCK" else 32 for name, kind in signature.items() if kind == "constexpr"}
        ours = triton.compiler.ASTSource(getattr(module, name), signature=signature, constexprs=blocks)
        triton.compile(ours, target=TARGET)
        built.append(name)


def write(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """The compiler's place in ``torch.compile``: what it returns gives fake tensors of the right shapes."""
    mode = detect_fake_mode(inputs)
    with V.set_fake_mode(mode):
        lowered = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            code = lowered.codegen()[0]
    build(getattr(code, "value", code))
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    return make_boxed_func(lambda *_: [result.meta["val"] for result in results])


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return aot_module_simplified(
        graph, inputs, fw_compiler=write, inference_compiler=write, decompositions=select_decomp_table()
    )


def prepare(canvas: torch.Tensor, size: torch.Tensor, native: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    return cut_batch(canvas, size, draw_batch(keys, native, SPEC), SPEC)


def main() -> None:
    pretend()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"), torch.no_grad():
        canvas = torch.empty(NUM_IMAGES, *SPEC.canvas_size, 3, dtype=torch.uint8)
        size, keys = torch.empty(NUM_IMAGES, 2, dtype=torch.int64), torch.empty(NUM_IMAGES, dtype=torch.int64)
        batch = torch.compile(prepare, backend=backend)(canvas, size, size, keys)
        print(f"drawing and cutting: {len(built)} kernels")
        model = PersonMAE(size="micro", compute_dtype=torch.bfloat16)
        teacher = Teacher(model.encoder, SPEC.grid, torch.bfloat16)
        teacher.compile(backend=backend)
        batch["target"] = teacher(batch["patches_b"])
        print(f"and the teacher: {len(built)}")
        model.compile(backend=backend)
        model(batch)
        print(f"and the student: {len(built)}")


if __name__ == "__main__":
    main()
