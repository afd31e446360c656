"""A batch that is chosen of sequences that wait: its rows, its bounds, and which mates it takes."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_ops import FoldedBatch
from radix_ops.plan.choice import LEAST_SHARE, Bounds, Choice
from radix_ops.plan.waiting import Piece, Waiting

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sampled_from([b"", b"x"])),
    min_size=1,
    max_size=60,
)
BOUNDS = st.builds(
    Bounds,
    st.integers(1, 60),
    st.one_of(st.just(2**62), st.integers(1, 100)),
    st.one_of(st.none(), st.integers(1, 100)),
    st.one_of(st.just(2**62), st.integers(1, 12)),
)


def waiting_of(sequences) -> tuple[Waiting, list[Piece]]:
    pieces = [Piece(np.array(ids, np.int32), number=n, salt=salt) for n, (ids, salt) in enumerate(sequences)]
    waiting = Waiting()
    for piece in sorted(pieces, key=lambda piece: random.Random(piece.number).random()):
        waiting.add(piece)
    return waiting, pieces


def rows_of(pieces) -> int:
    """Count the nodes of the tries of each salt."""
    return len({(p.salt, *p.ids[:end].tolist()) for p in pieces for end in range(1, len(p) + 1)})


def is_within(pieces, bounds: Bounds) -> bool:
    longest = max(map(len, pieces))
    return len(pieces) == 1 or (
        rows_of(pieces) <= bounds.max_rows
        and sum(map(len, pieces)) <= bounds.max_tokens
        and len(pieces) <= bounds.max_sequences
        and (bounds.max_positions is None or len(pieces) * longest <= bounds.max_positions)
    )


def fill(waiting: Waiting, pieces: list[Piece], bounds: Bounds) -> Choice:
    choice = Choice(waiting, bounds)
    for piece in pieces:
        if not choice.has(piece):
            if not choice.take(piece):
                break
            choice.take_mates()
    return choice


def brute_fill(pieces: list[Piece], bounds: Bounds) -> list[Piece]:
    """Do the same by looking at every piece each time."""
    batch: list[Piece] = []

    def added(piece: Piece) -> int:
        return rows_of([*batch, piece]) - rows_of(batch)

    for piece in pieces:
        if piece in batch:
            continue
        if batch and not is_within([*batch, piece], bounds):
            break
        batch.append(piece)
        misfits: set[Piece] = set()
        while True:
            mates = [p for p in pieces if p not in batch and p not in misfits]
            mates = [p for p in mates if len(p) - added(p) >= max(LEAST_SHARE * len(p), 1)]
            if not mates:
                break
            best = min(mates, key=lambda p: (added(p), p.number))
            if rows_of([*batch, best]) > bounds.max_rows:
                break
            if is_within([*batch, best], bounds):
                batch.append(best)
                misfits.clear()
            else:
                misfits.add(best)
    return batch


@settings(deadline=None, max_examples=300)
@given(SEQUENCES, BOUNDS)
def test_a_batch_keeps_its_bounds_and_counts_its_rows(sequences, bounds):
    waiting, pieces = waiting_of(sequences)
    choice = fill(waiting, pieces, bounds)
    assert choice.pieces[0] is pieces[0]
    assert is_within(choice.pieces, bounds)
    assert choice.rows == sum(choice.added) == rows_of(choice.pieces)
    assert choice.tokens == sum(map(len, choice.pieces))
    assert len(set(choice.pieces)) == len(choice)


@settings(deadline=None, max_examples=200)
@given(SEQUENCES, st.integers(1, 60))
def test_mates_are_those_that_add_the_fewest_rows(sequences, max_rows):
    waiting, pieces = waiting_of(sequences)
    bounds = Bounds(max_rows)
    assert fill(waiting, pieces, bounds).pieces == brute_fill(pieces, bounds)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 300), st.sampled_from([0.0, 0.05, 0.5]))
def test_padded_batches_take_those_of_about_one_length(lengths, max_positions, max_padding):
    waiting, pieces = waiting_of([([1] * length, b"") for length in lengths])
    choice = Choice(waiting, Bounds(2**62, max_positions=max_positions, max_padding=max_padding))
    choice.take(pieces[0])
    choice.take_alike()
    found = [len(piece) for piece in choice.pieces]
    positions = len(found) * max(found)
    assert len(found) == 1 or positions <= max_positions
    assert positions - sum(found) <= max_padding * sum(found)
    # Equal ones come first, and all of them where they fit.
    equal = lengths.count(lengths[0])
    assert found.count(lengths[0]) == max(1, min(equal, max_positions // lengths[0]))


def made(kind: str, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 100)

    def tail(low: int, high: int) -> np.ndarray:
        return rng.integers(0, 1000, rng.integers(low, high))

    if kind == "one prompt":
        return [np.concatenate([prompt, tail(20, 300)]) for _ in range(count)]
    if kind == "queries":
        heads = [np.concatenate([prompt[:80], tail(40, 41)]) for _ in range(count // 16)]
        return [np.concatenate([heads[i], tail(50, 300)]) for i in rng.permutation(np.repeat(range(count // 16), 16))]
    if kind == "nested":
        chain = rng.integers(0, 1000, 4000)
        return [np.concatenate([chain[: rng.integers(10, 4000)], tail(5, 6)]) for _ in range(count)]
    return [tail(50, 500) for _ in range(count)]


@pytest.mark.parametrize("kind", ["one prompt", "queries", "nested", "apart"])
def test_large_queues_are_counted_as_the_fold_counts_them(kind):
    pieces = [Piece(ids.astype(np.int32), number=n) for n, ids in enumerate(made(kind, 3000))]
    waiting = Waiting()
    for piece in pieces:
        waiting.add(piece)
    for _ in range(3):
        choice = fill(waiting, pieces, Bounds(8192, 65536))
        assert choice.rows == FoldedBatch.from_sequences([piece.ids for piece in choice.pieces]).num_rows <= 8192
        gone = set(choice.pieces)
        waiting.remove_at(choice.positions)
        pieces = [piece for piece in pieces if piece not in gone]


def test_siblings_come_before_the_start_of_another_family():
    """Documents of the query that is in the batch add fewer rows than the first document of another query."""
    queries = [[1, *[q] * 20] for q in range(2, 6)]
    sequences = [(query + [50 + d] * (5 + d), b"") for d in range(8) for query in queries]
    waiting, pieces = waiting_of(sequences)
    choice = fill(waiting, pieces, Bounds(21 + sum(5 + d for d in range(8))))
    assert [piece.ids[1] for piece in choice.pieces] == [2] * 8


def test_a_choice_takes_no_longer_per_piece_where_thousands_wait():
    """Time grows with the batch: 16 times the queue may not take 6 times as long."""

    def seconds(count: int) -> float:
        pieces = [Piece(ids.astype(np.int32), number=n) for n, ids in enumerate(made("queries", count))]
        waiting = Waiting()
        for piece in pieces:
            waiting.add(piece)
        times = []
        for _ in range(7):
            started = time.process_time()
            fill(waiting, pieces, Bounds(16384))
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(9600) < 6 * seconds(600)
