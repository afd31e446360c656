"""What a server is told: names, limits and keys."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from ..engine.errors import UserError

MOST_KEY_BYTES = 1024


@dataclass(frozen=True)
class Settings:
    """The options of a server; those of its engine and its batcher are theirs."""

    names: tuple[str, ...] = ()  # of the model in requests and replies, the first in replies; by default its own
    keys: tuple[bytes, ...] = field(default=(), repr=False)  # API keys, one of which a request must bring
    max_body: int = 16 * 2**20  # bytes of a request's body
    max_bodies: int = 2**28  # bytes of all requests' bodies that are held at once; more gets 429
    max_inputs: int = 1024  # texts, pairs or documents of a request
    max_numbers: int = 2**25  # of an answer: what hidden states, or log-probabilities of labels, take in memory
    max_depth: int = 8  # arrays and objects inside each other in a body
    request_timeout: float = 60.0  # seconds from a request's arrival to its answer
    shutdown_grace: float = 30.0  # seconds for what was accepted when the server stops
    warm_up: bool = False  # run batches of several sizes before the server is ready

    def __post_init__(self):
        for name in ("max_body", "max_bodies", "max_inputs", "max_numbers", "max_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number from 1, got {value!r}")
        for name in ("request_timeout", "shutdown_grace"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be more than 0 seconds, got {getattr(self, name)!r}")

    def admits(self, key: bytes | None) -> bool:
        """Return whether a request with this key may go on; it takes as long whichever key is right, or none."""
        if not self.keys:
            return True
        given = (key or b"")[:MOST_KEY_BYTES]
        found = False
        for known in self.keys:
            found |= hmac.compare_digest(known, given)
        return found and key is not None


def keys_of(text: str, where: str) -> tuple[bytes, ...]:
    """Return the API keys of a file's text: one a line, without blank lines and those that open with #. UserError for
    a file without keys and for a key that no header can hold."""
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not keys:
        raise UserError(f"{where} holds no key; it must have one a line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable() and " " not in key) or len(key) > MOST_KEY_BYTES:
            raise UserError(
                f"{where}: key {number} must be of printable ASCII without spaces, {MOST_KEY_BYTES} bytes at most"
            )
    return tuple(key.encode("ascii") for key in keys)
