"""The requests that were accepted, and the choice of those that make the next batch.

The oldest request is in every batch. Then come those that later ones have overtaken `max_overtakes` times, in the order
of their arrival, in half of the batch; then sequences that share a prefix with the batch; then the others in the order
of their arrival, each with those that share its prefix. So a request waits for `max_overtakes` batches at most, and
then as if half of each batch were filled in the order of arrival. Were it the whole batch, a queue that grew deeper
once would be served without regard to prefixes, which is slower, and so stay deep.

Nothing here waits, reads a clock or knows threads: whoever calls it holds a lock.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from ..plan.choice import Bounds, Choice
from ..plan.waiting import Piece, Waiting, shared_tokens
from .limits import QueueLimits
from .refusals import Overloaded, TooLarge
from .work import Answer, Size, Timings, Work

_DUE_SHARE = 0.5  # of a batch's rows, for those whose turn it is
_DEAD = 1024  # pieces of requests that ended, at which they are taken out at once


class Request:
    """A request from its acceptance to its answer."""

    def __init__(
        self, kind: str, encode: Callable[[], Work], size: Size, salt: bytes, deadline: float | None, submitted: float
    ):
        self.kind, self.size, self.salt, self.deadline, self.submitted = kind, size, salt, deadline, submitted
        self.encode: Callable[[], Work] | None = encode
        self.future: Future[Answer] = Future()
        self.number = -1  # of its first piece; tells when it joined the queue
        self.serial = -1  # tells when it was accepted
        self.is_over = False  # answered, failed, cancelled or expired: nobody waits for it
        self.has_failed = False  # as it will be told
        self.work: Work | None = None
        self.waiting: dict[int, Piece] = {}  # by place: pieces that no batch has taken
        self.results: list = []
        self.missing = 0
        self.timings = Timings()
        self.queued_at = self.started_at = 0.0

    def prepare(self, work: Work) -> list[Piece]:
        """Take what was encoded, and return its pieces."""
        pieces = [
            Piece(ids, self, place, salt=self.salt, extra=extra)
            for place, (ids, extra) in enumerate(zip(work.sequences, work.extras, strict=True))
        ]
        self.work, self.encode = work, None
        self.results, self.missing = [None] * len(pieces), len(pieces)
        self.timings.tokens = work.num_tokens
        self.waiting = dict(enumerate(pieces))
        return pieces

    def end(self) -> None:
        """Let go of what it holds."""
        self.is_over = True  # before the rest, which other threads read first
        self.encode, self.work, self.results, self.waiting = None, None, [], {}


@dataclass
class Batch:
    """Sequences of one kind that are computed together.

    pieces: in the order of salt and tokens. added: the rows that each adds to those chosen before it.
    """

    kind: str
    pieces: list[Piece]
    added: list[int]

    def __post_init__(self) -> None:
        self.rows, self.tokens = sum(self.added), sum(map(len, self.pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def live(self) -> Batch:
        """Return the batch of those pieces whose request isn't over; the same where all are."""
        lives = [not (piece.owner.is_over or piece.owner.has_failed) for piece in self.pieces]
        return self if all(lives) else self.part(i for i, alive in enumerate(lives) if alive)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the batch in two parts, neighbours together."""
        middle = len(self.pieces) // 2
        return self.part(range(middle)), self.part(range(middle, len(self.pieces)))

    def part(self, indices: Iterable[int]) -> Batch:
        """Return the batch of some of the pieces, in their order."""
        pieces = [self.pieces[i] for i in indices]
        shared = [0] * len(pieces)
        if self.rows < self.tokens:
            shared[1:] = map(shared_tokens, pieces, pieces[1:])
        return Batch(self.kind, pieces, [len(piece) - known for piece, known in zip(pieces, shared, strict=True)])


class _Group:
    """The requests that can stand in one batch."""

    def __init__(self, shares: bool):
        self.waiting = Waiting(shares)
        self.arrived: OrderedDict[int, Request] = OrderedDict()  # by number: those with pieces that wait
        self.dead: list[Piece] = []

    def sweep(self) -> None:
        self.waiting.remove(self.dead)
        self.dead = []


class Queue:
    """Accepted requests, counted from their acceptance to their end.

    requests, sequences, tokens: of all that is accepted, estimated until it is tokenised.
    """

    def __init__(self, limits: QueueLimits, max_overtakes: int):
        self.requests = self.sequences = self.tokens = 0
        self._limits, self._max_overtakes = limits, max_overtakes
        self.settle(folded=True, keeps_salts=True)
        self._live: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._groups: dict[tuple[str, bytes], _Group] = {}
        self._serial = self._number = 0
        self._youngest: list[int] = []  # a heap: of the batches so far, the largest of their youngest requests

    def settle(self, folded: bool, keeps_salts: bool) -> None:
        """Tell, before anything waits, whether shared prefixes save rows and whether batches may hold several salts."""
        self._folded, self._keeps_salts = folded, keeps_salts

    def __len__(self) -> int:
        """Return how many requests have sequences that wait."""
        return sum(len(group.arrived) for group in self._groups.values())

    def admit(self, request: Request, seconds_of: Callable[[int], float]) -> None:
        """Accept a request. TooLarge where it is beyond the limits alone, Overloaded where others are before it.

        seconds_of: tells how long so many tokens take.
        """
        self._check(request.size, self.requests + 1, seconds_of)
        self._count(request.size, 1)
        request.serial = self._serial
        self._serial += 1
        self._live[request.serial] = request
        if request.deadline is not None:
            if len(self._deadlines) > 2 * len(self._live) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.serial))

    def put(self, request: Request, pieces: list[Piece], seconds_of: Callable[[int], float]) -> None:
        """Let a request that is encoded wait for a batch. Errors are those of `admit`, for what it has turned out to
        hold; it must end then. One that ended meanwhile is left out."""
        if request.is_over:
            return
        size = Size(request.timings.tokens, len(pieces))
        self._count(request.size, -1)
        if size.tokens > request.size.tokens or size.sequences > request.size.sequences:
            try:
                self._check(size, self.requests + 1, seconds_of)
            except Exception:
                self._count(request.size, 1)
                raise
        request.size = size
        self._count(size, 1)
        key = (request.kind, b"" if self._keeps_salts else request.salt)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self._folded)
        request.number = self._number
        for piece in pieces:
            piece.number = self._number
            self._number += 1
            group.waiting.add(piece)
        if pieces:
            group.arrived[request.number] = request

    def release(self, request: Request) -> bool:
        """Take a request out, whatever became of it. Return False where it is out already."""
        if self._live.pop(request.serial, None) is None:
            return False
        self._count(request.size, -1)
        if request.waiting and request.number >= 0:
            group = self._groups[request.kind, b"" if self._keeps_salts else request.salt]
            del group.arrived[request.number]
            group.dead.extend(request.waiting.values())
            if len(group.dead) > _DEAD:
                group.sweep()
        request.end()
        return True

    def expired(self, now: float) -> list[Request]:
        """Return the requests whose time is over; each once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._live.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                found.append(request)
        return found

    @property
    def next_deadline(self) -> float | None:
        """When the next request's time is over, or one that has ended."""
        return self._deadlines[0][0] if self._deadlines else None

    def live(self) -> list[Request]:
        """Return all requests that are accepted."""
        return list(self._live.values())

    def choose(self, bounds_of: Callable[[str, int], Bounds]) -> Batch | None:
        """Take the next batch out of what waits; None where nothing does.

        bounds_of: tells the limits of a batch of a kind, by the tokens of its first sequence.
        """
        for key in list(self._groups):
            self._groups[key].sweep()
            if not self._groups[key].arrived:
                del self._groups[key]  # kinds are few, salts need not be
        if not self._groups:
            return None
        key = min(self._groups, key=lambda key: next(iter(self._groups[key].arrived)))
        group = self._groups[key]
        first = next(_pieces(group.arrived.values()))
        bounds = bounds_of(key[0], len(first))
        choice = Choice(group.waiting, bounds)
        self._take_first(choice, group)
        if bounds.max_padding is not None:
            choice.take_alike()
        choice.take_mates()
        for piece in _pieces(group.arrived.values()):
            if not choice.has(piece):
                if not choice.take(piece):
                    break
                choice.take_mates()
        return self._taken(choice, group, key[0])

    def _take_first(self, choice: Choice, group: _Group) -> None:
        """Take the oldest request and those whose turn it is."""
        due = self._due_below()
        for number, request in group.arrived.items():
            if choice.positions and number >= due:
                return
            if not all(choice.take(piece, _DUE_SHARE) for piece in request.waiting.values()):
                return

    def _due_below(self) -> int:
        """Return the number below which all requests have been overtaken as often as they may be."""
        if not self._max_overtakes:
            return self._number
        return self._youngest[0] if len(self._youngest) == self._max_overtakes else 0

    def _taken(self, choice: Choice, group: _Group, kind: str) -> Batch:
        order = sorted(range(len(choice)), key=choice.positions.__getitem__)
        pieces, added = choice.pieces, choice.added
        group.waiting.remove_at(choice.positions)
        for piece in pieces:
            request = piece.owner
            del request.waiting[piece.place]
            if not request.waiting:
                del group.arrived[request.number]
        # A batch overtakes all requests that wait and came before its youngest one.
        if self._max_overtakes:
            heapq.heappush(self._youngest, max(piece.owner.number for piece in pieces))
            if len(self._youngest) > self._max_overtakes:
                heapq.heappop(self._youngest)
        return Batch(kind, [pieces[i] for i in order], [added[i] for i in order])

    def _check(self, size: Size, requests: int, seconds_of: Callable[[int], float]) -> None:
        limits = self._limits
        for name, own, there, most in (
            ("sequences", size.sequences, self.sequences, limits.max_sequences),
            ("tokens", size.tokens, self.tokens, limits.max_tokens),
        ):
            if own > most:
                raise TooLarge(f"the request has {own:,} {name} and the most are {most:,}; split it")
            if own + there > most:
                self._refuse(f"{there:,} {name}", seconds_of)
        if requests > limits.max_requests:
            self._refuse(f"{self.requests:,} requests", seconds_of)

    def _refuse(self, what: str, seconds_of: Callable[[int], float]) -> None:
        seconds = min(max(1, round(seconds_of(self.tokens))), 60)
        raise Overloaded(f"the server has {what} to do and takes no more; try again in {seconds} s", seconds)

    def _count(self, size: Size, sign: int) -> None:
        self.requests += sign
        self.sequences += sign * size.sequences
        self.tokens += sign * size.tokens


def _pieces(requests: Iterable[Request]) -> Iterator[Piece]:
    for request in requests:
        yield from request.waiting.values()
