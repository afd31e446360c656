"""A finished job is known by its proof, and by nothing that has changed since."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from radix_ops.data import finished
from radix_ops.data.finished import FinishedJob

CACHE_FOLDER = finished._cache_folder
SAID = [("stderr", "accuracy 0.5\n"), ("stdout", "x")]
OPTIONS = {"command": "score", "plain": False, "dtype": None, "labels": ["a", "b"]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return the paths of a model's folder, a template, an input and an output, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finished, "_cache_folder", CACHE_FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {
        "weights": Path("model/model.safetensors"),
        "nested": Path("model/1_Pooling/config.json"),
        "template": Path("template.json"),
        "input": Path("in/a.jsonl"),
        "output": Path("out.npy"),
        "ids": Path("out.ids.jsonl"),
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what {path} holds")
    return SimpleNamespace(**found)


def job(options=None, model="model", inputs=("in/a.jsonl",), output="out.npy"):
    return FinishedJob({**OPTIONS, "template": "template.json", **(options or {})}, model, inputs, output)


def remembered(files, **given):
    job(**given).remember(7, [files.output, files.ids], SAID)
    assert job(**given).found() == (7, SAID)


def rewritten(path):
    """Change a byte in place and give the file the times that it had."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_job_that_was_not_remembered_is_not_proven(files):
    assert job().found() is None


@pytest.mark.parametrize("name", ["weights", "nested", "template", "input", "output", "ids"])
def test_a_byte_that_changes_in_any_file_voids_the_proof(files, name):
    remembered(files)
    rewritten(getattr(files, name))
    assert job().found() is None


@pytest.mark.parametrize("name", ["weights", "nested", "template", "input", "output", "ids"])
def test_a_file_that_is_missing_or_new_voids_the_proof(files, name):
    remembered(files)
    path = getattr(files, name)
    path.unlink()
    assert job().found() is None


def test_a_file_that_joins_the_models_folder_voids_the_proof(files):
    remembered(files)
    Path("model/chat_template.jinja").write_text("")
    assert job().found() is None


@pytest.mark.parametrize(
    "given",
    [
        {"options": {"plain": True}},
        {"options": {"labels": ["a", "c"]}},
        {"options": {"dim": 8}},
        {"inputs": ["in"]},
        {"inputs": ["in/a.jsonl", "in/a.jsonl"]},
        {"output": "other.npy"},
        {"model": "other"},
    ],
    ids=repr,
)
def test_another_job_is_not_proven(files, given):
    Path("other").mkdir()
    Path("other/model.safetensors").write_text("what model/model.safetensors holds")
    remembered(files)
    assert job(**given).found() is None


def test_another_version_of_a_library_voids_the_proof(files, monkeypatch):
    remembered(files)
    version = finished.importlib.metadata.version
    monkeypatch.setattr(
        finished.importlib.metadata, "version", lambda name: "0" if name == "tokenizers" else version(name)
    )
    assert job().found() is None


def test_an_input_that_is_written_anew_with_the_same_bytes_counts_as_the_same(files):
    remembered(files)
    content = files.input.read_bytes()
    files.input.unlink()
    files.input.write_bytes(content)
    assert job().found() == (7, SAID)


@pytest.mark.parametrize("name", ["weights", "template", "input"])
def test_what_changes_during_the_run_is_not_remembered(files, name):
    running = job()
    rewritten(getattr(files, name))
    running.remember(7, [files.output], [])
    assert job().found() is None


def test_a_change_right_behind_the_run_voids_the_proof(files):
    """The times of files are coarse: a change that follows the proof at once must not have the time of what it has."""
    for attempt in range(20):
        files.weights.write_text(f"weights {attempt:>3}")
        running = job()
        running.remember(7, [files.output, files.ids], [])
        rewritten(files.weights)
        assert job().found() is None


def test_folders_of_inputs_are_proven_by_all_that_they_hold(files):
    remembered(files, inputs=["in"])
    Path("in/b.jsonl").write_text("")
    assert job(inputs=["in"]).found() is None


def test_pipes_prove_nothing(files):
    os.mkfifo("pipe")
    for name in ("pipe", "-", "absent"):
        running = job(inputs=[name])
        running.remember(7, [files.output], [])
        assert job(inputs=[name]).found() is None


def test_a_cache_folder_that_can_not_be_written_or_is_damaged_proves_nothing(files):
    Path("cache").write_text("")
    job().remember(7, [files.output], [])
    assert job().found() is None
    Path("cache").unlink()
    remembered(files)
    (record,) = Path("cache/radix_ops/finished").iterdir()
    for content in (b"", b"[1]", b'{"files": 1}', b"\xff", record.read_bytes()[:-1]):
        record.write_bytes(content)
        assert job().found() is None


def test_the_cache_folder_keeps_the_newest(files, monkeypatch):
    monkeypatch.setattr(finished, "_MOST_RECORDS", 3)
    for index in range(5):
        output = Path(f"out{index}.jsonl")
        output.write_text("x")
        job(output=str(output)).remember(1, [output], [])
        time.sleep(0.01)
    assert [job(output=f"out{index}.jsonl").found() for index in range(5)] == [None, None, *[(1, [])] * 3]


@pytest.fixture
def hub(files, monkeypatch):
    """Return a function that says which commit the hub has, None where it can't be asked; its cache has "one"."""
    import huggingface_hub
    from huggingface_hub import constants

    cached = Path("hub/models--org--name")
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("one")
    for commit in ("one", "two"):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "model.safetensors").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    at_hub = {"commit": "one"}

    def model_info(self, name, timeout):
        if at_hub["commit"] is None:
            raise OSError("no network")
        return SimpleNamespace(sha=at_hub["commit"])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return at_hub


def test_a_model_of_the_hub_is_told_by_its_commit(files, hub, monkeypatch):
    remembered(files, model="org/name")
    for hub["commit"] in ("two", None):
        assert job(model="org/name").found() is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert job(model="org/name").found() == (7, SAID)
    Path("hub/models--org--name/refs/main").write_text("two")
    assert job(model="org/name").found() is None
    assert job(model="org/other").found() is None
