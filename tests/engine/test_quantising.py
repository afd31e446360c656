"""Embeddings of fewer bits against sentence-transformers' quantize_embeddings, and the nearest pairs against NumPy."""

import numpy as np
import pytest
import sentence_transformers
import torch
from packaging.version import Version

from helpers.language_models import embedding_tokenizer, tiny_model
from radix_ops.engine import Embedder, UserError, pairs
from radix_ops.engine.quantising import quantised, ranges_of

TEXTS = [
    "Which river flows through Paris?",
    "the sea",
    "Which river?",
    "the Seine",
    "the sea ",
    "x",
    "a",
    "Paris",
    "yes",
]
needs_6 = pytest.mark.skipif(
    Version(sentence_transformers.__version__) < Version("6"), reason="before 6 it rounds the other half the other way"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("Qwen3").model, embedding_tokenizer()


@needs_6
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_int8_is_that_of_sentence_transformers(scale):
    drawn = np.random.default_rng(0)
    rows = (drawn.standard_normal((400, 24)) * scale).astype(np.float32)
    rows[:, 3] = 0.25  # a column of one number
    calibration = rows[:200]
    ranges = ranges_of([calibration[:70], calibration[70:]])
    np.testing.assert_array_equal(ranges, [calibration.min(0), calibration.max(0)])
    expected = sentence_transformers.quantize_embeddings(rows, "int8", calibration_embeddings=calibration)
    found = quantised(rows, ranges)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)
    assert set(found[:, 3].tolist()) == {-128}
    # Numbers outside of the calibration's range become its ends.
    assert (found.min(), found.max()) == (-128, 127)


@needs_6
def test_an_embedder_gives_int8_between_the_ranges_that_it_found(model):
    floats = Embedder(*model).embed(TEXTS)
    ranges = Embedder(*model).find_ranges(TEXTS[:6])
    np.testing.assert_array_equal(ranges, [floats[:6].min(0), floats[:6].max(0)])
    embedder = Embedder(*model, output_dtype="int8", ranges=ranges)
    expected = sentence_transformers.quantize_embeddings(floats, "int8", ranges=ranges)
    # A number at the border of two steps may fall to either side: the least and the most of the texts lie there.
    steps = (floats - ranges[0]) / (ranges[1] - ranges[0]) * 255
    is_clear = np.abs(steps - steps.round()) > 1e-2
    assert is_clear.mean() > 0.5
    for found in (embedder.embed(TEXTS), np.stack(list(embedder.stream(TEXTS, window=2)))):
        assert found.dtype == np.int8
        assert np.abs(found.astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(found[is_clear], expected[is_clear])


def test_an_embedder_gives_float16(model):
    floats = Embedder(*model).embed(TEXTS)
    found = Embedder(*model, output_dtype="float16").embed(TEXTS)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, floats, rtol=2**-10, atol=1e-6)
    wide = Embedder(*model, output_dtype="float16", normalize=False)
    wide.model.norm.weight.data *= 1e6
    try:
        with pytest.raises(
            UserError, match=r"texts\[0\] got an embedding that float16 can't hold; output_dtype float32"
        ):
            wide.embed(TEXTS)
    finally:
        wide.model.norm.weight.data /= 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dtype": "int4"}, "output_dtype must be one of 'float32', 'float16', 'int8', got 'int4'"),
        ({"output_dtype": "int8"}, "output_dtype int8 needs ranges, and nothing else takes them"),
        ({"ranges": np.zeros((2, 32))}, "output_dtype int8 needs ranges, and nothing else takes them"),
        ({"output_dtype": "int8", "ranges": np.zeros((2, 31))}, r"ranges must be floats \[2, 32\].*float64 \[2, 31\]"),
        ({"output_dtype": "int8", "ranges": np.zeros((2, 32), int)}, r"ranges must be floats \[2, 32\].*got int64"),
        ({"output_dtype": "int8", "ranges": [[1.0] * 32, [0.0] * 32]}, "the first row nowhere above the second"),
        ({"output_dtype": "int8", "ranges": [[1.0] * 32, [np.inf] * 32]}, "ranges must be finite"),
    ],
)
def test_dtypes_and_ranges_that_cannot_be_used_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        Embedder(*model, **options)
    with pytest.raises(UserError, match="texts are none, and ranges are of one embedding at least"):
        Embedder(*model).find_ranges([])


@pytest.mark.parametrize("rows_at_once", [1, 7, 64])
@pytest.mark.parametrize("k", [1, 25, 10**4])
def test_pairs_are_the_nearest_of_all(monkeypatch, rows_at_once, k):
    monkeypatch.setattr(pairs, "_ROWS_AT_ONCE", rows_at_once)
    rows = np.random.default_rng(1).standard_normal((64, 8))
    rows[7] = 0
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    first, second = np.triu_indices(64, 1)
    cosines = (unit @ unit.T)[first, second]
    nearest = np.argsort(-cosines, kind="stable")[:k]
    found, places = pairs.nearest_pairs(rows.astype(np.float32), k)
    np.testing.assert_allclose(found, cosines[nearest], atol=1e-5)
    if k < 100:  # whose cosines lie further apart than rounding
        np.testing.assert_array_equal(places, np.stack([first, second], 1)[nearest])
    assert len({*map(tuple, places.tolist())}) == len(places) == min(k, 2016)


def test_an_embedder_finds_pairs_as_paraphrase_mining(model):
    floats = Embedder(*model).embed(TEXTS)
    expected = sentence_transformers.util.paraphrase_mining_embeddings(torch.tensor(floats))
    found = Embedder(*model).pairs(TEXTS, 5)
    assert [pair for _, *pair in found] == [sorted(pair) for _, *pair in expected[:5]]
    assert [cosine for cosine, *_ in found] == pytest.approx([cosine for cosine, *_ in expected[:5]], abs=1e-6)
    assert Embedder(*model).pairs(TEXTS[:1]) == []
    assert Embedder(*model).pairs([]) == []
    with pytest.raises(UserError, match="k must be a whole number from 1"):
        Embedder(*model).pairs(TEXTS, 0)
