"""Plans a run of a language model's head for a loss: its rows, their labels, and the blocks of logits.

Row r predicts a packed token wherever the token before it, in the same sequence, is on r. So a row can have several
labels, and a (row, label) pair several tokens: that of each duplicate of its sequence.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The label of tokens that are no targets, as torch's cross_entropy and transformers have it.
IGNORED_LABEL = -100
# Logits that exist at a time by default: 128 MiB of them in fp32.
_BLOCK_LOGITS = 1 << 25
# In a block of the default size, about so many rows give both products of the backward enough parts to make at a time:
# the gradients of the states, rows by width, and of the weight, columns by width.
_BLOCK_ROWS = 4096
_MIN_COLUMNS = 1024
_ALIGNED_COLUMNS = 128
# The key of tokens without a pair, behind all others.
_NO_PAIR = 1 << 62


class HeadPlan(NamedTuple):
    """R rows with a target, U different (row, label) pairs among the N packed tokens, all int64.

    A pair more, number U, stands for the tokens that are no targets. Pairs are sorted by block of logits.
    """

    rows: Tensor  # [R] ascending
    pair_ranks: Tensor  # [U + 1] the place of the pair's row in `rows`; R for the last
    pair_labels: Tensor  # [U + 1]; 0 for the last
    token_pair: Tensor  # [N] the pair of each packed token
    pair_indptr: Tensor  # [U + 2] with pair_members: the inverse of token_pair
    pair_members: Tensor  # [N]
    blocks: Tensor  # on the CPU: rows and columns of a block, then the first pair of each block, and U


class Block(NamedTuple):
    rows: slice  # of HeadPlan.rows
    columns: slice  # of the vocabulary
    pairs: slice


def blocks_of(blocks: Tensor, num_rows: int, vocabulary: int) -> list[Block]:
    """Return all blocks of HeadPlan.blocks: one range of columns after another, in each the rows from first to last."""
    block_rows, block_columns, *pairs = blocks.tolist()
    corners = itertools.product(range(0, vocabulary, block_columns), range(0, num_rows, block_rows))
    return [
        Block(
            slice(row, min(row + block_rows, num_rows)),
            slice(column, min(column + block_columns, vocabulary)),
            slice(pairs[i], pairs[i + 1]),
        )
        for i, (column, row) in enumerate(corners)
    ]


def block_shape(num_rows: int, vocabulary: int, rows_per_chunk: int) -> tuple[int, int]:
    """Return rows and columns of a block of at most rows_per_chunk * vocabulary logits (0: the default number).

    Many rows and a part of the vocabulary, not all of it for a few rows: so the gradient of a part of the weight is
    summed at once, in little memory, and what is read and written for each part is the gradient of the rows, of which
    there are fewer than words in the vocabulary.
    """
    logits = rows_per_chunk * vocabulary if rows_per_chunk else max(_BLOCK_LOGITS, vocabulary)
    num_rows = max(num_rows, 1)
    most_rows = max(1, logits // min(vocabulary, _MIN_COLUMNS))
    num_parts = max(math.ceil(num_rows / most_rows), round(num_rows / _BLOCK_ROWS))
    rows = math.ceil(num_rows / num_parts)
    columns = min(vocabulary, logits // rows)
    if columns == vocabulary:
        rows = min(num_rows, logits // columns)
    elif columns > _ALIGNED_COLUMNS:
        columns -= columns % _ALIGNED_COLUMNS
    return rows, columns


def plan_head(
    labels: Tensor,
    unfold_index: Tensor,
    cu_seqlens: Tensor,
    num_rows: int,
    vocabulary: int,
    ignore_index: int,
    rows_per_chunk: int,
) -> HeadPlan:
    """Return the plan for labels [N] of a batch; on CUDA the host waits twice, for a few numbers.

    Raises ValueError for a label outside the vocabulary that is not ignore_index, unless it is a first token's.
    """
    num_tokens, device = labels.shape[0], labels.device
    labels = labels.long()
    is_first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=device)
    is_first.index_fill_(0, cu_seqlens[:-1].long(), True)  # an empty sequence starts where the next one does
    is_target = (labels != ignore_index) & ~is_first[:num_tokens]
    row = torch.where(is_target, unfold_index.long().roll(1), num_rows)  # that predicts the token
    is_wanted = torch.zeros(num_rows + 1, dtype=torch.bool, device=device).index_fill_(0, row, True)
    wanted_up_to = is_wanted[:num_rows].cumsum(0)

    bounds = F.pad(torch.where(is_target, labels, 0), (0, 1)).aminmax()
    num_wanted, low, high = torch.stack([is_wanted[:num_rows].sum(), *bounds]).tolist()
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"labels must be from 0 to {vocabulary - 1}, the last row of weight, or {ignore_index} for no target, "
            f"got {low if low < 0 else high}"
        )
    rows = torch.searchsorted(wanted_up_to, torch.arange(1, num_wanted + 1, device=device))

    block_rows, block_columns = block_shape(num_wanted, vocabulary, rows_per_chunk)
    # A pair's key is its place in an order by range of columns, then row, then label.
    span = max(num_wanted, 1) * block_columns
    rank = F.pad(wanted_up_to, (0, 1))[row] - 1
    key = labels // block_columns * span + rank * block_columns + labels % block_columns
    key, members = torch.where(is_target, key, _NO_PAIR).sort(stable=True)
    is_new = key.diff(prepend=key.new_full((1,), -1)) != 0
    pairs_up_to = is_new.cumsum(0)
    token_pair = torch.empty_like(members).scatter_(0, members, pairs_up_to - 1)

    first_columns = torch.arange(0, vocabulary, block_columns, device=device) // block_columns * span
    first_rows = torch.arange(0, num_wanted, block_rows, device=device) * block_columns
    starts = F.pad((first_columns[:, None] + first_rows).flatten(), (0, 1), value=_NO_PAIR)
    first_pairs = F.pad(pairs_up_to, (1, 0))[torch.searchsorted(key, starts)]
    blocks = torch.cat([torch.tensor([block_rows, block_columns], device="cpu"), first_pairs.cpu()])

    num_pairs = int(blocks[-1])
    indptr = torch.searchsorted(pairs_up_to, torch.arange(1, num_pairs + 3, device=device))
    pair_key = key[indptr[:num_pairs]]
    pair_ranks = pair_key % span // block_columns
    pair_labels = pair_key // span * block_columns + pair_key % block_columns
    return HeadPlan(
        rows=rows,
        pair_ranks=F.pad(pair_ranks, (0, 1), value=num_wanted),
        pair_labels=F.pad(pair_labels, (0, 1)),
        token_pair=token_pair,
        pair_indptr=indptr,
        pair_members=members,
        blocks=blocks,
    )
