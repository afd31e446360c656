"""Calls of the public API as users write them, and the types that come back: `make lint` checks that mypy agrees."""

from __future__ import annotations

import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import radix_ops
from radix_ops import FoldedBatch, attention, compat, hf, losses, plan, trainers
from radix_ops.compat.torch import compute_fold_and_scatter_torch
from radix_ops.engine import Embedder, Reranker, Scorer, Template, metrics
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

ids, mask = torch.tensor([[1, 2], [1, 3]]), np.array([[1, 1], [1, 0]])


def batches(tokens: list[list[int]], shard: npt.NDArray[np.uint16], tensors: tuple[Tensor, ...]) -> FoldedBatch:
    """Token ids come as lists, ranges, arrays and tensors, alone or side by side."""
    FoldedBatch.from_sequences(tensors, device="cuda", pad_multiple_of=8)
    FoldedBatch.from_sequences([shard[:3], shard[3:]])
    FoldedBatch.from_sequences(shard.reshape(2, -1))
    FoldedBatch.from_sequences(ids)
    FoldedBatch.from_sequences([[1, 2], range(3), shard, ids[0], array.array("H", [1]), [np.int64(3)], [ids[0, 0]]])
    FoldedBatch.from_padded(ids, mask, device=torch.device("cpu"))
    FoldedBatch.from_padded(ids.numpy(), torch.ones(2, 2), np.arange(4).reshape(2, 2))
    assert_type(radix_ops.pack(shard, np.array([0, 3])), FoldedBatch)
    assert_type(radix_ops.fold(ids[0], torch.tensor([0, 2]), position_ids=None, pad_multiple_of=4), FoldedBatch)
    return assert_type(FoldedBatch.from_sequences(tokens), FoldedBatch)


def maps(batch: FoldedBatch, x: Tensor) -> None:
    assert_type(batch.unfold(x), Tensor)
    assert_type(batch.fold(x), Tensor)
    assert_type(batch.to_padded(x, "left", fill=-100), Tensor)
    assert_type(batch.last_rows, Tensor)
    assert_type(batch.lengths, Tensor)
    assert_type(batch.num_nodes, int)
    assert_type(batch.num_tokens, int)
    assert_type(batch.compact_ratio, float)
    assert_type(batch.to("cuda", non_blocking=True).pin_memory(), FoldedBatch)
    assert_type(attention(x, x, x, batch, scale=0.5, sliding_window=128, layout="trie"), Tensor)


def torch_models(model: nn.Module, batch: FoldedBatch, weight: Tensor) -> None:
    """A model that is enabled keeps its type, so that its methods are still known."""
    qwen = Qwen3ForCausalLM.from_pretrained(Path("folder"), dtype="bfloat16", device="cuda")
    assert_type(qwen, Qwen3ForCausalLM)
    assert_type(Qwen3Model.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.float16), Qwen3Model)
    assert_type(Qwen3Config.from_dict({}), Qwen3Config)
    assert_type(qwen.rerank(batch, yes_id=1, no_id=2, layout="compact"), Tensor)
    assert_type(qwen.embed(batch, dim=256), Tensor)
    sequential = nn.Sequential(model)
    assert_type(hf.enable(sequential, threshold=0.9, layout="compact", verify="always"), nn.Sequential)
    hf.disable(model)
    with hf.folded(sequential) as folded, trainers.loss_on_rows():
        assert_type(folded, nn.Sequential)
    hidden = qwen.model(batch)
    assert_type(losses.token_logprobs(hidden, batch, weight=weight, temperature=2), Tensor)
    assert_type(losses.token_logprobs_and_entropy(hidden, batch, weight=weight), tuple[Tensor, Tensor])
    assert_type(losses.causal_lm_loss(hidden, batch, weight=weight, softcap=30.0), Tensor)
    targets = losses.plan_targets(batch, vocabulary=weight.shape[0])
    assert_type(targets, losses.Targets)
    assert_type(losses.sequence_logprobs(hidden, batch, targets, weight=weight), Tensor)
    assert_type(hf.RadixStats().tokens, int)
    assert_type(hf.RadixStats().reasons, dict[str, int])
    assert_type(hf.RadixStats().tokens_per_row, dict[float, int])


def planned(tokens: list[list[int]]) -> None:
    store = plan.TokenStore.from_sequences(tokens)
    store.append(np.array([1, 2]))
    store.append(range(3))
    store.append(ids[0])
    assert_type(len(store), int)
    assert_type(plan.plan_folded(store, max_rows=4096, max_tokens=None, order="given"), plan.Plan)
    assert_type(plan.plan_padded(store.lengths, max_positions=4096), plan.Plan)


def engines(texts: Iterator[str]) -> None:
    scorer = Scorer("Qwen/Qwen3-0.6B", device="cpu", dtype="bfloat16", layout="auto")
    assert_type(scorer.score([{"context": "a", "choices": ["b"]}], on_progress=print), list[dict[str, Any]])
    asked = Scorer("model", letters=True, chat=True, system="Be brief.", max_length=2048, stride=512)
    assert_type(asked.perplexity(texts), list[dict[str, Any]])
    assert_type(metrics(asked.stream([{"question": "a", "choices": ["b"]}]), calibration=True), dict[str, Any])
    embedder = Embedder(nn.Linear(1, 1), dtype=torch.float32, pooling="mean")
    assert_type(embedder.embed(texts, prompt_name="query"), npt.NDArray[Any])
    assert_type(embedder.find_ranges(texts), npt.NDArray[np.float32])
    assert_type(embedder.pairs(texts, 3), list[tuple[float, int, int]])
    reranker = Reranker(Path("folder"), template=Template("", "<Instruct>: {instruction}", ""))
    assert_type(reranker.rank("query", ["one", {"id": 2, "text": "two"}], top_k=1), list[dict[str, Any]])
    assert_type(reranker.evaluate([{"query": "a", "documents": ["b"]}], {"q": {"d": 1}}), dict[str, float])


def as_radix_mlp(packed: npt.NDArray[np.uint32], tensor: Tensor) -> None:
    rows, positions, scatter, gather = compat.compute_fold_and_scatter(packed, packed, packed, pad_multiple_of=None)
    assert_type(rows, npt.NDArray[np.uint32])
    assert_type(compute_fold_and_scatter_torch(tensor, tensor, tensor), tuple[Tensor, Tensor, Tensor, Tensor])
    del positions, scatter, gather


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Groups of a sampler are whatever can be told apart."""

    def sampler(self, prompts: list[str]) -> trainers.GroupSampler:
        return trainers.GroupSampler(prompts, seed=1)
