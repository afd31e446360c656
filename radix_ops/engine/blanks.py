"""Sentences with a blank, as in WinoGrande: what is behind it is scored behind each of the contexts that fill it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .errors import UserError
from .inputs import Record
from .prompts import gold_of
from .scoring import RESERVED_KEYS, Choices, Item


@dataclass(frozen=True)
class Blank(Item):
    """A question whose choices are contexts of one continuation."""

    continuation: str = ""


def is_blank(record: Record) -> bool:
    """Return whether a record holds contexts of a continuation."""
    return "contexts" in record.fields


def parse_blank(record: Record) -> Blank:
    """Return the item of {"contexts": [str, ...], "continuation": str, ...}. UserError for anything else."""
    contexts, continuation = record.texts("contexts"), record.text("continuation")
    if not continuation:
        raise UserError(f'{record.where}: "continuation" is an empty string; it must hold text to score')
    gold, extra = gold_of(record, contexts), record.others(("contexts", "continuation"), RESERVED_KEYS)
    extra |= {} if gold is None else {"gold": gold}
    return Blank(record.where, "", contexts, extra, continuation)


def encode(items: Iterable[Item], encode_items: Callable[[Iterable[Item]], Choices]) -> Choices:
    """Return the (context, choice) pairs of items, blanks among them; `encode_items` makes those of items alone."""
    sizes, has_blanks = array("q"), False

    def apart() -> Iterator[Item]:
        nonlocal has_blanks
        for item in items:
            if not isinstance(item, Blank):
                sizes.append(1)
                yield item
                continue
            has_blanks = True
            sizes.append(len(item.choices))
            for number, context in enumerate(item.choices):
                yield Item(f"{item.where}: contexts[{number}]", context, [item.continuation], {})

    encoded = encode_items(apart())
    if not has_blanks:
        return encoded
    joined, first = Choices(), 0
    for size in sizes:
        joined.append([pair for number in range(first, first + size) for pair in encoded[number]])
        first += size
    return joined
