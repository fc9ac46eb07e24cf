"""What launching needs of a bucket: is the data there, fetch a benchmark and an encoder, leave a result.

``python -m launcher.cluster.bucket fetch`` is what a benchmark's pod does first. The client and its settings are those of
``personmae.system.storage``. Here only what another try cannot change becomes a user error: with code 78 one moment without
the network would end a benchmark.
"""

import argparse
import shutil
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personmae.commands.arguments import Parser
from personmae.errors import UserError, run_command, run_program
from personmae.keys.renamed import print_new_name
from personmae.system import files, storage

_NUM_THREADS = 16
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and fetch; returns the exit code."""
    parser = Parser(prog="python -m launcher.cluster.bucket", description="Fetch what a benchmark needs into a pod.")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    fetch = commands.add_parser("fetch", help="copy a benchmark and an encoder from a bucket")
    benchmark = fetch.add_mutually_exclusive_group(required=True)
    benchmark.add_argument("--benchmark", metavar="URL", help="s3://bucket/x.tar, or a prefix with single files")
    benchmark.add_argument("--pictures", help=argparse.SUPPRESS)  # its old name, which manifests of before have
    fetch.add_argument("--encoder", required=True, metavar="URL", help="where a run uploads its checkpoints, or 'random'")
    fetch.add_argument("--into", required=True, type=Path, metavar="DIR", help="gets the folders benchmark and encoder")
    args = parser.parse_args(argv)
    return run_program(lambda: _fetch(args))


def split(url: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` location, with no slash at the key's end.

    This is no URL: a key is taken as it is, whatever characters it has.
    """
    bucket, prefix = storage.split_s3(url)
    return bucket, prefix.removesuffix("/")


@contextmanager
def explained(url: str, what: str) -> Iterator[None]:
    """Turn what another try cannot change into a ``UserError``; anything else, a lost connection too, is raised as it is."""
    try:
        with storage.explained(url, what):
            yield
    except UserError as error:
        if storage.is_final(error) or error.__cause__ is None:
            raise
        raise error.__cause__ from None


def require_shards(url: str) -> None:
    """Raise a ``UserError`` unless a data set lies at an ``s3://`` location."""
    bucket, prefix = storage.split_s3(url)
    with explained(url, "looking for shards at"):
        found = _first(bucket, f"{prefix}index.json")
    if not found:
        raise UserError(f"shards are required at {url} and it has no index.json; write them: personmae shards write SRC {url}")


def require_bucket(url: str) -> None:
    """Raise a ``UserError`` unless the bucket of a location is there."""
    with explained(url, "looking for the bucket of"):
        storage.s3_client().head_bucket(Bucket=split(url)[0])


def require_something(url: str) -> None:
    """Raise a ``UserError`` unless there is a file, or anything below a prefix."""
    bucket, key = split(url)
    with explained(url, "looking at"):
        found = _first(bucket, key)
        if not found or found["Key"] != key:
            found = _first(*storage.split_s3(url))
    if not found:
        raise UserError(f"nothing lies at {url}; upload it or correct the name")


def age_seconds(url: str) -> float | None:
    """Time since a file was written; None where there is none."""
    bucket, key = split(url)
    with explained(url, "looking at"):
        found = _first(bucket, key)
    return time.time() - found["LastModified"].timestamp() if found and found["Key"] == key else None


def _first(bucket: str, prefix: str) -> dict[str, Any] | None:
    """The first of the files whose keys begin so: of those that begin alike the one with the shortest key."""
    found = storage.s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents", [])
    return found[0] if found else None


def read(url: str) -> bytes | None:
    """A small file; None where there is none."""
    with explained(url, "reading"):
        return storage.read(*_folder_and_name(url))


def write(url: str, content: bytes) -> None:
    """Make ``content`` the file at ``url``."""
    with explained(url, "writing"):
        storage.write(*_folder_and_name(url), content)


def _folder_and_name(url: str) -> tuple[str, str]:
    bucket, key = split(url)
    folder, _, name = key.rpartition("/")
    return f"s3://{bucket}/{folder}", name


def check_benchmark(url: str) -> None:
    """Raise a ``UserError`` for a packed benchmark that is not a plain tar."""
    if url.lower().endswith(_PACKED):
        raise UserError(f"a benchmark must be an uncompressed .tar or a prefix of single files; got {url}: pack it again")


def fetch_benchmark(url: str, target: Path) -> None:
    """Copy a benchmark: a tar is unpacked, a prefix is copied file by file."""
    check_benchmark(url)
    partial = _empty(target.with_name(f".partial-{target.name}"))
    if url.endswith(".tar"):
        _unpack(url, partial)
    else:
        _copy(url, "", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _unpack(url: str, target: Path) -> None:
    bucket, key = split(url)
    packed = target / "packed.tar"
    with explained(url, "fetching"):
        storage.s3_client().download_file(bucket, key, str(packed))
    try:
        with tarfile.open(packed) as tar:
            tar.extractall(target, filter="data")
    except tarfile.TarError as error:
        raise UserError(f"{url} must be an uncompressed tar of the benchmark's folder: {error}") from error
    packed.unlink()


def fetch_encoder(url: str, target: Path) -> None:
    """Copy the newest checkpoint that a run has uploaded to where a run directory has it; readers check its hashes."""
    url = url.rstrip("/")
    latest = read(f"{url}/LATEST")
    if not latest:
        raise UserError(f"{url} has no checkpoint; train it first, or correct the name")
    name = latest.decode().strip()
    folder = _empty(target) / "checkpoints"  # a store has none of this name, and readers of a run directory look there
    _copy(url, f"{name}/", folder / name)
    files.replace(folder / "LATEST", latest)


def _fetch(args: argparse.Namespace) -> None:
    start = time.monotonic()
    folder, benchmark = "benchmark", args.benchmark
    if args.pictures:
        print_new_name("--pictures", "--benchmark")
        folder, benchmark = "pictures", args.pictures  # the root that the configuration beside it has
    fetch_benchmark(benchmark, args.into / folder)
    if args.encoder != "random":
        fetch_encoder(args.encoder, args.into / "encoder")
    print(f"fetched {benchmark} and {args.encoder} in {time.monotonic() - start:.0f} s", flush=True)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _copy(url: str, below: str, target: Path) -> None:
    bucket, prefix = storage.split_s3(url)
    prefix += below
    s3 = storage.s3_client()
    with explained(url, "fetching"):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        names = [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]
        if not names:
            raise UserError(f"nothing lies at s3://{bucket}/{prefix}; upload it or correct the name")

        def copy(name: str) -> None:
            path = target / name
            if target.resolve() not in path.resolve().parents:
                raise UserError(f"s3://{bucket}/{prefix}{name} would be written outside of {target}; rename it")
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, f"{prefix}{name}", str(path))

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for done in [pool.submit(copy, name) for name in names if not name.endswith("/")]:
                done.result()


if __name__ == "__main__":
    run_command(main)
