"""Models and tokenizers that a caller made, shares and changes, against the same model called by transformers."""

import threading

import numpy as np
import pytest
import torch

from helpers.commands import QUESTIONS
from helpers.language_models import embedding_tokenizer, needs_hf, tiny_model, tiny_tokenizer, transformers
from radix_ops.engine import Embedder, Reranker, Scorer, UserError
from radix_ops.models.qwen3 import Qwen3ForCausalLM

needs_hf()
QUESTION = {"context": "the sea", "choices": [" is", " river"]}
TEXTS = ["Which river flows through Paris? The Seine.", "the river", "the sea and the river and the sea"]


def states_of(model, tokenizer, texts, **options):
    """Return the last token's normalised hidden state of each text, by transformers."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, **options)["input_ids"]])
        with torch.no_grad():
            found.append(torch.nn.functional.normalize(model(ids).last_hidden_state[0, -1], dim=-1))
    return torch.stack(found).numpy()


def test_engines_that_share_a_tokenizer_do_not_cut_each_others_texts(monkeypatch):
    """One is stopped between telling the tokenizer not to cut and its tokens, for as long as another may take."""
    tokenizer, models = embedding_tokenizer(), [tiny_model("Llama").model for _ in range(2)]
    whole, cut = Embedder(models[0], tokenizer), Embedder(models[1], tokenizer, max_length=3, truncate_right=True)
    expected = states_of(models[0], tokenizer, TEXTS)
    expected_cut = states_of(models[1], tokenizer, TEXTS, truncation=True, max_length=3)
    is_set, is_cut, first = threading.Event(), threading.Event(), threading.current_thread()
    set_up, found = type(tokenizer).set_truncation_and_padding, []

    def slowly(self, *args, **kwargs):
        set_up(self, *args, **kwargs)
        if threading.current_thread() is first:
            is_set.set()
            is_cut.wait(0.3)

    def embed_cut():
        is_set.wait(10)
        found.append(cut.embed(TEXTS))
        is_cut.set()

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", slowly)
    thread = threading.Thread(target=embed_cut)
    thread.start()
    np.testing.assert_allclose(whole.embed(TEXTS), expected, atol=2e-6)
    thread.join()
    np.testing.assert_allclose(found[0], expected_cut, atol=2e-6)


def test_a_tokenizer_keeps_the_side_that_it_cuts_on():
    tokenizer = embedding_tokenizer()
    tokenizer.truncation_side = "left"
    model = tiny_model("Llama").model
    expected = states_of(model, embedding_tokenizer(), TEXTS, truncation=True, max_length=3)
    found = Embedder(model, tokenizer, max_length=3, truncate_right=True).embed(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert tokenizer.truncation_side == "left"
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    classifier = transformers.LlamaForSequenceClassification(config).eval()
    Reranker(classifier, tokenizer, max_length=6, truncate_right=True).rank("the", TEXTS)
    assert tokenizer.truncation_side == "left"


@pytest.mark.parametrize("plain", [False, True])
def test_training_mode_is_found_in_each_call(plain):
    model = tiny_model("Llama", attention_dropout=0.5)
    scorer = Scorer(model, tiny_tokenizer(adds_bos=True), plain=plain)
    expected = scorer.score([QUESTION])
    model.train()
    with pytest.raises(UserError, match=r"the LlamaForCausalLM is in training mode; model.eval\(\) takes it out"):
        scorer.score([QUESTION])
    model.eval().model.layers[0].self_attn.train()
    wanted = r"model.layers.0.self_attn of the LlamaForCausalLM is in training mode; model.eval\(\) takes it out"
    with pytest.raises(UserError, match=wanted):
        scorer.score([QUESTION])
    with pytest.raises(UserError, match=wanted):
        Scorer(model, tiny_tokenizer(adds_bos=True), plain=plain)
    assert Scorer(model.eval(), tiny_tokenizer(adds_bos=True), plain=plain).score([QUESTION]) == expected


def test_embeddings_that_were_resized_are_no_training_mode():
    model = tiny_model("Llama")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert model.lm_head.training
    assert Scorer(model, tiny_tokenizer(adds_bos=True)).score([QUESTION])[0]["best"] in (0, 1)


def test_a_plain_engine_folds_nothing_of_an_enabled_model():
    from radix_ops import hf

    model = hf.enable(tiny_model("Llama", max_position_embeddings=256), threshold=1.0)
    model(input_ids=torch.tensor([[3, 4, 5], [3, 4, 6]]))
    assert (folded := model.radix_stats.folded) == 1
    Scorer(model, tiny_tokenizer(adds_bos=True), plain=True).score(QUESTIONS)
    assert model.radix_stats.folded == folded
    model(input_ids=torch.tensor([[3, 4, 5], [3, 4, 6]]))
    assert model.radix_stats.folded == folded + 1


@pytest.mark.parametrize("plain", [False, True])
def test_a_config_that_wants_tuples_changes_nothing(plain):
    tokenizer, model = tiny_tokenizer(adds_bos=True), tiny_model("Llama")
    expected = Scorer(model, tokenizer, plain=plain).score([QUESTION])
    model.config.return_dict = False
    assert Scorer(model, tokenizer, plain=plain).score([QUESTION]) == expected
    assert model.config.return_dict is False


def test_encoder_decoders_are_refused_by_name():
    config = transformers.T5Config(vocab_size=340, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder model of type t5"):
        Scorer(model, tiny_tokenizer(adds_bos=True))


def test_a_model_on_another_device_is_refused():
    tokenizer, message = tiny_tokenizer(adds_bos=True), "has weights on the device meta; it must be on cpu or cuda"
    scorer = Scorer(tiny_model("Llama"), tokenizer)
    scorer.score([QUESTION])
    scorer.model.to("meta")
    with pytest.raises(UserError, match=message):
        scorer.score([QUESTION])
    with pytest.raises(UserError, match=message):
        Scorer(tiny_model("Llama").to("meta"), tokenizer)


def test_a_model_that_cannot_be_folded_any_more_is_refused_with_the_remedy():
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(adds_bos=True)
    scorer = Scorer(model, tokenizer)
    scorer.score([QUESTION])
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="can't be folded: .*; plain=True runs without folding$"):
        scorer.score([QUESTION])
    assert Scorer(model, tokenizer, plain=True).score([QUESTION])[0]["best"] in (0, 1)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "own"])
def test_a_head_of_another_dtype_is_refused(kind, tmp_path):
    if kind == "own":
        tiny_model("Qwen3").save_pretrained(tmp_path)
        model = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    else:
        model = tiny_model(kind)
    model.to(torch.bfloat16).lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().float())
    with pytest.raises(UserError, match=r"head of the \w+ is of torch.float32 and its hidden states are of torch.bflo"):
        Scorer(model, tiny_tokenizer(adds_bos=True)).score([QUESTION])


@pytest.mark.parametrize("tokenizer", ["", "a/name", 3, {}, [], tiny_tokenizer(adds_bos=True).backend_tokenizer])
def test_what_is_no_tokenizer_is_refused(tokenizer):
    for engine in (Scorer, Embedder):
        with pytest.raises(UserError, match=r"tokenizer is a \w+; it must be a tokenizer of transformers"):
            engine(tiny_model("Llama"), tokenizer)
