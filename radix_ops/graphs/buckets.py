"""The sizes that batches are padded to, so that many batches share one captured graph."""

from __future__ import annotations

from typing import NamedTuple

from ..batch import FoldedBatch


class Sizes(NamedTuple):
    """All that a graph has fixed of its batches. Numbers of entries are such that buffers side by side are aligned."""

    rows: int  # nodes and padding; the padding is nodes too
    ends: int  # of cu_seqlens_q, and of cu_seqlens_k
    keys: int  # of kv_index
    longest_run: int
    longest_sequence: int
    wanted: int | None  # rows that are asked for; None: all of them


def sizes_of(batch: FoldedBatch, *, by_trie: bool, num_wanted: int | None = None) -> Sizes:
    """Return the sizes to pad a batch to. It has at least one node; `by_trie`: attention takes no longest lengths.

    There are 32 sizes of rows from one power of two to the next, so that padding is 1.5% of the rows on average, and no
    less than 64 rows apart. The others cost hardly anything, and are fewer.
    """
    num_nodes, num_keys = batch.num_nodes, batch.kv_index.shape[0]
    rows = _round_up(batch.num_rows, least=64, parts=32)
    padding = rows - num_nodes
    # A batch whose keys need no unfolding must stay one; others have more keys than rows, before padding and with it.
    keys = rows if num_keys == num_nodes else _round_up(num_keys + padding, least=256, parts=4)
    ends = _round_up(batch.cu_seqlens_q.shape[0] + (padding > 0), least=8, parts=2)
    wanted = None if num_wanted is None else _round_up(num_wanted, least=8, parts=2)
    if by_trie:
        return Sizes(rows, ends, keys, rows, keys, wanted)
    longest_run = min(_round_up(max(batch.max_seqlen_q, padding), least=64, parts=1), rows)
    longest_sequence = min(_round_up(max(batch.max_seqlen_k, padding), least=64, parts=1), keys)
    return Sizes(rows, ends, keys, longest_run, longest_sequence, wanted)


def _round_up(number: int, *, least: int, parts: int) -> int:
    """Round up to a multiple of `least`, or of a part of the power of two below where that is more; never to 0."""
    step = max(least, (1 << max(number.bit_length() - 1, 0)) // parts)
    return max(-(-number // step), 1) * step
