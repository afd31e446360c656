"""Compare heads above a stack that `radix_ops.hf.enable` folds with the same heads as before, labels or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fold_checks import (
    SIDES,
    TOLERANCE,
    Refused,
    Unbuildable,
    build,
    classes_of,
    difference,
    folding,
    gradient_difference,
    gradients,
    pad,
)
from radix_ops.hf import heads, proofs
from radix_ops.hf.proofs import Proof

_HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


def heads_that_fit(model_type: str, arguments: dict[str, Any], proof: Proof) -> tuple[list[str], bool, list[str]]:
    """Return the heads whose outputs stay the same, whether the causal LM's may run on rows, and its classes."""
    arguments = {"pad_token_id": 0} | arguments | {"num_labels": 3}
    found, on_rows, around = [], False, []
    for kind in _HEADS:
        try:
            model = build(model_type, arguments, head=kind)
        except Unbuildable:  # transformers has none
            continue
        name = type(model).__name__
        candidate = dataclasses.replace(
            proof, heads=[name], classes=sorted({*proof.classes, *classes_of(model)}), head_on_rows=kind == "CausalLM"
        )
        fits = _fits(model, kind, candidate)
        if kind == "CausalLM":
            around = classes_of(model)
            on_rows = fits and _runs_on_rows(model, candidate)
            if not fits:
                fits = _fits(model, kind, dataclasses.replace(candidate, head_on_rows=False))
        if fits:
            found.append(name)
    return found, on_rows, around


def _runs_on_rows(model, proof: Proof) -> bool:
    with folding(model, proof, folds=None):
        return heads.may_run_on_rows(model, proofs.innermost_stack(model), {"input_ids": pad("right")[0]})


def _fits(model, kind: str, proof: Proof) -> bool:
    try:
        return all(
            _error(model, ids, mask, labels, proof, folds) < TOLERANCE for ids, mask, labels, folds in _calls(kind)
        )
    except (Refused, Unbuildable):
        return False


def _calls(kind: str):
    """Return batches with labels, and whether they have to be folded; None where labels read masked positions."""
    for side in SIDES:
        ids, mask = pad(side)
        yield ids, mask, {}, True
        count = torch.arange(len(ids))
        if kind == "SequenceClassification":
            yield ids, mask, {"labels": count % 3}, True
            # Heads may take padding for the last token.
            yield ids.where(mask.bool(), 7), mask, {"labels": count % 3}, None
        elif kind == "QuestionAnswering":
            start = mask.argmax(1)
            yield ids, mask, {"start_positions": start, "end_positions": start + mask.sum(1) - 1}, None
        else:
            labels = ids.masked_fill(mask == 0, -100)
            if kind == "CausalLM":
                labels[count, mask.argmax(1)] = -100
            else:
                labels = labels.where(labels < 0, labels % 3)
            yield ids, mask, {"labels": labels}, True
            yield ids, mask, {"labels": ids if kind == "CausalLM" else ids % 3}, None


def _error(model, ids: Tensor, mask: Tensor, labels: dict[str, Tensor], proof: Proof, folds: bool | None) -> float:
    def run():
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **labels)
        found = {}
        for name in ("loss", "logits", "start_logits", "end_logits"):
            value = outputs.get(name)
            if isinstance(value, Tensor):
                found[name] = value[mask.bool()] if value.shape[:2] == ids.shape else value
        total = found["loss"] if "loss" in found else sum(value.tanh().sum() for value in found.values())
        return found, gradients(model, total)

    try:
        want, wanted = run()
    except Exception as error:
        raise Unbuildable(str(error)) from error
    with folding(model, proof, folds):
        got, found = run()
    if got.keys() != want.keys():
        return float("inf")
    return max(gradient_difference(found, wanted), *(difference(got[name], want[name]) for name in want))
