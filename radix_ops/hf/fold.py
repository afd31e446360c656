"""Runs a transformers decoder stack on the rows of a padded batch's prefix trie. For `radix_ops.hf`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .._attention import AttentionPlan, Layout, attend, cast_for_autocast, check_attention, plan_attention
from ..batch import FoldedBatch, fold, fold_padded
from ..graphs.padding import padded_to
from .proofs import class_of, proof_of
from .twins import shallow_copy, twin_of

_ATTENTION_NAME = "radix_ops"
# Further arguments of a stack's forward may reach its layers where they don't change what a row computes.
HARMLESS_ARGUMENTS = frozenset(
    {"output_hidden_states", "return_dict", "num_items_in_batch", "shift_labels", "ignore_index", "token_type_ids"}
)
# Layers pass these on to the attention function, which has no use for them.
_UNUSED_ARGUMENTS = HARMLESS_ARGUMENTS | {
    "position_ids", "cache_position", "use_cache", "output_attentions", "past_key_values", "past_key_value", "cache",
    "head_mask", "position_embeddings",
}  # fmt: skip
_OWN_FEATURES = {"softcap", "s_aux"}  # a cap on scores, and sinks


@dataclasses.dataclass(eq=False)
class PaddedBatch:
    """A padded batch [B, T] as rows, and the way back."""

    batch: FoldedBatch
    shape: torch.Size  # [B, T]
    real: Tensor | None  # [num_tokens] places of packed tokens in the flat padded batch; None without padding

    @classmethod
    def fold(
        cls, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, sees_packing: bool
    ) -> PaddedBatch:
        """Fold input_ids [B, T] under attention_mask [B, T]; position_ids [B, T] or [1, T] count from 0 if left out.

        Raises HoleError for a mask with a hole. On CUDA the host waits once; with `sees_packing` and positions, twice.
        With `sees_packing`, a row without a mask holds several sequences, as transformers has it: one begins wherever
        positions don't go up by 1.
        """
        shape = input_ids.shape
        if position_ids is not None:
            position_ids = position_ids.expand(shape)
        if attention_mask is not None:
            mask = attention_mask.to(device=input_ids.device, dtype=torch.bool)
            batch, places = fold_padded(input_ids, mask, position_ids)
            return cls(batch, shape, None if batch.num_tokens == shape.numel() else places)
        if position_ids is not None and sees_packing:
            is_start = torch.ones(shape, dtype=torch.bool, device=input_ids.device)
            is_start[:, 1:] = position_ids.diff(dim=1) != 1
            cu_seqlens = nn.functional.pad(is_start.flatten().nonzero().flatten(), (0, 1), value=shape.numel())
        else:
            cu_seqlens = torch.arange(0, shape.numel() + 1, shape[1], device=input_ids.device)
        positions = None if position_ids is None else position_ids.flatten()
        return cls(fold(input_ids.flatten(), cu_seqlens, positions), shape, None)

    def is_real(self) -> Tensor:
        """Return the mask [B, T] of its tokens."""
        if self.real is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.batch.input_ids.device)
        flat = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.real.device)
        return flat.index_fill_(0, self.real, True).unflatten(0, self.shape)

    def unfold(self, rows: Tensor) -> Tensor:
        """Return rows [1, num_rows, D] as [B, T, D], with zeros at padding."""
        tokens = self.batch.unfold(rows.squeeze(0))
        if self.real is not None:
            tokens = tokens.new_zeros(self.shape.numel(), tokens.shape[1]).index_copy_(0, self.real, tokens)
        return tokens.unflatten(0, self.shape)


class _FoldedCall:
    """Tells the attention function which batch it computes.

    It travels by keyword argument: a layer that gradient checkpointing computes again gets what it got the first time,
    whatever was called in between. It is no dataclass, of which fully_shard's mixed precision would give layers copies.
    """

    def __init__(self, batch: FoldedBatch, plan: AttentionPlan):
        self.batch, self.plan = batch, plan
        self.attention_calls = 0


def wants_hidden_states(stack: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    wanted = arguments.get("output_hidden_states")
    return bool(getattr(stack.config, "output_hidden_states", False) if wanted is None else wanted)


def run_rows(
    stack: PreTrainedModel, batch: FoldedBatch, further_arguments: Mapping[str, Any], layout: Layout, num_rows: int
) -> ModelOutput:
    """Return the stack's output for a batch in rows: hidden states [1, batch.num_rows, D].

    They are computed on `num_rows` rows, padding behind the batch's included. `further_arguments` are those of
    HARMLESS_ARGUMENTS that were given. Raises RuntimeError unless layers call their attention as often as was proven.
    """
    further = {name: value for name, value in further_arguments.items() if name != "return_dict"}
    if wants_hidden_states(stack, further):
        # The twin shares the hooks of the stack's modules, but not the note that they are there.
        maybe_install_capturing_hooks(stack)
    padded = padded_to(batch, num_rows)
    call = _FoldedCall(padded, plan_attention(padded, layout))
    outputs = class_of(stack).forward(
        _with_our_attention(stack),
        input_ids=padded.input_ids[None],
        position_ids=padded.position_ids[None],
        use_cache=False,
        return_dict=True,
        radix_call=call,
        **further,
    )
    wanted_calls = proof_of(stack).calls * stack.config.num_hidden_layers
    if call.attention_calls != wanted_calls:
        raise RuntimeError(
            f"{type(stack).__name__} called the folded attention {call.attention_calls} times and not {wanted_calls}, "
            "so its output can't be trusted: something replaced its attention after enable"
        )
    if num_rows > batch.num_rows:
        cut = {id(rows): rows[:, : batch.num_rows] for rows in _states_in(outputs)}
        outputs.last_hidden_state = cut[id(outputs.last_hidden_state)]
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = tuple(cut.get(id(rows)) for rows in outputs.hidden_states)
    return outputs


def _states_in(outputs: ModelOutput) -> list[Tensor]:
    """Return the hidden states of an output, which may select some layers' alone."""
    states = (outputs.last_hidden_state, *(outputs.get("hidden_states") or ()))
    return [rows for rows in states if rows is not None]


def unfold_output(outputs: ModelOutput, padded: PaddedBatch, *, leaves_rows: bool = False) -> ModelOutput:
    """Return an output in rows in the batch's padded layout; with `leaves_rows`, last_hidden_state stays in rows."""
    last_rows, hidden_states = outputs.last_hidden_state, outputs.get("hidden_states")
    unfolded: dict[int, Tensor | None] = {id(None): None}
    if not leaves_rows:
        outputs.last_hidden_state = unfolded[id(last_rows)] = padded.unfold(last_rows)
    if hidden_states is not None:
        outputs.hidden_states = tuple(
            unfolded[id(rows)] if id(rows) in unfolded else padded.unfold(rows) for rows in hidden_states
        )
    return outputs


def _with_our_attention(stack: PreTrainedModel) -> nn.Module:
    """Return a twin of the stack, parameters, hooks, flags and all, whose attention is ours.

    The attention function is named by the config, which the model shares with its owner, with other threads and with
    layers that are computed again during backward. So the name changes in copies of the configs, to which twins of the
    modules that hold one lead. No mask function has our name, so no mask is made.
    """
    configs: dict[int, PreTrainedConfig] = {}  # copies, by the identity of the original

    def changes(module: nn.Module) -> dict[str, Any]:
        if type(module).__module__.startswith("torch.nn."):
            return {}  # torch's own modules know no config
        found = {}
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                if id(value) not in configs:
                    configs[id(value)] = shallow_copy(value, _attn_implementation_internal=_ATTENTION_NAME)
                found[name] = configs[id(value)]
        return found

    return twin_of(stack, changes)


def _folded_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, num_rows, D]
    key: Tensor,  # [1, H_kv, num_rows, D]
    value: Tensor,  # [1, H_kv, num_rows, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    radix_call: _FoldedCall | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute ([1, num_rows, H, D], no weights) as transformers' attention interface asks for it."""
    if radix_call is None:
        raise RuntimeError(f"the attention {_ATTENTION_NAME!r} can't be chosen by name; use radix_ops.hf.enable(model)")
    if attention_mask is not None or dropout or is_causal is False:
        raise RuntimeError("the folded attention was given a mask, dropout or is_causal=False, which it has no use for")
    further = {name: value for name, value in kwargs.items() if value is not None and name not in _UNUSED_ARGUMENTS}
    unknown = sorted(further.keys() - _OWN_FEATURES)
    if unknown:
        raise RuntimeError(f"the folded attention was given {unknown[0]}, which it does not know")
    radix_call.attention_calls += 1
    q, k, v = (cast_for_autocast(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
    if further:
        return _own_attention(module, q, k, v, radix_call.batch, scaling, sliding_window, further)[None], None
    check_attention(q, k, v, radix_call.batch, sliding_window)
    return attend(q, k, v, radix_call.batch, radix_call.plan, scaling, sliding_window)[None], None


def _own_attention(module, q, k, v, batch: FoldedBatch, scaling, sliding_window, further: dict[str, Any]) -> Tensor:
    """Compute [num_rows, H, D] by the model's own eager attention on the padded batch, for features it alone has."""
    length = batch.max_seqlen_k
    distance = torch.arange(length, device=q.device)
    distance = distance[:, None] - distance
    hidden = (distance < 0) if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=q.device)
    mask.masked_fill_(hidden, torch.finfo(q.dtype).min)
    forward = sys.modules[class_of(module).__module__].eager_attention_forward
    padded = [batch.to_padded(x).transpose(1, 2) for x in (q, k, v)]
    out, _ = forward(module, *padded, mask, scaling=scaling, dropout=0.0, sliding_window=sliding_window, **further)
    is_real = distance[:, 0] < batch.lengths[:, None]
    rows = batch.fold(out.flatten(0, 1)[is_real.flatten()])
    is_padding = torch.arange(batch.num_rows, device=q.device) >= batch.num_nodes
    return rows.masked_fill(is_padding[:, None, None], 0)


AttentionInterface.register(_ATTENTION_NAME, _folded_attention)
