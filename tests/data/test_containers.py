"""Containers of records: each holds the same rows, wherever it comes from, and names what is wrong with it."""

import csv
import gzip
import io
import json
import os
import threading

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers import data_files
from radix_ops.data.records import Records, UserError

ROWS = data_files.questions(700)
JSON = {"arrays": ("choices",), "numbers": ("gold",)}


def refusal(path, parse=None, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(Records(path, parse, **options))
    return str(caught.value)


@pytest.mark.parametrize("packing", data_files.PACKINGS)
@pytest.mark.parametrize("name", data_files.WRITERS)
def test_every_container_holds_the_same_rows(tmp_path, name, packing):
    path = data_files.write(tmp_path, name, packing, ROWS)
    records = Records(path, **JSON)
    assert [record.fields for record in records] == ROWS
    unit = "line" if name == "rows.jsonl" else "row"
    assert [records.origin(i) for i in (0, 699)] == [{unit: 1}, {unit: 700}]
    assert records[699].where == f"{path}, {unit} 700"
    assert [records.index_of({unit: n, "text": 1}) for n in (0, 1, 700, 701, "1", None)] == [
        None,
        0,
        699,
        None,
        None,
        None,
    ]
    assert records.index_of({"line" if unit == "row" else "row": 1}) is None
    again = Records(path, **JSON)
    assert [records.raw(i) for i in range(700)] == [again.raw(i) for i in range(700)]
    assert len({records.raw(i) for i in range(700)}) == 700


@pytest.mark.parametrize("packing", data_files.PACKINGS)
@pytest.mark.parametrize("name", data_files.WRITERS)
def test_every_container_comes_through_a_pipe(tmp_path, name, packing):
    path = data_files.write(tmp_path, name, packing, ROWS)
    pipe = tmp_path / f"pipe-{path.name}"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),)).start()
    records = Records(pipe, **JSON)
    assert [record.fields for record in records] == ROWS


@pytest.mark.parametrize("name", data_files.WRITERS)
def test_files_without_an_ending_are_known_by_their_content(tmp_path, name):
    path = data_files.write(tmp_path, name, ".gz", ROWS)
    bare = tmp_path / "rows"
    os.rename(path, bare)
    if name in ("rows.csv", "rows.tsv"):
        assert refusal(bare) == (
            f"{bare} is not JSON, and its name does not say what else it is: "
            "--format {jsonl,json,text,csv,tsv,parquet,arrow,npz} does"
        )
    kind = name.split(".")[1] if name in ("rows.csv", "rows.tsv") else None
    assert [record.fields for record in Records(bare, format=kind, **JSON)] == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "stream.arrow", "rows.feather", "rows.json"])
def test_files_that_are_cut_or_changed_end_in_a_sentence(tmp_path, name):
    path = data_files.write(tmp_path, name, "", ROWS[:40])
    content = path.read_bytes()
    for size in range(0, len(content) - 12, max(1, len(content) // 60)):
        path.write_bytes(content[:size])
        assert refusal(path).startswith(str(path))
    for at in range(0, len(content), max(1, len(content) // 300)):
        changed = bytearray(content)
        changed[at] ^= 0x55
        path.write_bytes(bytes(changed))
        try:
            rows = [record.fields for record in Records(path)]
        except UserError:
            continue
        json.dumps(rows, allow_nan=False)


def test_zstd_that_is_cut_or_changed_ends_in_a_sentence(tmp_path):
    path = data_files.write(tmp_path, "rows.jsonl", ".zst", ROWS)
    packed = path.read_bytes()
    for size in range(5, len(packed), len(packed) // 40):
        path.write_bytes(packed[:size])
        assert refusal(path) == f"{path} is cut off: its zstd has no end"
    path.write_bytes(packed + packed)
    assert len(Records(path)) == 1400
    path.write_bytes(packed + b"tail")
    assert "is damaged: of its zstd, " in refusal(path)


def test_zstd_may_start_with_a_frame_that_readers_skip(tmp_path):
    path = data_files.write(tmp_path, "rows.jsonl", ".zst", ROWS)
    for start in (0x50, 0x5F):  # pzstd puts the size of its next frame there
        path.write_bytes(bytes([start]) + b"\x2a\x4d\x18\x04\0\0\0abcd" + path.read_bytes())
        assert [record.fields for record in Records(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b'{"text": "a"}\n', "is read as Parquet, and it looks like JSON lines: name it .jsonl"),
        ("t.parquet", b"", "is empty; Parquet has a head and a foot"),
        ("t.arrow", b"PAR1....PAR1", "is read as Arrow, and it looks like Parquet: name it .parquet"),
        ("t.parquet", b"PAR1", "is damaged, or no Parquet that can be read: "),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", ", row 2 has 3 cells and the header has 2"),
        ("t.csv", b"a,b\n1\n", ", row 1 has 1 cells and the header has 2"),
        ("t.csv", b"a,a\n1,2\n", ", header: two columns have the name 'a'"),
        ("t.csv", b"a,\n1,2\n", ", header: column 2 has no name"),
        ("t.csv", b"a;b\n1;2\n", ", header, is one column, 'a;b': --delimiter ';' reads it as several"),
        ("t.csv", b'a,b\n1,2\n"1,2\n3,4\n', ", row 2: unexpected end of data: does it leave a quote open?"),
        ("t.csv", b'a,b\n1,2\n"1"x,2\n', ", row 2 can't be read: ',' expected after '\"'"),
        ("t.csv", b"a,b\n1,\xe9\n", ", row 1 is not UTF-8: byte 0xe9 at column 3"),
        ("t.csv", b"", "is empty; it must hold"),
        ("t.csv", b"a,b\n\n", "is empty; it must hold"),
        ("t.json", b'{\n "a": 1\n}\n', "looks like JSON over several lines: write one object a line, or an array"),
        ("t.txt", b'{"a": "' + b"long " * 200 + b'"}', "looks like JSON lines: --format jsonl reads its objects"),
        ("t.txt", b'\xef\xbb\xbf{ "a" : 1}\nb\n', "looks like JSON lines: --format jsonl reads its objects"),
        ("t.json", b'[{"a": 1}, 2]', ", row 2 holds a number; it must hold an object"),
        ("t.json", b'[{"a": 1}, {"a": 1, "a": 2}]', ", row 2 is not JSON: the key 'a' stands twice"),
        ("t.json", b'[{"a": 1}, {"a": 1e999}]', ", row 2 is not JSON: 1e999 is not a finite number"),
        ("t.json", b'[{"a": 1} {"a": 2}]', ", row 1 is not JSON: behind it '{' stands where , or ] must"),
        ("t.json", b'[{"a": 1},]', ", row 1 is not JSON: behind its , a row is missing"),
        ("t.json", b'[{"a": 1}', ", row 1 is not JSON: behind it the file ends where , or ] must"),
        ("t.json", b'[{"a": 1}, {"a": ', ", row 2 is not JSON: Expecting value"),
        ("t.json", b'[{"a": 1}] x', "is not JSON: something stands behind its array of 1 rows"),
        ("t.json", b'[{"a": "\xff"}]', "is not UTF-8: byte 0xff"),
        ("t.json", b"[]", "is empty; it must hold one object"),
        ("t.json", b"[" * 100_000, ", row 1 holds arrays or objects within too many others"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert f"{path}{'' if message.startswith(',') else ' '}{message}" in refusal(path, shape="one object")


def test_lines_of_json_are_texts_where_they_are_called_so(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text('{"a": 1}\nb\n')
    assert [record.text("text") for record in Records(path, format="text")] == ['{"a": 1}', "b"]
    path.write_text("{a: 1}\nb\n")
    assert Records(path)[0].text("text") == "{a: 1}"


def test_a_json_array_is_read_as_json_reads_it(tmp_path):
    rows = [
        {"a": ']},{["\\', "b": [[], {}, None, True, 1.5e3, -0, 10**30]},
        {"c": "\U0001f30a \u2028"},
        {"d": "\ud800"},
    ]
    path = tmp_path / "t.json"
    for dumped in (json.dumps(rows), json.dumps(rows, indent=3), "\ufeff \n" + json.dumps(rows, separators=(",", ":"))):
        path.write_text(dumped)
        records = Records(path)
        assert [record.fields for record in records] == rows
    assert records.raw(0).decode() == json.dumps(rows[0], separators=(",", ":"))
    large = [{"a": "x" * size} for size in (0, 1, 65_530, 65_536, 1_000_000, 3)]
    path.write_text(json.dumps(large))
    assert [record.fields for record in Records(path)] == large


def test_a_cell_of_json_has_each_key_once(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n"[{""x"": 1, ""x"": 2}]","{""x"": 1, ""x"": 2}"\n')
    assert [record.fields["b"] for record in Records(path)] == ['{"x": 1, "x": 2}']
    with pytest.raises(UserError, match="t.csv, row 1: \"a\" holds JSON that can't be used: the key 'x' stands twice"):
        Records(path, arrays=("a",))


def test_cells_of_csv_are_strings_and_arrays_where_a_task_needs_them(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b,gold\r\n"1\r\n2",[1],007\r\n\r\n,"[""x"", NaN]",2\r\n')
    assert [record.fields for record in Records(path)] == [
        {"a": "1\r\n2", "b": "[1]", "gold": "007"},
        {"a": "", "b": '["x", NaN]', "gold": "2"},
    ]
    assert [record.fields for record in Records(path, arrays=("b",), numbers=("a", "gold"))] == [
        {"a": "1\r\n2", "b": [1], "gold": "007"},
        {"a": "", "b": '["x", NaN]', "gold": 2},
    ]
    message = refusal(path, lambda record: record.texts("b"), on_error="stop")
    assert (
        't.csv, row 1: "b" is a string; it must be an array of strings; a cell may hold it as JSON, such as ['
        in message
    )


def test_numbers_of_rows_that_pandas_writes_are_left_out(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",text,id\n0,the sea,7\n1,the river,8\n")
    assert [record.fields for record in Records(path)] == [
        {"text": "the sea", "id": "7"},
        {"text": "the river", "id": "8"},
    ]
    path.write_text(",text,\n0,the sea,7\n")
    assert "header: column 3 has no name" in refusal(path)


def test_a_table_without_a_header_has_the_names_that_are_given(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"7\tthe sea\n8\tthe river\n")
    message = refusal(path, lambda record: record.text("text"))
    assert 'row 1 has no "text" (a string); it has "7", "the sea"; the first row gives the columns\' names' in message
    records = Records(path, header=("id", "text"))
    assert [record.fields for record in records] == [{"id": "7", "text": "the sea"}, {"id": "8", "text": "the river"}]
    assert Records(path, format="csv", delimiter="\t")[0].fields == {"7": "8", "the sea": "the river"}


def test_values_of_tables_are_those_that_json_has(tmp_path):
    import datetime
    import decimal

    day = datetime.datetime(2020, 1, 2, 3, 4, 5)
    table = pa.table(
        {
            "null": pa.array([None, "x"]),
            "time": pa.array([day, None]),
            "date": pa.array([day.date()] * 2),
            "decimal": pa.array([decimal.Decimal("1.50")] * 2),
            "category": pa.array(["x", "y"]).dictionary_encode(),
            "half": pa.array([1.5, 2.0], pa.float16()),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "nested": pa.array([[{"a": 1, "t": day}, {"b": None}], []]),
            "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
            "large": pa.array(["é", "z"], pa.large_string()),
        }
    )
    path = tmp_path / "t.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    first, second = (record.fields for record in Records(path))
    assert first == {
        "time": "2020-01-02 03:04:05.000000",
        "date": "2020-01-02",
        "decimal": "1.50",
        "category": "x",
        "half": 1.5,
        "map": [["k", 1]],
        "nested": [{"a": 1, "t": "2020-01-02 03:04:05.000000"}, {}],
        "fixed": [1, 2],
        "large": "é",
    }
    assert second["null"] == "x"
    assert "time" not in second


def test_columns_that_json_cannot_hold_are_named_and_can_be_dropped(tmp_path):
    path = tmp_path / "t.parquet"
    rows = {"text": ["a", "b", "c"], "image": [None, b"\x89PNG", None], "score": [1.0, 2.0, float("nan")]}
    pyarrow.parquet.write_table(pa.table(rows), path)
    message = refusal(path)
    assert "2 of 3 rows can't be used" in message
    assert f'{path}, row 2, column "image" holds bytes' in message
    assert f'{path}, row 3, column "score" holds a number that is not finite; --drop leaves it out' in message
    found = [record.fields for record in Records(path, drop=("image", "score"))]
    assert found == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_a_bomb_of_a_packed_table_is_stopped(tmp_path, monkeypatch):
    from radix_ops.data import tables

    monkeypatch.setattr(tables, "_UNPACKED_FREE", 2**20)
    path = tmp_path / "t.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1" + bytes(2**24)))
    assert refusal(path) == f"{path} unpacks to more than 64 times its size; decompress it first"


def test_a_row_has_a_longest(tmp_path, monkeypatch):
    from radix_ops.data import delimited, json_arrays, sources

    for module in (delimited, json_arrays, sources):
        monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    for name in ("rows.json", "rows.csv", "rows.parquet", "rows.arrow"):
        path = data_files.write(tmp_path, name, "", [{"text": "a"}, {"text": "b" * 100_000}])
        assert "row 2" in (message := refusal(path))
        assert "longer than 1,000 bytes, the most for a row" in message


def test_a_dictionary_whose_value_stands_for_many_rows_takes_the_memory_of_a_few(tmp_path):
    import resource

    count, text = 20_000, "x" * 1_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    path = tmp_path / "t.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], names=["text"]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class Enough(Exception):
        pass

    seen = []

    def parse(record):
        seen.append(len(record.fields["text"]))
        if len(seen) == 200:
            raise Enough

    with pytest.raises(Enough):
        Records(path, parse)
    assert seen == [1_000_000] * 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kilobytes; all rows take 20 times that


def test_a_dictionary_of_parquet_takes_the_memory_of_a_few_rows(tmp_path):
    import resource

    text = "x" * 4_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([text]))
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"text": column}), path)
    before, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0

    def parse(record):
        nonlocal count
        count += len(record.fields["text"]) == len(text)
        if count == 100:
            raise UserError("enough")

    assert refusal(path, parse) == "enough"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kilobytes; all rows take 16 times that


def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch):
    import sys

    paths = [data_files.write(tmp_path, *name, ROWS[:2]) for name in [("rows.parquet", ""), ("rows.jsonl", ".zst")]]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for path in paths:
        message = refusal(path)
        assert message.startswith(str(path))
        assert "pyarrow" in message
        assert "[data]" in message


def test_quotes_and_delimiters_are_those_of_csv(tmp_path):
    text = io.StringIO()
    rows = [{"a": value, "b": other} for value in ('"', ",", "\n", "a\r\nb", " ", "é\t") for other in ("", "x", '""')]
    writer = csv.DictWriter(text, ["a", "b"])
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path / "t.csv"
    path.write_bytes(text.getvalue().encode())
    assert [record.fields for record in Records(path)] == rows


def test_ids_of_a_npz_file_are_rows(tmp_path):
    sequences = [[5, 6, 7], [], [8]]
    records = Records(data_files.write_ids(tmp_path / "ids.npz", sequences))
    assert [record.fields for record in records] == [{"input_ids": ids} for ids in sequences]
    assert [json.loads(records.raw(i)) for i in range(3)] == [{"input_ids": ids} for ids in sequences]
    assert records.origin(2) == {"row": 3}
    assert records.index_of({"row": 3}) == 2
    assert records[1].where == f"{tmp_path / 'ids.npz'}, row 2"
    (tmp_path / "no.npz").write_bytes(b"PAR1")
    assert f"{tmp_path / 'no.npz'} is no .npz file" in refusal(tmp_path / "no.npz")
