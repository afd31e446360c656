"""`Scorer` scores multiple-choice questions by a causal language model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from . import scoring
from ._engine import DTypeName, Engine, Layout, OnProgress, check_flags
from .batches import Compute
from .errors import options_as_arguments
from .inputs import Record
from .loading import context_length
from .scoring import Choices, Item

_SHAPE = '{"context": "...", "choices": ["...", "..."]}'


class Scorer(Engine[Item]):
    """Scores choices behind their contexts by a causal language model, shared prefixes computed once.

    Args:
        model: a folder, a hub id or a .gguf file; or a loaded model in eval mode, of transformers or of
            `radix_ops.models`, which stays as it is.
        tokenizer: transformers'; by default that of the named model.
        truncate_left: cut contexts that are too long for the model from their start; without it they are errors.
        device: as torch names it; by default CUDA's where there is one. A loaded model has its own.
        dtype: "float32", "bfloat16" or "float16", of weights and computation. By default float32 on the CPU and the
            model's own on CUDA, where one of float32 computes in bfloat16. A loaded model has its own.
        token_budget: rows of a batch at most, that is tokens that are computed; a longer sequence is a batch of its
            own. By default found from the free memory, at most 4,096 on the CPU and 65,536 on CUDA.
        layout: attention in folded batches, as `radix_ops.attention` has it.
        plain: don't fold, for comparison: batches sorted by length.
        trust_remote_code: run Python code that the model brings along; without it such code never runs.
        lazy: leave the weights until the first call, whose inputs are checked before, or `load()`.

    Threads may share it: calls take turns. While a call runs, nothing else may use a loaded model.

    Raises UserError, a ValueError, for whatever can't be used: a model that can't be loaded, that has no output head or
    that isn't known to fold right (docs/models.md); `plain=True` runs the latter.
    """

    auto_class = "AutoModelForCausalLM"
    identity = ()

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        truncate_left: bool = False,
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        token_budget: int | None = None,
        layout: Layout = "auto",
        plain: bool = False,
        trust_remote_code: bool = False,
        lazy: bool = False,
    ):
        with options_as_arguments():
            check_flags(truncate_left=truncate_left, lazy=lazy)
            super().__init__(
                model, tokenizer, device=device, dtype=dtype, token_budget=token_budget, layout=layout, plain=plain,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            self.truncate_left = truncate_left
            if not lazy:
                self.load()

    def score(
        self, items: Iterable[Mapping[str, Any]], *, on_progress: OnProgress | None = None
    ) -> list[dict[str, Any]]:
        """Score all items, planned together, so that what they share at their starts is computed once.

        Args:
            items: an iterable of {"context": str, "choices": [str, ...]}; what the model reads is context + choice, so
                a choice brings its leading space along. Other keys are copied to the result.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Returns a dict for each item, in order: its other keys, then "logprobs", the sum over each choice's tokens;
        "tokens", how many those are; "greedy", whether greedy decoding would write the choice; "best", the choice with
        the largest sum (acc); "best_per_char", the same per character, leading white space not counted (acc_norm).
        Tokens are those of lm-evaluation-harness. Logits are of scored tokens alone.

        Raises UserError, before the model runs, for an item that can't be used: it names the index, what is there, what
        is allowed and the remedy. OutOfMemory where one sequence alone does not fit into the device's memory.
        """
        with options_as_arguments():
            parsed = list(self._parsed(items, "items", _SHAPE))
        return self._results(parsed, on_progress)

    def stream(
        self, items: Iterable[Mapping[str, Any]], *, window: int = 1024, on_progress: OnProgress | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield what `score` returns, item by item in order, as the items come.

        window: items that are checked and planned together. The more, the more they share; memory holds so many.
        `on_progress` is told of each window by itself, and errors come at an item's window.
        """
        return self._stream(self._parsed(items, "items", _SHAPE), window, on_progress)

    def parse(self, record: Record) -> Item:
        return scoring.parse_item(record)

    def encode(self, items: Iterable[Item]) -> Choices:
        longest = context_length(self.config, self.tokenizer)
        return scoring.encode(items, self.tokenizer, longest, self.truncate_left)

    def _compute(self, items: Choices) -> Compute:
        return scoring.scorer(self.runner, items)

    def result(self, item: Item, encoded: list[tuple[np.ndarray, np.ndarray]], *numbers: np.ndarray) -> dict[str, Any]:
        logprobs, greedy = numbers
        return scoring.result(item, [len(choice) for _, choice in encoded], logprobs, greedy)
