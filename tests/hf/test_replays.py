"""Folded batches of few rows as captured CUDA graphs, against the plain model.

Without a GPU a stand-in computes what a graph would: the model as it was when it was captured.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn

from helpers import frozen_graphs
from helpers.hf_models import SIZES, TREE, build, no_warnings, pad
from radix_ops import hf
from radix_ops.graphs import forwards
from radix_ops.hf import payoff

OTHER_TREE = [[15, 16, 17, 18, 19, 11], [15, 16, 17, 18, 12], [15, 16, 17, 18, 19, 11], [15, 16, 13], [15, 16], [14]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    if request.param == "cpu":
        frozen_graphs.install(monkeypatch)
    return torch.device(request.param)


def batch_of(sequences, device, side="right"):
    ids, mask = pad(sequences, side)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def enabled(device, name="llama", head="ForCausalLM", **options):
    model = build(name, head).to(device, torch.bfloat16)
    return hf.enable(model, **{"threshold": 1.0, "layout": "trie", "verify": "never"} | options)


def stack_of(model):
    return model.get_decoder()


def states(model, given):
    """Return the hidden states of real tokens."""
    with torch.no_grad():
        return stack_of(model)(**given, use_cache=False).last_hidden_state[given["attention_mask"].bool()]


def plain(model, given):
    """Return what the model without radix_ops makes of it."""
    hf.disable(model)
    try:
        return states(model, given)
    finally:
        hf.enable(model, threshold=1.0, layout="trie", verify="never")


def replayed(model, given):
    """Call the model until it replays a graph; each call's result must be that of the others, to the bit."""
    before = model.radix_stats.replayed
    results = [states(model, given) for _ in range(4)]
    assert model.radix_stats.replayed - before >= 2
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def assert_close(got, want):
    assert (got.float() - want.float()).norm() <= 0.05 * want.float().norm()


def graphs_of(model):
    return vars(stack_of(model))["forward"].replays


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["llama", "llama_biased", "llama_yarn", "qwen3", "qwen3_sliding"])
def test_a_replay_is_the_plain_model_on_another_batch(device, name, side):
    model = enabled(device, name)
    with no_warnings():
        replayed(model, batch_of(TREE, device, side))
        other = batch_of(OTHER_TREE, device, side)
        got = states(model, other)
    assert len(graphs_of(model)) == 1
    assert model.radix_stats.no_graphs is None
    assert_close(got, plain(model, other))


def test_the_second_batch_of_a_size_is_captured(device):
    model = enabled(device)
    counts = []
    for sequences in (TREE, OTHER_TREE, TREE, OTHER_TREE):
        states(model, batch_of(sequences, device))
        counts.append((len(graphs_of(model)), model.radix_stats.folded))
    assert counts == [(0, 1), (1, 2), (1, 3), (1, 4)]


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def replaced_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def replaced_parameters(model):
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.1))


def moved(model):
    device = model.device
    model.to("cpu", torch.float32)
    in_place(model)
    model.to(device, torch.bfloat16)


def rotary(model):
    return stack_of(model).rotary_emb


def replaced_frequencies(model):
    rotary(model).inv_freq = rotary(model).inv_freq * 3


def mlp(model):
    return stack_of(model).layers[1].mlp


def resized(model):
    weight = model.resize_token_embeddings(80).weight
    weight.data = weight.data.roll(1, 0)


CHANGES = {
    "in place": in_place,
    "data": replaced_data,
    "parameters": replaced_parameters,
    "moved": moved,
    "cast": lambda m: m.to(torch.float16),
    "loaded": lambda m: m.load_state_dict({n: p * 1.1 for n, p in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({n: p * 1.1 for n, p in m.state_dict().items()}, assign=True),
    "buffer in place": lambda m: rotary(m).inv_freq.mul_(3),
    "buffer": replaced_frequencies,
    "setting of a module": lambda m: setattr(stack_of(m).layers[0].self_attn, "scaling", 3.0),
    "function of a module": lambda m: setattr(mlp(m), "act_fn", nn.ReLU()),
    "layer": lambda m: setattr(stack_of(m).layers[1], "mlp", copy.deepcopy(stack_of(m).layers[0].mlp)),
    "embedding": resized,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_seen_by_the_next_call(device, change):
    model, given = enabled(device), batch_of(TREE, device)
    before = replayed(model, given).clone()
    CHANGES[change](model)
    got = [states(model, given) for _ in range(4)]
    want = plain(model, given)
    assert before.dtype != want.dtype or (want.float() - before.float()).norm() > 0.06 * before.float().norm()
    for result in got:
        assert_close(result, want)


def hooked(model):
    return mlp(model).register_forward_hook(lambda module, given, out: 2 * out)


def hooked_before(model):
    return mlp(model).register_forward_pre_hook(lambda module, given: (2 * given[0],))


def hooked_everywhere(model):
    def hook(module, given, out):
        return 2 * out if module is mlp(model) else None

    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("hook", [hooked, hooked_before, hooked_everywhere], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:radix_ops")
def test_hooks_that_are_added_later_run(device, hook):
    model, given = enabled(device), batch_of(TREE, device)
    before = replayed(model, given).clone()
    handle = hook(model)
    got, want = states(model, given), plain(model, given)
    handle.remove()
    assert_close(got, want)
    assert (want.float() - before.float()).norm() > 0.06 * before.float().norm()
    assert_close(replayed(model, given), before)


@pytest.mark.filterwarnings("ignore:radix_ops")
def test_a_forward_that_is_replaced_later_runs(device):
    model, given = enabled(device), batch_of(TREE, device)
    replayed(model, given)
    module = mlp(model)
    module.forward = lambda x: 2 * type(module).forward(module, x)
    got = states(model, given)
    hf.disable(model)
    assert_close(got, states(model, given))


def test_the_forward_of_a_class_that_is_replaced_later_runs(device, monkeypatch):
    model, given = enabled(device), batch_of(TREE, device)
    before = replayed(model, given).clone()
    kind = type(mlp(model))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    want = plain(model, given)
    assert (want.float() - before.float()).norm() > 0.06 * before.float().norm()
    for _ in range(3):
        assert_close(states(model, given), want)


def lora(device):
    peft = pytest.importorskip("peft")
    model = build("llama").to(device, torch.bfloat16)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM", r=8)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config).eval()
    return hf.enable(model, threshold=1.0, layout="trie", verify="never")


def layers_of_lora(model):
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]


def scaled(model):
    for module in layers_of_lora(model):
        module.scaling["default"] = 5.0


def second_adapter(model):
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")


LORA_CHANGES = {
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
    "scaled": scaled,
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "second": second_adapter,
    "in place": lambda m: [layer.lora_B["default"].weight.data.mul_(3) for layer in layers_of_lora(m)],
}


@pytest.mark.parametrize("change", LORA_CHANGES)
def test_changes_of_adapters_are_seen_by_the_next_call(device, change):
    model, given = lora(device), batch_of(TREE, device)

    def run():
        with torch.no_grad():
            return model(**given, use_cache=False).logits[given["attention_mask"].bool()]

    results = [run() for _ in range(4)]
    assert model.radix_stats.replayed >= 2
    LORA_CHANGES[change](model)
    got = [run() for _ in range(4)]
    hf.disable(model)
    want = run()
    for result in got:
        assert_close(result, want)
    is_another = (want.float() - results[-1].float()).norm() > 0.06 * want.float().norm()
    assert is_another == (change not in ("merged", "unmerged"))


def test_adapters_that_take_turns_are_right_and_not_captured_again_and_again(device):
    model, given = lora(device), batch_of(TREE, device)
    plain_model = copy.deepcopy(model)
    hf.disable(plain_model)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        for step in range(24):
            logits = []
            for each in (model, plain_model):
                (each.base_model.disable_adapter_layers, each.base_model.enable_adapter_layers)[step % 2]()
                logits.append(each(**given, use_cache=False).logits[real])
            assert_close(*logits)
    assert model.radix_stats.replayed == 0


def test_a_switch_to_train_is_seen(device):
    model, given = enabled(device), batch_of(TREE, device)
    want = replayed(model, given).clone()
    before = model.radix_stats.replayed
    model.train()
    assert_close(states(model, given), want)
    assert model.radix_stats.replayed == before
    model.eval()
    assert torch.equal(replayed(model, given), want)


def test_bits_are_the_same_with_and_without_gradients_and_graphs(device):
    model, given = enabled(device), batch_of(TREE, device)
    with torch.no_grad():
        results = [model(**given, use_cache=False).logits for _ in range(4)]
    assert model.radix_stats.replayed >= 2
    results.append(model(**given, use_cache=False).logits)
    assert results[-1].requires_grad
    with torch.inference_mode():
        results.append(model(**given, use_cache=False).logits)
    hf.enable(model, threshold=1.0, layout="trie", verify="never", cuda_graphs=False)
    with torch.no_grad():
        results.append(model(**given, use_cache=False).logits)
    real = given["attention_mask"].bool()
    assert all(torch.equal(result[real], results[0][real]) for result in results)


def test_gradients_are_the_plain_models(device):
    model, given = enabled(device), batch_of(TREE, device)
    replayed(model, given)
    real = given["attention_mask"].bool()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**given, use_cache=False).logits[real].float().square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        if "radix_stats" in vars(model):
            hf.disable(model)
    for name, want in found[1].items():
        assert (found[0][name] - want).norm() <= 0.1 * want.norm(), name


def test_without_graphs_there_are_none(device):
    model, given = enabled(device, cuda_graphs=False), batch_of(TREE, device)
    for _ in range(4):
        states(model, given)
    assert (model.radix_stats.folded, model.radix_stats.replayed, len(graphs_of(model))) == (4, 0, 0)
    with pytest.raises(TypeError, match="cuda_graphs must be a bool, got int"):
        hf.enable(model, cuda_graphs=1)


def test_disable_gives_graphs_up(device):
    model, given = enabled(device), batch_of(TREE, device)
    replayed(model, given)
    kept = graphs_of(model)
    assert len(kept) == 1
    hf.disable(model)
    assert len(kept) == 0
    hf.enable(model, threshold=1.0, layout="trie", verify="never")
    replayed(model, given)
    hf.enable(model, threshold=1.0, layout="trie", verify="never")
    assert len(graphs_of(model)) == 0


def test_copies_and_pickles_have_graphs_of_their_own(device):
    model, given = enabled(device), batch_of(TREE, device)
    want = replayed(model, given).clone()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for other in copies:
        assert len(graphs_of(other)) == 0
        assert torch.equal(replayed(other, given), want)
        in_place(other)
        changed = states(other, given)
        assert_close(changed, plain(other, given))
        assert not torch.equal(changed, want)
    assert len(graphs_of(model)) == 1
    assert torch.equal(states(model, given), want)


def test_what_else_a_call_asks_for(device):
    model, given = enabled(device), batch_of(TREE, device)
    real = given["attention_mask"].bool()
    labels = given["input_ids"].masked_fill(~real, -100)
    replayed(model, given)
    with torch.no_grad():
        got = [
            model(**given, use_cache=False, return_dict=False)[0][real],
            torch.stack(model(**given, use_cache=False, output_hidden_states=True).hidden_states)[:, real],
            model(**given, labels=labels, use_cache=False).loss,
            model(**given).past_key_values.layers[1].keys,
        ]
        replays = model.radix_stats.replayed
        hf.disable(model)
        want = [
            model(**given, use_cache=False, return_dict=False)[0][real],
            torch.stack(model(**given, use_cache=False, output_hidden_states=True).hidden_states)[:, real],
            model(**given, labels=labels, use_cache=False).loss,
            model(**given).past_key_values.layers[1].keys,
        ]
    assert replays >= 2
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_heads_that_pool_read_replayed_states(device):
    model = enabled(device, "qwen3", "ForSequenceClassification")
    given = batch_of(TREE, device)
    given["input_ids"] *= given["attention_mask"]
    with torch.no_grad(), no_warnings():
        results = [model(**given, use_cache=False).logits for _ in range(4)]
        assert model.radix_stats.replayed >= 2
        hf.disable(model)
        assert_close(results[-1], model(**given, use_cache=False).logits)


class ConstantGraph(frozen_graphs.FrozenGraph):
    """A graph of a forward that read its batch on the host."""

    def replay_as_filled(self):
        if not hasattr(self, "result"):
            self.result = super().replay_as_filled()
        return self.result


@pytest.mark.filterwarnings("error")
def test_a_graph_that_does_not_follow_its_batch_is_never_used(monkeypatch):
    frozen_graphs.install(monkeypatch)
    monkeypatch.setattr(forwards, "Captured", ConstantGraph)
    model, given = enabled("cpu"), batch_of(TREE, "cpu")
    first = states(model, given)
    with pytest.warns(UserWarning, match="without CUDA graphs, since its results differ from those of the model's own"):
        assert torch.equal(states(model, given), first)
    for sequences in (TREE, OTHER_TREE, TREE):
        given = batch_of(sequences, "cpu")
        assert_close(states(model, given), plain_of_copy(model, given))
    assert "its results differ" in model.radix_stats.no_graphs
    assert frozen_graphs.FrozenGraph.made == 1
    hf.enable(model, threshold=1.0, layout="trie", verify="never")
    states(model, given)
    assert model.radix_stats.no_graphs is None


def plain_of_copy(model, given):
    return states(hf.disable(other := copy.deepcopy(model)) or other, given)


def test_what_can_not_be_captured_runs_eagerly_ever_after(monkeypatch):
    class Failing:
        made = 0

        def __init__(self, *arguments):
            Failing.made += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    frozen_graphs.install(monkeypatch)
    monkeypatch.setattr(forwards, "Captured", Failing)
    model, given = enabled("cpu"), batch_of(TREE, "cpu")
    with no_warnings():
        results = [states(model, given) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert_close(results[0], plain_of_copy(model, given))
    assert (Failing.made, model.radix_stats.folded, model.radix_stats.replayed) == (1, 5, 0)
    assert "operation not permitted" in model.radix_stats.no_graphs


def test_a_forward_that_changes_its_model_has_no_graphs(device, monkeypatch):
    model, given = enabled(device), batch_of(TREE, device)
    want = states(model, given)
    module = stack_of(model).norm
    forward = type(module).forward

    def counting(self, x):
        self.count = vars(self).get("count", 0) + 1
        return forward(self, x)

    monkeypatch.setattr(type(module), "forward", counting)
    hf.enable(model, threshold=1.0, layout="trie", verify="never")

    def run():
        for norm in (m for m in model.modules() if type(m) is type(module)):
            norm.count = 0
        assert torch.equal(states(model, given), want)
        assert module.count > 0

    run()
    with pytest.warns(UserWarning, match="without CUDA graphs, since the forward changes the model"):
        run()
    run()
    assert model.radix_stats.replayed == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_buffer("another", torch.zeros(1, device="meta")),
        lambda m: setattr(m, "extra", object()),
        lambda m: setattr(m, "extra", {"inside": torch.zeros(1)}),
        lambda m: m.compile(),
    ],
    ids=["buffer elsewhere", "object", "tensor in a dict", "compiled"],
)
def test_parts_whose_changes_would_not_be_seen_have_no_graphs(device, change):
    model, given = enabled(device), batch_of(TREE, device)
    change(mlp(model))
    for _ in range(4):
        states(model, given)
    assert (model.radix_stats.folded, model.radix_stats.replayed) == (4, 0)


def test_threads_get_their_own_results(device):
    model = enabled(device)
    batches = [batch_of(sequences, device) for sequences in (TREE, OTHER_TREE)]
    wants = [replayed(model, batch).clone() for batch in batches]
    wrong = []

    def run(index):
        for _ in range(10):
            if not torch.equal(states(model, batches[index]), wants[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def small_batches_do_not_pay(monkeypatch):
    monkeypatch.setattr(payoff, "_LEAST_SAVED", {"cpu": (1, 1e9), "cuda": (1, 1e9)})


@pytest.mark.usefixtures("small_batches_do_not_pay")
@pytest.mark.parametrize("sequences", [TREE, [[i, i + 1, i + 2] for i in range(1, 30, 3)]], ids=["shared", "nothing"])
def test_a_shape_that_comes_again_pays_as_a_graph(device, sequences):
    """The first batch of a shape runs as before, and so does the first of its sizes in rows."""
    model, given = enabled(device, threshold=None), batch_of(sequences, device)
    real = given["attention_mask"].bool()
    want = plain_of_copy(model, given)
    counts = []
    with torch.inference_mode():
        for _ in range(5):
            assert_close(stack_of(model)(**given, use_cache=False).last_hidden_state[real], want)
            counts.append((model.radix_stats.folded, model.radix_stats.replayed))
        assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3)]
        model(**batch_of([s[:-1] for s in sequences if len(s) > 1], device), use_cache=False)
    assert model.radix_stats.folded == 3


@pytest.mark.usefixtures("small_batches_do_not_pay")
def test_what_folds_does_not_depend_on_gradients(device):
    """A reference model, under no_grad, computes as the policy that is trained."""
    model, given = enabled(device, threshold=None), batch_of(TREE, device)
    with torch.inference_mode():
        for _ in range(4):
            model(**given, use_cache=False)
    assert model.radix_stats.folded == 2
    with torch.no_grad():
        without = model(**given, use_cache=False).logits
    assert torch.equal(model(**given, use_cache=False).logits, without)
    assert model.radix_stats.folded == 2


@pytest.mark.usefixtures("small_batches_do_not_pay")
@pytest.mark.parametrize("obstacle", ["no_grad", "hook", "train", "float32", "off"])
def test_small_batches_run_as_before_where_no_graph_may_run(device, obstacle):
    model, given = enabled(device, threshold=None), batch_of(TREE, device)
    if obstacle == "hook":
        hooked(model)
    if obstacle == "float32":
        model.float()
    if obstacle == "off":
        hf.enable(model, cuda_graphs=False)
    model.train(obstacle == "train")
    with torch.no_grad() if obstacle == "no_grad" else torch.inference_mode(), no_warnings():
        for _ in range(5):
            model(**given, use_cache=False)
    assert model.radix_stats.folded == 0


def test_models_with_caps_of_scores_are_not_tried(device):
    config = transformers.Gemma2Config(**SIZES | {"head_dim": 16}, sliding_window=4, attn_implementation="eager")
    torch.manual_seed(1)
    model = transformers.Gemma2ForCausalLM(config).eval().to(device, torch.bfloat16)
    hf.enable(model, threshold=1.0, verify="never")
    given = batch_of(TREE, device)
    for _ in range(3):
        got = states(model, given)
    assert_close(got, plain_of_copy(model, given))
    assert (model.radix_stats.replayed, model.radix_stats.no_graphs) == (0, None)
