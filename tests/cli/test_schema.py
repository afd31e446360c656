"""Lines that commands write are as `radix-ops schema` says, and hold nothing that it leaves out."""

import json

import jsonschema
import pytest

from helpers.commands import QUERIES, QUESTIONS, TEXTS, inspect_json, read_jsonl, write_jsonl
from helpers.language_models import embedding_tokenizer, reranking_tokenizer, tiny_classifier, tiny_model
from radix_ops import cli
from radix_ops_command._main import COMMANDS

pytest.importorskip("transformers")


def schema_of(capsys, command):
    capsys.readouterr()
    assert cli.main(["schema", command]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def folder_of(command, folder):
    if command == "embed":
        tiny_model("Qwen3").model.save_pretrained(folder)
        embedding_tokenizer().save_pretrained(folder)
    elif command == "classify":
        tiny_classifier("Qwen3", vocab_size=360).save_pretrained(folder)
        reranking_tokenizer(True).save_pretrained(folder)
    else:
        tiny_model("Qwen3", vocab_size=360, max_position_embeddings=512).save_pretrained(folder)
        reranking_tokenizer(False).save_pretrained(folder)
    return folder


def fields_of(schema):
    """Return the names of the fields that a schema of lines describes, and those that a line of each kind must have."""
    kinds = schema["allOf"][1]["anyOf"]
    names = set(schema["properties"]).union(*(kind["properties"] for kind in kinds))
    return names, [set(schema["required"] + kind["required"]) for kind in kinds]


TEXT_LINES = [{"text": text, "id": number} for number, text in enumerate(TEXTS) if text]
DOCUMENTS = [[{"id": f"d{i}", "text": text} for i, text in enumerate(line["documents"])] for line in QUERIES]
WITH_IDS = [line | {"documents": documents} for line, documents in zip(QUERIES, DOCUMENTS, strict=True)]
LABELLED = [{"text": text, "label": label} for text, label in zip(TEXTS, ["a", 2, -1], strict=False)]
INPUTS = {
    "classify": [LABELLED],
    "score": [QUESTIONS, TEXT_LINES],
    "embed": [TEXT_LINES],
    "rerank": [QUERIES, WITH_IDS],
}


def test_every_command_that_writes_lines_is_tried():
    assert {*INPUTS, "inspect", "schema", "completion", "serve"} == set(COMMANDS)


@pytest.mark.parametrize(("command", "lines"), [(name, lines) for name in INPUTS for lines in INPUTS[name]])
def test_lines_are_as_the_schema_says(command, lines, tmp_path, capsys):
    data = write_jsonl(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    options = ["--device", "cpu", "--model", folder_of(command, tmp_path / "model"), "--output", output]
    assert cli.main(list(map(str, [command, *options, data]))) == 0
    schema = schema_of(capsys, command)
    copied = {key for line in lines for key in line}
    names, kinds = fields_of(schema)
    for line in read_jsonl(output):
        jsonschema.validate(line, schema)
        assert set(line) - copied <= names
        for key in next(required for required in kinds if required <= set(line)):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({name: value for name, value in line.items() if name != key}, schema)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(line | {key: {}}, schema)


def test_lines_of_errors_are_as_the_schema_says(tmp_path, capsys):
    data = write_jsonl(tmp_path / "in.jsonl", [QUERIES[1], {"query": 1, "documents": ["a"]}])
    output = tmp_path / "out.jsonl"
    options = ["--on-error", "record", "--model", folder_of("rerank", tmp_path / "model"), "--output", output]
    assert cli.main(list(map(str, ["rerank", "--device", "cpu", *options, data]))) == 0
    schema = schema_of(capsys, "rerank")
    ranked, error = read_jsonl(output)
    for line in (ranked, error):
        jsonschema.validate(line, schema)
    assert set(error) - {"query", "documents"} == {"line", "error", "key"}
    del error["error"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(error, schema)


def test_the_object_of_inspect_is_as_the_schema_says(tmp_path, capsys):
    schema = schema_of(capsys, "inspect")
    ids = [list(range(length)) for length in (3, 9, 9, 0, 40)] + [[5, 6]] * 40
    for lines in (ids, [[1]]):
        path = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": line} for line in lines])
        found = inspect_json(capsys, path)
        jsonschema.validate(found, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found | {"other": 1}, schema)
