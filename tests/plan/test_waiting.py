"""Sequences that wait stand in the order of their tokens, with what each shares with the one before it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_ops.plan.waiting import Piece, Waiting

# Ids that little-endian bytes and signed bytes would sort otherwise.
IDS = st.lists(st.sampled_from([0, 1, 127, 128, 255, 256, 65536, 2**31 - 1]), max_size=5)
SALTS = st.sampled_from([b"", b"a", b"ab", b"\0\0\0\1"])


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def piece(ids: list[int], number: int, salt: bytes = b"") -> Piece:
    return Piece(np.array(ids, np.int32), number=number, salt=salt)


def check(waiting: Waiting, pieces: list[Piece]) -> None:
    found = [waiting[i] for i in range(len(waiting))]
    assert set(found) == set(pieces)
    assert len(found) == len(pieces)
    for salt in {one.salt for one in pieces}:
        same = [(one.ids.tolist(), one.number) for one in found if one.salt == salt]
        assert same == sorted(same)
    shared = waiting.shared.tolist()
    assert shared[:1] in ([], [0])
    for before, after, count in zip(found[:-1], found[1:], shared[1:], strict=True):
        assert count == (common(before.ids.tolist(), after.ids.tolist()) if before.salt == after.salt else 0)
    # Those of one salt stand together.
    salts = [one.salt for one in found]
    assert sum(a != b for a, b in itertools.pairwise(salts)) == max(0, len(set(salts)) - 1)
    assert waiting.lengths.tolist() == [len(one) for one in found]
    assert waiting.numbers.tolist() == [one.number for one in found]
    assert [waiting.position(one) for one in found] == list(range(len(found)))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(IDS, SALTS), max_size=80), st.randoms(use_true_random=False))
def test_order_and_shared_tokens_stay_right_while_pieces_come_and_go(given_pieces, rng):
    waiting, here = Waiting(), []
    for number, (ids, salt) in enumerate(given_pieces):
        here.append(piece(ids, number, salt))
        waiting.add(here[-1])
        if rng.random() < 0.1:
            gone = rng.sample(here, rng.randint(0, len(here)))
            waiting.remove(gone)
            here = [one for one in here if one not in gone]
    check(waiting, here)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100, 199, 200])
def test_few_and_many_are_removed_alike(count):
    rng = random.Random(count)
    pieces = [piece([rng.randrange(3) for _ in range(rng.randrange(1, 6))], number) for number in range(200)]
    waiting = Waiting()
    for one in pieces:
        waiting.add(one)
    gone = rng.sample(pieces, count)
    waiting.remove(gone)
    check(waiting, [one for one in pieces if one not in gone])


def test_without_sharing_no_tokens_are_shared():
    waiting = Waiting(shares=False)
    for number in range(100):
        waiting.add(piece([1, 2, 3], number))
    waiting.remove([waiting[i] for i in range(0, 100, 2)])
    assert not waiting.shared.any()


def test_a_piece_that_is_not_here_has_no_position():
    waiting = Waiting()
    waiting.add(piece([1, 2], 0))
    with pytest.raises(KeyError):
        waiting.position(piece([1, 2], 0))
    with pytest.raises(KeyError):
        waiting.remove([piece([1, 3], 0)])
