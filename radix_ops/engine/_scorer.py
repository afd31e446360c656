"""`Scorer` scores multiple-choice questions, and whole texts, by a causal language model."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from . import blanks, rolling, scoring
from ._engine import Engine, Layout, OnProgress, numbered
from .arguments import DTypeName, check_count, check_flags
from .batches import Compute
from .chat import prompter
from .errors import UserError, options_as_arguments
from .inputs import Record, check_text
from .loading import context_length
from .rolling import Text, is_text
from .scoring import Choices, Item

_SHAPE = '{"context": "...", "choices": ["...", "..."]}'


class Scorer(Engine[Item | Text]):
    """Scores choices behind their contexts, and whole texts, by a causal language model, shared prefixes computed once.

    Args:
        model: a folder, a hub id or a .gguf file; or a loaded model in eval mode, of transformers or of
            `radix_ops.models`, which stays as it is.
        tokenizer: transformers'; by default that of the named model.
        letters: ask questions as lm-evaluation-harness' mmlu does: the choices are listed, and letters answer.
        chat: put each context as the user's message into the tokenizer's chat template, with its prompt for an answer
            behind; a choice is the assistant's answer.
        system: the system's message of a chat.
        max_length: tokens that the model reads at a time; by default what its config says.
        truncate_left: cut contexts that are too long for the model from their start; without it they are errors.
        stride: score texts that are too long for the model in windows, each of which asks for so many tokens more, as
            lm-evaluation-harness does with `max_length`; without it they are errors.
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

    task = "score"
    auto_class = "AutoModelForCausalLM"
    identity = ()  # an item's tokens say how it is asked

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        letters: bool = False,
        chat: bool = False,
        system: str | None = None,
        max_length: int | None = None,
        truncate_left: bool = False,
        stride: int | None = None,
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        token_budget: int | None = None,
        layout: Layout = "auto",
        plain: bool = False,
        trust_remote_code: bool = False,
        lazy: bool = False,
    ):
        with options_as_arguments():
            check_flags(letters=letters, chat=chat, truncate_left=truncate_left, lazy=lazy)
            check_count("max_length", max_length)
            check_count("stride", stride)
            if system is not None and not chat:
                raise UserError("--system is the system's message of a chat; it needs --chat")
            super().__init__(
                model, tokenizer, device=device, dtype=dtype, token_budget=token_budget, layout=layout, plain=plain,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            self.letters, self.chat, self.truncate_left, self.stride = letters, chat, truncate_left, stride
            self._given_length = max_length
            self._system = "" if system is None else check_text(system, "--system")
            self._finish(lazy)

    @functools.cached_property
    def max_length(self) -> int | None:
        """The tokens that the model reads at a time, None where nothing says it."""
        given, longest = self._given_length, context_length(self.config, self.tokenizer)
        if given and longest and given > longest:
            raise UserError(f"--max-length {given} is more than the model reads, {longest}")
        length = given or longest
        if self.stride and length is None:
            raise UserError("--stride needs --max-length: nothing says how many tokens the model reads at a time")
        if self.stride and length and self.stride > length:
            raise UserError(f"--stride {self.stride} is more than the model reads at a time, {length}")
        return length

    @functools.cached_property
    def _prompt(self) -> Callable[[str], str] | None:
        return prompter(self.tokenizer, self._system) if self.chat else None

    def _cut(self) -> None:
        self.truncate_left = True

    def _check_reading(self) -> None:
        assert (self.max_length, self._prompt) is not None

    def score(
        self, items: Iterable[Mapping[str, Any]], *, on_progress: OnProgress | None = None
    ) -> list[dict[str, Any]]:
        """Score all items, planned together, so that what they share at their starts is computed once.

        Args:
            items: an iterable of {"context": str, "choices": [str, ...]}, where what the model reads is context +
                choice, so that a choice brings its leading space along; or of {"question": str, "choices": [str, ...]},
                which is asked as "Question: ...\\nAnswer:", or by `letters`. "gold" names the right choice: its index
                from 0, its letter or its text. Other keys are copied to the result. Or of {"text": str}, as
                `perplexity` takes it; rows of the hub (docs/data.md); or token ids, {"context_ids": [int, ...],
                "choices_ids": [[int, ...], ...]}, or {"input_ids": [int, ...]} of a text whose first token is given.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Returns a dict for each item, in order: its other keys, with "gold" as an index, then "logprobs", the sum over
        each choice's tokens; "tokens", how many those are; "greedy", whether greedy decoding would write the choice;
        "best", the choice with the largest sum (acc); "best_per_char", the same per character, leading white space not
        counted (acc_norm). Tokens are those of lm-evaluation-harness. Logits are of scored tokens alone. `metrics`
        counts how often the answers are right.

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

    def perplexity(self, texts: Iterable[str], *, on_progress: OnProgress | None = None) -> list[dict[str, Any]]:
        """Score whole texts, planned together, so that what they share at their starts is computed once.

        A text stands behind BOS, or EOS where the tokenizer has no BOS, as in lm-evaluation-harness; without either its
        first token is not scored.

        Returns a dict for each text, in order: "logprob", the sum over its tokens; "tokens", how many were scored;
        "words" and "bytes", as lm-evaluation-harness counts them; "perplexity", a token's, None where none was scored.
        `metrics` adds them up. Raises as `score` does.
        """
        with options_as_arguments():
            found = numbered(texts, "texts", "strings")
            parsed: list[Item | Text] = [Text(where, check_text(text, where), {}) for where, text in found]
        return self._results(parsed, on_progress)

    def _check_ids(self, where: str) -> None:
        if self._style:
            raise UserError(f"{where} holds token ids, which are read as they are; {self._style} is for texts")

    @property
    def _style(self) -> str:
        """The option that says how questions are asked, if there is one."""
        return "--letters" if self.letters else "--chat" if self.chat else ""

    def _parse(self, record: Record) -> Item | Text:
        if is_text(record):
            if self._style:
                raise UserError(f'{record.where} holds a text; {self._style} is for questions with "choices"')
            return rolling.parse_text(record)
        if blanks.is_blank(record):
            if self._style:
                raise UserError(f'{record.where} holds contexts of a continuation; {self._style} is for "choices"')
            return blanks.parse_blank(record)
        return scoring.parse_item(record, self.letters, self.chat)

    def _encode_items(self, items: Iterable[Item | Text]) -> Choices:
        items = iter(items)
        first = next(items, None)
        kind = Text if isinstance(first, Text) else Item
        same: Any = map(functools.partial(_of_kind, kind), itertools.chain([] if first is None else [first], items))
        if kind is Text:
            return rolling.encode(same, self.tokenizer, self.max_length, self.stride)
        return blanks.encode(
            same,
            lambda items: scoring.encode(items, self.tokenizer, self.max_length, self.truncate_left, self._prompt),
        )

    def _compute(self, items: Choices) -> Compute:
        return scoring.scorer(self.runner, items)

    def _result(
        self, item: Item | Text, encoded: list[tuple[np.ndarray, np.ndarray]], *numbers: np.ndarray
    ) -> dict[str, Any]:
        logprobs, greedy = numbers or (np.empty(0), np.empty(0, bool))  # none where a text has no token to score
        sizes = [len(asked) for _, asked in encoded]
        if isinstance(item, Text):
            return rolling.result(item, sizes, logprobs)
        found = scoring.result(item, sizes, logprobs, greedy)
        if isinstance(item, blanks.Blank):
            del found["best_per_char"]  # what is scored has no characters of its own for each choice
        return found


def _of_kind(kind: type, item: Item | Text) -> Item | Text:
    """Return the item. UserError where it is of another kind than those before it."""
    if not isinstance(item, kind):
        texts, others = ("a text", "questions") if isinstance(item, Text) else ("a question", "texts")
        raise UserError(f"{item.where} holds {texts}, and what stands before it {others}; score them apart")
    return item
