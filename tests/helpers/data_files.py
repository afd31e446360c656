"""Real-shaped files of one set of records, one for each container that the command reads.

python tests/helpers/data_files.py FOLDER writes them all, of 1,000 rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

NUM_ROWS = 1000
_WORDS = ["the", "river", "Seine", "flows", "through", "Paris", "into", "sea", "été", "塞纳河", "saltier", "rain"]


def questions(count: int = NUM_ROWS) -> list[dict]:
    """Return questions in the manner of multiple-choice sets: a subject's head, one question, choices and a gold."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        subject = f'The following are questions about "rivers, part {index // 100}".\n\n'
        question = " ".join(rng.choices(_WORDS, k=6))
        rows.append(
            {
                "id": f"rivers/{index}",
                "context": f"{subject}Question: {question}?\nAnswer:",
                "choices": [f" {word}" for word in rng.sample(_WORDS[:8], 2)],
                "gold": rng.randrange(2),
            }
        )
    return rows


def texts(count: int = NUM_ROWS) -> list[str]:
    """Return texts of one line each."""
    return [row["context"].replace("\n", " ") for row in questions(count)]


def _jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=index % 2 == 0) + "\n" for index, row in enumerate(rows)).encode()


def _json(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def _delimited(rows: list[dict], delimiter: str) -> bytes:
    """Write arrays as JSON in a cell, as spreadsheets of such sets have them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue().encode()


def _parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out, row_group_size=300)
    return out.getvalue()


def _arrow(rows: list[dict], writer) -> bytes:
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    with writer(out, table.schema) as file:
        file.write_table(table, max_chunksize=300)
    return out.getvalue()


def _feather(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS = {
    "rows.jsonl": _jsonl,
    "rows.json": _json,
    "rows.csv": lambda rows: _delimited(rows, ","),
    "rows.tsv": lambda rows: _delimited(rows, "\t"),
    "rows.parquet": _parquet,
    "rows.arrow": lambda rows: _arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: _arrow(rows, pa.ipc.new_stream),
    "rows.feather": _feather,
}
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def write(folder: Path, name: str, packing: str, rows: list[dict]) -> Path:
    """Write the rows as a file of this name, which tells the container."""
    path = folder / f"{name}{packing}"
    path.write_bytes(PACKINGS[packing](WRITERS[name](rows)))
    return path


def write_text(folder: Path, packing: str, lines: list[str]) -> Path:
    path = folder / f"rows.txt{packing}"
    path.write_bytes(PACKINGS[packing]("".join(f"{line}\n" for line in lines).encode()))
    return path


def write_ids(path: Path, sequences: list[list[int]]) -> Path:
    """Write sequences of token ids as a .npz file."""
    ends = np.cumsum([0, *map(len, sequences)])
    np.savez(path, input_ids=np.concatenate([np.asarray(ids, np.int64) for ids in sequences]), cu_seqlens=ends)
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for end in PACKINGS:
        for file in WRITERS:
            print(write(target, file, end, questions()))
        print(write_text(target, end, texts()))
    print(write_ids(target / "rows.npz", [list(text.encode()) for text in texts()]))
