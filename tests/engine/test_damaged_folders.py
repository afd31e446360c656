"""Damaged and hostile folders of other models, templates and prompts: one sentence, and nothing that waits or runs."""

import json
import os

import pytest
import safetensors.torch
import torch

from helpers.commands import failing_command, write_jsonl
from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer
from radix_ops import cli
from radix_ops.data.records import UserError
from radix_ops.engine import loading
from radix_ops.engine.loading import hub_file
from radix_ops.engine.templates import find_template


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def score(tmp_path, folder, capsys):
    """Return the one sentence that scoring with the folder's model ends in."""
    path = write_jsonl(tmp_path / "q.jsonl", [{"context": "a", "choices": ["b"]}])
    return lambda: failing_command(capsys, "score", "--plain", "--device", "cpu", "--model", folder, path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "other.safetensors", "notes"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(folder, score, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{folder / name} is no regular file; a model's folder must hold files and folders alone" in score()


def test_links_in_a_models_folder_are_followed(folder, tmp_path):
    """The hub's cache is made of them; one that leads nowhere is nobody's business."""
    needs_hf()
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    path = write_jsonl(tmp_path / "q.jsonl", [{"context": "a", "choices": ["b"]}])
    assert cli.main(["score", "--device", "cpu", "--model", str(folder), str(path)]) == 0


def test_shards_outside_of_the_folder_are_not_read(folder, tmp_path, score):
    (tmp_path / "else").mkdir()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "else" / "part.safetensors")
    for where in ("../else/part.safetensors", str(tmp_path / "else" / "part.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, where)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "it must be one in the same folder" in score()


def round_weights(folder, dtype):
    """Write one of its weights in this dtype; return its name."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file(
        {**weights, name: weights[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return name


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_of_whole_numbers_are_not_scored(folder, score, dtype):
    name = round_weights(folder, dtype)
    message = score()
    assert f"the weights of {folder} could not be loaded: model.safetensors holds {name} of " in message
    assert message.endswith("weights must be of floating point")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_whole_numbers_are_not_scored(folder, score, zipped, tmp_path, capsys):
    def pickle():
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    held = (folder / "model.safetensors").read_bytes()
    pickle()
    arguments = ["score", "--plain", "--device", "cpu", "--model", folder, tmp_path / "q.jsonl"]
    assert cli.main(list(map(str, arguments))) == 0
    capsys.readouterr()
    (folder / "model.safetensors").write_bytes(held)
    name = round_weights(folder, torch.int8)
    pickle()
    message = score()
    assert message.endswith(f"pytorch_model.bin holds {name} of torch.int8; weights must be of floating point")


def test_weights_of_whole_numbers_of_the_hub_are_not_scored(folder, tmp_path, monkeypatch, capsys):
    """They stand in the hub's cache, offline."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "hub" / "models--owner--name", "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots").mkdir()
    folder.rename(model / "snapshots" / commit)
    path = write_jsonl(tmp_path / "q.jsonl", [{"context": "a", "choices": ["b"]}])
    arguments = ["score", "--plain", "--device", "cpu", "--model", "owner/name", path]
    assert cli.main(list(map(str, arguments))) == 0
    capsys.readouterr()
    name = round_weights(model / "snapshots" / commit, torch.int8)
    message = failing_command(capsys, *arguments)
    assert f"the weights of owner/name could not be loaded: model.safetensors holds {name} of I8" in message


def test_a_cut_file_and_an_adapter_are_one_sentence(folder, score):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json), which is not applied here: merge it into its model" in score()
    (folder / "adapter_config.json").unlink()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert f"the weights of {folder} could not be loaded" in score()


def test_templates_of_hostile_json(tmp_path):
    path = tmp_path / "t.json"
    half = json.dumps({"text": "{query}{document}\ud800"})
    for raw, message in [
        (b'{"text": ' + b"[" * 100_000, "is not JSON that can be read: it is nested too deeply"),
        (b"\xff", "is not UTF-8: byte 0xff at 0"),
        (half.encode(), '"text" holds half of a surrogate pair, which no tokenizer can read'),
        (b'{"text": "{query}{document}", "yes": "\\udc80"}', '"yes" holds half of a surrogate pair'),
        (b'{"text": "{query}{document}", "instruction": "\\udc80"}', '"instruction" holds half of a surrogate pair'),
    ]:
        path.write_bytes(raw)
        with pytest.raises(UserError) as error:
            find_template(str(path))
        assert f"--template {path}" in str(error.value)
        assert message in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        find_template(str(path))


@pytest.mark.parametrize("arguments", [["embed", "--model", "m"], ["inspect"]])
@pytest.mark.parametrize("option", ["--prompt", "--text-key"])
def test_arguments_that_are_no_utf8_are_wrong_usage(arguments, option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, option, os.fsdecode(b"a\xffb"), "file.txt"])
    assert stop.value.code == 2
    assert f"argument {option}: 'a\\udcffb' is not UTF-8" in capsys.readouterr().err


def test_a_file_that_may_be_on_the_hub_is_not_taken_for_absent(tmp_path, monkeypatch):
    """A cache that transformers alone filled says nothing, offline, of how a model's states are pooled."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "a" * 40
    model = tmp_path / "models--owner--name"
    snapshot, absent = model / "snapshots" / commit, model / ".no_exist" / commit
    for folder in (snapshot, absent, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    assert hub_file("owner/name", "config.json") == snapshot / "config.json"
    with pytest.raises(UserError, match=r"the modules.json of owner/name could not be loaded"):
        hub_file("owner/name", "modules.json")
    (absent / "modules.json").touch()
    assert hub_file("owner/name", "modules.json") is None
    (absent / "modules.json").unlink()
    (snapshot / ".gitattributes").touch()
    assert hub_file("owner/name", "modules.json") is None


def answering_hub(monkeypatch, error=None):
    """Stand in for a hub that has a model, or that fails; return what it was asked for."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def model_info(self, name, timeout):
        asked.append((name, timeout))
        if error:
            raise error

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "_on_hub", set())
    return asked


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = answering_hub(monkeypatch, RuntimeError("Name or service not known"))
    message = "--model owner/mistyped is no folder, and the hub can't be asked for it: Name or service not known"
    for load in (loading.load_config, loading.load_tokenizer, lambda name: hub_file(name, "modules.json")):
        asked.clear()
        with pytest.raises(UserError, match=message):
            load("owner/mistyped")
        assert asked == [("owner/mistyped", 10)]


def test_a_model_that_the_hub_does_not_have_is_named(monkeypatch):
    errors = pytest.importorskip("huggingface_hub.errors")
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    answering_hub(monkeypatch, missing)
    with pytest.raises(
        UserError, match="--tokenizer owner/mistyped is neither a folder nor a model on the hub, or one"
    ):
        loading.load_tokenizer("owner/mistyped", "--tokenizer")


def test_what_is_cached_or_known_is_not_asked_for(monkeypatch, tmp_path):
    asked = answering_hub(monkeypatch)
    loading._check_on_hub("owner/there", "--model")
    loading._check_on_hub("owner/there", "--model")
    assert asked == [("owner/there", 10)]
    (tmp_path / "models--owner--cached").mkdir()
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_CACHE", str(tmp_path))
    loading._check_on_hub("owner/cached", "--model")
    assert len(asked) == 1
