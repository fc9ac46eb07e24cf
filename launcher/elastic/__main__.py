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
from personmae.errors import EXIT_COMPLETE, run_program
from personmae.monitor.endpoint import LOOPBACK


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and be an agent or the store; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_program(lambda: sys.exit(args.run(args)))


def build_parser() -> Parser:
    parser = Parser(prog="python -m launcher.elastic", description="Ranks on hosts that come and go.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    store = verbs.add_parser("store", help="be the rendezvous store; it needs one CPU core and no GPU")
    store.add_argument("--port", type=int, default=29400)
    store.set_defaults(run=_store)
    run = verbs.add_parser("run", help="be the agent of this host")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="what each rank runs")
    run.set_defaults(run=_run)

    group = run.add_argument_group("ranks")
    group.add_argument("--nnodes", default="1", metavar="MIN:MAX", help="how many agents make a round (default 1)")
    group.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on this host (default 1)")
    group.add_argument("--admissible-batch", type=int, metavar="B", help="global batch: a world size must divide it")
    group.add_argument("--inadmissible", choices=("wait", "subset"), default="wait", help="when one does not (default wait)")
    group.add_argument("--log-dir", type=Path, metavar="DIR", help="also write each rank's output to a file there")

    group = run.add_argument_group("meeting")
    group.add_argument("--store", default="127.0.0.1:29400", metavar="HOST:PORT", help="(default 127.0.0.1:29400)")
    group.add_argument("--run-id", default="run", help="agents with the same one belong together (default run)")
    group.add_argument("--address", help="how other hosts reach this one (default: as this one reaches the store)")
    _seconds(group, "--settle-seconds", 15, "first-comers and newcomers wait so long for others to join")
    _seconds(group, "--join-seconds", 900, "give up when no round comes together")
    _seconds(group, "--keep-alive-seconds", 15, "an agent that is silent for so long is lost")
    _seconds(group, "--store-seconds", 120, "how long the store may be away; ranks go on meanwhile")

    group = run.add_argument_group("ending and going on")
    _seconds(group, "--grace-seconds", 120, "for ranks to save and stop before they are killed")
    group.add_argument("--max-restarts", type=int, default=3, metavar="N", help="failures without progress (default 3)")
    _seconds(group, "--backoff-seconds", 5, "pause after the first failure; doubled after each further one")
    for name, default in asdict(Limits()).items():
        phase = name.removesuffix("_seconds").replace("_", "-")
        _seconds(group, f"--{phase}-seconds", default, f"a rank that is silent for so long in this phase hangs: {phase}")
    group.add_argument("--wait-data-seconds", action=Renamed, dest="data_wait_seconds", type=float, help=argparse.SUPPRESS)

    group = run.add_argument_group("being watched")
    group.add_argument("--port", type=int, default=0, metavar="P", help="/healthz, /readyz and /metrics; 0 is off (default)")
    group.add_argument(
        "--host", default=LOOPBACK, metavar="H", help="what --port listens at: an address, or all (default 127.0.0.1)"
    )
    _seconds(group, "--linger-seconds", 0, "the endpoint of a complete run stays, for its last numbers to be scraped")
    group.add_argument("--gpu-metrics", choices=("on", "off"), default="on", help="ask NVML; off where DCGM does (default on)")
    return parser


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
    sys.exit(main())
