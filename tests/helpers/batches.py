"""Batches of sequences for tests: named ones that exercise each shape of trie, and random and adversarial ones."""

from __future__ import annotations

import os

import numpy as np
import torch

NAMED = {
    "no_sequences": [],
    "one_empty": [[]],
    "all_empty": [[], [], []],
    "one_token": [[7]],
    "single": [[1, 2, 3, 4, 5]],
    "identical": [[1, 2, 3]] * 4,
    "shared_prefix": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6, 7]],
    "nested": [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [1, 2, 5, 7], [1, 8]],
    "duplicates": [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2, 5]],
    "strict_prefix_after": [[1, 2, 3, 4, 5], [1, 2, 3], [1]],
    "strict_prefix_before": [[1], [1, 2, 3], [1, 2, 3, 4, 5]],
    "grow_then_split": [[1], [1, 2], [1, 2, 3], [1, 3], [1, 2, 4], [1, 2, 3, 5]],
    "grow_after_another": [[1, 2], [9], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5]],
    "disjoint": [[1, 2, 3], [4, 5], [6]],
    "equal_tokens_elsewhere": [[5, 5, 5], [5, 5], [9, 5, 5]],
    "empty_between": [[], [1, 2], [], [1, 3], []],
    "mixed_lengths": [[1], [1, 2, 3, 4, 5, 6, 7], [2], [1, 2, 3], [2, 1]],
}


def pack(sequences: list[list[int]], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    """Return input_ids [N], position_ids [N] from 0 per sequence, cu_seqlens [B + 1]."""
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=dtype)
    positions = torch.tensor([i for sequence in sequences for i in range(len(sequence))], dtype=dtype)
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0).to(dtype)
    return ids, positions, cu_seqlens


def rounds(count: int) -> range:
    """Return `count` rounds of a test of random batches, or a share of them: a memory checker makes them slow."""
    return range(max(1, count // int(os.environ.get("RADIX_TEST_DIVISOR", "1"))))


def to(device: str, values):
    """Return a tuple or list of tensors and other values, with the tensors on `device`."""
    return type(values)(value.to(device) if isinstance(value, torch.Tensor) else value for value in values)


def random_sequences(rng: np.random.Generator) -> list[list[int]]:
    """Return sequences that branch off each other at random depths; few tokens, so that chance merges are common."""
    vocabulary = int(rng.choice([1, 2, 3, 10, 1000]))
    longest = int(rng.choice([1, 3, 10, 100, 300]))
    sequences: list[list[int]] = []
    for _ in range(int(rng.integers(1, 12))):
        parent = sequences[int(rng.integers(len(sequences)))] if sequences and rng.random() < 0.8 else []
        keep = int(rng.integers(len(parent) + 1))
        if rng.random() < 0.2:
            keep = len(parent)
        tail = rng.integers(0, vocabulary, int(rng.integers(longest + 1))) if rng.random() < 0.8 else []
        sequences.append(parent[:keep] + [int(token) for token in tail])
    return sequences


def random_positions(rng: np.random.Generator, sequences: list[list[int]]) -> torch.Tensor:
    """Return positions that start anywhere, repeat or are noise, so that equal tokens often differ in position."""
    kind = int(rng.integers(4))
    positions: list[int] = []
    for sequence in sequences:
        count = len(sequence)
        if kind == 0:
            positions += range(count)
        elif kind == 1:
            start = int(rng.integers(3))
            positions += range(start, start + count)
        elif kind == 2:
            positions += [i // 2 for i in range(count)]
        else:
            positions += [int(p) for p in rng.integers(0, 2, count)]
    return torch.tensor(positions, dtype=torch.int64)


def trie_size(sequences: list[list[int]]) -> int:
    """Count the distinct prefixes of the sequences, which are the rows that they fold to."""
    return len({tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))})


def short_sequences(rng, most=12, longest=9, vocabulary=3):
    count = rng.randint(0, most)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(0, longest))] for _ in range(count)]
