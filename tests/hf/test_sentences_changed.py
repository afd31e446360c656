"""An enabled SentenceTransformer that users route, copy, adapt, put into pools and train."""

from __future__ import annotations

import ast
import copy
import pickle
import queue
import threading
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import sentence_transformers
import torch
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer

from helpers import sentence_models
from helpers.hf_models import error, no_warnings
from helpers.sentence_models import (
    SIZE,
    VERSION,
    Dense,
    Normalize,
    Pooling,
    Router,
    Transformer,
    enable,
    encoder,
    losses,
    save,
    texts,
)  # fmt: skip
from radix_ops import hf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TEXTS = texts()
ANCHORS, POSITIVES = texts(12, seed=4), texts(12, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(folder):
    return encoder(folder)


def attributes(model):
    return {name: {**vars(module)} for name, module in model.named_modules()}


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=1e-5)


def assert_folds_as(model, plain, **options):
    before = model.radix_stats.folded
    assert_close(model.encode(TEXTS, **options), plain.encode(TEXTS, **options))
    assert model.radix_stats.folded > before


def test_disable_leaves_nothing_behind(plain):
    before = attributes(plain.eval())
    hf.enable(plain)
    assert hf.enable(plain) is plain
    plain.encode(TEXTS)
    hf.disable(plain)
    after = attributes(plain)
    assert after.keys() == before.keys()
    for name in before:
        assert {key: id(value) for key, value in after[name].items()} == {k: id(v) for k, v in before[name].items()}


@pytest.mark.parametrize("enabled", ["not", "inside", "whole"])
def test_folded_restores_what_was(plain, enabled):
    if enabled != "not":
        hf.enable(plain if enabled == "whole" else plain[0].auto_model, threshold=0.5)
    before = attributes(plain).keys(), [sorted(vars(module)) for module in plain.modules()]
    want = copy.deepcopy(plain)
    with hf.folded(plain, threshold=1.0) as model:
        assert model is plain
        assert_folds_as(model, want)
    assert (attributes(plain).keys(), [sorted(vars(module)) for module in plain.modules()]) == before


def test_the_transformer_alone_may_be_disabled(plain):
    model = enable(copy.deepcopy(plain))
    hf.disable(model[0].auto_model)
    np.testing.assert_array_equal(model.encode(TEXTS), plain.encode(TEXTS))
    hf.disable(model)
    assert "radix_stats" not in vars(model)
    assert_folds_as(enable(model), plain)


def test_a_replaced_forward_is_named(plain):
    model = enable(copy.deepcopy(plain))
    stack = model[0].auto_model
    ours, stack.forward = stack.forward, types.MethodType(type(stack).forward, stack)
    np.testing.assert_array_equal(model.encode(TEXTS), plain.encode(TEXTS))
    with pytest.raises(RuntimeError, match="was replaced after enable"):
        hf.disable(model)
    stack.forward = ours
    hf.disable(model)
    assert "radix_stats" not in vars(model)


def test_dense_and_normalize_behind_the_pooling(folder):
    plain = encoder(folder, "mean", Dense(SIZE, 12), Normalize())
    assert_folds_as(enable(copy.deepcopy(plain)), plain)


def test_modules_that_are_added_later_count(plain):
    model = enable(copy.deepcopy(plain))
    for changed in (plain, model):
        changed.append(Normalize())
    assert_folds_as(model, plain)


@pytest.mark.parametrize("shared", [True, False])
def test_router(tmp_path, folder, shared):
    modules = [Transformer(folder)]
    modules.append(modules[0] if shared else Transformer(save(tmp_path, "Llama", hidden_size=SIZE)))
    routes = [[module, Pooling(SIZE, mode)] for module, mode in zip(modules, ("lasttoken", "mean"), strict=True)]
    plain = SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu")
    model = enable(copy.deepcopy(plain))
    for name in ("encode_query", "encode_document"):
        folded = model.radix_stats.folded
        assert_close(getattr(model, name)(TEXTS), getattr(plain, name)(TEXTS))
        assert model.radix_stats.folded > folded
    hf.disable(model)
    assert not any("radix_stats" in vars(module) for module in model.modules())


def test_the_library_is_not_imported():
    folder = Path(hf.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "sentence_transformers" not in ast.unparse(node)


BERT = {"num_hidden_layers": 1, "hidden_size": SIZE, "num_attention_heads": 4}


@pytest.mark.parametrize("with_causal", [True, False])
def test_models_that_are_not_causal_are_refused_and_nothing_is_changed(tmp_path, folder, with_causal):
    bert = encoder(save(tmp_path, "Bert", **BERT), "mean")
    if with_causal:
        bert = SentenceTransformer(modules=[Router.for_query_document([*encoder(folder)], [*bert])], device="cpu")
    before = [sorted(vars(module)) for module in bert.modules()]
    with pytest.raises(ValueError, match="BertModel is of model type 'bert', which folding is not known to be right"):
        hf.enable(bert)
    assert [sorted(vars(module)) for module in bert.modules()] == before


def static_embedding():
    return sentence_models.StaticEmbedding(sentence_models.tokenizer()._tokenizer, embedding_dim=SIZE)


def test_a_route_without_a_transformer(folder):
    routes = [static_embedding()], [Transformer(folder), Pooling(SIZE, "lasttoken")]
    plain = SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu")
    model = enable(copy.deepcopy(plain))
    np.testing.assert_array_equal(model.encode_query(TEXTS), plain.encode_query(TEXTS))
    assert model.radix_stats.tokens == 0
    assert_close(model.encode_document(TEXTS), plain.encode_document(TEXTS))
    assert model.radix_stats.folded > 0


def test_sparse_encoders_fold_batch_by_batch(folder):
    modules = [Transformer(folder), Pooling(SIZE, "mean"), sentence_models.SparseAutoEncoder(SIZE, 64, k=8)]
    plain = sentence_transformers.SparseEncoder(modules=modules, device="cpu")
    model = enable(copy.deepcopy(plain))
    got, want = (m.encode(TEXTS, batch_size=8, convert_to_tensor=True).to_dense() for m in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert model.radix_stats.folded == 5


def test_others_of_the_library_s_models_are_refused(folder):
    static = SentenceTransformer(modules=[static_embedding()], device="cpu")
    with pytest.raises(TypeError, match="got SentenceTransformer, which holds none"):
        hf.enable(static)
    hf.disable(static)
    if hasattr(sentence_transformers, "MultiVectorEncoder"):
        with pytest.raises(ValueError, match="MultiVectorEncoder can't be folded"):
            hf.enable(sentence_transformers.MultiVectorEncoder(folder, device="cpu"))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_enabled_on_their_own(plain, copying):
    original = enable(copy.deepcopy(plain))
    model = copying(original)
    for changed in (plain, model):
        changed[0].auto_model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert_folds_as(model, plain)
    assert original.radix_stats.tokens == 0
    hf.disable(original)
    assert_folds_as(model, plain)


def test_dtype_and_saving(plain, tmp_path):
    model = enable(copy.deepcopy(plain))
    model.save_pretrained(str(tmp_path))
    assert_close(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), plain.encode(TEXTS))
    assert_folds_as(model.double(), plain.double())
    got, want = (m.bfloat16().encode(TEXTS) for m in (model, plain))
    assert error(torch.from_numpy(got), torch.from_numpy(want).double()) < 0.03


@pytest.mark.parametrize("enabled_first", [True, False])
def test_adapters(plain, enabled_first):
    model = copy.deepcopy(plain)
    model = enable(model) if enabled_first else model
    for changed in (plain, model):
        torch.manual_seed(4)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(adapter, changed[0].auto_model)  # as add_adapter does
    assert_folds_as(model if enabled_first else enable(model), plain)


@pytest.mark.filterwarnings("ignore:radix_ops. a batch runs unfolded because inputs_embeds")
def test_prompt_tuning_runs_as_it_came(plain):
    model = copy.deepcopy(plain)
    for changed in (plain, model):
        torch.manual_seed(4)
        tuning = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        name = "model" if hasattr(changed[0], "model") else "auto_model"
        setattr(changed[0], name, peft.get_peft_model(changed[0].auto_model, tuning))
    enable(model)
    assert_close(model.encode(TEXTS), plain.encode(TEXTS))
    assert model.radix_stats.folded == 0


@pytest.mark.parametrize("enabled_first", [True, False])
def test_compiled_models(plain, enabled_first):
    model = copy.deepcopy(plain)
    model = enable(model) if enabled_first else model
    model.compile(backend="eager")
    assert_folds_as(model if enabled_first else enable(model), plain)


def encode_by_pool(model, workers, **options):
    """Encode the texts with a pool of threads in place of processes, one for each of the workers."""
    pool = {"input": queue.Queue(), "output": queue.Queue(), "processes": []}
    name = "_multi_process_worker" if hasattr(model, "_multi_process_worker") else "_encode_multi_process_worker"
    for worker in workers:
        arguments = "cpu", worker, pool["input"], pool["output"]
        pool["processes"].append(threading.Thread(target=getattr(model, name), args=arguments, daemon=True))
        pool["processes"][-1].start()
    return model.encode(TEXTS, pool=pool, chunk_size=10, **options)


@pytest.mark.filterwarnings("ignore:Computing int8")
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_pools_get_neighbours_that_share(plain, precision):
    model = enable(copy.deepcopy(plain))
    workers = [copy.deepcopy(model) for _ in range(2)]
    got = encode_by_pool(model, workers, precision=precision)
    want = encode_by_pool(plain, [copy.deepcopy(plain)], precision=precision)
    np.testing.assert_allclose(got, want, rtol=0, atol=1 if precision == "int8" else 1e-5)
    assert sum(worker.radix_stats.rows for worker in workers) < 0.7 * sum(w.radix_stats.tokens for w in workers)
    assert model.radix_stats.tokens == 0


def loss_gradients(model, loss_class, **options):
    tokenize = model.preprocess if hasattr(model, "preprocess") else model.tokenize
    loss = loss_class(model.train(), **options)([tokenize(ANCHORS), tokenize(POSITIVES)], None)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("loss_class", "options"),
    [(losses.MultipleNegativesRankingLoss, {}), (losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 6})],
)
def test_gradients_of_losses(folder, loss_class, options, side):
    plain = encoder(folder, "mean" if side == "left" else "lasttoken")
    plain.tokenizer.padding_side = side
    model = enable(copy.deepcopy(plain))
    with no_warnings():
        loss, gradients = loss_gradients(model, loss_class, **options)
    plain_loss, plain_gradients = loss_gradients(plain, loss_class, **options)
    assert abs(loss - plain_loss) < 1e-5
    for name, gradient in gradients.items():
        assert error(gradient, plain_gradients[name].double()) < 1e-4, name
    assert model.radix_stats.rows < 0.8 * model.radix_stats.tokens


@pytest.mark.skipif(Version("5.2") > VERSION, reason="sentence-transformers trains with transformers 5 from 5.2 on")
@pytest.mark.skipif(
    Version("5.4") > VERSION and not hasattr(transformers.Trainer, "_nested_gather"),
    reason="this sentence-transformers' trainer calls a method that transformers has elsewhere from 5.2 on",
)
def test_trainer(plain, tmp_path):
    datasets = pytest.importorskip("datasets", reason="sentence-transformers trains on datasets")
    data = datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
    models, histories = (enable(copy.deepcopy(plain)), plain), []
    for model in models:
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=6, max_steps=4, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", optim="sgd", learning_rate=0.1, disable_tqdm=True,
        )  # fmt: skip
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
        trainer.train()
        histories.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert len(histories[0]) == 4
    np.testing.assert_allclose(*histories, rtol=1e-4)
    assert models[0].radix_stats.folded >= 8
    assert_close(models[0].encode(TEXTS), models[1].encode(TEXTS))
