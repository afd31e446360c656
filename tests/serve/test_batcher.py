"""Requests through the batcher's threads: answers, failures, ends and the life of the batcher."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import torch

from helpers.processes import run_python
from helpers.served import POISON, Gate, MadeDevice, serving, submit, together, work_of
from radix_ops.engine.errors import UserError
from radix_ops.serve.batcher import Batcher
from radix_ops.serve.limits import BatchLimits, QueueLimits
from radix_ops.serve.refusals import Draining, EngineDead, Expired, Failed, Loading, Overloaded, TooLarge
from radix_ops.serve.work import Size, Work

SOON = 20  # seconds, for what takes milliseconds


def value(batcher: Batcher, name: str, **labels: str) -> float:
    return batcher.metrics.registry.get_sample_value(f"radix_{name}", labels) or 0.0


def eventually(condition) -> None:
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_answers_are_each_request_s_own_in_its_order():
    gate = Gate()
    with serving(gate) as batcher:
        futures = [submit(batcher, *([n + 1, k] for k in range(n % 7))) for n in range(300)]
        for n, future in enumerate(futures):
            answer = future.result(SOON)
            assert answer.results == [n + 1 + k for k in range(n % 7)]
            assert answer.timings.tokens == 2 * (n % 7)
    assert len(gate.threads) == 1


def test_extras_stand_beside_their_sequences():
    gate = Gate()
    with serving(gate) as batcher:
        work = Work([np.array([n], np.int32) for n in range(50)], [f"extra {n}" for n in range(50)], beside="mine")
        answer = batcher.submit("sum", lambda: work, Size(50, 50)).result(SOON)
    assert answer.work.beside == "mine"
    for batch, extras in zip(gate.batches, gate.extras, strict=True):
        assert extras == [f"extra {ids[0]}" for ids in batch]


def test_what_waits_is_folded_while_a_batch_is_computed_and_runs_as_one():
    gate, device = Gate(), MadeDevice()
    gate.opened.clear()
    with serving(gate, device) as batcher:
        first = submit(batcher, [1])
        assert gate.entered.wait(SOON)
        others = [submit(batcher, [1, n]) for n in range(20)]
        eventually(lambda: len(device.prepared) == 2)  # while the first is not done
        assert not first.done()
        gate.opened.set()
        assert [future.result(SOON).results for future in others] == [[1 + n] for n in range(20)]
    assert sum(map(len, gate.batches)) == 21


def test_rows_of_a_request_are_those_that_it_added():
    with serving(Gate()) as batcher:
        with together(batcher):
            futures = [submit(batcher, [1, 2, 3, n], [1, 2, 3, n, 4]) for n in (10, 11)]
        timings = [future.result(SOON).timings for future in futures]
        assert batcher.snapshot()["total_batches"] == 1
    assert [timing.rows for timing in timings] == [5, 2]
    assert [timing.tokens for timing in timings] == [9, 9]


def test_a_request_larger_than_a_batch_is_answered_by_several():
    gate = Gate()
    with serving(gate, batch=BatchLimits(max_rows=50)) as batcher:
        with together(batcher):
            large = submit(batcher, *([n] * 20 for n in range(10)))
            small = submit(batcher, [500] * 20)
        answer = large.result(SOON)
        assert answer.results == [20 * n for n in range(10)]
        assert answer.timings.rows == 200
        assert small.result(SOON).results == [10_000]
    assert all(len(batch) <= 2 for batch in gate.batches)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_poisoned_request_fails_alone(count):
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        first = submit(batcher, [0])
        assert gate.entered.wait(SOON)
        futures = [submit(batcher, [n], [n, POISON if n == count // 2 else 1]) for n in range(count)]
        eventually(lambda: value(batcher, "tokenize_seconds_count") == count + 1)
        gate.opened.set()
        assert first.result(SOON).results == [0]
        for n, future in enumerate(futures):
            if n == count // 2:
                with pytest.raises(Failed) as caught:
                    future.result(SOON)
                assert isinstance(caught.value.__cause__, ValueError)
                assert "poison" not in str(caught.value)
            else:
                assert future.result(SOON).results == [n, n + 1]
        assert value(batcher, "failed_total") == 1
        assert batcher.health() is None
        assert submit(batcher, [5]).result(SOON).results == [5]
    # Each halving computes no more than the batch once more.
    assert sum(map(len, gate.batches)) <= 1 + 2 * count * (2 + np.log2(2 * count))


def test_memory_that_ends_halves_the_batch_and_all_are_answered():
    class Small(Gate):
        def __call__(self, sequences, extras):
            if len(sequences) > 8:
                raise torch.OutOfMemoryError("too much")
            return super().__call__(sequences, extras)

    device = MadeDevice()
    with serving(Small(), device) as batcher:
        futures = [submit(batcher, [n]) for n in range(200)]
        assert [future.result(SOON).results for future in futures] == [[n] for n in range(200)]
        assert batcher.health() is None
    assert (device.released > 0) == (value(batcher, "halved_total") > 0)


def test_wrong_numbers_of_results_are_failures():
    with serving(lambda sequences, extras: []) as batcher, pytest.raises(Failed):
        submit(batcher, [1]).result(SOON)


def test_a_cancelled_request_costs_nothing_more():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        first = submit(batcher, [1])
        assert gate.entered.wait(SOON)
        gone, stays = submit(batcher, [2]), submit(batcher, [3])
        eventually(lambda: value(batcher, "tokenize_seconds_count") == 3)
        assert gone.cancel()
        assert batcher.snapshot()["requests"] == 2
        gate.opened.set()
        assert (first.result(SOON).results, stays.result(SOON).results) == ([1], [3])
        with pytest.raises(CancelledError):
            gone.result(SOON)
        assert value(batcher, "cancelled_total") == 1
    assert [2] not in [ids for batch in gate.batches for ids in batch]


def test_a_request_cancelled_while_it_is_computed_lets_go_at_once():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        future = submit(batcher, [1], [2])
        assert gate.entered.wait(SOON)
        assert future.cancel()
        assert batcher.snapshot()["requests"] == 0
        gate.opened.set()
        assert submit(batcher, [3]).result(SOON).results == [3]


def test_a_request_cancelled_before_its_turn_to_be_encoded_is_not():
    encoded, started, go = [], threading.Event(), threading.Event()

    def slow():
        started.set()
        assert go.wait(SOON)
        return work_of([1])

    with serving(Gate()) as batcher:
        blocked = [batcher.submit("sum", slow, Size(1, 1)) for _ in range(2)]  # both threads
        assert started.wait(SOON)
        gone = batcher.submit("sum", lambda: encoded.append(1) or work_of([2]), Size(1, 1))
        gone.cancel()
        go.set()
        wait(blocked, SOON)
        assert submit(batcher, [3]).result(SOON).results == [3]
    assert encoded == []


def test_time_that_is_over_is_an_error_while_the_device_is_busy():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        running = submit(batcher, [1], deadline=time.monotonic() + 0.2)
        assert gate.entered.wait(SOON)
        waiting = submit(batcher, [2], deadline=time.monotonic() + 0.05)
        patient = submit(batcher, [3], deadline=float("inf"))
        for future in (waiting, running):
            with pytest.raises(Expired):
                future.result(SOON)
        assert value(batcher, "expired_total") == 2
        gate.opened.set()
        assert patient.result(SOON).results == [3]
    assert [2] not in [ids for batch in gate.batches for ids in batch]


def test_errors_of_what_encodes_are_the_request_s_own():
    def refuse():
        raise UserError("a text is too long")

    with serving(Gate()) as batcher:
        for encode, error in (
            (refuse, UserError),
            (lambda: work_of([1000]), UserError),
            (lambda: work_of([-1]), UserError),
            (lambda: work_of([]), ValueError),
            (lambda: 5, AttributeError),
        ):
            with pytest.raises(error):
                batcher.submit("sum", encode, Size(1, 1)).result(SOON)
        assert batcher.snapshot()["requests"] == 0
        assert submit(batcher, [1]).result(SOON).results == [1]


def test_a_full_queue_refuses_before_it_encodes_and_takes_again_later():
    gate, encoded = Gate(), []
    gate.opened.clear()
    with serving(gate, queue=QueueLimits(max_tokens=10)) as batcher:
        first = submit(batcher, [1] * 9)
        with pytest.raises(Overloaded) as caught:
            batcher.submit("sum", lambda: encoded.append(1), Size(2, 1))
        assert caught.value.retry_after >= 1
        with pytest.raises(TooLarge):
            batcher.submit("sum", lambda: encoded.append(1), Size(11, 1))
        gate.opened.set()
        assert first.result(SOON).results == [9]
        assert submit(batcher, [1] * 9).result(SOON).results == [9]
        assert value(batcher, "rejected_total", reason="overloaded") == 1
        assert value(batcher, "rejected_total", reason="toolarge") == 1
    assert encoded == []


def test_salts_are_told_to_the_device_and_share_no_rows():
    class Noting(MadeDevice):
        def prepare(self, sequences, salts):
            self.salts = salts
            return sequences

    gate, device = Gate(), Noting()
    with serving(gate, device) as batcher:
        answers = [submit(batcher, [1, 2, 3], salt=salt).result(SOON) for salt in ("", "a", "é")]
        assert [answer.timings.rows for answer in answers] == [3, 3, 3]
        assert device.salts == ["é".encode()]


def test_only_kinds_that_are_registered_are_accepted():
    with serving(Gate()) as batcher, pytest.raises(ValueError, match="kind must be one of 'sum', got 'mean'"):
        submit(batcher, [1], kind="mean")


# The life of a batcher


def test_nothing_is_accepted_before_the_model_is_there():
    device = MadeDevice()
    device.may_load.clear()
    batcher = Batcher(device)
    batcher.register("sum", Gate())
    with pytest.raises(Loading):
        submit(batcher, [1])
    with batcher:
        assert (batcher.state, batcher.ready) == ("loading", False)
        assert not batcher.wait_until_ready(0.01)
        with pytest.raises(Loading):
            submit(batcher, [1])
        device.may_load.set()
        assert batcher.wait_until_ready(SOON)
        assert value(batcher, "ready") == 1
    assert batcher.state == "stopped"
    with pytest.raises(Draining):
        submit(batcher, [1])


def test_a_model_that_cannot_be_loaded_is_told():
    batcher = Batcher(MadeDevice(load_error=UserError("no such model")))
    batcher.register("sum", Gate())
    with batcher:
        with pytest.raises(EngineDead) as caught:
            batcher.wait_until_ready(SOON)
        assert isinstance(caught.value.__cause__, UserError)
        assert batcher.health() == "the engine's thread has ended: UserError"
        with pytest.raises(EngineDead):
            submit(batcher, [1])


@pytest.mark.parametrize("end", ["stop", "drain"])
def test_a_stop_while_the_model_is_loaded_does_not_wait_for_it(end):
    device = MadeDevice()
    device.may_load.clear()
    batcher = Batcher(device)
    batcher.start()
    started = time.monotonic()
    getattr(batcher, end)()
    assert time.monotonic() - started < 10
    assert batcher.state == "stopped"
    device.may_load.set()
    eventually(lambda: not any(thread.is_alive() for thread in batcher._threads))
    assert batcher.state == "stopped"


def test_it_starts_once():
    with serving(Gate()) as batcher, pytest.raises(RuntimeError, match="it starts once"):
        batcher.start()


def test_the_warm_up_runs_on_the_engine_s_thread_before_requests():
    gate, threads = Gate(), []
    with serving(gate, warm_up=lambda: threads.append(threading.get_ident())) as batcher:
        submit(batcher, [1]).result(SOON)
    assert gate.threads == set(threads)


def test_a_drain_answers_all_that_was_accepted():
    """Also what is not tokenised yet."""
    gate, tokenising = Gate(), threading.Event()
    gate.opened.clear()

    def slow():
        assert tokenising.wait(SOON)
        return work_of([7])

    with serving(gate) as batcher:
        futures = [submit(batcher, [n]) for n in range(50)]
        futures.append(batcher.submit("sum", slow, Size(1, 1)))
        done = []
        drain = threading.Thread(target=lambda: done.append(batcher.drain(SOON)))
        drain.start()
        eventually(lambda: batcher.state == "draining")
        assert not batcher.ready
        with pytest.raises(Draining):
            submit(batcher, [1])
        gate.opened.set()
        time.sleep(0.02)
        assert drain.is_alive()
        tokenising.set()
        drain.join(SOON)
        assert done == [True]
        assert [future.result(0).results for future in futures] == [[n] for n in range(50)] + [[7]]
    assert batcher.state == "stopped"


def test_a_drain_beyond_its_grace_fails_what_is_left():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        future = submit(batcher, [1])
        assert gate.entered.wait(SOON)
        threading.Timer(0.3, gate.opened.set).start()
        assert batcher.drain(0.05) is False
        with pytest.raises(Draining):
            future.result(0)
        assert batcher.snapshot()["requests"] == 0


def test_a_stop_while_a_batch_is_computed_waits_for_the_engine():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        futures = [submit(batcher, [n]) for n in range(5)]
        assert gate.entered.wait(SOON)
        threading.Timer(0.1, gate.opened.set).start()
        batcher.stop()
        for future in futures:
            with pytest.raises(Draining):
                future.result(0)
    assert not any(thread.is_alive() for thread in batcher._threads)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_engine_that_ends_fails_all_and_is_bad_health(error):
    gate = Gate()
    gate.error = error
    gate.opened.clear()
    with serving(gate) as batcher:
        futures = [submit(batcher, [POISON]), submit(batcher, [1])]
        assert gate.entered.wait(SOON)
        gate.opened.set()
        for future in futures[:1]:
            with pytest.raises(EngineDead):
                future.result(SOON)
        eventually(lambda: batcher.state == "dead")
        assert batcher.health() == f"the engine's thread has ended: {error.__name__}"
        with pytest.raises(EngineDead):
            submit(batcher, [1])
        assert batcher.drain(1) is True


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch tells no device's errors from others")
def test_an_error_of_the_device_ends_the_engine():
    class Broken(torch.AcceleratorError):
        pass

    gate = Gate()
    gate.error = Broken
    with serving(gate) as batcher:
        future = submit(batcher, [POISON], [1])
        with pytest.raises(EngineDead):
            future.result(SOON)
        assert batcher.health() is not None
    assert len(gate.batches) == 1  # no half of it was tried


def test_many_failures_in_a_row_are_bad_health():
    gate = Gate()
    with serving(gate) as batcher:
        for _ in range(16):
            assert batcher.health() is None
            with pytest.raises(Failed):
                submit(batcher, [POISON]).result(SOON)
        assert batcher.health() == "the last 16 requests that were computed have failed"
        submit(batcher, [1]).result(SOON)
        assert batcher.health() is None


def test_a_batch_that_overruns_its_prediction_is_bad_health(monkeypatch):
    monkeypatch.setattr("radix_ops.serve.machine._LEAST_OVERRUN", 0.05)
    gate = Gate()
    with serving(gate) as batcher:
        for _ in range(3):
            submit(batcher, [1]).result(SOON)
        gate.opened.clear()
        future = submit(batcher, [1])
        eventually(lambda: batcher.health() is not None)
        assert batcher.health().startswith("a batch of 1 rows has taken")
        gate.opened.set()
        future.result(SOON)
        eventually(lambda: batcher.health() is None)


# Event loops and threads


def test_several_loops_and_threads_share_a_batcher():
    with serving(Gate()) as batcher:
        found: dict[int, list] = {}

        async def ask(client: int):
            asked = (batcher.ask("sum", lambda n=n: work_of([client, n]), Size(2, 1)) for n in range(50))
            return [answer.results for answer in await asyncio.gather(*asked)]

        def client(number: int) -> None:
            found[number] = asyncio.run(ask(number))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    assert found == {number: [[number + n] for n in range(50)] for number in range(6)}


def test_a_task_that_is_cancelled_drops_its_request():
    gate = Gate()
    gate.opened.clear()

    async def main(batcher: Batcher):
        first = asyncio.create_task(batcher.ask("sum", lambda: work_of([1]), Size(1, 1)))
        await asyncio.to_thread(gate.entered.wait, SOON)
        task = asyncio.create_task(batcher.ask("sum", lambda: work_of([2]), Size(1, 1)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert batcher.snapshot()["requests"] == 1
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batcher.ask("sum", lambda: work_of([3]), Size(1, 1)), 0.02)
        assert batcher.snapshot()["requests"] == 1
        gate.opened.set()
        return (await first).results

    with serving(gate) as batcher:
        assert asyncio.run(main(batcher)) == [1]
        assert value(batcher, "cancelled_total") == 2


def test_a_loop_that_is_closed_hurts_no_other():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        loop = asyncio.new_event_loop()
        pending = loop.create_task(batcher.ask("sum", lambda: work_of([1]), Size(1, 1)))
        loop.run_until_complete(asyncio.sleep(0.02))
        loop.close()
        gate.opened.set()
        assert submit(batcher, [2]).result(SOON).results == [2]
        assert not pending.done()
        pending._log_destroy_pending = False


def test_clients_that_come_and_go_at_random_are_all_accounted_for():
    """Threads submit, cancel and let time run out; each future ends, and nothing is left."""
    gate = Gate(seconds=0.001)
    with serving(gate, queue=QueueLimits(max_tokens=2000), batch=BatchLimits(max_rows=200)) as batcher:
        counts = {"answered": 0, "cancelled": 0, "expired": 0, "refused": 0, "failed": 0}
        lock = threading.Lock()

        def client(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(150):
                ids = [int(rng.integers(3))] * int(rng.integers(1, 40))
                if rng.random() < 0.02:
                    ids.append(POISON)
                deadline = time.monotonic() + rng.random() * 0.05 if rng.random() < 0.2 else None
                outcome = "refused"
                try:
                    future = submit(batcher, ids, ids[:3], deadline=deadline)
                    if rng.random() < 0.2:
                        time.sleep(rng.random() * 0.005)
                        future.cancel()
                    assert future.result(SOON).results == [sum(ids), sum(ids[:3])]
                    outcome = "answered"
                except CancelledError:
                    outcome = "cancelled"
                except Expired:
                    outcome = "expired"
                except Failed:
                    outcome = "failed"
                except Overloaded:
                    time.sleep(0.002)
                with lock:
                    counts[outcome] += 1

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert sum(counts.values()) == 8 * 150
        snapshot = batcher.snapshot()
        assert (snapshot["requests"], snapshot["sequences"], snapshot["tokens"]) == (0, 0, 0)
        for name in ("cancelled", "expired", "failed"):
            assert value(batcher, f"{name}_total") == counts[name]
        assert snapshot["total_answers"] == counts["answered"] > 0
        assert batcher.drain(SOON) is True


def test_ten_times_the_load_is_refused_in_part_and_nothing_accepted_is_lost_by_the_drain():
    """Clients offer ten times what is served; then the server stops under that load."""
    gate, limits = Gate(seconds=0.01), QueueLimits(max_requests=64, max_tokens=4000)
    with serving(gate, queue=limits, batch=BatchLimits(max_rows=400)) as batcher:
        accepted, refused = [], [0] * 8

        def client(number: int) -> None:
            rng = np.random.default_rng(number)
            while True:
                ids = rng.integers(0, 500, 40).tolist()
                try:
                    accepted.append((ids, submit(batcher, ids)))
                except Overloaded:
                    refused[number] += 1
                    time.sleep(0.0002)
                except Draining:
                    return
                snapshot = batcher.snapshot()
                assert snapshot["requests"] <= limits.max_requests
                assert snapshot["tokens"] <= limits.max_tokens

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert batcher.health() is None
        assert batcher.drain(SOON) is True
        for thread in threads:
            thread.join(SOON)
        assert sum(refused) > len(accepted) > 100
        assert all(future.result(0).results == [sum(ids)] for ids, future in accepted)
        assert sum(map(len, gate.batches)) == len(accepted)


# Processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_is_refused_in_the_child_and_leaves_the_parent_alone():
    with serving(Gate()) as batcher:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                submit(batcher, [1])
            except EngineDead as error:
                batcher.stop()
                status = 0 if "make one after the fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert submit(batcher, [1]).result(SOON).results == [1]


LEFT = """
import threading, sys, os, signal
sys.path.insert(0, "tests")
from helpers.served import Gate, MadeDevice, submit
from radix_ops.serve.batcher import Batcher
batcher = Batcher(MadeDevice())
batcher.register("sum", Gate(seconds=0.05))
batcher.start()
batcher.wait_until_ready(20)
future = submit(batcher, [1])
END
"""


@pytest.mark.parametrize(
    "end",
    [
        "future.result(20); print('answered')",
        "sys.exit()",
        "raise ValueError",
        "os.kill(os.getpid(), signal.SIGINT); future.result(20)",
    ],
)
def test_a_program_ends_without_a_stop(end):
    """Whatever ends it, no thread of the batcher keeps it alive."""
    found = run_python("-c", LEFT.replace("END", end))
    assert "Fatal" not in found.stderr
    assert found.returncode == {"raise": 1, "os.ki": -signal.SIGINT}.get(end[:5], 0)
