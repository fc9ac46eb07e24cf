"""Imports point down: the layers of the design, and what must not be loaded early."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_ONLY = {"personmae.model", "personmae.optim", "personmae.flops"} | {
    f"personmae.reid.{name}"
    for name in (
        *("heads", "losses", "cluster", "memory", "ranking", "rerank", "sampler", "samples", "transforms"),
        *("benchmark", "breakdown", "latency", "datasets", "rows", "cluster_quality", "frozen"),
    )
}
MIDDLE = {
    f"personmae.{name}"
    for name in (
        *("engine", "checkpoint", "batch_plan", "guard", "floor", "data", "synthetic", "weights", "gallery", "explain"),
        *("monitor.run_log", "monitor.rank_metrics"),
        *("reid.features", "reid.probe", "reid.retrieval"),
    )
}
PROGRAMS = {
    f"personmae.{name}"
    for name in (
        *(
            "pretrain",
            "pretrain_state",
            "pretrain_probe",
            "pretrain_start",
            "pretrain_log",
            "finetune",
            "unsupervised",
            "clustering",
            "downstream",
            "evaluate",
        ),
        *("bench", "report", "visualise", "inspect", "dry_run", "serve"),
    )
}
SHARED_RUN = "personmae.downstream"
GROUND = {
    f"personmae.{name}"
    for name in (
        *("errors", "images", "normalisation", "precision", "system"),
        *("monitor.heartbeat", "monitor.progress", "monitor.environment", "monitor.exporter", "monitor.endpoint"),
    )
}
PROCESS = {"personmae.dist", "personmae.monitor.gpu"}
CONFIG = {"personmae.config", "personmae.keys"}
HEAVY = {"torch", "cv2", "numpy", "boto3", "streaming", "deepspeed", "timm", "matplotlib", "scipy", "sklearn"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(text: str, package: list[str], known: frozenset[str]) -> set[str]:
    """Everything a file of ``package`` imports, at any depth; ``from package import module`` is the module."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names}
    return found


FILES = {module_of(path): path for top in ("personmae", "launcher") for path in sorted((ROOT / top).rglob("*.py"))}
IMPORTS = {
    module: imports_of(path.read_text(), list(path.relative_to(ROOT).parts[:-1]), frozenset(FILES))
    for module, path in FILES.items()
}
OURS = {m: {i for i in found if i.split(".")[0] in ("personmae", "launcher")} for m, found in IMPORTS.items()}


def within(module: str, layer: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in layer)


def trespasses(layer: set[str], allowed: set[str]) -> list[str]:
    """What modules of a layer import beyond ``allowed``."""
    return [f"{m} -> {i}" for m, found in OURS.items() if within(m, layer) for i in found if not within(i, allowed)]


def test_the_walk_finds_imports_at_any_depth():
    text = "import a.b\nfrom personmae import dist, nothing\ndef f():\n    if 1:\n        from .order import Ids\n"
    found = imports_of(text, ["personmae", "data"], frozenset(FILES))
    assert found == {"a.b", "personmae.dist", "personmae", "personmae.data.order"}
    assert "personmae.engine.deepspeed" in OURS["personmae.pretrain"]  # imported inside a function


def test_every_module_has_a_layer():
    upper = PROGRAMS | {"personmae.__main__", "personmae.commands", "launcher"}
    lower = GROUND | CONFIG | PROCESS
    packages = {"personmae", "personmae.reid", "personmae.monitor"}
    assert [m for m in FILES if m not in packages and not within(m, upper | MIDDLE | TORCH_ONLY | lower)] == []


def is_program(module: str) -> bool:
    """Whether a module of the top layer is one of its programs: those have a ``run``, as does what two of them share."""
    body = ast.parse(FILES[module].read_text()).body
    return (
        module != SHARED_RUN
        and within(module, PROGRAMS)
        and any(isinstance(n, ast.FunctionDef) and n.name == "run" for n in body)
    )


def test_programs_never_import_each_other():
    programs = {module for module in FILES if is_program(module)}
    assert {"personmae.pretrain", "personmae.finetune", "personmae.evaluate", "personmae.report.report"} <= programs
    assert [f"{m} -> {i}" for m in OURS if within(m, PROGRAMS) for i in OURS[m] if i in programs] == []


def test_nothing_below_imports_a_program():
    layers = TORCH_ONLY | MIDDLE | GROUND | CONFIG | PROCESS
    assert [f"{m} -> {i}" for m in OURS if within(m, layers) for i in OURS[m] if within(i, PROGRAMS)] == []


def test_model_optim_and_the_parts_of_reid_know_no_rank_engine_data_or_configuration():
    assert trespasses(TORCH_ONLY, TORCH_ONLY | GROUND) == []


def test_model_knows_no_reid():
    assert trespasses({"personmae.model"}, {"personmae.model", "personmae.errors"}) == []


def test_engine_checkpoint_metrics_data_and_features_take_plain_arguments():
    assert trespasses(MIDDLE, MIDDLE | TORCH_ONLY | GROUND | PROCESS) == []


def test_an_engine_knows_no_model_and_no_data():
    assert trespasses({"personmae.engine"}, {"personmae.engine", "personmae.dist", "personmae.errors"}) == []


def test_data_knows_no_model_and_no_engine():
    allowed = {f"personmae.{name}" for name in ("data", "dist", "errors", "images", "system", "monitor.progress")}
    assert trespasses({"personmae.data"}, allowed) == []


def test_ranks_gpus_and_the_configuration_stand_on_the_ground_alone():
    assert trespasses(PROCESS | {"personmae.errors"}, GROUND) == []
    assert trespasses(CONFIG, GROUND | CONFIG) == []


def test_the_configuration_needs_pydantic_yaml_and_the_standard_library():
    outside = {i.split(".")[0] for module in FILES if within(module, CONFIG) for i in IMPORTS[module]} - set(
        sys.stdlib_module_names
    )
    assert outside == {"pydantic", "yaml", "personmae"}


def test_the_model_needs_torch_and_nothing_that_computes_besides():
    outside = {i.split(".")[0] for m in OURS if within(m, {"personmae.model"}) for i in IMPORTS[m]}
    assert outside - set(sys.stdlib_module_names) == {"torch", "triton", "jaxtyping", "personmae"}


def test_the_launcher_imports_the_command_line_configuration_heartbeats_numbers_and_errors_alone():
    monitor = ("endpoint", "heartbeat", "gpu", "exporter")
    allowed = {"launcher"} | {f"personmae.{name}" for name in ("commands", "config", "keys", "errors", "system")}
    assert trespasses({"launcher"}, allowed | {f"personmae.monitor.{name}" for name in monitor}) == []


def test_the_ground_imports_nothing_above_it():
    assert trespasses(GROUND, GROUND) == []


def test_nothing_imports_in_a_circle():
    graph = {module: {name for name in found if name in FILES} for module, found in OURS.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(FILES)  # a circle is a CycleError that names it


def test_the_bottom_imports_nothing_of_ours():
    assert OURS["personmae.errors"] == OURS["personmae.monitor.heartbeat"] == OURS["personmae.images"] == set()
    assert OURS["personmae.monitor.exporter"] - {"personmae"} == {
        "personmae.monitor.endpoint",
        "personmae.errors",
        "personmae.monitor.heartbeat",
    }


def test_packages_do_nothing_when_imported():
    for module, path in FILES.items():
        if path.name == "__init__.py" and module != "personmae":
            body = ast.parse(path.read_text()).body
            assert all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body), module


def test_the_package_itself_has_one_function_and_loads_nothing():
    code = "import sys; before = set(sys.modules); import personmae; print(*sorted(set(sys.modules) - before))"
    loaded = set(passes(code).split())
    assert {name for name in loaded if name.startswith("personmae")} == {"personmae"}
    assert loaded & HEAVY == set()
    assert [n.name for n in ast.parse(FILES["personmae"].read_text()).body if isinstance(n, ast.FunctionDef)] == ["load"]


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of everything a fresh interpreter imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


PARTS_OF_STREAMING = """
import sys
import personmae.pretrain, personmae.finetune, personmae.unsupervised, personmae.data.importer
assert "streaming" not in sys.modules
from personmae.system import mosaic
writer = mosaic.load("streaming.base.format.mds.writer").MDSWriter
mosaic.load("streaming.base.storage"), mosaic.load("streaming.base.dataset")
"""


def passes(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_training_loads_no_streaming_and_its_parts_are_loaded_without_the_rest():
    """Ten seconds of imports would otherwise stand before each import of images and each store but S3."""
    loaded = {name.split(".")[0] for name in passes(f"{PARTS_OF_STREAMING}print(*sys.modules)").split()}
    assert "torch" in loaded
    assert loaded & {"transformers", "sklearn", "matplotlib"} == set()


@pytest.mark.slow
def test_the_whole_of_streaming_has_the_parts_that_were_loaded():
    passes(f"{PARTS_OF_STREAMING}import streaming\nassert streaming.MDSWriter is writer and streaming.StreamingDataset")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import launcher.program"),
        ("-c", "import personmae.config, personmae.errors"),
        ("-m", "personmae", "--help"),
        ("launcher/pretrain.py", "--help"),
        ("-m", "launcher.elastic", "run", "--help"),
        ("-m", "personmae", "pretrain", "configs/quickstart.yaml", "--print-config"),
        (
            *("-m", "personmae", "render", "configs/pretrain_vit_base.yaml"),
            *("data.shards=s3://b/l", "checkpoint.upload_to=s3://b/r"),
        ),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_nothing_heavy_is_loaded_before_it_is_needed(arguments):
    loaded = loaded_by(*arguments)
    assert "argparse" in loaded or "pydantic" in loaded
    assert loaded & HEAVY == set()
