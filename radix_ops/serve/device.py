"""The model as the batcher computes with it: one at a time, on the thread that opened it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from ..engine._engine import Engine
from ..engine.items import Items
from ..engine.loading import context_length
from ..plan.choice import Bounds

# A GPU has enough to do in so long; on a CPU a batch that is cut shorter computes shared prefixes more often.
_SECONDS = {"cuda": 0.2, "cpu": 1.0}
_LONGEST = 4096  # tokens of the sequences that memory is shared out for; longer ones are batches of their own


class Device(Protocol):
    """A model that is loaded, and the limits of its batches."""

    folded: bool  # whether shared prefixes are computed once
    keeps_salts: bool  # whether a batch may hold sequences of several salts, which share nothing; told by `open`
    vocab_size: int  # likewise
    seconds: float  # likewise: of a batch, where no limit says it

    def open(self) -> AbstractContextManager[Bounds]:
        """Load the model, and return the limits of a batch that memory sets; batches run until the end."""

    def prepare(self, sequences: list[np.ndarray], salts: list[bytes]) -> list[np.ndarray]:
        """Do what can be done of a batch while another one is computed, on another thread, and return its sequences."""

    def release_memory(self) -> None:
        """Give memory back that a batch which didn't fit has left."""


class EngineDevice:
    """The model of an engine, which nothing else may use meanwhile."""

    keeps_salts, vocab_size, seconds = True, 0, 1.0

    def __init__(self, engine: Engine[Any]):
        self._engine = engine
        self.folded = not engine.plain

    @contextlib.contextmanager
    def open(self) -> Iterator[Bounds]:
        engine = self._engine
        engine.load()
        runner = engine.runner
        self.keeps_salts, self.vocab_size = runner.keeps_salts or not self.folded, runner.vocab_size
        self.seconds = _SECONDS.get(engine.device.type, 1.0)
        longest = min(context_length(engine.config, None) or _LONGEST, _LONGEST)
        probe = Items()
        probe.append([np.arange(longest) % runner.vocab_size])
        engine.check(probe, self.folded)
        budget = engine.budget_of(probe)
        bounds = Bounds(**budget.limits(runner.pads_states))
        if not self.folded and runner.pads_states:  # each position is a row
            bounds = replace(bounds, max_positions=budget.max_rows, max_padding=runner.max_padding)
        with torch.inference_mode(), runner.running(self.folded):
            yield bounds

    def prepare(self, sequences: list[np.ndarray], salts: list[bytes]) -> list[np.ndarray]:
        return self._engine.runner.ahead(sequences, salts)

    def release_memory(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
