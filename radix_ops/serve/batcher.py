"""The batcher: requests of many clients become batches in which shared prefixes are computed once.

    batcher = Batcher(EngineDevice(engine))
    batcher.register("embed", compute)
    batcher.start()
    answer = await batcher.ask("embed", encode, Size.of_texts(texts))

A request is counted and refused before anything is done for it; tokenised on a thread of a pool; chosen and folded by
the planning thread, while the batch before it is computed; computed by the engine's thread; and answered by a fourth,
so that the engine's goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue as queues
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeAlias

from .desk import Desk
from .device import Device
from .limits import BatchLimits, QueueLimits
from .machine import Computed, Machine, Prepared
from .metrics import Metrics
from .queue import Batch, Request
from .refusals import Draining, EngineDead, Expired, Loading, NotServing, Overloaded, TooLarge
from .work import Answer, Compute, Size, Work

State: TypeAlias = Literal["new", "loading", "ready", "draining", "stopped", "dead"]

_TOKENIZERS = 2  # threads
_LONGEST_WAIT = 3600.0  # seconds; threads can't wait for ever, as a deadline may
_JOIN, _JOIN_LOADING = 30.0, 1.0  # seconds that a stop waits for a batch that is computed, and for a load

_logger = logging.getLogger(__name__)


class Batcher:
    """Batches requests by prefix, and computes them on one thread.

    Threads and event loops may share it, but not processes: after a fork it serves the parent alone.

    queue, batch: the limits. metrics: where it counts. warm_up: runs on the engine's thread before it is ready.
    """

    def __init__(
        self,
        device: Device,
        *,
        queue: QueueLimits | None = None,
        batch: BatchLimits | None = None,
        metrics: Metrics | None = None,
        warm_up: Callable[[], object] | None = None,
    ):
        self.metrics = metrics or Metrics()
        self._device, self._warm_up = device, warm_up
        limits = batch or BatchLimits()
        self._machine = Machine(device, limits, self.metrics)
        self._state: State = "new"
        self._cause: BaseException | None = None
        self._process = os.getpid()
        self._desk = Desk(queue or QueueLimits(), limits.max_overtakes, self.metrics)
        self._lock = self._desk.lock
        self._to_plan, self._to_compute = threading.Condition(self._lock), threading.Condition(self._lock)
        self._slot: Prepared | None = None
        self._is_loaded = False
        self._done: queues.SimpleQueue[Computed | None] = queues.SimpleQueue()
        self._pool = ThreadPoolExecutor(_TOKENIZERS, "radix-tokenize")
        self._threads = [
            threading.Thread(target=target, name=f"radix-{name}", daemon=True)
            for name, target in (("engine", self._engine), ("plan", self._plan), ("answer", self._answer))
        ]

    def register(self, kind: str, compute: Compute) -> None:
        """Let requests of a kind be computed so; those of one kind share batches."""
        self._machine.computes[kind] = compute

    # The life of the batcher

    @property
    def state(self) -> State:
        """Return "new", "loading", "ready", "draining", "stopped", or "dead" where the engine's thread has ended."""
        return self._state

    @property
    def ready(self) -> bool:
        """Return whether requests are accepted."""
        return self._state == "ready"

    def start(self) -> None:
        """Start the threads, which load the model; requests are accepted once it is there."""
        with self._lock:
            if self._state != "new":
                raise RuntimeError(f"the batcher is {self._state}; it starts once")
            self._state = "loading"
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until the model is loaded. Return whether requests are accepted; EngineDead where loading failed."""
        with self._lock:
            self._desk.changed.wait_for(lambda: self._state != "loading", timeout)
            if self._state == "dead":
                raise EngineDead("the model could not be loaded") from self._cause
            return self.ready

    def drain(self, grace: float | None = None) -> bool:
        """Accept nothing more, wait until all that was accepted is answered, `grace` seconds at most, and stop.

        Return whether all was answered; what wasn't then fails with Draining.
        """
        if os.getpid() != self._process:
            return False
        with self._lock:
            if self._state in ("loading", "ready"):
                self._state = "draining"
                self.metrics.is_ready.set(0)
            self._desk.changed.wait_for(lambda: not self._desk.queue.requests or self._state != "draining", grace)
            is_done = not self._desk.queue.requests
        self.stop()
        return is_done

    def stop(self) -> None:
        """Stop at once: what has no answer fails with Draining. A batch that is computed is waited for, not a load."""
        if os.getpid() != self._process:
            return  # its threads, and perhaps one that holds the lock, are the parent's
        with self._lock:
            was_running = self._state in ("loading", "ready", "draining", "dead")
            if self._state != "dead":
                self._state = "stopped"
            self.metrics.is_ready.set(0)
            self._wake()
        self._desk.fail_all(Draining("the server has stopped"))
        atexit.unregister(self.stop)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._done.put(None)
        if was_running:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(_JOIN if self._is_loaded else _JOIN_LOADING)

    def __enter__(self) -> Batcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def health(self) -> str | None:
        """Return what is wrong, in a sentence, or None."""
        with self._lock:
            if self._state == "dead":
                return f"the engine's thread has ended: {type(self._cause).__name__}"
        return self._machine.health()

    # Requests

    def submit(
        self,
        kind: str,
        encode: Callable[[], Work],
        size: Size,
        *,
        salt: str = "",
        deadline: float | None = None,
    ) -> Future[Answer]:
        """Accept a request, and return the future of its answer, whose `cancel` drops the request.

        Args:
            kind: one that was registered.
            encode: makes the token sequences, on another thread. Its exceptions are the future's.
            size: what that is thought to be.
            salt: requests of different salts share no computation.
            deadline: on time.monotonic(): when nobody wants the answer any more.

        Raises Overloaded, TooLarge, Loading, Draining and EngineDead at once. The future raises Expired past the
        deadline; Failed where the computation fails for this request alone; TooLarge and Overloaded where it holds more
        than its size said; Draining and EngineDead where the server ends before the answer.
        """
        if kind not in self._machine.computes:
            raise ValueError(
                f"kind must be one of {', '.join(map(repr, self._machine.computes)) or 'none'}, got {kind!r}"
            )
        if os.getpid() != self._process:
            raise EngineDead(
                "the batcher belongs to the process that this one was forked from; make one after the fork"
            )
        request = Request(kind, encode, size, salt.encode(), deadline, time.monotonic())
        try:
            with self._lock:
                self._check_accepts()
                self._desk.admit(request, self._machine.seconds_of)
                if deadline is not None and deadline == self._desk.queue.next_deadline:
                    self._to_plan.notify()
        except (NotServing, Overloaded, TooLarge) as error:
            self._desk.count_rejected(error)
            raise
        try:
            self._pool.submit(self._encode, request)
        except RuntimeError:  # the pool was shut down meanwhile
            self._desk.fail(request, Draining("the server has stopped"))
        return request.future

    async def ask(
        self, kind: str, encode: Callable[[], Work], size: Size, *, salt: str = "", deadline: float | None = None
    ) -> Answer:
        """Return the answer of a request, as `submit`; a task that is cancelled drops the request."""
        return await asyncio.wrap_future(self.submit(kind, encode, size, salt=salt, deadline=deadline))

    def snapshot(self) -> dict:
        """Return counts and times of the moment, for people to look at."""
        with self._lock:
            queue = {
                "state": self._state,
                "requests": self._desk.queue.requests,
                "sequences": self._desk.queue.sequences,
                "tokens": self._desk.queue.tokens,
            }
        return queue | self._machine.snapshot() | self._desk.status.snapshot()

    def _check_accepts(self) -> None:
        match self._state:
            case "new" | "loading":
                raise Loading("the model is being loaded; try again later")
            case "draining" | "stopped":
                raise Draining("the server is shutting down")
            case "dead":
                raise EngineDead("the server's engine has stopped") from self._cause

    def _encode(self, request: Request) -> None:
        encode = request.encode
        if request.is_over or encode is None:
            return
        try:
            work = encode()
            work.check(self._device.vocab_size)
            self._desk.put(request, request.prepare(work), self._machine.seconds_of)
        except BaseException as error:  # whatever it is, it is the request's
            self._desk.fail(request, error)
            return
        with self._lock:
            self._to_plan.notify()

    # The planning thread

    def _plan(self) -> None:
        try:
            while self._plan_one():
                pass
        except BaseException as error:
            self._die(error)

    def _plan_one(self) -> bool:
        """Choose and fold a batch, or end the requests whose time is over. Return False at the end."""
        batch: Batch | None = None
        expired: list[Request] = []
        with self._lock:
            while batch is None and not expired:
                if self._state in ("stopped", "dead"):
                    return False
                now = time.monotonic()
                expired = self._desk.queue.expired(now)
                until, deadline = _LONGEST_WAIT, self._desk.queue.next_deadline
                if deadline is not None:
                    until = min(until, deadline - now)
                if not expired and self._slot is None and len(self._desk.queue):
                    turn = self._machine.time_to_plan()
                    until = min(until, turn - now)
                    if turn <= now:
                        batch = self._desk.queue.choose(self._machine.bounds)
                if batch is None and not expired:
                    self._to_plan.wait(max(0.0, until))
        for request in expired:
            self._desk.fail(request, Expired("the request's time was over before its answer was there"))
        if batch is not None:
            prepared = self._machine.prepare(batch)
            with self._lock:
                self._slot = prepared
                self._to_compute.notify()
        return True

    # The engine's thread

    def _engine(self) -> None:
        try:
            with self._machine.open():
                if self._warm_up:
                    self._warm_up()
                with self._lock:
                    self._is_loaded = True
                    self._desk.queue.settle(self._device.folded, self._device.keeps_salts)
                    if self._state == "loading":
                        self._state = "ready"
                        self.metrics.is_ready.set(1)
                    self._desk.changed.notify_all()
                while (prepared := self._next()) is not None:
                    for computed in self._machine.compute(prepared):
                        self._done.put(computed)
        except BaseException as error:
            self._die(error)

    def _next(self) -> Prepared | None:
        """Wait for the next batch of requests that aren't over; None at the end."""
        while True:
            with self._lock:
                self._machine.rest()
                self._to_plan.notify()
                self._to_compute.wait_for(lambda: self._slot is not None or self._state in ("stopped", "dead"))
                if self._slot is None or self._state in ("stopped", "dead"):
                    return None
                prepared, self._slot = self._slot, None
                live = prepared.batch.live()
                if not len(live):
                    continue
                self._machine.start(live)
                self._to_plan.notify()
            return prepared if live is prepared.batch else self._machine.prepare(live)

    # Answers

    def _answer(self) -> None:
        try:
            while (done := self._done.get()) is not None:
                self._desk.take(done)
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self._state != "stopped":
                self._state, self._cause = "dead", error
            self.metrics.is_ready.set(0)
            self._wake()
        _logger.error("the engine has stopped", exc_info=error)
        self._desk.fail_all(EngineDead("the server's engine has stopped"))

    def _wake(self) -> None:
        for condition in (self._to_plan, self._to_compute, self._desk.changed):
            condition.notify_all()
