"""``python -m launcher.elastic run|store``: the agent that starts and watches the ranks of one host, and the agents' store."""

from personmae.system import signals

if __name__ == "__main__":  # before all that takes time
    signals.answer_early()

import argparse
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from launcher.elastic.agent import Agent
from launcher.elastic.options import read_options, read_policy
from launcher.elastic.ranks import Limits
from launcher.elastic.store import serve
from personmae.commands.arguments import Parser, Renamed
from personmae.errors import EXIT_COMPLETE, run_command, run_program
from personmae.monitor.endpoint import LOOPBACK


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and be an agent or the store; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_program(lambda: sys.exit(args.run(args)))


def build_parser() -> Parser:
    parser = Parser(prog="python -m launcher.elastic", description="Train on hosts that come and go.")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    store = commands.add_parser("store", help="the rendezvous store, where agents meet; it needs one CPU core and no GPU")
    store.add_argument("--port", type=int, default=29400, metavar="P", help="listen on port P (default 29400)")
    store.set_defaults(run=_store)
    run = commands.add_parser("run", help="the agent of this host: it starts the ranks and watches them")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="what each rank runs")
    run.set_defaults(run=_run)
    _add_ranks(run.add_argument_group("ranks"))
    _add_meeting(run.add_argument_group("meeting"))
    _add_ending(run.add_argument_group("ending and going on"))
    _add_watching(run.add_argument_group("being watched"))
    return parser


def _add_ranks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--nnodes", default="1", metavar="MIN:MAX", help="a round has MIN to MAX agents, or N (default 1)")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on this host (default 1)")
    add("--admissible-batch", type=int, metavar="B", help="the global batch, which the number of ranks must divide")
    text = "if it does not: wait for other hosts, or train with a subset of the ranks (default wait)"
    add("--inadmissible", choices=("wait", "subset"), default="wait", help=text)
    add("--log-dir", type=Path, metavar="DIR", help="also write each rank's output to a file in DIR")


def _add_meeting(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--store", default="127.0.0.1:29400", metavar="HOST:PORT", help="where the store is (default 127.0.0.1:29400)")
    add("--run-id", default="run", metavar="ID", help="agents with the same ID train together (default run)")
    add("--address", help="how other hosts reach this one (default: the address that reaches the store)")
    _seconds(group, "--settle-seconds", 15, "wait S seconds for more hosts before a round begins or grows")
    _seconds(group, "--join-seconds", 900, "give up after S seconds without a round")
    _seconds(group, "--keep-alive-seconds", 15, "an agent that is silent for S seconds is lost")
    _seconds(group, "--store-seconds", 120, "stop when the store is away for S seconds; ranks train meanwhile")


def _add_ending(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    _seconds(group, "--grace-seconds", 120, "ranks have S seconds to save before they are killed")
    add("--max-restarts", type=int, default=3, metavar="N", help="give up at failure N + 1 without progress (default 3)")
    _seconds(group, "--backoff-seconds", 5, "pause S seconds after a failure, twice as long after each further one")
    for name, default in asdict(Limits()).items():
        phase = name.removesuffix("_seconds").replace("_", "-")
        _seconds(group, f"--{phase}-seconds", default, f"a rank that is silent for S seconds in the phase {phase} hangs")
    add("--wait-data-seconds", action=Renamed, dest="data_wait_seconds", type=float, help=argparse.SUPPRESS)


def _add_watching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--port", type=int, default=0, metavar="P", help="serve /healthz, /readyz and /metrics on port P; 0 is off (default)")
    add("--host", default=LOOPBACK, metavar="H", help="the address that --port listens at, or all (default 127.0.0.1)")
    _seconds(group, "--linger-seconds", 0, "serve the last numbers of a complete run for S seconds more")
    add("--gpu-metrics", choices=("on", "off"), default="on", help="ask NVML about the GPUs; off where DCGM does (default on)")


def _seconds(group: argparse._ArgumentGroup, name: str, default: float, text: str) -> None:
    group.add_argument(name, type=float, default=float(default), metavar="S", help=f"{text} (default {default})")


def _store(args: argparse.Namespace) -> int:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    serve(args.port, stopped)
    return EXIT_COMPLETE


def _run(args: argparse.Namespace) -> int:
    limits = Limits(*(getattr(args, name) for name in Limits.__dataclass_fields__))
    code = Agent(read_options(args), read_policy(args), limits).run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the code is settled, and an interpreter that ends gives its handlers up
    return code


if __name__ == "__main__":
    run_command(main)
