"""The limits of the queue and of batches."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class QueueLimits:
    """What may wait at once, that which is computed included; more is refused.

    Raises ValueError for a limit below 1.
    """

    max_requests: int = 16_384
    max_sequences: int = 65_536
    max_tokens: int = 4_194_304

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True)
class BatchLimits:
    """The limits of a batch beside those of memory, and how far sharing may go before fairness.

    seconds: a batch has as many rows as take so long at the measured pace, or a few times those of its first sequence
    where these are more; by default 0.2 on CUDA and 1 on the CPU. max_rows: at most, whatever the pace; by default what
    fits into memory. max_sequences: at most. max_overtakes: how many batches with later requests may run before half of
    each batch is a request's in its turn. Raises ValueError for what is out of range.
    """

    seconds: float | None = None
    max_rows: int | None = None
    max_sequences: int = 4096
    max_overtakes: int = 16

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")
        if self.max_overtakes < 0:
            raise ValueError(f"max_overtakes must not be negative, got {self.max_overtakes}")
        _check_counts(self, "max_rows", "max_sequences")


def _check_counts(limits: object, *names: str) -> None:
    for name in names or [field.name for field in fields(limits)]:  # type: ignore[arg-type]
        value = getattr(limits, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
