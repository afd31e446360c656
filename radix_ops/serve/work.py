"""A request's work as the batcher takes it, and its answer.

    def encode() -> Work: ...  # on a thread that may tokenise; raises UserError for inputs that can't be used

    def compute(sequences, extras): ...  # on the engine's thread: one result for each sequence

The batcher looks at token ids alone; what `extras` and results are is between whoever encodes and whoever computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..engine.errors import UserError

# Computes one result for each sequence of a batch: the token ids, int32, and what the request says of the sequence. The
# list that it gets goes to `runner.states` as it is, since it knows how the batch folds.
Compute: TypeAlias = Callable[[list[np.ndarray], list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Work:
    """Token sequences, none empty, and what is wanted of each.

    extras: of each sequence, what `compute` is told of it.
    beside: what whoever encoded it wants to find in the answer; the batcher doesn't look at it.
    """

    sequences: list[np.ndarray]  # int32 [L] each
    extras: list[Any]
    beside: Any = None

    def __post_init__(self) -> None:
        if len(self.sequences) != len(self.extras):
            raise ValueError(f"{len(self.sequences)} sequences have {len(self.extras)} extras; each needs one")

    def check(self, vocab_size: int) -> None:
        """Raise ValueError unless each sequence holds ids of the vocabulary, as int32."""
        for index, ids in enumerate(self.sequences):
            if ids.dtype != np.int32 or ids.ndim != 1 or not len(ids):
                raise ValueError(f"sequences[{index}] must hold token ids as int32, got {ids.dtype} of {ids.shape}")
            if int(ids.view(np.uint32).max()) >= vocab_size:  # without its sign a negative id is a large one
                raise UserError(
                    f"sequence {index} has token ids from {ids.min()} to {ids.max()}; the model's are from 0 to "
                    f"{vocab_size - 1}"
                )

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Size:
    """The size of a request before it is tokenised, which admission counts.

    tokens: known where the request holds ids, else estimated; `of_texts` and `of_lengths` do that.
    """

    tokens: int
    sequences: int

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Size:
        """Estimate the size of texts that are read once each."""
        return cls.of_lengths([len(text) for text in texts])

    @classmethod
    def of_lengths(cls, characters: Sequence[int], ids: Sequence[int] = ()) -> Size:
        """Estimate the size of texts of so many characters each, and of arrays of so many token ids."""
        tokens = sum(1 + count // CHARACTERS_PER_TOKEN for count in characters) + sum(ids)
        return cls(tokens, len(characters) + len(ids))


CHARACTERS_PER_TOKEN = 4


@dataclass
class Timings:
    """How long a request took, in seconds, and what it cost."""

    tokenised: float = 0.0  # waiting for a tokenising thread included
    queued: float = 0.0  # from there to the start of the first batch with a sequence of it
    computed: float = 0.0  # from there to the end of the last
    tokens: int = 0
    rows: int = 0  # that its sequences added to their batches, in the order in which these were chosen


@dataclass(frozen=True)
class Answer:
    """What `compute` made of each sequence of a request, in the request's order."""

    work: Work
    results: list[Any]
    timings: Timings = field(default_factory=Timings)
