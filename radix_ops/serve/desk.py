"""The desk: requests come in and are counted, and each is answered, refused or let go once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..plan.waiting import Piece
from .limits import QueueLimits
from .machine import Computed
from .metrics import Metrics
from .queue import Queue, Request
from .refusals import Expired, Failed, Overloaded, Refused, TooLarge
from .status import Status
from .work import Answer


class Desk:
    """The queue behind its lock, and the futures of all that is in it. Threads may share it.

    lock: held for every look at `queue`. changed: notified when nothing is left to answer.
    """

    def __init__(self, limits: QueueLimits, max_overtakes: int, metrics: Metrics):
        self.lock = threading.RLock()  # a signal's handler may come to the desk again
        self.changed = threading.Condition(self.lock)
        self.queue = Queue(limits, max_overtakes)
        self.status = Status()
        self._metrics = metrics
        metrics.accepted_requests.set_function(lambda: self.queue.requests)
        metrics.accepted_tokens.set_function(lambda: self.queue.tokens)

    def admit(self, request: Request, seconds_of: Callable[[int], float]) -> None:
        """Accept a request, and drop it when its future is cancelled. Errors are those of `Queue.admit`."""
        with self.lock:
            self.queue.admit(request, seconds_of)
        request.future.add_done_callback(lambda future: self._cancelled(request))

    def put(self, request: Request, pieces: list[Piece], seconds_of: Callable[[int], float]) -> None:
        """Let an encoded request wait for a batch; one of no sequences is answered. Errors are those of `Queue.put`."""
        request.queued_at = time.monotonic()
        request.timings.tokenised = request.queued_at - request.submitted
        with self.lock:
            self.queue.put(request, pieces, seconds_of)
        self._metrics.tokenize_seconds.observe(request.timings.tokenised)
        if not pieces:
            self._finish(request)

    def take(self, done: Computed) -> None:
        """Take what was computed of a batch, and answer the requests that are complete by it."""
        batch = done.batch
        if done.error is not None:
            self.fail(batch.pieces[0].owner, done.error)
            return
        self._metrics.observe_batch(batch.rows, batch.tokens, len(batch), done.ended - done.started)
        self.status.add_batch(batch.rows, batch.tokens)
        for piece, added, result in zip(batch.pieces, batch.added, done.results, strict=True):
            request = piece.owner
            found = request.results  # before the look at whether it is over, which empties it
            if request.is_over:
                continue
            found[piece.place] = result
            request.timings.rows += added
            request.timings.computed = done.ended - request.started_at
            request.missing -= 1
            if not request.missing:
                self._finish(request)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error, unless it has ended."""
        if not self._settles(request):
            return
        if isinstance(error, (Overloaded, TooLarge)):
            self.count_rejected(error)
        elif isinstance(error, Expired):
            self._metrics.expired.inc()
        elif isinstance(error, Failed):
            self._metrics.failed.inc()
        request.future.set_exception(error)

    def fail_all(self, error: Refused) -> None:
        """End all requests with an error."""
        with self.lock:
            left = self.queue.live()
        for request in left:
            self.fail(request, error)

    def count_rejected(self, error: Refused) -> None:
        """Count a request that wasn't accepted."""
        self._metrics.rejected.labels(type(error).__name__.lower()).inc()

    def _finish(self, request: Request) -> None:
        work, timings = request.work, request.timings
        if work is None:
            return
        answer = Answer(work, request.results, timings)
        if self._settles(request):
            self._metrics.queue_seconds.observe(timings.queued)
            self._metrics.compute_seconds.observe(timings.computed)
            self.status.add_latency(time.monotonic() - request.submitted)
            request.future.set_result(answer)

    def _settles(self, request: Request) -> bool:
        """Return whether the future is the caller's to settle: once, and not where it was cancelled."""
        with self.lock:
            if not self.queue.release(request):
                return False
            self._tell_if_empty()
        if not request.future.set_running_or_notify_cancel():
            self._metrics.cancelled.inc()
            return False
        return True

    def _cancelled(self, request: Request) -> None:
        with self.lock:
            if self.queue.release(request):  # nobody has settled it
                self._metrics.cancelled.inc()
                self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if not self.queue.requests:
            self.changed.notify_all()
