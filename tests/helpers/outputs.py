"""Runs that write a small output of each kind, and checks of the files that they leave."""

import csv
import gzip
import io
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from radix_ops.data.converted import ConvertedFile
from radix_ops.data.log import line_of_item
from radix_ops.data.matrix import MatrixFile
from radix_ops.data.output import claimed
from radix_ops.data.quantised import QuantisedMatrixFile
from radix_ops.data.result_formats import TREC, format_of
from radix_ops.data.result_writers import writer_of
from radix_ops.data.results import ResultFile

COUNT, SHAPE = 6, (6, 5)
ROWS = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ORDER = [3, 0, 5, 1, 4, 2]


def key_of(item):
    return f"key{item}"


def fields_of(item):
    return {"line": item + 1, "text": "x" * item}


def ranking_of(item):
    """Return a result of rerank; the first query has no documents."""
    scores = [round(0.1 * (item + 7 * k) % 1, 3) for k in range(item)]
    order = sorted(range(item), key=lambda k: -scores[k])
    return {
        **fields_of(item),
        "query_id": f"q{item}",
        "scores": scores,
        "order": order,
        "ids": [f"d{k}" for k in order],
    }


def add_results(file, fields_of=fields_of):
    """Add what is missing, in an order of its own, and finish; return how many results were there."""
    found = int(file.done.sum())
    for item in ORDER:
        if not file.done[item]:
            file.add(item, fields_of(item))
            file.flush()
    file.finish()
    return found


def write_lines(path, overwrite=False, key=""):
    """Write an output; return how many results were there."""
    with claimed(str(path)):
        return add_results(ResultFile(str(path), COUNT, lambda item: key + key_of(item), overwrite))


def converted(path, overwrite=False, key=""):
    form = format_of(str(path), TREC)
    arguments = str(path), COUNT, lambda item: key + key_of(item), overwrite, line_of_item
    return ConvertedFile(*arguments, writer_of(form))


def write_converted(path, overwrite=False, key=""):
    with claimed(str(path)):
        return add_results(converted(path, overwrite, key), ranking_of)


def matrix(path, overwrite=False, key="key"):
    """Open a matrix, whose dtype stands in its name."""
    dtype = next((dtype for dtype in ("float16", "int8") if dtype in path.name), "float32")
    if dtype == "int8":
        return QuantisedMatrixFile(str(path), SHAPE, key, overwrite)
    return MatrixFile(str(path), SHAPE, key, overwrite, dtype)


def write_matrix(path, overwrite=False, key="key"):
    with claimed(str(path)):
        file = matrix(path, overwrite, key)
        found = int(file.done.sum())
        for part in (ORDER[:2], ORDER[2:4], ORDER[4:]):
            remaining = np.array([item for item in part if not file.done[item]], int)
            if len(remaining):
                file.write(remaining, ROWS[remaining])
        file.finish()
    return found


def check_lines(path):
    expected = [{**fields_of(i), "key": key_of(i)} for i in range(COUNT)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


RANKINGS = [{**ranking_of(item), "key": key_of(item)} for item in range(COUNT)]


def unpacked(path) -> str:
    """Return the text of a file, which may be compressed."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    elif path.suffix == ".zst":
        content = pyarrow.input_stream(io.BytesIO(content), "zstd").read()
    return content.decode()


def check_packed_lines(path):
    assert [json.loads(line) for line in unpacked(path).splitlines()] == RANKINGS


def check_table(path):
    delimiter = "\t" if ".tsv" in path.name else ","
    rows = list(csv.DictReader(io.StringIO(unpacked(path)), delimiter=delimiter))
    texts = ("text", "query_id", "key")
    found = [{name: cell if name in texts else json.loads(cell) for name, cell in row.items()} for row in rows]
    assert found == RANKINGS


def check_parquet(path):
    table = parquet.read_table(path)
    assert table.to_pylist() == RANKINGS
    assert table.schema.field("scores").type == pyarrow.list_(pyarrow.float64())


def check_trec(path):
    lines = [line.split(" ") for line in unpacked(path).splitlines()]
    expected = []
    for item, ranking in enumerate(RANKINGS):
        for rank, document in enumerate(ranking["order"], 1):
            expected.append([f"q{item}", "Q0", f"d{document}", str(rank), str(ranking["scores"][document])])
    assert [line[:-1] for line in lines] == expected
    (tag,) = {line[-1] for line in lines}
    assert tag.startswith("radix-ops-")


def check_matrix(path):
    found = np.load(path)
    assert found.dtype == np.float32
    assert np.array_equal(found, ROWS)


def check_float16(path):
    found = np.load(path)
    assert found.dtype == np.float16
    assert np.array_equal(found, ROWS.astype(np.float16))


def check_int8(path):
    """The numbers are those of sentence-transformers; see tests/engine/test_quantising.py, which asks it."""
    found, ranges = np.load(path), np.load(path.with_suffix(".ranges.npy"))
    assert found.dtype == np.int8
    assert np.array_equal(ranges, [ROWS.min(0), ROWS.max(0)])
    steps = (ranges[1] - ranges[0]) / 255
    error = ROWS - ((found.astype(np.float64) + 128) * steps + ranges[0])
    assert (error > -1e-6).all()
    assert (error < 1.001 * steps).all()


KINDS = {"o.jsonl": (write_lines, check_lines), "o.npy": (write_matrix, check_matrix)}
# Those that are made of JSON lines at the end, one for each way of writing and of compressing.
CONVERTED = {
    "o.csv": (write_converted, check_table),
    "o.tsv.zst": (write_converted, check_table),
    "o.jsonl.gz": (write_converted, check_packed_lines),
    "o.parquet": (write_converted, check_parquet),
    "o.trec": (write_converted, check_trec),
    "o.run.gz": (write_converted, check_trec),
}
OTHERS = {"o-float16.npy": (write_matrix, check_float16), "o-int8.npy": (write_matrix, check_int8)}
ALL = KINDS | CONVERTED | OTHERS


def companions(name):
    """Return the names of the files of a finished output."""
    return {name, "o-int8.ranges.npy"} if "int8" in name else {name}


either = pytest.mark.parametrize("name", KINDS)
each = pytest.mark.parametrize("name", ALL)
