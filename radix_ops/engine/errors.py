"""The engine's exceptions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from .. import _extras


class UserError(ValueError):
    """An input, a model or an option that can't be used; the message is one plain sentence for whoever gave it.

    as_option: the same sentence with options as the radix-ops command spells them.
    """

    def __init__(self, message: str, as_option: str | None = None):
        super().__init__(message)
        self.as_option = message if as_option is None else as_option


class WrongType(UserError, TypeError):
    """An argument of a type that can't be used, as Python's own functions raise TypeError for."""


class TooLong(UserError):
    """A text, or a text with what stands beside it, of more tokens than the model may read."""


class OutOfMemory(UserError, torch.OutOfMemoryError):
    """One sequence alone does not fit into the device's memory."""


def needs(package: str, extra: str, what: str = "radix-ops") -> None:
    """UserError with the command that installs it where a package that `what` needs is missing.

    package: as it is imported. extra: that of pyproject.toml which brings it. Call it before the import.
    """
    lack = _extras.lack_of(package, extra, what)
    if lack is not None:
        raise UserError(lack)


_FLAGS = ("truncate_left", "truncate_right", "plain", "trust_remote_code", "letters", "chat")
_OPTION = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")


@contextlib.contextmanager
def options_as_arguments() -> Iterator[None]:
    """Let UserErrors name options as arguments of a Python call: truncate_left=True in place of --truncate-left."""
    try:
        yield
    except UserError as error:
        message = _OPTION.sub(_as_argument, str(error))
        if message == str(error):
            raise
        raise type(error)(message, str(error)) from error.__cause__


def _as_argument(option: re.Match) -> str:
    name = option[1].replace("-", "_")
    return f"{name}=True" if name in _FLAGS else name
