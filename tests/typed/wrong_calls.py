"""Calls that are wrong and that mypy reports, each by the code in its comment: one that it misses fails `make lint`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

import radix_ops
from radix_ops import FoldedBatch, attention, hf, losses, plan
from radix_ops.engine import Embedder, Scorer
from radix_ops.models.qwen3 import Qwen3ForCausalLM


def batches(ids: Tensor, waves: npt.NDArray[np.complex64], batch: FoldedBatch) -> None:
    FoldedBatch.from_sequences("12")  # type: ignore[arg-type]
    FoldedBatch.from_sequences(["12"])  # type: ignore[list-item]
    FoldedBatch.from_sequences([1, 2])  # type: ignore[list-item]
    FoldedBatch.from_sequences([[1.5]])  # type: ignore[list-item]
    FoldedBatch.from_sequences([np.zeros(3)])  # type: ignore[list-item]
    FoldedBatch.from_sequences([[1]], "cuda")  # type: ignore[call-arg]
    FoldedBatch.from_padded([[1, 2]], ids)  # type: ignore[arg-type]
    FoldedBatch.from_padded(ids)  # type: ignore[call-arg]
    FoldedBatch.from_padded(ids, waves)  # type: ignore[arg-type]
    radix_ops.fold([1, 2], [0, 2])  # type: ignore[arg-type]
    radix_ops.fold(ids, ids, pad_multiple_of="8")  # type: ignore[arg-type]
    batch.to_padded(ids, "top")  # type: ignore[arg-type]
    batch.num_sequences = 3  # type: ignore[misc]
    batch.unfolded(ids)  # type: ignore[attr-defined]


def models(model: nn.Module, batch: FoldedBatch, x: Tensor) -> None:
    attention(x, x, x, batch, 0.5)  # type: ignore[call-arg]
    attention(x, x, x, batch, layout="packed")  # type: ignore[arg-type]
    attention(x, x, x, [[1, 2]])  # type: ignore[arg-type]
    hf.enable(model, verify="last")  # type: ignore[arg-type]
    hf.enable(model, layout="flash")  # type: ignore[arg-type]
    hf.enable("gpt2")  # type: ignore[type-var]
    Qwen3ForCausalLM.from_pretrained("folder", dtype="int8")  # type: ignore[arg-type]
    losses.token_logprobs(x, batch)  # type: ignore[call-arg]
    losses.causal_lm_loss(x, batch, weight=x, softcap="30")  # type: ignore[arg-type]


def engines(lengths: Tensor, store: plan.TokenStore) -> None:
    plan.plan_folded(store, max_rows=4096, order="longest")  # type: ignore[arg-type]
    plan.plan_padded(lengths, max_positions=1)  # type: ignore[arg-type]
    Scorer("model", dtype="int8")  # type: ignore[arg-type]
    Scorer("model").score(["context"])  # type: ignore[list-item]
    Embedder("model", pooling="sum")  # type: ignore[arg-type]
