"""`Classifier` labels texts, by a model's classification head or by a prompt that a language model answers."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from . import classifying
from ._engine import Engine, Layout, OnProgress
from .arguments import DTypeName, check_count, check_flags
from .batches import Compute
from .classifying import PROBLEMS, Row
from .errors import UserError, options_as_arguments
from .ids import GivenRow
from .inputs import Record
from .items import Items
from .label_prompts import LABEL_PROMPTS, LabelPrompt, find_label_prompt
from .label_readers import HeadReader, PromptReader, Reader
from .loading import context_length, max_length_of

_SHAPE = '{"text": "..."}'
_HEAD = "ForSequenceClassification"
_THRESHOLD = 0.5


class Classifier(Engine[Row]):
    """Labels texts; what they share at their starts, such as a prompt before them, is computed once.

    A model with a classification head reads a text, or a pair of texts, as its tokenizer makes them. Its scores are the
    softmax of its logits; their sigmoids where several labels may hold at once, or where there is one label; or the
    logits themselves for a regression, as its config's problem_type says. A language model reads a prompt and answers
    by words: the score of a label is the probability of its words against the other labels'.

    `model`, `tokenizer`, `device`, `dtype`, `token_budget`, `layout`, `plain`, `trust_remote_code` and `lazy` are those
    of `Scorer`.

    Args:
        template: for a language model: "shieldgemma", "qwen3guard", a `LabelPrompt`, or a JSON or TOML file of its
            fields (docs/engine.md).
        problem_type: "single_label_classification", "multi_label_classification" or "regression", for a head whose
            config does not say it, or says something else.
        top_k: keep so many of the best labels in results; all by default.
        threshold: where several labels may hold at once, the least score of a label that does; 0.5 by default.
        max_length: tokens of a text, or a pair, at most, special tokens included. By default as the model and its
            tokenizer say.
        truncate_right: cut texts that are too long for a head at their end; without it they are errors. Prompts of a
            template are never cut.

    labels: the names of the labels, by index.
    problem_type: how scores are made of logits.

    Threads may share it: calls take turns.

    Raises UserError, a ValueError, as `Scorer` does; for a head on tokens, and for a language model without a template.
    """

    task = "classify"

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        template: str | os.PathLike[str] | LabelPrompt | None = None,
        problem_type: str | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        max_length: int | None = None,
        truncate_right: bool = False,
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        token_budget: int | None = None,
        layout: Layout = "auto",
        plain: bool = False,
        trust_remote_code: bool = False,
        lazy: bool = False,
    ):
        with options_as_arguments():
            check_count("max_length", max_length)
            check_count("top_k", top_k)
            check_flags(truncate_right=truncate_right, lazy=lazy)
            if template is not None and not isinstance(template, (str, os.PathLike, LabelPrompt)):
                raise UserError(f"template must be a name, a file or a LabelPrompt, got {template!r}")
            if problem_type is not None and (not isinstance(problem_type, str) or problem_type not in PROBLEMS):
                raise UserError(f"problem_type must be one of {', '.join(PROBLEMS)}, or None, got {problem_type!r}")
            _check_threshold(threshold)
            super().__init__(
                model, tokenizer, device=device, dtype=dtype, token_budget=token_budget, layout=layout, plain=plain,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            self._given_length, self._cuts = max_length, truncate_right
            self._prompt: LabelPrompt | None = None
            self._classifies = _has_head(self.name, self.config, self._model)
            if self._classifies:
                if template is not None:
                    raise UserError(f"--template is for language models, and --model {self.name} has a head of its own")
                self.labels = _labels_of(self.name, self.config)
                self.problem_type = _problem_of(self.config, problem_type)
            else:
                self._prompt = self._find_prompt(template)
                self._refuse(problem_type=problem_type is not None, truncate_right=truncate_right)
                self.labels, self.problem_type = list(self._prompt.words), PROBLEMS[0]
            self.top_k, self.threshold = top_k, self._threshold(threshold)
            self._finish(lazy)

    def _find_prompt(self, template: Any) -> LabelPrompt:
        if template is None:
            raise UserError(
                f"--model {self.name} is a language model of type {self.config.model_type}, which needs a prompt: name "
                f"one by --template, {' or '.join(LABEL_PROMPTS)} or a JSON or TOML file"
            )
        return template if isinstance(template, LabelPrompt) else find_label_prompt(os.fspath(template))

    def _refuse(self, **given: bool) -> None:
        """UserError for options that a language model takes no part in."""
        option = next((name for name, is_given in given.items() if is_given), None)
        if option is not None:
            raise UserError(
                f"--{option.replace('_', '-')} is for classification heads, and --model {self.name} has none"
            )

    def _threshold(self, given: float | None) -> float | None:
        if self.problem_type == "multi_label_classification":
            return _THRESHOLD if given is None else float(given)
        if given is not None:
            raise UserError(
                f"--threshold is for models of which several labels may hold at once, and --model {self.name} is of "
                f"{self.problem_type}"
            )
        return None

    @functools.cached_property
    def _reader(self) -> Reader:
        """What reads rows; the tokenizer decides a part of it where a prompt is given."""
        if self._prompt is None:
            return HeadReader(self.labels, self.problem_type, self._cuts, lambda: (self.tokenizer, self._max_length))
        return PromptReader(self.tokenizer, self._prompt, self._max_length)

    @functools.cached_property
    def _max_length(self) -> int | None:
        if self._prompt is None:
            return max_length_of(self._given_length, self.config, self.tokenizer)
        longest = context_length(self.config, self.tokenizer)
        if self._given_length and longest and self._given_length > longest:
            raise UserError(f"--max-length {self._given_length} is more than the model reads, {longest}")
        return self._given_length or longest

    def _cut(self) -> None:
        self._cuts = True
        vars(self).pop("_reader", None)

    def _check_reading(self) -> None:
        _ = self._reader, self._max_length

    @property
    def shape(self) -> str:
        """What a row has to look like, in words."""
        if self._prompt is None:
            return 'one object {"text": ...} or {"text": ..., "text_pair": ...} a line'
        if self._prompt.text is None:
            return 'one object {"text": ...} or {"messages": [...]} a line'
        return f"one object with {' and '.join(sorted(self._prompt.fields))} a line"

    @property
    def rows_of(self) -> str:
        return "classify" if self._classifies else "prompt"  # a template names the keys that it reads itself

    @property
    def auto_class(self) -> str:
        return "AutoModelForSequenceClassification" if self._classifies else "AutoModelForCausalLM"

    @property
    def identity(self) -> tuple:
        return (self._reader.identity, self.top_k, self.threshold)

    def classify(
        self, items: Iterable[Mapping[str, Any]], *, on_progress: OnProgress | None = None
    ) -> list[dict[str, Any]]:
        """Label all items, planned together.

        Args:
            items: an iterable of {"text": str}, perhaps with a "text_pair", for a head, or of rows of the hub with a
                text or a pair (docs/data.md); for a language model of the fields that the template reads; or of
                {"input_ids": [int, ...]}, which need no tokenizer. Other keys are copied to the result. A "gold" or
                "label" must be one of the labels, by name or index; an array of them where several may hold at once.
                Where there is one label alone, 0 and 1 say whether it holds.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Returns a dict for each item, in order: its other keys, then "labels", the best first, "scores" of these, and
        "best", the first of them; "predicted", those of at least `threshold`, where several may hold at once; "gold",
        the name of the right label, or names, where the item says it. Results of a regression have no "best".

        Raises UserError, before the model runs, for an item that can't be used: it names the index, what is there, what
        is allowed and the remedy; after that for a score that is not finite. OutOfMemory where one text alone does not
        fit into the device's memory.
        """
        with options_as_arguments():
            parsed = list(self._parsed(items, "items", _SHAPE))
        return self._results(parsed, on_progress)

    def stream(
        self, items: Iterable[Mapping[str, Any]], *, window: int = 1024, on_progress: OnProgress | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield what `classify` returns, item by item in order, as the items come.

        window: items that are checked and planned together. The more, the more they share; memory holds so many.
        `on_progress` is told of each window by itself, and errors come at an item's window.
        """
        return self._stream(self._parsed(items, "items", _SHAPE), window, on_progress)

    def parse(self, record: Record) -> Row:
        item = super().parse(record)
        if isinstance(item, GivenRow):
            item = dataclasses.replace(item, sequences=self._reader.sequences(item.where, item.sequences[0]))
        return classifying.with_gold(item, self.labels, self.problem_type, record.label_names)

    def _parse(self, record: Record) -> Row:
        return self._reader.parse(record)

    def _encode_items(self, items: Iterable[Row]) -> Items:
        return self._reader.encode(items)

    def _compute(self, items: Items) -> Compute:
        return self._reader.compute(self.runner)

    def scores(self, item: Row, *numbers: np.ndarray) -> np.ndarray:
        """Return the score of each label by index, float64 [labels]. UserError for one that isn't finite."""
        with np.errstate(invalid="ignore"):  # what isn't finite is an error below
            scores = self._reader.scores(*numbers)
        classifying.check_finite(item, self.labels, scores)
        return scores

    def _result(self, item: Row, encoded: list, *numbers: np.ndarray) -> dict[str, Any]:
        scores = self.scores(item, *numbers)
        return classifying.result(item, self.labels, self.problem_type, scores, self.top_k, self.threshold)

    def _pad_token_id(self) -> int | None:
        return self.config.get_text_config().pad_token_id if self._classifies else 0


def _check_threshold(threshold: Any) -> None:
    is_number = isinstance(threshold, (int, float, np.floating)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 <= threshold <= 1):
        raise UserError(f"threshold must be a number from 0 to 1, or None, got {threshold!r}")


def _has_head(name: str, config: Any, model: nn.Module | None) -> bool:
    """Return whether the model has a classification head. UserError for a head of another task."""
    kind = (getattr(config, "architectures", None) or [""])[0] if model is None else type(model).__name__
    if kind.endswith("ForTokenClassification"):
        raise UserError(
            f"--model {name} is a {kind}, whose head labels each token; radix-ops classify labels whole texts, by "
            "...ForSequenceClassification or by a language model"
        )
    if kind.endswith(("ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice")):
        raise UserError(f"--model {name} is a {kind}; radix-ops classify needs a {_HEAD[3:]} head or a language model")
    return kind.endswith(_HEAD)


def _labels_of(name: str, config: Any) -> list[str]:
    """Return the names of the labels. UserError where the config names a label twice, or not all."""
    names = getattr(config, "id2label", None) or {}
    labels = [names[index] for index in range(config.num_labels) if isinstance(names.get(index), str)]
    if not labels or len(labels) < config.num_labels:
        raise UserError(f"--model {name}: id2label of its config must name the labels 0 to {config.num_labels - 1}")
    twice = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
    if twice is not None:
        raise UserError(f"--model {name}: id2label of its config has the name {twice!r} twice")
    return labels


def _problem_of(config: Any, given: str | None) -> str:
    """Return the problem that is given or that the config says, or what transformers' pipeline takes without one."""
    problem = given or getattr(config, "problem_type", None) or PROBLEMS[0]
    # The softmax of one logit says nothing.
    return PROBLEMS[1] if config.num_labels == 1 and problem == PROBLEMS[0] else problem
