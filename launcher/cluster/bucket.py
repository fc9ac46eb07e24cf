"""What launching needs from an object store: is the data there, fetch a benchmark and an encoder, leave a result.

``python -m launcher.cluster.bucket fetch`` is what a benchmark's pod does first. Training itself reads through
``personmae.system.storage``, which launching may not import.
"""

import argparse
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personmae.commands.arguments import Parser
from personmae.errors import UserError, run_program
from personmae.system import files

_NUM_THREADS = 16
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")
_FINAL = {"NoSuchBucket", "NoSuchKey", "404", "AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and fetch; returns the exit code."""
    parser = Parser(prog="python -m launcher.cluster.bucket")
    fetch = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser).add_parser("fetch")
    fetch.add_argument("--pictures", required=True, metavar="URL", help="s3://bucket/x.tar, or a prefix of single files")
    fetch.add_argument("--encoder", required=True, metavar="URL", help="a run's checkpoint.upload_to, or 'random'")
    fetch.add_argument("--into", required=True, type=Path, metavar="DIR", help="gets pictures/ and encoder/")
    args = parser.parse_args(argv)
    return run_program(lambda: _fetch(args))


def split(url: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` location, with no slash at the key's end.

    This is no URL: a key is taken as it is, whatever characters it has.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"a location like s3://bucket/prefix is required; got {url}")
    return bucket, key.rstrip("/")


def _prefix(key: str) -> str:
    """What the keys below ``key`` begin with; of the whole bucket, nothing."""
    return f"{key}/" if key else ""


def client() -> Any:
    """A client by boto3's credential chain; ``S3_ENDPOINT_URL`` names an S3-compatible server."""
    from boto3.session import Session
    from botocore.config import Config

    settings = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"total_max_attempts": 4, "mode": "standard"},
        request_checksum_calculation="when_required",  # S3-compatible servers refuse the others
        response_checksum_validation="when_required",
    )
    return Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL") or None, config=settings)


@contextmanager
def explained(url: str, what: str) -> Iterator[None]:
    """Turn what another try cannot change into a ``UserError``; anything else, a lost connection too, is raised as it is."""
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code not in _FINAL:
            raise
        raise UserError(f"{what} {url} was refused ({code}); correct the name or the credentials") from error
    except NoCredentialsError as error:
        raise UserError(f"{what} {url} needs credentials and none were found; set a profile or AWS_ACCESS_KEY_ID") from error
    except ParamValidationError as error:
        raise UserError(f"{what} {url} failed: {error}; correct the name") from error


def require_shards(url: str) -> None:
    """Raise a ``UserError`` unless a data set lies at an ``s3://`` location."""
    bucket, key = split(url)
    with explained(url, "looking for shards at"):
        found = client().list_objects_v2(Bucket=bucket, Prefix=f"{_prefix(key)}index.json", MaxKeys=1)
    if not found.get("KeyCount"):
        raise UserError(f"shards are required at {url} and it has no index.json; write them: personmae shards write SRC {url}")


def require_bucket(url: str) -> None:
    """Raise a ``UserError`` unless the bucket of a location is there."""
    with explained(url, "looking for the bucket of"):
        client().head_bucket(Bucket=split(url)[0])


def require_something(url: str) -> None:
    """Raise a ``UserError`` unless there is an object, or anything below a prefix."""
    bucket, key = split(url)
    with explained(url, "looking at"):
        found = client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        if not found or found[0]["Key"] != key:  # of keys that begin alike its own comes first
            found = client().list_objects_v2(Bucket=bucket, Prefix=_prefix(key), MaxKeys=1).get("Contents", [])
    if not found:
        raise UserError(f"nothing lies at {url}; upload it or correct the name")


def read(url: str) -> bytes | None:
    """A small object; None where there is none."""
    bucket, key = split(url)
    s3 = client()
    with explained(url, "reading"):
        try:
            return s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        except s3.exceptions.NoSuchKey:
            return None


def write(url: str, content: bytes) -> None:
    """Make ``content`` the object at ``url``."""
    bucket, key = split(url)
    with explained(url, "writing"):
        client().put_object(Bucket=bucket, Key=key, Body=content)


def age_seconds(url: str) -> float | None:
    """Time since an object was written; None where there is none."""
    bucket, key = split(url)
    with explained(url, "looking at"):
        found = client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    return time.time() - found[0]["LastModified"].timestamp() if found and found[0]["Key"] == key else None


def check_pictures(url: str) -> None:
    """Raise a ``UserError`` for a packed benchmark that is not a plain tar."""
    if url.lower().endswith(_PACKED):
        raise UserError(f"a benchmark must be an uncompressed .tar or a prefix of single files; got {url}: pack it anew")


def fetch_pictures(url: str, target: Path) -> None:
    """Copy a benchmark: a tar is unpacked, a prefix is copied file by file."""
    check_pictures(url)
    partial = _empty(target.with_name(f".partial-{target.name}"))
    if url.endswith(".tar"):
        bucket, key = split(url)
        packed = partial / "packed.tar"
        with explained(url, "fetching"):
            client().download_file(bucket, key, str(packed))
        try:
            with tarfile.open(packed) as tar:
                tar.extractall(partial, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"{url} must be an uncompressed tar of the benchmark's folder: {error}") from error
        packed.unlink()
    else:
        _copy(url, "", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def fetch_encoder(url: str, target: Path) -> None:
    """Copy the newest checkpoint of a run's store, with the name that it has there; readers check its hashes."""
    url = url.rstrip("/")
    latest = read(f"{url}/LATEST")
    if not latest:
        raise UserError(f"{url} has no checkpoint; train it first, or correct the name")
    name = latest.decode().strip()
    _copy(url, f"{name}/", _empty(target) / name)
    files.replace(target / "LATEST", latest)


def _fetch(args: argparse.Namespace) -> None:
    start = time.monotonic()
    fetch_pictures(args.pictures, args.into / "pictures")
    if args.encoder != "random":
        fetch_encoder(args.encoder, args.into / "encoder")
    print(f"fetched {args.pictures} and {args.encoder} in {time.monotonic() - start:.0f} s", flush=True)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _copy(url: str, below: str, target: Path) -> None:
    bucket, key = split(url)
    prefix = f"{_prefix(key)}{below}"
    s3 = client()
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
    sys.exit(main())
