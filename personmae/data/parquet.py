"""Parquet files as Hugging Face publishes images."""

import bisect
import functools
import itertools
import threading
from collections.abc import Hashable, Sequence
from typing import Any, BinaryIO, final

from personmae.data.files import Files, key_of, patiently
from personmae.data.tables import Block, Images, Table
from personmae.errors import UserError

_BLOCK_BYTES = 1 << 25  # of a row group, on average: such groups may have gigabytes, and each process keeps blocks
_BUFFER_BYTES = 1 << 20  # of a column, while its pages are read


@final
class Parquet(Table):
    """A parquet file with a column of ``struct<bytes, path>`` or of binary values. A name is ``FILE/ROW``."""

    def __init__(self, files: Files, name: str, prefix: str, column: str | None):
        super().__init__(files, name, prefix, column)
        self._opening = threading.RLock()
        self._handle: BinaryIO | None = None
        self._file: Any = None
        self._versions: dict[int, str] = {}  # of the open file, by row group, since each image asks for one
        self._rows: _Rows | None = None  # of the row group that is being read

    def _opened(self) -> Any:
        """The open file. Its methods are called under the lock."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        if self._file is None:
            self._handle = self.files.open(self.name)
            try:
                self._file = ParquetFile(self._handle, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            except pa.ArrowInvalid as error:
                self.close()
                raise UserError(f"a whole parquet file is required. {self.location} is not one: {error}") from error
        return self._file

    def find_blocks(self) -> list[Block]:
        with self._opening:
            metadata = patiently(self._opened).metadata
            if self._column is None:
                return []
            blocks, first = [], 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                leaves = [group.column(i) for i in range(group.num_columns)]
                own = (self._column, f"{self._column}.bytes")
                size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema in own)
                mean = max(1, size // max(1, group.num_rows))
                step = max(1, _BLOCK_BYTES // mean)
                for start in range(0, group.num_rows, step):
                    row, count = first + start, min(step, group.num_rows - start)
                    blocks.append(Block(key_of(self.prefix), row, count, mean, named_from=row, group=number, start=start))
                first += group.num_rows
            return blocks

    @functools.cached_property
    def _column(self) -> str | None:
        import pyarrow.types as types

        def is_binary(kind: Any) -> bool:
            return types.is_binary(kind) or types.is_large_binary(kind)

        def holds_images(kind: Any) -> bool:
            return is_binary(kind) or (types.is_struct(kind) and any(f.name == "bytes" and is_binary(f.type) for f in kind))

        schema = self._opened().schema_arrow
        return self.choose([field.name for field in schema if holds_images(field.type)])

    def version(self, number: int) -> Hashable:
        block = self.blocks[number]
        with self._opening:
            if block.group not in self._versions:
                self._versions[block.group] = str(self._opened().metadata.row_group(block.group).to_dict())
            return block.start, block.num_rows, self._versions[block.group]

    def load(self, number: int) -> Images:
        import pyarrow as pa

        block = self.blocks[number]
        with self._opening:
            rows, self._rows = self._rows, None  # after a failure it is begun again
            try:
                if rows is None or rows.group != block.group or rows.at > block.start:
                    rows = _Rows(self._opened(), block, str(self._column))
                while rows.at < block.start:
                    rows.take(min(block.num_rows, block.start - rows.at))
                found = rows.take(block.num_rows)
            except pa.ArrowException as error:
                raise OSError(f"row group {block.group} of {self.location} is damaged: {error}") from error
            self._rows = rows
        return found

    def close(self) -> None:
        with self._opening:
            if self._handle is not None:
                self._handle.close()
            self._handle = self._file = self._rows = None
            self._versions.clear()


class _Rows:
    """The images of one row group in order, some rows at a time, so that its column is never held whole."""

    def __init__(self, file: Any, block: Block, column: str):
        self.group, self.at = block.group, 0  # the next row
        self._batches = file.iter_batches(block.num_rows, row_groups=[block.group], columns=[column], use_threads=False)
        self._left: Any = None  # the rest of the batch that was begun

    def take(self, count: int) -> "_Values":
        """The next images.

        Raises:
            OSError: there are fewer.
        """
        parts: list[Any] = []
        while missing := count - sum(map(len, parts)):
            values = self._next() if self._left is None else self._left
            parts.append(values[:missing])
            self._left = values[missing:] if len(values) > missing else None
        self.at += count
        return _Values(parts)

    def _next(self) -> Any:
        import pyarrow.types as types

        batch = next(self._batches, None)
        if batch is None:
            raise OSError(f"row group {self.group} ends at row {self.at} already")
        values = batch.column(0)
        return values.field("bytes") if types.is_struct(values.type) else values


class _Values(Sequence[bytes | None]):
    """The values of several arrow arrays in a row, each copied when it is asked for. Together they may exceed 2 GiB."""

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = arrays
        self._ends = list(itertools.accumulate(map(len, arrays)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: Any) -> Any:
        number = bisect.bisect_right(self._ends, row)
        return self._arrays[number][row - self._ends[number]].as_py()
