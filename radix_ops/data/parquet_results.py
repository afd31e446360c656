"""Results as Parquet: a column for each key, of the type that all its values have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from .compressed import KeptOpen
from .converted import Lines, Writer
from .libraries import pyarrow

_KEY = b"radix_ops.key"
_MOST_FIELDS, _DEEPEST = 64, 8  # of a struct, and of lists and structs within each other
_LISTS_OF_FLOAT32 = ("embedding",)


class ParquetWriter(Writer):
    """A row for each result, "key" the last column; lists are lists, and objects are structs.

    The type of a column is one for all its values, whichever rows they stand in. Where there is none, as for numbers
    among strings, for whole numbers beyond 64 bits, for deep nests and for objects of ever other keys, the column holds
    each value as JSON. The file's metadata has what identifies the run.
    """

    def write(self, lines: Lines, file: BinaryIO) -> None:
        columns = _columns_of(lines)
        while (wrong := _write(lines, columns, file)) is not None:
            columns[wrong] = None
            file.seek(0)
            file.truncate()

    def holds(self, path: Path, key: str, keys: Iterable[str]) -> bool:
        return _key_of(path) == key.encode()

    def may_hold(self, path: Path) -> bool:
        return _key_of(path) is not None


def _key_of(path: Path) -> bytes | None:
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return None
    try:
        metadata = pyarrow("a .parquet file", "pyarrow.parquet").read_metadata(path).metadata
    except (ValueError, OSError):  # damaged
        return None
    return (metadata or {}).get(_KEY)


def _encodable(name: str) -> str:
    """Return the name with each half of a surrogate pair as JSON escapes it."""
    return name.encode(errors="backslashreplace").decode()


def _columns_of(lines: Lines) -> dict[str, Any]:
    """Return the name and the type of each column; None where values are written as JSON."""
    arrow = pyarrow("a .parquet file")
    columns: dict[str, Any] = {}
    for part in lines.parts():
        for name in dict.fromkeys(name for fields in part for name in fields):
            if name in _LISTS_OF_FLOAT32:
                columns[name] = arrow.list_(arrow.float32())
            elif columns.setdefault(name, arrow.null()) is not None:
                columns[name] = _joined(arrow, columns[name], _type_of(arrow, [fields.get(name) for fields in part]))
        lines.check_width(len(columns))
    key = columns.pop("key", arrow.string())
    return {**columns, "key": key}


def _type_of(arrow: Any, values: Iterable, depth: int = 0) -> Any:
    """Return the type that holds all values as they are, None where there is none; they are in so many others."""
    values = [value for value in values if value is not None]
    kinds = set(map(type, values))
    if not kinds:
        return arrow.null()
    if kinds == {int, float}:
        return arrow.float64()
    if len(kinds) > 1 or depth > _DEEPEST:
        return None
    if kinds == {list}:
        inner = _type_of(arrow, chain.from_iterable(values), depth + 1)
        return None if inner is None else arrow.list_(inner)
    if kinds == {dict}:
        names = dict.fromkeys(chain.from_iterable(values))
        # Parquet has no objects without keys, and none whose keys are no UTF-8.
        if not 1 <= len(names) <= _MOST_FIELDS or any(name != _encodable(name) for name in names):
            return None
        fields = {name: _type_of(arrow, [value.get(name) for value in values], depth + 1) for name in names}
        return _struct(arrow, fields)
    return {bool: arrow.bool_(), int: arrow.int64(), float: arrow.float64(), str: arrow.string()}[kinds.pop()]


def _joined(arrow: Any, one: Any, other: Any) -> Any:
    """Return the type that holds values of both, None where there is none."""
    if one is None or other is None or one == other:
        return None if other is None else one
    if arrow.null() in (one, other):
        return other if one == arrow.null() else one
    if {one, other} == {arrow.int64(), arrow.float64()}:
        return arrow.float64()
    is_list, is_struct = (all(map(kind, (one, other))) for kind in (arrow.types.is_list, arrow.types.is_struct))
    if is_list:
        inner = _joined(arrow, one.value_type, other.value_type)
        return None if inner is None else arrow.list_(inner)
    if not is_struct:
        return None
    fields = [{field.name: field.type for field in kind} for kind in (one, other)]
    names = fields[0] | fields[1]
    if len(names) > _MOST_FIELDS:
        return None
    null = arrow.null()
    return _struct(arrow, {name: _joined(arrow, *(each.get(name, null) for each in fields)) for name in names})


def _struct(arrow: Any, fields: dict[str, Any]) -> Any:
    return None if None in fields.values() else arrow.struct(list(fields.items()))


def _write(lines: Lines, columns: dict[str, Any], file: BinaryIO) -> str | None:
    """Write all results; return None, or the name of a column whose type does not hold all of its values."""
    arrow, parquet = pyarrow("a .parquet file"), pyarrow("a .parquet file", "pyarrow.parquet")
    kinds = {name: arrow.string() if kind is None else kind for name, kind in columns.items()}
    fields = [(_encodable(name), kind) for name, kind in kinds.items()]
    schema = arrow.schema(fields, metadata={_KEY: lines.key.encode()})
    with parquet.ParquetWriter(arrow.PythonFile(KeptOpen(file), "w"), schema, compression="zstd") as writer:
        for part in lines.parts():
            arrays = []
            for name, kind in kinds.items():
                values = [each.get(name) for each in part]
                if columns[name] is None:
                    values = [None if value is None else json.dumps(value) for value in values]
                try:
                    arrays.append(arrow.array(values, kind))
                except (arrow.ArrowException, ValueError, TypeError, OverflowError):
                    return name
            writer.write_table(arrow.table(arrays, schema))
    return None
