"""Token ids of a .npz file as rows."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..engine.errors import UserError
from ..plan.planner import TokenStore
from .lines import dump_json
from .sources import Row, Source


def packed_ids(path: str) -> TokenStore:
    """Read a .npz file of input_ids [N], end to end, and cu_seqlens [B + 1]. UserError for anything else."""
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no .npz file, which is a zip archive of arrays")
    try:
        with np.load(path) as arrays:
            names = set(arrays.files)
            ids: Any
            ids, ends = (arrays[name] if name in names else None for name in ("input_ids", "cu_seqlens"))
    except Exception as error:  # an archive may be damaged in any way
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path} can't be used: {reason}") from error
    missing = "input_ids" if ids is None else "cu_seqlens" if ends is None else None
    if missing:
        raise UserError(f"{path} has no array {missing}; it must hold input_ids and cu_seqlens")
    ends = np.asarray(ends)
    if ends.dtype.kind not in "iu":
        raise UserError(f"{path}: cu_seqlens holds {ends.dtype}; it must hold whole numbers")
    try:
        return TokenStore.from_packed(ids, ends)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} can't be used: {error}") from error


class IdSource(Source):
    """The sequences of a .npz file as rows {"input_ids": [...]}."""

    def __init__(self, name: str, path: str):
        super().__init__(name)
        self._store = packed_ids(path)

    def __iter__(self) -> Iterator[Row]:
        for index in range(len(self._store)):
            fields = {"input_ids": self._store[index].tolist()}
            self.numbers.append(index + 1)
            yield Row(index + 1, dump_json(fields), fields)

    def raw(self, index: int) -> bytes:
        return dump_json({"input_ids": self._store[index].tolist()})
