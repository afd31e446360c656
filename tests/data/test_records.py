"""Input files: what lines are understood, what is refused where, and how much memory they take."""

import json
import os
import threading
import tracemalloc

import pytest

from radix_ops.data.records import Record, Records, UserError


def texts(path, **options):
    return list(Records(path, lambda record: record.text("text"), **options))


def test_a_text_file_has_one_text_a_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffé first\r\n\r\n two \u2028 parts \nlast".encode())
    records = Records(path)
    assert [record.fields for record in records] == [
        {"text": text} for text in ("é first", "", " two \u2028 parts ", "last")
    ]
    assert [records.line_of(index) for index in range(4)] == [1, 2, 3, 4]
    assert records[3] == Record(f"{path}, line 4", {"text": "last"})
    assert records.raw(0) == "é first\r".encode()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_last_line_needs_no_newline(tmp_path, ending):
    path = tmp_path / "t.jsonl"
    path.write_bytes(f'{{"text": "a"}}\r\n{{"text": "b"}}{ending}'.encode())
    assert texts(path) == ["a", "b"]


def test_the_format_is_that_of_the_suffix_unless_given(tmp_path):
    line = b'{"text": "a"}\n'
    for name in ("t.txt", "t.jsonl", "t", "t.TXT.json"):
        (tmp_path / name).write_bytes(line)
    with pytest.raises(UserError, match="t.txt looks like JSON lines: --format jsonl reads its objects"):
        texts(tmp_path / "t.txt")
    assert texts(tmp_path / "t.txt", format="text") == ['{"text": "a"}']
    assert texts(tmp_path / "t") == texts(tmp_path / "t.jsonl") == texts(tmp_path / "t.TXT.json") == ["a"]
    assert texts(tmp_path / "t.txt", format="jsonl") == ["a"]
    assert texts(tmp_path / "t.jsonl", format="text") == ['{"text": "a"}']
    with pytest.raises(ValueError, match="format must be one of 'jsonl', 'json', .*'npz', got 'xml'"):
        Records(tmp_path / "t", format="xml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.txt is empty; it must hold one text a line"),
        (b"\xef\xbb\xbf", "t.txt is empty"),
        (b"a\nb\xff\n", "t.txt, line 2 is not UTF-8: byte 0xff at column 2"),
    ],
)
def test_a_text_file_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "t.txt")


def test_fields_are_checked_by_kind(tmp_path):
    record = Record("f, line 3", {"a": 1, "b": ["x", 2], "c": [], "d": "\ud800", "e": ["", "y"]})
    for read, message in [
        (lambda: record.text("z"), 'line 3 has no "z" .a string.; it has "a", "b", "c", "d", "e"'),
        (lambda: record.text("a"), 'line 3: "a" is a number; it must be a string'),
        (lambda: record.text("d"), 'line 3: "d" holds half of a surrogate pair'),
        (lambda: record.texts("a"), 'line 3: "a" is a number; it must be an array of strings'),
        (lambda: record.texts("b"), r"line 3: b\[1\] is a number; it must be a string"),
        (lambda: record.texts("c"), 'line 3: "c" is an empty array'),
        (lambda: record.others(("a",), ("b", "c")), 'line 3 has the key "b", which the output uses itself'),
    ]:
        with pytest.raises(UserError, match=message):
            read()
    assert record.texts("e") == ["", "y"]
    assert record.others(("a", "b", "c"), ("a",)) == {"d": "\ud800", "e": ["", "y"]}


def test_a_file_that_changes_is_refused_and_one_that_is_replaced_is_not_seen(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n")
    records = Records(path)
    other = tmp_path / "other"
    other.write_text("uno\n")
    os.replace(other, path)
    assert [record.fields["text"] for record in records] == ["one", "two"]

    records = Records(path)
    with open(path, "a") as file:
        file.write("due\n")
    with pytest.raises(UserError, match="t.txt was changed while it was being read"):
        records[0]


def test_a_pipe_can_be_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1000))))
    writer.start()
    records = Records(path, lambda record: record.text("text"))
    writer.join()
    assert (len(records), records[999], records[5]) == (1000, "999", "5")


def test_indices_past_the_file_are_errors(tmp_path):
    (tmp_path / "t.txt").write_text("one\n")
    records = Records(tmp_path / "t.txt")
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"t.txt has 1 lines, asked for index {index}"):
            records[index]


def test_memory_is_a_few_bytes_a_line(tmp_path):
    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "x" * 2000}) + "\n"
    num_lines = 20_000
    with open(path, "w") as file:
        for _ in range(num_lines):
            file.write(line)
    checked = 0

    def on_bytes(size):
        nonlocal checked
        checked += size

    tracemalloc.start()
    try:
        records = Records(path, lambda record: record.text("text"), on_bytes=on_bytes)
        assert sum(len(text) for text in records) == 2000 * num_lines
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert checked == path.stat().st_size == 40_260_000
    # 8 bytes a line, twice while they grow, and buffers.
    assert peak < 16 * num_lines + 2**18
