"""A plain run of a job beside a folded one: what each took, and how far apart their results are. For `--compare`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..data.matrix import scratch_matrix
from ..engine.batches import OnBatch, RunStats
from ..engine.embedding import check_finite
from ..engine.errors import UserError
from ..engine.items import Collector, Items
from .progress import progress_bar
from .timing import MODES, Timing, measure

if TYPE_CHECKING:
    from .job import Job, Numbers

_RESULTS_AT_ONCE = 1024  # written
# Times are off where threads waited longer, as a share of their time, or rounds differ by more, the fastest and the
# slowest of so many left aside: one that was disturbed moves no median.
_MOST_WAITING, _MOST_SPREAD = 0.1, 1.15
_ROUNDS_TO_TRIM = 5


def compare_runs(job: Job) -> None:
    """Run the job plain and folded by turns, and print what each took and how their results differ."""
    if not len(job.items.store):
        raise UserError("--compare has nothing to run: the input holds no sequences")
    kept = {folded: job.comparison.store(job) for folded in MODES}
    with progress_bar(2 * int(job.items.lengths.sum()), "plain and folded", " tokens") as bar:
        takers = {folded: _taker(job.items, kept[folded], bar.update) for folded in MODES}
        timing = measure({folded: job.engine.begin(job.items, folded=folded) for folded in MODES}, takers)
    results = job.results() if job.args.output else None
    for first in range(0, len(job.items), _RESULTS_AT_ONCE):
        part = range(first, min(first + _RESULTS_AT_ONCE, len(job.items)))
        for item in part:
            job.comparison.add(job, item, kept[False][item], kept[True][item])
        if results:
            results.write([(item, kept[job.folded][item]) for item in part])
    if results:
        job.finish(results)
    table = comparison_table(timing.stats[False], timing.stats[True], timing.ratios)
    print("\n".join([table, *notes(timing), "", *job.comparison.report(len(job.items))]))


def _taker(items: Items, kept: _Store, on_tokens: Callable[[int], object]) -> OnBatch:
    """Return a function that keeps the numbers of batches by item."""
    collector, lengths = Collector(items.ends), items.lengths

    for item, numbers in collector.empty():
        kept[item] = numbers

    def on_batch(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
        for item, numbers in collector.add(indices, found):
            kept[item] = numbers
        on_tokens(int(lengths[indices].sum()))

    return on_batch


class Comparison(ABC):
    """The differences between the results of a plain run and a folded one."""

    def store(self, job: Job) -> _Store:
        """Return what holds the numbers of all items of a run."""
        return {}

    @abstractmethod
    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        """Compare the two results of an item."""

    @abstractmethod
    def report(self, count: int) -> list[str]:
        """Return lines that say how results of so many items differ."""


class Agreement(Comparison):
    """Counts how often `choice`, a field of a result, agrees, and how far `numbers`, another, are apart; the report
    calls them `choices` and `number`."""

    def __init__(self, choice: str, choices: str, number: str, numbers: str):
        self._choice, self._choices, self._number, self._numbers = choice, choices, number, numbers
        self._agree, self._largest = 0, 0.0

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        one, other = job.fields_of(item, plain), job.fields_of(item, folded)
        self._agree += one[self._choice] == other[self._choice]
        apart = np.abs(np.subtract(one[self._numbers], other[self._numbers]))
        self._largest = max(self._largest, float(apart.max(initial=0)))

    def report(self, count: int) -> list[str]:
        return [
            f"{self._choices} that agree: {self._agree:,} of {count:,}",
            f"largest difference of a {self._number}: {self._largest:.1e}",
        ]


class Closeness(Comparison):
    """Measures how far embeddings are apart."""

    def __init__(self):
        self._largest, self._least_cosine = 0.0, 1.0

    def store(self, job: Job) -> _Store:
        return _MatrixOfNumbers(scratch_matrix((len(job.items), job.dim)))

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        one, other = (numbers[0][0].astype(np.float64) for numbers in (plain, folded))
        check_finite(np.stack([one, other]), lambda row: job.records[item].where)
        self._largest = max(self._largest, float(np.abs(one - other).max()))
        cosine = (one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other))
        self._least_cosine = min(self._least_cosine, float(cosine))

    def report(self, count: int) -> list[str]:
        return [
            f"largest difference of a number: {self._largest:.1e}",
            f"least cosine of two embeddings of one text: {self._least_cosine:.7f}",
        ]


class _Store(Protocol):
    """Holds the numbers of items."""

    def __setitem__(self, item: int, numbers: Numbers, /) -> None: ...

    def __getitem__(self, item: int, /) -> Numbers: ...


class _MatrixOfNumbers:
    """Items' embeddings as rows of a scratch matrix."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def __setitem__(self, item: int, numbers: Numbers) -> None:
        self._rows[item] = numbers[0][0]

    def __getitem__(self, item: int) -> Numbers:
        return [self._rows[item : item + 1]]


def comparison_table(plain: RunStats, folded: RunStats, ratios: Sequence[float] = ()) -> str:
    """Return the two runs side by side, then the speed-up and what share of tokens / rows it is.

    ratios: plain seconds over folded ones, a round each, of the work that was measured in all rounds.
    """
    speed_up, sharing = plain.seconds / folded.seconds, folded.tokens / folded.rows
    counts = {
        "tokens": (plain.tokens, folded.tokens),
        "rows computed": (plain.rows, folded.rows),
        "rows through the head": (plain.head_rows, folded.head_rows),
        "batches": (plain.batches, folded.batches),
    }
    lines = [f"{'':<22}{'plain':>10}{'folded':>10}"]
    lines += [f"{name:<22}{a:>10,}{b:>10,}" for name, (a, b) in counts.items() if a or b]
    lines += [
        f"{'seconds':<22}{plain.seconds:>10.2f}{folded.seconds:>10.2f}",
        f"{'CPU seconds':<22}{plain.cpu_seconds:>10.2f}{folded.cpu_seconds:>10.2f}",
        f"{'tokens a second':<22}{plain.tokens / plain.seconds:>10,.0f}{folded.tokens / folded.seconds:>10,.0f}",
        "",
        f"padding of the plain run: {plain.rows / plain.tokens - 1:.1%} of its tokens",
        f"speed-up: {speed_up:.2f} times{_range(speed_up, ratios)}, {speed_up / sharing:.2f} of tokens / rows "
        f"({sharing:.2f})",
    ]
    return "\n".join(lines)


def _range(speed_up: float, ratios: Sequence[float]) -> str:
    """Return between which speed-ups the rounds lie, which differ as their ratios do."""
    if len(ratios) < 2:
        return ""
    middle = median(ratios)
    least, most = (speed_up * ratio / middle for ratio in (min(ratios), max(ratios)))
    return f" ({least:.2f} to {most:.2f} in {len(ratios)} rounds)"


def notes(timing: Timing) -> list[str]:
    """Return lines that say why the times can't be relied on, none where they can."""
    if timing.is_short:
        return ["note: these runs are too short to compare their times; more input makes them longer"]
    found = []
    if timing.waiting > _MOST_WAITING:
        found.append(
            f"note: threads waited {timing.waiting:.0%} of their time for a processor: other work runs here, or the "
            "process may use fewer processors than it has threads. Compare again where it is quiet, or with --threads"
        )
    ratios = sorted(timing.ratios)
    if len(ratios) >= _ROUNDS_TO_TRIM:
        ratios = ratios[1:-1]
    if ratios[-1] > _MOST_SPREAD * ratios[0]:
        found.append(
            f"note: rounds of the same work differ by {ratios[-1] / ratios[0] - 1:.0%}. Compare again where it is "
            "quiet, or with more input"
        )
    return found
