"""Bodies of requests: JSON of bounded size and depth, of which memory holds a bounded sum."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import orjson
from fastapi import Request

from .refusals import Expired, Overloaded
from .settings import Settings
from .shapes import Unusable

T = TypeVar("T")
_CONTAINERS = {list, dict}


class Bodies:
    """The bodies that are being read or answered; together they have `most` bytes at most. For one event loop."""

    def __init__(self, most: int):
        self._most, self._held = most, 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of a body, which are held until the end. It raises Overloaded where they
        are too many."""
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if self._held + size > self._most:
                raise Overloaded(f"the bodies of all requests have more than {self._most:,} bytes", 1)
            self._held, own = self._held + size, own + size

        try:
            yield hold
        finally:
            self._held -= own


class JSONRequest(Request):
    """A request whose body is JSON; `hold` counts its bytes before they are kept."""

    def __init__(self, scope: Any, receive: Any, settings: Settings, hold: Callable[[int], None]):
        super().__init__(scope, receive)
        self._settings, self._hold = settings, hold

    async def body(self) -> bytes:
        """Return the body. Unusable for one that is too large."""
        if not hasattr(self, "_body"):
            length = self.headers.get("content-length", "")
            if length.isdecimal() and int(length) > self._settings.max_body:
                raise self._too_large()
            parts, size = [], 0
            async for part in self.stream():
                size += len(part)
                if size > self._settings.max_body:
                    raise self._too_large()
                self._hold(len(part))
                parts.append(part)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        """Return the body's value. Unusable for what is no JSON, and for arrays and objects too deep."""
        if not hasattr(self, "_json"):
            self._json = parsed(await self.body(), self._settings.max_depth)
        return self._json

    def _too_large(self) -> Unusable:
        return Unusable("too_large", f"the body has more than {self._settings.max_body:,} bytes; send it in parts")


async def in_time(reading: Awaitable[T], seconds: float) -> T:
    """Return what is read. Expired where that takes longer."""
    try:
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError as error:
        raise Expired(f"the body was not there within {seconds:g} seconds") from error


def parsed(body: bytes, max_depth: int) -> Any:
    """Return the value of a JSON text. Unusable for anything else, and for arrays and objects too deep."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unusable("malformed", f"the body is no JSON: {error}") from error
    if body.count(b"[") + body.count(b"{") > max_depth and _is_deeper(value, max_depth):
        raise Unusable("invalid", f"the body has arrays or objects more than {max_depth} deep")
    return value


def _is_deeper(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(most):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        # Lists of thousands of ids are passed over by the types in them.
        deep = (values for values in inner if _CONTAINERS & set(map(type, values)))
        level = [x for values in deep for x in values if type(x) in _CONTAINERS]
    return bool(level)
