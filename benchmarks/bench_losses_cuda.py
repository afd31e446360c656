"""The loss of 16,384 tokens over a vocabulary of 151,936, forward and backward: time and memory, on a GPU, bf16.

"ours" is `radix_ops.losses.token_logprobs` on a batch with nothing folded, so that all compute the same. "whole" makes
all logits and takes `cross_entropy` of them in fp32, as transformers does; "chunks" does so for 1024 tokens at a time
under torch's checkpointing. Every token but the first of a sequence is a target, with a weight of its own. Memory is
the peak beyond the hidden states, the head, and the gradients of both.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import harness
import radix_ops
from radix_ops.losses import token_logprobs

VOCABULARY, TOKENS, LENGTH, CHUNK = 151_936, 16_384, 512, 1024
WIDTHS = {"0.6B": 1024, "4B": 2560}


def of_logits(hidden, labels, weight):
    return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def functions(hidden, weight, batch, ids, upstream) -> dict:
    # The label of a token is the next one; the last of a sequence has none.
    labels = ids.view(-1, LENGTH).roll(-1, 1)
    labels[:, -1] = -100
    labels = labels.flatten()

    def ours():
        return (token_logprobs(hidden, batch, weight=weight) * upstream).sum()

    def shifted(logprobs):
        return (logprobs.view(-1, LENGTH)[:, :-1] * upstream.view(-1, LENGTH)[:, 1:]).sum()

    def whole():
        return shifted(of_logits(hidden, labels, weight))

    def chunks():
        parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        return shifted(torch.cat([checkpoint(of_logits, *part, weight, use_reentrant=False) for part in parts]))

    return {"ours": ours, "whole": whole, "chunks": chunks}


def measure(loss, hidden, weight) -> tuple[float, torch.Tensor, torch.Tensor, float]:
    """Return GiB at the peak, both gradients in fp32, and the loss."""
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    value = loss()
    value.backward()
    torch.cuda.synchronize()
    results = (hidden.numel() + weight.numel()) * hidden.element_size()
    peak = torch.cuda.max_memory_allocated() - held - results
    return peak / 2**30, hidden.grad.float(), weight.grad.float(), value.item()


def row_of(name: str, width: int, rounds: int) -> dict[str, object]:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    weight = torch.nn.Parameter((torch.randn(VOCABULARY, width, **options) * 0.02).bfloat16())
    hidden = torch.nn.Parameter(torch.randn(TOKENS, width, **options).bfloat16())
    ids = torch.randint(VOCABULARY, (TOKENS,), **options)
    batch = radix_ops.pack(ids, torch.arange(0, TOKENS + 1, LENGTH, device="cuda"))
    losses = functions(hidden, weight, batch, ids, torch.randn(TOKENS, **options))

    def step(loss):
        hidden.grad = weight.grad = None
        loss().backward()

    measured = {}
    for key, loss in losses.items():
        step(loss)
        measured[key] = measure(loss, hidden, weight)
        ours, this = measured["ours"], measured[key]
        assert abs(ours[3] - this[3]) <= 1e-3 * abs(this[3]) + 1, (name, key, ours[3], this[3])
        for mine, theirs in zip(ours[1:3], this[1:3], strict=True):
            assert (mine - theirs).norm() <= 0.02 * theirs.norm(), (name, key)
        measured[key] = this if key == "ours" else this[:1]
    measured = {key: values[0] for key, values in measured.items()}
    seconds = harness.cuda_seconds_per_call({key: lambda f=loss: step(f) for key, loss in losses.items()}, rounds)
    row = {"model": name, "hidden_size": width, "tokens": TOKENS, "vocabulary": VOCABULARY}
    row |= {f"{key} ms": seconds[key] * 1e3 for key in losses}
    return row | {f"{key} GiB": measured[key] for key in losses}


def main() -> None:
    args = harness.parse_cuda(harness.make_parser(__doc__, rounds=5))
    harness.report("losses_cuda", [row_of(name, width, args.rounds) for name, width in WIDTHS.items()], args.save)


if __name__ == "__main__":
    main()
