"""`radix-ops serve`: a server until a signal stops it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket as sockets
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from ..engine.errors import UserError
from .app import create_app
from .finding import find_engine, find_task
from .limits import BatchLimits, QueueLimits
from .logs import json_logs
from .settings import Settings, keys_of

_logger = logging.getLogger("radix_ops.serve")
_BACKLOG = 2048  # connections that wait to be taken
_MOST_FILE_BYTES = 2**20  # of API keys


def run(args: Any) -> None:
    """Serve as the arguments of `radix-ops serve` say, until SIGTERM or SIGINT.

    UserError for options and models that can't be used, before a port is opened.
    """
    app = make_app(args)
    server = app.state.server
    with json_logs(args.quiet):
        listener = listener_at(args.host, args.port)
        host, port = listener.getsockname()[:2]
        _logger.info(
            "listening",
            extra={"fields": {"host": host, "port": port, "task": server.engine.task, "model": server.name}},
        )
        try:
            Uvicorn(app, server.settings).run(sockets=[listener])
        finally:
            gc.unfreeze()  # else libraries say at the exit that something leaked


def make_app(args: Any) -> FastAPI:
    """Return the application that the arguments of `radix-ops serve` describe. UserError for what can't be used."""
    if args.threads:
        torch.set_num_threads(args.threads)
    task = args.task or find_task(args.model, args.trust_remote_code)
    options = {
        name: getattr(args, name)
        for name in (
            "pooling", "prompt", "prompt_name", "template", "max_length", "device", "dtype", "token_budget", "plain",
            "trust_remote_code",
        )
    }  # fmt: skip
    engine = find_engine(task, args.model, options)
    settings = Settings(
        names=tuple(args.served_model_name or ()),
        keys=_keys(args.api_key_file) if args.api_key_file else (),
        max_body=args.max_body,
        max_inputs=args.max_inputs,
        request_timeout=args.request_timeout,
        shutdown_grace=args.shutdown_grace,
        warm_up=args.warm_up,
    )
    app = create_app(
        engine,
        settings,
        queue=QueueLimits(max_requests=args.max_queued_requests, max_tokens=args.max_queued_tokens),
        batch=BatchLimits(max_overtakes=args.max_overtakes),
    )
    app.state.server.on_loaded = _settle
    return app


def _settle() -> None:
    """Let no garbage collection look at what was loaded again: full ones took two thirds of the time of queueing."""
    gc.collect()
    gc.freeze()


def _keys(path: str) -> tuple[bytes, ...]:
    try:
        if os.path.getsize(path) > _MOST_FILE_BYTES:
            raise UserError(f"--api-key-file {path} has more than {_MOST_FILE_BYTES:,} bytes")
        return keys_of(Path(path).read_text(encoding="utf-8"), f"--api-key-file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def listener_at(host: str, port: int) -> sockets.socket:
    """Return a socket that listens at the address. UserError where it can't be had."""
    try:
        found = sockets.getaddrinfo(
            host, port, type=sockets.SOCK_STREAM, proto=sockets.IPPROTO_TCP, flags=sockets.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which holds answers back for 40 ms, where the protocol says TCP.
        listener = sockets.socket(family, kind, protocol)
        listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} can't be listened at: {error.strerror or error}") from error
    return listener


class Uvicorn(uvicorn.Server):
    """Uvicorn, whose first signal drains: the port stays open and says 503 until what was accepted is answered."""

    def __init__(self, app: Any, settings: Settings):
        grace = settings.shutdown_grace
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=75,
                timeout_graceful_shutdown=int(grace) + 1,
            )
        )  # fmt: skip
        self._batcher, self._grace = app.state.server.batcher, grace
        self._draining, self._tasks = False, list[asyncio.Task]()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or not self.started:
            super().handle_exit(sig, frame)
            return
        _logger.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
        self._draining = True
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: self._tasks.append(loop.create_task(self._drain())))

    async def _drain(self) -> None:
        drained = await asyncio.to_thread(self._batcher.drain, self._grace)
        _logger.info("stopping", extra={"fields": {"drained": drained}})
        self.should_exit = True
