"""What the command line of an agent settles, checked."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.elastic.membership import Policy
from personmae.errors import UserError


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beyond ``Policy`` and ``Limits``."""

    store: tuple[str, int]
    run_id: str
    num_ranks: int
    command: list[str]
    address: str | None
    grace_seconds: float
    join_seconds: float
    settle_seconds: float
    keep_alive_seconds: float
    store_seconds: float
    port: int
    host: str
    linger_seconds: float
    gpu_metrics: bool
    log_dir: Path | None


def read_policy(args: argparse.Namespace) -> Policy:
    fewest, _, most = args.nnodes.partition(":")
    if not (fewest.isdigit() and (most or fewest).isdigit() and 1 <= int(fewest) <= int(most or fewest)):
        raise UserError(f"--nnodes must be N or MIN:MAX with 1 <= MIN <= MAX, got {args.nnodes}")
    return Policy(
        int(fewest),
        int(most or fewest),
        max_restarts=args.max_restarts,
        backoff_seconds=args.backoff_seconds,
        batch=args.admissible_batch,
        inadmissible=args.inadmissible,
    )


def read_options(args: argparse.Namespace) -> Options:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserError("a script is required: ... run [options] -- launcher/pretrain.py --config CONFIG")
    if not (Path(command[0]).is_file() or shutil.which(command[0])):
        raise UserError(f"the script {command[0]!r} cannot be found; give its path from here, {Path.cwd()}")
    host, _, port = args.store.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--store must be HOST:PORT, got {args.store}")
    if args.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node must be at least 1, got {args.nproc_per_node}")
    return Options(
        store=(host.strip("[]"), int(port)),
        run_id=args.run_id,
        num_ranks=args.nproc_per_node,
        command=[sys.executable, "-u", *command] if command[0].endswith(".py") else command,
        address=args.address,
        grace_seconds=args.grace_seconds,
        join_seconds=args.join_seconds,
        settle_seconds=args.settle_seconds,
        keep_alive_seconds=args.keep_alive_seconds,
        store_seconds=args.store_seconds,
        port=args.port,
        host=args.host,
        linger_seconds=args.linger_seconds,
        gpu_metrics=args.gpu_metrics == "on",
        log_dir=args.log_dir,
    )
