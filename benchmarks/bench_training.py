"""A training step's forward and backward on groups that share a prompt, Qwen3 at its real shapes, random weights.

Groups are those of GRPO (one prompt, 8 or 16 sampled answers) and of DPO (pairs behind prompts of their own). The loss
is a policy gradient, a weight for each answer token times its log-probability, by `radix_ops.losses.token_logprobs`;
prompts have no loss, so the head runs on answer rows alone. "packed" is the same model and the same loss on
`radix_ops.pack`: nothing folded, torch's varlen flash attention; "best packed", where FlashAttention 3 or 4 is
installed, the same by that (--flash-attention). "graphs" is the trie layout with the model's `training_graphs`: the
layers of small groups are replayed, forward and backward. All plan their targets before the model runs. Every time is
from ids on the device to gradients there, the fold and all steps of the host included. Memory is the peak beyond the
parameters and the gradients, which stand before the step begins; that of graphs is counted whole. The FLOP ratio is
packed's products over folded's: layers, attention and head.
"""

from __future__ import annotations

import gc
import json
import time

import torch

import bench_qwen3
import harness
import radix_ops
from batches import VOCABULARY, layers_flops
from radix_ops.losses import plan_targets, token_logprobs

LAYOUTS = ("compact", "trie")
WAYS = (*LAYOUTS, "graphs")
ROLLOUTS = [(1, 16, 2048, 512)]
ROLLOUTS += [
    (1, count, prompt, answer) for prompt in (1024, 2048, 4096) for answer in (256, 512, 1024) for count in (8, 16)
]
PAIRS = [(groups, 2, prompt, answer) for groups, prompt, answer in ((16, 256, 256), (8, 512, 512), (8, 1024, 256))]
GRID = {
    "0.6B": list(dict.fromkeys(ROLLOUTS + PAIRS)),
    "4B": [
        (1, 8, 1024, 256),
        (1, 16, 1024, 256),
        (1, 8, 2048, 256),
        (1, 8, 2048, 512),
        (1, 8, 4096, 256),
        (8, 2, 512, 256),
    ],
    "small": [(1, 8, 128, 32), (4, 2, 64, 32)],
}


class Groups:
    """`groups` prompts, each with `count` answers: packed ids, labels of the answers, a weight for each token."""

    def __init__(self, groups: int, count: int, prompt: int, answer: int, device: str):
        generator = torch.Generator().manual_seed(prompt + answer)
        length, sequences = prompt + answer, groups * count
        ids = torch.randint(VOCABULARY, (groups, count, length), generator=generator)
        ids[:, :, :prompt] = ids[:, :1, :prompt]
        labels = ids.clone()
        labels[:, :, :prompt] = -100
        self.name = f"{groups} x {count} x ({prompt} + {answer})" if groups > 1 else f"{count} x ({prompt} + {answer})"
        self.ids, self.labels = ids.flatten().to(device), labels.flatten().to(device)
        self.cu_seqlens = (torch.arange(sequences + 1) * length).to(device)
        self.advantages = torch.randn(ids.numel(), generator=generator).to(device)
        folded = radix_ops.fold(ids.flatten(), torch.arange(sequences + 1) * length)
        self.tokens, self.rows = folded.num_tokens, folded.num_nodes
        self.depths = int((folded.position_ids.long() + 1).sum())
        self.packed_depths = sequences * length * (length + 1) // 2
        # The last prompt token, shared, predicts the first token of each answer.
        self.head_rows, self.packed_head_rows = groups + sequences * (answer - 1), sequences * answer

    def flop_ratio(self, config) -> float:
        def flops(rows, depths, head_rows):
            return layers_flops(config, rows, depths) + 2 * config.hidden_size * config.vocab_size * head_rows

        packed = flops(self.tokens, self.packed_depths, self.packed_head_rows)
        return packed / flops(self.rows, self.depths, self.head_rows)


def step_functions(model, weight, batch: Groups, best_flash: str = "torch") -> dict:
    def of(make, layout, flash="torch", graphs=False):
        def run():
            radix_ops.activate_flash_attention(flash)
            made = make(batch.ids, batch.cu_seqlens)
            at = time.perf_counter()
            targets = plan_targets(made, batch.labels, vocabulary=VOCABULARY)
            model._training_graphs = graphs  # past the property, which would give graphs up
            logprobs = token_logprobs(model(made, layout), made, targets, weight=weight)
            loss = -(batch.advantages * logprobs).sum() / batch.packed_head_rows
            loss.backward()
            return at, loss.detach()

        return run

    functions = {"packed": of(radix_ops.pack, "compact")}
    if best_flash != "torch":
        functions["best packed"] = of(radix_ops.pack, "compact", best_flash)
    functions |= {layout: of(radix_ops.fold, layout) for layout in LAYOUTS}
    return functions | ({"graphs": of(radix_ops.fold, "trie", graphs=True)} if batch.ids.is_cuda else {})


def zero_gradients(parameters) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()


def reserved_bytes() -> int:
    """Return what torch holds of the GPU's memory, without what it could give back."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def row_of(name: str, model, weight, batch: Groups, args) -> dict[str, object]:
    row = {"model": name, "batch": batch.name, "N": batch.tokens, "M": batch.rows, "N/M": batch.tokens / batch.rows}
    row["FLOP ratio"] = batch.flop_ratio(model.config)
    parameters = [*model.parameters(), weight]
    fitting, gradients = {}, {}
    model.training_graphs = False  # gives those of the row before back
    for key, function in step_functions(model, weight, batch, args.flash_attention).items():
        try:
            reserved = reserved_bytes()
            for _ in range(2 if key == "graphs" else 1):  # the second is captured
                function()
            pool = reserved_bytes() - reserved if key == "graphs" else 0
            zero_gradients(parameters)
            bench_qwen3.synchronize()
            if batch.ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() - pool
            loss = function()[1]
            if batch.ids.is_cuda:
                row[f"{key} GiB"] = (torch.cuda.max_memory_allocated() - held) / 2**30
            gradients[key] = (
                float(loss),
                [p.grad.float().norm().item() for p in (weight, *list(model.parameters())[:12])],
            )
            fitting[key] = function
        except torch.cuda.OutOfMemoryError:
            row[f"{key} GiB"] = None
            torch.cuda.empty_cache()
    if "packed" in gradients:
        for key, (loss, norms) in gradients.items():
            off = max(abs(a / b - 1) for a, b in zip(norms, gradients["packed"][1], strict=True))
            assert abs(loss - gradients["packed"][0]) < 0.02, (batch.name, key, gradients)
            assert off < 0.05, f"{batch.name}: norms of {key}'s gradients differ by {off} from packed's"
    seconds = bench_qwen3.measure(fitting, args.rounds, args.budget)
    ways = WAYS if batch.ids.is_cuda else LAYOUTS
    row |= {f"{key} ms": seconds[key][0] * 1e3 if key in seconds else None for key in ("packed", *ways)}
    for key in ways:
        both = {"packed", key} <= seconds.keys()
        row[f"packed / {key}"] = seconds["packed"][0] / seconds[key][0] if both else None
    if {"packed", "best packed"} <= seconds.keys():
        row["best packed ms"] = seconds["best packed"][0] * 1e3
        fastest = min(seconds[key][0] for key in ways if key in seconds)
        row["best packed / best"] = min(seconds["packed"], seconds["best packed"])[0] / fastest
        row["flash attention of best packed"] = args.flash_attention
    best = max((row[f"packed / {key}"] or 0 for key in ways), default=0)
    row["best of FLOP ratio"] = best / row["FLOP ratio"] if best else None
    ratio = [row.get(f"{key} GiB") for key in ("trie", "packed")]
    row["memory, trie / packed"] = ratio[0] / ratio[1] if all(ratio) else None
    return row


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5, devices=harness.DEVICES)
    parser.add_argument("--models", nargs="+", choices=list(GRID), help="default: 0.6B and 4B on CUDA, else small")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds after which a line has rounds enough")
    harness.add_flash_option(parser)
    args = harness.parse(parser)
    device = args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64
    for name in args.models or (["small"] if device == "cpu" else ["0.6B", "4B"]):
        model, rows = bench_qwen3.make_model(name, device, dtype), []
        weight = torch.nn.Parameter(
            torch.randn(VOCABULARY, model.config.hidden_size, device=device, dtype=dtype) * 0.02
        )
        zero_gradients([*model.parameters(), weight])
        for shape in GRID[name]:
            rows.append(row_of(name, model, weight, Groups(*shape, device), args))
            print(json.dumps(rows[-1]), flush=True)
        harness.report(f"training_{name}_{device}", rows, args.save)
        del model, weight
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
