"""The hash of a run's model, which decides whether an interrupted run may be continued."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.language_models import tiny_model
from radix_ops.data import fingerprint as module
from radix_ops.data.fingerprint import fingerprint
from radix_ops.engine.runners import TransformersRunner


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 7, generator=generator))
        self.second = nn.Parameter(torch.randn(5, 7, generator=generator).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(0.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("saved", torch.arange(9))
        self.register_buffer("unsaved", torch.tensor([True, False]), persistent=False)
        self.register_buffer("absent", None)


class Config(SimpleNamespace):
    def to_dict(self):
        return vars(self)


def found(model=None, config=None, *further):
    runner = SimpleNamespace(model=model or Small(), hf_config=Config(**(config or {"size": 7})))
    return fingerprint(runner, *further).hexdigest()


def changed(change):
    model = Small()
    with torch.no_grad():
        change(model)
    return found(model)


@pytest.mark.parametrize("chunk", [1, 20, 2**25])
def test_every_byte_of_every_parameter_and_buffer_counts(monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
    model = Small()
    seen = [found(model)]
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        raw = tensor.data.reshape(-1).view(torch.uint8)
        for place in range(len(raw)):
            raw[place] ^= 1
            seen.append(found(model))
            raw[place] ^= 1
    assert len(seen) == 1 + sum(tensor.nbytes for tensor in tensors) == len(set(seen))
    assert found(model) == seen[0]


def test_order_signs_shapes_dtypes_and_names_count():
    def swap(model):
        model.first.data, model.second.data = model.second.data, model.first.data

    changes = [
        lambda model: None,
        lambda model: model.first.copy_(model.first.flip(1)),
        lambda model: model.first.copy_(model.first.flip(0)),
        lambda model: model.scalar.neg_(),
        lambda model: setattr(model, "first", nn.Parameter(model.first.view(7, 5))),
        lambda model: setattr(model, "first", nn.Parameter(model.first.view(torch.int32), requires_grad=False)),
        lambda model: setattr(model, "empty", nn.Parameter(torch.zeros(3, 0))),
        lambda model: setattr(model, "absent", torch.zeros(0)),
        swap,
    ]
    assert len({changed(change) for change in changes}) == len(changes)


def test_the_config_the_class_and_what_else_decides_count():
    class Other(Small):
        pass

    options = [(), (Other(),), (None, {"size": 8}), (None, None, "plain"), (None, None, "folded")]
    assert len({found(*given) for given in options}) == len(options)
    assert found(None, {"size": 7, "_name_or_path": "elsewhere", "transformers_version": "9"}) == found()


def test_strides_and_threads_do_not_count():
    def transpose(model):
        model.first.data = model.first.t().contiguous().t()

    assert changed(transpose) == found()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = found()
    finally:
        torch.set_num_threads(threads)
    assert alone == found()


def test_a_buffer_that_routes_tokens_counts():
    """deepseek_v3's correction of its experts' scores is no parameter, and moves logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    ids = torch.arange(20)[None]

    def state():
        with torch.no_grad():
            return found(model, config.to_dict()), model(ids).logits

    before, logits = state()
    bias = next(x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias"))
    bias.copy_(torch.tensor([3.0, -3.0, 2.0, 0.0]))
    after, moved = state()
    assert not torch.equal(logits, moved)
    assert before != after


def test_a_weight_that_is_made_of_tensors_counts():
    class Scaled(torch.Tensor):
        @staticmethod
        def __new__(cls, values, scale):
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

        def __init__(self, values, scale):
            self.values, self.scale = values, scale

        def __tensor_flatten__(self):
            return ["values", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            assert function is torch.ops.aten.detach.default
            return args[0]

    def of(values, scale):
        model = nn.Module()
        model.weight = nn.Parameter(Scaled(torch.tensor(values, dtype=torch.int8), torch.tensor(scale)))
        return found(model)

    assert len({of([1, 2], 0.5), of([2, 1], 0.5), of([1, 2], 0.25)}) == 3
    assert of([1, 2], 0.5) == of([1, 2], 0.5)


def test_fingerprints_see_every_weight():
    model = tiny_model()
    runner = TransformersRunner(model)
    found = {fingerprint(runner).hexdigest()}
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    for _ in range(30):
        parameter = parameters[int(torch.randint(len(parameters), (1,), generator=generator))].data.flatten()
        parameter[int(torch.randint(len(parameter), (1,), generator=generator))] += 0.5
        found.add(fingerprint(runner).hexdigest())
    embedding = model.get_input_embeddings().weight.data
    embedding[[3, 4]] = embedding[[4, 3]]
    found.add(fingerprint(runner).hexdigest())
    assert len(found) == 32
