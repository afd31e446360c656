"""lm-evaluation-harness on the CPU, its `hf` class against `radix`, on the demo's model and questions (`make demo`).

The questions become a local task of the harness, each a few shots and a question with its choices. Both classes hold
one model, get the same requests, the same batch_size and the same max_length, and take turns; a time is that of the
harness' call of loglikelihood, tokenising included. Neither uses the harness' cache of answers.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path

import demo
import harness

os.environ["HF_DATASETS_OFFLINE"] = "1"

TASK = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=2)
    demo.add_options(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8], help="default: 8")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens (default: 2048)")
    args = harness.parse(parser)
    source = demo.find_model(args)

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from radix_ops.lm_eval import RadixLM

    logging.disable(logging.WARNING)
    model, tokenizer = demo.load(source, "float32")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "questions.yaml").write_text(TASK % args.questions.resolve())
        tasks = TaskManager(include_path=folder, include_defaults=False)
        for batch_size in args.batch_sizes:
            options = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": args.max_length}
            best: dict[type, tuple[float, dict]] = {}
            for _ in range(args.rounds):
                for kind in (HFLM, RadixLM):
                    lm = kind(pretrained=model, **options)
                    found = evaluate(lm, tasks)
                    best[kind] = min(best.get(kind, found), found, key=lambda pair: pair[0])
            rows.append(compare(batch_size, best[HFLM], best[RadixLM]))
    harness.report("lm_eval_cpu", rows, args.save)


def evaluate(lm, tasks) -> tuple[float, dict]:
    """Return the seconds of the call of loglikelihood, and the harness' results."""
    import lm_eval

    score, seconds = lm.loglikelihood, []

    def timed(requests):
        start = time.perf_counter()
        answers = score(requests)
        seconds.append(time.perf_counter() - start)
        return answers

    lm.loglikelihood = timed
    results = lm_eval.simple_evaluate(model=lm, tasks=["questions"], task_manager=tasks, bootstrap_iters=0)
    (spent,) = seconds
    return spent, results


def compare(batch_size: int, hf: tuple[float, dict], radix: tuple[float, dict]) -> dict[str, object]:
    answers = [
        [answer for sample in results["samples"]["questions"] for (answer,) in sample["resps"]]
        for _, results in (hf, radix)
    ]
    scores = [results["results"]["questions"] for _, results in (hf, radix)]
    config = radix[1]["config"]
    row = {
        "batch size": batch_size,
        "questions": len(hf[1]["samples"]["questions"]),
        "requests": len(answers[0]),
        "tokens": config["radix_tokens"],
        "rows": config["radix_rows"],
        "hf s": hf[0],
        "radix s": radix[0],
        "speed-up": hf[0] / radix[0],
        "hf acc": scores[0]["acc,none"],
        "radix acc": scores[1]["acc,none"],
        "hf acc_norm": scores[0]["acc_norm,none"],
        "radix acc_norm": scores[1]["acc_norm,none"],
        "equal greedy flags": sum(one[1] == other[1] for one, other in zip(*answers, strict=True)),
        "largest difference": max(abs(one[0] - other[0]) for one, other in zip(*answers, strict=True)),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
