"""`Embedder` makes embeddings of texts by a causal model."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from . import embedding, ids
from ._engine import Engine, Layout, OnProgress, numbered, windows, with_progress
from .arguments import DTypeName, check_count, check_flags
from .batches import Compute
from .embedding import Text, Texts
from .errors import UserError, options_as_arguments
from .inputs import Record, check_text
from .loading import has_tokenizer, max_length_of
from .messages import Chat
from .pairs import nearest_pairs
from .pooling import POOLINGS, Pooling
from .quantising import OUTPUT_DTYPES, OutputDType, Ranges, check_ranges, converted, ranges_of
from .recipes import Recipe, find_recipe
from .shapes.recognition import recognised

_TEXTS_AT_ONCE = 1024  # while other threads wait for the tokenizer


class Embedder(Engine[Text]):
    """Makes embeddings of texts: a pooling of the tokens' hidden states, normalised.

    What texts share at their start, such as an instruction, is computed once. A sentence-transformers folder (one with
    a modules.json) says itself how to pool, whether to normalise and which prompts it knows; arguments go before that.
    Any other model, and a loaded one, pools the last token and normalises.

    `model`, `tokenizer`, `device`, `dtype`, `token_budget`, `layout`, `plain`, `trust_remote_code` and `lazy` are those
    of `Scorer`.

    Args:
        pooling: "last" token, "mean", "weightedmean", "mean_sqrt_len_tokens", "max" or "cls" (the first token), as
            sentence-transformers computes them.
        prompt: stands before each text, or is the system's message where the folder has a chat template render texts;
            "" for none. By default the folder's own.
        prompt_name: the folder's prompt of this name, in place of its default one.
        dim: keep the first numbers of a Matryoshka model, and normalise after that.
        normalize: whether embeddings have length 1.
        max_length: tokens of a text at most, special tokens included. By default as the model and its tokenizer say.
        truncate_right: cut texts that are too long at their end; without it they are errors.
        output_dtype: "float32", "float16" or "int8", of the embeddings that are returned. int8 numbers are 256 steps of
            each column's range, as quantize_embeddings of sentence-transformers 6 makes them.
        ranges: floats [2, dim], the least and the largest number of each column, which int8 needs. `find_ranges` finds
            those of texts. Embeddings that are compared with each other need the same.

    Threads may share it: calls take turns.

    Raises UserError, a ValueError, as `Scorer` does, and for what a folder sets and radix_ops can't do, by name.
    """

    task = "embed"
    text_key = "text"  # of an object that holds a text
    auto_class = "AutoModel"

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        pooling: Pooling | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        truncate_right: bool = False,
        output_dtype: OutputDType = "float32",
        ranges: npt.ArrayLike | None = None,
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
            if not isinstance(output_dtype, str) or output_dtype not in OUTPUT_DTYPES:
                known = ", ".join(map(repr, OUTPUT_DTYPES))
                raise UserError(f"output_dtype must be one of {known}, got {output_dtype!r}")
            if (output_dtype == "int8") != (ranges is not None):
                raise UserError("--output-dtype int8 needs --ranges, and nothing else takes them")
            check_count("dim", dim)
            check_count("max_length", max_length)
            recipe = find_recipe(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else Recipe("")
            super().__init__(
                model, tokenizer, source=recipe.source, device=device, dtype=dtype, token_budget=token_budget,
                layout=layout, plain=plain, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            self.truncate_right = truncate_right
            if prompt_name is not None:
                if prompt is not None:
                    raise UserError("--prompt and --prompt-name can't both be given")
                prompt = _named(recipe, prompt_name)
            given: dict[str, Any] = {
                "poolings": pooling and (pooling,),
                "dim": dim,
                "cuts_last": None if dim is None else False,
            }
            given |= {"normalize": normalize}
            if prompt is not None:
                given["prompt"] = check_text(prompt, "the prompt")
            self._given_length, self._has_prompt = max_length, bool(prompt)
            self._pooling = self._complete(recipe, {name: value for name, value in given.items() if value is not None})
            self.output_dtype = output_dtype
            self._ranges = None if ranges is None else check_ranges(ranges, self.dim, "--ranges")
            self._finish(lazy)

    def _complete(self, recipe: Recipe, given: dict) -> Recipe:
        """Return the recipe with what was given, and with the numbers that were left open."""
        recipe = dataclasses.replace(recipe, **given)
        width = self.config.get_text_config().hidden_size * len(recipe.poolings)
        if recipe.dim is not None and recipe.dim > width:
            raise UserError(f"--dim {recipe.dim} is more than the model has, {width}")
        return dataclasses.replace(recipe, dim=recipe.dim or width)

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The way from a text to an embedding, of which the tokenizer decides a part."""
        recipe = self._pooling
        length = max_length_of(self._given_length, self.config, self.tokenizer, recipe.max_length)
        messages = recipe.messages and recipe.messages.fitted(self.tokenizer, self.config.model_type)
        return self._with_prompt(recipe.prompt, dataclasses.replace(recipe, max_length=length, messages=messages))

    def _cut(self) -> None:
        self.truncate_right = True

    def _check_reading(self) -> None:
        assert self.recipe is not None

    def _with_prompt(self, prompt: str, recipe: Recipe | None = None) -> Recipe:
        recipe = dataclasses.replace(recipe or self.recipe, prompt=check_text(prompt, "the prompt"))
        if recipe.messages:
            Chat(self.tokenizer, recipe.messages, prompt).check(("user",))
        return recipe

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts of the model's folder by name."""
        return dict(self._pooling.prompts)

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """The poolings that an embedding is made of, side by side."""
        return self._pooling.poolings

    @property
    def dim(self) -> int:
        """How many numbers an embedding has."""
        assert self._pooling.dim is not None
        return self._pooling.dim

    @property
    def identity(self) -> tuple:
        recipe = self._pooling
        reads = recipe.skips_prompt and (self._tokenizer is not None or has_tokenizer(self._source))
        skip = embedding.tokens_to_skip(self.tokenizer, recipe) if reads else 0
        ranges = None if self._ranges is None else self._ranges.tobytes().hex()
        return (recipe.identity, skip, self.output_dtype, ranges)

    def embed(
        self,
        texts: Iterable[str | Mapping[str, Any]],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> npt.NDArray[Any]:
        """Make an embedding of each text, all planned together: [B, dim] of `output_dtype`, in order.

        Args:
            texts: an iterable of strings, or of objects: {"text": str}, or {"input_ids": [int, ...]} of a text with all
                that stands before it.
            prompt: stands before each text, in place of the default one.
            prompt_name: one of `prompts`, in place of the default one.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Raises UserError, before the model runs, for a prompt_name that the model doesn't have and for a text that can't
        be used: it names the index, what is there, what is allowed and the remedy; after that for an embedding that is
        not finite. OutOfMemory where one text alone does not fit into the device's memory.
        """
        with options_as_arguments():
            found = self._floats(texts, prompt, prompt_name, on_progress)
            return self.convert(found, _names_from(0))

    def find_ranges(
        self,
        texts: Iterable[str | Mapping[str, Any]],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Ranges:
        """Find the ranges for int8 embeddings: the least and the largest number of each column of the texts' own
        embeddings, float32 [2, dim].

        Arguments and errors are those of `embed`; there must be a text.
        """
        with options_as_arguments():
            found = self._floats(texts, prompt, prompt_name, on_progress)
            if not len(found):
                raise UserError("texts are none, and ranges are of one embedding at least")
            return ranges_of([found])

    def pairs(
        self,
        texts: Iterable[str | Mapping[str, Any]],
        k: int = 10,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[tuple[float, int, int]]:
        """Find the k pairs of texts whose embeddings are nearest to each other, by comparing all.

        Other arguments and errors are those of `embed`. Returns (cosine, index, index) of each pair, the nearest first,
        as paraphrase_mining of sentence-transformers; fewer where there are fewer pairs.
        """
        with options_as_arguments():
            check_count("k", k)
            if k is None:
                raise UserError("k must be a whole number from 1")
            found = self._floats(texts, prompt, prompt_name, on_progress)
        cosines, rows = nearest_pairs(found, k, self.device)
        return [(cosine, *pair) for cosine, pair in zip(cosines.tolist(), rows.tolist(), strict=True)]

    def _floats(
        self,
        texts: Iterable[str | Mapping[str, Any]],
        prompt: str | None,
        prompt_name: str | None,
        on_progress: OnProgress | None,
    ) -> npt.NDArray[np.float32]:
        recipe, encoded = self._recipe(prompt, prompt_name), Texts()
        for part in windows(self._items(texts, recipe is not None), _TEXTS_AT_ONCE):
            encoded.extend(self._encode(part, recipe))
        return self._rows(encoded, 0, on_progress)

    def stream(
        self,
        texts: Iterable[str | Mapping[str, Any]],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        window: int = 1024,
        on_progress: OnProgress | None = None,
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield what `embed` returns, row by row in order, [dim] each, as the texts come.

        window: texts that are checked and planned together. The more, the more they share; memory holds so many.
        `on_progress` is told of each window by itself, and errors come at a text's window.
        """
        with options_as_arguments():
            recipe = self._recipe(prompt, prompt_name)
        first = 0
        for part in windows(self._items(texts, recipe is not None), window):
            with options_as_arguments():
                rows = self._rows(self._encode(part, recipe), first, on_progress)
                rows = self.convert(rows, _names_from(first))
            yield from (row.copy() for row in rows)  # one that is kept would keep the window
            first += len(part)

    def _recipe(self, prompt: str | None, name: str | None) -> Recipe | None:
        """Return the recipe of a call's own prompt; None where it has none."""
        if name is None:
            return None if prompt is None else self._with_prompt(prompt)
        if prompt is not None:
            raise UserError("prompt and prompt_name can't both be given")
        return self._with_prompt(_named(self._pooling, name))

    def _rows(self, encoded: Texts, first: int, on_progress: OnProgress | None) -> npt.NDArray[np.float32]:
        """Return the embeddings of encoded texts, of which the first is texts[first]."""
        found = np.empty((len(encoded), self.dim), np.float32)

        def on_batch(indices: np.ndarray, numbers: tuple[np.ndarray, ...]) -> None:
            embedding.check_finite(numbers[0], lambda row: _names_from(first)(int(indices[row])))
            found[indices] = numbers[0]

        self.execute(encoded, with_progress(on_batch, encoded, on_progress))
        return found

    def convert(self, rows: npt.NDArray[np.float32], where: Callable[[int], str]) -> npt.NDArray[Any]:
        """Return finite embeddings [B, dim] in `output_dtype`. UserError for one that float16 can't hold; `where(i)`
        names the text of row i."""
        return converted(rows, self.output_dtype, self._ranges, where)

    def _items(self, texts: Iterable[str | Mapping[str, Any]], has_prompt: bool) -> Iterator[Text]:
        for where, text in numbered(texts, "texts", "strings"):
            if isinstance(text, Mapping):
                item = self.parse(recognised(self.task, Record(where, dict(text))))
                if has_prompt and isinstance(item, ids.Given):
                    _refuse_prompt(where)
                yield item
            else:
                yield Text(where, check_text(text, where), {})

    def _check_ids(self, where: str) -> None:
        if self._has_prompt:
            _refuse_prompt(where)

    def _parse(self, record: Record) -> Text:
        return embedding.parse_text(self.text_key)(record)

    def encode(self, items: Iterable[Text], prompt_name: str | None = None) -> Texts:
        """Return the token sequences of the items, behind the prompt of this name or the default one. UserError for an
        item that the model can't read, and for a name that the model doesn't have."""
        return self._encode(items, self._recipe(None, prompt_name))

    def _encode_items(self, items: Iterable[Text], recipe: Recipe | None = None) -> Texts:
        return embedding.encode(items, self.tokenizer, recipe or self.recipe, self.truncate_right)

    def _encode(self, items: Iterable[Text], recipe: Recipe | None) -> Texts:
        return ids.encode_each(items, lambda texts: self._encode_items(texts, recipe))

    def _compute(self, items: Texts) -> Compute:
        return embedding.embedder(self.runner, self._pooling, items)

    def _result(self, item: Text, encoded: list[tuple[np.ndarray, int]], *numbers: np.ndarray) -> dict[str, Any]:
        (rows,) = numbers
        embedding.check_finite(rows, lambda row: item.where)
        return embedding.result(item, self.convert(rows, lambda row: item.where))


def _named(recipe: Recipe, name: object) -> str:
    """Return the folder's prompt of this name. UserError where it has none."""
    if isinstance(name, str) and name in recipe.prompts:
        return recipe.prompts[name]
    lack = f"{name!r} is not one of the model's prompts, which are {', '.join(map(repr, recipe.prompts)) or 'none'}"
    raise UserError(f"prompt_name {lack}", f"--prompt-name {lack}")


def _names_from(first: int) -> Callable[[int], str]:
    """Return the names of an argument's texts, of which the first is texts[first]."""
    return lambda row: f"texts[{first + row}]"


def _refuse_prompt(where: str) -> NoReturn:
    raise UserError(f"{where} holds token ids, and a --prompt stands before texts; put its ids before them")
