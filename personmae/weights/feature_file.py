"""Files of features with their names: parquet with the columns ``id`` and ``feature``, or ``.npy`` with a list beside it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from personmae.errors import UserError
from personmae.system import files
from personmae.weights.staging import put_in_place

SUFFIXES: Final = (".parquet", ".npy")
ABOUT: Final = b"personmae"  # the entry of a parquet file's metadata that says what computed the features


class Rows(NamedTuple):
    """Some features with their ids, and numbers by the name of their column."""

    ids: list[str]
    columns: dict[str, list[int]]
    features: Float[np.ndarray, "n D"]


def require_suffix(out: Path) -> None:
    """Raise a UserError unless ``out`` names a file of a kind that can be written."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"a file named .parquet or .npy is required for features. Got {out}: name it {out.with_suffix('.parquet')}"
        )


def ids_beside(out: Path) -> Path:
    """The list of ids that goes with a ``.npy`` file."""
    return out.with_name(f"{out.stem}.ids.txt")


def write(out: Path, staging: Path, parts: Iterable[Rows], *, num_rows: int, dim: int, about: dict[str, Any]) -> None:
    """Write all parts into the folder ``staging``, and give the result its name. The features' file comes last.

    Raises:
        OSError: something cannot be written. There is no file ``out`` then.
    """
    if out.suffix.lower() == ".npy":
        _write_npy(staging / out.name, staging / ids_beside(out).name, parts, num_rows, dim)
        ids_beside(out).unlink(missing_ok=True)  # of a process that was killed here
        put_in_place(staging / ids_beside(out).name, ids_beside(out))
    else:
        _write_parquet(staging / out.name, parts, dim, about)
    put_in_place(staging / out.name, out)


def _write_parquet(path: Path, parts: Iterable[Rows], dim: int, about: dict[str, Any]) -> None:
    writer = None
    try:
        for rows in parts:
            table = _table(rows, dim, about)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="NONE", use_dictionary=False)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _table(rows: Rows, dim: int, about: dict[str, Any]) -> pa.Table:
    features = pa.FixedSizeListArray.from_arrays(pa.array(rows.features.reshape(-1)), dim)
    columns = {"id": pa.array(rows.ids, pa.string())}
    columns |= {name: pa.array(values, pa.int64()) for name, values in rows.columns.items()}
    table = pa.table(columns | {"feature": features})
    return table.replace_schema_metadata({ABOUT: json.dumps(about, sort_keys=True).encode()})


def _write_npy(path: Path, ids: Path, parts: Iterable[Rows], num_rows: int, dim: int) -> None:
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (num_rows, dim)}
    num_written = 0
    # Written, not mapped: where the disk is full a mapped file ends the process by a signal.
    with path.open("wb") as features, ids.open("w", encoding="utf-8", newline="\n") as names:
        np.lib.format.write_array_header_1_0(features, header)
        for rows in parts:
            features.write(np.ascontiguousarray(rows.features, np.float32).data)
            names.writelines(f"{name}\n" for name in rows.ids)
            num_written += len(rows.ids)
    assert num_written == num_rows


def read(path: Path) -> Rows:
    """The rows of a file that was written here.

    Raises:
        UserError: it is no such file.
    """
    require_suffix(path)
    try:
        if path.suffix.lower() == ".npy":
            return Rows(files.lines(ids_beside(path)), {}, np.load(path, mmap_mode="r"))
        table = pq.read_table(path)
        flat = table["feature"].combine_chunks()
        features = flat.flatten().to_numpy().reshape(len(flat), -1)
        columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("id", "feature")}
        return Rows(table["id"].to_pylist(), columns, features)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"a file of 'personmae extract' is required. {path} cannot be read as one: {error}") from error
