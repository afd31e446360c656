"""radix-ops score: what all results say together, and the ways to ask, against numbers that are counted by hand."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline

from helpers.commands import failing_command, read_jsonl, score, write_jsonl
from helpers.language_models import TEXT, needs_hf, tiny_model, tiny_tokenizer
from radix_ops.cli.measured import report
from radix_ops.engine.runners import TransformersRunner

needs_hf()

QUESTIONS = [
    {"context": TEXT[1], "choices": [" the Seine", " the river Rhine", " x"], "gold": "A"},
    {"context": TEXT[1], "choices": [" the Thames", " the river and the sea", " Paris"], "gold": 1},
    {"context": TEXT[2], "choices": [" yes", " no"], "gold": "no"},
    {"context": TEXT[2], "choices": [" maybe", " Answer: yes, no"]},
    {"context": "the ", "choices": ["sea", "river or the Thames"], "gold": None},
    {"context": "", "choices": ["the", " sea"], "gold": "B"},
]
GOLD = [0, 1, 1, None, None, 1]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<>{% endif %}"


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def chat_folder(tmp_path):
    tiny_model(max_position_embeddings=256).save_pretrained(tmp_path / "chat")
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def failing(capsys, *arguments) -> str:
    return failing_command(capsys, "score", "--device", "cpu", "--model", *arguments)


def by_hand(results):
    """Count the right answers by sum, per token and per character."""
    counts = [0, 0, 0]
    for result, question, gold in zip(results, QUESTIONS, GOLD, strict=True):
        assert result.get("gold") == gold
        if gold is not None:
            lengths = [len(choice.lstrip()) for choice in question["choices"]]
            for place, sizes in enumerate(([1] * len(lengths), result["tokens"], lengths)):
                counts[place] += int(np.argmax(np.divide(result["logprobs"], sizes))) == gold
    return counts


def correct(found):
    return [found["accuracy"][name]["correct"] for name in ("sum", "per_token", "per_char")]


@pytest.mark.parametrize("mode", [[], ["--plain"]])
def test_accuracy_is_told_and_written(model_folder, questions, tmp_path, capsys, mode):
    output, path = tmp_path / "scores.jsonl", tmp_path / "metrics.json"
    assert score(model_folder, *mode, "--output", output, "--metrics", path, "--calibration", questions) == 0
    found, results = json.loads(path.read_text()), read_jsonl(output)
    assert correct(found) == by_hand(results)
    assert (found["rows"], found["rows_with_gold"]) == (6, 4)
    assert sum(row["answers"] for row in found["calibration"]["bins"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n".join(report(found)) + "\n")
    assert "accuracy of the 4 rows with gold, of 6, and its 95% interval (Wilson score):\n" in err


def test_accuracy_is_told_where_results_go_to_standard_output(model_folder, questions, capsys):
    assert score(model_folder, questions) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    share = by_hand(results)[0] / 4
    assert re.search(rf"\n  by sum \(acc\) +{share:.1%}  ", err)
    assert "expected calibration error" not in err


def test_questions_without_gold_have_no_accuracy(model_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{k: v for k, v in q.items() if k != "gold"} for q in QUESTIONS])
    assert score(model_folder, path) == 0
    assert "accuracy" not in capsys.readouterr().err


def test_a_resumed_run_counts_all_rows(model_folder, questions, tmp_path, monkeypatch, capsys):
    output, path = tmp_path / "scores.jsonl", tmp_path / "metrics.json"
    arguments = ("--plain", "--output", output, "--metrics", path, "--calibration", questions)
    assert score(model_folder, *arguments) == 0
    whole, lines = json.loads(path.read_text()), output.read_bytes().splitlines(keepends=True)
    path.unlink()
    output.write_bytes(b"".join(lines[1:4]))
    capsys.readouterr()
    assert score(model_folder, *arguments) == 0
    err = capsys.readouterr().err
    assert "holds 3 of 6 results already" in err
    found = json.loads(path.read_text())
    assert (found["rows"], correct(found)) == (6, correct(whole)) == (6, by_hand(read_jsonl(output)))
    # The three rows ran in another batch, which rounds otherwise.
    error = "expected_calibration_error"
    assert found["calibration"][error] == pytest.approx(whole["calibration"][error], abs=1e-5)
    assert err.endswith("\n".join(report(found)) + "\n")

    monkeypatch.setattr(TransformersRunner, "states", lambda *arguments: pytest.fail("the model ran"))
    path.unlink()
    assert score(model_folder, *arguments) == 0
    assert json.loads(path.read_text()) == found
    assert capsys.readouterr().err.endswith("\n".join(report(found)) + "\n")


@pytest.mark.parametrize("name", ["scores.csv", "scores.tsv.gz", "scores.parquet", "scores.jsonl.gz"])
@pytest.mark.parametrize("lines", [QUESTIONS, [{"text": text} for text in TEXT]], ids=["questions", "texts"])
def test_results_of_every_format_count(model_folder, tmp_path, capsys, monkeypatch, name, lines):
    """What the file of the results holds counts, in a run and in one that finds all of them there."""
    path, file = tmp_path / "metrics.json", write_jsonl(tmp_path / "input.jsonl", lines)
    assert score(model_folder, "--plain", "--metrics", path, file) == 0
    whole = json.loads(path.read_text())
    for _ in range(2):
        path.unlink()
        assert score(model_folder, "--plain", "--output", tmp_path / name, "--metrics", path, file) == 0
        assert json.loads(path.read_text()) == whole
        assert capsys.readouterr().err.endswith("\n".join(report(whole)) + "\n")
        monkeypatch.setattr(TransformersRunner, "states", lambda *arguments: pytest.fail("the model ran"))


@pytest.mark.parametrize("name", [None, "scores.jsonl", "scores.csv", "scores.parquet"])
@pytest.mark.parametrize("on_error", ["skip", "record"])
def test_rows_that_cannot_be_used_do_not_count(model_folder, tmp_path, capsys, name, on_error):
    path, file = tmp_path / "metrics.json", tmp_path / "input.jsonl"
    assert score(model_folder, "--plain", "--metrics", path, write_jsonl(file, QUESTIONS)) == 0
    whole = json.loads(path.read_text())
    write_jsonl(file, [{"context": "the sea"}, *QUESTIONS, {**QUESTIONS[0], "gold": 7}, {"text": "the sea"}])
    options = ["--on-error", on_error, *(["--output", tmp_path / name] if name else [])]
    for _ in range(2):
        capsys.readouterr()
        assert score(model_folder, "--plain", "--metrics", path, *options, file) == 0
        assert json.loads(path.read_text()) == whole
        assert capsys.readouterr().err.endswith("\n".join(report(whole)) + "\n")


@pytest.mark.parametrize("name", ["q.csv", "q.parquet", "q.json"])
def test_gold_is_read_from_tables(model_folder, tmp_path, name):
    """Cells of CSV are text, and a column of Parquet has null where a row has nothing."""
    rows = [{**question, "gold": gold} for question, gold in zip(QUESTIONS, GOLD, strict=True)]
    if name == "q.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    elif name == "q.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        with open(tmp_path / name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows([{**row, "choices": json.dumps(row["choices"])} for row in rows[:4]])
            # An empty cell is no gold.
    path = tmp_path / "m.json"
    assert score(model_folder, "--metrics", path, tmp_path / name) == 0
    found = json.loads(path.read_text())
    assert found["rows_with_gold"] == (3 if name == "q.csv" else 4)


@pytest.mark.parametrize("with_output", [False, True])
def test_compare_tells_the_accuracy_of_the_folded_run(model_folder, questions, tmp_path, capsys, with_output):
    output, path = tmp_path / "scores.jsonl", tmp_path / "metrics.json"
    options = ["--output", output] if with_output else []
    assert score(model_folder, "--compare", "--metrics", path, *options, questions) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == 6
    if with_output:
        assert correct(found) == by_hand(read_jsonl(output))
    assert "accuracy of the 4 rows with gold" in capsys.readouterr().err


def test_the_report_reads_as_written_down():
    share = {"correct": 612, "value": 0.612, "low": 0.5814, "high": 0.6417}
    found = {
        "rows": 1200,
        "rows_with_gold": 1000,
        "accuracy": dict.fromkeys(("sum", "per_token", "per_char"), share),
        "interval": {"method": "Wilson score", "level": 0.95},
        "calibration": {
            "expected_calibration_error": 0.04321,
            "bins": [{"above": 0.2, "up_to": 0.3, "answers": 1000, "confidence": 0.25, "accuracy": 0.612}],
        },
    }
    assert_expected_inline(
        "\n".join(report(found)),
        """\
accuracy of the 1,000 rows with gold, of 1,200, and its 95% interval (Wilson score):
  by sum (acc)               61.2%  58.1% to 64.2%
  per token                  61.2%  58.1% to 64.2%
  per character (acc_norm)   61.2%  58.1% to 64.2%
confidence      answers   mean confidence   accuracy
0.2 to 0.3        1,000             0.250      0.612
expected calibration error: 0.0432""",
    )
    texts = {"rows": 2, "logprob": -5000.0, "tokens": 1000, "words": 1, "bytes": 3000, "bits_per_byte": 2.4045}
    texts |= {"token_perplexity": 148.4131, "word_perplexity": None, "byte_perplexity": 5.2945}
    assert_expected_inline(
        "\n".join(report(texts)),
        """\
perplexity of 2 texts: 148.4131 a token (1,000 tokens), none a word (1 words), 5.2945 a byte (3,000 bytes)
log-probability -5,000.000, bits a byte 2.4045""",
    )


def alone(text: str, size: int = 256) -> float:
    """Return a text's log-probability behind BOS, by one forward."""
    ids = tiny_tokenizer(adds_bos=True)(text)["input_ids"]
    with torch.no_grad():
        logprobs = tiny_model(max_position_embeddings=256)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]].sum().item()


@pytest.mark.parametrize("mode", [[], ["--plain"], ["--compare"]])
def test_texts_are_scored_whole(model_folder, tmp_path, capsys, mode):
    path, output = (
        write_jsonl(tmp_path / "texts.jsonl", [{"text": t, "id": n} for n, t in enumerate(TEXT)]),
        tmp_path / "o.jsonl",
    )
    assert score(model_folder, *mode, "--output", output, "--metrics", tmp_path / "m.json", path) == 0
    results, found = read_jsonl(output), json.loads((tmp_path / "m.json").read_text())
    for line, (result, text) in enumerate(zip(results, TEXT, strict=True), 1):
        assert set(result) == {"line", "id", "logprob", "tokens", "words", "bytes", "perplexity", "key"}
        assert (result["line"], result["id"]) == (line, line - 1)
        assert result["logprob"] == pytest.approx(alone(text), abs=1e-3)
    total = sum(alone(text) for text in TEXT)
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / sum(len(t.split()) for t in TEXT)), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / sum(map(len, TEXT))), rel=1e-4)
    out, err = capsys.readouterr()
    assert err.endswith("\n".join(report(found)) + "\n")
    assert mode != ["--compare"] or "largest difference of a text's log-probability:" in out


def test_token_ids_have_neither_characters_nor_words(model_folder, tmp_path, capsys):
    ids = tiny_tokenizer(adds_bos=True)(TEXT[0])["input_ids"]
    path = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": ids}])
    assert score(model_folder, "--metrics", tmp_path / "m.json", path) == 0
    assert json.loads((tmp_path / "m.json").read_text())["logprob"] == pytest.approx(alone(TEXT[0]), abs=1e-3)
    assert re.search(
        r"perplexity of 1 texts: \S+ a token \(\d+ tokens\)\nlog-probability \S+\n$", capsys.readouterr().err
    )
    rows = [{"context_ids": ids, "choices_ids": [[5, 6], [7]], "gold": 1}, {**QUESTIONS[0], "choices": [" x", " y"]}]
    path = write_jsonl(tmp_path / "ids.jsonl", rows)
    assert score(model_folder, path) == 0
    err = capsys.readouterr().err
    assert "per token" in err
    assert "per character" not in err


@pytest.mark.parametrize("mode", [[], ["--compare"]])
def test_a_file_of_texts_has_one_a_line(model_folder, tmp_path, mode):
    (tmp_path / "texts.txt").write_text("\n".join(["", *TEXT]) + "\n")
    assert score(model_folder, *mode, "--output", tmp_path / "o.jsonl", tmp_path / "texts.txt") == 0
    empty, *results = read_jsonl(tmp_path / "o.jsonl")
    assert [result["logprob"] for result in results] == pytest.approx([alone(text) for text in TEXT], abs=1e-3)
    assert (empty["line"], empty["logprob"], empty["tokens"], empty["perplexity"]) == (1, 0, 0, None)


def test_long_texts_are_refused_or_scored_in_windows(model_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the river and the sea " * 60}])
    assert "line 1 has 362 tokens and the model reads at most 256; --stride N" in failing(capsys, model_folder, path)
    assert score(model_folder, "--stride", 100, path) == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert result["tokens"] == 362


def test_letters_and_chat_decide_what_is_read(chat_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Which?", "choices": ["Seine", "Rhine"], "gold": "Seine"}])
    tokenizer, model = tiny_tokenizer(adds_bos=True), tiny_model(max_position_embeddings=256)
    prompts = {
        (): ("<s>Question: Which?\nAnswer:", [" Seine", " Rhine"]),
        ("--letters",): ("<s>Which?\nA. Seine\nB. Rhine\nAnswer:", [" A", " B"]),
        ("--chat",): ("<user>Question: Which?\nAnswer:\n<>", ["Seine", "Rhine"]),
        ("--chat", "--letters", "--system", "Be brief."): (
            "<system>Be brief.\n<user>Which?\nA. Seine\nB. Rhine\nAnswer:\n<>",
            ["A", "B"],
        ),
    }
    keys = set()
    for options, (context, choices) in prompts.items():
        assert score(chat_folder, *options, path) == 0
        (result,) = map(json.loads, capsys.readouterr().out.splitlines())
        for choice, found in zip(choices, result["logprobs"], strict=True):
            before = len(tokenizer.encode(context, add_special_tokens=False))
            ids = tokenizer.encode(context + choice, add_special_tokens=False)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            wanted = sum(logprobs[place - 1, ids[place]].item() for place in range(before, len(ids)))
            assert found == pytest.approx(wanted, abs=1e-4)
        keys.add(result["key"])
    assert len(keys) == len(prompts)


def test_spaces_before_answers_of_a_chat_are_told_once(chat_folder, tmp_path, capsys):
    rows = [{"context": "Which?", "choices": ["a", "b"]}, *[{"context": "Which?", "choices": ["a", " b"]}] * 2]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    for options, count in (([], 0), (["--chat"], 1)):
        assert score(chat_folder, *options, path) == 0
        assert capsys.readouterr().err.count("q.jsonl, line 2: choices begin with white space") == count


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        (["--letters"], {"text": "a"}, 'line 1 holds a text; --letters is for questions with "choices"'),
        (["--calibration"], {"text": "a"}, "line 1 holds a text; --calibration is for questions"),
        (["--truncate-left"], {"text": "a"}, "line 1 holds a text; --truncate-left is for questions"),
        (["--stride", "3"], QUESTIONS[0], "line 1 holds a question; --stride is for texts"),
        (["--calibration"], QUESTIONS[3], '--calibration needs "gold", the right choice, and no row has it'),
        (["--metrics", "m.json"], QUESTIONS[3], '--metrics needs "gold", the right choice, and no row has it'),
        (["--system", "s"], QUESTIONS[0], "--system is the system's message of a chat; it needs --chat"),
        (["--chat"], QUESTIONS[0], "--chat needs a chat template, and the model's tokenizer has none"),
        (["--max-length", "300"], QUESTIONS[0], "--max-length 300 is more than the model reads, 256"),
        ([], {**QUESTIONS[0], "gold": 7}, 'line 1: "gold" is 7; it must be an index from 0 to 2'),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_model_runs(
    model_folder, tmp_path, capsys, monkeypatch, options, row, message
):
    monkeypatch.setattr(TransformersRunner, "states", lambda *arguments: pytest.fail("the model ran"))
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, model_folder, *options, write_jsonl(tmp_path / "q.jsonl", [row]))


@pytest.mark.parametrize("to", [None, "o.jsonl", "o.csv", "o.parquet", "--compare"])
@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (QUESTIONS, {"words": "sea", "bytes": 5, "logprob": -3.5, "perplexity": None}),
        ([{"text": "the sea"}, {"text": "a"}], {"gold": "yes", "best": "sea", "logprobs": [1], "best_per_char": ""}),
    ],
    ids=["questions", "texts"],
)
def test_keys_that_results_of_the_other_kind_have_count_for_nothing(model_folder, tmp_path, rows, keys, to):
    if to == "o.parquet":
        pytest.importorskip("pyarrow")
    found = []
    for name, added in (("bare", {}), ("more", keys)):
        file, told = write_jsonl(tmp_path / f"{name}.jsonl", [row | added for row in rows]), tmp_path / f"{name}.json"
        options = {None: [], "--compare": ["--compare"]}.get(to, ["--output", tmp_path / f"{name}-{to}"])
        assert score(model_folder, *options, "--metrics", told, file) == 0
        found.append(json.loads(told.read_text()))
    bare, more = found
    assert list(bare) == list(more)
    for name in ("rows", "rows_with_gold", "accuracy", "tokens", "words", "bytes"):
        assert bare.get(name) == more.get(name)
    assert bare.get("logprob") == pytest.approx(more.get("logprob"))


def test_questions_and_texts_are_scored_apart(model_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [QUESTIONS[0], {"text": "a"}])
    message = failing(capsys, model_folder, path)
    assert "line 2 holds a text, and what stands before it questions; score them apart" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.csv", "the metrics are one JSON object, so the name must end in .json"),
        ("absent/m.json", "its folder does not exist"),
        ("folder.json", "is not a regular file"),
        ("notes.json", "exists and holds no metrics; --overwrite replaces it"),
        ("questions.json", "which the run reads or writes itself; name another file"),
        ("out.json", "which the run reads or writes itself; name another file"),
        ("data/m.json", "which the run reads; name another place"),
    ],
)
def test_files_that_metrics_cannot_go_to_are_refused(model_folder, tmp_path, capsys, name, message):
    for folder in ("folder.json", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notes.json").write_text("[1]\n")
    write_jsonl(tmp_path / "data" / "more.jsonl", QUESTIONS)
    questions = write_jsonl(tmp_path / "questions.json", QUESTIONS)
    (tmp_path / "out.json").symlink_to(tmp_path / "scores.jsonl")
    path = tmp_path / name
    options = ("--metrics", path, "--output", tmp_path / "scores.jsonl")
    assert message in failing(capsys, model_folder, *options, questions, tmp_path / "data")
    assert (tmp_path / "notes.json").read_text() == "[1]\n"


def test_metrics_replace_metrics_and_others_on_request(model_folder, questions, tmp_path):
    path = tmp_path / "m.json"
    for held, options in (("", []), ("[1]", ["--overwrite"]), ('{"rows": 1, "rows_with_gold": 0}', [])):
        path.write_text(held)
        assert score(model_folder, *options, "--metrics", path, questions) == 0
        assert json.loads(path.read_text())["rows"] == 6
