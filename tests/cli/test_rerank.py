"""radix-ops rerank: against the code of Qwen3-Reranker's model card, transformers, and CrossEncoder.predict."""

import json

import numpy as np
import pytest
import torch

from helpers.commands import QUERIES, failing_command, read_jsonl, write_jsonl
from helpers.language_models import TEXT, needs_hf, reranking_tokenizer, tiny_model
from radix_ops import cli
from radix_ops.data.records import UserError
from radix_ops.engine import _engine, reranking
from radix_ops.engine.runners import Qwen3Runner
from radix_ops.engine.templates import QWEN3_RERANKER, find_template

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PAIRS = [(line["query"], document) for line in QUERIES for document in line["documents"]]
PLAIN_TEMPLATE = {"text": "{instruction}\nDocument: {document}\nQuery: {query} ->", "instruction": "Judge {query}!"}


def rerank(model, *arguments):
    return cli.main(["rerank", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing(capsys, model, *arguments):
    return failing_command(capsys, "rerank", "--device", "cpu", "--model", model, *arguments)


def save(folder, model, adds_bos=False):
    model.save_pretrained(folder)
    reranking_tokenizer(adds_bos).save_pretrained(folder)
    return folder


def language_model(kind="Qwen3"):
    return tiny_model(kind, vocab_size=360, max_position_embeddings=512)


def cross_encoder(kind="Qwen3", **changes):
    torch.manual_seed(0)
    config = language_model(kind).config
    config.pad_token_id, config.num_labels = 1, 1
    config.update(changes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return save(tmp_path_factory.mktemp("reranker"), language_model())


@pytest.fixture
def queries(tmp_path):
    return write_jsonl(tmp_path / "queries.jsonl", QUERIES)


def model_card(folder, lines, max_length=512):
    """Return scores as the model card of Qwen/Qwen3-Reranker-0.6B computes them, one pair at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    token_false_id = tokenizer.convert_tokens_to_ids("no")
    token_true_id = tokenizer.convert_tokens_to_ids("yes")
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prefix_tokens = tokenizer.encode(prefix, add_special_tokens=False)
    suffix_tokens = tokenizer.encode(suffix, add_special_tokens=False)
    default = "Given a web search query, retrieve relevant passages that answer the query"
    scores = []
    for line in lines:
        for document in line["documents"]:
            instruction = line.get("instruction", default)
            pair = f"<Instruct>: {instruction}\n<Query>: {line['query']}\n<Document>: {document}"
            room = max_length - len(prefix_tokens) - len(suffix_tokens)
            ids = tokenizer(pair, truncation="longest_first", max_length=room, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prefix_tokens + ids + suffix_tokens])).logits[0, -1]
            scores.append(torch.stack([logits[token_false_id], logits[token_true_id]]).softmax(0)[1].item())
    return split(scores, lines)


def split(scores, lines=QUERIES):
    return [part.tolist() for part in np.split(np.array(scores), np.cumsum([len(x["documents"]) for x in lines])[:-1])]


def check(results, expected, lines=QUERIES):
    assert [r["line"] for r in results] == list(range(1, len(lines) + 1))
    for found, scores, line in zip(results, expected, lines, strict=True):
        assert found["scores"] == pytest.approx(scores, abs=2e-5)
        assert found["order"] == sorted(range(len(scores)), key=lambda i: -found["scores"][i])
        extra = {key: value for key, value in line.items() if key not in ("query", "documents", "instruction")}
        assert set(found) == {"line", "scores", "order", "key", *extra}
        assert {key: found[key] for key in extra} == extra
    # Scores that all lie together would tell nothing.
    assert np.ptp([score for scores in expected for score in scores]) > 0.03


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("options", [[], ["--plain"], ["--token-budget", 40], ["--plain", "--token-budget", 1]])
def test_rerank_equals_the_model_card_of_qwen3_reranker(reranker, queries, capsys, options):
    assert rerank(reranker, *options, queries) == 0
    check(printed(capsys), model_card(reranker, QUERIES))


def test_the_template_stays_whole_where_documents_are_cut(reranker, tmp_path, capsys):
    lines = [{"query": "the sea", "documents": [" ".join(TEXT), "the river " * 60, "", "short"]}]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    lengths = []
    for max_length in (225, 250, 300):
        message = failing(capsys, reranker, "--max-length", max_length, path)
        assert "line 1: documents[" in message
        assert f"and the most are {max_length}; --truncate-right drops tokens from the document's end" in message
        assert rerank(reranker, "--truncate-right", "--max-length", max_length, path) == 0
        (result,) = printed(capsys)
        (expected,) = model_card(reranker, lines, max_length)
        assert result["scores"] == pytest.approx(expected, abs=2e-5)
        lengths.append(tuple(result["scores"]))
    assert len(set(lengths)) == 3
    message = failing(capsys, reranker, "--truncate-right", "--max-length", 224, path)
    assert "documents[0] has no room: template and query take 224 tokens, and the most are 224" in message


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_rerank_by_a_template_of_a_file(tmp_path, queries, kind, capsys):
    needs_hf()
    model = language_model(kind)
    folder, tokenizer = save(tmp_path / "model", model, adds_bos=True), reranking_tokenizer(True)
    river = tokenizer.encode(" river", add_special_tokens=False)
    assert len(river) == 1
    template = {**PLAIN_TEMPLATE, "yes": " river", "no": 7}
    (tmp_path / "template.json").write_text(json.dumps(template))
    expected = []
    for line in QUERIES:
        for document in line["documents"]:
            head = f"{line.get('instruction', 'Judge {query}!')}\nDocument: {document}"
            ids = [
                i
                for text in (head, f"\nQuery: {line['query']} ->")
                for i in tokenizer.encode(text, add_special_tokens=False)
            ]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            expected.append(logits[[*river, 7]].softmax(0)[0].item())
    for options in ([], ["--plain"]):
        assert rerank(folder, "--template", tmp_path / "template.json", *options, queries) == 0
        check(printed(capsys), split(expected))


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("options", [[], ["--plain"], ["--token-budget", 40]])
def test_a_cross_encoder_equals_sentence_transformers(tmp_path, kind, options, capsys):
    needs_hf()
    library = pytest.importorskip("sentence_transformers")
    lines = [{key: value for key, value in line.items() if key != "instruction"} for line in QUERIES]
    lines[2]["documents"] = ["x", *lines[2]["documents"]]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    folder = save(tmp_path / "model", cross_encoder(kind))
    saved = library.CrossEncoder(str(folder), device="cpu")
    saved.save_pretrained(str(tmp_path / "st"))
    pairs = [(line["query"], document) for line in lines for document in line["documents"]]
    expected = split(saved.predict(pairs, batch_size=1), lines)
    for model in (folder, tmp_path / "st"):
        assert rerank(model, *options, path) == 0
        check(printed(capsys), expected, lines)


def test_pairs_lose_the_end_of_the_document_alone(tmp_path, capsys):
    needs_hf()
    model, tokenizer = cross_encoder(), reranking_tokenizer(True)
    folder = save(tmp_path / "model", model, adds_bos=True)
    lines = [{"query": TEXT[2], "documents": [" ".join(TEXT), "the sea", TEXT[1]]}]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    query = tokenizer(TEXT[2], add_special_tokens=False)["input_ids"]
    expected = []
    for document in lines[0]["documents"]:
        ids = tokenizer(TEXT[2], document)["input_ids"][: len(query) + 10]
        assert ids[: len(query)] == query
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, 0].sigmoid().item())
    assert rerank(folder, "--truncate-right", "--max-length", len(query) + 10, path) == 0
    assert printed(capsys)[0]["scores"] == pytest.approx(expected, abs=2e-5)
    message = failing(capsys, folder, "--truncate-right", "--max-length", len(query), path)
    assert f"documents[0] has no room: its query takes {len(query)} tokens, and the most are {len(query)}" in message


def test_a_cross_encoder_reads_a_template_if_one_is_given(tmp_path, queries, capsys):
    needs_hf()
    model, tokenizer = cross_encoder(), reranking_tokenizer()
    folder = save(tmp_path / "model", model)
    expected = []
    for line in QUERIES:
        instruction = line.get("instruction", QWEN3_RERANKER.instruction)
        for document in line["documents"]:
            text = QWEN3_RERANKER.text.replace("{instruction}", instruction).replace("{query}", line["query"])
            ids = tokenizer(text.replace("{document}", document))["input_ids"]
            with torch.no_grad():
                expected.append(model(torch.tensor([ids])).logits[0, 0].sigmoid().item())
    assert rerank(folder, "--template", "qwen3-reranker", queries) == 0
    check(printed(capsys), split(expected))


def test_rerank_continues_an_interrupted_run(reranker, queries, tmp_path, monkeypatch, capsys):
    output = tmp_path / "ranked.jsonl"
    inner, calls = Qwen3Runner.states, []

    def stopping(self, sequences, *tokens):
        calls.append(len(sequences))
        if len(calls) > 7:
            raise KeyboardInterrupt
        return inner(self, sequences, *tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3Runner, "states", stopping)
        assert rerank(reranker, "--token-budget", 1, "--output", output, queries) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert 0 < len(read_jsonl(output)) < len(QUERIES)
    message = failing(capsys, reranker, "--output", output, "--plain", queries)
    assert "ranked.jsonl, line 1 is no result of this input, model, dtype and mode; --overwrite replaces it" in message
    calls.clear()
    monkeypatch.setattr(Qwen3Runner, "states", lambda self, s, *t: calls.extend(s) or inner(self, s, *t))
    assert rerank(reranker, "--output", output, queries) == 0
    assert 0 < len(calls) < len(PAIRS)
    check(read_jsonl(output), model_card(reranker, QUERIES))


def test_compare_reports_both_runs(reranker, queries, tmp_path, capsys):
    assert rerank(reranker, "--compare", "--output", tmp_path / "r.jsonl", queries) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    assert "orders that agree: 4 of 4\n" in out
    assert float(out.split("largest difference of a score: ")[1]) < 1e-5
    check(read_jsonl(tmp_path / "r.jsonl"), model_card(reranker, QUERIES))


def test_equal_documents_get_equal_scores_wherever_they_ran():
    query = reranking.Query("line 1", "", ["a", "b", "a", "c"], None, {})
    found = reranking.result(query, np.array([0.25, 0.5, 0.25 + 2**-20, 0.125], dtype=np.float32))
    assert found["scores"] == [0.25, 0.5, 0.25, 0.125]
    assert found["order"] == [1, 0, 2, 3]


@pytest.mark.parametrize("options", [[], ["--plain"], ["--output", "r.jsonl"]])
def test_lines_without_documents_have_empty_results(reranker, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    empty, expected = {"query": "a", "documents": []}, model_card(reranker, QUERIES)
    for lines, scores in [
        ([empty, *QUERIES[:2], empty, *QUERIES[2:], empty], [[], *expected[:2], [], *expected[2:], []]),
        ([empty, empty], [[], []]),
    ]:
        path = write_jsonl(tmp_path / "q.jsonl", lines)
        for _ in range(2):  # the second run continues behind the first
            assert rerank(reranker, *options, path) == 0
            results = read_jsonl("r.jsonl") if "--output" in options else printed(capsys)
            assert [found["order"] for found in results if not found["scores"]] == [[]] * scores.count([])
            assert [found["line"] for found in results] == list(range(1, len(lines) + 1))
            for found, wanted in zip(results, scores, strict=True):
                assert found["scores"] == pytest.approx(wanted, abs=2e-5)
        (tmp_path / "r.jsonl").unlink(missing_ok=True)


def test_compare_counts_lines_without_documents(reranker, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"query": "a", "documents": []}, *QUERIES])
    assert rerank(reranker, "--compare", "--output", tmp_path / "r.jsonl", path) == 0
    assert "orders that agree: 5 of 5\n" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "r.jsonl")[0]["scores"] == []
    write_jsonl(path, [{"query": "a", "documents": []}])
    message = failing(capsys, reranker, "--compare", path)
    assert "--compare has nothing to run: the input holds no sequences" in message


def objects():
    """Return the queries with ids for them and their documents."""
    lines = [{**line, "query_id": f"q{n}"} for n, line in enumerate(QUERIES)]
    for line in lines:
        line["documents"] = [{"id": f"d{n}", "text": text} for n, text in enumerate(line["documents"])]
    return lines


def test_the_best_documents_come_with_ids_and_texts(reranker, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", objects())
    assert rerank(reranker, "--top-k", 2, "--texts", path) == 0
    for found, scores, line in zip(printed(capsys), model_card(reranker, QUERIES), QUERIES, strict=True):
        assert found["scores"] == pytest.approx(scores, abs=2e-5)
        assert found["order"] == sorted(range(len(scores)), key=lambda i: -found["scores"][i])[:2]
        assert found["ids"] == [f"d{index}" for index in found["order"]]
        assert found["texts"] == [line["documents"][index] for index in found["order"]]
    output = tmp_path / "r.jsonl"
    assert rerank(reranker, "--top-k", 2, "--output", output, path) == 0
    message = failing(capsys, reranker, "--top-k", 1, "--output", output, path)
    assert "is no result of this input, model, dtype and mode; --overwrite replaces it" in message


def test_bad_lines_are_refused_before_a_model_is_loaded(reranker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    path = tmp_path / "q.jsonl"
    for line, message in [
        ({"query": "a"}, 'line 2 has no "documents" (an array of strings); it has "query"'),
        ({"query": 1, "documents": ["a"]}, 'line 2: "query" is a number; it must be a string'),
        ({"query": "a", "documents": ["a", None]}, "line 2: documents[1] is null; it must be a string"),
        ({"query": "a", "documents": ["a"], "instruction": 2}, 'line 2: "instruction" is a number'),
        ({"query": "a", "documents": ["a"], "order": 2}, 'line 2 has the key "order", which the output uses itself'),
    ]:
        write_jsonl(path, [QUERIES[0], line])
        assert f"q.jsonl, {message}" in failing(capsys, reranker, path)


def test_models_that_need_something_else_are_refused(queries, tmp_path, capsys):
    llama = save(tmp_path / "llama", language_model("Llama"))
    message = failing(capsys, llama, queries)
    assert "is a language model of type llama, which has no template of its own: name one by --template" in message
    message = failing(capsys, save(tmp_path / "three", cross_encoder(num_labels=3)), queries)
    assert "has a classification head of 3 labels; rerank needs one of 1" in message
    message = failing(capsys, save(tmp_path / "unpadded", cross_encoder(pad_token_id=None)), queries)
    assert "its config has no pad_token_id" in message
    pairs = save(tmp_path / "pairs", cross_encoder())
    assert 'line 2 has an "instruction", which a cross-encoder does not take' in failing(capsys, pairs, queries)
    (pairs / "modules.json").write_text(json.dumps([{"type": "a.Transformer"}, {"type": "a.Dense"}]))
    write_jsonl(queries, QUERIES[:1])
    message = failing(capsys, pairs, queries)
    assert "has the modules Transformer, Dense; radix-ops rerank computes Transformer alone" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is neither qwen3-reranker nor a file: No such file"),
        ("{", "is not JSON"),
        ("[]", 'must hold an object with "text"'),
        ('{"yes": "a"}', 'must hold an object with "text"'),
        ('{"text": "{query}{document}", "yess": "a"}', 'has the key "yess"; a template has text, yes, no and instr'),
        ('{"text": "{query}{document}", "yes": true}', '"yes" must be a string or a token id'),
        ('{"text": 1}', '"text" must be a string'),
        ('{"text": "{query}"}', "can't be used: its text must hold {document} once and {query}"),
        ('{"text": "{query}{document}{document}"}', "can't be used: its text must hold {document} once and {query}"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        find_template(str(path))
    assert f"--template {path}" in str(error.value)
    assert message in str(error.value)


def test_answers_must_be_tokens(reranker, queries, tmp_path, capsys):
    path = tmp_path / "t.json"
    for answers, message in [
        ({"yes": "yes no"}, "the template's yes, 'yes no', is 3 tokens to the model's tokenizer; it must be one"),
        ({"no": 10**6}, "the template's no, 1000000, is no id of the model's tokenizer, which has "),
        ({"no": -1}, "the template's no, -1, is no id"),
    ]:
        path.write_text(json.dumps({**PLAIN_TEMPLATE, **answers}))
        assert message in failing(capsys, reranker, "--template", path, queries)
    path.write_text(json.dumps({"text": "{instruction} {query} {document}"}))
    message = failing(capsys, reranker, "--template", path, queries)
    assert 'line 1 has no "instruction", and the template no default for it' in message
