"""Directories and object stores behind the same few functions; their failures become one-line user errors.

S3 goes through boto3 and its credential chain (environment, profile, web identity, instance role), never unsigned.
``S3_ENDPOINT_URL`` or ``AWS_ENDPOINT_URL`` names an S3-compatible server. Other schemes use mosaicml-streaming's clients.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from personmae.errors import UserError

_HINTS = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the name",
    "404": "it does not exist; correct the name",
    "NoSuchKey": "it does not exist; correct the name",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "these credentials may not do this; check the bucket's policy",
    "403": "these credentials may not do this; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def is_remote(root: str | Path) -> bool:
    """Whether ``root`` names an object store rather than a directory."""
    return "://" in str(root)


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``; the prefix ends with a slash unless it is empty."""
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"a location like s3://bucket/prefix is required; got {url}")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


@functools.cache
def s3_client() -> Any:
    """One client for the process; short time-outs, so that a wrong address is an error within seconds."""
    import boto3
    from botocore.config import Config

    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    config = Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 4, "mode": "standard"})
    try:
        return boto3.client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise UserError(f"S3_ENDPOINT_URL or AWS_ENDPOINT_URL must be an address like http://host:port: {error}") from None


@contextmanager
def explained(location: str, what: str) -> Iterator[None]:
    """Turn the errors of an object store while ``what`` is done at ``location`` into a ``UserError``."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        hint = _HINTS.get(code, str(error))
        raise UserError(f"{what} {location} was refused ({code}): {hint}") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or run under a role that has access"
        raise UserError(f"{what} {location} needs credentials and none were found; {hint}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(f"{what} {location} failed: {error}; check the address and S3_ENDPOINT_URL") from error


def list_sizes(root: str) -> dict[str, int] | None:
    """Size in bytes of each file directly below ``root``; None where the store cannot list.

    Raises:
        UserError: the directory or bucket does not exist or may not be read.
    """
    if not is_remote(root):
        directory = Path(root)
        if not directory.is_dir():
            raise UserError(f"a directory or s3://bucket/prefix is required; {root} does not exist")
        return {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}
    if not root.startswith("s3://"):
        return None
    bucket, prefix = split_s3(root)
    sizes: dict[str, int] = {}
    with explained(root, "listing"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            sizes |= {item["Key"].removeprefix(prefix): item["Size"] for item in page.get("Contents", [])}
    return sizes


def fetch(root: str, name: str, target: Path) -> None:
    """Copy ``root/name`` of an object store to the file ``target``, which must not exist yet."""
    if root.startswith("s3://"):
        bucket, prefix = split_s3(root)
        with explained(f"{root}/{name}", "reading"):
            s3_client().download_file(bucket, f"{prefix}{name}", str(target))
        return
    from streaming.base.storage import CloudDownloader

    CloudDownloader.get(root).download(f"{root.rstrip('/')}/{name}", str(target), timeout=60)


def delete(root: str, names: list[str]) -> None:
    """Remove files directly below an ``s3://`` location or a directory."""
    if not is_remote(root):
        for name in names:
            (Path(root) / name).unlink(missing_ok=True)
    elif root.startswith("s3://"):
        bucket, prefix = split_s3(root)
        with explained(root, "deleting below"):
            for name in names:
                s3_client().delete_object(Bucket=bucket, Key=f"{prefix}{name}")
