"""What the server counts and measures, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_COUNTS = tuple(2**power for power in range(0, 18))
_RATIOS = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12, 16)


class Metrics:
    """The server's metrics, in a registry of their own, with buckets that do not change. Threads may share it."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"radix_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"radix_{name}", text, registry=registry, buckets=buckets)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"radix_{name}", text, registry=registry)

        self.requests = counter("requests", "Requests that were answered, by route and status", "route", "status")
        self.tokenize_seconds = histogram("tokenize_seconds", "From acceptance to the queue", _SECONDS)
        self.queue_seconds = histogram("queue_seconds", "From there to the first batch with the request", _SECONDS)
        self.compute_seconds = histogram("compute_seconds", "From there to the end of the last batch", _SECONDS)
        self.batch_seconds = histogram("batch_seconds", "Computation of a batch", _SECONDS)
        self.batch_rows = histogram("batch_rows", "Rows of a batch, which the model computes", _COUNTS)
        self.batch_tokens = histogram("batch_tokens", "Tokens of a batch", _COUNTS)
        self.batch_sequences = histogram("batch_sequences", "Sequences of a batch", _COUNTS)
        self.batch_tokens_per_row = histogram("batch_tokens_per_row", "Tokens over rows of a batch, N/M", _RATIOS)
        self.rejected = counter("rejected", "Requests that were not accepted, by reason", "reason")
        self.cancelled = counter("cancelled", "Requests whose client left before the answer")
        self.expired = counter("expired", "Requests whose time was over before the answer")
        self.failed = counter("failed", "Requests whose computation failed")
        self.halved = counter("halved", "Batches that failed and were computed in two halves")
        self.truncated = counter("truncated", "Texts that were cut, as their requests asked for")
        self.accepted_requests = gauge("accepted_requests", "Requests that are accepted and not answered")
        self.accepted_tokens = gauge("accepted_tokens", "Tokens of requests that are accepted and not answered")
        self.is_ready = gauge("ready", "1 while requests are accepted")

    def observe_request(self, route: str, status: int) -> None:
        """Count an answer of HTTP."""
        self.requests.labels(route, str(status)).inc()

    def observe_batch(self, rows: int, tokens: int, sequences: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self.batch_seconds.observe(seconds)
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(tokens)
        self.batch_sequences.observe(sequences)
        self.batch_tokens_per_row.observe(tokens / rows)

    def exposition(self) -> tuple[bytes, str]:
        """Return what Prometheus reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
