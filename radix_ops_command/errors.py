"""The error that ends the command with one sentence, and the way it is printed."""

from collections.abc import Sequence


class Failure(Exception):
    """An error that its message names in one sentence, with `rows` below. The command prints it; its status is 1."""

    def __init__(self, message: str, rows: Sequence[str] = ()):
        super().__init__(message)
        self.rows = rows


def printable(text: str) -> str:
    """Return the text on one line, with an escape for whatever doesn't print or could move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
