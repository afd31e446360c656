"""Common parts of the trainers' examples: a small new Qwen3, a tokenizer of words, and a run's report."""

from __future__ import annotations

import argparse
import random
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Trainer

WORDS = [f"{kind}{i}" for kind in ("red", "blue", "green", "grey") for i in range(60)]
# All the examples' trainers have these options.
_OPTIONS = {
    "learning_rate": 3e-3, "lr_scheduler_type": "constant", "logging_steps": 5, "report_to": [], "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip


def sentence(rng: random.Random, length: int, words: list[str] = WORDS) -> str:
    return " ".join(rng.choice(words) for _ in range(length))


def parse_arguments(description: str, steps: int) -> argparse.Namespace:
    """Parse the command line; `options` of the result are the trainer's, which trains a new model on the CPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER_OR_HUB_ID", help="a causal model, by default a small new Qwen3")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--plain", action="store_true", help="train without folding, to compare")
    arguments = parser.parse_args()
    # A GPU would gain nothing from folding batches of a model this small, so they would not be folded there.
    is_new = arguments.model is None
    arguments.options = {**_OPTIONS, "use_cpu": is_new, "bf16": torch.cuda.is_available() and not is_new}
    if is_new:
        arguments.model = new_model()
    return arguments


def new_model() -> str:
    """Save a Qwen3 of random weights in a folder, from which trainers load their reference model, too."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="tiny-qwen3-")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tokenizer(model: str):
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def report(trainer: Trainer, metric: str) -> None:
    """Print how a metric changed, and how many of the tokens that came in were computed."""
    values = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    print(f"{metric}: {values[0]:.3f} at first, {values[-1]:.3f} at last")
    for name in ("model", "ref_model"):
        stats = getattr(getattr(trainer, name, None), "radix_stats", None)
        if stats is not None:
            print(f"{name}: {stats.rows} rows for {stats.tokens} tokens, {stats.folded} batches folded")
