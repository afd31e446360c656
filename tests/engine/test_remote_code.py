"""Python code in a model's folder runs where the user says so, and never because something asked and was answered."""

import io
import json
import sys

import numpy as np
import pytest

from helpers.commands import read_jsonl, write_jsonl
from helpers.language_models import tiny_model, tiny_tokenizer
from radix_ops import cli

transformers = pytest.importorskip("transformers")

QUESTION = [{"context": "the sea", "choices": [" is", " was"]}]
TEXTS = [{"text": "the sea"}]
QUERIES = [{"query": "the sea", "documents": ["a", "b"]}]
TEMPLATE = {"text": "{query} {document}", "yes": 40, "no": 41}
CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
pathlib.Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaModel):
    config_class = Config
class Head(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Return a file that a folder's code makes when it runs. Whoever asks on standard input is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def files(tmp_path):
    """Return the arguments of each command but for its model."""
    (tmp_path / "template.json").write_text(json.dumps(TEMPLATE))
    lines = {"score": QUESTION, "embed": TEXTS, "rerank": QUERIES}
    paths = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", found)) for name, found in lines.items()}
    given = {name: [name, "--device", "cpu", path] for name, path in paths.items()}
    given["rerank"] += ["--template", str(tmp_path / "template.json")]
    return {**given, "inspect": ["inspect", paths["embed"]]}


def stranger(folder, marker, kind="stranger", **mapped):
    """Save a Llama whose config.json says by `mapped`, an auto_map, that its code is in the folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(marker=str(marker), kind=kind))
    edit(folder / "config.json", model_type=kind, auto_map=mapped)
    return str(folder)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ALL = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Head"}


@pytest.mark.parametrize("command", ["score", "embed", "rerank", "inspect"])
def test_a_models_code_runs_with_consent_alone(tmp_path, marker, files, command, capsys):
    model = stranger(tmp_path / "model", marker, **ALL)
    assert cli.main([*files[command], "--model", model]) == 1
    error = capsys.readouterr().err
    assert f"the config of {model} could not be loaded: it brings Python code of its own" in error
    assert "runs with --trust-remote-code alone" in error
    assert not marker.exists()


@pytest.mark.parametrize("command", ["score", "embed", "rerank"])
def test_a_models_code_runs_where_it_is_trusted(tmp_path, marker, files, command):
    known = tmp_path / "known"
    tiny_model().save_pretrained(known)
    tiny_tokenizer(adds_bos=True).save_pretrained(known)
    model = stranger(tmp_path / "model", marker, **ALL)
    outputs = [str(tmp_path / f"{name}.jsonl") for name in ("want", "got")]
    assert cli.main([*files[command], "--plain", "--model", str(known), "--output", outputs[0]]) == 0
    trusting = ["--trust-remote-code", "--plain", "--model", model, "--output", outputs[1]]
    assert cli.main([*files[command], *trusting]) == 0
    assert marker.exists()
    field = {"score": "logprobs", "embed": "embedding", "rerank": "scores"}[command]
    want, got = (np.array([line[field] for line in read_jsonl(path)]) for path in outputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("command", ["score", "embed", "rerank", "inspect"])
def test_a_tokenizers_code_runs_with_consent_alone(tmp_path, marker, files, command, capsys):
    model = stranger(tmp_path / "model", marker, kind="llama")
    changes = {"auto_map": {"AutoTokenizer": [None, "code.Words"]}, "tokenizer_class": "Words"}
    edit(tmp_path / "model" / "tokenizer_config.json", **changes)
    option = "--tokenizer" if command == "inspect" else "--model"
    status = cli.main([*files[command], option, model])
    # transformers may know how to read the tokenizer without its class.
    assert status == 0 or "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()


def test_code_beside_a_known_type_is_left_aside_and_said_so(tmp_path, marker, files, capsys):
    model = stranger(tmp_path / "model", marker, kind="llama", AutoModelForCausalLM="code.Head")
    assert cli.main([*files["score"], "--plain", "--model", model]) == 0
    assert "brings code of its own for AutoModelForCausalLM, which is not run" in capsys.readouterr().err
    assert not marker.exists()


def test_a_qwen3_with_code_of_its_own_runs_that_code_where_it_is_trusted(tmp_path, marker, files):
    folder = tmp_path / "model"
    tiny_model("Qwen3").save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    code = CODE.format(marker=str(marker), kind="qwen3").replace("LlamaForCausalLM", "Qwen3ForCausalLM")
    (folder / "code.py").write_text(code.replace("LlamaConfig", "Qwen3Config"))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Head"})
    assert cli.main([*files["score"], "--plain", "--model", str(folder)]) == 0
    assert not marker.exists()
    assert cli.main([*files["score"], "--plain", "--trust-remote-code", "--model", str(folder)]) == 0
    assert marker.exists()


def test_the_harness_runs_no_code_without_consent(tmp_path, marker):
    pytest.importorskip("lm_eval")
    from radix_ops.lm_eval import RadixLM

    with pytest.raises(ValueError, match="trust_remote_code"):
        RadixLM(pretrained=stranger(tmp_path / "model", marker, **ALL), device="cpu")
    assert not marker.exists()
