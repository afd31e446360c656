"""What Prometheus reads of a batcher: counts that are known beforehand, in buckets that do not change."""

from __future__ import annotations

import threading
import time

import pytest

from helpers.served import POISON, Gate, serving, submit
from radix_ops.serve.metrics import Metrics
from radix_ops.serve.refusals import Draining, Failed

parser = pytest.importorskip("prometheus_client.parser")

SOON = 20


def samples(metrics: Metrics) -> dict[tuple[str, tuple], float]:
    """Read the exposition as Prometheus does."""
    text = metrics.exposition()[0].decode()
    families = parser.text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_an_exposition_is_text_for_prometheus():
    content, kind = Metrics().exposition()
    assert kind.startswith("text/plain")
    assert b"# TYPE radix_batch_rows histogram" in content


def test_buckets_are_fixed():
    bounds = {}
    for (name, labels), _ in samples(Metrics()).items():
        if name.endswith("_bucket"):
            bounds.setdefault(name, []).append(dict(labels)["le"])
    seconds = ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0"]
    counts = [f"{2.0**power}" for power in range(18)]
    for name in ("tokenize", "queue", "compute", "batch"):
        assert bounds[f"radix_{name}_seconds_bucket"] == [*seconds, "30.0", "60.0", "+Inf"]
    for name in ("rows", "tokens", "sequences"):
        assert bounds[f"radix_batch_{name}_bucket"] == [*counts, "+Inf"]
    assert bounds["radix_batch_tokens_per_row_bucket"][:4] == ["1.0", "1.1", "1.25", "1.5"]


def test_two_servers_in_a_process_count_apart():
    first, second = Metrics(), Metrics()
    first.observe_request("/embed", 200)
    assert samples(first)["radix_requests_total", (("route", "/embed"), ("status", "200"))] == 1
    assert not any(name == "radix_requests_total" for name, _ in samples(second))


def test_batches_and_requests_are_measured():
    with serving(Gate(seconds=0.01)) as batcher:
        for ids in ([1, 2, 3], [1, 2, 3, 4]):
            submit(batcher, ids).result(SOON)
        submit(batcher, [1, 2], [1, 2], [1, 3]).result(SOON)
        found = samples(batcher.metrics)
        assert found["radix_ready", ()] == 1
    sums = {name: found[f"radix_batch_{name}_sum", ()] for name in ("rows", "tokens", "sequences", "tokens_per_row")}
    assert sums == {"rows": 10, "tokens": 13, "sequences": 5, "tokens_per_row": 1 + 1 + 2}
    for name in ("tokenize", "queue", "compute", "batch"):
        assert found[f"radix_{name}_seconds_count", ()] == 3
    for name in ("compute", "batch"):
        assert 0.03 <= found[f"radix_{name}_seconds_sum", ()] < SOON
    assert (found["radix_accepted_requests", ()], found["radix_accepted_tokens", ()]) == (0, 0)
    assert samples(batcher.metrics)["radix_ready", ()] == 0


def test_what_is_under_way_is_shown_and_the_drain_s_refusals_are_counted():
    gate = Gate()
    gate.opened.clear()
    with serving(gate) as batcher:
        submit(batcher, [1, 2, 3])
        assert gate.entered.wait(SOON)
        found = samples(batcher.metrics)
        assert (found["radix_accepted_requests", ()], found["radix_accepted_tokens", ()]) == (1, 3)
        drain = threading.Thread(target=batcher.drain)
        drain.start()
        while batcher.state != "draining":
            time.sleep(0.001)
        with pytest.raises(Draining):
            submit(batcher, [1])
        gate.opened.set()
        drain.join(SOON)
    assert samples(batcher.metrics)["radix_rejected_total", (("reason", "draining"),)] == 1


def test_halves_are_counted():
    gate = Gate()
    with serving(gate) as batcher:
        with pytest.raises(Failed):
            submit(batcher, [1], [2], [3], [POISON]).result(SOON)
        found = samples(batcher.metrics)
    assert (found["radix_halved_total", ()], found["radix_failed_total", ()]) == (2, 1)
