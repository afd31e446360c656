"""Fields of a folder that sentence-transformers saved are known, or refused by name, before weights are read."""

import json
import os
import shutil

import pytest
from packaging.version import Version

from helpers.commands import failing_command, write_jsonl
from helpers.sentence_folders import FLAT, answering, cross_encoder, encoder
from helpers.sentence_models import VERSION
from radix_ops.engine import _engine

pytestmark = pytest.mark.skipif(Version("6.2") > VERSION, reason="the folders are those of 6.2")

MODEL, MODULE, POOL, NORM, SCORE = (
    "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
    "2_Normalize/config.json", "1_LogitScore/config.json",
)  # fmt: skip
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
COUNT = "it must be a whole number from 1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"embed": encoder, "rerank": cross_encoder, "answer": answering}
    return {name: make(tmp_path_factory.mktemp(name), FLAT)[0] for name, make in made.items()}


@pytest.fixture
def refusal(folders, tmp_path, capsys, monkeypatch):
    """Return a function of (kind of folder, file, what to write there) that gives the command's one sentence."""
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))

    def message_of(kind, file, change):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[kind], folder)
        path = folder / file
        change(path)
        command = "embed" if kind == "embed" else "rerank"
        line = {"text": "w1"} if kind == "embed" else {"query": "w1", "documents": ["w2"]}
        given = write_jsonl(tmp_path / "in.jsonl", [line])
        return failing_command(capsys, command, "--device", "cpu", "--model", folder, given)

    return message_of


def setting(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def module(index, **changes):
    def change(path):
        listed = json.loads(path.read_text())
        listed[index] = {**listed[index], **changes}
        path.write_text(json.dumps(listed))

    return change


def test_fields_that_are_wrong_or_not_known_are_refused_by_name(refusal):
    for kind, file, changes, message in [
        ("embed", MODEL, {"truncate_dim": -3}, f"{MODEL} sets truncate_dim to -3; {COUNT}"),
        ("embed", MODEL, {"truncate_dim": 0}, f"{MODEL} sets truncate_dim to 0; {COUNT}"),
        ("embed", MODEL, {"truncate_dim": 2.0}, f"{MODEL} sets truncate_dim to 2.0; {COUNT}"),
        ("embed", MODEL, {"truncate_dim": True}, f"{MODEL} sets truncate_dim to true; {COUNT}"),
        ("embed", MODEL, {"truncate_dim": 2**70}, f"{MODEL} sets truncate_dim to {2**70}; {COUNT}"),
        ("embed", MODEL, {"prompts": ["a"]}, 'sets prompts to ["a"]; it must be an object of strings'),
        ("embed", MODEL, {"prompts": {"a": 1}}, 'sets prompts to {"a": 1}; it must be an object of strings'),
        ("embed", MODEL, {"default_prompt_name": "x"}, 'default_prompt_name to "x"; it must be one of query, document'),
        ("embed", MODEL, {"default_prompt_name": 3}, "default_prompt_name to 3; it must be one of query, document"),
        ("embed", MODEL, {"prompts": {"a": "\ud800"}, "default_prompt_name": "a"}, "holds half of a surrogate pair"),
        ("embed", MODEL, {"similarity_fn_name": 3}, "sets similarity_fn_name to 3; it must be a string"),
        ("embed", MODEL, {"model_type": "SparseEncoder"}, "is a SparseEncoder; radix-ops embed computes a Sentence"),
        ("embed", MODEL, {"model_type": None}, "is of no model_type; radix-ops embed computes a SentenceTransformer"),
        ("embed", MODEL, {"scale": 2}, f'{MODEL} sets "scale", which radix-ops embed does not know'),
        ("rerank", MODEL, {"model_type": "SentenceTransformer"}, "is a SentenceTransformer; radix-ops rerank computes"),
        ("rerank", MODEL, {"activation_fn": "torch.nn.Tanh"}, "sets activation_fn to 'torch.nn.Tanh'; radix-ops"),
        ("rerank", MODEL, {"activation_fn": "own.Thing"}, "sets activation_fn to 'own.Thing'; radix-ops rerank"),
        ("rerank", MODEL, {"activation_fn": 3}, "sets activation_fn to 3; it must be a string"),
        ("rerank", MODEL, {"keep_in_fp32_modules": ["0"]}, 'sets "keep_in_fp32_modules", which radix-ops rerank'),
        ("embed", MODULE, {"max_seq_length": "12"}, f'sets max_seq_length to "12"; {COUNT}'),
        ("embed", MODULE, {"max_seq_length": 0}, f"sets max_seq_length to 0; {COUNT}"),
        ("embed", MODULE, {"do_lower_case": True}, "sets do_lower_case, which radix-ops embed can't do"),
        ("embed", MODULE, {"do_lower_case": "no"}, 'sets do_lower_case to "no"; it must be true or false'),
        ("embed", MODULE, {"transformer_task": "fill-mask"}, "sets transformer_task, which radix-ops embed can't do"),
        ("embed", MODULE, {"module_output_name": "other"}, "sets module_output_name, which radix-ops embed can't do"),
        ("embed", MODULE, {"tokenizer_args": {"use_fast": False}}, "sets tokenizer_args, which radix-ops embed"),
        ("embed", MODULE, {"processor_kwargs": {"chat_template": "x"}}, "sets processor_kwargs, which radix-ops embed"),
        ("embed", MODULE, {"tokenizer_args": {"model_max_length": "a"}}, "sets a model_max_length that is no whole"),
        ("embed", MODULE, {"config_kwargs": {"num_hidden_layers": 1}}, "sets config_kwargs, which radix-ops embed"),
        ("embed", MODULE, {"model_kwargs": {"device_map": "auto"}}, "sets model_kwargs, which radix-ops embed"),
        ("embed", MODULE, {"model_args": "x"}, 'sets model_args to "x"; it must be an object'),
        ("embed", MODULE, {"tokenizer_name_or_path": "x"}, 'sets "tokenizer_name_or_path", which radix-ops embed does'),
        ("embed", MODULE, {"query_expansion": {"length": 3}}, 'sets "query_expansion", which radix-ops embed does not'),
        ("embed", MODULE, {"pooling": "x"}, 'sets "pooling", which radix-ops embed does not know'),
        ("embed", MODULE, {"modality_config": {}}, "sets modality_config, which radix-ops embed can't do"),
        ("embed", MODULE, {"modality_config": {"text": FORWARD, "image": FORWARD}}, "sets modality_config, which"),
        ("embed", MODULE, {"modality_config": {"text": {**FORWARD, "x": 1}}}, "sets modality_config, which"),
        ("embed", MODULE, {"modality_config": {"text": {**FORWARD, "method": "get_text_features"}}}, "modality_config"),
        ("embed", MODULE, {"modality_config": {"message": {**FORWARD, "format": "x"}}}, "sets modality_config, which"),
        ("embed", MODULE, {"modality_config": {"text": "forward"}}, "sets modality_config, which"),
        ("embed", MODULE, {"processing_kwargs": {"txt": {}}}, 'processing_kwargs, sets "txt", which radix-ops'),
        ("embed", MODULE, {"processing_kwargs": {"text": {"max_length": 3}}}, 'text, sets "max_length", which'),
        ("embed", MODULE, {"processing_kwargs": {"common": {"padding": False}}}, 'common, sets "padding", which'),
        (
            "embed", MODULE, {"processing_kwargs": {"chat_template": {"max_length": 3}}},
            "chat_template, sets max_length, which radix-ops embed can't do",
        ),
        (
            "embed", MODULE, {"processing_kwargs": {"chat_template": {"restore_suffix": "no"}}},
            'sets restore_suffix to "no"; it must be true or false',
        ),
        ("embed", POOL, {"include_prompt": "no"}, 'sets include_prompt to "no"; it must be true or false'),
        ("embed", POOL, {"pooling_mode": 3}, "sets pooling_mode to 3; it must be a pooling's name"),
        ("embed", POOL, {"pooling_mode": []}, "sets pooling_mode to []; it must be a pooling's name"),
        ("embed", POOL, {"pooling_mode": "sum"}, "pools by sum; radix-ops embed pools by"),
        ("embed", POOL, {"weights": [1]}, 'sets "weights", which radix-ops embed does not know'),
        ("embed", NORM, {"module_input_name": "token_embeddings"}, "normalises something else than sentence_embedding"),
        ("embed", NORM, {"module_output_name": "other"}, "normalises something else than sentence_embedding"),
        ("embed", NORM, {"p": 1}, 'sets "p", which radix-ops embed does not know'),
        ("answer", SCORE, {"true_token_id": 100}, "sets true_token_id to 100; it must be a token's id, from 0 to 99"),
        ("answer", SCORE, {"true_token_id": None}, "lacks true_token_id"),
        ("answer", SCORE, {"false_token_id": -1}, "sets false_token_id to -1; it must be a token's id"),
        ("answer", SCORE, {"module_input_name": "x"}, "sets module_input_name, which radix-ops rerank can't do"),
        ("rerank", "config.json", {"sentence_transformers": 3}, "config.json, sentence_transformers, must hold a JSON"),
        ("rerank", "config.json", {"sentence_transformers": {"x": 3}}, 'config.json, sentence_transformers, sets "x"'),
    ]:  # fmt: skip
        # The model's own file goes first.
        if file == "config.json":
            changed = setting(**changes)

            def change(path, changed=changed):
                changed(path)
                setting(activation_fn=None)(path.parent / MODEL)
        else:
            change = setting(**changes)
        assert message in refusal(kind, file, change), (kind, file, changes)


def test_modules_that_are_wrong_or_not_known_are_refused_by_name(refusal):
    for index, changes, message in [
        (1, {"path": "../1_Pooling"}, "names the folder '../1_Pooling'; a module's must lie inside the model's"),
        (1, {"path": "/tmp"}, "names the folder '/tmp'; a module's must lie inside the model's"),
        (1, {"path": "x\\..\\..\\y"}, "a module's must lie inside the model's"),
        (1, {"path": 3}, "sets path to 3; it must be a string"),
        (1, {"path": None}, "does not list modules with type and path"),
        (1, {"path": "nowhere"}, "has the module Pooling, and no nowhere/config.json that says how"),
        (1, {"type": 3}, "does not list modules with type and path"),
        (1, {"name": "0"}, "names two modules '0'"),
        (1, {"extra": 3}, 'module 1, sets "extra", which radix-ops embed does not know'),
        *(
            (1, {"type": f"sentence_transformers.models.{kind}"}, f"has the module sentence_transformers.models.{kind}")
            for kind in (
                "Dense", "LayerNorm", "Dropout", "Router", "Asym", "WordEmbeddings", "CNN", "LSTM", "BoW",
                "WordWeights", "WeightedLayerPooling", "StaticEmbedding", "CLIPModel", "SpladePooling",
                "MLMTransformer",
            )
        ),
    ]:  # fmt: skip
        assert message in refusal("embed", "modules.json", module(index, **changes)), changes


@pytest.mark.parametrize("file", ["modules.json", MODEL, MODULE, POOL])
def test_files_that_are_no_json_objects(refusal, file):
    for raw, message in [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8: byte 0xff at 0"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"null", "holds null"),
        (b"3", "does not list modules" if file == "modules.json" else "must hold a JSON object"),
    ]:
        found = refusal("embed", file, lambda path, raw=raw: path.write_bytes(raw))
        assert message in found
        assert file in found

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    assert "no regular file" in refusal("embed", file, pipe)


def test_settings_that_change_nothing_are_taken(folders, tmp_path):
    """sentence-transformers 5 and 6 write some of them, and calls other than encode read the rest."""
    from radix_ops.engine.recipes import find_recipe

    folder = tmp_path / "model"
    shutil.copytree(folders["embed"], folder)
    expected = find_recipe(str(folder))
    setting(similarity_fn_name="dot", prompts={"a": "b", "c": None})(folder / MODEL)
    setting(
        unpad_inputs=False,
        query_length=3,
        document_length=None,
        model_args={"dtype": "float16", "attn_implementation": "eager", "trust_remote_code": True},
        tokenizer_args={"padding_side": "left"},
        config_args={},
        do_lower_case=False,
        processing_kwargs={"text": {"logits_to_keep": 0}, "chat_template": {"restore_suffix": True}},
    )(folder / MODULE)
    module(0, kwargs=["task"])(folder / "modules.json")
    assert find_recipe(str(folder)) == expected
    setting(max_seq_length=12)(folder / MODULE)
    assert find_recipe(str(folder)).max_length == 12
    setting(tokenizer_args={"model_max_length": 9})(folder / MODULE)
    assert find_recipe(str(folder)).max_length == 9
