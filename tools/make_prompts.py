"""Make the .npz of real prompts that the benchmarks read (--data), from public data and a tokenizer.

    python tools/make_prompts.py --tokenizer Qwen/Qwen3-0.6B --output prompts.npz --mmlu --bbh
    python benchmarks/bench_qwen3.py --data prompts.npz --workloads mmlu_4shot_4choice

The file holds for each set of prompts, called NAME:

    NAME.ids    int32 [N]      the prompts' token ids, end to end
    NAME.cu     int32 [B + 1]  0, then the end of each prompt
    NAME.group  int32 [B]      the group of each prompt, such as its question; groups stand side by side

--mmlu, --bbh and the worked examples of --gsm8k come out of the package lm-eval, none of whose code is run: pip install
--no-deps lm-eval==0.4.13. All else are files that were downloaded before. Prompts stand in the order of their sources
and nothing is drawn, so the same sources, tokenizer and options give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import prompt_sets
import radix_ops
from prompt_sets import Groups
from radix_ops.engine.errors import UserError
from radix_ops.engine.loading import load_tokenizer

# Options that name what was downloaded.
FILES = dict.fromkeys(("gsm8k", "gsm8k-solutions", "humaneval", "xquad", "msmarco"), "file") | {"beir": "folder"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model's folder, hub id or .gguf file")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.npz", help="is replaced where it is there")
    sources = parser.add_argument_group("sources, of which one is needed")
    sources.add_argument("--mmlu", action="store_true", help="mmlu_4shot_4choice, mmlu_0shot_4choice")
    sources.add_argument("--bbh", action="store_true", help="bbh_2shot_choice")
    sources.add_argument("--gsm8k", type=Path, metavar="FILE", help="gsm8k_8shot_cot, of GSM8K's test.jsonl")
    sources.add_argument(
        "--gsm8k-solutions", type=Path, metavar="FILE", help="gsm8k_group5, of its example_model_solutions.jsonl"
    )
    sources.add_argument("--humaneval", type=Path, metavar="FILE", help="humaneval_n8_prefill, of HumanEval.jsonl.gz")
    sources.add_argument(
        "--xquad", type=Path, metavar="FILE", help="xquad_context_qa, _article_qa, _rerank_topK, of xquad.en.json"
    )
    sources.add_argument(
        "--msmarco", type=Path, metavar="FILE", help="msmarco_rerank_topK, of a TSV of top 1000 passages or of triples"
    )
    sources.add_argument("--beir", type=Path, metavar="FOLDER", help="FOLDER_rerank_topK, of a folder of BEIR")
    parser.add_argument(
        "--candidates", metavar="FILE", help="of --beir, which needs it: a first stage's run in TREC format"
    )
    parser.add_argument("--split", help="of --beir: the judgements of its queries (default: test)")
    parser.add_argument(
        "--top", type=int, nargs="+", default=[8], metavar="K", help="documents of a query; a set for each (default: 8)"
    )
    parser.add_argument(
        "--document-first", action="store_true", help="make a set NAME_docfirst beside each that reranks"
    )
    parser.add_argument(
        "--sequences", type=int, default=512, help="prompts of a set: whole groups, until there are so many (512)"
    )
    args = parser.parse_args(arguments)
    named = (args.mmlu, args.bbh, args.gsm8k, args.gsm8k_solutions, args.humaneval, args.xquad, args.msmarco, args.beir)
    if not any(named):
        parser.error("name a source, such as --mmlu")
    if args.output.suffix != ".npz":
        parser.error(f"--output {args.output} must end in .npz")
    if args.beir is None and (args.candidates or args.split):
        parser.error("--candidates and --split belong to --beir")
    if args.sequences < 1 or min(args.top) < 1:
        parser.error("--sequences and --top must be at least 1")
    return args


def sets(args: argparse.Namespace) -> Iterator[tuple[str, Groups]]:
    """Yield name and groups of each set that is asked for."""
    if args.mmlu:
        yield "mmlu_4shot_4choice", prompt_sets.mmlu(4)
        yield "mmlu_0shot_4choice", prompt_sets.mmlu(0)
    if args.bbh:
        yield "bbh_2shot_choice", prompt_sets.bbh()
    if args.gsm8k:
        yield "gsm8k_8shot_cot", prompt_sets.gsm8k(args.gsm8k)
    if args.gsm8k_solutions:
        yield "gsm8k_group5", prompt_sets.gsm8k_solutions(args.gsm8k_solutions)
    if args.humaneval:
        yield "humaneval_n8_prefill", prompt_sets.humaneval(args.humaneval)
    articles = prompt_sets.xquad(args.xquad) if args.xquad else None
    if articles is not None:
        yield "xquad_context_qa", prompt_sets.context_qa(articles)
        yield "xquad_article_qa", prompt_sets.article_qa(articles)
    for top in dict.fromkeys(args.top):
        for document_first in (False, True) if args.document_first else (False,):
            end = f"rerank_top{top}{'_docfirst' if document_first else ''}"
            if articles is not None:
                queries = prompt_sets.xquad_queries(articles, top)
                yield f"xquad_{end}", prompt_sets.rerank(queries, document_first)
            if args.msmarco:
                queries = prompt_sets.msmarco_queries(args.msmarco, top)
                yield f"msmarco_{end}", prompt_sets.rerank(queries, document_first)
            if args.beir:
                queries = prompt_sets.beir_queries(args.beir, top, args.candidates, args.split)
                yield f"{name_of(args.beir)}_{end}", prompt_sets.rerank(queries, document_first)


def check_sources(args: argparse.Namespace) -> None:
    """UserError for a source that is missing, or whose sets would have the names of another's."""
    for option, kind in FILES.items():
        path = getattr(args, option.replace("-", "_"))
        if path is not None and not path.exists():
            raise UserError(f"--{option} {path} does not exist; it must be a {kind} that was downloaded before")
    if args.beir:
        prompt_sets.check_beir(args.beir, args.candidates)
    for option in ("xquad", "msmarco"):
        if args.beir and getattr(args, option) and name_of(args.beir) == option:
            raise UserError(
                f"--beir {args.beir} would make sets of the names of --{option}'s; make them in a file of their own"
            )


def name_of(folder: Path) -> str:
    """Return what the sets of a BEIR folder are called."""
    return folder.resolve().name.replace(".", "_")


def arrays_of(groups: list[list[str]], tokenizer) -> dict[str, np.ndarray]:
    """Tokenise the groups of a set."""
    texts = [text for group in groups for text in group]
    found = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    ends = np.cumsum([0, *map(len, found)])
    return {
        "ids": np.array([token for ids in found for token in ids], np.int32),
        "cu": ends.astype(np.int32),
        "group": np.repeat(np.arange(len(groups)), [len(group) for group in groups]).astype(np.int32),
    }


def describe(name: str, arrays: dict[str, np.ndarray], num_groups: int) -> str:
    folded = radix_ops.fold(torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["cu"]))
    tokens, rows = folded.num_tokens, folded.num_nodes
    count = len(arrays["cu"]) - 1
    return (
        f"{name}: {num_groups:,} groups, {count:,} prompts, {tokens:,} tokens, {rows:,} rows, N/M {tokens / rows:.2f}"
    )


def make(args: argparse.Namespace) -> None:
    """Make the file, whose place holds what it held before until all is made."""
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: the folder {args.output.absolute().parent} does not exist")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; it must be a file")
    check_sources(args)
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    found: dict[str, np.ndarray] = {}
    for name, groups in sets(args):
        taken = prompt_sets.first_groups(groups, args.sequences)
        arrays = arrays_of(taken, tokenizer)
        if not taken:
            raise UserError(f"{name} has no prompts")
        if (np.diff(arrays["cu"]) == 0).any():
            raise UserError(f"{name} has a prompt of no tokens, the {int(np.diff(arrays['cu']).argmin()) + 1}th")
        found.update((f"{name}.{part}", array) for part, array in arrays.items())
        print(describe(name, arrays, len(taken)), flush=True)
    write(args.output, found)
    print(f"written: {args.output}")


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        make(args)
    except UserError as error:
        print(f"make_prompts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
