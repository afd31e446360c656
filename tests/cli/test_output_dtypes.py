"""Embeddings of fewer bits and nearest pairs of radix-ops embed, against sentence-transformers and NumPy."""

import csv
import json

import numpy as np
import pytest
import torch

from helpers.commands import TEXTS, failing_command, read_jsonl
from helpers.language_models import embedding_tokenizer, tiny_model, transformers
from radix_ops import cli
from radix_ops.engine import _engine


def embed(model, *arguments):
    return cli.main(["embed", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing(capsys, model, *arguments):
    return failing_command(capsys, "embed", "--device", "cpu", "--model", model, *arguments)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_model("Qwen3").model.save_pretrained(folder)
    embedding_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def unit_states(folder, texts):
    """Return transformers' normalised states of each text's last token, one text at a time, in float64."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "csv"])
def test_half_precision_is_that_of_the_float32_numbers(tmp_path, texts, qwen3, suffix):
    output = tmp_path / f"e.{suffix}"
    assert embed(qwen3, "--output", tmp_path / "f.npy", texts) == 0
    assert embed(qwen3, "--output-dtype", "float16", "--output", output, texts) == 0
    floats = np.load(tmp_path / "f.npy")
    if suffix == "npy":
        found = np.load(output)
        assert found.dtype == np.float16
    else:
        found = np.array([json.loads(r["embedding"]) if suffix == "csv" else r["embedding"] for r in rows_of(output)])
        # The shortest decimals that read back as the same float16.
        assert (found == found.astype(np.float16).astype("U").astype(float)).all()
    np.testing.assert_allclose(found, floats, rtol=2**-10, atol=1e-6)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else read_jsonl(path)


def test_int8_numbers_are_between_the_ranges_that_stand_beside_them(tmp_path, texts, qwen3, capsys):
    """A second run takes the first one's ranges, also for JSON lines."""
    library = pytest.importorskip("sentence_transformers")
    documents, queries, floats = (tmp_path / f"{name}.npy" for name in ("documents", "queries", "floats"))
    assert embed(qwen3, "--output", floats, texts) == 0
    assert embed(qwen3, "--output-dtype", "int8", "--output", documents, texts) == 0
    assert "documents.ranges.npy holds the ranges of the int8 numbers, those of these t" in capsys.readouterr().err
    ranges = np.load(tmp_path / "documents.ranges.npy")
    np.testing.assert_allclose(ranges, [np.load(floats).min(0), np.load(floats).max(0)], atol=1e-6)
    few = tmp_path / "few.txt"
    few.write_text("\n".join(TEXTS[3:5]))
    options = ["--output-dtype", "int8", "--ranges", tmp_path / "documents.ranges.npy"]
    assert embed(qwen3, *options, "--output", queries, few) == 0
    assert embed(qwen3, *options, few) == 0
    printed = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    expected = library.quantize_embeddings(np.load(floats), "int8", ranges=ranges)
    # A number at the border of two steps may fall to either side: the least and the most of the texts lie there.
    steps = (np.load(floats) - ranges[0]) / (ranges[1] - ranges[0]) * 255
    is_clear = np.abs(steps - steps.round()) > 1e-2
    assert is_clear.mean() > 0.5
    for found, rows in [
        (np.load(documents), slice(None)),
        (np.load(queries), slice(3, 5)),
        (np.array(printed), slice(3, 5)),
    ]:
        assert np.abs(found.astype(int) - expected[rows]).max() <= 1
        np.testing.assert_array_equal(found[is_clear[rows]], expected[rows][is_clear[rows]])
    assert np.load(queries).dtype == np.load(documents).dtype == np.int8
    message = failing(capsys, qwen3, "--output", queries, few)
    assert "queries.npy exists and is complete; --overwrite replaces it" in message


def test_dtypes_ranges_and_pairs_that_do_not_fit_are_refused_before_a_model_is_loaded(
    tmp_path, texts, qwen3, capsys, monkeypatch
):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "small.npy", np.zeros((2, 3), np.float32))
    np.savez(tmp_path / "many.npz", a=np.zeros(2))
    for options, message in [
        (["--output-dtype", "int8"], "--output-dtype int8 needs --ranges; without them they are those of all texts"),
        (["--output-dtype", "int8", "--output", tmp_path / "e.csv"], "--output-dtype int8 needs --ranges; without"),
        (["--ranges", tmp_path / "small.npy"], "--ranges are for --output-dtype int8 alone"),
        (
            ["--output-dtype", "int8", "--ranges", tmp_path / "none.npy"],
            "none.npy can't be read as a .npy file: No such",
        ),
        (["--output-dtype", "int8", "--ranges", tmp_path / "text.npy"], "text.npy can't be read as a .npy file: "),
        (["--output-dtype", "int8", "--ranges", tmp_path / "many.npz"], "many.npz is an archive of arrays; it must be"),
        (["--output-dtype", "int8", "--ranges", tmp_path / "small.npy"], "--ranges must be floats [2, 32], the least"),
        (["--pairs", 3, "--compare"], "--pairs and --compare can't both be given"),
        (["--pairs", 3, "--output-dtype", "int8"], "--output-dtype int8 needs --ranges"),
        (
            ["--pairs", 3, "--output-dtype", "int8", "--output", tmp_path / "e.npy"],
            "--pairs and --output-dtype int8 can",
        ),
    ]:
        assert message in failing(capsys, qwen3, *options, texts)


@pytest.mark.parametrize("options", [[], ["--output", "e.npy"], ["--output", "e.jsonl"], ["--output", "e.csv"]])
def test_the_nearest_pairs_are_shown(tmp_path, qwen3, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    texts = [text for text in TEXTS if text != "the sea"] + ["the sea, and the river, and the sea " * 3]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    rows = unit_states(qwen3, texts)
    first, second = np.triu_indices(len(texts), 1)
    nearest = np.argsort(-(rows @ rows.T)[first, second])[:3]
    for _ in range(1 + bool(options)):  # a finished run shows them again
        assert embed(qwen3, "--pairs", 3, *options, "t.txt") == 0
        shown = capsys.readouterr().err.partition(f"the nearest of {len(texts)} texts, by cosine:\n")[2].splitlines()
        for line, place in zip(shown, nearest, strict=True):
            i, j = first[place], second[place]
            cosine, _, both = line.strip().partition("  ")
            assert float(cosine) == pytest.approx(rows[i] @ rows[j], abs=2e-4)
            assert [part.partition(":")[0] for part in both.split("  |  ")] == [f"line {i + 1}", f"line {j + 1}"]
            assert texts[i][:20].strip() in both
