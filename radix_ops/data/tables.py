"""The rows of Parquet and Arrow files, by pyarrow. What JSON has no value for becomes a string, or is refused by
column; a null is a key that is not there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from ..engine.errors import UserError
from .libraries import pyarrow
from .lines import dump_json
from .sources import Row, place
from .streams import ByteFile, StreamError, temporary_file

_ROWS_AT_ONCE = 16  # of which each may name the longest value of a dictionary
_BYTES_AT_ONCE = 2**20  # beyond which rows become objects one by one
_MOST_UNPACKED = 64  # times the size of a packed file
_UNPACKED_FREE = 64 * 2**20  # bytes


def read_parquet(name: str, file: ByteFile, drop: Collection[str], label_names: dict[str, list[str]]) -> Iterator[Row]:
    """Yield the rows of a Parquet file without the columns in `drop`; `label_names` gets those that the file has."""
    pq = pyarrow(f"{name} is Parquet, whose reader", "pyarrow.parquet")
    source = _seekable(file)
    with _errors("Parquet"):
        table = pq.ParquetFile(source, pre_buffer=False)
        schema = table.schema_arrow
    kept = _kept(schema, drop)
    label_names.update(_label_names(schema))
    columns = kept if len(kept) < len(schema) else None
    yield from _rows(name, "Parquet", table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False))


def read_arrow(name: str, file: ByteFile, drop: Collection[str], label_names: dict[str, list[str]]) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file or stream without the columns in `drop`; `label_names` gets those that the
    file has."""
    pa = pyarrow(f"{name} is Arrow, whose reader")
    is_file = file.head.startswith(b"ARROW1")
    source = _seekable(file) if is_file else file.stream
    with _errors("Arrow"):
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(pa.PythonFile(source, "r"))
    kept = _kept(reader.schema, drop)
    label_names.update(_label_names(reader.schema))
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    yield from _rows(name, "Arrow", (batch.select(kept) for batch in batches))


class _errors:
    """Raises what is wrong with a file as a StreamError."""

    def __init__(self, kind: str):
        self._kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        is_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, (ValueError, OSError, KeyError, NotImplementedError, MemoryError)) and not (
            is_system or isinstance(error, (StreamError, UserError))
        ):
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise StreamError(f" is damaged, or no {self._kind} that can be read: {reason}") from error


def _kept(schema: Any, drop: Collection[str]) -> list[str]:
    """Return the columns that are read."""
    twice = next((name for i, name in enumerate(schema.names) if schema.names.index(name) < i), None)
    if twice is not None:
        raise StreamError(f" has two columns named {twice!r}")
    return [name for name in schema.names if name not in drop]


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of labels by column, as the library datasets writes them into a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {column: _names_in(feature) for column, feature in features.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):  # another program's metadata
        return {}
    return {column: names for column, names in found.items() if names}


def _names_in(feature: Any) -> list[str] | None:
    """Return the names of a ClassLabel, or of those in a list."""
    if isinstance(feature, list) and len(feature) == 1:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return _names_in(feature.get("feature"))


def _seekable(file: ByteFile) -> BinaryIO:
    """Return the file, or a copy of what can't be sought. StreamError for a packed one that is a bomb."""
    if file.is_plain:
        return file.stream
    copy, size = temporary_file(), 0
    with file.errors():
        while part := file.stream.read(2**20):
            size += copy.write(part)
            if file.is_packed and size > _UNPACKED_FREE + _MOST_UNPACKED * file.packed_size:
                raise StreamError(f" unpacks to more than {_MOST_UNPACKED} times its size; decompress it first")
    copy.seek(0)
    return copy


def _rows(name: str, kind: str, batches: Iterator) -> Iterator[Row]:
    number, at = 0, iter(batches)
    while True:
        with _errors(kind):
            batch = next(at, None)
            if batch is None:
                return
            batch.validate(full=True)
            batch = _simplified(batch)
        for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
            part = batch.slice(first, _ROWS_AT_ONCE)
            step = 1 if part.nbytes > _BYTES_AT_ONCE else _ROWS_AT_ONCE
            for start in range(0, part.num_rows, step):
                few = part.slice(start, step)
                with _errors(kind):
                    found = few.to_pylist()
                for values in found:
                    number += 1
                    yield _row(number, place(name, "row", number), values)


def _row(number: int, where: str, values: dict) -> Row:
    fields = _without_nulls(values)
    try:
        return Row(number, dump_json(fields), fields)
    except (TypeError, ValueError):
        return Row(number, repr(fields).encode(), UserError(_fault(where, fields)))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (dict, list, tuple, type(None))):
        return [_without_nulls(inner) for inner in value]
    return value


def _fault(where: str, fields: dict) -> str:
    for column, value in fields.items():
        try:
            dump_json({column: value})
        except TypeError:
            return f'{where}, column "{column}" holds bytes, or what else JSON has no value for; --drop leaves it out'
        except ValueError:
            return f'{where}, column "{column}" holds a number that is not finite; --drop leaves it out'
    return f"{where} can't be written as JSON"


def _simplified(batch: Any) -> Any:
    """Return the batch with times, decimals and half floats as strings and floats, and no extension types."""
    pa = pyarrow("a table")
    arrays = [getattr(column, "storage", column) for column in batch.columns]
    types = [_json_type(pa, array.type) for array in arrays]
    arrays = [a if a.type == t else a.cast(t) for a, t in zip(arrays, types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _json_type(pa: Any, kind: Any) -> Any:
    """Return the type that a column is read as."""
    t = pa.types
    if t.is_temporal(kind) or t.is_decimal(kind):
        return pa.string()
    if t.is_float16(kind):
        return pa.float32()
    if t.is_map(kind):
        return pa.map_(_json_type(pa, kind.key_type), _json_type(pa, kind.item_type))
    if t.is_struct(kind):
        return pa.struct(
            [pa.field(f.name, _json_type(pa, f.type)) for f in (kind.field(i) for i in range(kind.num_fields))]
        )
    if t.is_fixed_size_list(kind):
        return pa.list_(_json_type(pa, kind.value_type), kind.list_size)
    if t.is_large_list(kind):
        return pa.large_list(_json_type(pa, kind.value_type))
    if t.is_list(kind):
        return pa.list_(_json_type(pa, kind.value_type))
    return kind
