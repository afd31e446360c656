"""The loss of transformers' models on rows, in a Trainer and out of it, against the loss that they compute."""

from __future__ import annotations

import itertools

import accelerate
import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from helpers.hf_models import SIZES, TREE, build, error, no_warnings, pad
from radix_ops import hf, trainers

VOCABULARY = SIZES["vocab_size"]
IDS, MASK = pad(TREE, "right")
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[0, :3] = -100  # a prompt that only one of the rows that share it leaves out
PACKED_IDS = torch.tensor([[token for sequence in TREE for token in sequence]])
POSITIONS = torch.tensor([[place for sequence in TREE for place in range(len(sequence))]])
PACKED = {"input_ids": PACKED_IDS, "position_ids": POSITIONS, "use_cache": False}
PADDED = {"input_ids": IDS, "attention_mask": MASK}


class Products(TorchDispatchMode):
    """Counts the most rows that a matrix with the vocabulary for its columns had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == VOCABULARY:
            self.most = max(self.most, result.shape[:-1].numel())
        return result


def outputs_and_gradients(model, arguments):
    model.zero_grad()
    outputs = model(**arguments)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss(model, plain, arguments, expected_logits=None):
    """Loss and gradients are the same; the caller says by `expected_logits` whether the loss comes from rows."""
    want, want_gradients = outputs_and_gradients(plain, arguments)
    with trainers.loss_on_rows():
        got, gradients = outputs_and_gradients(model, arguments)
    assert (got.logits is None) is (expected_logits is None)
    assert got.loss.dtype == want.loss.dtype
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == want_gradients.keys()
    for name in gradients:
        assert error(gradients[name], want_gradients[name].double()) < 1e-5, name


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3"])
def test_loss_and_gradients(name, num_items):
    arguments = PADDED | {"labels": LABELS} | ({} if num_items is None else {"num_items_in_batch": num_items})
    model = hf.enable(build(name), threshold=1.0)
    with no_warnings():
        assert_same_loss(model, build(name), arguments)
    assert model.radix_stats.folded == 1


def test_logits_exist_in_blocks_alone():
    model = hf.enable(build(), threshold=1.0, verify="never")
    plain = Products()
    with plain:
        model(**PADDED, labels=LABELS).loss.backward()
    rows = Products()
    with rows, trainers.loss_on_rows():
        model(**PADDED, labels=LABELS).loss.backward()
    assert plain.most == IDS.numel()
    assert rows.most == 0  # an op makes blocks of them inside


def test_packed_rows():
    labels = PACKED_IDS.masked_fill(POSITIONS == 0, -100)
    model = hf.enable(build("qwen3"), threshold=1.0)
    assert_same_loss(model, build("qwen3"), PACKED | {"labels": labels})
    assert model.radix_stats.folded == 1


@pytest.mark.parametrize(
    "arguments",
    [
        PACKED | {"labels": PACKED_IDS},  # a sequence's first token is a target of the sequence before
        PADDED | {"labels": IDS},  # masked positions behind tokens are targets
    ],
    ids=["packed", "padded"],
)
def test_labels_that_others_than_tokens_have(arguments):
    model = hf.enable(build("qwen3"), threshold=1.0)
    with pytest.warns(UserWarning, match="read a masked position") if "attention_mask" in arguments else no_warnings():
        assert_same_loss(model, build("qwen3"), arguments)


def test_labels_of_masked_positions_right_behind_tokens():
    labels = LABELS.clone()
    labels[1, 5] = 3  # the last token of the second row predicts it
    model = hf.enable(build(), threshold=1.0)
    assert_same_loss(model, build(), PADDED | {"labels": labels})
    assert model.radix_stats.folded == 1


def test_batches_that_are_not_folded():
    assert_same_loss(hf.enable(build(), threshold=0), build(), PADDED | {"labels": LABELS})


def granite():
    torch.manual_seed(1)
    sizes = SIZES | {"logits_scaling": 3.0, "initializer_range": 0.2}
    del sizes["head_dim"]
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes)).eval()


def adapted(model, targets):
    torch.manual_seed(4)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize(
    "make",
    [granite, lambda: adapted(build(), ["q_proj", "lm_head"]), lambda: build(head="ForTokenClassification")],
    ids=["scaled logits", "adapted head", "another head"],
)
def test_models_that_return_logits_all_the_same(make):
    labels = LABELS.clamp(max=2)
    model = hf.enable(make(), threshold=1.0)
    assert_same_loss(model, make(), PADDED | {"labels": labels}, expected_logits=True)
    assert next(m.radix_stats for m in model.modules() if "radix_stats" in vars(m)).folded == 1


def ignored(further):
    return further.get("ignore_index", -100)


@pytest.mark.parametrize("further", [{"shift_labels": LABELS.roll(-1, 1)}, {"logits_to_keep": 8}, {"ignore_index": 5}])
def test_calls_that_return_logits_all_the_same(further):
    labels = LABELS[:, -8:] if "logits_to_keep" in further else LABELS.masked_fill(LABELS < 0, ignored(further))
    arguments = PADDED | further | {"labels": labels}
    model = hf.enable(build(), threshold=1.0)
    assert_same_loss(model, build(), arguments, expected_logits=True)


def test_adapters_inside():
    model = hf.enable(adapted(build(), ["q_proj", "up_proj"]), threshold=1.0)
    assert_same_loss(model, adapted(build(), ["q_proj", "up_proj"]), PADDED | {"labels": LABELS})
    assert model.radix_stats.folded == 1


def test_a_loss_of_their_own():
    model = build()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    arguments = {"input_ids": IDS, "labels": IDS}
    want = model(**arguments).loss
    hf.enable(model, threshold=1.0)
    with trainers.loss_on_rows():
        got = model(**arguments)
    assert got.logits is not None
    torch.testing.assert_close(got.loss, want)


def test_autocast():
    model, plain = hf.enable(build(), threshold=1.0), build()
    with torch.autocast("cpu", torch.bfloat16):
        want = plain(**PADDED, labels=LABELS).loss
        with trainers.loss_on_rows():
            got = model(**PADDED, labels=LABELS).loss
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)


@pytest.fixture
def unset_accelerate():
    """Set its state, which a whole process shares, back to the start."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unset_accelerate")
def test_unwrapped_by_accelerate():
    """unwrap_model takes the forward under autocast for a function, and binds it."""
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(hf.enable(build(), threshold=1.0)), keep_fp32_wrapper=False)
    plain = build()
    torch.testing.assert_close(model(**PADDED).logits[MASK.bool()], plain(**PADDED).logits[MASK.bool()])
    hf.disable(model)
    torch.testing.assert_close(model(**PADDED).logits, plain(**PADDED).logits, rtol=0, atol=0)


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": IDS[index % 3], "attention_mask": MASK[index % 3], "labels": LABELS[index % 3]}


def trainer_of(model, tmp_path, **options):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=1, optim="sgd", learning_rate=0.1, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples(), **options)


def test_trainer_makes_no_logits_but_to_evaluate(tmp_path):
    seen = []
    model = build()
    model.register_forward_hook(lambda module, args, outputs: seen.append(outputs.logits is not None))
    trainer = trainers.enable(trainer_of(model, tmp_path, compute_metrics=lambda p: {"sum": p.predictions.sum()}), 1.0)
    want = trainer_of(build(), tmp_path, compute_metrics=lambda p: {"sum": p.predictions.sum()}).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)
    assert all(seen)
    seen.clear()
    trainer.train()
    assert seen == [False, False]


def test_trainer_with_a_loss_of_its_own(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits[labels >= 0].square().mean()

    want = trainer_of(build(), tmp_path, compute_loss_func=loss).train().training_loss
    trainer = trainers.enable(trainer_of(build(), tmp_path, compute_loss_func=loss), threshold=1.0)
    assert trainer.train().training_loss == pytest.approx(want, rel=1e-5)


class Overridden(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + 0 * outputs.logits.sum()


def test_trainer_that_overrides_compute_loss_gets_its_logits(tmp_path):
    trainer = trainer_of(build(), tmp_path)
    trainer.__class__ = Overridden
    trainers.enable(trainer, threshold=1.0).train()
    assert trainer.model.radix_stats.folded == 2


def test_enabled_once_more(tmp_path):
    trainer = trainers.enable(trainers.enable(trainer_of(build(), tmp_path)), threshold=1.0)
    trainer.train()
    assert trainer.model.radix_stats.folded == 2


def test_what_is_no_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="trainer must be a transformers Trainer, got LlamaForCausalLM"):
        trainers.enable(build())
    with pytest.raises(ValueError, match="model_init"):
        trainers.enable(trainer_of(None, tmp_path, model_init=lambda: build()))
    with pytest.raises(TypeError, match="GRPOTrainer or RLOOTrainer of TRL, got Trainer"):
        trainers.keep_groups_together(trainer_of(build(), tmp_path))
    with pytest.raises(ValueError, match="threshold must be between 0 and 1"):
        trainers.enable(trainer_of(build(), tmp_path), threshold=2.0)


def test_group_sampler():
    groups = ["a", "b", "a", "c", "b", "a", "d"]
    sampler = trainers.GroupSampler(groups, seed=1)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        assert sorted(order) == list(range(len(sampler)))
        names = [groups[i] for i in order]
        assert sum(one != other for one, other in itertools.pairwise(names)) == 3
        orders.append(tuple(order))
    assert len(set(orders)) > 3
    assert list(trainers.GroupSampler([])) == []


@pytest.mark.usefixtures("unset_accelerate")
def test_group_sampler_in_a_loader_of_accelerate():
    """The loader tells its sampler the epoch."""
    sampler = trainers.GroupSampler([i // 4 for i in range(16)], seed=1)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(torch.arange(16), batch_size=4, sampler=sampler))
    epochs = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = [batch.tolist() for batch in loader]
        assert all(len({i // 4 for i in batch}) == 1 for batch in batches)
        epochs.append(str(batches))
    assert len(set(epochs)) > 1
