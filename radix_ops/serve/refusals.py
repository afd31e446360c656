"""The reasons why a request gets no answer, as exceptions; whatever speaks HTTP gives each its status and shape.

Inputs that can't be used are the engine's UserError.
"""

from __future__ import annotations


class Refused(Exception):
    """A request that gets no answer; the message is one plain sentence for the client."""

    status: int  # of HTTP


class Overloaded(Refused):
    """The queue is full; `retry_after` is the whole seconds after which there will be room, 1 at least."""

    status = 429

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(Refused):
    """A request that would not fit into an empty queue."""

    status = 413


class NotServing(Refused):
    """A server that accepts nothing: it loads, drains or has stopped."""

    status = 503


class Loading(NotServing):
    """The model is being loaded."""


class Draining(NotServing):
    """The server finishes what it accepted, and stops."""


class EngineDead(NotServing):
    """The thread that computes has stopped; the cause is why."""


class Expired(Refused):
    """The request's time was over before its answer was there."""

    status = 504


class Failed(Refused):
    """The computation failed for this request alone; the cause is why."""

    status = 500
