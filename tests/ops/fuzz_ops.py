"""Mutated calls of every CPU op: an error or a right answer, in bounds. `make sanitize` runs it under sanitizers.

A call's arguments are those of a random batch, of which a few are then spoilt: extreme or neighbouring numbers,
swapped, cut or longer tables, other dtypes, strides and ranks, storages that were resized, the tables of another batch.
What an op accepts is compared with brute force. Case i of a seed is always the same; a case that crashes, hangs or is
wrong is printed as the arguments that repeat it.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import torch

from helpers.fuzz_calls import ORACLES, random_batch, random_call

EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**62, -(2**62), 2**63 - 1, -(2**63))
# Numbers of rows, tokens or sequences that are small or refused; what lies between would take gigabytes.
BAD_SIZES = (-1, 0, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
INDEX_DTYPES = (torch.int32, torch.int64)
OTHER_DTYPES = (torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.complex64)
CASES_OF_A_BATCH = 32
MOST_CPU_SECONDS = 20  # after which a case hangs


def spoil_values(rng, x):
    """Return another table of as many numbers."""
    x = x.clone()
    limits = torch.iinfo(x.dtype)
    extremes = [value for value in EXTREMES if limits.min <= value <= limits.max]
    at = [int(i) for i in rng.integers(len(x), size=int(rng.integers(1, 4)))]
    kind = rng.integers(6)
    if kind == 0:
        x[at] = torch.tensor([int(rng.choice(extremes)) for _ in at], dtype=x.dtype)
    elif kind == 1:
        x[at] += int(rng.choice([-1, 1]))
    elif kind == 2:
        x[at[0]], x[at[-1]] = x[at[-1]].clone(), x[at[0]].clone()
    elif kind == 3:
        x[at] = x[int(rng.integers(len(x)))].clone()
    elif kind == 4:
        x = x.flip(0)
    else:
        x += int(rng.choice(extremes))
    return x


def spoil_length(rng, x):
    if rng.integers(2) or not len(x):
        return torch.cat([x, x.new_full((int(rng.integers(1, 4)), *x.shape[1:]), int(rng.integers(3)))])
    return x[: int(rng.integers(len(x)))] if rng.integers(3) else x[1:]


def spoil_layout(rng, x):
    """Return the same or other numbers, otherwise in memory."""
    kind = rng.integers(6)
    if kind == 0 and x.dim():
        return x.repeat_interleave(2, 0)[::2]
    if kind == 1 and x.dim() and len(x):
        return x[:1].expand(x.shape)
    if kind == 2:
        return x[None]
    if kind == 3 and x.dim() and len(x):
        return x[0]
    if kind == 4 and x.dim() > 1:
        return x.transpose(0, x.dim() - 1)
    strides = [int(s) for s in rng.integers(0, 3, x.dim())]
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    if x.numel() and last < x.numel():
        return x.contiguous().as_strided(x.shape, strides)
    # Where there is no second one, no distance leads to it.
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [2**62 if size <= 1 or not x.numel() else stride for size, stride in sizes])


def spoil_storage(rng, x):
    x = torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)
    size = x.untyped_storage().nbytes()
    x.untyped_storage().resize_(int(rng.choice([0, size - 1, size // 2, size])) if size else 0)
    return x


def spoil_tensor(rng, x):
    is_table = x.dtype in INDEX_DTYPES and x.dim() == 1
    kind = rng.integers(10)
    if is_table and kind < 6 and len(x):
        return spoil_values(rng, x)
    if kind < 6 and x.is_floating_point() and x.numel():
        x = x.clone()
        x.view(-1)[int(rng.integers(x.numel()))] = float(rng.choice(["nan", "inf", "-inf", "1e38"]))
        return x
    if kind == 6:
        if is_table and rng.integers(2):
            return x.to(INDEX_DTYPES[x.dtype == torch.int32])
        return x.to(OTHER_DTYPES[int(rng.integers(len(OTHER_DTYPES)))])
    if kind == 7 and x.dim():
        return spoil_length(rng, x)
    return spoil_layout(rng, x) if kind < 9 else spoil_storage(rng, x)


def spoil_number(rng, value):
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, 1e38, float("inf"), float("nan")]))
    return int(rng.choice(BAD_SIZES)) if rng.integers(3) else max(value + int(rng.integers(-2, 3)), -1)


def mutated(rng, arguments, other):
    """Return arguments with some of them spoilt, and how many; `other` are those of the same op for another batch."""
    arguments = list(arguments)
    count = int(rng.choice([0, 1, 1, 1, 2, 3]))
    # Each argument is spoilt once: torch itself crashes on a tensor whose storage is gone.
    for at in rng.permutation(len(arguments))[:count].tolist():
        if rng.integers(8) == 0:
            arguments[at] = other[at]
        elif isinstance(arguments[at], torch.Tensor):
            arguments[at] = spoil_tensor(rng, arguments[at])
        else:
            arguments[at] = spoil_number(rng, arguments[at])
    return arguments, count


@functools.lru_cache(maxsize=1)
def batches_of(seed: int, number: int):
    rng = np.random.default_rng((seed, 0, number))
    return random_batch(rng), random_batch(rng)


def run_case(seed: int, number: int, without: set[str]) -> tuple[str, str]:
    """Return the op of a case and what became of it. Raises AssertionError for a wrong answer."""
    rng = np.random.default_rng((seed, number))
    torch.manual_seed(int(rng.integers(2**31)))
    made, other = batches_of(seed, number // CASES_OF_A_BATCH)
    name = str(rng.choice([name for name in ORACLES if name not in without]))
    op, arguments = random_call(rng, name, made)
    arguments, count = mutated(rng, arguments, random_call(rng, name, other)[1])
    wide = sum(x.numel() for x in arguments if isinstance(x, torch.Tensor))
    assert wide < 10**7, f"{name}: a case of {wide} numbers"
    try:
        results = op(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if not count:
            raise AssertionError(f"{name} refused a right call") from error
        return name, "refused" if str(error).startswith("radix::") else "refused by torch"
    ORACLES[name](arguments, results if isinstance(results, (tuple, list)) else (results,), count == 0)
    return name, "accepted"


def run_cases(seed: int, first: int, count: int | None, seconds: float, without: set[str], progress: str) -> None:
    """Write each case's number to a file before it runs: a crash leaves nothing else."""
    torch.set_num_threads(1)
    outcomes: Counter = Counter()
    until = time.monotonic() + seconds
    number = first
    with open(progress, "r+b", buffering=0) as file:
        while time.monotonic() < until and (count is None or number < first + count):
            os.pwrite(file.fileno(), b"%20d" % number, 0)
            signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)  # kills this process
            outcomes[run_case(seed, number, without)] += 1
            number += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(f"seed {seed}: {number - first} cases, no findings")
    for name in sorted({name for name, _ in outcomes}):
        print(f"  {name}:", ", ".join(f"{n} {what}" for (op, what), n in sorted(outcomes.items()) if op == name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, help="a new one by default")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, help="at most so many")
    parser.add_argument("--without", nargs="*", default=[], metavar="OP")
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    if args.progress:
        run_cases(seed, args.first, args.cases, args.seconds, set(args.without), args.progress)
        return
    progress = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fuzz_ops.{os.getpid()}")
    open(progress, "w").close()
    print(f"fuzzing the ops for {args.seconds:g} s, seed {seed}", flush=True)
    try:
        status = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--seed={seed}", f"--progress={progress}"])
        if status.returncode:
            with open(progress) as file:
                number = int(file.read() or args.first)
            print(
                f"a finding (exit status {status.returncode}); once more with: --seed {seed} --first {number} --cases 1"
            )
            sys.exit(1)
    finally:
        os.unlink(progress)


if __name__ == "__main__":
    main()
