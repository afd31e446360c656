"""Train a small Qwen3 on folded batches over several processes: fully_shard, accumulated gradients, losses on rows.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py

It runs on GPUs with nccl where there are any, otherwise on the CPU with gloo. --dtype bfloat16 computes in bf16 with
weights in fp32, and --model takes a Qwen3 checkpoint.

Each step has prompts with several answers, as in policy-gradient training or supervised tuning on many samples. Tokens
follow each other by a hidden rule, which the model learns. The planner puts answers of one prompt into one micro-batch,
and micro-batches go round the processes. Losses do not depend on the number of processes, up to rounding.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from radix_ops import FoldedBatch
from radix_ops.losses import token_logprobs
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from radix_ops.plan import TokenStore, plan_folded

SMALL = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip
PROMPTS, ANSWERS, PROMPT_LENGTH, ANSWER_LENGTHS = 4, 6, 48, (4, 16)
MAX_ROWS = 160  # in a micro-batch
IGNORED = -100


class TokenLogprobs(nn.Module):
    """Compute the decoder and the log-probabilities of its tokens in one forward.

    The head's weight is used without calling the head. So this has to happen inside the forward of the module that
    fully_shard was given last: there the weight is gathered, and its gradient is reduced over the processes.
    """

    def __init__(self, model: Qwen3ForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: FoldedBatch, labels: Tensor) -> Tensor:
        return token_logprobs(self.model.model(batch), batch, labels, weight=self.model.lm_head.weight)  # [N]


def sample(rule: np.ndarray, rng: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
    """Draw token sequences and their labels: answers are to be learned, prompts are not."""

    def follow(token: int, length: int) -> list[int]:
        tokens = []
        for _ in range(length):
            token = int(rule[token]) if rng.random() < 0.9 else int(rng.integers(len(rule)))
            tokens.append(token)
        return tokens

    sequences, labels = [], []
    for _ in range(PROMPTS):
        prompt = follow(int(rng.integers(len(rule))), PROMPT_LENGTH)
        for _ in range(ANSWERS):
            answer = follow(prompt[-1], int(rng.integers(*ANSWER_LENGTHS)))
            sequences.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
    return sequences, labels


def micro_batches(sequences: list[list[int]], rank: int, num_ranks: int) -> list[np.ndarray]:
    """Yield the indices of the sequences of each micro-batch of this process.

    All processes have to make equally many forwards, so some may get an empty batch at the end.
    """
    plan = list(plan_folded(TokenStore.from_sequences(sequences), max_rows=MAX_ROWS))
    plan += [np.empty(0, np.int64)] * (-len(plan) % num_ranks)
    return plan[rank::num_ranks]


def train_step(model, optimizer, sequences, labels, device) -> dict[str, float]:
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    mine = micro_batches(sequences, rank, num_ranks)
    own_targets = sum(label != IGNORED for i in np.concatenate(mine) for label in labels[i])
    num_targets = torch.tensor(own_targets, device=device)
    distributed.all_reduce(num_targets)

    total, counts = torch.zeros((), device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for number, indices in enumerate(mine, start=1):
        batch = FoldedBatch.from_sequences([sequences[i] for i in indices], device=device)
        packed = torch.tensor([label for i in indices for label in labels[i]], dtype=torch.int64, device=device)
        model.set_requires_gradient_sync(number == len(mine))
        loss = -model(batch, packed).sum() / num_targets
        # fully_shard averages the gradients of processes, and the loss is a mean over the targets of all of them.
        (loss * num_ranks).backward()
        total += loss.detach()
        counts += torch.tensor([batch.num_rows, batch.num_tokens], device=device)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    optimizer.step()
    optimizer.zero_grad()

    distributed.all_reduce(total)
    distributed.all_reduce(counts)
    num_rows, num_tokens = counts.tolist()
    return {"loss": total.item(), "gradient norm": norm.item(), "compact_ratio": num_rows / num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a Qwen3 checkpoint, by default a small new model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of computation")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    arguments = parser.parse_args()

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # equal weights everywhere
    if arguments.model is None:
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(SMALL)).to(device)
    else:
        model = Qwen3ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, device=device)
    model.model.gradient_checkpointing = arguments.checkpointing
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, arguments.dtype), reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    trained = fully_shard(TokenLogprobs(model.train()), mp_policy=policy)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=arguments.lr)

    rng = np.random.default_rng(0)  # equal data everywhere
    rule = rng.permutation(SMALL["vocab_size"])
    for step in range(1, arguments.steps + 1):
        numbers = train_step(trained, optimizer, *sample(rule, rng), device)
        if distributed.get_rank() == 0:
            print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
