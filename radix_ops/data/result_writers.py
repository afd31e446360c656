"""The writer of each format that results are converted to."""

from __future__ import annotations

from .converted import Writer
from .csv_results import CsvWriter
from .packed_lines import PackedLinesWriter
from .parquet_results import ParquetWriter
from .result_formats import CSV, PARQUET, TREC, TSV, ResultFormat
from .trec import TrecWriter


def writer_of(form: ResultFormat) -> Writer:
    """Return the writer of a format."""
    if form.kind == PARQUET:
        return ParquetWriter()
    if form.kind == TREC:
        return TrecWriter(form.compression)
    if form.kind in (CSV, TSV):
        return CsvWriter("," if form.kind == CSV else "\t", form.compression)
    assert form.compression is not None
    return PackedLinesWriter(form.compression)
