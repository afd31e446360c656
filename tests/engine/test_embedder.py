"""Embedder against sentence-transformers' encode on the same folders, and against transformers."""

import concurrent.futures

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.language_models import embedding_tokenizer, needs_hf, tiny_model, transformers
from radix_ops.engine import Embedder, UserError, embedding
from radix_ops.engine.inputs import Record
from radix_ops.models.qwen3 import Qwen3Model

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["Which river flows through Paris?", "", "the sea", "Which river flows through Paris? The Seine.", "the sea"]
PROMPTS = {"query": "Instruct: find the river\nQuery:", "document": "", "of": "the river: "}


def sentence_folder(folder, pooling, include_prompt=True, **options):
    """Return a saved folder and its SentenceTransformer."""
    tiny_model("Qwen3").model.save_pretrained(folder / "base")
    embedding_tokenizer().save_pretrained(folder / "base")
    parts = [modules.Transformer(str(folder / "base")), modules.Pooling(32, pooling, include_prompt=include_prompt)]
    made = library.SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu", prompts=PROMPTS, **options)
    made.save_pretrained(str(folder / "st"))
    return folder / "st", library.SentenceTransformer(str(folder / "st"), device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "last": sentence_folder(tmp_path_factory.mktemp("last"), "lasttoken", default_prompt_name="of"),
        "mean": sentence_folder(tmp_path_factory.mktemp("mean"), "mean"),
        # The prompt's states are no part of the mean.
        "rest": sentence_folder(tmp_path_factory.mktemp("rest"), "mean", include_prompt=False),
    }


def close(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["last", "mean", "rest"])
def test_embeddings_are_those_of_sentence_transformers(folders, pooling):
    folder, model = folders[pooling]
    embedder = Embedder(folder, device="cpu")
    assert embedder.prompts == model.prompts
    close(embedder.embed(TEXTS), model.encode(TEXTS))
    for name in PROMPTS:
        close(embedder.embed(TEXTS, prompt_name=name), model.encode(TEXTS, prompt_name=name))
        found = np.stack(list(embedder.stream(iter(TEXTS), prompt_name=name, window=2)))
        close(found, model.encode(TEXTS, prompt_name=name))
    for prompt in ("the sea: ", ""):
        close(embedder.embed(TEXTS, prompt=prompt), model.encode(TEXTS, prompt=prompt))
    # A call's prompt is its own.
    close(embedder.embed(TEXTS), model.encode(TEXTS))


def test_texts_of_several_prompts_meet_in_one_batch(folders):
    """A server does so; a mean leaves out of each text its own prompt."""
    folder, model = folders["rest"]
    embedder, together, found = Embedder(folder, device="cpu"), embedding.Texts(), {}
    items = [embedder.parse(Record(f"request {n}", {"text": text})) for n, text in enumerate(TEXTS[2:])]
    for name in ("query", "of"):
        together.extend(embedder._encode(items, embedder._recipe(None, name)))
    embedder.execute(together, lambda indices, numbers: found.update(zip(indices.tolist(), numbers[0], strict=True)))
    expected = [model.encode(TEXTS[2:], prompt_name=name) for name in ("query", "of")]
    close(np.stack([found[index] for index in range(6)]), np.concatenate(expected))


def test_dims_prompts_and_normalisation_may_be_given(folders):
    folder, model = folders["last"]
    found = Embedder(folder, device="cpu", dim=8, prompt="the ", normalize=False)
    assert found.dim == 8
    expected = model.encode(TEXTS, prompt="the ", truncate_dim=8, normalize_embeddings=False, convert_to_numpy=True)
    unnormalised = found.embed(TEXTS)
    assert unnormalised.shape == (len(TEXTS), 8)
    close(
        unnormalised / np.linalg.norm(unnormalised, axis=1, keepdims=True),
        expected / np.linalg.norm(expected, axis=1, keepdims=True),
    )
    assert np.abs(np.linalg.norm(unnormalised, axis=1) - 1).min() > 0.1


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "ours", "causal"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_loaded_model_embeds_as_transformers_does(tmp_path, kind, pooling):
    needs_hf()
    model, tokenizer = tiny_model("Llama" if kind in ("Llama", "causal") else "Qwen3"), embedding_tokenizer()
    if kind == "ours":
        model.model.save_pretrained(tmp_path)
        given = Qwen3Model.from_pretrained(tmp_path).eval()
    else:
        given = model if kind == "causal" else model.model
    found = Embedder(given, tokenizer, pooling=pooling, normalize=False).embed(["the sea", "the river is long"])
    expected = []
    for text in ("the sea", "the river is long"):
        with torch.no_grad():
            states = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append(states[-1] if pooling == "last" else states.mean(0))
    np.testing.assert_allclose(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_no_texts_make_no_rows(folders):
    embedder = Embedder(folders["last"][0], device="cpu")
    assert embedder.embed([]).shape == (0, 32)
    assert list(embedder.stream([])) == []


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("the sea", {}, "texts is a string; it must be a list, or another iterable, of strings"),
        (["a", None], {}, r"texts\[1\] is null; it must be a string"),
        (["a", "\ud800"], {}, r"texts\[1\] holds half of a surrogate pair"),
        (["a", "river " * 200], {}, r"texts\[1\] has \d+ tokens and the most are 128; truncate_right=True drops"),
        (["a"], {"prompt_name": "q"}, "prompt_name 'q' is not one of the model's prompts, which are 'query', 'docu"),
        (["a"], {"prompt_name": "of", "prompt": "a"}, "prompt and prompt_name can't both be given"),
        (["a"], {"prompt": 3}, "the prompt is a number; it must be a string"),
    ],
)
def test_texts_that_cannot_be_used_are_named_before_the_model_runs(folders, monkeypatch, texts, options, message):
    embedder = Embedder(folders["last"][0], device="cpu")
    monkeypatch.setattr(embedder.runner, "states", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        embedder.embed(texts, **options)
    with pytest.raises(UserError, match=message):
        list(embedder.stream(texts, **options))


def test_a_model_without_prompts_says_so():
    embedder = Embedder(tiny_model("Llama"), embedding_tokenizer())
    with pytest.raises(UserError, match="prompt_name 'query' is not one of the model's prompts, which are none"):
        embedder.embed(["a"], prompt_name="query")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "sum"}, "pooling must be one of 'last', 'mean', 'weightedmean', .*, or None, got 'sum'"),
        ({"dim": 33}, "dim 33 is more than the model has, 32"),
        ({"dim": 0}, "dim must be a whole number from 1 to 2147483647, or None, got 0"),
        ({"max_length": 999}, "max_length 999 is more than the model reads, 128"),
        ({"max_length": 2.0}, "max_length must be a whole number from 1 to 2147483647, or None, got 2.0"),
    ],
)
def test_options_that_cannot_be_used_are_named(folders, options, message):
    with pytest.raises(UserError, match=message):
        Embedder(folders["last"][0], device="cpu", **options)


def test_embeddings_that_are_not_finite_are_refused():
    model, tokenizer = tiny_model("Qwen3"), embedding_tokenizer()
    model.model.embed_tokens.weight.data[tokenizer("x")["input_ids"][0]] = float("nan")
    with pytest.raises(UserError, match=r"texts\[1\] got an embedding that is not finite; try dtype float32"):
        Embedder(model.model, tokenizer).embed(["the sea", "x"])


def test_texts_are_cut_where_that_is_asked_for(folders, monkeypatch):
    folder, model = folders["last"]
    monkeypatch.setattr(model, "max_seq_length", 12)
    texts = ["the river " * 20, "the sea", "the river " * 30]
    found = Embedder(folder, device="cpu", max_length=12, truncate_right=True).embed(texts)
    close(found, model.encode(texts))
    assert transformers.AutoTokenizer.from_pretrained(folder).truncation_side == "right"


def test_a_generator_of_texts_may_wait_for_another_thread(folders):
    """The engine isn't held while texts come, so it may embed others."""
    folder, model = folders["last"]
    embedder = Embedder(folder, device="cpu")

    def texts():
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(embedder.embed, ["the sea"]).result(timeout=60)
        yield from TEXTS

    close(embedder.embed(texts()), model.encode(TEXTS))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForCausalLM", "Model"])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_the_stack_below_any_head_makes_embeddings(tmp_path, kind, head):
    made = getattr(transformers, kind + head)(tiny_model(kind, num_labels=3).config).eval()
    made.save_pretrained(tmp_path)
    embedding_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = transformers.AutoModel.from_pretrained(tmp_path).eval(), embedding_tokenizer()
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            state = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        expected.append(torch.nn.functional.normalize(state, dim=-1).numpy())
    close(Embedder(tmp_path, device="cpu").embed(TEXTS), np.stack(expected))


def test_weights_that_are_no_heads_are_refused(tmp_path):
    made = transformers.Qwen3ForSequenceClassification(tiny_model("Qwen3").config).eval()
    made.save_pretrained(tmp_path)
    embedding_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "scores.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds scores.weight, which a Qwen3 does not have"):
        Embedder(tmp_path, device="cpu")
