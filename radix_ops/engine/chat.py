"""Contexts as the user's messages of conversations, which choices answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import UserError
from .messages import Chat, Messages


def prompter(tokenizer: Any, system: str = "") -> Callable[[str], str]:
    """Return a function that makes of a context the text behind which an assistant's answer stands: the system's
    message, if there is one, the context as the user's, and the prompt for an answer, as the chat template has them.

    The text brings all special tokens along. UserError for a tokenizer without a template, and for a template that
    fails or drops one of the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--chat needs a chat template, and the model's tokenizer has none; score without --chat")
    chat, before = chat_of(tokenizer, system), [("system", system)] * bool(system)
    return lambda context: chat.rendered([*before, ("user", context)])


def chat_of(tokenizer: Any, system: str = "", arguments: Mapping[str, Any] | None = None) -> Chat:
    """Return the conversations that the tokenizer's chat template renders, by default with the prompt for an answer;
    `arguments` are the template's. UserError for a template that fails or drops a message."""
    # Templates take a message's content as a text, as lm-evaluation-harness gives it; a few take typed parts alone.
    given = {"add_generation_prompt": True, **(arguments or {})}
    chats = [Chat(tokenizer, Messages(kind, given), system) for kind in ("flat", "structured")]
    errors = []
    for chat in chats:
        try:
            chat.check(["user"])
            return chat
        except UserError as error:
            errors.append(error)
    raise errors[0]
