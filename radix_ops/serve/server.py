"""A server: an engine with its batcher, and what its routes have to know of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from fastapi import Request

from ..engine._engine import Engine
from ..engine.computing import max_length
from .batcher import Batcher
from .device import EngineDevice
from .inputs import shown
from .limits import BatchLimits, QueueLimits
from .metrics import Metrics
from .refusals import Draining, EngineDead, Loading
from .settings import Settings
from .shapes import Unusable
from .tasks import Call, Tasks

_LEAST_ROWS, _WARM_ROWS, _WARM_CALLS = 8, 2048, 3  # a graph is captured when its size comes again


class Server:
    """An engine that serves. It loads its weights on its own thread, after `start`."""

    def __init__(self, engine: Engine, settings: Settings, queue: QueueLimits, batch: BatchLimits):
        self.engine, self.settings, self.queue = engine, settings, queue
        self.names = settings.names or (engine.name,)
        self.metrics = Metrics()
        self.on_loaded: Callable[[], object] | None = None  # called once the weights are there, on the engine's thread
        self.batcher = Batcher(
            EngineDevice(engine), queue=queue, batch=batch, metrics=self.metrics, warm_up=self._loaded
        )
        self.tasks = Tasks(engine, self.batcher, settings.max_numbers)
        self.started = time.time()
        self._lock = threading.Lock()
        self._is_started = False

    def start(self) -> None:
        """Start loading and serving, if that has not begun."""
        with self._lock:
            if not self._is_started:
                self._is_started = True
                self.batcher.start()

    def _loaded(self) -> None:
        if self.settings.warm_up:
            self._warm_up()
        if self.on_loaded is not None:
            self.on_loaded()

    def _warm_up(self) -> None:
        """Run batches of sequences of several lengths, so that graphs and kernels of small batches are made."""
        runner, longest = self.engine.runner, min(_WARM_ROWS, self.max_length() or _WARM_ROWS)
        size = _LEAST_ROWS
        while size <= longest:
            ids = np.arange(size, dtype=np.int32) % runner.vocab_size
            for _ in range(_WARM_CALLS):
                runner.states([ids, np.roll(ids, 1)])
            size *= 2

    @property
    def name(self) -> str:
        """The model's name in replies."""
        return self.names[0]

    @property
    def device(self) -> str:
        return self.engine.device.type

    def check_task(self, request: Request, *tasks: str) -> None:
        """Unusable where the server's task is none of these; NotServing where it serves nothing."""
        if self.engine.task not in tasks:
            wanted = " or ".join(tasks)
            raise Unusable(
                "no_route", f"{request.url.path} is for servers of --task {wanted}; this one's is {self.engine.task}"
            )
        self.check_serving()

    def check_serving(self) -> None:
        """NotServing where the server serves nothing."""
        state = self.batcher.state
        if state in ("new", "loading"):
            raise Loading("the model is being loaded; ask again in a moment")
        if state == "dead":
            raise EngineDead("the server's engine has stopped; its log says why")
        if state != "ready":
            raise Draining("the server is stopping and takes no more requests")

    def check_model(self, name: str | None) -> None:
        """Unusable where a request asks for another model than the server's."""
        if name is not None and name not in self.names:
            raise Unusable(
                "no_model",
                f"the model {shown(name)} is not served here; {' and '.join(map(repr, self.names))} is",
                "model",
            )

    def call(self, request: Request, truncate: bool | None = None, salt: str | None = None) -> Call:
        """Return a request on its way."""
        deadline = request.state.arrived + self.settings.request_timeout
        return Call(salt=salt or "", deadline=deadline, truncate=bool(truncate))

    @property
    def vocab_size(self) -> int:
        return self.engine.runner.vocab_size

    def max_length(self) -> int | None:
        """Return the most tokens of a text, None where nothing says it."""
        return max_length(self.engine)

    def facts(self) -> Mapping[str, Any]:
        """Return what the page at / says of the server."""
        engine = self.engine
        return {
            "model": self.name, "names": list(self.names), "task": engine.task, "folded": not engine.plain,
            "max_length": self.max_length(), "max_inputs": self.settings.max_inputs, "state": self.batcher.state,
            "needs_key": bool(self.settings.keys),
        }  # fmt: skip


def server_of(request: Request) -> Server:
    return request.app.state.server
