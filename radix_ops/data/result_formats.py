"""The formats of --output, which the ending of its name decides."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import UserError

LINES, CSV, TSV, PARQUET, MATRIX, TREC = "jsonl", "csv", "tsv", "parquet", "npy", "trec"
_TEXTS = {".jsonl": LINES, ".ndjson": LINES, ".csv": CSV, ".tsv": TSV, ".trec": TREC, ".run": TREC}
_BINARIES = {".parquet": PARQUET, ".npy": MATRIX}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_OF_ONE_COMMAND = {
    MATRIX: "a .npy file holds a matrix of embeddings, which embed alone writes; here the ending decides the format",
    TREC: "a TREC run holds ranked documents, which rerank alone writes; here the ending decides the format",
}
_EVERYWHERE = (LINES, CSV, TSV, PARQUET)  # whatever the command


@dataclass(frozen=True)
class ResultFormat:
    """A kind of file, one of the names above, and its compression: "gzip", "zstd" or None."""

    kind: str
    compression: str | None = None

    @property
    def is_matrix(self) -> bool:
        return self.kind == MATRIX

    @property
    def grows(self) -> bool:
        """Whether the run appends to the file itself, which then holds complete lines at any time."""
        return self.kind == LINES and self.compression is None

    @property
    def needs_pyarrow(self) -> bool:
        return self.kind == PARQUET or self.compression == "zstd"


def format_of(output: str, *further: str) -> ResultFormat:
    """Return the format that the name asks for; `further` kinds are those that the command has beside lines and tables.

    UserError for another one.
    """
    name, compression = output.lower(), None
    for ending, method in _COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), method
    endings = _TEXTS if compression else _TEXTS | _BINARIES
    kind = next((kind for ending, kind in endings.items() if name.endswith(ending)), None)
    if kind in (*_EVERYWHERE, *further):
        return ResultFormat(kind, compression)
    known = [ending for ending, kind in (_TEXTS | _BINARIES).items() if kind in (*_EVERYWHERE, *further)]
    texts = [ending for ending in known if ending in _TEXTS]
    reason = _OF_ONE_COMMAND.get(kind or "", "the name's ending decides the format")
    raise UserError(
        f"--output {output}: {reason}, and it must be {', '.join(known[:-1])} or {known[-1]}; behind "
        f"{', '.join(texts[:-1])} or {texts[-1]}, also {' or '.join(_COMPRESSIONS)}"
    )
