"""`radix-ops score` on the CPU, folded against plain: by default the demo's model and questions (run `make demo` once).

plain is what lm-evaluation-harness does: the same sequences sorted by length, at most 5% padding, the same head on the
same tokens. Every step of a run is inside its time: planning, folding, model and head; tokenising is outside both.

--profile says instead what either run spends its time on.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch

import demo
import harness
from radix_ops.data.records import Records
from radix_ops.engine import loading, scoring
from radix_ops.engine.batches import RunStats
from radix_ops.engine.items import Collector
from radix_ops.plan.budget import MOST_ROWS, Budget

KINDS = {"products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("_dot_product_", "radix::")}


def profiled(runner, choices, folded: bool) -> dict[str, float]:
    """Return the seconds of a run by kind of op."""
    scoring.score(runner, choices, Budget(MOST_ROWS["cpu"]), folded)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scoring.score(runner, choices, Budget(MOST_ROWS["cpu"]), folded)
    spent = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profile.key_averages():
        kinds = (kind for kind, names in KINDS.items() if any(name in event.key for name in names))
        spent[next(kinds, "all else")] += event.self_cpu_time_total / 1e6
    return spent


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=3)
    demo.add_options(parser)
    parser.add_argument("--profile", action="store_true")
    args = harness.parse(parser)
    source = demo.find_model(args)
    config, tokenizer = loading.load_config(source), loading.load_tokenizer(source)
    records = Records(args.questions, scoring.parse_item)
    choices = scoring.encode(records, tokenizer, loading.context_length(config, tokenizer))
    runner = loading.load_runner(source, config, "AutoModelForCausalLM", "float32", torch.device("cpu"))
    runner.check(choices.store[0], folded=True)

    if args.profile:
        spent = {folded: profiled(runner, choices, folded) for folded in (False, True)}
        kinds = [
            {"kind": kind, "plain s": spent[False][kind], "folded s": s, "times less": spent[False][kind] / s}
            for kind, s in spent[True].items()
        ]
        harness.report("score_cpu_profile", kinds, args.save)
        return
    runs: dict[bool, list[RunStats]] = {False: [], True: []}
    for _ in range(args.rounds):
        found = {False: {}, True: {}}  # log-probabilities by item
        for folded, logprobs in found.items():
            collector = Collector(choices.ends)

            def collect(indices, scores, logprobs=logprobs, collector=collector):
                logprobs.update((item, numbers[0]) for item, numbers in collector.add(indices, scores))

            budget = Budget(MOST_ROWS["cpu"])
            runs[folded].append(scoring.score(runner, choices, budget, folded, collect, warm_up=True))
        logprobs = [[logprobs[item] for item in range(len(records))] for logprobs in found.values()]
        largest = max(np.abs(a - b).max() for a, b in zip(*logprobs, strict=True))
        agree = sum(int(a.argmax() == b.argmax()) for a, b in zip(*logprobs, strict=True))
        assert agree == len(records)
    plain, folded = (min(stats.seconds for stats in runs[kind]) for kind in (False, True))
    tokens, rows = runs[True][0].tokens, runs[True][0].rows
    harness.report(
        "score_cpu",
        [
            {
                "questions": len(records),
                "sequences": len(choices.store),
                "tokens": tokens,
                "rows": rows,
                "N/M": tokens / rows,
                "plain padding": runs[False][0].rows / tokens - 1,
                "plain s": plain,
                "folded s": folded,
                "speed-up": plain / folded,
                "share of N/M": plain / folded / (tokens / rows),
                "median share": statistics.median(
                    p.seconds / f.seconds for p, f in zip(runs[False], runs[True], strict=True)
                )
                / (tokens / rows),
                "agree": agree,
                "largest difference": largest,
            }
        ],
        args.save,
    )


if __name__ == "__main__":
    main()
