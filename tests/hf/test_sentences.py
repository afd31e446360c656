"""radix_ops.hf.enable on a SentenceTransformer: the same embeddings, from batches in which shared prefixes meet."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from helpers.batches import trie_size
from helpers.hf_models import Witness, assert_within_budget
from helpers.sentence_models import VERSION, Pooling, enable, encoder, save, texts
from radix_ops import hf

TEXTS = texts()
PROMPTS = {"query": "w70 w71 w72 w73 w74 w75", "document": "w60"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Find the folder of a model by its kind and the padding side of its tokenizer."""
    saved = {}

    def find(kind: str = "Qwen3", side: str = "right") -> str:
        if (kind, side) not in saved:
            saved[kind, side] = save(tmp_path_factory.mktemp("model"), kind, padding_side=side)
        return saved[kind, side]

    return find


@pytest.fixture
def plain(folder):
    return encoder(folder(), prompts=PROMPTS)


def tokens_of(model, inputs=TEXTS):
    return model.tokenizer(list(inputs)).input_ids


def exact_of(model, inputs=TEXTS, **options):
    """Return embeddings in float64, by the model as it came, each text by itself."""
    model = copy.deepcopy(model).double()
    return torch.stack([model.encode(text, convert_to_tensor=True, **options) for text in inputs]).clone()


def encode(model, inputs=TEXTS, batch_size=8, **options):
    return model.encode(inputs, batch_size=batch_size, convert_to_tensor=True, **options).clone()


def assert_equal_but_for_rounding(model, plain, inputs=TEXTS, **options):
    got, want = encode(model, inputs, **options), encode(plain, inputs, **options)
    assert_within_budget(got, want, exact_of(plain, inputs, **options))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "max"])
def test_embeddings_are_those_of_the_plain_model_from_fewer_rows(folder, pooling, kind, side):
    plain = encoder(folder(kind, side), pooling)
    model = enable(copy.deepcopy(plain))
    assert_equal_but_for_rounding(model, plain)
    tokens = tokens_of(plain)
    stats = model.radix_stats
    assert (stats.tokens, stats.skipped) == (sum(map(len, tokens)), 0)
    assert trie_size(tokens) <= stats.rows <= 1.1 * trie_size(tokens) < 0.5 * stats.tokens


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_embeddings_on_cuda(folder, pooling, dtype):
    plain = encoder(folder(), pooling).to("cuda", dtype)
    model = enable(copy.deepcopy(plain))
    assert_equal_but_for_rounding(model, plain)
    stats = model.radix_stats
    assert (stats.tokens, stats.skipped) == (sum(map(len, tokens_of(plain))), 0)
    assert stats.rows < 0.5 * stats.tokens


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["cls", "weightedmean", "mean_sqrt_len_tokens", ("mean", "lasttoken")])
def test_other_poolings_fold_or_run_as_they_came(folder, pooling, side):
    if isinstance(pooling, tuple) and Version("5.4") > VERSION:
        plain = encoder(folder(side=side))
        plain[1] = Pooling(32, pooling_mode_mean_tokens=True, pooling_mode_lasttoken=True)
    else:
        plain = encoder(folder(side=side), pooling)
    model = enable(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cls up to 5.3 reads the first column, masked or not
        got, want = encode(model), encode(plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_results_don_t_depend_on_the_order_of_the_inputs(plain):
    model = enable(plain)
    order = np.random.default_rng(3).permutation(len(TEXTS))
    shuffled = model.encode([TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, model.encode(TEXTS)[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "w1 w2 w3"},
        {"prompt_name": "query"},
        {"prompt": ""},
        {"normalize_embeddings": True},
        {"truncate_dim": 8},
        {"truncate_dim": 8, "normalize_embeddings": True, "prompt_name": "document"},
    ],
    ids=str,
)
def test_options_of_encode(plain, options):
    assert_equal_but_for_rounding(enable(copy.deepcopy(plain)), plain, **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_without_the_prompt(folder, side):
    plain = encoder(folder(side=side), "mean", prompts=PROMPTS, default_prompt_name="query")
    plain.set_pooling_include_prompt(False)
    model = enable(copy.deepcopy(plain))
    torch.testing.assert_close(encode(model), encode(plain), rtol=1e-5, atol=1e-5)
    assert model.radix_stats.rows < 0.6 * model.radix_stats.tokens


def test_queries_and_documents_have_their_prompts(plain):
    model = enable(copy.deepcopy(plain))
    for name in ("encode_query", "encode_document"):
        want = getattr(plain, name)(TEXTS)
        np.testing.assert_allclose(getattr(model, name)(TEXTS), want, rtol=0, atol=1e-5)
    assert not np.allclose(model.encode_query(TEXTS), model.encode_document(TEXTS), atol=0.1)


@pytest.mark.parametrize("form", [{"convert_to_numpy": False}, {"convert_to_tensor": True}, {}])
@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_forms_and_precisions_of_the_result(plain, form, precision):
    model = enable(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_embeddings of few embeddings
        want = plain.encode(TEXTS, batch_size=8, precision=precision, **form)
        got = model.encode(TEXTS, batch_size=8, precision=precision, **form)
    assert (type(got), len(got), got[0].dtype) == (type(want), len(want), want[0].dtype)
    difference = np.abs(np.stack([*map(np.asarray, got)]).astype(float) - np.stack([*map(np.asarray, want)]))
    assert difference.max() <= {"float32": 1e-5, "int8": 1, "uint8": 1}.get(precision, 0)
    assert model.radix_stats.folded > 0


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_of_tokens_have_the_shapes_of_the_library_s_batches(folder, side, output_value):
    plain = encoder(folder(side=side))
    model = enable(copy.deepcopy(plain))
    got, want = (m.encode(TEXTS, batch_size=4, output_value=output_value) for m in (model, plain))
    for one, other in zip(got, want, strict=True):
        mask = torch.ones(len(other), dtype=torch.bool)
        if output_value is None:
            assert one.keys() == other.keys()
            torch.testing.assert_close(one["sentence_embedding"], other["sentence_embedding"], rtol=1e-5, atol=1e-5)
            mask = other["attention_mask"].bool()
            one, other = one["token_embeddings"], other["token_embeddings"]
        elif side == "left":
            mask = one.abs().sum(1) > 0  # padding comes as zeros
        assert one.shape == other.shape
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-5, atol=1e-5)
    assert model.radix_stats.rows < model.radix_stats.tokens


@pytest.mark.parametrize("kind", ["text", "one", "none", "tuple", "array", "keyword"])
def test_kinds_of_inputs(plain, kind):
    model = enable(copy.deepcopy(plain))
    given = {"text": TEXTS[0], "one": TEXTS[:1], "none": [], "tuple": tuple(TEXTS), "array": np.array(TEXTS)}
    args, kwargs = ((), {"sentences": TEXTS}) if kind == "keyword" else ((given[kind],), {})
    got, want = model.encode(*args, **kwargs), plain.encode(*args, **kwargs)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"prompt_name": "missing"}, {"precision": "float1"}, {"device": "nowhere"}, {"unknown": 1}],
    ids=str,
)
def test_bad_arguments_are_the_library_s_to_refuse(plain, options):
    def outcome(model):
        try:
            return model.encode(TEXTS, **options).shape
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    assert outcome(enable(copy.deepcopy(plain))) == outcome(plain)


def test_a_batch_takes_no_more_rows_than_the_library_s_largest_has_positions(plain):
    model = enable(plain)
    shapes = []
    model[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0]["input_ids"].shape))
    longest = max(map(len, tokens_of(plain)))
    for batch_size in (1, 3, 8):
        del shapes[:]
        with Witness() as witness:
            model.encode(TEXTS, batch_size=batch_size)
        rows = witness.rows[2::4]  # in the first of two layers, behind those of the plain model that verify runs
        assert len(shapes) == len(rows)
        assert max(rows) <= batch_size * longest
        assert max(shape.numel() for shape in shapes) <= 4 * batch_size * longest
        assert sum(shape[0] for shape in shapes) == len(TEXTS)


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {}], ids=["shares little", "too small to pay"])
def test_without_anything_to_gain_the_library_s_batches_run(plain, options):
    inputs = [f"w{index} w{index + 1} " * (1 + index % 5) for index in range(40)] if options else TEXTS
    model = hf.enable(copy.deepcopy(plain), **options)
    batches = {plain: [], model: []}
    for encoder_, seen in batches.items():
        encoder_[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]["input_ids"].clone()))
    np.testing.assert_array_equal(model.encode(inputs, batch_size=8), plain.encode(inputs, batch_size=8))
    assert len(batches[model]) == 5
    assert all(one.equal(other) for one, other in zip(batches[model], batches[plain], strict=True))
    assert model.radix_stats.folded == 0


def test_what_shares_folds_and_the_others_run_together(plain):
    strangers = [f"w{index} w{index + 1} w{index + 2}" for index in range(20)]
    model = hf.enable(copy.deepcopy(plain), threshold=0.7)
    inputs = [text for both in zip(strangers, TEXTS[:20], strict=True) for text in both]
    got, want = (m.encode(inputs, batch_size=4) for m in (model, plain))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert model.radix_stats.folded > 0
    assert model.radix_stats.skipped > 0


def test_texts_are_tokenized_once(plain, monkeypatch):
    model = enable(plain)
    count = 0
    call = type(model.tokenizer).__call__

    def counting(self, text, *args, **kwargs):
        nonlocal count
        count += len(text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counting)
    model.encode(TEXTS)
    assert count == len(TEXTS)


@pytest.mark.filterwarnings("ignore:radix_ops. a batch runs unfolded")
@pytest.mark.parametrize("kind", ["reads_first_column", "reads_width", "needs_more"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_modules_that_read_padding_get_it_as_it_was(folder, kind, side):
    class Behind(nn.Module):
        def forward(self, features):
            states, mask = features["token_embeddings"], features["attention_mask"]
            if kind == "reads_first_column":
                features["sentence_embedding"] = states[:, 0] + states[:, -1]
            elif kind == "reads_width":
                features["sentence_embedding"] = (states * mask[..., None]).sum(1) / mask.shape[1]
            else:
                features["sentence_embedding"] = features["input_ids"].float().sum(1, keepdim=True) + states[:, 0].tan()
            return features

    plain = encoder(folder(side=side))
    plain[1] = Behind()
    model = enable(copy.deepcopy(plain))
    torch.testing.assert_close(encode(model), encode(plain), rtol=1e-5, atol=1e-5)
    assert model.radix_stats.skipped == 0 or kind != "reads_width"
