"""Checks of the arguments that engines share."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from .._attention import LAYOUTS
from .errors import UserError

DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
_DTYPES: tuple[DTypeName, ...] = get_args(DTypeName)


def check_options(layout: str, token_budget: int | None) -> None:
    """UserError for a layout that there is not, or a budget that is no whole number from 1."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    check_count("token_budget", token_budget)


def check_flags(**flags: object) -> None:
    """UserError for an argument that is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: int | None) -> None:
    """UserError unless the argument is a whole number from 1, or None."""
    if value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value < 2**31):
        return
    raise UserError(f"{name} must be a whole number from 1 to {2**31 - 1}, or None, got {value!r}")


def dtype_name(dtype: DTypeName | torch.dtype | None) -> str | None:
    """Return the name of a dtype, None for None. UserError for one that engines do not take."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in (None, *_DTYPES):
        raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, or None, got {dtype!r}")
    return name
