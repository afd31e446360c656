"""`Embedder` makes embeddings of texts by a causal model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from . import embedding
from ._engine import DTypeName, Engine, Layout, OnProgress, check_count, check_flags, numbered, windows, with_progress
from .batches import Compute
from .embedding import Text, Texts
from .errors import UserError, options_as_arguments
from .inputs import Record, check_text
from .loading import max_length_of
from .messages import Chat
from .recipes import POOLINGS, Pooling, Recipe, find_recipe

_TEXTS_AT_ONCE = 1024  # while other threads wait for the tokenizer


class Embedder(Engine[Text]):
    """Makes embeddings of texts: the hidden state of the last token, or the mean over the tokens, normalised.

    What texts share at their start, such as an instruction, is computed once. A sentence-transformers folder (one with
    a modules.json) says itself how to pool, whether to normalise and which prompts it knows; arguments go before that.
    Any other model, and a loaded one, pools the last token and normalises.

    `model`, `tokenizer`, `device`, `dtype`, `token_budget`, `layout`, `plain`, `trust_remote_code` and `lazy` are those
    of `Scorer`.

    Args:
        pooling: "last" or "mean".
        prompt: stands before each text, or is the system's message where the folder has a chat template render texts;
            "" for none. By default the folder's own.
        dim: keep the first numbers of a Matryoshka model, and normalise after that.
        normalize: whether embeddings have length 1.
        max_length: tokens of a text at most, special tokens included. By default as the model and its tokenizer say.
        truncate_right: cut texts that are too long at their end; without it they are errors.

    Threads may share it: calls take turns.

    Raises UserError, a ValueError, as `Scorer` does, and for what a folder sets and radix_ops can't do, by name.
    """

    auto_class = "AutoModel"

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        pooling: Pooling | None = None,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
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
            if pooling is not None and not (isinstance(pooling, str) and pooling in POOLINGS):
                raise UserError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, or None, got {pooling!r}")
            check_flags(truncate_right=truncate_right, lazy=lazy)
            if normalize is not None:
                check_flags(normalize=normalize)
            check_count("dim", dim)
            check_count("max_length", max_length)
            recipe = find_recipe(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else Recipe("")
            super().__init__(
                model, tokenizer, source=recipe.source, device=device, dtype=dtype, token_budget=token_budget,
                layout=layout, plain=plain, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            self.truncate_right = truncate_right
            given = {"pooling": pooling, "dim": dim, "cuts_last": None if dim is None else False}
            given |= {"normalize": normalize}
            given["max_length"] = max_length_of(max_length, self.config, self.tokenizer, recipe.max_length)
            self.recipe = self._complete(recipe, {name: value for name, value in given.items() if value is not None})
            self.recipe = self._with_prompt(self.recipe.prompt if prompt is None else prompt)
            if not lazy:
                self.load()

    def _complete(self, recipe: Recipe, given: dict) -> Recipe:
        """Return the recipe with what was given, and with what was left open."""
        recipe = dataclasses.replace(recipe, **given)
        hidden_size = self.config.get_text_config().hidden_size
        if recipe.dim is not None and recipe.dim > hidden_size:
            raise UserError(f"--dim {recipe.dim} is more than the model has, {hidden_size}")
        messages = recipe.messages and recipe.messages.fitted(self.tokenizer, self.config.model_type)
        return dataclasses.replace(recipe, dim=recipe.dim or hidden_size, messages=messages)

    def _with_prompt(self, prompt: str) -> Recipe:
        recipe = dataclasses.replace(self.recipe, prompt=check_text(prompt, "the prompt"))
        if recipe.messages:
            Chat(self.tokenizer, recipe.messages, prompt).check(("user",))
        return recipe

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts of the model's folder by name."""
        return dict(self.recipe.prompts)

    @property
    def dim(self) -> int:
        """How many numbers an embedding has."""
        assert self.recipe.dim is not None
        return self.recipe.dim

    @property
    def identity(self) -> tuple:
        return (self.recipe.identity, embedding.tokens_to_skip(self.tokenizer, self.recipe))

    def embed(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Make an embedding of each text, all planned together: float32 [B, dim], in order.

        Args:
            texts: an iterable of strings.
            prompt: stands before each text, in place of the default one.
            prompt_name: one of `prompts`, in place of the default one.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Raises UserError, before the model runs, for a prompt_name that the model doesn't have and for a text that can't
        be used: it names the index, what is there, what is allowed and the remedy; after that for an embedding that is
        not finite. OutOfMemory where one text alone does not fit into the device's memory.
        """
        with options_as_arguments():
            recipe, encoded = self._recipe(prompt, prompt_name), Texts()
            for part in windows(_parsed(texts), _TEXTS_AT_ONCE):
                encoded.extend(self._encode(part, recipe))
            return self._rows(encoded, 0, on_progress)

    def stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        window: int = 1024,
        on_progress: OnProgress | None = None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield what `embed` returns, row by row in order, float32 [dim] each, as the texts come.

        window: texts that are checked and planned together. The more, the more they share; memory holds so many.
        `on_progress` is told of each window by itself, and errors come at a text's window.
        """
        with options_as_arguments():
            recipe = self._recipe(prompt, prompt_name)
        first = 0
        for part in windows(_parsed(texts), window):
            with options_as_arguments():
                rows = self._rows(self._encode(part, recipe), first, on_progress)
            yield from (row.copy() for row in rows)  # one that is kept would keep the window
            first += len(part)

    def _recipe(self, prompt: str | None, name: str | None) -> Recipe:
        if name is None:
            return self.recipe if prompt is None else self._with_prompt(prompt)
        if prompt is not None:
            raise UserError("prompt and prompt_name can't both be given")
        if not isinstance(name, str) or name not in self.recipe.prompts:
            known = ", ".join(map(repr, self.recipe.prompts)) or "none"
            raise UserError(f"prompt_name {name!r} is not one of the model's prompts, which are {known}")
        return self._with_prompt(self.recipe.prompts[name])

    def _rows(self, encoded: Texts, first: int, on_progress: OnProgress | None) -> npt.NDArray[np.float32]:
        """Return the embeddings of encoded texts, of which the first is texts[first]."""
        found = np.empty((len(encoded), self.dim), np.float32)

        def on_batch(indices: np.ndarray, numbers: tuple[np.ndarray, ...]) -> None:
            embedding.check_finite(numbers[0], lambda row: f"texts[{first + int(indices[row])}]")
            found[indices] = numbers[0]

        self.execute(encoded, with_progress(on_batch, encoded, on_progress))
        return found

    def parse(self, record: Record) -> Text:
        return embedding.parse_text("text")(record)

    def encode(self, items: Iterable[Text]) -> Texts:
        return self._encode(items, self.recipe)

    def _encode(self, items: Iterable[Text], recipe: Recipe) -> Texts:
        return embedding.encode(items, self.tokenizer, recipe, self.truncate_right)

    def _compute(self, items: Texts) -> Compute:
        return embedding.embedder(self.runner, self.recipe, items)

    def result(self, item: Text, encoded: list[tuple[np.ndarray, int]], *numbers: np.ndarray) -> dict[str, Any]:
        return embedding.result(item, *numbers)


def _parsed(texts: Iterable[str]) -> Iterator[Text]:
    for where, text in numbered(texts, "texts", "strings"):
        yield Text(where, check_text(text, where), {})
