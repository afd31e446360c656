"""radix_ops.hf on models that others change or wrap: PEFT, torch.compile, accelerate's hooks, DDP."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.hf_models import TREE, Witness, build, error, no_warnings, pad
from radix_ops import hf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
IDS, MASK = pad(TREE, "right")
REAL = MASK.bool()
ORDERS = pytest.mark.parametrize("enabled_first", [True, False])


def wrap(model, wrapper, enabled_first: bool):
    """Return `wrapper(model)`, enabled before or after."""
    if enabled_first:
        hf.enable(model, threshold=1.0)
    wrapped = wrapper(model)
    return wrapped if enabled_first else hf.enable(wrapped, threshold=1.0)


def stats_of(wrapped) -> hf.RadixStats:
    return next(module.radix_stats for module in wrapped.modules() if "radix_stats" in vars(module))


def adapt(model, **options):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def gradients(model, weight):
    (model(input_ids=IDS, attention_mask=MASK).logits[REAL] * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@ORDERS
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_peft(task, enabled_first):
    weight = torch.randn(int(MASK.sum()), 60)
    plain = adapt(build(), task_type=task)
    model = wrap(build(), lambda model: adapt(model, task_type=task), enabled_first)
    want, got = gradients(plain, weight), gradients(model, weight)
    assert stats_of(model).folded == 1
    assert stats_of(model).rows < stats_of(model).tokens
    assert got.keys() == want.keys()
    assert all("lora" in name for name in got)
    for name in got:
        assert error(got[name], want[name].double()) < 1e-5
    hf.disable(model)
    torch.testing.assert_close(model(IDS, MASK).logits, plain(IDS, MASK).logits, rtol=0, atol=0)
    assert not any("radix_stats" in vars(module) for module in model.modules())


@ORDERS
def test_peft_with_dropout_runs_unfolded_in_training_alone(enabled_first):
    model = wrap(build(), lambda model: adapt(model, lora_dropout=0.5), enabled_first).train()
    with pytest.warns(UserWarning, match=r"lora_dropout.default drops out"):
        model(input_ids=IDS, attention_mask=MASK)
    model.eval()(input_ids=IDS, attention_mask=MASK)
    assert (stats_of(model).skipped, stats_of(model).folded) == (1, 1)


@ORDERS
def test_peft_prompts_run_unfolded(enabled_first):
    """Prompts are embeddings, or a cache, before the tokens."""

    def wrapper(model):
        torch.manual_seed(4)
        return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    plain, model = wrapper(build()), wrap(build(), wrapper, enabled_first)
    with pytest.warns(UserWarning, match="inputs_embeds was given"):
        got = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(got, plain(input_ids=IDS, attention_mask=MASK).logits, rtol=0, atol=0)


def test_peft_on_opt_whose_decoder_stack_is_deeper():
    sizes = {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0)
    torch.manual_seed(3)
    base = transformers.OPTForCausalLM(config).eval()
    model = adapt(base, task_type="CAUSAL_LM")
    want = model(input_ids=IDS, attention_mask=MASK).logits
    with hf.folded(model, threshold=1.0):
        got = model(input_ids=IDS, attention_mask=MASK).logits
        assert model.radix_stats.folded == 1
        assert "forward" in vars(base.model.decoder)
    torch.testing.assert_close(got[REAL], want[REAL])


@ORDERS
@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_compiled_model(in_place, enabled_first):
    def wrapper(model):
        if in_place:
            model.compile(backend="eager")
            return model
        return torch.compile(model, backend="eager")

    plain = build()
    model = wrapper(build())
    if not enabled_first:
        model(IDS, MASK)  # it compiles the plain forward
        hf.enable(model, threshold=1.0)
    else:
        model = wrapper(hf.enable(build(), threshold=1.0))
    holes = MASK.clone()
    holes[:, 1] = 0
    for _ in range(2):
        torch.testing.assert_close(model(IDS, MASK).logits[REAL], plain(IDS, MASK).logits[REAL])
    with pytest.warns(UserWarning, match="holes"):
        torch.testing.assert_close(model(IDS, holes).logits, plain(IDS, holes).logits)
    assert (stats_of(model).folded, stats_of(model).skipped) == (2, 1)
    hf.disable(model)
    torch.testing.assert_close(model(IDS, MASK).logits, plain(IDS, MASK).logits)


@torch.no_grad()
def test_accelerate_hooks_are_refused_by_name():
    plain, model = build(), build()
    with no_warnings():
        hf.enable(accelerate.dispatch_model(build(), {"": "cpu"}))  # one device needs no hooks
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="a forward that was replaced, as accelerate's device hooks do"):
        hf.enable(model)
    model = hf.enable(build(), threshold=1.0)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.warns(UserWarning, match="a forward that was replaced, as accelerate's device hooks do"):
        got = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(got, plain(IDS, MASK).logits, rtol=0, atol=0)


@torch.no_grad()
def test_device_map_of_one_device(tmp_path):
    build().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    hf.enable(model, threshold=1.0)(IDS, MASK)
    assert model.radix_stats.folded == 1


def test_data_parallel_is_refused_by_name():
    with pytest.raises(ValueError, match="DataParallel can't be folded: it calls copies of the model"):
        hf.enable(torch.nn.DataParallel(build()))


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@torch.no_grad()
def test_cache_of_a_sharded_model_is_an_error():
    model = build()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    hf.enable(fully_shard(model, mesh=mesh), threshold=1.0)
    cache = model(IDS, MASK, return_dict=False)[1]
    assert model.radix_stats.folded == 1
    with pytest.raises(RuntimeError, match="its model is sharded, and gathers its weights only in a call; pass use_c"):
        len(cache)


@ORDERS
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(enabled_first):
    weight = torch.randn(int(MASK.sum()), 60)
    plain = build()
    with Witness() as witness:
        model = wrap(build(), DistributedDataParallel, enabled_first)
        got = gradients(model, weight)
    assert stats_of(model).folded == 1
    assert witness.attention_calls == 2
    want = gradients(plain, weight)
    for name, gradient in want.items():
        assert error(got["module." + name], gradient.double()) < 1e-5
    hf.disable(model)
    assert not any("radix_stats" in vars(module) for module in model.modules())
