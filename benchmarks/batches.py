"""Batches of token ids that the benchmarks of models run, made ones and real prompts, and what they cost.

The FLOP ratio is the floating-point operations of the packed batch over those of the folded one, products and attention
alike: what folding can save where both run equally well. N/M, the tokens over the rows, is not: attention shares more
than rows do, or less.
"""

from __future__ import annotations

import argparse
import functools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

import radix_ops

VOCABULARY = 151_936
# (count, shared tokens, own tokens), from shapes where folding can't pay to shapes where it does.
SMALL_BATCHES = ((2, 16, 16), (4, 32, 8), (8, 64, 16), (16, 96, 16), (32, 112, 16), (8, 256, 256), (16, 512, 512))
WORKLOADS = (
    "msmarco_rerank_top8",
    "xquad_rerank_top8",
    "gsm8k_8shot_cot",
    "mmlu_4shot_4choice",
    "xquad_article_qa",
    "gsm8k_group5",
)


def layers_flops(config: Any, rows: int, depths: int) -> float:
    """Count those of a forward over rows: products with weights, and of each row with the rows on its path.

    depths: the rows on the paths of all rows, each on its own.
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights = config.hidden_size * (2 * heads + 2 * kv_heads) * dim
    weights += 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (2 * weights * rows + 4 * heads * dim * depths)


class Batch:
    """Packed ids, with all numbers that are known before anything is timed."""

    def __init__(self, name: str, ids: Tensor, cu_seqlens: Tensor, device: str):
        self.name, self.ids, self.cu_seqlens = name, ids.to(device), cu_seqlens.to(device)
        folded = radix_ops.fold(ids.cpu(), cu_seqlens.cpu())
        self.tokens, self.rows = folded.num_tokens, folded.num_nodes
        self.depths = int((folded.position_ids.long() + 1).sum())
        self.lengths = folded.lengths.long()
        self.packed_depths = int((self.lengths * (self.lengths + 1) // 2).sum())

    @classmethod
    def from_sequences(cls, name: str, sequences: list[Tensor], device: str) -> Batch:
        ends = torch.tensor([0, *map(len, sequences)]).cumsum(0)
        return cls(name, torch.cat(sequences), ends, device)

    @classmethod
    def synthetic(cls, count: int, prefix: int, own: int, device: str) -> Batch:
        """Make sequences that share `prefix` tokens and have `own` more each."""
        ids = torch.randint(VOCABULARY, (count, prefix + own), generator=torch.Generator().manual_seed(prefix + own))
        ids[:, :prefix] = ids[0, :prefix]
        return cls.from_sequences(f"{count} x ({prefix} + {own})", list(ids), device)

    @classmethod
    def agentic(cls, episodes: int, turns: int, device: str, root: int = 1500, step: int = 256, own: int = 128):
        """Make episodes that share a root: each turn adds `step` tokens, and a sequence ends there with `own` more."""
        draw = functools.partial(torch.randint, VOCABULARY, generator=torch.Generator().manual_seed(turns))
        start, sequences = draw((root,)), []
        for _ in range(episodes):
            so_far = start
            for _ in range(turns):
                so_far = torch.cat([so_far, draw((step,))])
                sequences.append(torch.cat([so_far, draw((own,))]))
        return cls.from_sequences(f"agentic, {episodes} x {turns} turns", sequences, device)

    @functools.cached_property
    def mask(self) -> Tensor:
        """1 for tokens and 0 for padding, int64 [B, longest]."""
        return (torch.arange(int(self.lengths.max())) < self.lengths[:, None]).long().to(self.ids.device)

    @functools.cached_property
    def padded(self) -> Tensor:
        """The ids, padded with 0, int64 [B, longest]."""
        return torch.zeros_like(self.mask).masked_scatter_(self.mask.bool(), self.ids.long())

    def flops(self, config: Any) -> float:
        """Count those of a forward over the folded batch."""
        return layers_flops(config, self.rows, self.depths)

    def flop_ratio(self, config: Any) -> float:
        return layers_flops(config, self.tokens, self.packed_depths) / self.flops(config)


def long_batches(device: str) -> list[Batch]:
    """Make long contexts with short tails, and the tries of agents; on the CPU of a sixteenth of the lengths."""
    part = 1 if device == "cuda" else 16
    shapes = ((8, 16384, 256), (4, 32768, 512), (16, 8192, 128))
    batches = [Batch.synthetic(count, prefix // part, own // part, device) for count, prefix, own in shapes]
    return batches + agentic_batches(device)


def agentic_batches(device: str) -> list[Batch]:
    part = 1 if device == "cuda" else 16
    return [
        Batch.agentic(episodes, turns, device, 1500 // part, 256 // part, 128 // part)
        for episodes, turns in ((4, 8), (2, 12))
    ]


def add_data_options(parser: argparse.ArgumentParser, workloads: tuple[str, ...] = WORKLOADS) -> None:
    parser.add_argument("--data", type=Path, help="a .npz of real prompts, as tools/make_prompts.py makes it")
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", help=f"of --data (default: those it has of {', '.join(workloads)})"
    )
    parser.add_argument("--sequences", type=int, default=128, help="of each real batch, at most (default: 128)")
    parser.set_defaults(known_workloads=workloads)


class Prompts(NamedTuple):
    """Real prompts, whose tokens stand end to end, groups side by side."""

    ids: np.ndarray  # [N]
    cu: np.ndarray  # [B + 1]: 0, then the end of each prompt
    group: np.ndarray  # [B]


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Read all workloads of --data. SystemExit where the file is not as tools/make_prompts.py makes it."""

    def fail(reason: object) -> NoReturn:
        raise SystemExit(f"--data {path} {reason}; tools/make_prompts.py makes one")

    if not path.is_file():
        fail("is no file")
    try:
        data = np.load(path)
        arrays = {key: data[key] for key in data.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        fail(f"can't be read as a .npz: {error}")
    prompts = {}
    for name in sorted(key.removesuffix(".ids") for key in arrays if key.endswith(".ids")):
        missing = [f"{name}.{part}" for part in Prompts._fields if f"{name}.{part}" not in arrays]
        if missing:
            fail(f"has {name}.ids, but no {' and no '.join(missing)}")
        found = Prompts(*(arrays[f"{name}.{part}"] for part in Prompts._fields))
        if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in found):
            fail(f"has arrays of {name} that are not 1-D or not of integers")
        ids, cu, group = found
        is_whole = len(cu) > 1 and cu[0] == 0 and cu[-1] == len(ids) and (np.diff(cu) > 0).all()
        if not is_whole or len(group) != len(cu) - 1 or (np.diff(group) < 0).any():
            fail(f"has arrays of {name} that do not belong together: cu must rise from 0 to len(ids), group not fall")
        prompts[name] = found
    return prompts


def real_batches(args: argparse.Namespace, device: str) -> list[Batch]:
    """Make batches of the first sequences of the workloads of --data.

    SystemExit where the file lacks what is asked for, or holds tokens that the models don't have.
    """
    if args.data is None:
        print("real prompts: skipped without --data FILE.npz, which tools/make_prompts.py makes")
        return []
    if args.sequences < 1:
        raise SystemExit(f"--sequences must be at least 1, got {args.sequences}")
    prompts = read_prompts(args.data)
    names = args.workloads or [name for name in args.known_workloads if name in prompts]
    if not names or not set(names) <= set(prompts):
        raise SystemExit(f"--data {args.data} holds {', '.join(prompts)}; --workloads must name some of these")
    batches = []
    for name in names:
        ends = torch.from_numpy(prompts[name].cu)[: args.sequences + 1]
        ids = torch.from_numpy(prompts[name].ids)[: int(ends[-1])]
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= VOCABULARY:
            raise SystemExit(
                f"--data {args.data}: {name} holds tokens from {low} to {high}, and the models have {VOCABULARY:,}; "
                "make it with the tokenizer of a Qwen3"
            )
        batches.append(Batch(f"{name} ({len(ends) - 1})", ids, ends, device))
    return batches
