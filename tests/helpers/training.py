"""Both roads to folded batches as modules, and plain transformers as the oracle, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.hf_models import SIZES, pad
from radix_ops import FoldedBatch, hf
from radix_ops.losses import token_logprobs
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from radix_ops.trainers import loss_on_rows

Sequences = list[list[int]]
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def plain_model(seed: int = 1, **changes) -> transformers.Qwen3ForCausalLM:
    """Return transformers' Qwen3, tiny and with peaked attention; equal arguments give equal weights."""
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SIZES, **WINDOWS, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        is_norm = parameter.dim() == 1
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + is_norm
    return model.train()


def labels_of(sequences: Sequences) -> Tensor:
    """Return labels [N]: the first half of a sequence, its prompt, has no targets, nor has one that starts with 59."""
    return torch.tensor(
        [t if 2 * i >= len(s) and s[0] != 59 else -100 for s in sequences for i, t in enumerate(s)], dtype=torch.int64
    )


def num_targets(batches: Sequence[Sequences]) -> int:
    # The first token of a sequence is no target.
    return sum(int((labels_of([s])[1:] != -100).sum()) for sequences in batches for s in sequences if s)


def plain_logprobs(model, sequences: Sequences) -> Tensor:
    """Return log-probabilities [N], each sequence computed without padding, mask or neighbours."""
    found = []
    for sequence in sequences:
        logits = model(torch.tensor([sequence], device=model.device), use_cache=False).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels_of([sequence])[1:].to(model.device)
        found.append(F.pad(-F.cross_entropy(logits, labels, reduction="none"), (1, 0)))
    return torch.cat(found)


class Ours(nn.Module):
    """radix_ops' own Qwen3. The head's weight is used inside forward, where fully_shard has it gathered."""

    def __init__(self, **changes):
        super().__init__()
        plain = plain_model(**changes)
        self.model = Qwen3ForCausalLM(Qwen3Config.from_dict(plain.config.to_dict()))
        self.model.load_state_dict(plain.state_dict())

    @staticmethod
    def inputs(sequences: Sequences, device: torch.device | str = "cpu") -> tuple:
        return FoldedBatch.from_sequences(sequences, device=device), labels_of(sequences).to(device)

    def forward(self, batch: FoldedBatch, labels: Tensor) -> Tensor:
        return token_logprobs(self.model.model(batch), batch, labels, weight=self.model.lm_head.weight)


class Theirs(nn.Module):
    """transformers' Qwen3, enabled; its padded states are folded again, so that the head runs on rows."""

    def __init__(self, **changes):
        super().__init__()
        self.model = hf.enable(plain_model(**changes), threshold=1.0, verify="never")

    @staticmethod
    def inputs(sequences: Sequences, device: torch.device | str = "cpu") -> tuple:
        # transformers takes no batch of size 0, but one of padding alone.
        ids, mask = pad(sequences or [[]], "left")
        return ids.to(device), mask.to(device), labels_of(sequences).to(device)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        batch = FoldedBatch.from_padded(ids, mask)
        states = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = batch.fold(states[mask.bool()])
        return token_logprobs(hidden, batch, labels, weight=self.model.lm_head.weight)


class TheirLoss(Theirs):
    """The same, called with labels as transformers' Trainer does, whose loss comes from rows."""

    @staticmethod
    def inputs(sequences: Sequences, device: torch.device | str = "cpu") -> tuple:
        ids, mask, packed = Theirs.inputs(sequences)
        labels = torch.full_like(ids, -100).masked_scatter(mask.bool(), packed)
        return ids.to(device), mask.to(device), labels.to(device)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with loss_on_rows():
            outputs = self.model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=1)
        assert outputs.logits is None
        return -outputs.loss


ROADS = {"ours": Ours, "hf": Theirs, "hf with labels": TheirLoss}
