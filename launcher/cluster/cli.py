"""``personmae render|submit|status|logs|scale|suspend|resume|delete``: runs in a cluster, from a laptop without torch."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from personmae.commands.arguments import Parser
from personmae.errors import run_program


def main(argv: list[str] | None = None) -> int:
    """``python -m launcher.cluster.cli VERB ...``: these verbs alone; returns the exit code."""
    parser = Parser(prog="personmae", description="Runs in a Kubernetes cluster.")
    add_verbs(parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser))
    args = parser.parse_args(argv)
    return run_program(lambda: args.run(args))


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """The verbs of this file, for ``personmae.__main__``."""
    _add_render(verbs)
    _add_submit(verbs)
    for name, help_text, run in (
        ("status", "pods, ranks, step, loss, time to go, last checkpoint, warnings", "show_status"),
        ("logs", "output of a run's pods", "show_logs"),
        ("scale", "change the number of a run's nodes within those it was submitted with", "scale_run"),
        ("suspend", "let a run's pods go, their state saved", "suspend_run"),
        ("resume", "have a suspended run's pods back", "resume_run"),
        ("delete", "delete a run's objects; its checkpoints stay in the bucket", "delete_run"),
    ):
        verb = verbs.add_parser(name, help=f"Kubernetes: {help_text}")
        verb.add_argument("run_name", metavar="RUN", help="its name, as submit printed it")
        _add_cluster(verb)
        verb.set_defaults(run=_later(run))
        if name == "status":
            verb.add_argument("-o", "--output", choices=("text", "json"), default="text")
            verb.add_argument("--watch", action="store_true", help="again every 10 s until the run is over")
        elif name == "logs":
            verb.add_argument("-f", "--follow", action="store_true")
            verb.add_argument("--index", type=_index, metavar="N", help="of one pod (default: of all)")
            verb.add_argument("--since", metavar="10m", help="only what is newer")
        elif name == "scale":
            verb.add_argument("--nodes", type=int, required=True, metavar="N")


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A function of ``commands.py``, which is only loaded when its verb is chosen."""

    def run(args: argparse.Namespace) -> None:
        from launcher.cluster import commands

        getattr(commands, name)(args)

    return run


def _add_cluster(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-n", "--namespace", default="personmae", help="(default personmae)")
    verb.add_argument("--context", help="of kubectl's configuration (default: the current one)")


def _add_choice(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="set a key of the configuration")
    verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="the same, anywhere on the line")
    verb.add_argument("--overlay", metavar="NAME", help="of k8s/overlays (default: the one for this kind of configuration)")
    verb.add_argument("--with", dest="components", action="extend", type=_parts, metavar="A,B", help="of k8s/components")
    verb.add_argument("--nodes", type=_nodes, metavar="MIN:MAX", help="with how many nodes the run goes on")
    verb.add_argument("--gpus", type=int, metavar="N", help="on each node, a rank each; 0 for one rank on the CPU")
    verb.add_argument("--cpu", metavar="Q", help="that each node asks for, e.g. 64")
    verb.add_argument("--memory", metavar="Q", help="of each node, e.g. 512Gi")
    verb.add_argument("--image", metavar="REF", help="NAME[:TAG]@sha256:...")
    verb.add_argument("--name", metavar="RUN", help="of the run (default: the file's name and a digest)")
    verb.add_argument("--role", metavar="ROLE", help="for --with irsa an ARN, for gke-workload-identity an account's address")
    verb.add_argument("--env", action="append", default=[], metavar="K=V", help="of the pods, e.g. S3_ENDPOINT_URL=...")
    _add_cluster(verb)


def _add_render(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("render", help="Kubernetes: print a run's objects; needs neither a cluster nor kubectl")
    _add_choice(verb)
    verb.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml")
    verb.add_argument("--write", type=Path, metavar="DIR", help="leave a kustomization there instead, for 'kubectl apply -k'")
    verb.set_defaults(run=_later("render_run"))


def _add_submit(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("submit", help="Kubernetes: check a run, create it, and see whether its pods are accepted")
    _add_choice(verb)
    verb.add_argument("--dry-run", choices=("client", "server"), help="only check, here or with the cluster too")
    verb.add_argument("--local", action="store_true", help="run a suite's stages one after the other on this machine instead")
    verb.add_argument("--no-bucket-check", action="store_true", help="this machine cannot reach the bucket; the pods can")
    verb.add_argument("--wait", type=_seconds, nargs="?", const=float("inf"), metavar="S", help="for its end, at most S s")
    verb.set_defaults(run=_later("submit_run"))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be seconds, 0 or more; got {text!r}")


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a pod's index, 0 or more; got {text!r}")
    return int(text)


def _nodes(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    if not (fewest.isdecimal() and (most or fewest).isdecimal() and 1 <= int(fewest) <= int(most or fewest)):
        raise argparse.ArgumentTypeError(f"must be N or MIN:MAX with 1 <= MIN <= MAX, got {text}")
    return int(fewest), int(most or fewest)


if __name__ == "__main__":
    sys.exit(main())
