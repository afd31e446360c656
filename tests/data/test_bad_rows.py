"""Rows that can't be used, by the reader, parse or encode: all are listed, left out, or kept with their error."""

import json

import numpy as np
import pytest

from helpers import data_files
from radix_ops.data.bad_rows import BadRowsError
from radix_ops.data.encoding import encode_records
from radix_ops.data.records import Records, UserError
from radix_ops.engine.inputs import Record
from radix_ops.engine.items import Items

BAD = {3: "{", 4: '{"texts": 1}', 9: "[1]", 12: '{"text": "a", "text": "b"}', 20: '{"text": 7}'}
LONG = (1, 14)  # texts that encode refuses


class Text:
    def __init__(self, record: Record):
        self.where, self.text = record.where, record.text("text")


def encode(texts):
    items = Items()
    for text in texts:
        if len(text.text) > 5:
            raise UserError(f"{text.where} is too long; --truncate-right cuts it")
        items.append([np.frombuffer(text.text.encode(), np.uint8).astype(np.int32)])
    return items


def write(path, count=25):
    """Write lines of which those of BAD and LONG, counted from 1, can't be used."""
    lines = [BAD.get(n, json.dumps({"text": "long text" if n in LONG else f"t{n}"})) for n in range(1, count + 1)]
    path.write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")  # a blank line behind the fifth
    return path


def line_of(number):
    return number + (number > 5)


@pytest.mark.parametrize("late", [False, True], ids=["parse", "encode"])
def test_stop_lists_every_bad_row(tmp_path, late):
    if late:
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps({"text": "long text" if n in LONG else "t"}) + "\n" for n in range(20)))
        with pytest.raises(BadRowsError) as caught:
            encode_records(Records(path, Text), encode)
        wrong = [line + 1 for line in LONG]
    else:
        with pytest.raises(BadRowsError) as caught:
            Records(path := write(tmp_path / "t.jsonl"), Text)
        wrong = [line_of(number) for number in BAD]
    assert caught.value.summary.startswith(f"{len(wrong)} of {20 if late else 25} rows can't be used; ")
    assert [row.partition(" ")[0] for row in caught.value.rows] == [f"{path}," for _ in wrong]
    assert [int(row.split("line ")[1].split()[0].strip(":")) for row in caught.value.rows] == wrong


def test_stop_lists_the_first_20_and_reads_no_more_than_a_thousand(tmp_path):
    path = tmp_path / "t.jsonl"
    for count, summary, more in ((30, "30 of 31 rows", 10), (5000, "1,000 of the first 1,001 rows", 980)):
        path.write_text('{"text": "a"}\n' + "{}\n" * count)
        with pytest.raises(BadRowsError) as caught:
            Records(path, Text)
        assert caught.value.summary == f"{summary} can't be used; --on-error skip leaves them out"
        assert len(caught.value.rows) == 21
        assert caught.value.rows[-1] == f"and {more} more"


def test_skip_leaves_bad_rows_out_and_keeps_the_lines_of_others(tmp_path):
    path = write(tmp_path / "t.jsonl")
    records = Records(path, Text, on_error="skip")
    items = encode_records(records, encode)
    good = [n for n in range(1, 26) if n not in BAD and n not in LONG]
    assert [records.origin(i) for i in range(len(records))] == [{"line": line_of(n)} for n in good]
    assert [bytes(items.store[i].astype(np.uint8)).decode() for i in range(len(items))] == [f"t{n}" for n in good]
    assert [record.text for record in records] == [f"t{n}" for n in good]
    assert [json.loads(records.raw(i))["text"] for i in range(len(records))] == [f"t{n}" for n in good]
    indices = {n: records.index_of({"line": line_of(n)}) for n in range(1, 26)}
    assert {n: i for n, i in indices.items() if i is not None} == {n: i for i, n in enumerate(good)}
    assert records.bad.summary == "7 of 25 rows can't be used"
    assert len(records.bad.lines) == 7
    assert "line 15 is too long" in records.bad.lines[-1]


def test_record_keeps_bad_rows_as_items_of_no_sequences(tmp_path):
    path = write(tmp_path / "t.jsonl")
    records = Records(path, Text, on_error="record")
    items = encode_records(records, encode)
    wrong = sorted([*BAD, *LONG])
    assert len(records) == len(items) == 25
    assert [i + 1 for i in range(25) if not items.of(i)] == [i + 1 for i in sorted(records.refused)] == wrong
    assert [records.origin(i) for i in range(25)] == [{"line": line_of(n)} for n in range(1, 26)]
    assert "line 3 is not JSON" in records.refused[2]
    assert records.raw(2) == b"{"
    assert "line 15 is too long; --truncate-right cuts it" in records.refused[13]
    with pytest.raises(UserError, match="line 15 is too long"):
        records[13]
    assert records[24].text == "t25"


@pytest.mark.parametrize("on_error", ["skip", "record"])
def test_rows_of_other_containers_keep_their_numbers(tmp_path, on_error):
    csv = tmp_path / "t.csv"
    csv.write_text('text,n\na,1\nb\nc,2\n"x"y,3\nd,4\n')
    rows = [{"text": "a"}, {"text": 7}, {"text": "c"}, {}, {"text": "d"}]
    paths = [csv, *(data_files.write(tmp_path, name, "", rows) for name in ("rows.json",))]
    table = [{"text": "a"}, {"text": None}, {"text": "c"}, {"n": 1}, {"text": "d"}]
    paths += [data_files.write(tmp_path, name, "", table) for name in ("rows.parquet", "rows.arrow")]
    for path in paths:
        records = Records(path, Text, on_error=on_error)
        if on_error == "skip":
            assert [records.origin(i)["row"] for i in range(len(records))] == [1, 3, 5]
            assert [record.text for record in records] == ["a", "c", "d"]
        else:
            assert sorted(records.refused) == [1, 3]
            assert [records[i].text for i in (0, 2, 4)] == ["a", "c", "d"]
            assert all(f"{path}, row {i + 1}" in reason for i, reason in records.refused.items())
        assert records.bad.count == 2


def test_errors_that_are_no_rows_are_raised_at_once(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    calls = []

    def fail(record):
        calls.append(record)
        raise UserError("the tokenizer can't be loaded")

    for on_error in ("stop", "skip", "record"):
        with pytest.raises(UserError, match=r"^the tokenizer can't be loaded$"):
            Records(path, fail, on_error=on_error)
        with pytest.raises(UserError, match=r"^the tokenizer can't be loaded$"):
            encode_records(Records(path, Text, on_error=on_error), fail)
    assert len(calls) == 9  # encode gets all records, then one


def test_a_file_of_bad_rows_alone_is_refused_unless_they_are_recorded(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"t.jsonl holds no row that can be used\n.*line 1 has no"):
        Records(path, Text, on_error="skip")
    records = Records(path, Text, on_error="record")
    assert len(encode_records(records, encode)) == 2
    path.write_text('{"text": "long text"}\n')
    with pytest.raises(UserError, match=r"t.jsonl holds no row that can be used\n.*line 1 is too long"):
        encode_records(Records(path, Text, on_error="skip"), encode)


def test_keys_that_results_hold_themselves_are_refused_by_row(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "row": 1}\n{"text": "a", "line": 1}\n{"text": "a", "key": 1}\n')
    with pytest.raises(BadRowsError) as caught:
        Records(path, Text, reserved=("key",))
    assert [row.partition(", ")[2].partition(",")[0] for row in caught.value.rows] == [
        'line 2 has the key "line"',
        'line 3 has the key "key"',
    ]
    other = data_files.write(tmp_path, "rows.json", "", [{"text": "a", "file": 1, "line": 2}])
    assert len(Records(other, Text, reserved=("key",))) == 1
    with pytest.raises(UserError, match='row 1 has the key "file", which the output uses itself'):
        Records([other, write(tmp_path / "u.jsonl", 2)], Text, reserved=("key",))


def test_rows_of_which_none_can_be_used_are_not_to_be_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "a"}\n' * 3)
    with pytest.raises(BadRowsError) as caught:
        Records(path, Text)
    assert caught.value.summary == "3 of 3 rows can't be used"
    assert caught.value.rows == [f'{path}, line 1 has no "text" (a string); it has "body"', "and 2 more"]
    path.write_text('{"body": "a"}\n{"text": 7}\n{"body": "a"}\n')
    with pytest.raises(BadRowsError) as caught:
        Records(path, Text, on_error="skip")
    first, second, rest = caught.value.rows
    assert (first[: len(f"{path}, line 1")], second[: len(f"{path}, line 2")]) == (f"{path}, line 1", f"{path}, line 2")
    assert rest == "and 1 more"
    path.write_text('{"body": "a"}\n' * 3 + '{"text": "a"}\n')
    with pytest.raises(BadRowsError, match="^3 of 4 rows can't be used; --on-error skip leaves them out"):
        Records(path, Text)
