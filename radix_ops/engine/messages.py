"""Texts as the messages of a conversation, which a tokenizer's chat template renders, as sentence-transformers does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import UserError
from .tokenizing import in_turn

# The templates of these types take the content as it is, whatever they look like.
_FLAT_TYPES = ("apertus", "deepseek_v3", "gpt_oss", "seed_oss")
_STRUCTURED_MARKS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
# Texts by which a template's own tokens are found. They share no token at their ends.
_FILLERS = ("0", "1 2 3 4")
_PROBES = ("alpha", "foxtrot")

Turn = tuple[str, str]  # role and text


@dataclass(frozen=True)
class Messages:
    """The way from texts to messages."""

    # A message's content is the text ("flat") or a list of typed parts ("structured"); `fitted` resolves "auto".
    format: str = "auto"
    arguments: dict = field(default_factory=dict)  # for the template
    keeps_tail: bool = True  # whether what the template puts behind a text outlives a cut

    def fitted(self, tokenizer, model_type: str) -> Messages:
        """Return these with the format that "auto" stands for: what the template looks as if it takes."""
        if self.format != "auto":
            return self
        template: Any = getattr(tokenizer, "chat_template", None)
        is_text = isinstance(template, str) and bool(template)
        takes_parts = not is_text or any(mark in template for mark in _STRUCTURED_MARKS)
        return replace(self, format="structured" if takes_parts and model_type not in _FLAT_TYPES else "flat")


class Chat:
    """The conversations of a run: a prompt as the system's message, if there is one, then turns of (role, text)."""

    def __init__(self, tokenizer, messages: Messages, prompt: str = ""):
        if messages.format == "auto":
            raise ValueError("messages must be fitted to the tokenizer first")
        self._tokenizer, self._messages, self._prompt = tokenizer, messages, prompt

    def check(self, roles: Sequence[str]) -> None:
        """UserError where a text of one of the roles, or the prompt, does not reach what the template renders."""
        dropped = self.dropped(roles)
        if dropped:
            raise UserError(
                f"the chat template of the model's tokenizer drops {' and '.join(dropped)}: "
                f"it must render the roles {', '.join(['system'] * bool(self._prompt) + list(roles))}"
            )

    def dropped(self, roles: Sequence[str]) -> list[str]:
        """Return the roles whose texts change nothing of what is rendered, found by trying."""
        turns = [("system", self._prompt)] * bool(self._prompt) + [(role, _PROBES[0]) for role in roles]
        base = self.rendered(turns)
        changed = lambda place: [*turns[:place], (turns[place][0], _PROBES[1]), *turns[place + 1 :]]  # noqa: E731
        return [role for place, (role, _) in enumerate(turns) if self.rendered(changed(place)) == base]

    def rendered(self, turns: Sequence[Turn]) -> str:
        """Return the text of a conversation."""
        with _rendering():
            return self._tokenizer.apply_chat_template(self._of(turns), tokenize=False, **self._messages.arguments)

    def ids(self, conversations: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """Return the token ids of each conversation; the template brings all special tokens along."""
        prompt = [("system", self._prompt)] * bool(self._prompt)
        with _rendering(), in_turn(self._tokenizer):
            return self._tokenizer.apply_chat_template(
                [self._of([*prompt, *turns]) for turns in conversations],
                tokenize=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
                **self._messages.arguments,
            )["input_ids"]

    def cut(self, ids: list[int], turns: Sequence[Turn], max_length: int, where: str) -> list[int]:
        """Return at most `max_length` of a conversation's ids: its last turn loses its end, and what is behind stays.

        UserError where no token of it would be left.
        """
        first, second = self.ids([[*turns[:-1], (turns[-1][0], filler)] for filler in _FILLERS])
        head, tail = _shared(first, second), _shared(first[::-1], second[::-1])
        # Where the two never part, they don't tell where the text stands.
        size = tail if self._messages.keeps_tail and tail < min(len(first), len(second)) else 0
        if head + size >= max_length:
            raise UserError(
                f"{where} has no room: template and prompt take {head + size} tokens, and the most are {max_length}"
            )
        return ids[: max_length - size] + first[len(first) - size :]

    def _of(self, turns: Sequence[Turn]) -> list[dict]:
        is_flat = self._messages.format == "flat"
        return [
            {"role": role, "content": text if is_flat else [{"type": "text", "text": text}]} for role, text in turns
        ]


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists share at their starts."""
    return next(
        (place for place, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(map(len, (one, other)))
    )


@contextlib.contextmanager
def _rendering() -> Iterator[None]:
    """Turn any error of a template, a program of the model's author, into a UserError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the chat template of the model's tokenizer failed: {type(error).__name__}: {reason}"
        ) from error
