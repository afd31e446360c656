"""Forwards of the Qwen3 as replayed CUDA graphs, against transformers and against the same model run eagerly."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.batches import NAMED
from helpers.graph_batches import ALONE, LIKE_SHARED, NESTED, SHARED, folded, packed
from helpers.qwen3_models import FILLED, VOCABULARY, run_theirs
from radix_ops.graphs import capture, shelf
from radix_ops.models.qwen3 import Qwen3ForCausalLM, Qwen3Model

pytestmark = pytest.mark.cuda

BATCHES = {name: NAMED[name] for name in FILLED} | {
    "long shared prefix": SHARED,
    "long nested": NESTED,
    "nothing shared": ALONE,
}
LAYOUTS = ("auto", "compact", "trie")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def model(folder):
    return Qwen3Model.from_pretrained(folder, torch.bfloat16, "cuda")


def replayed(model, batch, layout="auto", **options):
    """Call a model until it replays a graph; each call's result must be that of the others, to the bit."""
    with torch.no_grad():
        results = [model(batch, layout, **options) for _ in range(4)]
    for other in results[1:]:
        assert torch.equal(other, results[0])
    return results[0]


def eager(model, batch, layout="auto"):
    model.cuda_graphs = False
    with torch.no_grad():
        result = model(batch, layout)
    model.cuda_graphs = True
    return result


def with_padding(make, sequences):
    """Return a batch with a sequence more, as long as a graph's padding, made by none of its code."""
    rows = make(sequences).num_rows
    padding = -rows % 64
    return make([*sequences, [VOCABULARY - 1] * padding] if padding else sequences)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_error_is_at_most_twice_that_of_transformers(folder, dtype, layout):
    """It is taken over all batches together, since each takes few rows."""
    ours = Qwen3Model.from_pretrained(folder, dtype, "cuda")
    theirs, exact_model = (
        transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=d).cuda().eval() for d in (dtype, torch.float64)
    )
    errors = {"ours": 0.0, "theirs": 0.0}
    for sequences in BATCHES.values():
        with torch.no_grad(), torch.device("cuda"):
            exact, plain = (run_theirs(m, sequences)[0].double() for m in (exact_model, theirs))
        for make in (folded, packed):
            batch = make(sequences)
            got = batch.unfold(replayed(ours, batch, layout)).double()
            errors["ours"] += float((got - exact).norm()) ** 2
            errors["theirs"] += float((plain - exact).norm()) ** 2
    assert len(ours._graphs) >= 4
    assert errors["ours"] <= 2**2 * errors["theirs"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [folded, packed])
def test_bits_are_those_of_the_eager_model_on_as_many_rows(model, make, layout):
    for name in ("long shared prefix", "long nested", "nothing shared"):
        batch, padded = make(BATCHES[name]), with_padding(make, BATCHES[name])
        want = eager(model, padded, layout)[: batch.num_rows]
        assert torch.equal(replayed(model, batch, layout), want), name


def test_a_graph_runs_in_place_of_the_model(model, monkeypatch):
    """Another batch of the same sizes goes through it, and is no batch that was captured."""
    first, second = folded(), folded(LIKE_SHARED)
    want = eager(model, with_padding(folded, LIKE_SHARED))[: second.num_rows]
    replayed(model, first)
    assert len(model._graphs) == 1
    monkeypatch.setattr(Qwen3Model, "_compute", None)
    with torch.no_grad():
        assert torch.equal(model(second), want)
    with torch.inference_mode():
        assert torch.equal(model(second), want)


def test_warm_up_makes_the_graph_of_the_first_call(model, monkeypatch):
    want = eager(model, with_padding(folded, SHARED))
    batch = folded()
    assert model.warm_up(batch)
    monkeypatch.setattr(Qwen3Model, "_compute", None)
    with torch.no_grad():
        assert torch.equal(model(batch), want[: batch.num_rows])


def test_heads_replay_too(folder):
    model = Qwen3ForCausalLM.from_pretrained(folder, torch.bfloat16, "cuda")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    batch = folded()
    with torch.no_grad(), torch.device("cuda"):
        hidden, logits = run_theirs(theirs, SHARED)
        last = torch.tensor([len(s) for s in SHARED]).cumsum(0) - 1
        for _ in range(3):
            torch.testing.assert_close(batch.unfold(model(batch)), logits, rtol=0.1, atol=0.1)
            want = torch.nn.functional.normalize(hidden[last].float(), dim=-1)
            torch.testing.assert_close(model.embed(batch), want, rtol=0.05, atol=0.05)
            want = logits[last][:, [2, 1]].float().softmax(-1)[:, 1]
            torch.testing.assert_close(model.rerank(batch, yes_id=1, no_id=2), want, rtol=0.05, atol=0.05)
    assert len(model.model._graphs) > 0
    model.cuda_graphs = False
    assert len(model.model._graphs) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [folded, packed])
def test_bits_of_rows_wanted_are_those_of_the_eager_model(model, make, layout):
    """The last layer computes as many rows in both."""
    for name in ("long shared prefix", "nothing shared"):
        batch, padded = make(BATCHES[name]), with_padding(make, BATCHES[name])
        rows = batch.last_rows.flip(0)
        wanted = torch.cat([rows, rows.new_zeros(8 - len(rows))])
        model.cuda_graphs = False
        with torch.no_grad():
            want = model(padded, layout, wanted)[: len(rows)]
        model.cuda_graphs = True
        assert torch.equal(replayed(model, batch, layout, rows=rows), want), name
        assert len(model._graphs) > 0


def test_results_are_the_callers_own(model):
    batches = [folded(), folded(LIKE_SHARED)]
    wants = [replayed(model, batch).clone() for batch in batches]
    with torch.no_grad():
        results = [model(batch) for _ in range(5) for batch in batches]
        kept = [result.clone() for result in results]
        results[0].fill_(float("nan"))
        results += [model(batch) for batch in batches]
    assert all(torch.equal(result, wants[i % 2]) for i, result in enumerate(results) if i)
    assert all(torch.equal(result, wants[i % 2]) for i, result in enumerate(kept))


def test_nothing_waits_for_the_device(model):
    """Neither the first call, nor the capture, nor a replay."""
    batches = [folded(BATCHES[name]) for name in ("long shared prefix", "nothing shared")]
    other = folded([[1, 2, 3] * 30] * 2 + [[1, 2, 3] * 30 + [i] * 90 for i in range(5)])
    for batch in batches:
        replayed(model, batch)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for batch in (*batches, other, other, other):
                model(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(model._graphs) == 3


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01


def moved(model):
    model.cpu()
    in_place(model)
    model.cuda()


CHANGES = {
    "in place": in_place,
    "data": data,
    "moved": moved,
    "loaded": lambda m: m.load_state_dict({n: p * 1.01 for n, p in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({n: p * 1.01 for n, p in m.state_dict().items()}, assign=True),
    "layers exchanged": lambda m: setattr(m, "layers", nn.ModuleList([m.layers[i] for i in (2, 1, 0)])),
    "layer replaced": lambda m: m.layers.__setitem__(1, copy.deepcopy(m.layers[0])),
    "layer left out": lambda m: m.layers.__delitem__(1),
    "window": lambda m: setattr(m.layers[0].self_attn, "sliding_window", 9),
    "epsilon": lambda m: setattr(m.norm, "eps", 0.5),
    "positions": lambda m: m.config.rope.__setitem__("rope_theta", 7.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_seen(model, change):
    batch = folded()
    before = replayed(model, batch).clone()
    CHANGES[change](model)
    after = replayed(model, batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, eager(model, with_padding(folded, SHARED))[: batch.num_rows])


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def hooked(model):
    return model.layers[1].register_forward_hook(lambda module, given, out: 2 * out).remove


def hooked_before(model):
    return model.layers[1].mlp.register_forward_pre_hook(lambda module, given: (2 * given[0],)).remove


def hooked_everywhere(model):
    def hook(module, given, out):
        return 2 * out if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook).remove


def replaced_forward(model):
    mlp = model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    return lambda: delattr(mlp, "forward")


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.layers[1].mlp.up_proj, "weight", Doubled(), unsafe=True)
    return lambda: nn.utils.parametrize.remove_parametrizations(
        model.layers[1].mlp.up_proj, "weight", leave_parametrized=False
    )


@pytest.mark.parametrize(
    "change", [hooked, hooked_before, hooked_everywhere, replaced_forward, parametrized], ids=lambda f: f.__name__
)
def test_what_runs_inside_the_model_goes_on_running(model, change):
    batch = folded()
    before = replayed(model, batch).clone()
    undo = change(model)
    changed = [eager(model, batch) for _ in range(2)]
    with torch.no_grad():
        got = [model(batch) for _ in range(4)]
    assert all(torch.equal(result, changed[0]) for result in got)
    assert not torch.equal(got[0], before)
    undo()
    assert torch.equal(replayed(model, batch), before)


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class RecordingFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Recording, RecordingFunctions])
def test_modes_see_every_op(model, mode):
    batch = folded()
    replayed(model, batch)
    with torch.no_grad(), mode() as recorded:
        model(batch)
    assert sum("silu" in op for op in recorded.ops) == 3


def test_a_default_device_is_no_mode_to_mind(model, monkeypatch):
    batch = folded()
    replayed(model, batch)
    monkeypatch.setattr(Qwen3Model, "_compute", None)
    with torch.no_grad(), torch.device("cuda"):
        model(batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [folded, packed])
def test_bits_are_the_same_with_and_without_gradients(model, make, layout):
    """A policy that is trained is compared with its reference, which is not."""
    for name in ("long shared prefix", "long nested", "nothing shared"):
        batch = make(BATCHES[name])
        for rows in (None, batch.last_rows):
            got = replayed(model, batch, layout, rows=rows)
            assert torch.equal(model(batch, layout, rows), got), name
            model.train()
            assert torch.equal(model(batch, layout, rows), got), name
            model.eval()
    assert len(model._graphs) >= 6


def test_gradients_are_those_of_a_model_without_graphs(model):
    batch = folded()
    replayed(model, batch)
    model(batch).float().square().sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.cuda_graphs = False
    model(batch).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(got[name], parameter.grad), name


@pytest.mark.parametrize(
    "circumstance",
    [torch.enable_grad, lambda: torch.autocast("cuda", torch.float16), contextlib.nullcontext],
    ids=["gradients", "autocast", "train"],
)
def test_calls_that_no_graph_may_stand_in_for(model, circumstance, request):
    batch = folded()
    if request.node.callspec.id == "train":
        model.train()
    with torch.no_grad(), circumstance():
        for _ in range(3):
            result = model(batch)
        model.cuda_graphs = False
        assert torch.equal(result, model(batch))
    assert len(model._graphs) == 0


def test_other_weights_for_a_call(model):
    """torch.func.functional_call puts them in place and takes them away."""
    batch = folded()
    before = replayed(model, batch).clone()
    weights = {name: 1.01 * parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(model, weights, (batch,))
        model.cuda_graphs = False
        want = torch.func.functional_call(model, weights, (batch,))
        model.cuda_graphs = True
    assert torch.equal(got, want)
    assert torch.equal(replayed(model, batch), before)


def test_the_model_can_be_captured_by_its_caller(model):
    batch = folded()
    want = eager(model, batch)
    replayed(model, batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            eager(model, batch)
        with torch.cuda.graph(graph, stream=stream):
            result = model(batch)
    graph.replay()
    assert torch.equal(result, want)


def test_settings_that_choose_kernels_have_graphs_of_their_own(model):
    batch = folded()
    want = replayed(model, batch).clone()
    assert len(model._graphs) == 1
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = not before
        torch.use_deterministic_algorithms(True, warn_only=True)
        replayed(model, batch)
        assert len(model._graphs) == 2
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
        torch.use_deterministic_algorithms(False)
    assert torch.equal(replayed(model, batch), want)
    assert len(model._graphs) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_are_captured(model, layout):
    torch._dynamo.reset()
    batches = [folded(), packed(), folded(LIKE_SHARED)]
    wants = [eager(model, batch, layout) for batch in batches]
    model.compile_layers(fullgraph=True)
    try:
        for batch, want in zip(batches, wants, strict=True):
            got = replayed(model, batch, layout)
            assert (got - want).norm() <= 0.03 * want.norm()
        assert len(model._graphs) == 2
        uncompiled = Qwen3Model(model.config).to("cuda", torch.bfloat16).eval()
        uncompiled.load_state_dict(model.state_dict())
        model._run._compiled_call_impl = None
        assert torch.equal(replayed(model, batches[0], layout), replayed(uncompiled, batches[0], layout))
    finally:
        torch._dynamo.reset()


def test_a_compiled_model_is_left_to_torch(model):
    torch._dynamo.reset()
    batch = folded()
    want = eager(model, batch)
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for _ in range(3):
            assert (compiled(batch) - want).norm() <= 0.03 * want.norm()
    assert len(model._graphs) == 0
    torch._dynamo.reset()


def test_layers_compiled_with_graphs_of_torch_have_none_of_ours(model):
    torch._dynamo.reset()
    model.compile_layers(mode="reduce-overhead")
    batch = folded()
    want = eager(model, batch)
    with torch.no_grad():
        for _ in range(3):
            assert (model(batch) - want).norm() <= 0.03 * want.norm()
    assert len(model._graphs) == 0
    torch._dynamo.reset()


def test_streams_take_turns(model):
    """All graphs use the same memory; nothing but their own order keeps one from another's."""
    batches = [folded(), folded(LIKE_SHARED), folded(BATCHES["nothing shared"])]
    wants = [replayed(model, batch).clone() for batch in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for i in range(60):
            with torch.cuda.stream(streams[i % 3]):
                results.append(model(batches[i % 3 if i < 30 else 2 - i % 3]))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, wants[i % 3 if i < 30 else 2 - i % 3]), i


def test_models_side_by_side_keep_apart(folder):
    """Graphs of both multiply in one workspace of cuBLAS, which torch may give up meanwhile."""
    models = [Qwen3Model.from_pretrained(folder, torch.bfloat16, "cuda") for _ in range(2)]
    in_place(models[1])
    batches = [folded([[i % 60 for i in range(3000)]]), folded([[i % 50 for i in range(3000)]])]
    wants = [replayed(model, batch).clone() for model, batch in zip(models, batches, strict=True)]
    torch._C._cuda_clearCublasWorkspaces()
    scratch = [torch.full((2**22,), 7, dtype=torch.int64, device="cuda") for _ in range(4)]  # where they lay, perhaps
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for i in range(40):
            with torch.cuda.stream(streams[i % 2]):
                results.append(models[i % 2](batches[i % 2]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wants[i % 2]) for i, result in enumerate(results))
    assert all(bool((x == 7).all()) for x in scratch)


def test_threads_take_turns(model):
    batches = [folded(), folded(LIKE_SHARED), folded(BATCHES["nothing shared"]), packed()]
    wants = [eager(model, with_padding(f, s))[: b.num_rows] for f, s, b in zip(
        (folded, folded, folded, packed), (SHARED, LIKE_SHARED, BATCHES["nothing shared"], SHARED), batches, strict=True
    )]  # fmt: skip
    wrong = []

    def run(index):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(model(batches[index]), wants[index]):
                    wrong.append(index)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(model._graphs) >= 2


def test_graphs_are_few_and_share_memory(model):
    batches = [folded([[i % 60 for i in range(length)] * 2]) for length in range(32, 32 * (shelf._MOST_GRAPHS + 9), 32)]
    replayed(model, batches[-1])
    torch.cuda.synchronize()
    one = torch.cuda.memory_reserved()
    for batch in batches:
        replayed(model, batch)
    assert len(model._graphs) == shelf._MOST_GRAPHS
    # The largest needs about as much as all together, but for what they read.
    assert torch.cuda.memory_reserved() - one < 64 * 2**20


def test_memory_is_given_back(model):
    batch = folded()
    eager(model, batch)
    replayed(Qwen3Model(model.config).to("cuda", torch.bfloat16).eval(), batch)  # what is kept for the process
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    replayed(model, batch)
    assert torch.cuda.memory_allocated() > before
    model.cuda_graphs = False
    assert torch.cuda.memory_allocated() == before
    torch.cuda.empty_cache()
    model.cuda_graphs = True
    replayed(model, batch)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model.cpu()
    assert torch.cuda.memory_allocated() <= before - weights


def test_a_model_with_graphs_dies_with_its_last_reference(folder):
    model = Qwen3Model.from_pretrained(folder, torch.bfloat16, "cuda")
    replayed(model, folded())
    dead = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert dead() is None
    finally:
        gc.enable()


def test_graphs_do_not_travel(model, tmp_path):
    batch = folded()
    want = replayed(model, batch).clone()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    assert not any("graph" in name for name in model.state_dict())
    assert len(model._graphs) == 1
    for other in copies:
        assert len(other._graphs) == 0
        in_place(other)
        assert not torch.equal(replayed(other, batch), want)
        assert len(other._graphs) == 1
    assert torch.equal(replayed(model, batch), want)


@pytest.mark.parametrize("fault", ["memory", "wait"])
def test_what_can_not_be_captured_runs_eagerly(model, monkeypatch, fault):
    """Later captures are none the worse."""
    compute = Qwen3Model._compute

    def failing(self, *arguments):
        result = compute(self, *arguments)
        if torch.cuda.is_current_stream_capturing():
            if fault == "memory":
                torch.empty(2**45, dtype=torch.uint8, device="cuda")
            result.sum().item()
        return result

    batch, other = folded(), folded(BATCHES["nothing shared"])
    want = replayed(model, batch).clone()
    model.cuda_graphs = False
    model.cuda_graphs = True
    monkeypatch.setattr(Qwen3Model, "_compute", failing)
    with torch.no_grad():
        assert torch.equal(model(batch), want)
        with pytest.warns(UserWarning, match="without a CUDA graph, since it could not be captured"):
            assert torch.equal(model(batch), want)
        assert torch.equal(model(batch), want)
    assert len(model._graphs) == 0
    monkeypatch.undo()
    got = replayed(model, other)
    assert len(model._graphs) == 1
    assert torch.equal(got, eager(model, with_padding(folded, BATCHES["nothing shared"]))[: other.num_rows])
    # Memory that another stream uses comes back, which a capture that has not ended would put off.
    stream = torch.cuda.Stream()
    torch.empty(1, device="cuda")
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**20, device="cuda")
    held.record_stream(stream)
    del held
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("fault", ["id", "row"])
def test_what_is_out_of_range_is_a_device_assert(folder, fault):
    script = f"""
import torch
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3Model
model = Qwen3Model.from_pretrained({str(folder)!r}, torch.bfloat16, "cuda")
def run(last, row):
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, last]], device="cuda")
    model(batch, rows=torch.tensor([0, row]).cuda())
with torch.no_grad():
    for _ in range(3):
        run(5, 1)
    torch.cuda.synchronize()
    assert len(model._graphs) == 1
    print("replays", flush=True)
    run(*{(2**32 + 1, 1) if fault == "id" else (5, 4)})
    torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "replays" in run.stdout, run.stderr
    assert run.returncode != 0
    assert "device-side assert" in run.stderr


def test_an_allocator_without_pools_has_no_graphs(folder):
    script = f"""
import torch
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3Model
model = Qwen3Model.from_pretrained({str(folder)!r}, torch.bfloat16, "cuda")
batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4]], device="cuda")
with torch.no_grad():
    assert all(model(batch).isfinite().all() for _ in range(3))
assert len(model._graphs) == 0
"""
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr


def test_memory_poisoned_and_tokens_that_are_not_finite_stay_out(model):
    """Token 0 is in no batch, and its embedding is NaN."""
    sequences = [[t + 1 for t in s if t < VOCABULARY - 1] for s in SHARED]
    batch = folded(sequences)
    want = replayed(model, batch).clone()
    with torch.no_grad():
        model.embed_tokens.weight[0] = float("nan")
    assert torch.equal(replayed(model, batch), want)
    assert want.isfinite().all()
    model(batch).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_switch_is_checked(model):
    with pytest.raises(TypeError, match="cuda_graphs must be a bool, got int"):
        model.cuda_graphs = 1
    assert capture is not None
