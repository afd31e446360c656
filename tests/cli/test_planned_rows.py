"""The rows that `radix-ops inspect` promises are those that a run computes."""

import json
import re

import pytest

from helpers.commands import failing_command, failing_inspect, inspect_json, score, write_jsonl
from helpers.language_models import needs_hf, reranking_tokenizer, tiny_classifier, tiny_model, tiny_tokenizer
from radix_ops import cli


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_planned_rows_are_those_that_a_run_computes(tmp_path, capsys, kind):
    """transformers' models give hidden states padded, so a long sequence may not meet many short ones."""
    needs_hf()
    model = tmp_path / "model"
    tiny_model(kind, max_position_embeddings=256).save_pretrained(model)
    tiny_tokenizer(adds_bos=True).save_pretrained(model)
    questions = [{"context": "the sea " * 50, "choices": [" is"]}]
    questions += [{"context": f"the river {number}", "choices": [" is", " flows"]} for number in range(40)]
    file = write_jsonl(tmp_path / "q.jsonl", questions)
    planned = []
    for budget in (100, 130, 400):
        summary = inspect_json(capsys, "--model", model, "--token-budget", budget, file)
        batches = next(batches for batches in summary["batches"] if "max_rows" in batches)
        planned.append((batches["planned"]["batches"], batches["planned"]["rows"]))
        assert score(model, "--token-budget", budget, file) == 0
        rows = re.search(r"as ([\d,]+) rows", capsys.readouterr().err).group(1)
        assert planned[-1][1] == int(rows.replace(",", ""))
    # The limit on padding shows.
    assert (planned[-1][0] == 1) == (kind == "Qwen3")


def check_rows(capsys, file, command, model, *options, shared=()):
    """Compare the tokens and the planned rows that inspect says with those that the run of a command computes."""
    summary = inspect_json(capsys, "--model", model, "--token-budget", 300, *shared, file)
    planned = next(batches["planned"] for batches in summary["batches"] if "max_rows" in batches)
    arguments = [command, "--device", "cpu", "--model", model, "--token-budget", 300, *shared, *options, file]
    assert cli.main(list(map(str, arguments))) == 0
    tokens, rows = re.search(r"([\d,]+) tokens as ([\d,]+) rows", capsys.readouterr().err).groups()
    assert summary["tokens"] == int(tokens.replace(",", ""))
    assert planned["rows"] == int(rows.replace(",", ""))
    assert planned["rows"] < summary["tokens"]


PROMPT = {
    "template": "{{ bos_token }}Review: {{ text }}\nIt was",
    "labels": {"good": [" the river", " sea"], "bad": [[40, 41]]},
}
LINES = [{"text": f"the river {number % 7} and the sea", "label": "good"} for number in range(30)]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("form", ["text", "chat", "ids"])
def test_prompts_with_labels_are_counted_as_they_run(tmp_path, capsys, kind, form):
    needs_hf()
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    tiny_model(kind, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt, lines = dict(PROMPT), LINES
    if form == "chat":
        prompt = {"labels": PROMPT["labels"], "chat": True}
    if form == "ids":
        lines = [{"input_ids": tokenizer(line["text"])["input_ids"]} for line in LINES] + LINES[:1]
    (tmp_path / "p.json").write_text(json.dumps(prompt))
    file = write_jsonl(tmp_path / "rows.jsonl", lines)
    check_rows(capsys, file, "classify", tmp_path / "model", shared=("--template", tmp_path / "p.json"))
    with_tokenizer = inspect_json(capsys, "--tokenizer", tmp_path / "model", "--template", tmp_path / "p.json", file)
    assert with_tokenizer["sequences"] == len(lines) * 2  # the words' last tokens but one stand in two sequences
    assert "`radix-ops classify`" in with_tokenizer["meaning"]


def test_prompts_that_have_names_are_counted(tmp_path, capsys):
    needs_hf()
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tiny_model("Qwen3", max_position_embeddings=256).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": line["text"]}]} for line in LINES]
    )
    check_rows(capsys, file, "classify", tmp_path, shared=("--template", "qwen3guard"))
    message = failing_inspect(capsys, "--template", "qwen3guard", file)
    assert "--template qwen3guard makes prompts: --tokenizer must name the tokenizer" in message
    message = failing_inspect(capsys, "--tokenizer", tmp_path, "--template", "shieldgemma", file)
    assert "rows.jsonl, line 1: the template needs what isn't there: 'text' is undefined" in message
    message = failing_inspect(capsys, "--tokenizer", tmp_path, "--template", "qwen3guard", "--shape", "nli", file)
    assert "--shape says which keys of a row are read, and here the template says that" in message


@pytest.mark.parametrize(
    "lines",
    [
        LINES,
        [{"text": line["text"], "text_pair": "the sea"} if number % 3 else line for number, line in enumerate(LINES)],
        [{"premise": line["text"], "hypothesis": "the sea", "label": 1} for line in LINES],
        [{"sentence": line["text"], "labels": 2} for line in LINES],
    ],
    ids=["texts", "texts and pairs", "nli", "sentences"],
)
def test_texts_of_a_head_are_counted_as_they_run(tmp_path, capsys, lines):
    needs_hf()
    model, tokenizer = tiny_classifier(), tiny_tokenizer(adds_bos=True)
    tokenizer.pad_token = "</s>"
    model.config.id2label = {0: "good", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_rows(capsys, write_jsonl(tmp_path / "rows.jsonl", lines), "classify", tmp_path)


@pytest.mark.parametrize("template", [None, "chat"])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_cross_encoders_queries_are_counted_as_they_run(tmp_path, capsys, template, prompted):
    pytest.importorskip("sentence_transformers")
    from helpers import sentence_folders

    options = {"prompts": {"query": "w30 w31 "}, "default_prompt_name": "query"} if prompted else {}
    folder, _ = sentence_folders.cross_encoder(tmp_path, template and sentence_folders.FLAT, **options)
    queries = [{"query": f"w1 w{n}", "documents": ["w3 w4", f"w{n} w5", "w6"]} for n in range(20)]
    file = write_jsonl(tmp_path / "queries.jsonl", queries)
    check_rows(capsys, file, "rerank", folder)
    check_rows(capsys, file, "rerank", folder, shared=("--template", "pairs"))
    if template:
        chat = inspect_json(capsys, file, "--model", folder)["tokens"]
        assert chat != inspect_json(capsys, file, "--model", folder, "--template", "pairs")["tokens"]
        assert chat == inspect_json(capsys, file, "--model", folder, "--template", "chat")["tokens"]


@pytest.mark.parametrize("prompt", [None, "", "w7 w8"])
@pytest.mark.parametrize("template", ["FLAT", "PARTS"])
def test_texts_that_an_embedders_chat_template_renders_are_counted_as_they_run(tmp_path, capsys, template, prompt):
    pytest.importorskip("sentence_transformers")
    from helpers import sentence_folders

    options = {"prompts": {"of": "w30 w31"}, "default_prompt_name": "of"}
    folder, _ = sentence_folders.encoder(tmp_path, getattr(sentence_folders, template), **options)
    lines = [{"text": f"w1 w2 w{n % 5}"} for n in range(20)]
    shared = () if prompt is None else ("--prompt", prompt)
    check_rows(capsys, write_jsonl(tmp_path / "texts.jsonl", lines), "embed", folder, shared=shared)
    if prompt is None:
        tokens = inspect_json(capsys, tmp_path / "texts.jsonl", "--model", folder)["tokens"]
        assert tokens > inspect_json(capsys, tmp_path / "texts.jsonl", "--tokenizer", folder)["tokens"]


def test_a_rerankers_queries_are_counted_as_they_run(tmp_path, capsys):
    needs_hf()
    tiny_model("Qwen3", vocab_size=360, max_position_embeddings=512).save_pretrained(tmp_path)
    reranking_tokenizer().save_pretrained(tmp_path)
    file = write_jsonl(
        tmp_path / "q.jsonl", [{"query": f"the sea {n}", "documents": ["river", "sea"]} for n in range(4)]
    )
    check_rows(capsys, file, "rerank", tmp_path)


def test_inspect_refuses_queries_as_rerank_does(tmp_path, capsys):
    needs_hf()
    file = write_jsonl(tmp_path / "q.jsonl", [{"query": "the sea", "documents": ["river"]}])
    tiny_model("Llama").save_pretrained(tmp_path / "language")
    tiny_classifier("Qwen3", 3).save_pretrained(tmp_path / "labels")
    for name in ("language", "labels"):
        tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path / name)
    for name, said in (
        ("language", "is a language model of type llama, which has no template of its own: name one by --template"),
        ("labels", "has a classification head of 3 labels; rerank needs one of 1"),
    ):
        message = failing_inspect(capsys, "--model", tmp_path / name, file)
        assert said in message
        assert failing_command(capsys, "rerank", "--model", tmp_path / name, file) == message
    message = failing_inspect(capsys, "--tokenizer", tmp_path / "language", "--template", "chat", file)
    assert "q.jsonl, line 1 holds a query and documents: --template must say" in message
