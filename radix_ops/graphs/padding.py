"""Pads a batch to more rows, as a graph does."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..batch import FoldedBatch


def padded_to(batch: FoldedBatch, num_rows: int) -> FoldedBatch:
    """Return the batch with nodes of one more run behind its own, up to `num_rows`, in place of padding rows.

    They repeat the first row, which is there: finite where it is, so what a loss gives them, zero, stays zero in
    sums over rows. No sequence has them, and no other row sees them.
    """
    num_nodes, num_keys = batch.num_nodes, batch.kv_index.shape[0]
    count, total = num_rows - num_nodes, num_keys + num_rows - num_nodes
    if count == 0:
        return batch
    longest = max(num_rows, total, batch.num_sequences)
    ramp = torch.arange(longest + 1, dtype=batch.kv_index.dtype, device=batch.kv_index.device)

    def repeated(x: Tensor) -> Tensor:
        return torch.cat([x[:num_nodes], x[0].expand(count)])

    return dataclasses.replace(
        batch,
        input_ids=repeated(batch.input_ids),
        position_ids=repeated(batch.position_ids),
        fold_index=repeated(batch.fold_index),
        unfold_indptr=torch.cat([batch.unfold_indptr[: num_nodes + 1], batch.unfold_indptr[-1].expand(count)]),
        run_sequences=torch.cat([batch.run_sequences, ramp[batch.num_sequences : batch.num_sequences + 1]]),
        cu_seqlens_q=torch.cat([batch.cu_seqlens_q, ramp[num_rows : num_rows + 1]]),
        cu_seqlens_k=torch.cat([batch.cu_seqlens_k, ramp[total : total + 1]]),
        kv_index=torch.cat([batch.kv_index, ramp[num_nodes:num_rows]]),
        kv_indptr=torch.cat([batch.kv_indptr[: num_nodes + 1], ramp[num_keys + 1 : total + 1]]),
        kv_members=torch.cat([batch.kv_members, ramp[num_keys:total]]),
        num_nodes=num_rows,
        max_seqlen_q=max(batch.max_seqlen_q, count),
        max_seqlen_k=max(batch.max_seqlen_k, count),
    )
