"""`radix-ops embed`: embeddings of texts with shared prefixes computed once."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import numpy as np
import torch

from ..data.fingerprint import fingerprint
from ..data.matrix import MatrixFile, is_matrix, scratch_matrix
from ..data.records import Records
from ..data.results import ResultFile, ResultStream, key_of_parts
from ..engine import embedding
from ..engine.errors import UserError
from ..engine.items import Items
from ..engine.loading import load_config, load_runner, load_tokenizer
from ..engine.messages import Chat
from ..engine.recipes import POOLINGS, Recipe, find_recipe
from ..engine.runners import run as run_batches
from . import job
from .arguments import (
    FILE_HELP,
    add_command,
    add_format_argument,
    check_output,
    positive_int,
    read_records,
    utf8_text,
)

HELP = f"""\
Makes an embedding of each line: the hidden state of its last token, or the mean over its tokens, normalised. What
texts of a batch share at their start, such as an instruction, is computed once.

FILE holds one text a line, or JSON objects like {{"text": "..."}}, whose other keys are copied to the output. A text
that is too long for the model is an error, unless --truncate-right.

--output PATH.npy gets a float32 matrix [lines, dim] in the input's order, made as a memory map. Any other --output,
and standard output, get JSON lines: line (from 1), the input's other keys, embedding, and key, a hash of input line,
tokens, model, dtype and options.

A sentence-transformers folder (one with a modules.json) says itself how to pool and whether to normalise, and which
prompt stands before each text; options here go before that. Any other model pools the last token and normalises.
Special tokens are those that the model's tokenizer puts around a text. Where the folder has the modality "message", the
tokenizer's chat template renders each text as the user's message and the prompt as the system's, as in
sentence-transformers 6. What a folder sets and embed does not know is refused by name. --dim keeps the first numbers
of a Matryoshka model, and normalises after that; a folder's truncate_dim does before, as in sentence-transformers.

  radix-ops embed --model Qwen/Qwen3-Embedding-0.6B --output documents.npy documents.txt
  radix-ops embed --model Qwen/Qwen3-Embedding-0.6B --output queries.npy queries.txt \\
      --prompt $'Instruct: Given a web search query, retrieve relevant passages that answer the query\\nQuery:'

{job.RESUME_HELP}A .npy is made as PATH.npy.part, and a side file, PATH.npy.rows, says which rows are done, by a
checksum of each; both go when it is finished.

It does not pay where texts start differently: documents without a prompt, or with one that is short beside them.
`radix-ops inspect` says how much a file shares, --compare how much time that saves.

{FILE_HELP}
{job.MODEL_HELP}"""


def run(args: argparse.Namespace) -> None:
    check_output(args.output, args.file)
    device = job.find_device(args.device)
    with job.claimed_output(args, may_be_matrix=True):
        _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> None:
    shape = f'one object {{"{args.text_key}": ...}} a line'
    records = read_records(args.file, embedding.parse_text(args.text_key), shape, args.format)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = find_recipe(args.model)
    trust = args.trust_remote_code
    config = load_config(recipe.source, trust_remote_code=trust)
    tokenizer = load_tokenizer(recipe.source, trust_remote_code=trust)
    recipe = _complete(args, recipe, config, tokenizer)
    items = embedding.encode(job.with_progress(records, "tokenising"), tokenizer, recipe, args.truncate_right)
    runner = load_runner(recipe.source, config, "AutoModel", args.dtype, device, trust)
    job.check_runner(args, runner, items)
    skip = embedding.tokens_to_skip(tokenizer, recipe)
    # Tokens tell of the rest.
    how = dataclasses.replace(recipe, source="", prompt="", max_length=None, messages=None)
    base = fingerprint(runner, "embed", "plain" if args.plain else "folded", dataclasses.astuple(how), skip)
    task = _Job(args, runner, records, items, embedding.embedder(runner, recipe, skip), recipe.dim, base)
    task.compare() if args.compare else task.run_remaining()


def _complete(args: argparse.Namespace, recipe: Recipe, config, tokenizer) -> Recipe:
    """The recipe with the options that were given, each checked, and what was left open."""
    given = {"pooling": args.pooling, "prompt": args.prompt, "dim": args.dim}
    given["cuts_last"] = False if args.dim else None
    given["normalize"] = False if args.no_normalize else None
    given["max_length"] = job.max_length_of(args, config, tokenizer, recipe.max_length)
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    hidden_size = config.get_text_config().hidden_size
    if recipe.dim is not None and recipe.dim > hidden_size:
        raise UserError(f"--dim {recipe.dim} is more than the model has, {hidden_size}")
    messages = recipe.messages and recipe.messages.fitted(tokenizer, config.model_type)
    if messages:
        Chat(tokenizer, messages, recipe.prompt).check(("user",))
    return dataclasses.replace(recipe, dim=recipe.dim or hidden_size, messages=messages)


@dataclasses.dataclass
class _Job:
    """All that a run needs."""

    args: argparse.Namespace
    runner: object
    records: Records
    items: Items
    compute: object
    dim: int
    base: object

    def run_remaining(self) -> None:
        results = self._results()
        remaining = job.remaining_of(self.args, results)
        if len(remaining):

            def on_batch(indices, rows) -> None:
                self._check_finite(remaining[indices], rows)
                results.write(remaining[indices], rows)

            stats = self._run(self.items.subset(remaining), not self.args.plain, on_batch)
            print(job.summary(f"embedded {len(remaining):,} texts:", stats), file=sys.stderr)
        results.finish()

    def compare(self) -> None:
        plain_rows = scratch_matrix((len(self.records), self.dim))

        def keep(indices, rows) -> None:
            self._check_finite(indices, rows)
            plain_rows[indices] = rows

        plain = self._run(self.items, False, keep, warm_up=True)
        results = self._results() if self.args.output else None
        largest, least_cosine = 0.0, 1.0

        def check(indices, rows) -> None:
            nonlocal largest, least_cosine
            self._check_finite(indices, rows)
            expected = plain_rows[indices].astype(np.float64)
            largest = max(largest, float(np.abs(rows - expected).max()))
            lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
            least_cosine = min(least_cosine, float(((rows * expected).sum(1) / lengths).min()))
            if results:
                results.write(indices, rows)

        folded = self._run(self.items, True, check, warm_up=True)
        if results:
            results.finish()
        print(job.comparison_table(plain, folded), end="\n\n")
        print(f"largest difference of a number: {largest:.1e}")
        print(f"least cosine of two embeddings of one text: {least_cosine:.7f}")

    def _results(self) -> MatrixFile | _Lines:
        output, count = self.args.output, len(self.records)
        if output and is_matrix(output):
            store = self.items.store
            key = key_of_parts(self.base, store.lengths.tobytes(), memoryview(store.input_ids))
            return MatrixFile(output, (count, self.dim), key, self.args.overwrite)
        if output:
            return _Lines(
                ResultFile(output, count, self._key_of, self.args.overwrite, self.records.index_of), self.records
            )
        return _Lines(ResultStream(count, self._key_of), self.records)

    def _key_of(self, item: int) -> str:
        return key_of_parts(self.base, self.records.raw(item), self.items.store[item].tobytes())

    def _run(self, items: Items, folded: bool, on_batch, warm_up: bool = False):
        budget = job.budget_of(self.args, self.runner, items)
        with job.reporting(items, folded, on_batch) as report:
            return run_batches(self.runner, items, budget, folded, self.compute, report, warm_up)

    def _check_finite(self, indices: np.ndarray, rows: np.ndarray) -> None:
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(wrong):
            where = self.records[int(indices[wrong[0]])].where
            raise UserError(f"{where} got an embedding that is not finite; try --dtype float32")


class _Lines:
    """Embeddings as JSON lines."""

    def __init__(self, results: ResultFile | ResultStream, records: Records):
        self.results, self.records = results, records
        self.done, self.finish = results.done, results.finish

    def write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        for item, row in zip(indices.tolist(), rows, strict=True):
            text = self.records[item]
            self.results.add(item, {"line": text.line, **text.extra, "embedding": embedding.numbers(row)})
        self.results.flush()


def add_parser(commands) -> None:
    command = add_command(commands, "embed", "make embeddings of texts", HELP, run)
    command.add_argument("file", metavar="FILE", help="the texts, JSONL or one a line")
    add_format_argument(command)
    command.add_argument(
        "--text-key",
        type=utf8_text,
        default="text",
        metavar="KEY",
        help="of the text in a JSON object (default: %(default)s)",
    )
    job.add_model_arguments(
        command, "where the embeddings go, a matrix where it ends in .npy (default: JSON lines on standard output)"
    )
    command.add_argument(
        "--pooling", choices=POOLINGS, help="of hidden states (default: as the model's folder says, else last)"
    )
    command.add_argument(
        "--prompt",
        type=utf8_text,
        metavar="TEXT",
        help='stands before each text; "" for none (default: as the model\'s folder says)',
    )
    command.add_argument("--dim", type=positive_int, metavar="N", help="keep the first N numbers (default: all)")
    command.add_argument("--no-normalize", action="store_true", help="leave embeddings at the length that they have")
    job.add_length_arguments(command, "text", "texts")
