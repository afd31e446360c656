"""The rows of input files that can't be used, counted, of which the first are listed."""

from __future__ import annotations

import re

from ..engine.errors import UserError

_MOST_LISTED = 20
_DIGITS = re.compile(r"\d+")
MOST_READ = 1000  # before a run that is to stop gives up


class BadRowsError(UserError):
    """Several rows can't be used. The message has a line for each of the first, as `rows` has, below `summary`."""

    def __init__(self, summary: str, rows: list[str]):
        super().__init__("\n".join([summary, *rows]))
        self.summary, self.rows = summary, rows


class BadRows:
    """Counts the errors of rows, and holds the first of them."""

    def __init__(self):
        self._listed: list[UserError] = []
        self.count = 0
        self.num_rows = 0  # of all files, as far as they were read

    def add(self, error: UserError) -> None:
        self.count += 1
        if len(self._listed) < _MOST_LISTED:
            self._listed.append(error)

    @property
    def is_full(self) -> bool:
        """Whether there are so many that further ones tell no more."""
        return self.count >= MOST_READ

    @property
    def lines(self) -> list[str]:
        """The messages of the first, or where no row can be used one of each kind; then how many more there are."""
        listed = [error.as_option for error in self._listed]
        if self.count == self.num_rows:  # by one cause most likely, and which rows they are says nothing
            kinds: dict[str, str] = {}
            for message in listed:
                kinds.setdefault(_DIGITS.sub("", message), message)
            listed = list(kinds.values())
        more = self.count - len(listed)
        return listed + ([f"and {more:,} more"] if more else [])

    @property
    def summary(self) -> str:
        return f"{self.count:,} of {self.num_rows:,} rows can't be used"

    def check(self) -> None:
        """UserError where there is any: the row's own for one, a BadRowsError for several."""
        if self.count == 1:
            raise self._listed[0]
        if self.count:
            summary = self.summary.replace(" of ", " of the first ") if self.is_full else self.summary
            # Where no row that was read can be used, leaving them out is no remedy.
            remedy = "; --on-error skip leaves them out" if self.count < self.num_rows else ""
            raise BadRowsError(summary + remedy, self.lines)

    def check_all_are_not(self, num_records: int, path: str) -> None:
        """UserError where no record is left."""
        if not num_records and self.count:
            raise BadRowsError(f"{path} holds no row that can be used", self.lines)
