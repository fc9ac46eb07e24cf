"""What compilers have left on this disk, and what a kill has spoiled of it.

torch.compile links its libraries in place and later trusts what it finds. A library that a kill or a full disk cut short
would end each later start, by a traceback or by SIGBUS. So it is looked for before anything is compiled.
"""

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # of a 64-bit ELF file
_OFFSET_AND_SIZE, _SEGMENT_BYTES = (8, 32), 56  # of a segment in the file, within its entry, and that entry's own
_LITTLE_64 = b"\x7fELF\x02\x01"


def mend() -> list[Path]:
    """Remove damaged libraries from the caches of torch.compile, Triton and extensions. They are compiled again.

    What another process is compiling is left alone. Returns what was removed, and says so.
    """
    removed = [path for folder in _folders() for path in _damaged(folder) if _remove(path, folder / "locks")]
    for path in removed:
        print(f"compiler: {path} was cut short. It is removed and compiled again", flush=True)
    return removed


def is_whole(path: Path) -> bool:
    """Whether a library has all that its header says: the tables of its sections and segments, and what those point at."""
    with path.open("rb") as file:
        header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
        if len(header) < _HEADER.size or not header.startswith(b"\x7fELF"):
            return False
        if not header.startswith(_LITTLE_64):  # of another machine: nothing is known
            return True
        fields = _HEADER.unpack(header)
        segments, sections = fields[5], fields[6]
        segment_bytes, num_segments, section_bytes, num_sections = fields[9:13]
        if max(segments + segment_bytes * num_segments, sections + section_bytes * num_sections) > size:
            return False
        file.seek(segments)
        table = file.read(segment_bytes * num_segments)
    if not num_segments or segment_bytes < _SEGMENT_BYTES:  # nothing could be loaded
        return False
    starts = (number * segment_bytes for number in range(num_segments))
    return all(sum(struct.unpack_from("<Q", table, start + skip)[0] for skip in _OFFSET_AND_SIZE) <= size for start in starts)


def _folders() -> list[Path]:
    """Where this process's compilers keep their results, as far as that exists."""
    defaults = {
        "TORCHINDUCTOR_CACHE_DIR": _inductor_default,
        "TRITON_CACHE_DIR": lambda: f"{os.environ.get('TRITON_HOME') or Path.home()}/.triton/cache",
        "TORCH_EXTENSIONS_DIR": lambda: f"{Path.home()}/.cache/torch_extensions",
    }
    folders = [Path(os.environ.get(name) or default()) for name, default in defaults.items()]
    return [folder for folder in folders if folder.is_dir()]


def _inductor_default() -> str:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    return default_cache_dir()


def _damaged(folder: Path) -> Iterator[Path]:
    """Libraries that are not whole, and modules of which nothing was written."""
    for path in [*folder.rglob("*.so"), *folder.rglob("*.py")]:
        with contextlib.suppress(OSError):  # another process may have removed it, or it is another user's
            if path.suffix == ".so" and not is_whole(path):
                yield path
            if path.suffix == ".py" and path.name != "__init__.py" and not path.stat().st_size:  # a package's is often empty
                yield path


def _remove(path: Path, locks: Path) -> bool:
    """Remove a file unless its compiler is at work on it now: torch locks each by the part of its name before the first dot."""
    lock = locks / f"{path.name.partition('.')[0]}.lock"
    try:
        with lock.open("ab") if locks.is_dir() else contextlib.nullcontext() as held:
            if held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # locked, gone, or not ours to remove
        return False
    return True
