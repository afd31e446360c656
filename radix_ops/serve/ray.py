"""The server on Ray Serve: replicas of one model, as many as the load asks for.

    serve run radix_ops.serve.ray:deployment model=Qwen/Qwen3-Embedding-0.6B

It needs the extra `serve-ray`: pip install --no-build-isolation '.[serve-ray]'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from .._extras import require

require("ray", "serve-ray", "radix_ops.serve.ray", least="2.60")

import ray  # noqa: E402
import torch  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from ray import serve  # noqa: E402
from starlette.datastructures import MutableHeaders  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from radix_ops_command import UsageError, options_of  # noqa: E402

from ..engine.errors import UserError  # noqa: E402
from ._command import make_app  # noqa: E402
from .logs import json_logs  # noqa: E402

NAME = "radix_ops"
_MARGIN = 10.0  # seconds that Ray waits for a replica beyond the time that it takes itself to stop
_RETRY_AFTER = 1.0  # seconds


def deployment(args: dict[str, Any]) -> serve.Application:
    """Return the application for `serve run`, for a config file's `import_path` and for `serve.run`.

    Each replica is the server that `radix-ops serve` runs. It takes requests once its model is loaded, is started anew
    where its /health is bad, and answers what it accepted before it stops.

    Args:
        args: options of `radix-ops serve` by their names, like model and token_budget, but for host and port, which
            are Ray's. Those that are missing may come from the environment. Under "ray" stand options of Ray's
            deployment, like num_replicas, autoscaling_config and ray_actor_options. By default a replica has one GPU,
            where the cluster has any and device is not "cpu".

    UserError for options that can't be used.
    """
    values = dict(args)
    options = values.pop("ray", None) or {}
    if not isinstance(options, Mapping):
        raise UserError(f"ray must be options of Ray's deployment by their names, got {options!r}")
    for name in ("host", "port"):
        if name in values:
            raise UserError(f"{name} is Ray's to say, by its HTTP options; got {values[name]!r}")
    try:
        given = options_of("serve", values, "the arguments")
    except UsageError as error:
        raise UserError(str(error)) from error
    actor = {"num_cpus": given.threads or 1, "num_gpus": int(_wants_gpu(given.device))}
    chosen: dict[str, Any] = {
        "name": NAME,
        # The replica's own queue makes its batches, so Ray holds back what exceeds that queue alone.
        "max_ongoing_requests": given.max_queued_requests,
        "max_queued_requests": given.max_queued_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": _RETRY_AFTER},
        "graceful_shutdown_timeout_s": given.shutdown_grace + _MARGIN,
        **options,
        "ray_actor_options": actor | dict(options.get("ray_actor_options") or {}),
    }
    try:
        found = serve.deployment(_Replica).options(**chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"ray: {error}") from error
    return found.bind(given)


def _wants_gpu(device: str | None) -> bool:
    if device is not None:
        return device.startswith("cuda")
    return ray.cluster_resources().get("GPU", 0) > 0 if ray.is_initialized() else torch.cuda.is_available()


@serve.ingress()
class _Replica:
    """A server in a process of Ray's."""

    def __init__(self, args: Any):
        self._args = args
        self._logs = json_logs(args.quiet)  # until the process ends

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, whose model is loaded. Ray calls it before the replica takes requests."""
        self._logs.__enter__()
        args, has_gpu = self._args, bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        if _wants_gpu(args.device) and not has_gpu:
            raise UserError(
                f"Ray gives the replica no GPU, and device is {args.device or 'cuda, as the cluster has GPUs'}; set "
                "num_gpus in ray_actor_options to 1, or device to cpu"
            )
        args.device = args.device or ("cuda" if has_gpu else "cpu")
        app = await asyncio.to_thread(make_app, args)
        app.add_middleware(_Named, name=serve.get_replica_context().replica_id.unique_id)
        self._server = app.state.server
        self._server.start()
        await asyncio.to_thread(self._server.batcher.wait_until_ready)
        return app

    async def check_health(self) -> None:
        """Raise RuntimeError where /health is bad: Ray starts another replica then."""
        reason = self._server.batcher.health()
        if reason is not None:
            raise RuntimeError(reason)


class _Named:
    """Names the replica in each answer's header x-replica."""

    def __init__(self, app: ASGIApp, name: str):
        self._app, self._name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica"] = self._name
            await send(message)

        await self._app(scope, receive, sending)
