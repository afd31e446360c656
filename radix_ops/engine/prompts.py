"""Questions as contexts with choices, spelled out or by answer letters, and which choice a row says is right."""

from __future__ import annotations

import operator
import string

from .errors import UserError
from .inputs import Record, kind_of

LETTERS = string.ascii_uppercase


def with_context(record: Record, letters: bool = False, in_chat: bool = False) -> Record:
    """Return a record of {"question": str, "choices": [str, ...]} as one of {"context", "choices"}; its gold becomes an
    index.

    The prompts are those of lm-evaluation-harness 0.4.13: "Question: ...\\nAnswer:" as in arc_easy, and with `letters`
    that of mmlu, which lists the choices as "A. ..." and is answered by letters alone. An answer has a space before it,
    but for the one of a chat. UserError for what can't be used.
    """
    question, choices = record.text("question"), check_choices(record)
    gold, joint = gold_of(record, choices), "" if in_chat else " "
    if letters:
        if len(choices) > len(LETTERS):
            raise UserError(
                f"{record.where} has {len(choices)} choices, and --letters names {len(LETTERS)} at most, A to Z"
            )
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
        context, answers = f"{question.strip()}\n{listed}Answer:", list(LETTERS[: len(choices)])
    else:
        context, answers = f"Question: {question}\nAnswer:", [choice.lstrip() for choice in choices]
        empty = next((number for number, answer in enumerate(answers) if not answer), None)
        if empty is not None:
            raise UserError(f"{record.where}: choices[{empty}] is white space alone; a choice must hold text to score")
    fields = {key: value for key, value in record.fields.items() if key != "question"}
    fields |= {"context": context, "choices": [joint + answer for answer in answers]}
    return Record(record.where, fields if gold is None else fields | {"gold": gold})


def check_choices(record: Record) -> list[str]:
    """Return the choices of a record. UserError where they are no strings, or one is empty."""
    choices = record.texts("choices")
    for index, choice in enumerate(choices):
        if not choice:
            raise UserError(f"{record.where}: choices[{index}] is an empty string; a choice must hold text to score")
    return choices


def gold_of(record: Record, choices: list[str]) -> int | None:
    """Return the index of the choice that is right by the record's "gold": an index from 0, a letter, or the text of a
    choice, white space around it aside. None where it has none, null or an empty string, as an empty cell of a table
    is; UserError for anything else."""
    gold = record.fields.get("gold")
    if gold is None or (isinstance(gold, str) and not gold):
        return None
    where = f'{record.where}: "gold"'
    last = LETTERS[min(len(choices), len(LETTERS)) - 1]
    allowed = f"an index from 0 to {len(choices) - 1}, a letter from A to {last}, or the text of a choice"
    if isinstance(gold, str):
        found = _named(gold, choices)
        if len(found) > 1:
            raise UserError(
                f"{where} is {gold!r:.80}, which names choices[{found[0]}] and choices[{found[1]}]; give the index"
            )
        if found:
            return found[0]
        raise UserError(f"{where} is {gold!r:.80}; it must be {allowed}")
    try:
        index = None if isinstance(gold, bool) else operator.index(gold)
    except TypeError:
        index = None
    if index is None:
        raise UserError(f"{where} is {kind_of(gold)}; it must be {allowed}")
    if not 0 <= index < len(choices):
        raise UserError(f"{where} is {index}; it must be {allowed}")
    return index


def _named(gold: str, choices: list[str]) -> list[int]:
    """Return the choices that a string may mean, the first of equal ones, as a text and as a letter."""
    texts = [choice for choice in choices if choice == gold]
    texts = texts or [choice for choice in choices if choice.strip() == gold.strip()]
    found = {choices.index(text) for text in texts}
    letter = LETTERS.find(gold.strip().upper()) if len(gold.strip()) == 1 else -1
    return sorted(found | ({letter} if 0 <= letter < len(choices) else set()))
