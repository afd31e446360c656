"""Input files as bytes: blank lines, gzip, pipes, limits, and files that are something else."""

import gzip
import json
import os
import random
import threading
import time
import zlib

import pytest

from radix_ops.data import streams
from radix_ops.data.records import Records, UserError
from radix_ops.engine import inputs

LINES = [f'{{"text": "{i}"}}' for i in range(50)]


def text_of(record):
    return record.text("text")


def refusal(path, parse=text_of, **options) -> str:
    with pytest.raises(UserError) as caught:
        Records(path, parse, **options)
    return str(caught.value)


def with_blanks(seed):
    """Return the lines among blank ones, and the numbers that they have then."""
    rng, content, numbers = random.Random(seed), [], []
    for line in LINES:
        content += [rng.choice(["", " ", "\t\r", "\r"])] * rng.choice([0, 0, 0, 1, 3])
        content.append(line)
        numbers.append(len(content))
    return "\n".join(content + [""] * rng.randrange(4)), numbers


@pytest.mark.parametrize("kind", ["file", "gzip", "pipe"])
@pytest.mark.parametrize("seed", range(8))
def test_blank_lines_are_no_records_and_lines_keep_their_numbers(tmp_path, seed, kind):
    content, numbers = with_blanks(seed)
    path = tmp_path / "t.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.write_text, args=(content,)).start()
    else:
        path.write_bytes(content.encode() if kind == "file" else gzip.compress(content.encode()))
    records = Records(path)
    assert [(record.fields["text"], record.where) for record in records] == [
        (str(i), f"{path}, line {number}") for i, number in enumerate(numbers)
    ]
    assert [records.line_of(i) for i in range(50)] == numbers
    found = {line: records.index_of({"line": line}) for line in range(-1, numbers[-1] + 9)}
    assert {line: index for line, index in found.items() if index is not None} == {n: i for i, n in enumerate(numbers)}
    assert [records.raw(i).decode() for i in range(50)] == LINES


def test_errors_count_blank_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{LINES[0]}\n\n \n{{\n")
    assert "t.jsonl, line 4 is not JSON" in refusal(path)
    path.write_text("\n  \n\r\n")
    assert "t.jsonl is empty; it must hold one JSON object a line" in refusal(path)


def test_gzip_is_read_whatever_its_name(tmp_path):
    content = "\ufeffone\r\n\ntwo".encode()
    for name in ("t.txt.gz", "t.txt", "t.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content[:7]) + gzip.compress(content[7:]))
        records = Records(tmp_path / name, text_of, format="text" if name == "t.gz" else None)
        assert list(records) == ["one", "", "two"]


def test_gzip_comes_through_a_pipe_that_gives_a_byte_at_a_time(tmp_path):
    path, packed = tmp_path / "pipe", gzip.compress("\n".join(LINES).encode())
    os.mkfifo(path)

    def write():
        with open(path, "wb", buffering=0) as file:
            for byte in packed:
                file.write(bytes([byte]))

    threading.Thread(target=write).start()
    assert list(Records(path, text_of)) == [str(i) for i in range(50)]


def test_gzip_that_is_cut_or_changed_ends_in_a_sentence(tmp_path):
    path, packed = tmp_path / "t.jsonl.gz", gzip.compress("\n".join(LINES * 40).encode())
    for size in range(2, len(packed), 7):
        path.write_bytes(packed[:size])
        assert refusal(path) == f"{path} is cut off: its gzip has no end"
    whole = list(Records(_written(path, packed), text_of))
    for at in range(2, len(packed)):
        changed = bytearray(packed)
        changed[at] ^= 0x55
        try:
            found = list(Records(_written(path, bytes(changed)), text_of))
        except UserError:
            continue
        assert found == whole  # the changed byte is of its name, its time or its system
    assert "is damaged: of its gzip, CRC check failed" in refusal(_written(path, packed[:-8] + bytes(8)))
    assert "is damaged: of its gzip, Not a gzipped file" in refusal(_written(path, packed + b"tail"))


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["line", "blank", "text"])
def test_a_bomb_of_gzip_is_stopped_by_the_longest_line(tmp_path, monkeypatch, kind):
    """A quarter of a gigabyte of one byte takes 260 KB packed; neither memory nor the temporary folder takes it."""
    monkeypatch.setattr(streams, "LONGEST_LINE", 2**20)
    copy = open(tmp_path / "copy", "w+b")  # noqa: SIM115
    monkeypatch.setattr(streams.tempfile, "TemporaryFile", lambda **options: copy)
    path = tmp_path / "t.jsonl"
    packer = zlib.compressobj(wbits=31)
    byte = b"\n" if kind == "blank" else b"a"
    path.write_bytes(b"".join(packer.compress(byte * 2**24) for _ in range(16)) + packer.flush())
    message = refusal(path, format="text" if kind == "text" else None)
    assert message == f"{path}, line " + (
        "1048577 is behind more than 1,048,576 bytes of blank lines"
        if kind == "blank"
        else "1 is longer than 1,048,576 bytes, the most for a line"
    )
    assert (tmp_path / "copy").stat().st_size == 0


def _tar():
    return bytes(257) + b"ustar\0" + bytes(300)


FOREIGN = {
    "text in UTF-16; it must be UTF-8, which iconv makes of it": [
        "\ufeff".encode(code) + LINES[0].encode(code) for code in ("utf-16-le", "utf-16-be")
    ]
    + [LINES[0].encode(code) for code in ("utf-16-le", "utf-16-be")],
    "text in UTF-32; it must be UTF-8, which iconv makes of it": [
        "\ufeff".encode(code) + LINES[0].encode(code) for code in ("utf-32-le", "utf-32-be")
    ]
    + [LINES[0].encode(code) for code in ("utf-32-le", "utf-32-be")],
    "compressed by gzip twice; decompress it first": [gzip.compress(gzip.compress(b"{}"))],
    "a zip archive; decompress it first": [b"PK\3\4\x14\0\xff", b"PK\5\6" + bytes(18)],
    "a file of Excel or its kin; save the sheet as CSV first": [
        b"PK\3\4" + bytes(26) + name + bytes(30)
        for name in (b"[Content_Types].xml", b"docProps/app.xml", b"xl/styles.xml")
    ],
    "compressed twice, by zstd inside; decompress it first": [gzip.compress(b"\x28\xb5\x2f\xfd\x24\x02\x11\0\0")],
    "compressed by xz; decompress": [b"\xfd7zXZ\0\0\x04"],
    "compressed by bzip2; decompress": [b"BZh91AY&SY\xd8"],
    "a NumPy array; write it as JSON lines first": [b"\x93NUMPY\1\0v\0{"],
    "a tar archive; decompress it first": [_tar()],
}


MISNAMED = {
    "Parquet: name it .parquet, or read it with --format parquet": b"PAR1\x15\x04\x15\xff",
    "Arrow: name it .arrow, or read it with --format arrow": b"ARROW1\0\0\xff\xff\xff\xff",
    "an Arrow stream: name it .arrow, or read it with --format arrow": b"\xff\xff\xff\xff\x10\0\0\0",
    "a JSON array: name it .json, or read it with --format json": b'[\n{"text": "a"}]\n',
}


@pytest.mark.parametrize("name", MISNAMED)
def test_files_under_the_name_of_another_kind_are_named(tmp_path, name):
    for ending in ("jsonl", "csv", "txt") if "Arrow" in name or "Parquet" in name else ("jsonl",):
        path = tmp_path / f"t.{ending}"
        path.write_bytes(MISNAMED[name])
        assert refusal(path) == f"{path} looks like {name}"


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_of_files_are_named(tmp_path, name):
    for number, content in enumerate(FOREIGN[name]):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        assert f"{path} is {name}" in refusal(path)
    if "UTF" in name:
        assert f"{path} is {name}" in refusal(path, format="text")


def test_texts_that_start_as_other_files_do_are_texts(tmp_path):
    for text in ("PAR1 is a golf term", "BZh", "ARROW1", "Obj", "PK", "a"):
        path = tmp_path / "t.txt"
        path.write_text(text)
        assert list(Records(path, text_of)) == [text]


def test_lines_and_texts_have_a_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "LONGEST_LINE", 100)
    monkeypatch.setattr(inputs, "LONGEST_TEXT", 20)
    path = tmp_path / "t.txt"
    for ending in (b"", b"\n"):
        path.write_bytes(b"a" * 20 + b"\n" + b"b" * (100 - len(ending)) + ending)
        assert list(Records(path)) != []
        assert 'line 2: "text" is a text of' in refusal(path)
        path.write_bytes(b"a" * 20 + b"\n" + b"b" * (101 - len(ending)) + ending)
        assert refusal(path, None) == f"{path}, line 2 is longer than 100 bytes, the most for a line"
    path.write_text("é" * 10 + "\n" + "é" * 10 + "a\n", encoding="utf-8")
    assert refusal(path) == f'{path}, line 2: "text" is a text of 21 bytes, and the most are 20; split it'


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_line_of_20_megabytes_is_refused_in_no_time(tmp_path, kind):
    path = tmp_path / f"t.{'txt' if kind == 'text' else 'jsonl'}"
    text = "a" * 20_000_000
    path.write_text(text if kind == "text" else json.dumps({"text": text}))
    started = time.process_time()
    assert "is a text of 20,000,000 bytes, and the most are 8,388,608; split it" in refusal(path)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_depth_that_could_not_be_written_again_is_refused(tmp_path, brackets):
    path = tmp_path / "t.jsonl"

    def write(depth):
        inner = brackets[0] * depth + "1" + brackets[1] * depth
        path.write_text('{"text": "a", "more": ' + inner + "}\n")

    for depth, fits in ((1, True), (199, True), (200, False), (950, False), (100_000, False)):
        write(depth)
        if fits:
            assert list(Records(path, text_of)) == ["a"]
        else:
            assert f"{path}, line 1 " in refusal(path)
    # Brackets in texts and side by side are no depth.
    path.write_text(json.dumps({"text": "[" * 5000, "more": [[]] * 500 + [{}] * 500}) + "\n")
    assert list(Records(path, text_of)) == ["[" * 5000]


def test_a_key_that_stands_twice_among_many_is_found_in_linear_time(tmp_path):
    path, times = tmp_path / "t.jsonl", []
    keys = [f'"key {i}": 0' for i in range(60_000)]
    for line, message in ((keys, 'no "text"'), ([*keys, keys[-1]], "is not JSON: the key 'key 59999' stands twice")):
        path.write_text("{" + ", ".join(line) + "}\n")
        started = time.process_time()
        assert message in refusal(path)
        times.append(time.process_time() - started)
    assert times[1] < 20 * times[0]  # a quadratic reader takes 500 times as long


def test_integers_too_long_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "n": ' + "1" * 5000 + "}\n")
    assert "t.jsonl, line 1 is not JSON: Exceeds the limit (4300" in refusal(path)
    assert "sys." not in refusal(path)
