"""What the dashboard shows of a run in which things happen, asked of a real Prometheus.

    python benchmarks/dashboard.py --shards DIR --out dashboard.png      # seven minutes on two busy cores; prometheus on PATH

Two agents of one rank each train the quickstart's encoder from shards behind a real S3 server. A rank is killed, an agent is
told to stop, and another one comes. Prometheus scrapes both every second, with the labels that k8s/components/monitoring
gives. Then every query of k8s/dashboards/personmae.json is asked over the whole time, and each panel is drawn. What a query
shows nothing of is printed.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personmae.errors import UserError, run_program
from personmae.system import storage

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "k8s/dashboards/personmae.json"
CHOICES = {"$namespace": ".*", "$run": ".*", "$__rate_interval": "10s"}  # of Grafana's variables; four scrapes and more
SETTINGS = (
    *("train.precision=fp32", "engine.name=native", "data.num_threads=1", "data.shuffle_block_size=32", "train.log_every=5"),
    *("train.total_steps=100000", "checkpoint.every_steps=20", "metrics.peak_tflops=1"),
    *("data.num_connections=1", "data.cache_limit_gb=0.04"),  # so that shards are fetched again and again
)
GPUS = "GPUs"  # the row whose panels need one
_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel, and how its series are called."""

    expression: str
    legend: str

    def name(self, labels: dict[str, str]) -> str:
        """The legend with a series' labels in it."""
        text = self.legend
        for label, value in labels.items():
            text = text.replace("{{" + label + "}}", value)
        return text


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of the dashboard: its row's title, its own, the unit of its values, its queries."""

    row: str
    title: str
    unit: str
    targets: tuple[Target, ...]


def panels_of(board: dict[str, Any]) -> list[Panel]:
    """The panels of a dashboard in their order."""
    found, row = [], ""
    for item in board["panels"]:
        if item["type"] == "row":
            row = item["title"]
            continue
        targets = tuple(Target(target["expr"], target["legendFormat"]) for target in item["targets"])
        found.append(Panel(row, item["title"], item["fieldConfig"]["defaults"]["unit"], targets))
    return found


def filled_in(expression: str) -> str:
    """An expression with a choice for each of Grafana's variables."""
    for variable, value in CHOICES.items():
        expression = expression.replace(variable, value)
    return expression


def ask(server: str, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    """The series of a query over a time, each with ``metric`` and ``values``, by the HTTP API. Raises ``HTTPError``."""
    asked = {"query": filled_in(expression), "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:g}"}
    with _without_proxy.open(f"http://{server}/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def points(series: dict[str, Any]) -> list[tuple[float, float]]:
    """Times and values of a series, without those that are no number: 0 divided by 0, where nothing happened."""
    return [(float(t), float(v)) for t, v in series["values"] if math.isfinite(float(v))]


Answers = list[tuple[Panel, list[tuple[str, list[tuple[float, float]]]]]]


def ask_all(server: str, panels: list[Panel], start: float, end: float, step: float) -> Answers:
    """For each panel its curves: name and points."""
    answers = []
    for panel in panels:
        curves = []
        for target in panel.targets:
            for series in ask(server, target.expression, start, end, step):
                if found := points(series):
                    curves.append((target.name(series["metric"]), found))
        answers.append((panel, curves))
    return answers


def draw(answers: Answers, events: list[tuple[float, str]], start: float, path: Path) -> None:
    """A picture of all panels; a dotted line for each event."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, rows = 3, math.ceil(len(answers) / 3)
    end = max(t for _, curves in answers for _, found in curves for t, _ in found)
    figure, axes = pyplot.subplots(rows, columns, figsize=(18, 3.1 * rows), constrained_layout=True, squeeze=False)
    for place in axes.flat[len(answers) :]:
        place.axis("off")
    for place, (panel, curves) in zip(axes.flat, answers, strict=False):
        place.set_title(f"{panel.row}: {panel.title} [{panel.unit}]", fontsize=10)
        for name, found in curves:
            place.plot(*_with_gaps(found, start), label=name, linewidth=1.2)
        for when, _ in events:
            place.axvline(when - start, color="gray", linestyle=":", linewidth=0.8)
        if curves:
            place.legend(fontsize=6, loc="best", ncols=2 if len(curves) > 6 else 1)
        else:
            place.text(0.5, 0.5, "shows nothing", ha="center", va="center", transform=place.transAxes, color="firebrick")
        place.set_xlim(0, end - start)
        place.tick_params(labelsize=7)
        place.grid(alpha=0.3)
    told = "; ".join(f"{when - start:.0f} s {what}" for when, what in events)
    figure.suptitle(f"seconds of the rehearsal; {told}", fontsize=10)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def _with_gaps(found: list[tuple[float, float]], start: float) -> tuple[list[float], list[float]]:
    """Seconds and values, with a hole where nothing was known, as Grafana draws it."""
    times, values, step = [], [], min((b[0] - a[0] for a, b in itertools.pairwise(found)), default=1)
    for (when, value), (after, _) in itertools.zip_longest(found, found[1:], fillvalue=found[-1]):
        times.append(when - start)
        values.append(value)
        if after - when > 2 * step:
            times.append(when - start)
            values.append(math.nan)
    return times, values


class Rehearsal:
    """Processes on this machine: an S3 server, a store, agents, and the Prometheus that scrapes them."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self._folder, self._started = folder, []
        ports = [_free_port() for _ in range(5)]
        self.server, self._agents, self._store, self._s3 = f"127.0.0.1:{ports[0]}", ports[1:3], ports[3], ports[4]
        self._environ = _environment({"S3_ENDPOINT_URL": f"http://127.0.0.1:{self._s3}"})
        os.environ.update({key: self._environ[key] for key in ("S3_ENDPOINT_URL", *_KEYS, "NO_PROXY")})
        self._bucket(shards)
        self._prometheus()
        self._start("store", sys.executable, "-m", "launcher.elastic", "store", "--port", str(self._store))

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self._folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self._environ, stdout=log, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def _bucket(self, shards: Path) -> None:
        self._start("s3", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._s3))
        client = storage.s3_client()
        self.wait_for(lambda: client.create_bucket(Bucket="bucket"), 60)
        for path in sorted(shards.iterdir()):
            client.put_object(Bucket="bucket", Key=f"shards/{path.name}", Body=path.read_bytes())

    def _prometheus(self) -> None:
        jobs = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "personmae", "run": "rehearsal", "node_rank": str(n)}}
            for n, port in enumerate(self._agents)
        ]
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "personmae", "static_configs": jobs}],
        }
        (self._folder / "prometheus.yaml").write_text(json.dumps(config), encoding="utf-8")
        given = {"config.file": self._folder / "prometheus.yaml", "storage.tsdb.path": self._folder / "tsdb"}
        options = [f"--{key}={value}" for key, value in given.items()]
        self._start("prometheus", "prometheus", *options, f"--web.listen-address={self.server}")

    def agent(self, node: int) -> subprocess.Popen[bytes]:
        """An agent of one rank that trains until it is told to stop."""
        run = ["--nnodes", "1:2", "--store", f"127.0.0.1:{self._store}", "--port", str(self._agents[node])]
        run += ["--settle-seconds", "2", "--backoff-seconds", "1", "--run-id", "rehearsal", "--keep-alive-seconds", "5"]
        places = ["data.shards=s3://bucket/shards", "checkpoint.upload_to=s3://bucket/run"]
        places += [f"run_dir={self._folder}/run-{node}", f"data.cache_dir={self._folder}/cache-{node}"]
        train = ["launcher/pretrain.py", "--config", "configs/quickstart.yaml", *places, *SETTINGS]
        return self._start(f"agent-{node}", sys.executable, "-m", "launcher.elastic", "run", *run, "--", *train)

    def kill_rank(self, agent: subprocess.Popen[bytes]) -> None:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text(encoding="utf-8").split()
        os.kill(next(int(pid) for pid in children if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()), signal.SIGKILL)

    def value(self, expression: str) -> float:
        """What Prometheus has at present; 0 where that is nothing."""
        now = time.time()
        found = ask(self.server, expression, now, now, 1)
        return float(found[0]["values"][-1][1]) if found else 0.0

    def wait_for(self, what: Callable[[], Any], seconds: float) -> Any:
        """What ``what`` returns once that is true. Raises ``TimeoutError``, at once where a process has failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not any(process.poll() in (1, 78) for process in self._started):
            with contextlib.suppress(OSError, ValueError, LookupError):  # not up yet, or nothing there yet
                if found := what():
                    return found
            time.sleep(0.5)
        logs = "\n".join(
            f"--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-1500:]}" for log in self._folder.glob("*.log")
        )
        raise TimeoutError(logs)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def _environment(more: dict[str, str]) -> dict[str, str]:
    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | ours | dict.fromkeys(_KEYS, "test") | {"NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"} | more


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def rehearse(stage: Rehearsal, pause_seconds: float) -> tuple[float, list[tuple[float, str]]]:
    """Play the events, each after a while of training. Returns the beginning and the times of the events."""
    events: list[tuple[float, str]] = []
    start = time.time()
    agents = [stage.agent(0), stage.agent(1)]

    def trains(ranks: int, step: float) -> None:
        """Wait for so many ranks and some steps more."""
        wanted = step + 30
        stage.wait_for(lambda: stage.value("max(personmae_world_size)") == ranks, 240)
        stage.wait_for(lambda: stage.value("max(personmae_last_step)") > wanted, 240)
        time.sleep(pause_seconds)

    def step() -> float:
        return stage.value("max(personmae_last_step)")

    trains(2, 0)
    events.append((time.time(), "a rank is killed"))
    stage.kill_rank(agents[0])
    trains(2, step())
    events.append((time.time(), "an agent is told to stop"))
    agents[1].terminate()
    agents[1].wait()
    trains(1, step())
    events.append((time.time(), "another one comes"))
    agents[1] = stage.agent(1)
    trains(2, step())
    return start, events


def main(argv: list[str] | None = None) -> int:
    """Rehearse, ask, draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="a small set of shards")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, .png")
    parser.add_argument("--pause-seconds", type=float, default=20, metavar="S", help="training between two events")
    args = parser.parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if not shutil.which("prometheus"):
        raise UserError("prometheus is required on PATH; on Debian: tests/integration/install_prometheus.sh")
    if not (args.shards / "index.json").is_file():
        raise UserError(f"--shards must be a folder of shards with an index.json; got {args.shards}: see 'personmae shards'")
    panels = [panel for panel in panels_of(json.loads(BOARD.read_text(encoding="utf-8"))) if panel.row != GPUS]
    with tempfile.TemporaryDirectory() as folder:
        stage = Rehearsal(Path(folder), args.shards)
        try:
            start, events = rehearse(stage, args.pause_seconds)
            answers = ask_all(stage.server, panels, start, time.time(), 1)
        finally:
            stage.close()
    draw(answers, events, start, args.out)
    for panel, curves in answers:
        told = "; ".join(f"{name}: {found[-1][1]:.4g}" for name, found in curves) or "shows nothing"
        print(f"{panel.row} | {panel.title} | {told}")
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
