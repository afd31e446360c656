"""A training step on folded batches in one process: torch.compile, autocast; and the example of several processes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pad_sequence

from helpers import processes
from helpers.hf_models import error
from helpers.training import ROADS, Ours, Theirs, plain_logprobs, plain_model
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_fsdp.py"

BATCHES = [
    [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2], [5, 6, 7, 8, 9, 1], [5, 6, 3]],
    [[1, 2], [1, 3], [4, 5, 6]],
    [[7] * 7, [7, 7, 7, 8]],
    [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12]],
    [[9, 8, 7], [9, 8, 7, 6], [9, 8], [9, 8, 7]] * 3,
]


def gradient(model, logprobs) -> torch.Tensor:
    model.zero_grad()
    logprobs.sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture
def compiler(request):
    torch._dynamo.reset()
    yield CompileCounterWithBackend(request.param)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
def test_model_and_loss_compile_as_one_graph_for_batches_never_seen(compiler):
    plain, module = plain_model(num_hidden_layers=1), Ours(num_hidden_layers=1)
    compiled = torch.compile(module, backend=compiler, fullgraph=True, dynamic=True)
    for i, sequences in enumerate(BATCHES):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = gradient(module, compiled(*module.inputs(sequences)))
        want = gradient(plain, plain_logprobs(plain, sequences))
        assert error(got, want.double()) < 1e-5


@pytest.mark.parametrize("compiler", ["eager"], indirect=True)
def test_a_compiled_step_around_an_enabled_model_compiles_nothing_anew(compiler):
    """The decoder stack runs uncompiled; the code around it is compiled once, and again for other sizes."""
    plain, module = plain_model(), Theirs()
    compiled = torch.compile(module, backend=compiler, dynamic=True)
    counts = []
    for sequences in BATCHES:
        got = gradient(module, compiled(*module.inputs(sequences)))
        assert error(got, gradient(plain, plain_logprobs(plain, sequences)).double()) < 1e-5
        counts.append(compiler.frame_count)
    assert counts[1] == counts[-1]
    assert module.model.radix_stats.folded == len(BATCHES)


@pytest.mark.parametrize("road", ROADS)
def test_autocast_is_as_exact_as_that_of_transformers(road):
    """Gradients are at most twice as far from float64 as plain transformers' under the same autocast."""
    sequences = BATCHES[0]
    exact, plain, module = plain_model().double(), plain_model(), ROADS[road]()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = module(*module.inputs(sequences)), plain_logprobs(plain, sequences)
    want = gradient(exact, plain_logprobs(exact, sequences))
    got, theirs = gradient(module, logprobs[0]), gradient(plain, logprobs[1])
    assert got.dtype == torch.float32
    assert 1e-4 < error(got, want) <= 2 * error(theirs, want)


def test_the_example_prints_the_losses_of_one_process():
    """torchrun starts two processes; plain transformers take the same two steps on the same sequences."""
    spec = importlib.util.spec_from_file_location("train_fsdp", EXAMPLE)
    spec.loader.exec_module(example := importlib.util.module_from_spec(spec))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = processes.python_environment(CUDA_VISIBLE_DEVICES="")
    command = [*torchrun, EXAMPLE, "--steps=2"]
    run = subprocess.Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True)

    torch.manual_seed(0)
    ours = Qwen3ForCausalLM(Qwen3Config.from_dict(example.SMALL))
    plain = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**example.SMALL))
    plain.load_state_dict(ours.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    rule = rng.permutation(example.SMALL["vocab_size"])
    want = []
    for _ in range(2):
        sequences, labels = example.sample(rule, rng)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        ids, labels = (pad_sequence([*map(torch.tensor, x)], True, -100) for x in (sequences, labels))
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        loss = plain(input_ids=ids.clamp(min=0), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        want.append((loss.item(), norm.item()))
    output, _ = run.communicate(timeout=processes.LONGEST)
    got = re.findall(r"^step \d: loss (\S+), gradient norm (\S+), compact_ratio 0\.2", output, re.MULTILINE)
    assert run.returncode == 0, output
    torch.testing.assert_close(torch.tensor([[*map(float, x)] for x in got]), torch.tensor(want), rtol=0, atol=1e-4)
