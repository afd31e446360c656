"""Results as tables and runs hold what JSON lines hold, whatever that is and whichever line brings it."""

import csv
import io
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from helpers.outputs import unpacked
from radix_ops.data import converted, log
from radix_ops.data.converted import ConvertedFile
from radix_ops.data.quantised import check_ranges_path
from radix_ops.data.records import UserError
from radix_ops.data.result_formats import MATRIX, TREC, format_of
from radix_ops.data.result_writers import writer_of
from radix_ops.data.trec import TrecIds

ENDINGS = ["csv", "csv.gz", "tsv", "tsv.zst", "parquet", "jsonl.gz", "jsonl.zst", "ndjson.gz", "trec", "run.zst"]


def write(path, fields, overwrite=False):
    """Write an object for each line; return how many results were there."""
    file = ConvertedFile(
        str(path),
        len(fields),
        lambda item: f"{item:016x}",
        overwrite,
        log.line_of_item,
        writer_of(format_of(path.name, TREC)),
    )
    found = int(file.done.sum())
    for item in np.random.default_rng(0).permutation(len(fields)).tolist():
        if not file.done[item]:
            file.add(item, {"line": item + 1, **fields[item]})
    file.finish()
    return found


def table(tmp_path, fields):
    """Return the Parquet table of results, without line and key."""
    write(tmp_path / "t.parquet", fields)
    found = parquet.read_table(tmp_path / "t.parquet")
    assert found["line"].to_pylist() == list(range(1, len(fields) + 1))
    assert found.column_names[-1] == "key"
    return found.drop_columns(["line", "key"])


@pytest.fixture(params=[1, 3, 2**16])
def lines_at_once(request, monkeypatch):
    """Take so many lines into memory at a time, each a row group."""
    monkeypatch.setattr(converted, "_LINES_AT_ONCE", request.param)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 2], pyarrow.int64()),
        ([None, None, 1.5], pyarrow.float64()),
        ([1, 2, 0.5], pyarrow.float64()),
        (["a", None, "été \U0001f30a"], pyarrow.string()),
        ([True, None, False], pyarrow.bool_()),
        ([[], [], [1.5]], pyarrow.list_(pyarrow.float64())),
        ([[], [None], ["a"]], pyarrow.list_(pyarrow.string())),
        ([[[1]], [], [[2], []]], pyarrow.list_(pyarrow.list_(pyarrow.int64()))),
        ([None, None, None], pyarrow.null()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("turn", range(3))
def test_parquets_types_hold_all_values_whichever_line_brings_them(tmp_path, lines_at_once, values, kind, turn):
    values = values[turn:] + values[:turn]
    found = table(tmp_path, [{"x": value} for value in values])
    assert found["x"].to_pylist() == values
    assert found.schema.field("x").type == kind


@pytest.mark.parametrize(
    "values",
    [
        [1, "a"],
        [2**70, 1],
        [2**53 + 1, 0.5],
        [True, 1],
        [True, 0.5],
        [[1], 1],
        [[1], ["a"]],
        [{"a": 1}, {"a": "x"}],
        [{}, {}],
        [{"a": {}}, {"a": {}}],
        [[{}], []],
        [{"a": 1}, "a"],
        ["\ud800", "a"],
        [{f"k{i}": i} for i in range(100)],
        [{"a": {"\ud800": 1}}, None],
        [json.loads("[" * 60 + "]" * 60), None],
        [json.loads('{"a": ' * 60 + "1" + "}" * 60), None],
    ],
    ids=range(17),
)
@pytest.mark.parametrize("turn", range(2))
def test_parquet_has_json_where_no_type_holds_all_values(tmp_path, lines_at_once, values, turn):
    values = values[turn:] + values[:turn]
    found = table(tmp_path, [{"x": value} for value in values])
    assert found.schema.field("x").type == pyarrow.string()
    assert [text if text is None else json.loads(text) for text in found["x"].to_pylist()] == values


def test_parquets_objects_are_structs_with_all_keys(tmp_path, lines_at_once):
    found = table(tmp_path, [{"x": {"a": 1}}, {"y": 1}, {"x": {"b": ["c"]}}, {"\ud800.\0": 2, "": 3}])
    assert found.column_names == ["x", "y", "\\ud800.\0", ""]
    found = found.slice(0, 3)
    assert found["x"].to_pylist() == [{"a": 1, "b": None}, None, {"a": None, "b": ["c"]}]
    assert found["y"].to_pylist() == [None, 1, None]


def test_parquets_embeddings_are_the_same_float32(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    found = table(tmp_path, [{"embedding": [float(str(number)) for number in row]} for row in rows])
    assert found.schema.field("embedding").type == pyarrow.list_(pyarrow.float32())
    assert np.array_equal(np.stack(found["embedding"].to_numpy()), rows)


CELLS = [
    "",
    "a,b",
    "a\tb",
    'say "a"',
    "a\nb",
    "a\r\nb",
    "a\rb",
    " a ",
    "\u2028\x85\x0b",
    "x" * 200_000,
    "#a",
    "'",
    "\x00",
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "tsv.zst"])
def test_cells_read_back_as_they_were(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    write(path, [{"text": cell, "of": {"a": [cell]}} for cell in CELLS])
    limit = csv.field_size_limit(2**20)
    rows = list(csv.DictReader(io.StringIO(unpacked(path), newline=""), delimiter="\t" if "tsv" in ending else ","))
    csv.field_size_limit(limit)
    assert [row["text"] for row in rows] == CELLS
    assert [json.loads(row["of"]) for row in rows] == [{"a": [cell]} for cell in CELLS]
    assert write(path, [{}] * len(CELLS)) == len(CELLS)
    assert csv.field_size_limit() == limit


def test_columns_are_those_of_all_lines(tmp_path):
    path = tmp_path / "t.csv"
    write(path, [{"a": None}, {"b": 2.0, "c": "x"}, {"a": False}, {"\ud800": "\ud800"}])
    assert path.read_text() == (
        "line,a,b,c,\\ud800,key\n"
        "1,,,,,0000000000000000\n"
        "2,,2.0,x,,0000000000000001\n"
        "3,false,,,,0000000000000002\n"
        "4,,,,\\ud800,0000000000000003\n"
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_ever_other_keys_is_refused_and_nothing_is_lost(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(converted, "_MOST_COLUMNS", 20)
    path = tmp_path / f"t.{ending}"
    with pytest.raises(UserError, match=rf"the most columns of a table; {path}.lines holds the results as JSON lines"):
        write(path, [{f"k{item}": item} for item in range(30)])
    lines = [json.loads(line) for line in (tmp_path / f"t.{ending}.lines").read_text().splitlines()]
    assert sorted(line["line"] for line in lines) == list(range(1, 31))


def ranked(count=3):
    return [{"scores": [0.25, 0.5], "order": [1, 0]} for _ in range(count)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_results_give_the_same_bytes(tmp_path, ending):
    for name in ("one", "other"):
        write(tmp_path / f"{name}.{ending}", ranked())
    assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files_and_others_are_no_results(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    write(path, ranked(50))
    content, writer = path.read_bytes(), writer_of(format_of(path.name, TREC))
    assert writer.may_hold(path)
    for spoiled in (
        content[:-3],
        content[: len(content) // 2],
        content + b"x",
        b"mine",
        b"\x1f\x8b",
        b"\xff\n",
        b"PAR1",
    ):
        path.write_bytes(spoiled)
        writer.may_hold(path)
        with pytest.raises(UserError, match="--overwrite replaces it"):
            write(path, ranked(50))
        assert path.read_bytes() == spoiled


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_file_is_filled(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    path.touch()
    assert write(path, ranked()) == 0
    assert write(path, ranked()) == 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_conversion_takes_little_memory(tmp_path, ending, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(converted, "_BYTES_AT_ONCE", 2**20)
    fields = [{"text": "x" * 10_000, **ranking} for ranking in ranked(3000)]
    tracemalloc.start()
    try:
        write(tmp_path / f"t.{ending}", fields)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20


def test_a_run_names_lines_and_indices_where_there_are_no_ids(tmp_path):
    write(tmp_path / "t.run", [{"scores": [0.25, 0.5, 0.25], "order": [1, 0]}, {"scores": [], "order": []}])
    lines = [line.rsplit(" ", 1) for line in (tmp_path / "t.run").read_text().splitlines()]
    assert [line for line, _ in lines] == ["1 Q0 1 1 0.5", "1 Q0 0 2 0.25"]


def test_ids_that_a_run_can_not_hold_are_refused():
    ids = TrecIds()
    ids.check("line 1", "q1", {"line": 1}, ["d1", 7])
    ids.check("line 2", None, {"line": 2}, [])
    for given, origin, documents, message in (
        ("q 2", {"line": 3}, [], r'line 3: "query_id" is \'q 2\'; an id of a TREC run has no white space'),
        ("", {"line": 3}, [], r'line 3: "query_id" is \'\''),
        ("q3", {"line": 3}, ["a", "b\tc"], r'line 3: documents\[1\]: "id" is \'b\\tc\''),
        (None, {"file": "a b.jsonl", "line": 3}, [], r"line 3: the file's name is 'a b.jsonl:3'"),
        ("q1", {"line": 3}, [], "line 3 has the query_id 'q1' of line 1; a TREC run has each query once"),
        (2, {"line": 3}, [], "line 3 has the query_id '2' of line 2"),
    ):
        with pytest.raises(UserError, match=message):
            ids.check(f"line {origin['line']}", given, origin, documents)


@pytest.mark.parametrize(
    "name", ["scores", "scores.xlsx", "scores.json", "scores.parquet.gz", "a.npy.zst", "o.gz", "csv", "o.csv "]
)
def test_an_ending_that_is_not_known_is_refused_and_known_ones_are_named(name):
    with pytest.raises(UserError, match=r"must be .*\.jsonl, .*\.csv, \.tsv.*\.parquet.*\.gz or \.zst$"):
        format_of(name)


def test_endings_are_told_in_any_case():
    assert format_of("a/B.CSV.GZ") == format_of("b.csv.gz")
    assert format_of("A.Npy", MATRIX).is_matrix
    assert [format_of(name).grows for name in ("o.jsonl", "o.ndjson", "o.jsonl.gz", "o.csv")] == [
        True,
        True,
        False,
        False,
    ]


def test_what_stands_where_ranges_go_is_refused_unless_it_is_ranges(tmp_path):
    output, ranges = tmp_path / "o.npy", tmp_path / "o.ranges.npy"
    for found, is_fine in (
        (np.zeros((2, 5), np.float32), True),
        (np.zeros((2, 5)), False),
        (np.zeros((3, 5), np.float32), False),
        (np.zeros(2, np.float32), False),
        (None, False),
    ):
        ranges.write_text("mine") if found is None else np.save(ranges, found)
        check_ranges_path(str(output), True)
        if is_fine:
            check_ranges_path(str(output), False)
            continue
        with pytest.raises(UserError, match=rf"{ranges} exists, and the ranges of {output} go there; --overwrite"):
            check_ranges_path(str(output), False)
