"""Prompts that a language model reranks with: a query, a document, and the question that it answers by yes or no."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.files import read_json
from .errors import UserError
from .inputs import check_text
from .tokenizing import in_turn

_PLACEHOLDER = re.compile(r"\{(query|document|instruction)\}")


_KINDS: dict[str, Any] = {"text": str, "yes": (str, int), "no": (str, int), "instruction": str}


@dataclass(frozen=True)
class Template:
    """A prompt that a language model reranks with.

    `text` holds {query}, {document} once and perhaps {instruction}; what is behind {document} is tokenised apart. `yes`
    and `no` are tokens, as text or as ids; `instruction` stands in where none is given. Raises UserError, a ValueError,
    for fields of another kind and for a text that lacks a place.
    """

    text: str
    yes: str | int = "yes"
    no: str | int = "no"
    instruction: str | None = None

    def __post_init__(self):
        for key in _KINDS:
            value = getattr(self, key)
            if isinstance(value, np.integer):
                object.__setattr__(self, key, int(value))
            elif value is not None or key != "instruction":
                _check_field("Template", key, value)
        found = _PLACEHOLDER.findall(self.text)
        if found.count("document") != 1 or "query" not in found:
            raise UserError("its text must hold {document} once and {query}")

    @property
    def takes_instruction(self) -> bool:
        """Return whether the text has a place for an instruction."""
        return "{instruction}" in self.text

    def parts(self, query: str, instruction: str | None) -> tuple[str, str]:
        """Return the texts before and behind the document."""
        values = {"query": query, "instruction": instruction or ""}
        head, _, tail = self.text.partition("{document}")
        head, tail = (_PLACEHOLDER.sub(lambda match: values[match[1]], part) for part in (head, tail))
        return head, tail

    def answer_ids(self, vocab_size: int | None) -> tuple[int, int]:
        """Return the ids of (yes, no) for a model without a tokenizer, which takes fields that are ids."""
        for name in ("yes", "no"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(
                    f"the template's {name} is the text {value!r}, and the model has no tokenizer to say which token "
                    "that is; give its id"
                )
            if not 0 <= value < (vocab_size or 2**31):
                raise UserError(f"the template's {name}, {value}, is no id of the model, which has {vocab_size} tokens")
        return self._apart(int(self.yes), int(self.no))

    def token_ids(self, tokenizer: Any) -> tuple[int, int]:
        """Return the ids of (yes, no)."""
        return self._apart(_token_id(tokenizer, "yes", self.yes), _token_id(tokenizer, "no", self.no))

    def _apart(self, yes: int, no: int) -> tuple[int, int]:
        if yes == no:
            raise UserError(f"the template's yes ({self.yes!r}) and no ({self.no!r}) are one token, {yes}")
        return yes, no


def _check_field(where: str, key: str, value) -> None:
    if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
        raise UserError(f'{where}: "{key}" must be a string{" or a token id" if key in ("yes", "no") else ""}')
    if isinstance(value, str):
        check_text(value, f'{where}: "{key}"')


def _token_id(tokenizer, name: str, token: str | int) -> int:
    with in_turn(tokenizer):
        ids = [token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or not 0 <= ids[0] < len(tokenizer):
        raise UserError(
            f"the template's {name}, {token!r}, is {len(ids)} tokens to the model's tokenizer; it must be one"
            if isinstance(token, str)
            else f"the template's {name}, {token}, is no id of the model's tokenizer, which has {len(tokenizer)}"
        )
    return ids[0]


# The text is that of Qwen/Qwen3-Reranker-0.6B's model card.
QWEN3_RERANKER = Template(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
)
TEMPLATES = {"qwen3-reranker": QWEN3_RERANKER}


def find_template(name_or_path: str) -> Template:
    """Return a template by name, or that of a JSON file with its fields:

    {"text": "Query: {query}\\nDocument: {document}\\nRelevant:", "yes": " yes", "no": " no"} and perhaps an
    "instruction". UserError for anything else.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    where, known = f"--template {name_or_path}", " or ".join(TEMPLATES)
    try:
        fields = read_json(Path(name_or_path))
    except OSError as error:
        raise UserError(f"{where} is neither {known} nor a file: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--template {error}") from error
    if not isinstance(fields, dict) or "text" not in fields:
        raise UserError(f'{where} must hold an object with "text" and perhaps "yes", "no" and "instruction"')
    for key, value in fields.items():
        if key not in _KINDS:
            raise UserError(f'{where} has the key "{key}"; a template has text, yes, no and instruction')
        _check_field(where, key, value)
    try:
        return Template(**fields)
    except ValueError as error:
        raise UserError(f"{where} can't be used: {error}") from error
