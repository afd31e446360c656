"""The machine by itself: halves of batches that fail, the limits that memory and pace set, and predictions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from helpers.served import POISON, Gate, MadeDevice, work_of
from radix_ops.plan.choice import Bounds
from radix_ops.serve import machine as machines
from radix_ops.serve.limits import BatchLimits
from radix_ops.serve.machine import Machine
from radix_ops.serve.metrics import Metrics
from radix_ops.serve.pace import Pace
from radix_ops.serve.queue import Batch, Request
from radix_ops.serve.work import Size


def batch_of(*requests) -> Batch:
    pieces = []
    for sequences in requests:
        work = work_of(*sequences)
        pieces += Request("sum", lambda: work, Size(1, 1), b"", None, 0.0).prepare(work)  # noqa: B023
    pieces.sort(key=lambda piece: piece.key)
    return Batch("sum", pieces, [len(piece) for piece in pieces])


@pytest.fixture
def opened():
    """Return a function that opens a machine."""
    contexts = []

    def make(compute, device=None, **limits):
        machine = Machine(device or MadeDevice(), BatchLimits(**limits), Metrics())
        machine.computes["sum"] = compute
        contexts.append(machine.open())
        contexts[-1].__enter__()
        return machine

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("seed", range(20))
def test_halving_fails_the_poisoned_requests_and_computes_all_others_once(opened, seed):
    rng = random.Random(seed)
    requests = [
        [[rng.randrange(5), POISON if rng.random() < 0.1 else 1] for _ in range(rng.randrange(1, 5))]
        for _ in range(rng.randrange(1, 40))
    ]
    machine, batch = opened(Gate()), batch_of(*requests)
    answered, failed = {}, set()
    for done in machine.compute(machine.prepare(batch)):
        if done.error is None:
            for piece, result in zip(done.batch.pieces, done.results, strict=True):
                assert (piece.owner, piece.place) not in answered
                answered[piece.owner, piece.place] = result
                assert result == piece.ids.sum()
        else:
            (piece,) = done.batch.pieces
            assert piece.owner not in failed
            failed.add(piece.owner)
    owners = {piece.owner for piece in batch.pieces}
    poisoned = {piece.owner for piece in batch.pieces if POISON in piece.ids}
    assert failed == poisoned
    healthy = {(piece.owner, piece.place) for piece in batch.pieces if piece.owner in owners - poisoned}
    assert healthy <= set(answered)


def test_one_poisoned_sequence_of_many_costs_two_more_batches(opened):
    gate = Gate()
    machine = opened(gate)
    list(machine.compute(machine.prepare(batch_of(*([[n]] for n in range(1000, 2024) if n != POISON), [[POISON]]))))
    assert sum(map(len, gate.batches)) <= 3 * 1024 + 20


def test_halves_count_their_own_rows(opened):
    """A half whose prefix the other half added computes it again."""
    batch = batch_of(*([[1, 2, 3, n]] for n in range(10, 14)))
    batch = Batch("sum", batch.pieces, [4, 1, 1, 1])
    assert (batch.rows, batch.tokens) == (7, 16)
    assert [half.added for half in batch.halves()] == [[4, 1], [4, 1]]
    assert [half.rows for half in batch_of([[1, 2]], [[1, 2]]).halves()] == [2, 2]


def test_what_is_over_is_left_out_of_halves(opened):
    gate = Gate()
    machine = opened(gate)
    batch = batch_of([[1]], [[2]], [[3]], [[POISON]])
    batch.pieces[1].owner.end()
    for _ in machine.compute(machine.prepare(batch)):
        pass
    assert sum([2] in ids for ids in gate.batches) == 1  # the whole batch, which it was in already


def test_batches_shrink_where_memory_ends_and_grow_again(opened, monkeypatch):
    monkeypatch.setattr(machines, "_PATIENCE", 10)

    class Small(Gate):
        fits = 100

        def __call__(self, sequences, extras):
            if sum(map(len, sequences)) > self.fits:
                raise torch.OutOfMemoryError("too much")
            return super().__call__(sequences, extras)

    gate, device = Small(), MadeDevice(Bounds(512, 4096, 8192, max_padding=0.5))
    machine = opened(gate, device, max_rows=10_000, max_sequences=99)
    machine._paces["sum"].rows_in = lambda seconds, least: 10_000
    assert machine.bounds("sum", 1).max_rows == 512
    results = [done.error for done in machine.compute(machine.prepare(batch_of(*([[1] * 10] for _ in range(40)))))]
    assert results == [None] * 4
    assert device.released == 3
    assert machine.bounds("sum", 1) == Bounds(100, 100, 8192, 99, 0.5)
    for expected in (100, 200, 400, 512, 512):
        assert machine.bounds("sum", 1).max_rows == expected
        for _ in range(10 - machine._fitting % 10):
            list(machine.compute(machine.prepare(batch_of([[1]]))))


def test_a_sequence_that_does_not_fit_alone_fails_and_shrinks_nothing(opened):
    class Full(Gate):
        def __call__(self, sequences, extras):
            raise torch.OutOfMemoryError("too much")

    machine = opened(Full())
    before = machine.bounds("sum", 1)
    (done,) = machine.compute(machine.prepare(batch_of([[1] * 5000])))
    assert isinstance(done.error.__cause__, torch.OutOfMemoryError)
    assert machine.bounds("sum", 1) == before


def test_a_batch_that_cannot_be_folded_is_halved_as_well(opened):
    class Choosy(MadeDevice):
        def prepare(self, sequences, salts):
            if len(sequences) > 1:
                raise RuntimeError("no")
            return sequences

    machine = opened(Gate(), Choosy())
    done = list(machine.compute(machine.prepare(batch_of([[1]], [[2]], [[3]]))))
    assert [one.results for one in done] == [[1], [2], [3]]


@pytest.mark.parametrize("each", [0.0, 0.003])
@pytest.mark.parametrize("sizes", [(100, 5000), (3, 70), (64, 64)])
def test_the_pace_predicts_what_was_measured(each, sizes):
    rng, pace = random.Random(0), Pace()
    assert pace.seconds(100) is None
    pace.add(50, 100, 30.0)  # the first pays for what is done once
    for _ in range(60):
        rows = rng.randint(*sizes)
        pace.add(rows, 2 * rows, each + rows / 20_000)
    for rows in sizes:
        assert pace.seconds(rows) == pytest.approx(each + rows / 20_000, rel=1e-3)
    assert pace.tokens_per_second == pytest.approx(2 * pace.rows_per_second)


def test_batches_grow_to_what_the_target_time_holds():
    pace, rows = Pace(), 1024
    for _ in range(10):
        pace.add(rows, rows, 0.005 + rows / 100_000)
        rows = pace.rows_in(0.2, 256)
    assert rows == pytest.approx(19_500, rel=0.01)


def test_batches_do_not_grow_further_than_was_measured():
    pace = Pace()
    for rows in (10, 20, 30):
        pace.add(rows, rows, 0.005)  # as if rows cost nothing
    assert 256 <= pace.rows_in(0.2, 256) <= 256
    for _ in range(3):
        pace.add(1000, 1000, 0.005)
    assert pace.rows_in(0.2, 256) <= 4000


def test_a_long_prefix_is_shared_by_more_than_the_target_time_holds(opened):
    machine = opened(Gate(), MadeDevice(Bounds(9000, 99_000)), max_rows=8000)
    for _ in range(10):
        machine._paces["sum"].add(1000, 1000, 1.0)  # 200 rows in the target time
    found = [machine.bounds("sum", first).max_rows for first in (1, 100, 1000, 5000)]
    assert found == [256, 400, 4000, 8000]


def test_kinds_have_a_pace_each(opened):
    machine = opened(Gate(), MadeDevice(Bounds(9000, 99_000)))
    for _ in range(10):
        machine._paces["fast"].add(1000, 1000, 0.1)
        machine._paces["slow"].add(1000, 1000, 0.4)
    assert [machine.bounds(kind, 1).max_rows for kind in ("fast", "slow", "new")] == [2000, 500, 1024]


def test_a_pause_of_the_machine_is_soon_forgotten():
    pace = Pace()
    for _ in range(20):
        pace.add(1000, 1000, 0.01)
    pace.add(1000, 1000, 30.0)
    assert pace.seconds(1000) < 0.02


def test_a_slower_machine_is_noticed():
    pace = Pace()
    for speed in (100_000, 10_000):
        for rows in np.random.default_rng(0).integers(500, 2000, 120).tolist():
            pace.add(rows, rows, rows / speed)
    assert pace.seconds(1000) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"max_rows": 0}, {"max_sequences": 0}, {"max_overtakes": -1}])
def test_limits_that_allow_nothing_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BatchLimits(**options)
