"""Result lines of a scoring run: where they go, and what makes an interrupted run continue where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from . import scoring
from .plan import Sequence
from .scoring import Item, ScoreError

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TORN_START = b'{"line": '


class ResultFile:
    """Result lines in a file: each is appended as its item finishes, so that a kill loses the current batch at most.

    `keys[i]` identifies the result of item i. Lines that an earlier run left are kept if their keys fit.
    """

    def __init__(self, path: str, items: list[Item], keys: list[str], overwrite: bool):
        self.path, self.items = Path(path), items
        left = self.path.read_bytes() if self.path.is_file() and not overwrite else b""
        kept = left[: left.rfind(b"\n") + 1]
        torn = left[len(kept) :]
        if not torn.startswith(TORN_START[: len(torn)]):
            raise ScoreError(f"{path} ends in a line that is no result; --overwrite replaces the file")
        self.order = [self._item_of(line, number, keys) for number, line in enumerate(kept.split(b"\n")[:-1], 1)]
        if len(set(self.order)) < len(self.order):
            raise ScoreError(f"{path} holds a result twice; --overwrite replaces it")
        self.file = open(path, "r+b" if kept else "wb")  # noqa: SIM115
        self.file.truncate(len(kept))
        self.file.seek(len(kept))

    def _item_of(self, line: bytes, number: int, keys: list[str]) -> int:
        try:
            fields = json.loads(line)
            index = fields["line"] - 1
            fits = index >= 0 and keys[index] == fields["key"]
        except (ValueError, TypeError, LookupError):
            fits = False
        if not fits:
            raise ScoreError(
                f"{self.path}, line {number} is no result of this input, model, dtype and mode; "
                "--overwrite replaces the file"
            )
        return index

    @property
    def done(self) -> set[int]:
        return set(self.order)

    def add(self, index: int, line: str) -> None:
        self.file.write(line.encode() + b"\n")
        self.order.append(index)

    def flush(self) -> None:
        self.file.flush()

    def finish(self) -> None:
        """Close the file, its lines in the input's order; a kill leaves either the old file or the new one."""
        self.file.close()
        if self.path.is_file() and self.order != sorted(self.order):
            lines = self.path.read_bytes().split(b"\n")[:-1]
            ordered = [line for _, line in sorted(zip(self.order, lines, strict=True))]
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_bytes(b"\n".join(ordered) + b"\n")
            os.replace(temporary, self.path)


class ResultStream:
    """Result lines on standard output: a line waits until all lines before it are out."""

    def __init__(self):
        self.done: set[int] = set()
        self.waiting: dict[int, str] = {}
        self.next = 0

    def add(self, index: int, line: str) -> None:
        self.waiting[index] = line
        while self.next in self.waiting:
            print(self.waiting.pop(self.next))
            self.next += 1

    def flush(self) -> None:
        sys.stdout.flush()

    def finish(self) -> None:
        self.flush()


class Collector:
    """Gathers the choices of each item from the batches and writes an item's result when it has all of them."""

    def __init__(self, items: list[Item], sequences: list[Sequence], keys: list[str], results):
        self.items, self.keys, self.results = items, keys, results
        self.sequences = sequences
        self.by_item: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            self.by_item.setdefault(sequence.item, []).append(sequence)
        self.found: dict[int, dict[int, scoring.ChoiceScore]] = {}

    def add(self, indices, scores) -> None:
        for sequence, score in zip((self.sequences[i] for i in indices), scores, strict=True):
            index = sequence.item
            found = self.found.setdefault(index, {})
            found[sequence.choice] = score
            if len(found) == len(self.items[index].choices):
                ordered = [found[choice] for choice in range(len(found))]
                fields = scoring.result(self.items[index], self.by_item[index], ordered)
                self.results.add(index, json.dumps({**fields, "key": self.keys[index]}))
                del self.found[index]
        self.results.flush()


def result_keys(model, mode: str, items: list[Item], sequences: list[Sequence]) -> list[str]:
    """For each item a hash of its input line and token ids, of the mode, and of the model's config and weights.

    Of the weights it takes the bits of vectors and, of matrices, a sum over the bits of each row.
    """
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    base = hashlib.sha256(json.dumps([mode, config], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(_INTEGER_OF_SIZE[parameter.element_size()])
        if bits.dim() > 1:
            bits = bits.flatten(1).sum(1, dtype=torch.int64)
        base.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        base.update(bits.cpu().numpy().tobytes())
    hashes = []
    for item in items:
        hashes.append(base.copy())
        hashes[-1].update(item.raw)
    for sequence in sequences:
        hashes[sequence.item].update(sequence.context.tobytes() + b"|" + sequence.continuation.tobytes() + b"|")
    return [digest.hexdigest()[:16] for digest in hashes]
