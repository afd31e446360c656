"""Compare a small transformers model that `radix_ops.hf.enable` folds with the same model as it was."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from radix_ops import hf
from radix_ops.hf import proofs
from radix_ops.hf.proofs import Proof

# Sums in another order differ by a few 1e-6 here; a token that attends to a wrong one makes 1e-2 and more.
TOLERANCE = 1e-4
# A position where scales by position are at work; there float32 makes angles of rotation less exact.
FAR = 1500
FAR_TOLERANCE = 2e-3
# Shared prefixes, one inside another, a duplicate, a strict prefix, a stranger and a single token.
SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13],
    [5, 6, 7, 8, 9, 10, 11, 14],
    [5, 6, 7, 8, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
    [5, 6, 7, 8, 9, 10, 11, 12, 13],
    [5, 6, 7],
    [40, 41],
    [50],
]
OTHERS = [[5, 6, 7, 30, 31, 32], [5, 6, 7, 30, 33], [5, 6, 7, 30, 31, 32, 34]]
SIDES = ("right", "left", "both")


class Refused(Exception):
    """The type, or the config at hand, doesn't fold; says why."""


class NotEnabled(Refused):
    """`enable` itself refuses the config, whatever is proven."""


class Unbuildable(Exception):
    """The model as it is can't be made or run with the config at hand."""


def config_of(model_type: str, arguments: dict[str, Any], attention: str = "eager"):
    config = CONFIG_MAPPING[model_type](**arguments)
    config._attn_implementation = attention
    config._experts_implementation = "eager" if attention == "eager" else None
    return config


def build(model_type: str, arguments: dict[str, Any], attention: str = "eager", head: str = "CausalLM"):
    """Build a model of the type in fp32, for evaluation, whose attention is not even. Raises Unbuildable."""
    torch.manual_seed(0)
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if head != "CausalLM":
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", head).upper()
        mapping = getattr(modeling_auto, f"MODEL_FOR_{words}_MAPPING")
    try:
        config = config_of(model_type, arguments, attention)
        model = mapping[type(config)](config).float().eval()
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.nan_to_num_(0, 0, 0)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(noise, alpha=0.1)
    return model


def pad(side: str, sequences: list[list[int]] = SEQUENCES) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences)) + 2 * (side == "both")
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = {"left": width - len(sequence), "right": 0, "both": 1}[side]
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


def classes_of(model: PreTrainedModel) -> list[str]:
    """Return the classes of the modules in and around the stack that aren't torch's own, token by token."""
    classes = {proofs.class_of(module) for module in model.modules() if module is not model}
    return sorted(proofs.path_of(cls) for cls in classes if not proofs.is_tokenwise(cls))


def observed(model: PreTrainedModel, positions: str = "tokens", packing: bool = True, calls: int = 1) -> Proof:
    """Return a proof that holds for this model's classes and config alone."""
    stack = proofs.innermost_stack(model)
    values: dict[str, set] = {}
    for name, value in proofs.leaves(stack.config):
        values.setdefault(name, set()).add(proofs.kind_of(value))
    return Proof(
        module=type(stack).__module__,
        stack=type(stack).__name__,
        classes=classes_of(model),
        values={name: list(kinds) for name, kinds in values.items()},
        layer_types=sorted(set(proofs.layer_types_of(stack.config))),
        calls=calls,
        positions=positions,
        packing=packing,
        heads=[type(model).__name__],
        head_on_rows=True,
    )


@contextlib.contextmanager
def allowed(model_type: str, proof: Proof) -> Iterator[None]:
    """Put the type's proof in place of the list that radix_ops.hf goes by."""
    listed = proofs.proofs
    proofs.proofs = lambda: ({model_type: proof}, {})
    try:
        yield
    finally:
        proofs.proofs = listed


@contextlib.contextmanager
def folding(model: PreTrainedModel, proof: Proof, folds: bool | None = True) -> Iterator[None]:
    """Enable the model; every batch has to be folded: rows computed < tokens. Raises Refused with enable's reason.

    With `folds` None a batch may run as it came, too.
    """
    model_type = model.config.model_type
    with allowed(model_type, proof), warnings.catch_warnings():
        warnings.filterwarnings("error" if folds else "ignore", message="radix_ops:")
        try:
            hf.enable(model, threshold=1.0, verify="never")
        except ValueError as error:
            raise NotEnabled(str(error).partition(" can't be folded: ")[2] or str(error)) from error
        try:
            yield
            stats = model.radix_stats
            if folds and (stats.skipped or not stats.folded):
                raise Refused("a batch was not folded")
            if folds and stats.rows >= stats.tokens:
                raise Refused("nothing was shared")
        except UserWarning as warning:
            raise Refused(str(warning).removeprefix("radix_ops: ")) from warning
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Refused(_in_words(str(error))) from error
        finally:
            hf.disable(model)


def _in_words(error: str) -> str:
    """Say in a user's words what an error of the folded attention means."""
    called = re.search(r"called the folded attention (\d+) times and not (\d+)", error)
    if called and called[1] == "0":
        return "its attention does not go through transformers' attention interface"
    if called:
        return f"its attention is called {called[1]} times and not {called[2]}"
    if "was given a mask" in error:
        return "it makes attention masks of its own"
    if "which it does not know" in error:
        needed = error.split("was given ")[1].split(",")[0]
        return f"its attention needs {needed}, which the folded attention can't apply"
    if "can't be chosen by name" in error:
        return "its layers don't pass on keyword arguments, by which the batch travels"
    return f"folded, it fails: {' '.join(error.split())[:160]}"


def difference(got: Tensor, want: Tensor, least: float = 1e-6) -> float:
    """Return the largest difference relative to the largest wanted; infinite where something is not finite."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach(), want.detach()
    found = float((got - want).abs().max() / want.abs().max().clamp(min=least))
    return found if found == found else float("inf")


def gradients(model: torch.nn.Module, total: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, parameters.values(), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def gradient_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest difference of gradients. Small ones, of sums that cancel, count relative to the largest."""
    largest = max(float(g.abs().max()) for g in want.values() if g.numel())
    return max(difference(got[name], g, 1e-2 * largest) for name, g in want.items())


def total_of(states: Tensor) -> Tensor:
    weight = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1))
    return (states @ weight).tanh().sum()


class Case:
    """A batch, and the plain model's hidden states at real positions and, if wanted, gradients."""

    def __init__(self, stack: PreTrainedModel, mask: Tensor | None, with_gradients: bool, **given):
        self.mask, self.given = mask, given | ({} if mask is None else {"attention_mask": mask})
        try:
            states = self.states(stack)
            self.want = states.detach()
            self.gradients = gradients(stack, total_of(states)) if with_gradients else None
        except Exception as error:
            raise Unbuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        if not self.want.isfinite().all():
            raise Unbuildable("its hidden states are not finite")

    def states(self, stack: PreTrainedModel) -> Tensor:
        with torch.set_grad_enabled(True):
            states = stack(**{"use_cache": False, "return_dict": True} | self.given).last_hidden_state
        return states.flatten(0, 1) if self.mask is None else states[self.mask.bool()]

    def error(self, model: PreTrainedModel, stack: PreTrainedModel, proof: Proof) -> float:
        """Return the enabled model's largest error of hidden states and gradients."""
        with folding(model, proof):
            states = self.states(stack)
        found = difference(states, self.want)
        if self.gradients is not None and found < TOLERANCE:
            found = max(found, gradient_difference(gradients(stack, total_of(states)), self.gradients))
        return found


def padded_cases(stack: PreTrainedModel, with_gradients: bool) -> dict[str, Case]:
    cases = {}
    for side in SIDES:
        ids, mask = pad(side)
        cases[side] = Case(stack, mask, with_gradients, input_ids=ids)
    return cases


def positions_that_fit(model: PreTrainedModel, calls: int, with_gradients: bool = True) -> set[str]:
    """Find from where left-padded rows may count: "tokens", "columns" or both. Raises Refused if folding is wrong."""
    stack = proofs.innermost_stack(model)
    cases = padded_cases(stack, with_gradients)
    error = cases["right"].error(model, stack, observed(model, calls=calls))
    if not error < TOLERANCE:
        raise Refused(f"folded, it differs by {error:.2g} of its size")
    fits = set()
    for positions in ("tokens", "columns"):
        proof = observed(model, positions, calls=calls)
        if all(cases[side].error(model, stack, proof) < TOLERANCE for side in ("left", "both")):
            fits.add(positions)
    if not fits:
        raise Refused("its left-padded rows have positions of their own")
    return fits


def depends_on_place(model: PreTrainedModel) -> bool:
    """Return whether the plain model's outputs change where all positions are FAR from the start."""
    stack = proofs.innermost_stack(model)
    ids = torch.tensor([SEQUENCES[2]])
    near = torch.arange(ids.shape[1])[None]
    try:
        near, far = (Case(stack, None, False, input_ids=ids, position_ids=x).want for x in (near, near + FAR))
    except Unbuildable:  # the type has no such argument
        return False
    return difference(far, near) > FAR_TOLERANCE


def long_rows_differ(model: PreTrainedModel, proof: Proof) -> float:
    """Return how much a folded batch of FAR tokens differs."""
    stack = proofs.innermost_stack(model)
    ids = torch.randint(5, 40, (2, FAR), generator=torch.Generator().manual_seed(2))
    ids[1, : FAR // 2] = ids[0, : FAR // 2]
    return Case(stack, None, False, input_ids=ids).error(model, stack, proof)


def given_positions_fit(model: PreTrainedModel, proof: Proof) -> bool:
    """Return whether position_ids of padded rows are taken as they come."""
    stack = proofs.innermost_stack(model)
    ids, mask = pad("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        case = Case(stack, mask, False, input_ids=ids, position_ids=positions)
    except Unbuildable:  # the type has no such argument
        return True
    return case.error(model, stack, proof) < TOLERANCE


def packing_that_fits(model: PreTrainedModel, positions: str, calls: int) -> bool:
    """Return whether a row of several sequences, by their positions, is seen as that. Raises Refused if unclear."""
    stack = proofs.innermost_stack(model)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 8, 9], [5, 6, 7, 8, 5, 6, 7, 9]])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]])
    same = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    try:
        cases = [Case(stack, None, True, input_ids=ids, position_ids=packed)]
        cases.append(Case(stack, None, False, input_ids=ids, position_ids=same))
        # A cache that the config alone asks for hides packing.
        cases.append(Case(stack, None, False, input_ids=ids, position_ids=packed, use_cache=None))
    except Unbuildable:  # the type has no such argument
        return False
    for packing in (True, False):
        proof = observed(model, positions, packing, calls)
        try:
            if all(case.error(model, stack, proof) < TOLERANCE for case in cases):
                return packing
        except Refused as reason:
            if str(reason) != "nothing was shared":
                raise
    raise Refused("it tells packed rows apart in a way of its own")


def check_checkpointing(model: PreTrainedModel, proof: Proof) -> None:
    """Check two forwards in training, both alive before one backward that computes their layers again."""
    stack = proofs.innermost_stack(model)
    batches = [pad("right"), pad("left", OTHERS)]

    def run() -> tuple[list[Tensor], Tensor]:
        outputs = [
            stack(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
            for ids, mask in batches
        ]
        return outputs, sum(map(total_of, outputs))

    model.train()
    want, total = run()
    again, _ = run()
    if any(difference(one, other) > TOLERANCE for one, other in zip(again, want, strict=True)):
        raise Refused("its training is random, whatever its config says")
    wanted = gradients(stack, total)
    try:
        stack.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:  # the type has none
        model.eval()
        return
    try:
        with folding(model, proof):
            got, total = run()
        error = max(difference(one, other) for one, other in zip(got, want, strict=True))
        found = gradients(stack, total)
    except torch.utils.checkpoint.CheckpointError as reason:
        raise Refused("with gradient checkpointing its layers compute something else the second time") from reason
    finally:
        stack.gradient_checkpointing_disable()
        model.eval()
    error = max(error, gradient_difference(found, wanted))
    if not error < TOLERANCE:
        raise Refused(f"folded with gradient checkpointing, it differs by {error:.2g} of its size")
