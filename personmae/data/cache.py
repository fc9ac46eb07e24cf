"""The shards of one data set on this host: fetched, checked, kept within a limit, and shared by the ranks of the host.

A file with a shard's name is whole and has its hash. It is fetched under another name first. Ranks agree through advisory
locks on these files themselves, which the kernel drops whenever a process ends. A reader holds a shared lock on its shard,
so that nobody removes it. A fetcher holds an exclusive lock on the unfinished file, so that nobody else fetches it.
Nothing else is left behind that would have to be cleaned up or waited for.
"""

import contextlib
import copy
import enum
import errno
import fcntl
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from personmae.data import mds
from personmae.data.attempts import Attempts
from personmae.data.counters import StreamCounters
from personmae.data.mds import MappedShard, Shard
from personmae.errors import UserError
from personmae.system import retry, storage
from personmae.system.retry import WrongHash

_POLL_SECONDS = 0.05
_FULL_SECONDS = 10.0  # that a disk may stay full of what other ranks hold
_PART = ".part"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Cancelled(Exception):  # noqa: N818 - a way to end
    """The cache was closed while something was being fetched."""


class NotNow(enum.Enum):
    """Why a shard could not be opened at once."""

    FETCHED_ELSEWHERE = "another rank is fetching it"
    NO_ROOM = "others that are used sooner fill the cache"


class HeldShard:
    """A mapped shard that stays on this host until it is released."""

    def __init__(self, mapped: MappedShard, lock: BinaryIO | None):
        self.mapped, self._lock = mapped, lock

    def release(self) -> None:
        """Let the file be removed when room is needed. Slices of it stay readable."""
        if self._lock:
            self._lock.close()


class ShardCache:
    """Opens the shards of a directory in place, and those of an object store by way of ``directory``.

    ``limit_bytes`` bounds the files in ``directory``, None leaves them alone. Fetching goes on through errors that may
    pass until no byte has come for ``retry_seconds``.
    """

    def __init__(
        self,
        root: str,
        index: bytes,
        directory: Path,
        *,
        limit_bytes: int | None,
        retry_seconds: float,
        counters: StreamCounters,
    ):
        self.root, self.shards = root, mds.parse_index(index, f"{root}/{mds.INDEX}")
        self.remote = storage.is_remote(root)
        # Another data set, or another version of this one, has another index and never meets these files.
        self.directory = directory / f"shards-{xxhash.xxh64(index).hexdigest()}" if self.remote else Path(root)
        self._limit, self._retry_seconds, self._counters = limit_bytes, retry_seconds, counters
        self._next_use: Callable[[str], float] = lambda name: 0.0
        self._give_back: Callable[[], bool] = lambda: False
        self._full_since: float | None = None
        self._closed = threading.Event()
        self._parts: set[Path] = set()  # unfinished files of this cache. The directory's lock guards it
        self._stuck: set[Path] = set()  # files that could not be removed, which was told
        if self.remote:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()

    def for_reader(self, next_use: Callable[[str], float], give_back: Callable[[], bool]) -> "ShardCache":
        """The same cache with an end of its own, which removes first what ``next_use`` gives the highest number.

        ``give_back`` releases a shard that its reader holds ahead of need, and says whether there was one: another is needed.
        """
        mine = copy.copy(self)
        mine._next_use, mine._give_back = next_use, give_back
        mine._closed, mine._parts = threading.Event(), set()
        return mine

    def close(self) -> None:
        """End what is being fetched and remove it: a thread that waits for the network may not notice for a while."""
        self._closed.set()
        if self.remote:
            with contextlib.suppress(FileNotFoundError), self._directory_lock():
                while self._parts:
                    self._discard(self._parts.pop())

    def open(self, index: int) -> HeldShard:
        """Map a shard, fetching it first where it is missing.

        Raises:
            UserError: it cannot be had, or does not have the hash of the index.
            Cancelled: the cache was closed meanwhile.
        """
        while isinstance(held := self.open_if_possible(index, needed=True), NotNow):
            self._pause(_POLL_SECONDS)
        return held

    def open_if_possible(self, index: int, *, needed: bool = False) -> HeldShard | NotNow:
        """Like ``open``, but without waiting for another rank or for room.

        What is ``needed`` takes room even beyond the limit: a consumer that waits for it may be what others wait for.
        """
        shard = self.shards[index]
        if not self.remote:
            return self._open_in_place(shard)
        if held := self._take(shard):
            self._counters.hits.inc()
            self._counters.bytes.labels("cache").inc(shard.num_bytes)
            return held
        part = self._claim(shard, needed=needed)
        if isinstance(part, NotNow):
            return part
        with contextlib.ExitStack() as stack:
            stack.enter_context(part)
            self._counters.misses.inc()
            self._fetch(part, shard)
            held = HeldShard(MappedShard(self.directory / shard.name, shard), part)
            fcntl.flock(part, fcntl.LOCK_SH)  # removed in this instant, it would still be mapped
            stack.pop_all()
            return held

    def _open_in_place(self, shard: Shard) -> HeldShard:
        path = self.directory / shard.name
        try:
            whole = mds.agrees(path, shard)
        except FileNotFoundError:
            raise UserError(f"shard {self.root}/{shard.name} is missing. Write the data set again") from None
        if not whole:
            self._counters.corrupt.inc()
            raise UserError(f"shard {self.root}/{shard.name} does not have the size and hash its index gives. Write it again")
        self._counters.bytes.labels("cache").inc(shard.num_bytes)
        return HeldShard(MappedShard(path, shard), None)

    def _take(self, shard: Shard) -> HeldShard | None:
        """Lock, check and map a shard that is here."""
        path = self.directory / shard.name
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:  # it may be removed meanwhile
            lock = stack.enter_context(path.open("rb"))
            fcntl.flock(lock, fcntl.LOCK_SH)  # who removes a file holds it for an instant only
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return None
            if mds.agrees(path, shard):
                held = HeldShard(MappedShard(path, shard), lock)
                stack.pop_all()
                return held
            with self._directory_lock():  # damaged on this disk
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    self._counters.corrupt.inc()
                    path.unlink()
        return None

    def _claim(self, shard: Shard, *, needed: bool) -> BinaryIO | NotNow:
        """The unfinished file, locked and with its full size reserved on the disk."""
        path = self.directory / f"{shard.name}{_PART}"
        with self._directory_lock(), contextlib.ExitStack() as stack:  # two ranks must not give the same room away
            if self._closed.is_set():
                raise Cancelled
            part = stack.enter_context(open(path, "r+b", buffering=0, opener=_open_or_create))
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return NotNow.FETCHED_ELSEWHERE
            stack.callback(self._discard, path)
            if (self.directory / shard.name).exists():
                return NotNow.FETCHED_ELSEWHERE
            if not self._reserve(part, shard, needed=needed):
                return NotNow.NO_ROOM
            stack.pop_all()
            self._parts.add(path)
            return part

    def _reserve(self, part: BinaryIO, shard: Shard, *, needed: bool) -> bool:
        """Give ``part`` the shard's size, removing others where the limit or the disk asks for it."""
        os.truncate(part.fileno(), 0)
        earliest = -math.inf if needed else self._next_use(shard.name)
        while self._limit is not None and self._used_bytes() + shard.num_bytes > self._limit:
            if not self._make_room(earliest, needed):
                if needed:
                    break
                return False
        while True:
            try:
                os.posix_fallocate(part.fileno(), 0, shard.num_bytes)
                break
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                if self._make_room(earliest, needed):
                    continue
                if needed and self._stays_full():
                    raise self._disk_full(part, shard) from error
                return False
        self._full_since = None
        self._counters.cache_bytes.set(self._used_bytes())
        return True

    def _make_room(self, earliest: float, needed: bool) -> bool:
        return self._evict(earliest) or (needed and self._give_back())

    def _stays_full(self) -> bool:
        """Whether there is nothing that other ranks could let go, or they have not done so for a while."""
        self._full_since = self._full_since or time.monotonic()
        return len(os.listdir(self.directory)) == 1 or time.monotonic() - self._full_since > _FULL_SECONDS

    def _evict(self, earliest: float) -> bool:
        """Remove the shard that is used last among those that no rank holds and this one does not use before ``earliest``."""
        present = [path for path in self.directory.iterdir() if path.is_file() and path.suffix != _PART]
        uses = [(self._next_use(path.name), path) for path in present]
        for _, path in sorted((use for use in uses if use[0] >= earliest), reverse=True):
            with self._passing_over(path), path.open("rb") as victim:
                fcntl.flock(victim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                self._counters.evictions.inc()
                return True
        return False

    @contextmanager
    def _passing_over(self, path: Path) -> Iterator[None]:
        """Go on with the others where a file is gone or held, or cannot be removed, which is told once."""
        try:
            yield
        except (FileNotFoundError, BlockingIOError):
            pass
        except OSError as error:
            if path not in self._stuck:
                print(f"{path} is no longer needed and is left: {error.strerror or error}", flush=True)
            self._stuck.add(path)

    def _used_bytes(self) -> int:
        total = 0
        for entry in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size if entry.is_file() else 0
        return total

    @contextmanager
    def _directory_lock(self) -> Iterator[None]:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"data.cache_dir must be on a disk whose directories can be locked. {self.directory} is not "
                    f"({error.strerror}): choose one of this host"
                ) from error
            yield
        finally:
            os.close(handle)

    def _remove_abandoned(self) -> None:
        """Remove what a killed process did not finish."""
        with self._directory_lock():
            for path in self.directory.glob(f"*{_PART}"):
                with self._passing_over(path), path.open("rb") as part:
                    fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._discard(path)
            for folder in self.directory.glob(f"*{_PART}.*"):
                if not folder.with_suffix("").exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        """Remove an unfinished file and what a client has put beside it."""
        path.unlink(missing_ok=True)
        for folder in self.directory.glob(f"{path.name}.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, part: BinaryIO, shard: Shard) -> None:
        """Fill the unfinished file, check it and give it its name."""
        path = Path(part.name)
        try:
            self._fill(part, shard)
            with self._directory_lock():  # names of unfinished files change under it only
                self._check_open()
                path.rename(self.directory / shard.name)
                self._parts.discard(path)
        except BaseException as error:
            with self._directory_lock():
                if path in self._parts:  # otherwise it has been removed, and the name may be another's by now
                    self._parts.discard(path)
                    self._discard(path)
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise self._disk_full(part, shard) from error
            raise

    def _fill(self, part: BinaryIO, shard: Shard) -> None:
        """Read until the content has the hash of the index. Continue where a broken connection stopped."""
        attempts = Attempts(f"{self.root}/{shard.name}", self._retry_seconds, self._counters, self._pause)
        read_before = part.tell()

        def wait(error: Exception) -> bool:
            nonlocal read_before
            again = attempts.wait(error, progress=part.tell() > read_before)
            if isinstance(error, WrongHash):
                part.seek(0)
                part.truncate(shard.num_bytes)
            read_before = part.tell()
            return again

        with storage.explained(attempts.location, "reading shard"):
            retry.retry(lambda: self._try_to_fill(part, shard), wait)

    def _try_to_fill(self, part: BinaryIO, shard: Shard) -> None:
        """Read what is missing of the unfinished file, and check the whole. All of it is counted.

        Raises:
            WrongHash: it is not what the index says.
            Cancelled: the cache was closed meanwhile.
        """
        before, start = part.tell(), time.monotonic()
        try:
            if before < shard.num_bytes:
                storage.fetch_into(part, self.root, shard.name, self._check_open)
            if part.tell() != shard.num_bytes or not mds.agrees(Path(part.name), shard):
                raise WrongHash
        except Exception as error:
            if self._closed.is_set():
                raise Cancelled from None
            self._counters.requests.labels("get", retry.passing_reason(error) or "refused").inc()
            if isinstance(error, WrongHash):
                self._counters.corrupt.inc()
            raise
        finally:
            self._counters.request_seconds.observe(time.monotonic() - start)
            self._counters.bytes.labels("remote").inc(max(0, part.tell() - before))
        self._counters.requests.labels("get", "ok").inc()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Cancelled

    def _pause(self, seconds: float) -> bool:
        if self._closed.wait(seconds):
            raise Cancelled
        return True

    def _disk_full(self, part: BinaryIO, shard: Shard) -> UserError:
        return UserError(
            f"shard {self.root}/{shard.name} needs {shard.num_bytes:,} bytes and the disk of {Path(part.name).parent} is full. "
            "Make room there, or set data.cache_dir to a larger disk or data.cache_limit_gb to what this one can hold"
        )


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
