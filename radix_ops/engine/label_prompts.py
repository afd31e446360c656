"""Prompts that a language model classifies by: the text before its answer, and the words that answer for each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from ..models.files import read_json, read_toml
from .errors import UserError
from .inputs import check_text, kind_of
from .sandbox import JinjaText

Word: TypeAlias = str | int | Sequence[int]  # text, a token's id, or the ids of several
LABEL_SCORES = ("softmax", "probability")
_KEYS = ("template", "labels", "chat", "system", "chat_arguments", "score")
# What apply_chat_template takes for itself; another template would not be bounded as this one is.
_NO_CHAT_ARGUMENTS = (
    "conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class LabelPrompt:
    """A prompt that a language model classifies by.

    Args:
        labels: the words that answer for each label, by its name: one or a list of them. A word is a text, with the
            space that it starts with, a token's id, or a list of ids.
        template: Jinja that makes a text of a row's fields, in a sandbox. It may use bos_token and the tokenizer's
            other special tokens. Without it, where `chat` is set, a row brings "text" or "messages".
        chat: make the text the user's message, which the tokenizer's chat template renders.
        system: the system's message before it.
        chat_arguments: further arguments of the chat template, such as {"enable_thinking": False}.
        score: "softmax" over the labels, or "probability", of the label's words among all that the model may write.

    Raises UserError, a ValueError, for fields of another kind.
    """

    labels: Mapping[str, Word | Sequence[Word]]
    template: str | None = None
    chat: bool = False
    system: str | None = None
    chat_arguments: Mapping[str, Any] | None = None
    score: str = "softmax"
    words: Mapping[str, tuple[str | tuple[int, ...], ...]] = field(init=False, repr=False, compare=False)
    text: JinjaText | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for key in ("template", "system"):
            value = getattr(self, key)
            if value is not None:
                check_text(value, f'"{key}"')
        if not isinstance(self.chat, bool):
            raise UserError(f'"chat" is {kind_of(self.chat)}; it must be true or false')
        if self.score not in LABEL_SCORES:
            raise UserError(f'"score" must be {" or ".join(LABEL_SCORES)}, got {self.score!r}')
        if self.chat_arguments is not None and not isinstance(self.chat_arguments, Mapping):
            raise UserError(f'"chat_arguments" is {kind_of(self.chat_arguments)}; it must be an object')
        wrong = next((key for key in _NO_CHAT_ARGUMENTS if key in (self.chat_arguments or ())), None)
        if wrong is not None:
            raise UserError(f'"chat_arguments" holds "{wrong}", which no chat template takes')
        if not self.chat:
            if self.template is None:
                raise UserError('there is neither a "template" nor "chat": true, which renders a row\'s messages')
            given = next((key for key in ("system", "chat_arguments") if getattr(self, key) is not None), None)
            if given is not None:
                raise UserError(f'"{given}" is of a chat template, and "chat" is not true')
        object.__setattr__(self, "words", _words_of(self.labels))
        object.__setattr__(self, "text", None if self.template is None else JinjaText(self.template))
        if self.text is not None and not self.fields:
            raise UserError("the template reads no field of a row, so that all rows would be alike")

    @property
    def fields(self) -> frozenset[str]:
        """Return the fields of a row that the template reads."""
        return self.text.fields - set(SPECIAL_TOKENS) if self.text else frozenset()

    @property
    def identity(self) -> tuple:
        """Return what decides about results beside the tokens of a row."""
        return (tuple(self.words.items()), self.score)


def _words_of(labels: Any) -> Mapping[str, tuple]:
    if not isinstance(labels, Mapping):
        raise UserError(f'"labels" is {kind_of(labels)}; it must be an object of the words of each label')
    if len(labels) < 2:
        raise UserError(f'"labels" holds {len(labels)}; there must be two at least')
    found = {}
    for name, given in labels.items():
        check_text(name, "a label's name")
        where = f'the words of label "{name}"'
        listed = given if isinstance(given, (list, tuple)) else [given]
        if not listed:
            raise UserError(f"{where} are an empty array; there must be one at least")
        found[name] = tuple(_word(word, where) for word in listed)
    return MappingProxyType(found)


def _word(word: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(word, str):
        if not check_text(word, where):
            raise UserError(f"{where} hold an empty string")
        return word
    ids = word if isinstance(word, (list, tuple)) else [word]
    if not ids or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{where} hold {word!r}; a word is a string, a token's id, or an array of ids")
    return tuple(int(i) for i in ids)


# The prompt and the words are those of google/shieldgemma-2b's model card, for a user's prompt against one policy.
SHIELDGEMMA = LabelPrompt(
    {"Yes": "Yes", "No": "No"},
    """\
You are a policy expert trying to help determine whether a user
prompt is in violation of the defined safety policies.

<start_of_turn>
Human Question: {{ text.strip() }}
<end_of_turn>

Our safety principle is defined in the below:

{{ policy.strip() }}

Does the human question violate the above principle? Your answer must start
with 'Yes' or 'No'. And then walk through step by step to be sure we answer
correctly.
""",
)
# As the README of github.com/QwenLM/Qwen3Guard has it: the tokenizer's chat template is the prompt, with no generation
# prompt asked for, and the answer's first line is one of these.
QWEN3_GUARD = LabelPrompt(
    {"safe": "Safety: Safe", "unsafe": "Safety: Unsafe", "controversial": "Safety: Controversial"},
    chat=True,
    chat_arguments={"add_generation_prompt": False},
)
LABEL_PROMPTS = {"qwen3guard": QWEN3_GUARD, "shieldgemma": SHIELDGEMMA}


def is_label_prompt(name_or_path: str) -> bool:
    """Return whether this names a prompt of `find_label_prompt`, or a file that holds one, and no other template."""
    if name_or_path in LABEL_PROMPTS or name_or_path.endswith(".toml"):
        return True
    try:
        fields = read_json(Path(name_or_path))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and "labels" in fields


def find_label_prompt(name_or_path: str) -> LabelPrompt:
    """Return a prompt by name, or that of a JSON or TOML file with its fields. UserError for anything else."""
    if name_or_path in LABEL_PROMPTS:
        return LABEL_PROMPTS[name_or_path]
    where, path = f"--template {name_or_path}", Path(name_or_path)
    try:
        fields = (read_toml if path.suffix == ".toml" else read_json)(path)
    except OSError as error:
        known = " nor ".join(LABEL_PROMPTS)
        raise UserError(f"{where} is neither {known} nor a file: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--template {error}") from error
    if not isinstance(fields, dict) or "labels" not in fields:
        raise UserError(f'{where} must hold an object with "labels" and "template", or with "chat": true')
    unknown = next((key for key in fields if key not in _KEYS), None)
    if unknown is not None:
        raise UserError(f'{where} has the key "{unknown}"; a prompt has {", ".join(_KEYS)}')
    try:
        return LabelPrompt(**fields)
    except ValueError as error:
        raise UserError(f"{where} can't be used: {error}") from error
