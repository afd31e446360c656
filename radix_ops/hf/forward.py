"""The forwards that stand in for a model's and its decoder stack's while `radix_ops.hf` has it enabled."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import cache, guards, heads, loss, proofs, verify
from .calls import makes_cache, may_return_cache, obstacle_of, size_of
from .fold import HARMLESS_ARGUMENTS, PaddedBatch, run_folded
from .loss import RowLoss
from .stats import RadixStats

# Measured on a CPU with Llama layers 576 wide, 1 to 64 sequences of 16 to 4096 tokens, forward and backward: at equal
# rows folding takes up to 1.05 times as long as the plain model, at 0.93 of the rows it is never slower.
_MAX_ROWS_SHARE = 0.95
# What folding saves must outweigh what it costs the host: (e, least) for positions saved times hidden_size ** e. On a
# CPU time goes with the layers' products. On a GPU it went with hidden_size, from 1024 to 4096, and batches too small
# to fill it gain nothing (benchmarks/bench_hf.py).
_LEAST_SAVED = {"cpu": (2, 2.5e6), "cuda": (1, 6.5e6)}
VERIFY = ("first", "always", "never")


@dataclasses.dataclass(frozen=True)
class Options:
    threshold: float | None = None
    layout: str = "auto"
    verify: str = "first"


# What it calls may be compiled, graph by graph.
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

    def __call__(self, *args, **kwargs):
        # An exported program is the plain model's. Strict export would name what it finds by the way through here.
        is_exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        return self.__wrapped__(*args, **kwargs) if is_exported else self._call(*args, **kwargs)

    def restore(self) -> None:
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous


@dataclasses.dataclass
class _Request:
    """What the model around a stack asks of it in one call."""

    state: StackForward
    obstacle: str | None  # to folding
    may_leave_rows: Callable[[], bool] = lambda: False  # whether a folded batch's hidden states may stay in rows
    row_loss: RowLoss | None = None  # in place of the head's forward, where its loss is wanted and no logits
    padded: PaddedBatch | None = None  # the batch, where its hidden states were left in rows

    def leave_rows(self, padded: PaddedBatch) -> None:
        self.padded = padded
        if self.row_loss is not None:
            self.row_loss.padded = padded

    def unfold(self, outputs):
        """Outputs of a head that ran on rows, in the padded layout."""
        if self.padded is not None and outputs.get("logits") is not None:
            outputs.logits = self.padded.unfold(outputs.logits)
        return outputs


# From the forward of a model to that of its stack, further in; neither is computed again by gradient checkpointing.
_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("radix_request", default=None)
# From a caller around the model: what of his own forbids to fold a batch, and whether it was made to be folded.
obstacle_outside: contextvars.ContextVar[str | None] = contextvars.ContextVar("radix_obstacle", default=None)
must_fold: contextvars.ContextVar[bool] = contextvars.ContextVar("radix_must_fold", default=False)


class Unfolded(Exception):
    """A batch that was made to be folded can't be. It did not run: as it stands it may be too large for that."""


class _HeadForward(_Forward):
    """Looks at what the head will read: says of a batch not to fold it, or to leave its hidden states in rows."""

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
        token = _request.set(request)
        try:
            outputs = (request.row_loss or self.__wrapped__)(*args, **kwargs)
        finally:
            _request.reset(token)
        return request.unfold(outputs)

    @torch.compiler.disable
    def _request(self, args, kwargs) -> _Request:
        head, state = self.module, self.state
        arguments = heads.bind(proofs.class_of(head).forward, head, *args, **kwargs)
        cache.make_pending(arguments)
        obstacle = None
        if heads.head_reads_padding(head, arguments):
            obstacle = "labels, pooling or logits_to_keep read a masked position"
        if self.previous is not None:
            return _Request(state, obstacle)
        if loss.applies(head, state.module, arguments):
            return _Request(state, obstacle, lambda: True, loss.RowLoss(head))
        return _Request(state, obstacle, lambda: heads.may_run_on_rows(head, state.module, arguments))


class StackForward(_Forward):
    """Folds a batch where that is right and pays; keeps what belongs to the enabled model."""

    def __init__(self, stack: PreTrainedModel):
        super().__init__(stack)
        self.options = Options()
        self.verified: tuple[int, int] | None = None  # the config's version, and how many of its windows were at work
        self.stats = RadixStats()
        self.owners: list[PreTrainedModel] = []  # the modules whose forwards are ours, but for the stack
        self.warned: set[str] = set()

    @_outside_compiled_code
    def _call(self, *args, **kwargs):
        outputs = self._folded(args, kwargs)
        return self.__wrapped__(*args, **kwargs) if outputs is None else outputs

    @torch.compiler.disable
    def _folded(self, args, kwargs):
        """The output of a batch that is folded, None for one that runs as before."""
        stack, options = self.module, self.options
        request = _request.get()
        if request is None or request.state is not self:
            request = _Request(self, None)
        arguments = heads.bind(proofs.class_of(stack).forward, stack, *args, **kwargs)
        cache.make_pending(arguments)
        padded = None
        obstacle = request.obstacle or obstacle_outside.get() or obstacle_of(stack, arguments)
        if obstacle is None and options.threshold != 0:
            input_ids = arguments["input_ids"]
            if _saves_enough(input_ids.numel(), options.threshold, stack, input_ids.device):
                padded = _fold(stack, arguments)
        if padded is not None and not _pays(padded, options.threshold, stack):
            padded = None
        if padded is not None:
            # These look at every module, so they come last.
            obstacle = guards.unfoldable(stack) or guards.interference(stack) or self._changed_head()
            padded = padded if obstacle is None else None
        if obstacle:
            self._warn(f"a batch runs unfolded because {obstacle}")
        if padded is None and must_fold.get():
            raise Unfolded
        if padded is None:
            self.stats._add(*size_of(arguments), folded=False)
            return None
        further = {name: arguments[name] for name in HARMLESS_ARGUMENTS & arguments.keys()}
        calls = proofs.proof_of(stack).calls * stack.config.num_hidden_layers
        scope = guards.config_version(stack), _windows_at_work(stack.config, padded.batch.max_seqlen_k)
        plain = self._plain_states(arguments, scope)
        leaves_rows = request.may_leave_rows()
        amend = None
        if may_return_cache(stack, arguments):
            known = {"stack": stack, "arguments": arguments, "padded": padded}
            amend = functools.partial(cache.add_pending, **known, stats=self.stats, warned=self.warned)
        outputs = run_folded(stack, padded, further, options.layout, calls, leaves_rows, amend)
        if plain is not None:
            self._check(outputs[0], plain, padded, leaves_rows)
            self.verified = scope
        if leaves_rows:
            request.leave_rows(padded)
        self.stats._add(padded.batch.num_tokens, padded.batch.num_rows, folded=True)
        return outputs

    def _plain_states(self, arguments: dict[str, Any], scope: tuple[int, int]) -> Tensor | None:
        """What the plain model makes of the batch, if that is to be compared.

        The first batch, that is, of a config, and of those that are longer than a window of it.
        """
        when = self.options.verify
        is_verified = self.verified is not None and self.verified[0] == scope[0] and self.verified[1] >= scope[1]
        if when == "never" or (when == "first" and is_verified):
            return None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._warn(
                "folded batches are not verified where torch.distributed runs several processes, since a forward more "
                'on one of them could wait for the others; verify="never" says so in advance'
            )
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: arguments[name] for name in names if arguments.get(name) is not None}
        given["use_cache"] = makes_cache(self.module, arguments)
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
            warnings.warn(f"radix_ops: {text}", stacklevel=4)

    def _changed_head(self) -> str | None:
        """Quantised weights, or a model around the stack whose forward is no longer ours, nor calls it.

        Empty for the forward that TRL's trainers put there, which is wrapped here and seen from the next call on.
        """
        for owner in self.owners:
            reason = guards.quantised(owner)
            if reason is not None:
                return reason
            if owner is self.module or _leads_to_ours(forward := vars(owner).get("forward")):
                continue
            if not _is_of_trl(forward):
                return f"the forward of {type(owner).__name__} was replaced after enable; enable it again"
            owner.forward = _HeadForward(owner, self)
            return ""
        return None

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
    """What stands in for its class's forward, without the model that it may be bound to."""
    forward = vars(model).get("forward")
    return getattr(forward, "__func__", forward)


def _leads_to_ours(forward) -> bool:
    """Whether it is a forward of ours, or something that says to wrap one."""
    return any(isinstance(inner, _Forward) for inner in _chain(forward))


def _is_of_trl(forward) -> bool:
    """Whether it is the forward of TRL's add_fused_lm_head, or something that says to wrap it.

    That one calls the stack itself, and reads hidden states where the next token has a label.
    """
    return any(getattr(inner, "__globals__", {}).get("__name__") == "trl.trainer.utils" for inner in _chain(forward))


def _chain(forward) -> Iterator[Any]:
    """A forward and what it says to wrap; of methods the function."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _windows_at_work(config, longest: int) -> int:
    """How many of the config's windows are shorter than the longest sequence of a batch."""
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return sum(isinstance(window, int) and window < longest for window in windows)


def _fold(stack: PreTrainedModel, arguments: dict[str, Any]) -> PaddedBatch:
    proof = proofs.proof_of(stack)
    input_ids, positions = arguments["input_ids"], arguments.get("position_ids")
    if positions is None and proof.positions == "columns":
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    sees_packing = proof.packing and not makes_cache(stack, arguments)
    return PaddedBatch.fold(input_ids, arguments.get("attention_mask"), positions, sees_packing=sees_packing)


def _saves_enough(positions: int, threshold: float | None, stack: PreTrainedModel, device: torch.device) -> bool:
    exponent, least = _LEAST_SAVED[device.type]
    return threshold is not None or positions * stack.config.hidden_size**exponent >= least


def _pays(padded: PaddedBatch, threshold: float | None, stack: PreTrainedModel) -> bool:
    batch, positions = padded.batch, padded.shape.numel()
    return pays(batch.num_rows, batch.num_tokens, positions, threshold, stack, batch.input_ids.device)


def pays(
    num_rows: int,
    num_tokens: int,
    positions: int,
    threshold: float | None,
    stack: PreTrainedModel,
    device: torch.device,
) -> bool:
    """Whether to fold a batch of `num_tokens` real tokens that would run as `positions`, padding included."""
    if num_rows == 0:
        return False
    if threshold is not None:
        return num_rows / num_tokens <= threshold
    return num_rows <= _MAX_ROWS_SHARE * positions and _saves_enough(positions - num_rows, None, stack, device)
