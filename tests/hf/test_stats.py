"""radix_stats says what an enabled model did: batches by reason and by what they share, in words and as HTML."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading

import pytest
import torch
import transformers

from helpers.hf_models import build, no_warnings
from radix_ops import hf
from radix_ops.hf import stats

# The argument's name, which changed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
SHARED = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])  # 8 tokens, 5 rows
STRANGERS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
HOLES = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])


@torch.no_grad()
def test_skipped_batches_are_counted_by_reason():
    model = hf.enable(build(), threshold=0.9)
    model(SHARED)
    for _ in range(2):
        model(STRANGERS)
    with pytest.warns(UserWarning, match="because attention_mask has holes"):
        model(SHARED, attention_mask=HOLES)
    hf.enable(model, threshold=0.0)
    model(SHARED)
    hf.enable(model)
    with no_warnings():
        model(SHARED)
    assert model.radix_stats.reasons == {
        "its rows are more than threshold=0.9 of its tokens": 2,
        "attention_mask has holes": 1,
        "threshold is 0": 1,
        "it is too small for folding to pay": 1,
    }
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (1, 5)


@torch.no_grad()
def test_a_cache_and_its_steps_have_reasons():
    model = hf.enable(build(), threshold=1.0)
    with pytest.warns(UserWarning, match="runs again, unfolded"):
        assert len(getattr(model(SHARED), CACHE).layers) == 2
    model.generate(SHARED, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.radix_stats.reasons == {
        "it goes on from a cache": 3,
        "the cache in a folded batch's output is used": 1,
    }
    assert model.radix_stats.skipped == 4


@torch.no_grad()
def test_batches_are_counted_by_what_they_share():
    model = hf.enable(build(), threshold=0.9)
    rows = {8 / 5: SHARED, 1: STRANGERS, 7: torch.tensor([[1, 2, 3, 4]] * 7), 200: torch.tensor([[1, 2, 3, 4]] * 200)}
    for batch in rows.values():
        model(batch)
    model(SHARED)
    assert model.radix_stats.tokens_per_row == {1.0: 1, 1.5: 2, 6.0: 1, 64.0: 1}


def test_reasons_that_name_shapes_have_an_end():
    counted = stats.RadixStats()
    for number in range(1000):
        counted._add(1, 1, f"rows of {number} positions")
    assert counted.skipped == sum(counted.reasons.values()) == 1000
    assert len(counted.reasons) <= 33
    assert next(iter(counted.reasons)) == "other reasons"


def test_counts_of_threads_add_up():
    counted = stats.RadixStats()

    def work():
        for _ in range(2000):
            counted._add(3, 2, sharing=(3, 2))
            counted._add(1, 1, "a reason")
            assert counted.reasons["a reason"] > 0

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == stats.RadixStats(tokens=32_000, rows=24_000, folded=8000, skipped=8000)
    assert (counted.reasons, counted.tokens_per_row) == ({"a reason": 8000}, {1.5: 8000})


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_count_by_themselves(duplicate):
    counted = stats.RadixStats()
    counted._add(8, 5, sharing=(8, 5))
    counted._add(4, 4, "a reason")
    other = duplicate(counted)
    assert repr(other) == repr(counted)
    other._add(4, 4, "a reason")
    assert (counted.reasons, other.reasons) == ({"a reason": 1}, {"a reason": 2})


def test_a_pickle_without_reasons_loads():
    old = stats.RadixStats.__new__(stats.RadixStats)
    old.__setstate__({"_tokens": 9, "rows": 5, "folded": 1, "skipped": 2})
    assert old == stats.RadixStats(9, 5, 1, 2)
    assert (old.reasons, old.tokens_per_row) == ({}, {})
    old._add(1, 1, "a reason")
    assert old.reasons == {"a reason": 1}


def test_repr_makes_the_same_counts():
    counted = stats.RadixStats()
    assert repr(counted) == "RadixStats(tokens=0, rows=0, folded=0, skipped=0)"
    counted._add(92, 28, sharing=(92, 28))
    counted._add(4, 4, "a reason")
    text = repr(counted)
    assert text == (
        "RadixStats(tokens=96, rows=32, folded=1, skipped=1, reasons={'a reason': 1}, tokens_per_row={3.0: 1})"
    )
    assert repr(eval(text, {"RadixStats": stats.RadixStats})) == text
    counted.reset()
    assert repr(counted) == "RadixStats(tokens=0, rows=0, folded=0, skipped=0)"


def test_html_shows_every_count():
    counted = stats.RadixStats()
    counted._add(9200, 2800, sharing=(92, 28))
    counted._add(4, 4, "<b>&", sharing=(700, 1))
    assert re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", counted._repr_html_()) == [
        ("tokens", "9,204"),
        ("rows", "2,804 (3.28 tokens a row)"),
        ("batches folded", "1"),
        ("batches skipped", "1"),
        ("because &lt;b&gt;&amp;", "1"),
        ("batches of 3 to 4 tokens a row", "1"),
        ("batches of 64 or more tokens a row", "1"),
    ]
