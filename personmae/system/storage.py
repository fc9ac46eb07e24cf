"""Directories and object stores behind the same few functions. Their failures become one-line user errors.

S3 goes through boto3 and its credential chain (environment, profile, web identity, instance role), never unsigned.
``S3_ENDPOINT_URL`` or ``AWS_ENDPOINT_URL`` names an S3-compatible server. Other schemes use mosaicml-streaming's clients.
Nothing here tries again: who reads decides that, by ``retry``.
"""

import functools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from personmae.errors import UserError
from personmae.system import locations, mosaic

READ_TIMEOUT_SECONDS = 15  # without a byte. A stalled connection is given up for another
_BLOCK = 1 << 20
_MOST_DELETED = 1000  # by one request, S3's own bound
_making_client = threading.Lock()  # it takes a tenth of a second and ten megabytes: threads must not make one each

# Answers of servers that delete one object at a time, or that want another checksum of a list than ours.
_ONE_BY_ONE = {"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "InvalidRequest", "MalformedXML", "501", "405", "400"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_HINTS = {
    "ExpiredToken": "the credentials have expired. Get new ones",
    "ExpiredTokenException": "the credentials have expired. Get new ones",
    "RequestExpired": "the credentials have expired, or this machine's clock is wrong. Get new ones",
    "NoSuchBucket": "the bucket does not exist. Create it or correct the name",
    "404": "it does not exist. Correct the name",
    "NoSuchKey": "it does not exist. Correct the name",
    "InvalidAccessKeyId": "the server does not know this access key. Check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit the access key. Check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "these credentials may not do this. Check the bucket's policy",
    "403": "these credentials may not do this. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def is_remote(root: str | Path) -> bool:
    """Whether ``root`` names an object store rather than a directory."""
    return locations.is_remote(str(root))


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``. The prefix ends with a slash unless it is empty.

    This is no URL: a key is taken as it is, whatever characters it has. Only slashes at its end do not count.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"a location like s3://bucket/prefix is required. Got {url}")
    prefix = key.rstrip("/")
    return bucket, f"{prefix}/" if prefix else ""


def is_s3(root: str) -> bool:
    """Whether an object store is S3. The others are mosaicml-streaming's to reach, which reads their locations as URLs.

    Raises:
        UserError: it is another store's location with characters after which those clients would cut it off.
    """
    if root.startswith("s3://"):
        return True
    if wrong := re.search(r"[#?;\x00-\x20]", root):
        raise UserError(
            f"a location of {root.partition('://')[0]}:// must have no '#', '?', ';' or space, for its client reads it as a "
            f"URL. {root} has {wrong.group()!r}: rename the prefix"
        )
    return False


@functools.cache
def s3_client(max_attempts: int = 4) -> Any:
    """One client for the process. Short time-outs, so that a wrong address is an error within seconds."""
    from boto3.session import Session
    from botocore.config import Config

    endpoint = os.environ.get("S3_ENDPOINT_URL") or None
    config = Config(
        connect_timeout=5,
        read_timeout=READ_TIMEOUT_SECONDS,
        retries={"total_max_attempts": max_attempts, "mode": "standard"},
        max_pool_connections=64,
        request_checksum_calculation="when_required",  # S3-compatible servers refuse others. Readers have hashes
        response_checksum_validation="when_required",
    )
    try:  # a session of its own: the default one would keep credentials that have expired
        return Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise UserError(f"S3_ENDPOINT_URL or AWS_ENDPOINT_URL must be an address like http://host:port: {error}") from None


def shared_client(max_attempts: int = 4) -> Any:
    """As ``s3_client``, for threads that may be the first to ask."""
    with _making_client:
        return s3_client(max_attempts)


def s3_identity() -> str:
    """Whose credentials are in use and where they come from, for a log. Never the secret."""
    client = s3_client()
    credentials = client._request_signer._credentials  # no public way leads from a client to what it signs with
    if credentials is None:
        return f"no credentials, endpoint {client.meta.endpoint_url}"
    return f"access key {credentials.access_key[:4]}... from {credentials.method}, endpoint {client.meta.endpoint_url}"


def renew_credentials() -> None:
    """Forget the client, so that the next one reads the credentials anew."""
    s3_client.cache_clear()


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
        hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or run under a role that has access"
        raise UserError(f"{what} {location} needs credentials and none were found. {hint}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(f"{what} {location} failed: {error}. Check the address and S3_ENDPOINT_URL") from error
    except FileNotFoundError as error:
        raise UserError(f"{what} {location} failed: it does not exist. Correct the name") from error
    except (ConnectionError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} {location} failed: {error}. Check the address and the credentials of its client") from error


def is_denied(error: UserError) -> bool:
    """Whether a store has refused what was asked because the credentials may not do it."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code") in ("AccessDenied", "Forbidden", "403")


def is_final(error: UserError) -> bool:
    """Whether a store will answer the same however often it is asked: names and credentials that are wrong or missing.

    False for what may pass, such as credentials that have expired, and for answers that are not known here.
    """
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

    cause = error.__cause__
    if isinstance(cause, ClientError):
        return cause.response.get("Error", {}).get("Code", "") in _HINTS.keys() - _EXPIRED
    return cause is None or isinstance(cause, NoCredentialsError | PartialCredentialsError | ParamValidationError)


def list_sizes(root: str) -> dict[str, int] | None:
    """Size in bytes of each file directly below ``root``. None where the store cannot list.

    Raises:
        UserError: the directory or bucket does not exist or may not be read.
    """
    if not is_remote(root):
        directory = Path(root)
        if not directory.is_dir():
            raise UserError(f"a directory or s3://bucket/prefix is required. {root} does not exist")
        return {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}
    if not is_s3(root):
        return None
    bucket, prefix = split_s3(root)
    sizes: dict[str, int] = {}
    with explained(root, "listing"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            sizes |= {item["Key"].removeprefix(prefix): item["Size"] for item in page.get("Contents", [])}
    return sizes


def list_folders(root: str) -> list[str] | None:
    """Names of the folders directly below an ``s3://`` location or a directory. None where the store cannot list.

    Raises:
        UserError: the bucket does not exist or may not be read.
    """
    if not is_remote(root):
        return [entry.name for entry in os.scandir(root) if entry.is_dir()] if Path(root).is_dir() else []
    if not is_s3(root):
        return None
    bucket, prefix = split_s3(root)
    with explained(root, "listing"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
    return [folder.removeprefix(prefix).rstrip("/") for folder in found]


def fetch_into(file: BinaryIO, root: str, name: str, check: Callable[[], None]) -> None:
    """Append ``root/name`` of an object store to ``file``, from the byte at which ``file`` stands.

    Whatever goes wrong is raised as the store's client raises it. What had arrived by then has been written. ``check`` is
    called now and then, and ends the reading by raising.
    """
    if not is_s3(root):
        _fetch_with_streaming(file, root, name)
        return
    bucket, prefix = split_s3(root)
    start = file.tell()
    asked = {"Range": f"bytes={start}-"} if start else {}
    body = shared_client(1).get_object(Bucket=bucket, Key=f"{prefix}{name}", **asked)["Body"]
    with body:
        for block in body.iter_chunks(_BLOCK):
            check()
            file.write(block)


def _fetch_with_streaming(file: Any, root: str, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{Path(file.name).name}.", dir=Path(file.name).parent) as folder:
        whole = Path(folder) / name
        try:
            downloader = mosaic.load("streaming.base.storage").CloudDownloader.get(root)
            downloader.download(f"{root.rstrip('/')}/{name}", str(whole), timeout=60)
        except (OSError, ImportError, ValueError):
            raise
        except Exception as error:  # each client has exceptions of its own
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        file.seek(0)
        with whole.open("rb") as source:
            shutil.copyfileobj(source, file, _BLOCK)


def read(root: str, name: str) -> bytes | None:
    """The content of a small file directly below a location. None where there is no such file."""
    if not is_remote(root):
        path = Path(root) / name
        return path.read_bytes() if path.is_file() else None
    if is_s3(root):
        bucket, prefix = split_s3(root)
        client = s3_client()
        with explained(f"{root}/{name}", "reading"):
            try:
                return client.get_object(Bucket=bucket, Key=f"{prefix}{name}")["Body"].read()
            except client.exceptions.NoSuchKey:
                return None
    with tempfile.NamedTemporaryFile() as file, explained(f"{root}/{name}", "reading"):
        try:
            _fetch_with_streaming(file, root, name)
        except FileNotFoundError:
            return None
        file.seek(0)
        return file.read()


def upload(root: str, name: str, path: Path) -> None:
    """Copy a local file to ``root/name`` of an object store."""
    if is_s3(root):
        bucket, prefix = split_s3(root)
        with explained(f"{root}/{name}", "writing"):
            s3_client().upload_file(str(path), bucket, f"{prefix}{name}")
        return
    if path.name != name:
        raise ValueError(f"{path} must already be called {name}")
    with explained(f"{root}/{name}", "writing"):
        clients = mosaic.load("streaming.base.storage").CloudUploader
        uploader = clients.get((str(path.parent), root.rstrip("/")), keep_local=True, exist_ok=True)
        uploader.upload_file(name)


def write(root: str, name: str, content: bytes) -> None:
    """Make ``content`` the small file ``root/name`` of an object store."""
    if is_s3(root):
        bucket, prefix = split_s3(root)
        with explained(f"{root}/{name}", "writing"):
            s3_client().put_object(Bucket=bucket, Key=f"{prefix}{name}", Body=content)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        upload(root, name, Path(folder) / name)


def copy(root: str, name: str, to: str) -> None:
    """Copy the file ``root/name`` of an ``s3://`` store to ``to/name`` of the same. The server moves the bytes."""
    bucket, prefix = split_s3(root)
    to_bucket, to_prefix = split_s3(to)
    with explained(f"{root}/{name}", "copying"):
        s3_client().copy({"Bucket": bucket, "Key": f"{prefix}{name}"}, to_bucket, f"{to_prefix}{name}")


def delete(root: str, names: list[str]) -> None:
    """Remove files directly below an ``s3://`` location or a directory, in any order."""
    if not is_remote(root):
        for name in names:
            (Path(root) / name).unlink(missing_ok=True)
    elif is_s3(root):
        bucket, prefix = split_s3(root)
        with explained(root, "deleting below"):
            for start in range(0, len(names), _MOST_DELETED):
                _delete_objects(bucket, [f"{prefix}{name}" for name in names[start : start + _MOST_DELETED]])


def _delete_objects(bucket: str, keys: list[str]) -> None:
    """Remove objects by one request, or by one each at a server that knows no other.

    Raises:
        ClientError: one or more could not be removed. The first is named.
    """
    from botocore.exceptions import ClientError

    client = s3_client()
    try:
        asked = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        errors = client.delete_objects(Bucket=bucket, Delete=asked).get("Errors", []) if len(keys) > 1 else None
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in _ONE_BY_ONE:
            raise
        errors = None
    if errors is None:
        for key in keys:
            client.delete_object(Bucket=bucket, Key=key)
    elif errors:
        first = {"Code": errors[0].get("Code", ""), "Message": f"{errors[0].get('Key')}: {errors[0].get('Message')}"}
        raise ClientError({"Error": first}, "DeleteObjects")
