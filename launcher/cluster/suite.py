"""A suite: stages that follow from each other, e.g. a pre-training and all benchmarks of its encoder, and one table.

In a cluster, ``submit`` creates the first stages and a dispatcher (``dispatcher.py``) that creates the others. Every stage
owns its objects, so none of them goes with the dispatcher. ``--local`` runs the same stages here, one after the other.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from launcher.cluster import kustomization, render
from launcher.cluster.objects import SUITE
from launcher.cluster.render import Rendered
from launcher.cluster.request import Request, check_name, guess_overlay, image_of, overlay_of
from personmae import config
from personmae.config import Place
from personmae.errors import EXIT_COMPLETE, UserError
from personmae.system import files
from personmae.system.locations import escape

PLAN_VERSION = 2  # of what the dispatcher reads: with all objects of each stage, not its Job alone
DELETED = "was deleted"  # how the state of a stage ends that somebody has deleted
_KEPT_SECONDS = 90 * 86400  # of a Job that is over: as long as the dispatcher may look at it
_SCORES = ("mAP", "rank1", "rank5", "rank10", "mINP")
Program = Literal["pretrain", "finetune", "unsupervised"]
_PROGRAMS: dict[str, Program] = {"finetune": "finetune", "usl": "unsupervised", "uda": "unsupervised"}  # by overlay


class Stage(config.Section):
    """One run of a suite."""

    name: str = Field(description="short name. The run is called SUITE-NAME")
    config: Place = Field(description="configuration file, relative to the suite's folder")
    after: str | None = Field(default=None, description="the stage whose weights this one starts from")
    set: tuple[str, ...] = Field(default=(), description="overrides a.b=c. {name} is replaced by that place of the suite")
    overlay: str | None = Field(default=None, description="folder of k8s/overlays, by default the one for this program")
    nodes: tuple[int, int] | None = Field(default=None, description="fewest and most nodes")
    gpus: int | None = Field(default=None, ge=0, description="GPUs on each node")


class Suite(config.Section):
    """Stages in an order in which they can run."""

    name: str = Field(description="name of the suite. Its runs are called NAME-STAGE")
    results: Place = Field(
        min_length=1, description="directory or s3://bucket/prefix for runs/STAGE, results.md and results.json"
    )
    places: dict[str, str] = Field(default_factory=dict, description="paths of data by name, for {name} in a stage's 'set'")
    stages: tuple[Stage, ...] = Field(min_length=1, description="the runs, in an order in which they can run")

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        seen: list[str] = []
        for stage in stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called {stage.name}")
            if stage.after is not None and stage.after not in seen:
                there = ", ".join(seen) or "nothing"
                raise ValueError(f"stage {stage.name} is after {stage.after}, which must stand before it; there is {there}")
            seen.append(stage.name)
        return stages

    @model_validator(mode="after")
    def _known_places(self) -> "Suite":
        for stage in self.stages:
            for text in stage.set:
                try:
                    text.format(**self.places)
                except (LookupError, ValueError, AttributeError, TypeError) as error:
                    raise ValueError(f"stage {stage.name} sets {text}, and places has no {error}") from None
        return self


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with everything filled in."""

    stage: Stage
    program: Program
    config: Path
    overrides: list[str]
    run: str
    run_dir: str
    result: str


def is_suite(path: Path) -> bool:
    """Whether a configuration file, with its bases, is a suite. Raises a ``UserError`` for one that cannot be read."""
    return path.is_file() and config.program_of(path) == "suite"


def load(path: Path, overrides: Sequence[str] = ()) -> list[PlannedStage]:
    """Read a suite and fill in its stages.

    Raises:
        UserError: the file is wrong, a stage has no such configuration, or a name is too long.
    """
    return steps_of(config.load(Suite, path, overrides), path.parent)


def steps_of(suite: Suite, folder: Path) -> list[PlannedStage]:
    """The stages of a suite, each with its program, its places and its name."""
    steps: dict[str, PlannedStage] = {}
    for stage in suite.stages:
        run, run_dir = f"{suite.name}-{stage.name}", f"{suite.results.rstrip('/')}/runs/{stage.name}"
        check_name(run)
        overlay = stage.overlay or guess_overlay(folder / stage.config)
        program = _PROGRAMS.get(overlay.partition("-")[0], "pretrain")
        place = escape(run_dir)  # it is read once more, as an override
        places = [f"checkpoint.upload_to={place}" if "://" in run_dir else f"run_dir={place}"]
        places += [f"init={escape(steps[stage.after].run_dir)}"] if stage.after else []
        overrides = [text.format(**suite.places) for text in stage.set] + places
        steps[stage.name] = PlannedStage(
            stage, program, folder / stage.config, overrides, run, run_dir, f"{run_dir}/result.json"
        )
    return list(steps.values())


def render_suite(request: Request) -> tuple[Rendered, list[Rendered]]:
    """The dispatcher, and the runs of all stages in order; the dispatcher's plan holds the Jobs that it will create."""
    suite = config.load(Suite, request.config, request.overrides)
    for flag in ("nodes", "gpus", "overlay"):
        if getattr(request, flag) is not None:
            raise UserError(f"--{flag} is for one run; each stage of a suite says its own: set it in {request.config}")
    if request.name is not None:
        suite = suite.model_copy(update={"name": request.name})
    if "://" not in suite.results:
        raise UserError(f"pods lose their disks, so results must be s3://BUCKET/PREFIX in a cluster; got {suite.results}")
    check_name(suite.name)
    runs, plan = [], []
    for step in steps_of(suite, request.config.parent):
        stage = step.stage
        rendered = render.render(
            replace(
                request,
                config=step.config,
                overrides=step.overrides,
                overlay=stage.overlay,
                name=step.run,
                nodes=stage.nodes,
                gpus=stage.gpus,
            )
        )
        if rendered.workload["kind"] != "Job":
            raise UserError(f"the stages of a suite must be Jobs; {stage.name} has the overlay {stage.overlay}: leave it out")
        rendered.workload["spec"]["ttlSecondsAfterFinished"] = _KEPT_SECONDS
        for item in rendered.objects:
            item["metadata"].setdefault("labels", {})[SUITE] = suite.name
        runs.append(rendered)
        entry = {"name": stage.name, "after": stage.after, "job": rendered.workload["metadata"]["name"]}
        entry |= {"objects": rendered.objects}
        entry |= {"result": step.result} if step.program != "pretrain" else {}
        plan.append(entry)
    return _dispatcher(request, suite, plan), runs


def _dispatcher(request: Request, suite: Suite, stages: list[dict[str, Any]]) -> Rendered:
    overlay = overlay_of(replace(request, overlay="pretrain")).parent / "suite"
    spec = kustomization.read(overlay)
    for labels in spec["labels"]:
        labels["pairs"] = dict.fromkeys(labels["pairs"], suite.name)
    spec["labels"].append({"pairs": {SUITE: suite.name}})
    kept = [name for name in request.components if name in ("s3-secret", "irsa", "gke-workload-identity", "network-policy")]
    plan = {"version": PLAN_VERSION, "suite": suite.name, "results": suite.results, "stages": stages}
    begun = [f"stage.{stage['name']}=runs" for stage in stages if not stage["after"]]  # 'submit' creates them
    spec |= {
        "namespace": request.namespace,
        "namePrefix": f"{suite.name}-",
        "components": [f"../../components/{name}" for name in kept],
        "configMapGenerator": [
            {"name": "config", "literals": [f"plan.json={json.dumps(plan)}"]},
            {"name": "run", "behavior": "merge", "literals": list(request.env)},
            {"name": "state", "behavior": "merge", "literals": begun},
        ],
        "images": [image_of(request, spec["images"][0])],
        "patches": [{"target": {"kind": "ServiceAccount"}, "patch": render.role_patch(request)}] if request.role else [],
    }
    job = next(item for item in kustomization.build(overlay, spec) if item["kind"] == "Job")
    spec["configMapGenerator"][0]["literals"].append(f"job.json={json.dumps(job)}")  # a suite that ended begins again with it
    return Rendered(suite.name, request.namespace, suite, kustomization.build(overlay, spec), {"overlay": overlay, **spec})


def first_runs(dispatcher: Rendered, runs: list[Rendered]) -> list[Rendered]:
    """What ``submit`` creates, in this order: the stages that wait for none, and the dispatcher, which creates the others."""
    first = {stage["job"] for stage in json.loads(plan_of(dispatcher))["stages"] if not stage["after"]}
    return [*(run for run in runs if run.workload["metadata"]["name"] in first), dispatcher]


def is_over(state: str) -> bool:
    """Whether a stage's state, as the dispatcher writes it down, is its last one."""
    return state == "Complete" or state.startswith("Failed")


def plan_of(dispatcher: Rendered) -> str:
    """The text of the dispatcher's plan."""
    return next(o["data"]["plan.json"] for o in dispatcher.objects if "plan.json" in o.get("data", {}))


def run_local(path: Path, overrides: Sequence[str] = ()) -> None:
    """Run the stages one after the other, each as its own process, and write the table.

    Raises:
        UserError: the suite is wrong, or writes to a bucket.
        SystemExit: a stage has failed; with its exit code.
    """
    steps = load(path, overrides)
    results = Path(steps[0].run_dir).parent.parent
    if "://" in steps[0].run_dir:
        raise UserError(f"--local needs a directory for results, got {steps[0].run_dir}: give results=runs/NAME")
    for step in steps:
        print(f"suite: {step.stage.name}: personmae {step.program} {step.config} {' '.join(step.overrides)}", flush=True)
        command = [sys.executable, "-m", "personmae", step.program, str(step.config), *step.overrides]
        code = subprocess.run(command, check=False).returncode
        if code != EXIT_COMPLETE:
            print(f"suite: {step.stage.name} has ended with code {code}; the same command goes on there", file=sys.stderr)
            sys.exit(code)
    found = {s.stage.name: json.loads(Path(s.result).read_bytes()) for s in steps if s.program != "pretrain"}
    for name, content in result_files(found, {}).items():
        files.replace(results / name, content)
    print(table(found, {}), end="")


def result_files(found: dict[str, dict[str, Any]], failed: dict[str, str]) -> dict[str, bytes]:
    """``results.json`` and ``results.md`` from the records of the stages, by stage."""
    return {
        "results.json": files.to_json({"results": found, "failed": failed}, indent=1).encode(),
        "results.md": table(found, failed).encode(),
    }


def table(found: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
    """A Markdown table, scores in per cent; failed stages come last, with the reason."""
    lines = ["| stage | benchmark | " + " | ".join(_SCORES) + " |", "|---" * (len(_SCORES) + 2) + "|"]
    for name, record in found.items():
        scores = " | ".join(f"{100 * record[key]:.1f}" for key in _SCORES)
        lines.append(f"| {name} | {record['benchmark']} | {scores} |")
    lines += [f"| {name} | {why} |" + " |" * len(_SCORES) for name, why in failed.items()]
    return "\n".join(lines) + "\n"
