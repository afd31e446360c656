"""radix-ops classify: against transformers' text-classification pipeline, and labels that are counted by hand."""

import csv
import json

import pytest
from expecttest import assert_expected_inline

from helpers.commands import failing_command, read_jsonl, write_jsonl
from helpers.language_models import TEXT, needs_hf, tiny_classifier, tiny_model, tiny_tokenizer, transformers
from radix_ops import cli
from radix_ops.cli.classify import report
from radix_ops.engine import Classifier, _engine, metrics
from radix_ops.engine.runners import ClassifierRunner

needs_hf()
ROWS = [
    {"text": TEXT[0], "id": 7, "label": "a"},
    {"text": TEXT[0] + " " + TEXT[1], "label": 1},
    {"text": TEXT[0] + " " + TEXT[2], "text_pair": "the sea", "label": -1},
    {"text": TEXT[0] + " x", "label": "c"},
    {"text": TEXT[0] + " the sea", "note": {"of": [1, None]}},
    {"text": TEXT[0], "label": 2},
]
PROMPT = {"template": "Review: {{ text }}\nThe film was", "labels": {"good": [" river", " the"], "bad": " sea"}}


def classify(model, *arguments):
    return cli.main(["classify", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing(capsys, model, *arguments) -> str:
    return failing_command(capsys, "classify", "--device", "cpu", "--model", model, *arguments)


def save(folder, model):
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return save(tmp_path_factory.mktemp("head"), tiny_classifier())


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), tiny_model("Qwen3", max_position_embeddings=256))


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def template(tmp_path):
    (tmp_path / "prompt.json").write_text(json.dumps(PROMPT))
    return tmp_path / "prompt.json"


def by_pipeline(folder):
    call = transformers.pipeline("text-classification", str(folder), device="cpu", top_k=None)
    rows = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in ROWS]
    return [{found["label"]: found["score"] for found in call(row)} for row in rows]


def check(results, expected):
    assert [found["line"] for found in results] == list(range(1, len(ROWS) + 1))
    for found, scores, row in zip(results, expected, ROWS, strict=True):
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(scores, abs=2e-5)
        assert found["best"] == max(scores, key=scores.get)
        extra = {key: value for key, value in row.items() if key not in ("text", "text_pair")}
        assert set(found) - {"gold"} == {"line", "labels", "scores", "best", "key", *extra}
        assert {key: found[key] for key in extra} == extra


@pytest.mark.parametrize("options", [[], ["--plain"], ["--token-budget", 40]])
def test_labels_are_those_of_the_pipeline(head, rows, capsys, options):
    assert classify(head, *options, rows) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    check(results, by_pipeline(head))
    assert [found.get("gold") for found in results] == ["a", "b", None, "c", None, "c"]
    right = sum(found["best"] == found["gold"] for found in results if found.get("gold"))
    assert f"accuracy of the 4 rows with gold, of 6, and its 95% interval (Wilson score):\n  {right / 4:.1%} " in err


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "o.parquet"])
def test_metrics_count_all_rows_of_a_continued_run(head, rows, tmp_path, monkeypatch, capsys, name):
    output, path = tmp_path / name, tmp_path / "metrics.json"
    inner, calls = ClassifierRunner.logits, []

    def stopping(self, sequences):
        calls.append(len(sequences))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return inner(self, sequences)

    arguments = ["--token-budget", 1, "--metrics", path, "--output", output, rows]
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierRunner, "logits", stopping)
        assert classify(head, *arguments) == 130
    assert not path.exists()
    calls.clear()
    monkeypatch.setattr(ClassifierRunner, "logits", lambda self, x: calls.extend(x) or inner(self, x))
    assert classify(head, *arguments) == 0
    found, err = json.loads(path.read_text()), capsys.readouterr().err
    assert 0 < len(calls) < len(ROWS)
    assert found == metrics(Classifier(head, device="cpu").classify(ROWS))
    assert found["rows_with_gold"] == 4
    assert err.endswith("\n".join(report(found)) + "\n")
    if name == "o.jsonl":
        check(read_jsonl(output), by_pipeline(head))
        message = failing(capsys, head, "--output", output, "--top-k", 2, rows)
        assert "o.jsonl, line 1 is no result of this input, model, dtype and mode; --overwrite replaces it" in message


def test_the_report_shows_each_label():
    results = [{"gold": gold, "best": best, "labels": []} for gold, best in zip("aaab", "aab\x1b", strict=True)]
    assert_expected_inline(
        "\n".join(report(metrics([*results, {"labels": [], "best": "a"}]))),
        """\
accuracy of the 4 rows with gold, of 5, and its 95% interval (Wilson score):
  50.0%  15.0% to 85.0%
label              rows  predicted  precision   recall       F1
\\x1b                  0          1      0.000    0.000    0.000
a                     3          2      1.000    0.667    0.800
b                     1          1      0.000    0.000    0.000
mean of labels                          0.333    0.222    0.267""",
    )


def test_several_labels_may_hold_in_tables_too(tmp_path, capsys):
    folder = save(tmp_path / "several", tiny_classifier("Llama", 4, problem_type="multi_label_classification"))
    given = [{"text": row["text"], "label": label} for row, label in zip(ROWS, (["a"], [], "b", [0, 3]), strict=False)]
    file = write_jsonl(tmp_path / "rows.jsonl", given)
    found = []
    for name in ("o.jsonl", "o.csv"):
        path = tmp_path / f"{name}.json"
        assert classify(folder, "--threshold", 0.3, "--metrics", path, "--output", tmp_path / name, file) == 0
        found.append(json.loads(path.read_text()))
    expected = metrics(Classifier(folder, device="cpu", threshold=0.3).classify(given))
    assert found == [expected, expected]
    assert expected["rows_with_gold"] == 4
    with open(tmp_path / "o.csv", newline="") as table:
        assert [json.loads(row["gold"]) for row in csv.DictReader(table)] == [["a"], [], ["b"], ["a", "d"]]


def test_prompts_of_files_label_texts(language_model, template, tmp_path, capsys):
    lines = [{"text": row["text"], "label": "good"} for row in ROWS]
    file = write_jsonl(tmp_path / "rows.jsonl", lines)
    expected = Classifier(language_model, device="cpu", template=template).classify(lines)
    assert classify(language_model, "--template", template, "--top-k", 1, file) == 0
    out, err = capsys.readouterr()
    for line, wanted in zip(out.splitlines(), expected, strict=True):
        found = json.loads(line)
        assert (found["labels"], found["best"]) == (wanted["labels"][:1], wanted["best"])
        assert found["scores"] == pytest.approx(wanted["scores"][:1], abs=1e-6)
        assert (found["gold"], found["label"]) == ("good", "good")
    right = sum(wanted["best"] == "good" for wanted in expected)
    assert f"accuracy of 6 rows, and its 95% interval (Wilson score):\n  {right / 6:.1%} " in err


def test_tables_hold_labels_by_name_and_index(head, tmp_path, capsys):
    with open(tmp_path / "rows.csv", "w", newline="") as table:
        csv.writer(table).writerows([("label", "text"), *zip("a2-c1", (row["text"] for row in ROWS), strict=False)])
    path = tmp_path / "m.json"
    assert classify(head, "--metrics", path, "--output", tmp_path / "o.csv", tmp_path / "rows.csv") == 1
    assert "rows.csv, row 3: \"label\" is '-'; it must be a label" in capsys.readouterr().err
    arguments = ["--on-error", "skip", "--metrics", path, "--output", tmp_path / "o.csv", tmp_path / "rows.csv"]
    assert classify(head, *arguments) == 0
    for name in ("e.csv", "e.parquet"):
        recorded = ["--on-error", "record", "--metrics", tmp_path / "e.json", "--output", tmp_path / name]
        assert classify(head, *recorded, tmp_path / "rows.csv") == 0
        assert json.loads((tmp_path / "e.json").read_text()) == json.loads(path.read_text())
    with open(tmp_path / "o.csv", newline="") as table:
        found = list(csv.DictReader(table))
    assert [row["gold"] for row in found] == ["a", "c", "c", "b"]
    assert [row["row"] for row in found] == ["1", "2", "4", "5"]
    assert json.loads(path.read_text())["rows_with_gold"] == 4


def test_named_columns_are_read(head, language_model, template, tmp_path, capsys):
    rows = [(row["text"], n % 3) for n, row in enumerate(ROWS)]
    (tmp_path / "r.csv").write_text("body,stars\n" + "".join(f'"{text}",{stars}\n' for text, stars in rows))
    write_jsonl(tmp_path / "r.jsonl", [{"review": {"body": text}, "stars": "abc"[stars]} for text, stars in rows])
    for model, options in ((head, {}), (language_model, {"template": template})):
        expected = Classifier(model, device="cpu", **options).classify({"text": row["text"]} for row in ROWS)
        for name, column in (("r.csv", "text=body"), ("r.jsonl", "text=review.body")):
            arguments = ["--template", template] if options else ["--column", "gold=stars"]
            assert classify(model, "--column", column, *arguments, tmp_path / name) == 0
            found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert [row["best"] for row in found] == [row["best"] for row in expected]
            assert options or [row["gold"] for row in found] == ["a", "b", "c"] * 2
    assert "r.csv, row 1 has no column 'text'" in failing(capsys, head, "--column", "text=text", tmp_path / "r.csv")


def test_a_text_file_holds_one_text_a_line(head, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("".join(row["text"] + "\n" for row in ROWS))
    assert classify(head, tmp_path / "texts.txt") == 0
    expected = Classifier(head, device="cpu").classify({"text": row["text"]} for row in ROWS)
    out, err = capsys.readouterr()
    for line, wanted in zip(out.splitlines(), expected, strict=True):
        assert json.loads(line)["scores"] == pytest.approx(wanted["scores"], abs=1e-6)
    assert "accuracy" not in err


def test_compare_reports_both_runs(head, rows, tmp_path, capsys):
    assert classify(head, "--compare", "--output", tmp_path / "o.jsonl", rows) == 0
    out, err = capsys.readouterr()
    assert "best labels that agree: 6 of 6\n" in out
    assert float(out.split("largest difference of a score: ")[1]) < 1e-5
    assert "accuracy of the 4 rows with gold, of 6" in err
    check(read_jsonl(tmp_path / "o.jsonl"), by_pipeline(head))
    assert classify(head, "--compare", rows) == 0
    assert "accuracy of the 4 rows with gold, of 6" in capsys.readouterr().err


def test_the_template_is_not_overwritten_by_metrics(language_model, rows, template, tmp_path, capsys):
    held = template.read_bytes()
    options = ["--template", template, "--metrics", template, "--overwrite"]
    assert "which the run reads or writes itself" in failing(capsys, language_model, *options, rows)
    assert template.read_bytes() == held


def test_a_head_of_fewer_labels_than_the_config_names_is_refused(rows, tmp_path, capsys):
    folder = save(tmp_path / "head", tiny_classifier())
    config = json.loads((folder / "config.json").read_text())
    names = {str(index): label for index, label in enumerate("abcd")}
    changed = {"id2label": names, "label2id": {label: int(index) for index, label in names.items()}}
    (folder / "config.json").write_text(json.dumps(config | changed))
    message = failing(capsys, folder, rows)
    assert "hold score.weight of the shape [3, 32], and its config says [4, 32]" in message


def test_regressions_have_numbers_alone(tmp_path, capsys):
    folder = save(tmp_path / "one", tiny_classifier("Llama", 1, problem_type="regression"))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"], "label": 3.5} for row in ROWS])
    assert classify(folder, file) == 0
    out, err = capsys.readouterr()
    assert "accuracy" not in err
    for line in out.splitlines():
        assert set(json.loads(line)) == {"line", "label", "labels", "scores", "key"}
    assert classify(folder, "--compare", file) == 0


def test_what_cannot_be_used_is_named_before_weights_are_loaded(
    head, language_model, rows, template, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    file = tmp_path / "bad.jsonl"
    for line, message in [
        ({"txt": "a"}, 'line 2 has no "text" (a string); it has "txt"'),
        ({"text": 3}, 'line 2: "text" is a number; it must be a string'),
        ({"text": "a", "label": "d"}, "line 2: \"label\" is 'd'; it must be a label ('a', 'b', 'c') or its index"),
        ({"text": "a", "scores": 1}, 'line 2 has the key "scores", which the output uses itself'),
        ({"text": "a", "key": 1}, 'line 2 has the key "key", which the output uses itself'),
        ({"text": "the sea " * 300}, "line 2 takes"),
    ]:
        write_jsonl(file, [{"text": "a"}, line])
        assert f"bad.jsonl, {message}" in failing(capsys, head, file)
    write_jsonl(file, [{"text": "a"}, {"title": "b"}])
    message = failing(capsys, language_model, "--template", template, file)
    assert "bad.jsonl, line 2: the template needs what isn't there: 'text' is undefined; it has \"title\"" in message
    write_jsonl(file, [{"text": "a"}])
    assert '--metrics needs "gold" or "label"' in failing(capsys, head, "--metrics", tmp_path / "m.json", file)
    assert "which needs a prompt: name one by --template, qwen3guard or" in failing(capsys, language_model, rows)
    assert "--template is for language models" in failing(capsys, head, "--template", template, rows)
    assert "--threshold is for models of which several labels" in failing(capsys, head, "--threshold", 0.4, rows)
    assert "--problem-type is for classification heads" in failing(
        capsys, language_model, "--template", template, "--problem-type", "regression", rows
    )
    token = transformers.Qwen3ForTokenClassification(tiny_model("Qwen3").config)
    message = failing(capsys, save(tmp_path / "token", token), rows)
    assert "is a Qwen3ForTokenClassification, whose head labels each token" in message


@pytest.mark.parametrize(
    "options", [["--threshold", "2"], ["--threshold", "nan"], ["--top-k", "0"], ["--problem-type", "x"]]
)
def test_wrong_usage_is_refused(head, rows, options, capsys):
    with pytest.raises(SystemExit) as stop:
        classify(head, *options, rows)
    assert stop.value.code == 2
    assert "radix-ops classify: error:" in capsys.readouterr().err


HUB = {
    "nli": ("premise", "hypothesis"),
    "sentences": ("sentence1", "sentence2"),
    "text-a-b": ("text_a", "text_b"),
    "sentence": ("sentence",),
}


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_of_the_hub_are_labelled_as_by_the_pipeline_and_measured_as_by_sklearn(
    head, tmp_path, capsys, name, ending
):
    metrics_of = pytest.importorskip("sklearn.metrics")
    texts = [TEXT[0] + " " + text for text in ("x", "the sea", TEXT[1], "the Rhine", "yes", "no, maybe")]
    given = [0, "b", 2, "C", 1, -1]
    if ending == "parquet":  # a column has one type
        given = [0, 1, 2, 2, 1, -1]
    rows = []
    for index, (text, label) in enumerate(zip(texts, given, strict=True)):
        rows.append({**dict(zip(HUB[name], (text, f"the river {index}"), strict=False)), "label": label, "idx": index})
    file = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write_jsonl(file, rows)
    elif ending == "csv":
        with open(file, "w", newline="") as table:
            writer = csv.DictWriter(table, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert classify(head, "--metrics", tmp_path / "m.json", "--output", tmp_path / "o.jsonl", file) == 0
    results, found = read_jsonl(tmp_path / "o.jsonl"), json.loads((tmp_path / "m.json").read_text())
    call = transformers.pipeline("text-classification", str(head), device="cpu", top_k=None)
    for row, result in zip(rows, results, strict=True):
        pair = [row[key] for key in HUB[name]]
        expected = call({"text": pair[0], "text_pair": pair[1]} if len(pair) > 1 else pair[0])
        expected = expected if isinstance(expected[0], dict) else expected[0]
        scores = {label["label"]: label["score"] for label in expected}
        assert dict(zip(result["labels"], result["scores"], strict=True)) == pytest.approx(scores, abs=2e-5)
        assert not set(HUB[name]) & set(result)
    gold = ["a", "b", "c", "c", "b"]
    assert [result.get("gold") for result in results] == [*gold, None]
    best = [result["best"] for result in results][:5]
    assert found["accuracy"]["value"] == pytest.approx(metrics_of.accuracy_score(gold, best))
    assert found["macro"]["f1"] == pytest.approx(metrics_of.f1_score(gold, best, average="macro", zero_division=0))
    assert "accuracy of the 5 rows with gold, of 6" in capsys.readouterr().err


def test_rows_of_the_hub_whose_labels_do_not_fit_are_named(head, language_model, template, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for row, message in [
        (
            {"label": "entailment"},
            "\"label\" is 'entailment'; it must be a label ('a', 'b', 'c') or its index, from 0 to 2",
        ),
        ({"label": 3}, '"label" is 3; it must be a label'),
        ({"label": 0, "label_text": "B"}, "\"label\" is 0, and the label of that index is 'a' to the model, but"),
        ({"hypothesis": 7}, '"hypothesis" is a number; it must be a string'),
        ({"text": "the sea"}, "--shape text or --shape nli says which"),
    ]:
        write_jsonl(file, [{"premise": "the sea", "hypothesis": "salt"}, {"premise": "a", "hypothesis": "b", **row}])
        message_found = failing(capsys, head, file)
        assert "rows.jsonl, line 2" in message_found
        assert message in message_found
    assert classify(head, "--shape", "nli", file) == 0
    message = failing(capsys, language_model, "--template", template, "--shape", "nli", file)
    assert "--shape says which keys of a row are read, and here the template says that" in message
    message = failing(capsys, language_model, "--template", template, file)
    assert "line 1: the template needs what isn't there: 'text' is undefined" in message
    # A template reads the keys of the hub as they are.
    (tmp_path / "nli.json").write_text(json.dumps({**PROMPT, "template": "{{ premise }} {{ hypothesis }}:"}))
    assert classify(language_model, "--template", tmp_path / "nli.json", file) == 0


@pytest.fixture(scope="module")
def entailing(tmp_path_factory):
    """Save a head that counts entailment last."""
    model = tiny_classifier()
    model.config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    return save(tmp_path_factory.mktemp("nli"), model)


NLI = {"premise": ["the sea", "a river", "salt", "rain"], "hypothesis": ["salt", "the Rhine", "sea", "wet"]}


@pytest.mark.parametrize(
    ("form", "key"),
    [*((form, key) for form in ("parquet", "disk") for key in ("label", "labels", "gold_label")), ("lists", "labels")],
)
def test_indices_are_labels_by_the_names_that_a_data_set_gives_them(entailing, tmp_path, form, key):
    datasets = pytest.importorskip("datasets")
    names = ["entailment", "neutral", "contradiction"]
    feature, rows = datasets.ClassLabel(names=names), [0, 1, 2, -1]
    options = ["--column", "gold=gold_label"] if key == "gold_label" else []
    expected = ["ENTAILMENT", "NEUTRAL", "CONTRADICTION", None]
    if form == "lists":
        feature, rows = datasets.List(feature), [[0, 2], [1], [], [2]]
        options = ["--problem-type", "multi_label_classification"]
        expected = [["CONTRADICTION", "ENTAILMENT"], ["NEUTRAL"], [], ["CONTRADICTION"]]
    texts = datasets.Value("string")
    features = datasets.Features({"premise": texts, "hypothesis": texts, key: feature})
    made = datasets.Dataset.from_dict({**NLI, key: rows}, features=features)
    file = tmp_path / ("data" if form == "disk" else "rows.parquet")
    made.save_to_disk(file) if form == "disk" else made.to_parquet(file)
    assert classify(entailing, *options, "--output", tmp_path / "o.jsonl", file) == 0
    assert [line.get("gold") for line in read_jsonl(tmp_path / "o.jsonl")] == expected


@pytest.mark.parametrize(
    ("names", "label", "gold"),
    [
        (["no", "yes", "maybe"], 2, "ENTAILMENT"),  # the model knows none of these
        (["neutral", "entailment"], 1, "ENTAILMENT"),
        (["neutral", "other"], 0, "NEUTRAL"),
        (["neutral", "other"], 1, None),
    ],
)
def test_names_of_a_data_set_that_the_model_does_not_know(entailing, tmp_path, capsys, names, label, gold):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "gold": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict({"text": ["the sea"], "gold": [label]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    if gold is None:
        message = failing(capsys, entailing, tmp_path / "rows.parquet")
        assert (
            "row 1: \"gold\" is 1, which is 'other' to the data set; the model has no such label, but 'CONTRA"
            in message
        )
    else:
        assert classify(entailing, "--output", tmp_path / "o.jsonl", tmp_path / "rows.parquet") == 0
        assert [line["gold"] for line in read_jsonl(tmp_path / "o.jsonl")] == [gold]


@pytest.mark.parametrize(
    "metadata",
    [
        b"x", b"[]", b"{}", b'{"info": 3}', b'{"info": {"features": []}}', b'{"info": {"features": {"label": 3}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}', b"[" * 100_000,
        b'{"info": {"features": {"label": {"feature": ' * 100,
    ],
    ids=range(9),
)  # fmt: skip
def test_metadata_of_other_programs_says_nothing_of_labels(head, tmp_path, metadata):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["the sea"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert classify(head, "--output", tmp_path / "o.jsonl", tmp_path / "rows.parquet") == 0
    assert read_jsonl(tmp_path / "o.jsonl")[0]["gold"] == "b"
