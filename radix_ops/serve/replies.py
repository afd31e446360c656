"""Answers as bytes: JSON with arrays of numbers, base64, and what a request took as headers."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from starlette.responses import Response

from .tasks import Call


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer; arrays in it are of floats, whose shortest decimals read back as them."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, "application/json")


def answer(request: Request, call: Call, content: Any) -> Response:
    """Return the answer to a request, with what it took in headers, times in milliseconds as TEI has them."""
    times = call.timings
    headers = {
        "x-compute-type": request.app.state.server.device,
        "x-compute-characters": str(call.characters),
        "x-compute-tokens": str(times.tokens),
        "x-compute-rows": str(call.rows),
        "x-total-time": _milliseconds(time.monotonic() - request.state.arrived),
        "x-tokenization-time": _milliseconds(times.tokenised),
        "x-queue-time": _milliseconds(times.queued),
        "x-inference-time": _milliseconds(times.computed),
    }
    headers["x-compute-time"] = headers["x-total-time"]
    if call.num_cut:
        headers["x-truncated"] = str(call.num_cut)
        request.app.state.server.metrics.truncated.inc(call.num_cut)
    request.state.call = call
    return json(content, headers=headers)


def vector(row: np.ndarray, encoding: str) -> Any:
    """Return float32 numbers as an array of floats, or as the base64 of their bytes, the lowest first."""
    if encoding == "base64":
        return base64.b64encode(np.ascontiguousarray(row, "<f4")).decode("ascii")
    return row


def usage(tokens: int, completed: int | None = None) -> dict[str, int]:
    """Return how many tokens a request had; `completed` of those that it was given are new."""
    found = {"prompt_tokens": tokens, "total_tokens": tokens + (completed or 0)}
    return found if completed is None else found | {"completion_tokens": completed}


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return what answers of OpenAI's kind open with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"
