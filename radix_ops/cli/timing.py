"""The times of a plain way through the model and a folded one that take turns, so that what slows one slows both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from ..engine.batches import OnBatch, Pass, RunStats
from .contention import Contention

MODES = (False, True)  # whether folded
_PARTS = 64  # that the ways are cut into
_PARTS_A_ROUND = 16
_FIRST_SECONDS = 2.0  # of work that every round measures, one batch at least
_MOST_SECONDS = 60.0  # of measuring it again
_SHORT = 0.1  # seconds, of which a timer and a processor that sleeps take a part


@dataclass
class Timing:
    """What the two ways took, by whether they are folded."""

    stats: dict[bool, RunStats]  # of all work, that of the rounds by their median
    rounds: list[dict[bool, RunStats]]  # the times of each way's first batches, which are measured again and again
    waiting: float  # of threads for a processor, as a share of their time

    @property
    def ratios(self) -> list[float]:
        """Plain seconds over folded ones of each round."""
        return [times[False].seconds / times[True].seconds for times in self.rounds]

    @property
    def is_short(self) -> bool:
        """Return whether the rounds are too short to say how much they differ."""
        return min(median(times[folded].seconds for times in self.rounds) for folded in MODES) < _SHORT


def measure(passes: Mapping[bool, Pass], takers: Mapping[bool, OnBatch]) -> Timing:
    """Go both ways, part by part, each way's arrays to its taker, and return what they took.

    The first batches of each way are computed again after every quarter, as long as that doesn't take minutes: in all
    rounds the work is the same, and only the machine differs.
    """
    contention = Contention()
    for whole in passes.values():
        whole.warm_up()
    with contention.measured():
        before = {folded: _times(passes[folded].stats) for folded in MODES}
        batches = {folded: passes[folded].advance(takers[folded], seconds=_FIRST_SECONDS) for folded in MODES}
        rounds = [{folded: _since(before[folded], passes[folded].stats) for folded in MODES}]
        repeated = 0.0
        for part in range(1, _PARTS + 1):
            for folded in _turn(part):
                passes[folded].advance(takers[folded], share=part / _PARTS)
            if part % _PARTS_A_ROUND == 0 and repeated < _MOST_SECONDS:
                rounds.append({folded: passes[folded].repeat(batches[folded]) for folded in _turn(len(rounds))})
                repeated += sum(times.seconds for times in rounds[-1].values())
    for folded in MODES:
        stats, first = passes[folded].stats, rounds[0][folded]
        stats.seconds += median(times[folded].seconds for times in rounds) - first.seconds
        stats.cpu_seconds += median(times[folded].cpu_seconds for times in rounds) - first.cpu_seconds
    return Timing({folded: passes[folded].stats for folded in MODES}, rounds, contention.share)


def _turn(number: int) -> tuple[bool, ...]:
    """Return which way goes first and which second, the other way round each time."""
    return MODES[::-1] if number % 2 else MODES


def _times(stats: RunStats) -> RunStats:
    return RunStats(seconds=stats.seconds, cpu_seconds=stats.cpu_seconds)


def _since(before: RunStats, after: RunStats) -> RunStats:
    return RunStats(seconds=after.seconds - before.seconds, cpu_seconds=after.cpu_seconds - before.cpu_seconds)
