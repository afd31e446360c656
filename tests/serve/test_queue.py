"""Fairness, bounds and memory of the queue, by simulation with a clock and an engine that are made up."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from helpers.served import work_of
from radix_ops.plan.choice import Bounds, Choice
from radix_ops.serve.limits import QueueLimits
from radix_ops.serve.queue import Batch, Queue, Request
from radix_ops.serve.refusals import Overloaded, TooLarge
from radix_ops.serve.work import Size

BOUNDS = Bounds(max_rows=400, max_tokens=2000, max_positions=4000, max_sequences=30)


def second(tokens: int) -> float:
    return 1.0


def request_of(sequences, kind="a", salt=b"", deadline=None, now=0.0) -> Request:
    work = work_of(*sequences)
    return Request(kind, lambda: work, Size(work.num_tokens, len(sequences)), salt, deadline, now)


def put(queue: Queue, request: Request) -> Request:
    queue.admit(request, second)
    assert request.encode is not None
    queue.put(request, request.prepare(request.encode()), second)
    return request


def made_request(rng: random.Random, **options) -> Request:
    prompt = [rng.randrange(3)] * rng.randrange(1, 60)
    size = rng.choice([1, 1, 1, 2, 8, 40])
    return request_of(
        [prompt + [rng.randrange(5) for _ in range(rng.randrange(1, 40))] for _ in range(size)], **options
    )


class Run:
    """A queue that batches are taken from, and what is known of them without it."""

    def __init__(self, max_overtakes: int, bounds: Bounds = BOUNDS, keeps_salts: bool = True):
        self.queue = Queue(QueueLimits(), max_overtakes)
        self.queue.settle(True, keeps_salts)
        self.bounds = bounds
        self.waiting: list[Request] = []  # in the order of their arrival
        self.overtaken: dict[Request, int] = {}

    def put(self, request: Request) -> Request:
        put(self.queue, request)
        self.waiting.append(request)
        self.overtaken[request] = 0
        return request

    def drop(self, request: Request) -> None:
        assert self.queue.release(request)
        self.waiting.remove(request)

    def step(self) -> Batch | None:
        self.before, self.counted = list(self.waiting), dict(self.overtaken)
        batch = self.queue.choose(lambda kind, first: self.bounds)
        assert (batch is None) == (not self.waiting)
        if batch is None:
            return None
        owners = {piece.owner for piece in batch.pieces}
        assert self.waiting[0] in owners
        assert owners <= set(self.waiting)
        last = max(map(self.waiting.index, owners))
        for request in self.waiting[:last]:
            self.overtaken[request] += bool(request.waiting)
        self.waiting = [request for request in self.waiting if request.waiting]
        return batch


def made_run(seed: int, max_overtakes: int, kinds=("a",), salts=(b"",), keeps_salts=True, bounds=BOUNDS):
    """Yield the run and each batch of a queue that fills faster than it is emptied, and then runs empty."""
    rng = random.Random(seed)
    run = Run(max_overtakes, bounds, keeps_salts)
    for _ in range(120):
        for _ in range(rng.randrange(8)):
            run.put(made_request(rng, kind=rng.choice(kinds), salt=rng.choice(salts)))
        if run.waiting and rng.random() < 0.3:
            run.drop(rng.choice(run.waiting))
        yield run, run.step()
    while run.waiting:
        yield run, run.step()


@pytest.mark.parametrize("max_overtakes", [0, 1, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_a_request_overtaken_so_often_is_served_in_its_turn_by_half_of_each_batch(seed, max_overtakes):
    """Where a due request is left out, those before it and the first of its own that is left fill half of the batch."""
    due, left_out = 0, 0
    run = Run(max_overtakes)
    for run, batch in made_run(seed, max_overtakes):
        turns = [request for request in run.before if run.counted[request] >= max_overtakes]
        due += len(turns)
        missing = [request for request in turns if request.waiting]
        if not missing:
            continue
        left_out += 1
        first = missing[0]
        ahead = [piece for piece in batch.pieces if piece.owner.number < first.number or piece.owner is first]
        ahead.append(next(iter(first.waiting.values())))
        longest = max(map(len, ahead))
        assert (
            rows_of(ahead) > 0.5 * BOUNDS.max_rows
            or sum(map(len, ahead)) > BOUNDS.max_tokens
            or len(ahead) > BOUNDS.max_sequences
            or len(ahead) * longest > BOUNDS.max_positions
        )
    assert due > 0
    assert left_out > 0 or max_overtakes > 4


def rows_of(pieces) -> int:
    return len({(p.salt, *p.ids[:end].tolist()) for p in pieces for end in range(1, len(p) + 1)})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", ["a", "abc"])
def test_batches_keep_their_bounds_and_kinds(seed, kinds):
    for _, batch in made_run(seed, 4, kinds, salts=(b"", b"x", b"y")):
        if batch is None:
            continue
        assert len({piece.owner.kind for piece in batch.pieces}) == 1
        lengths = [len(piece) for piece in batch.pieces]
        assert batch.rows == rows_of(batch.pieces)
        assert batch.tokens == sum(lengths)
        if len(batch) > 1:
            assert batch.rows <= BOUNDS.max_rows
            assert batch.tokens <= BOUNDS.max_tokens
            assert len(batch) * max(lengths) <= BOUNDS.max_positions
            assert len(batch) <= BOUNDS.max_sequences


@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_is_in_one_batch_once(seed):
    runs, batches = zip(*made_run(seed, 4, "ab"), strict=True)
    run, seen = runs[-1], [(piece.owner, piece.place) for batch in batches if batch for piece in batch.pieces]
    assert len(seen) == len(set(seen))
    taken = dict.fromkeys(run.overtaken, 0)
    for request, _ in seen:
        taken[request] += 1
    finished = [request for request in run.overtaken if not request.is_over]
    assert [taken[request] for request in finished] == [request.missing for request in finished]


@pytest.mark.parametrize("seed", range(3))
def test_a_queue_gives_the_same_batches_each_time(seed):
    def places():
        return [batch and [(p.number, p.place) for p in batch.pieces] for _, batch in made_run(seed, 4, "ab")]

    assert places() == places()


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_has_one_salt_where_the_model_cannot_keep_several_apart(seed):
    for _, batch in made_run(seed, 4, salts=(b"", b"x", b"y"), keeps_salts=False):
        assert batch is None or len({piece.salt for piece in batch.pieces}) == 1


def test_requests_that_end_leave_nothing_behind():
    run = Run(4)
    requests = [run.put(request_of([[1, 2, n] for n in range(40)])) for _ in range(300)]
    for request in requests:
        run.drop(request)
    assert (run.queue.requests, run.queue.sequences, run.queue.tokens) == (0, 0, 0)
    waiting = next(iter(run.queue._groups.values())).waiting
    assert len(waiting) < 1100  # without a batch that is chosen
    assert run.step() is None
    assert not run.queue._groups
    assert all(request.work is request.encode is None and not request.waiting for request in requests)


def test_one_that_ends_twice_is_counted_once():
    queue = Queue(QueueLimits(), 4)
    request, other = put(queue, request_of([[1, 2]])), put(queue, request_of([[1, 2]]))
    assert queue.release(request)
    assert not queue.release(request)
    assert (queue.requests, queue.tokens) == (1, 2)
    assert queue.choose(lambda kind, first: BOUNDS).pieces[0].owner is other


def test_one_that_ends_before_it_is_encoded_does_not_wait():
    queue = Queue(QueueLimits(), 4)
    request = request_of([[1, 2]])
    queue.admit(request, second)
    work = request.encode()
    queue.release(request)
    queue.put(request, request.prepare(work), second)
    assert queue.choose(lambda kind, first: BOUNDS) is None
    assert queue.tokens == 0


def test_time_that_is_over_is_told_once_and_only_of_those_that_wait():
    queue = Queue(QueueLimits(), 4)
    late, gone, early = (put(queue, request_of([[1]], deadline=time)) for time in (30.0, 20.0, 10.0))
    put(queue, request_of([[1]]))
    queue.release(gone)
    assert queue.next_deadline == 10.0
    assert queue.expired(9.9) == []
    assert queue.expired(25.0) == [early]
    assert queue.expired(25.0) == []
    queue.release(early)
    assert queue.expired(30.0) == [late]
    assert queue.next_deadline is None


def test_deadlines_of_those_that_ended_are_forgotten():
    queue = Queue(QueueLimits(), 4)
    for _ in range(1000):
        queue.release(put(queue, request_of([[1]], deadline=1e9)))
    assert len(queue._deadlines) < 100


def test_ten_times_the_load_is_refused_early_and_leaves_memory_bounded():
    """Each step offers ten times what a batch takes; time passes as batches are computed."""
    rng = random.Random(0)
    limits = QueueLimits(max_requests=50, max_sequences=400, max_tokens=8000)
    queue, refusals, answered, offered = Queue(limits, 4), [], 0, 0
    for _ in range(300):
        for _ in range(40):
            request = made_request(rng)
            offered += 1
            try:
                queue.admit(request, lambda tokens: tokens / 400)
            except Overloaded as error:
                refusals.append(error.retry_after)
                continue  # it is not even encoded
            queue.put(request, request.prepare(request.encode()), second)
        assert queue.requests <= limits.max_requests
        assert queue.sequences <= limits.max_sequences
        assert queue.tokens <= limits.max_tokens
        batch = queue.choose(lambda kind, first: BOUNDS)
        for piece in batch.pieces:
            piece.owner.missing -= 1
            if not piece.owner.missing:
                answered += queue.release(piece.owner)
        held = sum(len(group.waiting) + len(group.dead) for group in queue._groups.values())
        assert held <= limits.max_sequences + 2048
    assert len(refusals) > 0.8 * offered
    assert all(1 <= seconds <= 60 for seconds in refusals)
    while (batch := queue.choose(lambda kind, first: BOUNDS)) is not None:
        for piece in batch.pieces:
            piece.owner.missing -= 1
            if not piece.owner.missing:
                answered += queue.release(piece.owner)
    assert answered + len(refusals) == offered
    assert (queue.requests, queue.sequences, queue.tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (QueueLimits(max_tokens=5), "the request has 6 tokens and the most are 5; split it"),
        (QueueLimits(max_sequences=1), "the request has 2 sequences and the most are 1; split it"),
    ],
)
def test_what_never_fits_is_too_large(limits, message):
    with pytest.raises(TooLarge) as caught:
        Queue(limits, 4).admit(request_of([[1, 2, 3], [4, 5, 6]]), second)
    assert str(caught.value) == message


def test_what_turns_out_larger_than_told_is_refused_then():
    queue = Queue(QueueLimits(max_tokens=100), 4)
    put(queue, request_of([[1] * 60]))
    for length, error in ((50, Overloaded), (101, TooLarge)):
        request = request_of([[1] * length])
        request.size = Size(5, 1)
        queue.admit(request, second)
        with pytest.raises(error):
            queue.put(request, request.prepare(request.encode()), second)
        queue.release(request)
        assert (queue.requests, queue.sequences, queue.tokens) == (1, 1, 60)
    smaller = request_of([[1] * 10])
    smaller.size = Size(40, 1)
    queue.admit(smaller, second)
    assert queue.tokens == 100
    queue.put(smaller, smaller.prepare(smaller.encode()), second)
    assert queue.tokens == 70


class FirstCome(Queue):
    """Batches in the order of arrival alone."""

    def choose(self, bounds_of):
        (group,) = self._groups.values()
        group.sweep()
        choice = Choice(group.waiting, bounds_of("a", 1))
        for request in group.arrived.values():
            if not all(choice.take(piece) for piece in request.waiting.values()):
                break
        return self._taken(choice, group, "a")


class Load:
    """Requests behind hot prompts at a multiple of what can be served in order, and a cold one at times.

    burst: a multiple for the first three seconds. waits: of the cold ones; throughput: requests a second.
    """

    BOUNDS = Bounds(max_rows=2000, max_tokens=2**62)
    RATE, TAIL = 10_000, 40  # rows a second and of a request beside its prompt

    def __init__(self, queue: Queue, load: float, prompts: int, burst: float = 0.0, seconds: float = 20.0):
        rng = np.random.default_rng(1)
        hot, now, arrival, next_cold = rng.integers(0, 500, (prompts, 200)), 0.0, 0.0, 0.5
        alone = self.RATE / (self.TAIL if prompts == 1 else self.TAIL + 200)  # requests a second in order
        self.waits, self.batch_seconds, done, late = [], [], 0, 0
        cold: dict[Request, float] = {}
        while now < seconds:
            while arrival <= now:
                is_cold = arrival >= next_cold
                next_cold += 0.5 if is_cold else 0.0
                tail = rng.integers(0, 500, self.TAIL)
                request = request_of([rng.integers(500, 1000, 250) if is_cold else np.r_[rng.choice(hot), tail]])
                with contextlib.suppress(Overloaded):
                    put(queue, request)
                    if is_cold:
                        cold[request] = arrival
                arrival += rng.exponential(1 / (alone * max(load, burst * (arrival < 3))))
            batch = queue.choose(lambda kind, first: self.BOUNDS) if len(queue) else None
            if batch is None:
                now = arrival
                continue
            self.batch_seconds.append(0.02 + batch.rows / self.RATE)
            now += self.batch_seconds[-1]
            done += len(batch)
            late += len(batch) * (now > seconds / 2)
            for piece in batch.pieces:
                queue.release(piece.owner)
                if piece.owner in cold:
                    self.waits.append(now - cold.pop(piece.owner))
        self.throughput, self.late_throughput = done / now, late / (now - seconds / 2)


def test_a_cold_request_waits_as_if_served_in_order_and_the_batches_that_may_overtake_it():
    limits = QueueLimits(max_tokens=80_000)
    first_come, fair, free = (
        Load(queue, load=2, prompts=1) for queue in (FirstCome(limits, 0), Queue(limits, 16), Queue(limits, 10**9))
    )
    waits = [np.quantile(load.waits, 0.99) for load in (first_come, fair)]
    assert waits[1] <= waits[0] + 16 * max(fair.batch_seconds)
    assert fair.throughput >= 0.9 * free.throughput


def test_a_burst_is_over_when_it_is_over():
    """Behind it waits more than max_overtakes batches; in the order of arrival the server could not catch up."""
    limits = QueueLimits(max_tokens=2_000_000)
    first_come, fair = (Load(queue, 2.5, prompts=30, burst=30) for queue in (FirstCome(limits, 0), Queue(limits, 16)))
    assert fair.late_throughput > 1.8 * first_come.late_throughput
