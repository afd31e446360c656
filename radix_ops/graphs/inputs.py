"""The buffers that a captured graph reads its batch from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import FoldedBatch
from .buckets import Sizes


class StaticInputs:
    """A batch of fixed sizes, `batch`, and the rows wanted of it, whose values `fill` replaces.

    Rows behind a batch's nodes repeat its first row, as the tokens of one more sequence: finite where that is, and
    seen by no other row. Behind that sequence there are empty ones. The batch has what attention needs without
    gradients, in every layout but "unfold": `unfold_index` and `cu_seqlens` are those of the sequences that add rows,
    and `fold_index` and the inverses have their sizes alone.
    """

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes = sizes
        rows, ends, keys, longest_run, longest_sequence, num_wanted = sizes
        with torch.inference_mode(False):  # whose tensors could not be filled outside of it
            self._numbers = torch.zeros(2 * rows + (num_wanted or 0), dtype=torch.int64, device=device)
            self._tables = torch.zeros(2 * ends + keys + 1, dtype=torch.int32, device=device)
            self._ramp = torch.arange(max(rows, keys) + 1, dtype=torch.int32, device=device)
            unused = torch.zeros(max(rows + 1, keys), dtype=torch.int32, device=device)
        input_ids, position_ids, self._rows = self._numbers.split([rows, rows, num_wanted or 0])
        ends_q, ends_k, kv_index, self._num_rows = self._tables.split([ends, ends, keys, 1])
        self.batch = FoldedBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            unfold_index=kv_index,
            fold_index=unused[:rows],
            unfold_indptr=unused[: rows + 1],
            unfold_members=unused[:keys],
            run_sequences=unused[: ends - 1],
            cu_seqlens_q=ends_q,
            cu_seqlens_k=ends_k,
            kv_index=kv_index,
            kv_indptr=unused[: rows + 1],
            kv_members=unused[:keys],
            cu_seqlens=ends_k,
            num_nodes=rows,
            max_seqlen_q=longest_run,
            max_seqlen_k=longest_sequence,
            min_seqlen=0,
        )

    def fill(self, batch: FoldedBatch, rows: Tensor | None = None) -> None:
        """Take the values of a batch that has these sizes, and of the rows wanted of it, in two copies."""
        sizes, ramp, num_nodes, num_keys = self.sizes, self._ramp, batch.num_nodes, batch.kv_index.shape[0]
        padding, num_ends = sizes.rows - num_nodes, sizes.ends - batch.cu_seqlens_q.shape[0]
        end = num_keys + padding
        numbers = []
        for values in (batch.input_ids, batch.position_ids):
            numbers += [values if values.shape[0] == num_nodes else values[:num_nodes], _repeated(values, 0, padding)]
        if rows is not None and sizes.wanted is not None:
            numbers += [rows, _repeated(ramp, 0, sizes.wanted - rows.shape[0])]
        torch.cat(numbers, out=self._numbers)
        tables = [batch.cu_seqlens_q, _repeated(ramp, sizes.rows, num_ends)]
        tables += [batch.cu_seqlens_k, _repeated(ramp, end, num_ends)]
        tables += [batch.kv_index, ramp[num_nodes : sizes.rows], _repeated(ramp, 0, sizes.keys - end)]
        torch.cat([*tables, _repeated(ramp, batch.num_rows, 1)], out=self._tables)

    def shift(self, by: int) -> None:
        """Make another batch of the same shape: each row takes the token and position of the row `by` before it."""
        for x in (self.batch.input_ids, self.batch.position_ids):
            x.copy_(x.roll(by))

    def rows(self) -> Tensor | None:
        """Return the rows wanted and padding, or None for all; a row that the batch does not have is -1, as none is."""
        return None if self.sizes.wanted is None else torch.where(self._rows < self._num_rows, self._rows, -1)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the buffers until what was launched on `stream` is done, should they be freed before."""
        for buffer in (self._numbers, self._tables, self._ramp, self.batch.fold_index):
            buffer.record_stream(stream)


def _repeated(x: Tensor, at: int, count: int) -> Tensor:
    """Return `count` times the value x[at]; one view is half the work of three."""
    return x.as_strided((count,), (0,), x.storage_offset() + at * x.stride(0))
