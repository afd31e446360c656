"""Look for the terms on which a model type of transformers folds, by varying its config field by field."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from fold_checks import (
    FAR,
    FAR_TOLERANCE,
    TOLERANCE,
    Case,
    NotEnabled,
    Refused,
    Unbuildable,
    build,
    depends_on_place,
    difference,
    long_rows_differ,
    observed,
    pad,
    positions_that_fit,
)
from radix_ops.hf import proofs
from radix_ops.hf.proofs import NUMBER, Proof
from small_configs import (
    BOUNDS,
    NOT_BY_DEFAULT,
    NUMBERS,
    WITHOUT_EFFECT,
    choices,
    default_config,
    layer_choices,
    numbers,
    rope_choices,
    with_default_layers,
    with_far_positions,
)

# It has as many layers as by default, through which errors grow.
DEEP_TOLERANCE = 1e-2


class Search:
    """Knowledge of a type, from the configs that were run."""

    def __init__(self, model_type: str, arguments: dict[str, Any], log=lambda text: None):
        self.model_type, self.arguments, self.log = model_type, arguments, log
        self.calls = 1
        self.positions = {"tokens", "columns"}
        self.values: dict[str, set] = {}
        self.classes: set[str] = set()
        self.layer_types: set[str] = set()
        self.refused: list[PreTrainedConfig] = []  # that don't fold on the same terms
        self.unbuilt: list[dict[str, Any]] = []  # changes of the config with which the plain model doesn't run

    def learn(self, model) -> None:
        seen = observed(model)
        for name, kinds in seen.values.items():
            if NUMBER not in kinds or not proofs.SUSPICIOUS.search(name):
                self.values.setdefault(name, set()).update(kinds)
            else:
                self.values.setdefault(name, set()).update(kind for kind in kinds if kind != NUMBER)
        self.classes |= set(seen.classes)
        self.layer_types |= set(seen.layer_types)

    def fits(self, with_gradients: bool = True, **changed) -> bool | None:
        """Return whether the type folds with some arguments changed, too; None where such a model doesn't run."""
        try:
            model = build(self.model_type, {**self.arguments, **changed})
            found = positions_that_fit(model, self.calls, with_gradients) & self.positions
        except Unbuildable as reason:
            self.log(f"{changed}: not built: {str(reason)[:150]}")
            self.unbuilt.append(changed)
            return None
        except NotEnabled as reason:
            self.log(f"{changed}: {reason}")
            return None
        except Refused as reason:
            self.log(f"{changed}: refused: {reason}")
            self.refused.append(proofs.innermost_stack(model).config)
            return False
        if not found:
            self.log(f"{changed}: refused: positions differ")
            self.refused.append(proofs.innermost_stack(model).config)
            return False
        if found != self.positions:
            self.log(f"{changed}: positions are {found}")
        self.positions = found
        self.learn(model)
        return True

    def at_work(self, name: str, one: Any, other: Any, context: dict[str, Any]) -> bool:
        """Return whether in this context the field changes the plain model's outputs of a batch."""
        ids, mask = pad("right")
        states = []
        for value in (one, other):
            try:
                stack = proofs.innermost_stack(build(self.model_type, {**self.arguments, **context, name: value}))
                with torch.no_grad():
                    found = stack(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            except Exception:
                return False
            states.append((found, [p.shape for p in stack.parameters()]))
        (a, shapes), (b, other_shapes) = states
        return shapes != other_shapes or difference(a, b) > TOLERANCE

    def proof(self, model, packing: bool, heads: list[str], on_rows: bool) -> Proof:
        stack = proofs.innermost_stack(model)
        return Proof(
            module=type(stack).__module__,
            stack=type(stack).__name__,
            classes=sorted(self.classes),
            values={
                name: sorted(kinds, key=repr)
                for name, kinds in sorted(self.values.items())
                if kinds and (kinds != {NUMBER} or proofs.SUSPICIOUS.search(name))
            },
            layer_types=sorted(self.layer_types),
            calls=self.calls,
            positions="any" if len(self.positions) == 2 else next(iter(self.positions)),
            packing=packing,
            heads=heads,
            head_on_rows=on_rows,
            since=transformers.__version__,
        )


def count_calls(search: Search, model) -> None:
    """Count the calls of attention in each layer."""
    for calls in (1, 2):
        search.calls = calls
        try:
            search.positions = positions_that_fit(model, calls)
            return
        except Refused as reason:
            seen = re.search(r"attention is called (\d+) times and not", str(reason))
            layers = proofs.innermost_stack(model).config.num_hidden_layers
            if seen is None or calls == 2:
                raise
            if int(seen[1]) != 2 * layers:
                raise Refused(f"its {layers} layers call transformers' attention interface {seen[1]} times") from None


def check_far(search: Search) -> None:
    """Check long rows: scales by position with constants of the code's own don't show in short ones."""
    try:
        arguments = with_far_positions(search.arguments, 2 * FAR)
        model = build(search.model_type, arguments, "sdpa")
    except Unbuildable:
        model = build(search.model_type, arguments)
    if len(search.positions) == 2 and depends_on_place(model):
        search.positions = {"columns"}
    error = long_rows_differ(model, observed(model, sorted(search.positions)[-1], calls=search.calls))
    search.log(f"rows of {FAR} tokens differ by {error:.2g}")
    if not error < FAR_TOLERANCE:
        raise Refused(f"folded, rows of {FAR} tokens differ by {error:.2g} of their size")


def vary(search: Search, model) -> None:
    """Run the type with other values of its config, one by one and jointly where only that makes sense."""
    config = proofs.innermost_stack(model).config
    for changed in layer_choices(search.model_type, search.arguments, config):
        search.fits(**changed)
    for changed in rope_choices(config):
        search.fits(with_gradients=False, **changed)
    for name, value in choices(config):
        if search.fits(**{name: value}) is None and "head_dim" not in search.arguments:
            search.fits(**{name: value, "head_dim": 8})
    for name, value in vars(config).items():
        # By default there is none: `numbers` doesn't know it.
        if value is None and name in NUMBERS and proofs.SUSPICIOUS.search(name):
            vary_suspicious(search, config, name, [NUMBERS[name], NUMBERS[name] - 1])
    for name, others in numbers(config):
        if name in BOUNDS:
            search.values.setdefault(name, set()).add(NUMBER)
        elif proofs.SUSPICIOUS.search(name):
            vary_suspicious(search, config, name, others)
        elif any(search.fits(with_gradients=False, **{name: other}) is False for other in others[:2]):
            # Right for some numbers alone.
            search.values[name] = search.values.get(name, set()) - {NUMBER} | {vars(config)[name]}


def vary_suspicious(search: Search, config, name: str, others: list) -> None:
    """Vary a number in each context: it stands for others only where it was seen at work, and right."""
    value = vars(config)[name]
    # Some act only in layers of another type, or through layer types that the config makes of them.
    declared = proofs.declared_fields(config)
    contexts: list[dict[str, Any]] = [{}]
    if name.startswith("prefix_dense"):
        contexts.append(
            {"layer_types": None, "mlp_layer_types": None, "first_k_dense_replace": 2, "num_hidden_layers": 4}
        )
    if "layer_types" in search.arguments:
        switch = {"use_sliding_window": True} if "use_sliding_window" in declared else {}
        contexts.append(switch | {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2})
        contexts.append({"layer_types": None, "num_hidden_layers": 4})
    elif "use_sliding_window" in declared:
        contexts.append({"use_sliding_window": True})
    if "mlp_layer_types" in declared:
        contexts.append({"layer_types": None, "mlp_layer_types": None, "num_hidden_layers": 4})
    small = [other for other in others if isinstance(other, float) or 1 <= other <= 5]
    at_work, is_right = name in WITHOUT_EFFECT, True
    for context in contexts:
        found = {other: search.fits(**context, **{name: other}) for other in small}
        is_right &= False not in found.values()
        if not at_work:
            # Some layers need a number, so two of them are compared where none is the default.
            one = value if value is not None else small[-1]
            at_work = any(search.at_work(name, one, other, context) for other, fits in found.items() if fits)
    if at_work and is_right:
        search.values.setdefault(name, set()).add(NUMBER)
    elif not is_right:
        search.values.setdefault(name, set()).add(value)
    else:
        search.log(f"{name}: never at work")


def check_default(search: Search, proof: Proof) -> None:
    """Check that the proof holds for the default config, but for its parts that don't run by themselves."""
    default = default_config(search.model_type)
    arguments = with_default_layers(search.model_type, search.arguments)
    try:
        model = build(search.model_type, arguments)
        stack = proofs.innermost_stack(model)
        ids, mask = pad("right")
        error = Case(stack, mask, False, input_ids=ids).error(model, stack, observed(model, calls=search.calls))
    except Unbuildable as reason:
        search.log(f"{arguments}, with layers as by default: not built: {str(reason)[:150]}")
    except Refused as reason:
        raise Refused(f"with layers as by default: {reason}") from reason
    else:
        search.log(f"with layers as by default, {stack.config.num_hidden_layers} of them, it differs by {error:.2g}")
        if not error < DEEP_TOLERANCE:
            raise Refused(f"folded, with layers as by default, it differs by {error:.2g} of its size")
    for name, value in proofs.leaves(default):
        known = proofs.is_proven(name, value, proof) or {name: value} in search.unbuilt
        if not known and search.model_type not in NOT_BY_DEFAULT:
            raise Refused(f"by its default config: config.{name} is {value!r}, which did not fold or was not at work")
