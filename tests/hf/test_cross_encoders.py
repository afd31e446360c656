"""radix_ops.hf.enable on a CrossEncoder: classification heads and language models that say yes or no."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from packaging.version import Version
from sentence_transformers import CrossEncoder
from torch import nn

from helpers.hf_models import assert_within_budget, no_warnings
from helpers.sentence_models import SIZE, TEMPLATE, VERSION, Dense, Pooling, Transformer, enable, pairs, save
from radix_ops import hf

PAIRS = pairs()
needs_modules = pytest.mark.skipif(
    Version("5.4") > VERSION, reason="a CrossEncoder of modules, language models among them, came with 5.4"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Find the folder of a model by its head, its tokenizer's padding side and its number of labels."""
    saved = {}

    def find(head: str = "ForSequenceClassification", side: str = "right", labels: int = 1) -> str:
        if (head, side, labels) not in saved:
            path = tmp_path_factory.mktemp("model")
            saved[head, side, labels] = save(path, head=head, padding_side=side, num_labels=labels)
        return saved[head, side, labels]

    return find


@pytest.fixture
def plain(folder):
    return CrossEncoder(folder(), device="cpu")


def scores_of(model, inputs=PAIRS, **options):
    options = {"activation_fn": nn.Identity(), "convert_to_tensor": True, "batch_size": 8, **options}
    return model.predict(inputs, **options).clone()


def exact_of(model, **options):
    """Return scores in float64, by the model as it came, each pair by itself."""
    model = copy.deepcopy(model)
    model.model.double()
    return torch.stack([scores_of(model, [pair], **options)[0] for pair in PAIRS])


def assert_equal_but_for_rounding(model, plain, **options):
    with no_warnings():
        got = scores_of(model, **options)
    exact = exact_of(plain, **options)
    assert_within_budget(got, scores_of(plain, **options), exact)


@pytest.mark.cuda
def test_scores_on_cuda(folder):
    plain = CrossEncoder(folder(), device="cuda")
    model = enable(copy.deepcopy(plain))
    assert_equal_but_for_rounding(model, plain)
    assert model.radix_stats.skipped == 0
    assert model.radix_stats.rows < 0.8 * model.radix_stats.tokens
    assert model.radix_stats.skipped == 0
    assert model.radix_stats.rows < 0.7 * model.radix_stats.tokens


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", [1, 3])
def test_classification_heads(folder, labels, side):
    plain = CrossEncoder(folder(side=side, labels=labels), device="cpu")
    model = enable(copy.deepcopy(plain))
    assert_equal_but_for_rounding(model, plain)
    assert_equal_but_for_rounding(model, plain, apply_softmax=True)


@needs_modules
def test_language_models_that_say_yes_or_no(folder):
    plain = CrossEncoder(folder("ForCausalLM"), device="cpu")
    assert_equal_but_for_rounding(enable(copy.deepcopy(plain)), plain)


@needs_modules
def test_chat_templates_and_prompts(folder):
    plain = CrossEncoder(
        folder("ForCausalLM"), device="cpu", processor_kwargs={"chat_template": TEMPLATE}, prompts={"short": "w1 w2 w3"}
    )
    if Version("6.0") <= VERSION:
        assert plain[0].modality_config.keys() >= {"message"}
    model = enable(copy.deepcopy(plain))
    assert_equal_but_for_rounding(model, plain)
    assert_equal_but_for_rounding(model, plain, prompt_name="short")
    assert_equal_but_for_rounding(model, plain, prompt="w4 w5 w6 w7")


@needs_modules
def test_pooling_and_dense_in_place_of_a_head(tmp_path):
    torch.manual_seed(1)
    score = Dense(SIZE, 1, module_input_name="sentence_embedding", module_output_name="scores")
    modules = [Transformer(save(tmp_path)), Pooling(SIZE, "lasttoken"), score]
    plain = CrossEncoder(modules=modules, device="cpu")
    model = enable(copy.deepcopy(plain))
    got, want = scores_of(model), scores_of(plain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert model.radix_stats.rows < 0.7 * model.radix_stats.tokens


@pytest.mark.parametrize("form", [{"convert_to_numpy": False}, {"convert_to_tensor": True}, {}], ids=str)
@pytest.mark.parametrize("labels", [1, 3])
def test_forms_of_the_result(folder, labels, form):
    plain = CrossEncoder(folder(labels=labels), device="cpu")
    model = enable(copy.deepcopy(plain))
    for inputs in (PAIRS, PAIRS[:1], PAIRS[0], [list(pair) for pair in PAIRS]):
        got, want = model.predict(inputs, **form), plain.predict(inputs, **form)
        assert type(got) is type(want)
        if isinstance(want, list):
            got, want = torch.stack(got), torch.stack(want)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=1e-5)


def test_rank(plain):
    model = enable(copy.deepcopy(plain))
    query, documents = PAIRS[0][0], [document for _, document in PAIRS]
    got, want = (m.rank(query, documents, top_k=7, return_documents=True) for m in (model, plain))
    assert [(hit["corpus_id"], hit["text"]) for hit in got] == [(hit["corpus_id"], hit["text"]) for hit in want]
    np.testing.assert_allclose([hit["score"] for hit in got], [hit["score"] for hit in want], rtol=0, atol=1e-5)
    assert model.radix_stats.rows < 0.7 * model.radix_stats.tokens


def test_a_head_that_reads_padding_gets_it_as_it_was(plain):
    model = copy.deepcopy(plain)
    for changed in (plain, model):
        changed.model.config.pad_token_id = 3  # the tokenizer's is 0
    hf.enable(model, threshold=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = scores_of(model)
    assert any("read a masked position" in str(warning.message) for warning in caught)
    torch.testing.assert_close(got, scores_of(plain), rtol=1e-5, atol=1e-5)


def test_disable(plain):
    want = scores_of(plain)
    before = [sorted(vars(module)) for module in plain.modules()]
    scores_of(enable(plain))
    assert plain.radix_stats.folded > 0
    hf.disable(plain)
    assert scores_of(plain).equal(want)
    assert [sorted(vars(module)) for module in plain.modules()] == before


def test_bert_is_refused(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": SIZE, "num_attention_heads": 4}
    model = CrossEncoder(save(tmp_path, "Bert", "ForSequenceClassification", **sizes), device="cpu")
    with pytest.raises(ValueError, match="BertForSequenceClassification is of model type 'bert', which folding is not"):
        hf.enable(model)
