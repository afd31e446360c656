"""The command on all kinds of input: equal results of every container, resumed, with bad rows and without."""

import json

import numpy as np
import pytest

from helpers import data_files
from helpers.commands import failing_command, read_jsonl, score, write_jsonl
from helpers.standard_input import standard_input

pytest.importorskip("transformers")

from radix_ops import cli

QUESTIONS = data_files.questions()
FEW = 60  # where a thousand tell no more


def scores_of(model, output, *arguments) -> list[dict]:
    assert score(model, "-q", "--output", output, *arguments) == 0
    return read_jsonl(output)


def check(results, expected):
    """Hold results against those of JSONL, but for where their rows stand; rounding depends on a batch's rows."""
    names = ("id", "gold", "tokens", "greedy", "best", "best_per_char")
    assert [[line.get(name) for name in names] for line in results] == [
        [line.get(name) for name in names] for line in expected
    ]
    found, wanted = (np.array([line["logprobs"] for line in lines]) for lines in (results, expected))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.fixture(scope="module")
def expected(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return scores_of(model_folder, folder / "out.jsonl", write_jsonl(folder / "in.jsonl", QUESTIONS))


@pytest.mark.parametrize("packing", data_files.PACKINGS)
@pytest.mark.parametrize("name", data_files.WRITERS)
def test_every_container_gets_equal_results(model_folder, tmp_path, expected, name, packing):
    count = FEW if packing else data_files.NUM_ROWS
    path = data_files.write(tmp_path, name, packing, QUESTIONS[:count])
    results = scores_of(model_folder, tmp_path / "out.jsonl", path)
    check(results, expected[:count])
    unit = "line" if name == "rows.jsonl" else "row"
    assert [next(iter(line)) for line in results] == [unit] * count
    assert [line[unit] for line in results] == list(range(1, count + 1))


def test_several_files_a_folder_and_standard_input_get_equal_results(model_folder, tmp_path, expected):
    folder = tmp_path / "data"
    folder.mkdir()
    parts = []
    for number, first in enumerate(range(0, FEW, 25)):
        path = data_files.write(folder, "rows.parquet", ".gz", QUESTIONS[first : min(first + 25, FEW)])
        parts.append(path.rename(folder / f"part-{number}.parquet.gz"))
    results = scores_of(model_folder, tmp_path / "parts.jsonl", *parts)
    check(results, expected[:FEW])
    assert list(results[25].items())[:2] == [("file", str(parts[1])), ("row", 1)]
    assert scores_of(model_folder, tmp_path / "folder.jsonl", folder) == results
    with standard_input(data_files.write(tmp_path, "stream.arrow", ".zst", QUESTIONS[:FEW]).read_bytes()):
        results = scores_of(model_folder, tmp_path / "standard.jsonl", "-")
    check(results, expected[:FEW])


def test_ids_of_a_npz_file_get_the_results_of_lines_of_ids(model_folder, tmp_path):
    ids = [[1, *(3 + byte % 90 for byte in text.encode()[:30])] for text in data_files.texts(20)]
    lines = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": row} for row in ids])
    found = []
    for path in (lines, data_files.write_ids(tmp_path / "ids.npz", ids)):
        out = tmp_path / f"{path.suffix}.npy"
        assert cli.main(["embed", "-q", "--device", "cpu", "-m", str(model_folder), "-o", str(out), str(path)]) == 0
        found.append(np.load(out))
    assert found[0].shape[0] == 20
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json"])
def test_a_run_of_any_container_continues(model_folder, tmp_path, expected, name):
    path, out = data_files.write(tmp_path, name, ".gz", QUESTIONS[:FEW]), tmp_path / "out.jsonl"
    whole = scores_of(model_folder, out, path)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines[30:50], *lines[10:20], lines[5][:40]]))
    results = scores_of(model_folder, out, path)
    assert [(line["row"], line["key"]) for line in results] == [(line["row"], line["key"]) for line in whole]
    assert results[30:50] == whole[30:50]
    check(results, whole)


BAD = {7: {"context": 1, "choices": ["a"]}, 8: {"choices": ["a"]}, 30: {"context": "x " * 400, "choices": [" the"]}}


def with_bad_rows():
    return [BAD.get(index, QUESTIONS[index]) for index in range(50)]


def test_bad_rows_are_left_out_or_recorded_and_a_stopped_run_continues(model_folder, tmp_path, expected, capsys):
    path, out = write_jsonl(tmp_path / "in.jsonl", with_bad_rows()), tmp_path / "out.jsonl"
    good = [line for line in expected[:50] if line["line"] - 1 not in BAD]
    message = failing_command(capsys, "score", "--model", model_folder, path)
    assert message.splitlines()[0] == "radix-ops: 2 of 50 rows can't be used; --on-error skip leaves them out"
    assert [line.split(":")[0].split(" has")[0] for line in message.splitlines()[1:]] == [
        f"  {path}, line 8",
        f"  {path}, line 9",
    ]

    assert score(model_folder, "--output", out, "--on-error", "skip", path) == 0
    told = capsys.readouterr().err.splitlines()
    at = told.index("3 of 50 rows can't be used and were left out:")
    assert [int(row.split("line ")[1].split()[0].strip(":")) for row in told[at + 1 : at + 4]] == [8, 9, 31]
    skipped = read_jsonl(out)
    assert len(skipped) == len(good)
    check(skipped, good)
    assert [line["line"] for line in skipped] == [line["line"] for line in good]

    recorded = scores_of(model_folder, out, "--on-error", "record", "--overwrite", path)
    assert [line["line"] for line in recorded] == list(range(1, 51))
    check([line for line in recorded if "error" not in line], skipped)
    errors = {line["line"]: line for line in recorded if "error" in line}
    assert all(list(line) == ["line", "error", "key"] for line in errors.values())
    assert errors[8]["error"] == f'{path}, line 8: "context" is a number; it must be a string'
    assert "the model reads at most 256" in errors[31]["error"]
    for mode, whole in (("skip", skipped), ("record", recorded)):
        lines = [json.dumps(line) + "\n" for line in whole]
        out.write_text("".join([*lines[20:35], *lines[:9]]))
        again = scores_of(model_folder, out, "--on-error", mode, path)
        assert [(line["line"], line["key"], line.get("error")) for line in again] == [
            (line["line"], line["key"], line.get("error")) for line in whole
        ]
    # What was left out may be recorded by a run that continues.
    out.write_text("".join(json.dumps(line) + "\n" for line in skipped))
    again = scores_of(model_folder, out, "--on-error", "record", path)
    assert [line for line in again if "error" not in line] == skipped
    assert {line["line"]: line for line in again if "error" in line} == errors


def test_bad_rows_alone_are_recorded_without_a_batch(model_folder, tmp_path):
    path, out = write_jsonl(tmp_path / "in.jsonl", [BAD[7], BAD[8]]), tmp_path / "out.jsonl"
    assert ["error" in line for line in scores_of(model_folder, out, "--on-error", "record", path)] == [True, True]


def test_a_matrix_and_a_comparison_have_no_place_for_errors(model_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": 1}])
    arguments = "embed", "--device", "cpu", "--model", model_folder, "--on-error", "record", path
    for options in (["--output", tmp_path / "out.npy"], ["--compare"]):
        assert "has no place for errors of rows; --on-error skip" in failing_command(capsys, *arguments, *options)


def test_an_output_in_a_folder_that_is_read_is_refused(model_folder, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", QUESTIONS[:2])
    message = failing_command(capsys, "score", "--model", model_folder, "--output", tmp_path / "out.jsonl", tmp_path)
    assert f"out.jsonl stands in the input folder {tmp_path}, whose files are read" in message


def test_inspect_reads_every_container_and_leaves_bad_rows_out(model_folder, tmp_path, capsys):
    found = []
    for name in data_files.WRITERS:
        path = data_files.write(tmp_path, name, ".zst", QUESTIONS[:FEW])
        assert cli.main(["inspect", "--json", "--tokenizer", str(model_folder), str(path)]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1].pop("file") == str(path)
        assert found[-1].pop("meaning").startswith(f"{FEW} {'lines' if 'jsonl' in name else 'rows'} of ")
    assert all(one == found[0] for one in found)
    path = write_jsonl(tmp_path / "in.jsonl", [*QUESTIONS[:FEW], {"context": 1, "choices": []}])
    assert cli.main(["inspect", "--json", "--on-error", "skip", "--tokenizer", str(model_folder), str(path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == found[0]["rows"]
    assert f"1 of {FEW + 1} rows can't be used and were left out:\n  {path}, line {FEW + 1}" in err


def test_a_cell_that_a_task_reads_as_text_stays_text(model_folder, tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text('body,prompt\n2020,7\n"[1]",8\n"{""a"": 1}",9\n')
    for option in (["--column", "text=body"], ["--text-key", "body"], ["--text-key", "prompt"]):
        assert cli.main(["inspect", "--json", "--tokenizer", str(model_folder), *option, str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["sequences"] == 3
