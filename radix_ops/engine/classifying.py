"""Rows that are classified: their gold labels and their results."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np

from .errors import UserError
from .items import shortest_decimals

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
RESERVED_KEYS = ("labels", "scores", "best", "predicted")
_GOLD_KEYS = ("gold", "label")
_OF_NLI = ("entailment", "neutral", "contradiction")  # as SNLI, MNLI, ANLI and XNLI count them
R = TypeVar("R", bound="Row")


@dataclass(frozen=True)
class Row:
    """One row; `where` names it in messages, `extra` holds all other keys."""

    where: str
    content: Any  # a text, a pair of them, or the turns of a conversation
    extra: dict  # with the right label, or labels, under "gold"


def with_gold(row: R, labels: Sequence[str], problem: str, names: Mapping[str, Sequence[str]] | None = None) -> R:
    """Return the row with what it says of its right labels under "gold"; `names` are a data set's, see `gold_of`.
    UserError for what is none of the labels."""
    gold = None if problem == "regression" else gold_of(row.where, row.extra, labels, problem, names or {})
    if gold is None and (problem == "regression" or "gold" not in row.extra):
        return row
    others = {key: value for key, value in row.extra.items() if key != "gold"}
    return replace(row, extra=others | {"gold": gold})


def gold_of(
    where: str, fields: dict, labels: Sequence[str], problem: str, names: Mapping[str, Sequence[str]]
) -> str | list[str] | None:
    """Return the label that a row's "gold" or "label" says, a list where several may hold at once; None without one,
    and for null and -1.

    A label is named by a string, or by its index; where several may hold at once, by an array of them, and where there
    is one label, 0 and 1 say whether it holds. Where the data set names what its indices under a key stand for, and the
    model knows such names, these count. UserError for what is none of the labels.
    """
    # Cells of tables are strings; one that is empty says no more than null.
    key = next((key for key in _GOLD_KEYS if fields.get(key) is not None and fields[key] != ""), None)
    if key is None or fields[key] in (-1, "-1"):
        return None
    given = fields[key]
    if len(labels) > 1 and any(_named(name, labels) for name in names.get(key, ())):
        several = isinstance(given, list)
        found = [_name_of(f'{where}: "{key}"', one, names[key], labels) for one in (given if several else [given])]
        given = found if several else found[0]
    elif key == "label":
        _check_counting(where, fields, labels)
    if problem != "multi_label_classification":
        return _label_of(f'{where}: "{key}"', given, labels)
    if len(labels) == 1 and given in (0, 1, "0", "1") and given not in labels:
        return list(labels) if int(given) else []
    if not isinstance(given, list):
        return [_label_of(f'{where}: "{key}"', given, labels)]
    chosen = (_label_of(f"{where}: {key}[{index}]", label, labels) for index, label in enumerate(given))
    return sorted(set(chosen), key=list(labels).index)


def _name_of(where: str, given: Any, names: Sequence[str], labels: Sequence[str]) -> Any:
    """Return the model's label that an index stands for by the data set's names; anything but a number as it is."""
    index = _index_of(given, names)
    if index is None:
        if isinstance(given, Integral):
            raise UserError(f"{where} is {given!r}; the data set's indices are from 0 to {len(names) - 1}")
        return given
    found = _named(names[index], labels)
    if found is None:
        raise UserError(
            f"{where} is {given!r}, which is {names[index]!r} to the data set; the model has no such label, but "
            f"{_listed(labels)}"
        )
    return found


def _check_counting(where: str, fields: dict, labels: Sequence[str]) -> None:
    """UserError where "label" is an index, and it can be told that the data set counts labels as the model does not."""
    index = _index_of(fields["label"], labels)
    if index is None or (isinstance(fields["label"], str) and _named(fields["label"], labels)):
        return
    message = f'{where}: "label" is {fields["label"]!r}, and the label of that index is {labels[index]!r} to the model'
    name = fields.get("label_text")
    meant = _named(name, labels) if isinstance(name, str) else None
    if meant not in (None, labels[index]):
        raise UserError(
            f'{message}, but "label_text" is {name!r}; a "gold", the name or an index as the model counts, goes first',
            f'{message}, but "label_text" is {name!r}; --column gold=label_text takes the name',
        )
    if _counts_entailment_otherwise(tuple(labels)):
        message += "; data sets of entailment count that first, so give the label's name, or"
        raise UserError(
            f'{message} a "gold", an index as the model counts',
            f"{message} --column gold=label if the index is as the model counts",
        )


@functools.lru_cache
def _counts_entailment_otherwise(labels: tuple[str, ...]) -> bool:
    names = [label.casefold() for label in labels]
    return "entailment" in names[1:] or (set(names) == set(_OF_NLI) and names != list(_OF_NLI))


def _named(name: str, labels: Sequence[str]) -> str | None:
    """Return the label of this name, which may differ in case alone where one label is so; None where there is none."""
    return _by_name(tuple(labels)).get(name) or _by_folded_name(tuple(labels)).get(name.casefold())


@functools.lru_cache
def _by_name(labels: tuple[str, ...]) -> dict[str, str]:
    return {label: label for label in labels}


@functools.lru_cache
def _by_folded_name(labels: tuple[str, ...]) -> dict[str, str]:
    counts = Counter(map(str.casefold, labels))
    return {label.casefold(): label for label in labels if counts[label.casefold()] == 1}


def _index_of(given: Any, labels: Sequence[str]) -> int | None:
    """Return the index that a value is, or that its digits say; None for anything else."""
    index = int(given) if isinstance(given, str) and given.isdecimal() and len(given) < 10 else given
    is_index = isinstance(index, (Integral, float)) and not isinstance(index, bool) and index in range(len(labels))
    return int(index) if is_index else None


def _label_of(where: str, given: Any, labels: Sequence[str]) -> str:
    if isinstance(given, str) and (found := _named(given, labels)) is not None:
        return found
    index = _index_of(given, labels)
    if index is not None:
        name = str(index)
        if name in labels and labels.index(name) != index:
            raise UserError(
                f'{where} is {given!r}, and "{name}" is not the label of that index; write the name as a string'
            )
        return labels[index]
    raise UserError(
        f"{where} is {given!r:.100}; it must be a label ({_listed(labels)}) or its index, from 0 to {len(labels) - 1}; "
        "rename the key where it holds something else"
    )


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (" and more" if len(labels) > 8 else "")


def result(
    row: Row, labels: Sequence[str], problem: str, scores: np.ndarray, top_k: int | None, threshold: float | None
) -> dict:
    """Return the output object of a row: its labels by score, the best first, and equal ones in their order."""
    order = np.argsort(-scores, kind="stable").tolist()
    names, numbers = [labels[index] for index in order], shortest_decimals(scores[order].astype(np.float32))
    found = {**row.extra, "labels": names[:top_k], "scores": numbers[:top_k]}
    if problem != "regression":
        found["best"] = names[0]
    if threshold is not None:
        found["predicted"] = [label for label, score in zip(names, numbers, strict=True) if score >= threshold]
    return found


def check_finite(row: Row, labels: Sequence[str], scores: np.ndarray) -> None:
    """UserError for a score that isn't finite."""
    for label, score in zip(labels, scores.tolist(), strict=True):
        if not np.isfinite(score):
            raise UserError(f'{row.where}: label "{label}" got the score {score}; try --dtype float32')
