"""Several files, folders and standard input as one set of records."""

import json

import datasets
import pytest

from helpers import data_files
from helpers.standard_input import standard_input
from radix_ops.data.folders import data_files as files_of
from radix_ops.data.records import Records, UserError

ROWS = data_files.questions(90)


def test_several_files_are_one_set_of_records(tmp_path):
    paths = [
        data_files.write(tmp_path, "rows.parquet", ".gz", ROWS[:30]),
        data_files.write(tmp_path, "rows.jsonl", "", ROWS[30:31]),
        data_files.write(tmp_path, "rows.json", ".zst", ROWS[31:]),
    ]
    records = Records(paths)
    assert [record.fields for record in records] == ROWS
    assert records.origin(0) == {"file": str(paths[0]), "row": 1}
    assert records.origin(30) == {"file": str(paths[1]), "line": 1}
    assert records.origin(89) == {"file": str(paths[2]), "row": 59}
    assert list(records.origin(89)) == ["file", "row"]
    assert [records.index_of(records.origin(i)) for i in range(90)] == list(range(90))
    assert records.index_of({"row": 1}) is None
    assert records.index_of({"file": str(paths[1]), "row": 1}) is None
    assert records[30].where == f"{paths[1]}, line 1"
    with pytest.raises(UserError, match=r"rows.jsonl is among the input files twice"):
        Records([*paths, tmp_path / "." / "rows.jsonl"])


def test_a_folder_stands_for_its_data_files_sorted(tmp_path):
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for number in (2, 0, 1):
        path = data_files.write(folder / "data", "rows.parquet", "", ROWS[30 * number : 30 * number + 30])
        path.rename(folder / "data" / f"train-{number:05}.parquet")
    (folder / "README.md").write_text("# a set")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "old.parquet").write_bytes(b"PAR1")
    records = Records(folder)
    assert [record.fields for record in records] == ROWS
    assert records.origin(30) == {"file": str(folder / "data" / "train-00001.parquet"), "row": 1}
    (folder / "more.csv").write_text("a\n1\n")
    with pytest.raises(
        UserError, match=r"holds files of several kinds, such as .*\.parquet and .*\.csv; name the files"
    ):
        files_of([str(folder)])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds no data file; their names end in \.jsonl .*, perhaps with \.gz"):
        files_of([str(tmp_path / "none")])


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    folder = tmp_path / "saved"
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(folder, num_shards=3)
    assert [record.fields for record in Records(folder)] == ROWS
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match=r"dict holds the splits train, test; name one: .*dict/train$"):
        Records(tmp_path / "dict")
    assert len(Records(tmp_path / "dict" / "test")) == 90
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json can't be read as datasets wrote it"):
        Records(folder)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("name", data_files.WRITERS)
def test_standard_input_is_read_as_a_file_is(tmp_path, name, is_file):
    path = data_files.write(tmp_path, name, ".zst" if "json" in name else "", ROWS)
    kind = name.split(".")[1] if name in ("rows.csv", "rows.tsv") else None
    with standard_input(path if is_file else path.read_bytes()):
        records = Records("-", format=kind, arrays=("choices",), numbers=("gold",))
    assert [record.fields for record in records] == ROWS
    assert records.path == "standard input"
    unit = "line" if name == "rows.jsonl" else "row"
    assert records[4].where == f"standard input, {unit} 5"
    assert records.origin(4) == {unit: 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input is empty"), (b"text\n", "standard input is not JSON, and its name does not say what else")],
)
def test_standard_input_is_named_where_it_is_wrong(content, message):
    with standard_input(content), pytest.raises(UserError, match=f"^{message}"):
        Records("-")


def test_a_file_of_several_that_changes_is_named(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps({"text": "x"}) + "\n")
    records = Records(paths)
    with open(paths[1], "a") as file:
        file.write("{}\n")
    assert records[0].fields == {"text": "x"}
    with pytest.raises(UserError, match="b.jsonl was changed while it was being read"):
        records[1]
