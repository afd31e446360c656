"""The forwards that stand in for a model's and its decoder stack's while `radix_ops.hf` has it enabled."""

from __future__ import annotations

import contextvars
import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._attention import Layout
from ..batch import HoleError
from . import cache, guards, heads, loss, proofs, verify
from .calls import HOLES, Obstacle, makes_cache, may_return_cache, obstacle_of, size_of
from .fold import HARMLESS_ARGUMENTS, PaddedBatch, run_rows, unfold_output, wants_hidden_states
from .loss import RowLoss
from .modes import READ, read_arguments
from .payoff import may_pay, pays_for
from .replays import Plan, Replays
from .stats import RadixStats

Verify: TypeAlias = Literal["first", "always", "never"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


_MASKED_READ = (
    "labels, pooling or logits_to_keep read a masked position; set labels to -100 at padding, as collators do, and let "
    "padding stand on the side that pooling and logits_to_keep leave out"
)


@dataclasses.dataclass(frozen=True)
class Options:
    threshold: float | None = None
    layout: Layout = "auto"
    verify: Verify = "first"
    cuda_graphs: bool = True


# Functions that a decorated one calls may still be compiled, graph by graph.
_outside_compiled_code = torch.compiler.disable(
    recursive=False,
    reason="radix_ops.hf.enable looks at each batch before it runs, outside of compiled code: compile with "
    "fullgraph=False, export with strict=False, or call radix_ops.hf.disable(model) before",
)


class _Forward:
    """Stands in for a module's forward. An object and not a closure, so that it copies and pickles with the module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.previous = vars(module).get("forward")

    @property
    def __wrapped__(self):
        """The forward that stood here before, where inspect.signature finds the arguments."""
        return self.previous or types.MethodType(type(self.module).forward, self.module)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        # An exported program is the plain model's. Strict export would trace the way through here, so it goes on and
        # fails with the reason above.
        is_exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        return self.__wrapped__(*args, **kwargs) if is_exported else self._call(*args, **kwargs)

    def restore(self) -> None:
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous


@dataclasses.dataclass
class _Request:
    """The wishes of the model around a stack in one call."""

    state: StackForward
    obstacle: Obstacle | None = None
    may_leave_rows: Callable[[], bool] = lambda: False  # whether a folded batch's hidden states may stay in rows
    row_loss: RowLoss | None = None  # in place of the head's forward, where its loss is wanted and no logits
    padded: PaddedBatch | None = None  # the batch, where its hidden states were left in rows

    def leave_rows(self, padded: PaddedBatch) -> None:
        self.padded = padded
        if self.row_loss is not None:
            self.row_loss.padded = padded

    def unfold(self, outputs):
        """Return outputs of a head that ran on rows in the padded layout."""
        if self.padded is not None and outputs.get("logits") is not None:
            outputs.logits = self.padded.unfold(outputs.logits)
        return outputs


# Handed from the forward of a model to that of its stack, further in; gradient checkpointing computes neither again.
_requested: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("radix_request", default=None)
# Set by a caller around the model: an obstacle of its own, and whether the batch was made to be folded.
obstacle_outside: contextvars.ContextVar[Obstacle | None] = contextvars.ContextVar("radix_obstacle", default=None)
must_fold: contextvars.ContextVar[bool] = contextvars.ContextVar("radix_must_fold", default=False)


class Unfolded(Exception):
    """A batch that was made to be folded can't be. It did not run: as it stands it may be too large for that."""


class _HeadForward(_Forward):
    """Looks at what the head will read: forbids to fold the batch, or lets it leave its hidden states in rows."""

    def __init__(self, module: nn.Module, state: StackForward):
        super().__init__(module)
        self.state = state

    def __call__(self, *args, **kwargs):
        if args and args[0] is self.module:  # accelerate's unwrap_model binds what it unwraps
            args = args[1:]
        return super().__call__(*args, **kwargs)

    @_outside_compiled_code
    def _call(self, *args, **kwargs):
        request = self._request(args, kwargs)
        token = _requested.set(request)
        try:
            outputs = (request.row_loss or self.__wrapped__)(*args, **kwargs)
        finally:
            _requested.reset(token)
        return request.unfold(outputs)

    @torch.compiler.disable
    def _request(self, args, kwargs) -> _Request:
        head, state = self.module, self.state
        arguments = heads.bind(proofs.class_of(head).forward, head, *args, **kwargs)
        cache.make_pending(arguments)
        obstacle = None
        if heads.head_reads_padding(head, arguments):
            obstacle = Obstacle(_MASKED_READ)
        if self.previous is not None:
            return _Request(state, obstacle)
        if loss.applies(head, state.module, arguments):
            return _Request(state, obstacle, lambda: True, loss.RowLoss(head))
        return _Request(state, obstacle, lambda: heads.may_run_on_rows(head, state.module, arguments))


@dataclasses.dataclass
class _Folded:
    """A batch that runs in rows."""

    padded: PaddedBatch
    plan: Plan | None  # where the host matters
    outputs: ModelOutput | None = None  # in rows, where a graph has made them


class StackForward(_Forward):
    """Folds a batch where that is right and pays; keeps what belongs to the enabled model."""

    module: PreTrainedModel

    def __init__(self, stack: PreTrainedModel):
        super().__init__(stack)
        self.options = Options()
        self.verified: tuple[int, int] | None = None  # the config's version, and how many of its windows were at work
        self.stats = RadixStats()
        self.owners: list[PreTrainedModel] = []  # the modules whose forwards are ours, but for the stack
        self.warned: set[str] = set()
        self.replays = Replays()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"replays": Replays()} | state)  # pickles may be older than graphs

    @_outside_compiled_code
    def _call(self, *args, **kwargs):
        outputs = self._folded(args, kwargs)
        return self.__wrapped__(*args, **kwargs) if outputs is None else outputs

    @torch.compiler.disable
    def _folded(self, args, kwargs):
        """Return the output of a batch that is folded, None for one that runs as before."""
        stack = self.module
        arguments = heads.bind(proofs.class_of(stack).forward, stack, *args, **kwargs)
        cache.make_pending(arguments)
        request = _requested.get()
        if request is None or request.state is not self:
            request = _Request(self)
        found = self._fold(arguments, request.obstacle)
        if isinstance(found, _Folded):
            return self._run(arguments, found, request)
        if not found.is_silent:
            self._warn(f"a batch runs unfolded because {found.reason}")
        if must_fold.get():
            raise Unfolded
        self.stats._add(*size_of(arguments), found.reason.partition("; ")[0], found.sharing)
        return None

    def _fold(self, arguments: dict[str, Any], obstacle: Obstacle | None) -> _Folded | Obstacle:
        """Return the batch in rows, or the reason why it runs as before."""
        stack, threshold = self.module, self.options.threshold
        obstacle = obstacle or obstacle_outside.get() or obstacle_of(stack, arguments)
        if obstacle is not None:
            return obstacle
        input_ids: Any
        input_ids, mask, positions = (arguments.get(name) for name in READ)
        if threshold == 0:
            return Obstacle("threshold is 0", is_silent=True)
        has_graphs = self.options.cuda_graphs and not wants_hidden_states(stack, arguments)
        if not may_pay(input_ids.numel(), threshold, stack, input_ids.device) and not (
            has_graphs and self.replays.may_pay(stack, input_ids)
        ):
            return Obstacle("it is too small for folding to pay", is_silent=True)
        proof = proofs.proof_of(stack)
        if positions is None and proof.positions == "columns":
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        sees_packing = proof.packing and not makes_cache(stack, arguments)
        try:
            padded = PaddedBatch.fold(input_ids, mask, positions, sees_packing=sees_packing)
        except HoleError:
            return HOLES
        plan = self.replays.plan(stack, padded.batch, self.options.layout, may_replay=has_graphs)
        if not pays_for(padded, threshold, stack) and not (
            threshold is None and plan is not None and self.replays.pays(stack, plan, input_ids.numel())
        ):
            sharing = padded.batch.num_tokens, padded.batch.num_rows
            reason = "its sequences share too little for folding to pay"
            if threshold is not None:
                reason = f"its rows are more than threshold={threshold:g} of its tokens"
            return Obstacle(reason, is_silent=True, sharing=sharing)
        outputs = None if plan is None else self.replays.replay(plan)
        # Last, since it looks at every module, while the GPU may be busy.
        return self._obstacle_inside() or _Folded(padded, plan, outputs)

    def _obstacle_inside(self) -> Obstacle | None:
        """Return what in the model, as it is at this moment, forbids to fold, or None."""
        stack = self.module
        for reason, remedy in (
            (guards.why_unfoldable(stack), "put back what was there when the model was enabled"),
            (guards.why_disturbed(stack), "without that batches fold"),
        ):
            if reason is not None:
                return Obstacle(f"{reason}; {remedy}")
        return self._obstacle_around()

    def _obstacle_around(self) -> Obstacle | None:
        """Return what is wrong with the models around the stack, or None: quantised weights, forwards not ours."""
        for owner in self.owners:
            reason = guards.why_quantised(owner)
            if reason is not None:
                return Obstacle(reason)
            if owner is self.module or _leads_to_ours(forward := vars(owner).get("forward")):
                continue
            if not _is_of_trl(forward):
                return Obstacle(f"the forward of {type(owner).__name__} was replaced after enable; enable it again")
            owner.forward = _HeadForward(owner, self)
            return Obstacle("TRL's forward of the model is seen from the next call on", is_silent=True)
        return None

    def _run(self, arguments: dict[str, Any], folded: _Folded, request: _Request):
        """Return the stack's output for a batch that is folded, verified where that is due."""
        stack, padded, plan = self.module, folded.padded, folded.plan
        outputs = folded.outputs
        scope = guards.config_version(stack), _windows_at_work(stack.config, padded.batch.max_seqlen_k)
        plain = self._plain_states(arguments, scope)
        if outputs is None and plan is not None:
            outputs = self.replays.run(plan)
        is_replayed = outputs is not None and self.replays.has(plan)
        if outputs is None:
            further = {name: arguments[name] for name in HARMLESS_ARGUMENTS & arguments.keys()}
            num_rows = padded.batch.num_rows if plan is None else plan.sizes.rows
            outputs = run_rows(stack, padded.batch, further, self.options.layout, num_rows)
        if may_return_cache(stack, arguments):
            outputs = cache.add_pending(outputs, stack, arguments, padded, self.stats, self.warned)
        leaves_rows = request.may_leave_rows()
        outputs = unfold_output(outputs, padded, leaves_rows=leaves_rows)
        if plain is not None:
            self._check(outputs[0], plain, padded, leaves_rows)
            self.verified = scope
        if leaves_rows:
            request.leave_rows(padded)
        counts = padded.batch.num_tokens, padded.batch.num_rows
        self.stats._add(*counts, sharing=counts, is_replayed=is_replayed)
        self.stats.no_graphs = self.replays.off
        wants_dict = arguments.get("return_dict", getattr(stack.config, "return_dict", True))
        return outputs.to_tuple() if wants_dict is False else outputs

    def _plain_states(self, arguments: dict[str, Any], scope: tuple[int, int]) -> Tensor | None:
        """Return what the plain model makes of the batch, or None where that isn't compared.

        "first" compares the first batch of a config, and the first that is longer than a window of it.
        """
        when = self.options.verify
        is_verified = self.verified is not None and self.verified[0] == scope[0] and self.verified[1] >= scope[1]
        if when == "never" or (when == "first" and is_verified):
            return None
        if guards.has_several_processes():
            self._warn(
                "folded batches are not verified where torch.distributed runs several processes, since a forward more "
                'on one of them could wait for the others; verify="never" says so in advance'
            )
            return None
        given = read_arguments(arguments) | {"use_cache": makes_cache(self.module, arguments)}
        return verify.plain_states(self.__wrapped__, given)

    def _check(self, states: Tensor, plain: Tensor, padded: PaddedBatch, are_rows: bool) -> None:
        with torch.no_grad():
            states = padded.unfold(states) if are_rows else states
        reason = verify.difference(states, plain, padded.is_real(), verify.is_exact(self.module))
        if reason is not None:
            self.remove()
            raise RuntimeError(
                f"folding is wrong for this {type(self.module).__name__}: {reason}. The model is as it was before "
                "enable; please report its config"
            )

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"radix_ops: {text}", stacklevel=2)

    def is_owner(self, model: PreTrainedModel) -> bool:
        return any(owner is model for owner in self.owners)

    def add_owner(self, model: PreTrainedModel) -> None:
        if not self.is_owner(model):
            self.owners.append(model)
        model.radix_stats = self.stats
        if model is not self.module and not _leads_to_ours(vars(model).get("forward")):
            model.forward = _HeadForward(model, self)

    def remove_owner(self, model: PreTrainedModel) -> None:
        self.owners = [owner for owner in self.owners if owner is not model]
        del model.radix_stats
        forward = _function_of(model)
        if model is not self.module and isinstance(forward, _Forward):
            forward.restore()

    def remove(self) -> None:
        for owner in list(self.owners):
            self.remove_owner(owner)
        self.replays.clear()
        self.restore()

    def check_in_place(self) -> None:
        for owner in self.owners:
            forward = _function_of(owner)
            is_its_own = forward is None or forward is type(owner).forward
            if not is_its_own and not isinstance(forward, _Forward):
                raise RuntimeError(
                    f"the forward of {type(owner).__name__} was replaced after enable; undo that before disable"
                )


def _function_of(model: nn.Module):
    """Return what stands in for the forward of its class, without the model that it may be bound to, or None."""
    forward = vars(model).get("forward")
    return getattr(forward, "__func__", forward)


def _leads_to_ours(forward) -> bool:
    """Return whether it is a forward of ours, or says that it wraps one."""
    return any(isinstance(inner, _Forward) for inner in _chain(forward))


def _is_of_trl(forward) -> bool:
    """Return whether it is the forward of TRL's add_fused_lm_head, or says that it wraps it.

    TRL's calls the stack itself, and reads hidden states where the next token has a label.
    """
    return any(getattr(inner, "__globals__", {}).get("__name__") == "trl.trainer.utils" for inner in _chain(forward))


def _chain(forward) -> Iterator[Any]:
    """Yield a forward and what it says that it wraps, further and further in; of methods the function."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _windows_at_work(config, longest: int) -> int:
    """Return how many of the config's windows are shorter than the longest sequence of a batch."""
    windows = (getattr(config, name, None) for name in proofs.WINDOWS)
    return sum(isinstance(window, int) and window < longest for window in windows)
