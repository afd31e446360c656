"""Attention alone on CUDA in bfloat16: the layouts, and FlashAttention 3 and 4 where they are installed.

"trie" is our kernels on the rows as they stand; "compact" unfolds keys and values, which its time includes, and attends
by flash attention; "packed" attends all tokens. Behind a comma stands whose flash attention ran; "both" is a forward
and its backward. Each result is compared with torch's compact first. Times are the device's, which waits before each
call until the host has launched it, in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch

import harness
import radix_ops
from batches import Batch, add_data_options, real_batches
from radix_ops import attention

SHAPES = ((15, 2047, 256), (15, 511, 256), (15, 1, 256), (10, 64, 100), (32, 2048, 256))
HEADS = ((16, 8, 128), (32, 8, 128), (14, 2, 64))  # of queries, of keys and values, head_dim: Qwen3's and Qwen2.5's
LARGEST_DIFFERENCE = 1e-2
HOST_CYCLES = 8_000_000  # of the device, some 4 ms, in which the host launches a forward and its backward


def implementations(wanted: list[str] | None) -> list[str]:
    """Return whose flash attention to measure: those wanted, else torch's and each package's that is installed."""
    found = ["torch"]
    for name in wanted or harness.FLASH_PACKAGES:
        try:
            radix_ops.activate_flash_attention(name)
            found.append(name)
        except RuntimeError as error:
            if wanted:
                raise
            print(f"{name} is left out: {error}")
    return list(dict.fromkeys(found))


def calls_of(batch: Batch, heads: tuple[int, int, int], names: list[str], has_backward: bool) -> dict:
    folded, packed = (make(batch.ids, batch.cu_seqlens) for make in (radix_ops.fold, radix_ops.pack))
    counts, size = (heads[0], heads[1], heads[1]), heads[2]
    rows = [torch.randn(folded.num_rows, count, size, device="cuda", dtype=torch.bfloat16) for count in counts]
    places = {"compact": (rows, folded), "packed": ([folded.unfold(x) for x in rows], packed)}

    def of(name: str, tensors, batch, layout: str):
        inputs = [x.clone().requires_grad_(has_backward) for x in tensors]
        grad = torch.ones_like(inputs[0])

        def run():
            radix_ops.activate_flash_attention(name)
            out = attention(*inputs, batch, layout=layout)
            return torch.autograd.grad(out, inputs, grad)[0] if has_backward else out

        return run

    calls = {"trie": of("torch", rows, folded, "trie")}
    for place, (tensors, made) in places.items():
        calls |= {f"{place}, {name}": of(name, tensors, made, "compact") for name in names}
    want = calls["compact, torch"]()
    for key, call in calls.items():
        if not (key.startswith("packed") and has_backward):  # whose rows have several gradients
            got = folded.fold(call()) if key.startswith("packed") else call()
            off = float((got - want).float().norm() / want.float().norm())
            assert off < LARGEST_DIFFERENCE, (batch.name, heads, key, off)
    return calls


def device_seconds(calls: dict, rounds: int) -> dict[str, float]:
    """Return the median time of each call between events, all in turn, with the host ahead of the device."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOST_CYCLES)
            start.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e-3)
    return {name: statistics.median(values) for name, values in samples.items()}


def row(batch: Batch, heads: tuple[int, int, int], names: list[str], has_backward: bool, rounds: int):
    seconds = device_seconds(calls_of(batch, heads, names, has_backward), rounds)
    found = {"batch": batch.name, "heads": f"{heads[0]}/{heads[1]}", "head_dim": heads[2], "both": has_backward}
    found |= {f"{key} us": 1e6 * value for key, value in seconds.items()}
    for name in names:
        found[f"compact, {name} / trie"] = seconds[f"compact, {name}"] / seconds["trie"]
    # 2 operations for each number of a query, of its keys and of its values; 2.5 times as many in the backward.
    useful = 4 * heads[0] * heads[2] * batch.depths * (3.5 if has_backward else 1)
    return found | {"useful TFLOP/s of trie": useful / seconds["trie"] / 1e12}


def cases(args: argparse.Namespace) -> dict[str, list[harness.Case]]:
    names = implementations(args.flash_attention)
    batches = [Batch.synthetic(*shape, "cuda") for shape in SHAPES] + real_batches(args, "cuda")
    kinds = [(batch, heads, names, both) for batch in batches for heads in HEADS for both in (False, True)]
    return {"attention_cuda": [functools.partial(row, *kind) for kind in kinds if args.backward or not kind[3]]}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=7)
    add_data_options(parser)
    parser.add_argument(
        "--flash-attention", nargs="+", choices=harness.FLASH_PACKAGES, help="default: those that are installed"
    )
    parser.add_argument("--backward", action="store_true", help="measure forwards with their backwards too")
    args = harness.parse_cuda(parser)
    harness.report_cases(cases(args), args)


if __name__ == "__main__":
    main()
