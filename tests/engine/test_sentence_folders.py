"""Folders of sentence-transformers 6 with a chat template: radix-ops embed and rerank against encode and predict."""

import json

import numpy as np
import pytest
import sentence_transformers as library
import torch
from packaging.version import Version

from helpers.commands import failing_command, read_jsonl, write_jsonl
from helpers.sentence_folders import FLAT, PARTS, SWAPPED, answering, cross_encoder, encoder, with_template
from helpers.sentence_models import VERSION, Pooling, Transformer, save, texts, tokenizer
from radix_ops import cli

pytestmark = pytest.mark.skipif(
    Version("6.2") > VERSION, reason="chat templates are rendered from 5.4 on, and as here from 6.2 on"
)

TEXTS = [text.strip() for text in texts(12)]
PAIRS = [(TEXTS[number % 3], text) for number, text in enumerate(texts(9, seed=1))]


def run(command, model, lines, *options, field):
    path = write_jsonl(model.parent / "in.jsonl", lines)
    output = model.parent / "out.jsonl"
    arguments = [command, "--device", "cpu", "--overwrite", "--model", model, "--output", output, *options, path]
    assert cli.main(list(map(str, arguments))) == 0
    return [line[field] for line in read_jsonl(output)]


def embed(model, *options, lines=TEXTS):
    return np.array(run("embed", model, [{"text": text} for text in lines], *options, field="embedding"))


def rerank(model, *options, pairs=PAIRS):
    """Return each pair's score; a query with its documents is a line."""
    lines = [{"query": query, "documents": [document]} for query, document in pairs]
    return np.array(run("rerank", model, lines, *options, field="scores"))[:, 0]


def failing(capsys, command, model, *options):
    lines = [{"text": TEXTS[0]}] if command == "embed" else [{"query": TEXTS[0], "documents": [TEXTS[1]]}]
    path = write_jsonl(model.parent / "in.jsonl", lines)
    return failing_command(capsys, command, "--device", "cpu", "--model", model, *options, path)


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * max(1, np.abs(expected).max()))
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-3


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
@pytest.mark.parametrize("template", [FLAT, PARTS])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_texts_are_rendered_as_encode_renders_them(tmp_path, template, pooling, kind):
    folder, made = encoder(tmp_path, template, pooling, kind)
    expected = made.encode(TEXTS)
    check(embed(folder), expected)
    check(embed(folder, "--plain"), expected)
    check(embed(folder, "--prompt", "w7 w8 "), made.encode(TEXTS, prompt="w7 w8 "))


def test_a_default_prompt_is_the_systems_message_and_stays_in_the_mean(tmp_path):
    base = with_template(save(tmp_path / "base", vocab_size=100), FLAT)
    modules = [Transformer(base), Pooling(32, "mean", include_prompt=False)]
    options = {"prompts": {"q": "w3 w4 w5"}, "default_prompt_name": "q", "device": "cpu"}
    made = library.SentenceTransformer(modules=modules, **options)
    made.save_pretrained(str(tmp_path / "st"))
    check(embed(tmp_path / "st"), made.encode(TEXTS))
    check(embed(tmp_path / "st", "--prompt", ""), made.encode(TEXTS, prompt=""))


def test_what_the_template_is_given_counts(tmp_path):
    processing = {"chat_template": {"add_generation_prompt": True, "mark": "w9"}, "text": {"logits_to_keep": 1}}
    folder, made = encoder(tmp_path, pooling="lasttoken", processing=processing)
    check(embed(folder), made.encode(TEXTS))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_a_cut_leaves_what_the_template_puts_behind_a_text(tmp_path, keeps, pooling, capsys):
    template = {"add_generation_prompt": True, "restore_suffix": keeps}
    folder, made = encoder(tmp_path, pooling=pooling, max_length=19, processing={"chat_template": template})
    long = [*TEXTS, " ".join(TEXTS[:3])]
    check(embed(folder, "--truncate-right", lines=long), made.encode(long))
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": long[-1]}])
    message = failing_command(capsys, "embed", "--device", "cpu", "--model", folder, path)
    assert "tokens and the most are 19; --truncate-right" in message
    least = 6 if keeps else 2  # <s> user, and <e> <s> yes no
    arguments = ["embed", "--device", "cpu", "--model", folder, "--truncate-right", "--max-length"]
    assert cli.main([*map(str, [*arguments, least + 1, path])]) == 0
    message = failing_command(capsys, *arguments, least, path)
    assert "long.jsonl, line 1 has no room: template and prompt take " in message


def test_a_template_that_drops_a_text_is_refused(tmp_path, capsys):
    folder, _ = encoder(tmp_path, "{% for m in messages %}{{ m['role'] }} {% endfor %}")
    assert "the chat template of the model's tokenizer drops user" in failing(capsys, "embed", folder)
    with_template(folder, "{% for m in messages if m.role == 'user' %}{{ m['content'] }} {% endfor %}")
    assert "drops system: it must render the roles system, user" in failing(capsys, "embed", folder, "--prompt", "w1")
    with_template(folder, "{{ raise_exception('not today') }}")
    assert "the chat template of the model's tokenizer failed: TemplateError: not today" in failing(
        capsys, "embed", folder
    )
    tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    assert "chat template of the model's tokenizer failed" in failing(capsys, "embed", folder)


@pytest.mark.parametrize("template", [FLAT, PARTS, SWAPPED, None])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_pairs_are_rendered_as_predict_renders_them(tmp_path, template, kind):
    folder, made = cross_encoder(tmp_path, template, kind)
    check(rerank(folder), made.predict(PAIRS))
    # The folder of which it was made doesn't mention the template.
    base = tmp_path / "base"
    check(rerank(base, *(["--template", "chat"] if template else [])), made.predict(PAIRS))
    made[0].modality_config.pop("message", None)
    check(rerank(base, *(["--template", "pairs"] if template else [])), made.predict(PAIRS))
    check(rerank(folder, "--template", "pairs"), made.predict(PAIRS))


def test_a_folder_that_says_nothing_of_a_template_that_takes_pairs_is_asked_about(tmp_path, capsys):
    cross_encoder(tmp_path)
    base = tmp_path / "base"
    message = failing(capsys, "rerank", base)
    assert "does not say whether its chat template, which takes a query and a document, renders its pairs" in message
    assert "--template chat does so, as sentence-transformers 6 does; --template pairs leaves it aside" in message
    pairs = rerank(base, "--template", "pairs")
    # Versions without modules never rendered a pair.
    config = json.loads((base / "config.json").read_text())
    for old in ({"version": "5.2.0"}, {"version": "4.0.1", "activation_fn": "torch.nn.modules.activation.Sigmoid"}):
        (base / "config.json").write_text(json.dumps({**config, "sentence_transformers": old}))
        check(rerank(base), pairs)
    model = save(tmp_path / "causal", head="ForCausalLM")
    assert f"--template chat says how a cross-encoder reads, and --model {model} is none" in failing(
        capsys, "rerank", tmp_path / "causal", "--template", "chat"
    )


@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.Sigmoid()])
@pytest.mark.parametrize("template", [FLAT, None])
def test_a_cross_encoders_own_activation_and_prompt_count(tmp_path, activation, template):
    options = {"prompts": {"q": "w3 w4 "}, "default_prompt_name": "q", "activation_fn": activation}
    folder, made = cross_encoder(tmp_path, template, **options)
    check(rerank(folder), made.predict(PAIRS))


def test_the_activation_of_older_folders_counts(tmp_path):
    """Up to sentence-transformers 5 a cross-encoder is a transformers folder with a section in its config.json."""
    base = save(tmp_path / "base", head="ForSequenceClassification", vocab_size=100)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    for changes in (
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.2.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ):
        path.write_text(json.dumps(config | changes))
        expected = library.CrossEncoder(base, device="cpu").predict(PAIRS)
        assert expected.min() < 0
        check(rerank(tmp_path / "base"), expected)


@pytest.mark.parametrize("false", [5, None])
@pytest.mark.parametrize("template", [FLAT, None])
@pytest.mark.parametrize("activation", [None, torch.nn.Identity()])
def test_a_language_model_scores_as_its_folder_says(tmp_path, false, template, activation):
    processing = {"chat_template": {"add_generation_prompt": True}}
    options = {"activation_fn": activation, "prompts": {"q": "w3 w4 "}, "default_prompt_name": "q"}
    folder, made = answering(tmp_path, template, false, processing, **options)
    check(rerank(folder), made.predict(PAIRS))


def test_a_cut_takes_the_documents_end_alone(tmp_path, capsys):
    processing = {"chat_template": {"add_generation_prompt": True}}
    folder, made = answering(tmp_path, processing=processing)
    words = [f"w{number}" for number in range(40)]
    pairs = [("w1 w2", " ".join(words)), ("w1 w2", "w3"), ("w1 w2 w5", " ".join(words[::-1]))]
    made.max_seq_length = 25
    check(rerank(folder, "--truncate-right", "--max-length", 25, pairs=pairs), made.predict(pairs))
    path = write_jsonl(tmp_path / "long.jsonl", [{"query": pairs[0][0], "documents": [pairs[0][1]]}])
    arguments = ["rerank", "--device", "cpu", "--model", folder, "--max-length", 11, path]
    assert "documents[0] takes 51 tokens with its query, and the most are 11" in failing_command(capsys, *arguments)
    message = failing_command(capsys, *arguments, "--truncate-right")
    assert "line 1: documents[0] has no room: template and prompt take 11 tokens, and the most are 11" in message


def test_a_query_behind_the_document_outlives_the_cut(tmp_path):
    folder, made = cross_encoder(tmp_path, SWAPPED)
    words = " ".join(f"w{number}" for number in range(40))
    found = rerank(folder, "--truncate-right", "--max-length", 20, pairs=[("w1 w2", words), ("w1 w3", words)])
    short = " ".join(words.split()[:16])
    check(found, made.predict([("w1 w2", short), ("w1 w3", short)]))


def test_a_template_without_these_roles_is_refused_where_the_folder_asks_for_it(tmp_path, capsys):
    """A folder that says nothing leaves it aside."""
    template = "{% for m in messages if m.role in ('user', 'system') %}{{ m['content'] }} {% endfor %}"
    folder, _ = cross_encoder(tmp_path, template)
    assert "drops query and document" in failing(capsys, "rerank", folder)
    found = rerank(tmp_path / "base")
    for pairs in (tmp_path / "base", folder):
        tokenizer().save_pretrained(pairs)
        (pairs / "chat_template.jinja").unlink()
    check(found, library.CrossEncoder(str(tmp_path / "base"), device="cpu").predict(PAIRS))
