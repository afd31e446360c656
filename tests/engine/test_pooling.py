"""Poolings of made hidden states against float64, one sequence at a time, and against sentence-transformers."""

import numpy as np
import pytest
import torch

from helpers.sentence_models import Pooling
from radix_ops.engine import pooling
from radix_ops.engine.runners import States

LENGTHS = np.array([5, 3, 14])


@pytest.fixture(params=[0, 2, "mixed"])
def skip(request):
    return np.array([1, 0, 3]) if request.param == "mixed" else np.full(3, request.param)


def alone(name, states, skip):
    """Return a sequence's pooling: its states [L, D] in float64, of which the first `skip` are left out."""
    kept = states[skip:]
    weights = torch.arange(1, len(states) + 1, dtype=torch.float64)[skip:, None]
    return {
        "last": states[-1],
        "cls": kept[0],
        "max": kept.amax(0),
        "mean": kept.mean(0),
        "mean_sqrt_len_tokens": kept.sum(0) / len(kept) ** 0.5,
        "weightedmean": (kept * weights).sum(0) / weights.sum(),
    }[name]


@pytest.mark.parametrize("at_once", [7, 16_384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poolings_over_many_tokens_are_of_each_sequence(monkeypatch, skip, at_once, dtype):
    monkeypatch.setattr(pooling, "_TOKENS_AT_ONCE", at_once)
    rows, token_rows = torch.randn(9, 4).sub(1).to(dtype), torch.randint(9, (22,))
    parts = rows[token_rows].double().split(LENGTHS.tolist())
    states = States(rows, token_rows, LENGTHS)
    for names in [*((name,) for name in pooling.POOLINGS), ("max", "last", "mean"), pooling.POOLINGS]:
        expected = torch.stack([torch.cat([alone(n, x, s) for n in names]) for x, s in zip(parts, skip, strict=True)])
        found = pooling.pooled(states, names, skip)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", pooling.POOLINGS)
def test_poolings_are_those_of_sentence_transformers(name):
    states = States(torch.randn(22, 4), torch.arange(22), LENGTHS)
    module = Pooling(4, "lasttoken" if name == "last" else name)
    expected = [
        module({"token_embeddings": x[None].clone(), "attention_mask": torch.ones(1, len(x), dtype=torch.int64)})
        for x in states.rows.split(LENGTHS.tolist())
    ]
    expected = torch.cat([features["sentence_embedding"] for features in expected])
    torch.testing.assert_close(pooling.pooled(states, (name,), np.zeros(3, int)), expected, rtol=1e-5, atol=1e-6)
