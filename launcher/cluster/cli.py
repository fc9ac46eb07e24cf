"""``personmae render|submit|status|logs|scale|suspend|resume|adopt|delete``: runs in a cluster, from a laptop without torch."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from personmae.commands.arguments import Parser
from personmae.errors import run_command, run_program


def main(argv: list[str] | None = None) -> int:
    """``python -m launcher.cluster.cli COMMAND ...``: these commands alone; returns the exit code."""
    parser = Parser(prog="personmae", description="Runs in a Kubernetes cluster.")
    add_commands(parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser))
    args = parser.parse_args(argv)
    return run_program(lambda: args.run(args))


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The commands of this file, for ``personmae.__main__``."""
    _add_render(commands)
    _add_submit(commands)
    status = _add_command_of_a_run(commands, "status", "pods, ranks, step, loss, time to go, last checkpoint, warnings")
    status.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(default text)")
    status.add_argument("--watch", action="store_true", help="print it again every 10 s until the run is over")
    logs = _add_command_of_a_run(commands, "logs", "the output of a run's pods")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing what comes")
    logs.add_argument("--index", type=_index, metavar="N", help="of pod N alone (default: of all pods)")
    logs.add_argument("--since", metavar="10m", help="nothing older")
    scale = _add_command_of_a_run(commands, "scale", "change the number of nodes, from MIN to MAX of its submission")
    scale.add_argument("--nodes", type=int, required=True, metavar="N", help="how many nodes from now on")
    _add_command_of_a_run(commands, "suspend", "stop a run's pods once they have saved; its objects stay")
    _add_command_of_a_run(commands, "resume", "start a suspended run's pods again")
    _add_command_of_a_run(commands, "adopt", "let the objects of a run that kubectl has applied go with its Job")
    _add_command_of_a_run(commands, "delete", "delete a run's objects; its checkpoints stay in the bucket")


def _add_command_of_a_run(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=f"Kubernetes: {text}")
    command.add_argument("run_name", metavar="RUN", help="the name that submit printed")
    _add_cluster(command)
    command.set_defaults(run=_later(f"show_{name}" if name in ("status", "logs") else f"{name}_run"))
    return command


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A function of ``commands.py``, which is only loaded when its command is given."""

    def run(args: argparse.Namespace) -> None:
        from launcher.cluster import commands

        getattr(commands, name)(args)

    return run


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", "--namespace", default="personmae", help="where the run lives (default personmae)")
    command.add_argument("--context", help="a context of kubectl's configuration (default: the current one)")


def _add_request(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    add("overrides", nargs="*", metavar="a.b=c", help="set a key of the configuration")
    add("--set", action="append", default=[], metavar="a.b=c", help="the same, anywhere on the line")
    add("--overlay", metavar="NAME", help="a folder of k8s/overlays (default: the one for this configuration)")
    add("--with", dest="components", action="extend", type=_parts, metavar="A,B", help="folders of k8s/components")
    add("--nodes", type=_nodes, metavar="MIN:MAX", help="train on MIN to MAX nodes, or on N")
    add("--gpus", type=int, metavar="N", help="GPUs of each node, one rank each; 0 is one rank on the CPU")
    add("--cpu", metavar="Q", help="CPU cores that each node requests, e.g. 64")
    add("--memory", metavar="Q", help="memory of each node, e.g. 512Gi")
    add("--image", metavar="REF", help="the container image: NAME[:TAG]@sha256:...")
    add("--name", metavar="RUN", help="name of the run (default: the file's name and a digest)")
    add("--role", metavar="ROLE", help="the role's ARN for --with irsa, the account's address for gke-workload-identity")
    add("--env", action="append", default=[], metavar="K=V", help="a variable of the pods, e.g. S3_ENDPOINT_URL=...")
    _add_cluster(command)


def _add_render(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("render", help="Kubernetes: print a run's objects; needs neither a cluster nor kubectl")
    _add_request(command)
    command.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="(default yaml)")
    command.add_argument("--write", type=Path, metavar="DIR", help="write a kustomization to DIR, for 'kubectl apply -k DIR'")
    command.set_defaults(run=_later("render_run"))


def _add_submit(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("submit", help="Kubernetes: check a run, create it, and see whether its pods are accepted")
    _add_request(command)
    add = command.add_argument
    add("--dry-run", choices=("client", "server"), help="create nothing: check here, or ask the cluster as well")
    add("--local", action="store_true", help="run a suite's stages here, one after the other; no cluster is asked")
    add("--no-bucket-check", action="store_true", help="do not look into the bucket; for one that only the pods can reach")
    add("--wait", type=_seconds, nargs="?", const=float("inf"), metavar="S", help="wait for the run's end, S seconds at most")
    command.set_defaults(run=_later("submit_run"))


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
    run_command(main)
