"""radix-ops embed: against sentence-transformers' encode on the same folders, outputs, resuming, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch

from helpers.commands import TEXTS, failing_command, read_jsonl, write_jsonl
from helpers.language_models import TEXT, embedding_tokenizer, needs_hf, tiny_model, tiny_tokenizer
from radix_ops import cli
from radix_ops.data.matrix import MatrixFile
from radix_ops.engine import Embedder, UserError, _engine, embedding
from radix_ops.engine.items import shortest_decimals
from radix_ops.engine.recipes import Recipe
from radix_ops.engine.runners import Qwen3Runner

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

DIM = 32


def embed(model, *arguments):
    return cli.main(["embed", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing(capsys, model, *arguments):
    return failing_command(capsys, "embed", "--device", "cpu", "--model", model, *arguments)


def plain_folder(folder, kind="Qwen3", **changes):
    """Save transformers' base model in a folder, without a word about pooling."""
    tiny_model(kind, **changes).model.save_pretrained(folder)
    embedding_tokenizer().save_pretrained(folder)
    return folder


def sentence_folder(folder, base, pooling="lasttoken", normalize=True, **options):
    """Save the same model as a sentence-transformers folder; return both."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    include_prompt = options.pop("include_prompt", True)
    parts = [modules.Transformer(str(base)), modules.Pooling(DIM, pooling, include_prompt=include_prompt)]
    parts += [modules.Normalize()] if normalize else []
    library.SentenceTransformer(modules=parts, device="cpu", **options).save_pretrained(str(folder))
    return folder, library.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory, qwen3):
    return sentence_folder(tmp_path_factory.mktemp("sentences"), qwen3)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def oracle(folder, texts=TEXTS, pooling="last", prompt=""):
    """Return transformers' embeddings, one text at a time, in float64."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0]
        rows.append(states[-1] if pooling == "last" else states.mean(0))
    return torch.stack(rows).numpy()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("options", [[], ["--plain"], ["--token-budget", 7], ["--plain", "--token-budget", 7]])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_embed_equals_transformers_one_text_at_a_time(tmp_path, texts, qwen3, kind, options):
    if kind == "Llama" and "--plain" not in options:
        needs_hf()
    folder = qwen3 if kind == "Qwen3" else plain_folder(tmp_path / "llama", kind)
    for pooling in ("last", "mean"):
        output = tmp_path / f"{pooling}.npy"
        assert embed(folder, "--pooling", pooling, "--no-normalize", "--output", output, *options, texts) == 0
        found = np.load(output)
        assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), DIM))
        check(found, oracle(folder, pooling=pooling))


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embed_equals_sentence_transformers(tmp_path, texts, qwen3, pooling, normalize):
    prompts = {"query": "Instruct: find the river\nQuery:", "document": ""}
    folder, library = sentence_folder(
        tmp_path / "st", qwen3, pooling, normalize, prompts=prompts, default_prompt_name="query"
    )
    assert embed(folder, "--output", tmp_path / "e.npy", texts) == 0
    check(np.load(tmp_path / "e.npy"), library.encode(TEXTS))
    assert embed(folder, "--output", tmp_path / "p.npy", "--prompt", "", texts) == 0
    check(np.load(tmp_path / "p.npy"), library.encode(TEXTS, prompt=""))
    assert embed(folder, "--output", tmp_path / "n.npy", "--prompt-name", "document", texts) == 0
    check(np.load(tmp_path / "n.npy"), library.encode(TEXTS, prompt_name="document"))
    assert embed(folder, "--output", tmp_path / "d.npy", "--dim", 8, texts) == 0
    expected = library.encode(TEXTS, truncate_dim=8, normalize_embeddings=normalize)
    check(np.load(tmp_path / "d.npy"), expected)


def test_a_prompt_that_the_folder_lacks_is_refused(tmp_path, texts, qwen3, capsys):
    folder, _ = sentence_folder(tmp_path / "st", qwen3, "mean", True, prompts={"query": "find: ", "document": ""})
    message = failing(capsys, folder, "--prompt-name", "queries", texts)
    assert "--prompt-name 'queries' is not one of the model's prompts, which are 'query', 'document'" in message
    with pytest.raises(SystemExit):
        embed(folder, "--prompt-name", "query", "--prompt", "find", texts)
    with pytest.raises(UserError, match="^prompt and prompt_name can't both be given"):
        Embedder(folder, prompt="find", prompt_name="query")


@pytest.mark.parametrize("normalize", [False, True])
def test_a_folders_truncate_dim_cuts_as_in_sentence_transformers(tmp_path, texts, qwen3, normalize):
    """It cuts after the normalisation; --dim cuts before it."""
    folder, library = sentence_folder(tmp_path / "st", qwen3, "mean", normalize)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncate_dim": 8}))
    library = type(library)(str(folder))
    assert embed(folder, "--output", tmp_path / "e.npy", texts) == 0
    found = np.load(tmp_path / "e.npy")
    assert found.shape == (len(TEXTS), 8)
    check(found, library.encode(TEXTS))
    assert embed(folder, "--dim", 8, "--output", tmp_path / "d.npy", texts) == 0
    check(np.load(tmp_path / "d.npy"), library.encode(TEXTS, truncate_dim=8, normalize_embeddings=normalize))
    if normalize:
        assert (np.linalg.norm(found, axis=1) < 0.99).all()


def test_a_mean_leaves_the_prompt_out_where_the_folder_says_so(tmp_path, texts, qwen3, capsys):
    folder, library = sentence_folder(
        tmp_path / "st", qwen3, "mean", include_prompt=False, prompts={"q": "the river: "}, default_prompt_name="q"
    )
    assert embed(folder, "--output", tmp_path / "e.npy", texts) == 0
    check(np.load(tmp_path / "e.npy"), library.encode(TEXTS))


def test_truncated_texts_keep_their_last_special_token_as_in_sentence_transformers(tmp_path, qwen3, capsys):
    folder, library = sentence_folder(tmp_path / "st", qwen3)
    library.max_seq_length = 12
    library.save_pretrained(str(folder))
    long = [" ".join(TEXT), "the sea", " ".join(TEXT) + " and more"]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in long])
    message = failing(capsys, folder, path)
    assert "line 1 has " in message
    assert "tokens and the most are 12; --truncate-right drops tokens from its end" in message
    assert embed(folder, "--truncate-right", "--output", tmp_path / "e.npy", path) == 0
    found = np.load(tmp_path / "e.npy")
    check(found, library.encode(long))
    check(found[0], found[2])
    assert embed(folder, "--truncate-right", "--max-length", 20, "--output", tmp_path / "f.npy", path) == 0
    library.max_seq_length = 20
    check(np.load(tmp_path / "f.npy"), library.encode(long))


def test_json_lines_hold_the_same_numbers_and_the_other_keys(tmp_path, texts, qwen3, capsys):
    lines = [{"id": index, "body": text, "note": {"of": None}} for index, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "t.jsonl", lines)
    assert embed(qwen3, "--output", tmp_path / "e.npy", texts) == 0
    assert embed(qwen3, "--output", tmp_path / "e.jsonl", "--text-key", "body", "--token-budget", 9, path) == 0
    capsys.readouterr()
    assert embed(qwen3, "--text-key", "body", "--token-budget", 9, path) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = read_jsonl(tmp_path / "e.jsonl")
    assert found == printed
    assert [(r["line"], r["id"], r["note"]) for r in found] == [(i + 1, i, {"of": None}) for i in range(len(TEXTS))]
    assert set(found[0]) == {"line", "id", "note", "embedding", "key"}
    check(np.array([r["embedding"] for r in found], np.float32), np.load(tmp_path / "e.npy"))
    check(np.load(tmp_path / "e.npy"), unit(oracle(qwen3)))


def test_numbers_read_back_as_the_same_float32():
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(1e-3)
    assert np.array(json.loads(json.dumps(shortest_decimals(row))), np.float32).tolist() == row.tolist()
    assert shortest_decimals(np.array([0.1], np.float32)) == [0.1]


def stop_after(monkeypatch, batches, arguments):
    """Press Ctrl-C in the batch behind so many."""
    inner, count = Qwen3Runner.states, 0

    def stopping(*given):
        nonlocal count
        count += 1
        if count > batches:
            raise KeyboardInterrupt
        return inner(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3Runner, "states", stopping)
        assert embed(*arguments) == 130


@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_the_same_command_again_has_nothing_to_do(tmp_path, texts, qwen3, monkeypatch, capsys, suffix):
    output = tmp_path / f"e.{suffix}"
    assert embed(qwen3, "--output", output, texts) == 0
    held = output.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(Qwen3Runner, "states", lambda *arguments: pytest.fail("computed again"))
    assert embed(qwen3, "--output", output, texts) == 0
    assert f"holds {len(TEXTS)} of {len(TEXTS)} results already" in capsys.readouterr().err
    assert output.read_bytes() == held
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, "texts.txt"]


@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_embed_continues_an_interrupted_run(tmp_path, texts, qwen3, monkeypatch, capsys, suffix):
    output = tmp_path / f"e.{suffix}"
    arguments = [qwen3, "--output", output, "--token-budget", 1, texts]
    stop_after(monkeypatch, 3, arguments)
    assert "the same command continues" in capsys.readouterr().err
    assert output.exists() == (suffix == "jsonl")

    seen, inner = [], Qwen3Runner.states
    monkeypatch.setattr(Qwen3Runner, "states", lambda self, given, *t: seen.extend(given) or inner(self, given, *t))
    assert embed(*arguments) == 0
    assert 0 < len(seen) < len(TEXTS)
    assert f"holds {len(TEXTS) - len(seen)} of {len(TEXTS)} results already" in capsys.readouterr().err
    rows = np.load(output) if suffix == "npy" else np.array([r["embedding"] for r in read_jsonl(output)])
    check(rows, unit(oracle(qwen3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, "texts.txt"]


def test_an_interrupted_matrix_of_another_run_is_refused(tmp_path, texts, qwen3, monkeypatch, capsys):
    output = tmp_path / "e.npy"
    stop_after(monkeypatch, 2, [qwen3, "--output", output, "--token-budget", 1, texts])
    for changed in (["--prompt", "the "], ["--dim", "4"], ["--pooling", "mean"], ["--plain"], ["--no-normalize"]):
        message = failing(capsys, qwen3, "--output", output, *changed, texts)
        assert "e.npy.rows is of another input, model, dtype, mode or option; --overwrite starts anew" in message
    assert embed(qwen3, "--output", output, "--overwrite", "--dim", 4, texts) == 0
    check(np.load(output), unit(oracle(qwen3)[:, :4]))
    assert "e.npy exists and is complete; --overwrite replaces it" in failing(capsys, qwen3, "--output", output, texts)


def test_a_matrix_outlives_a_kill_at_any_step(tmp_path):
    path, shape = tmp_path / "m.npy", (3, 2)
    rows = np.arange(6, dtype=np.float32).reshape(shape)
    MatrixFile(str(path), shape, "k", False).write(np.array([1]), rows[1:2])
    again = MatrixFile(str(path), shape, "k", False)
    assert again.done.tolist() == [False, True, False]
    again.write(np.array([0, 2]), rows[[0, 2]])
    # The run was killed between the two steps of finish.
    side = (tmp_path / "m.npy.rows").read_bytes()
    again.finish()
    (tmp_path / "m.npy.rows").write_bytes(side)
    last = MatrixFile(str(path), shape, "k", False)
    assert last.done.all()
    last.finish()
    assert np.load(path).tolist() == rows.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["m.npy"]
    with pytest.raises(ValueError, match="exists and is complete"):
        MatrixFile(str(path), shape, "another", False)
    finished = MatrixFile(str(path), shape, "k", False)
    assert finished.done.all()
    finished.finish()
    assert np.load(path).tolist() == rows.tolist()


def test_compare_reports_both_runs(tmp_path, texts, qwen3, capsys):
    assert embed(qwen3, "--compare", "--output", tmp_path / "e.npy", texts) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    assert float(out.split("largest difference of a number: ")[1].split()[0]) < 1e-5
    assert float(out.split("least cosine of two embeddings of one text: ")[1]) > 0.999999
    check(np.load(tmp_path / "e.npy"), unit(oracle(qwen3)))


@pytest.mark.parametrize("content", ["one", "one\n", "one\r\n"])
def test_a_file_of_one_line(tmp_path, qwen3, content, capsys):
    path = tmp_path / "t.txt"
    path.write_bytes(content.encode())
    assert embed(qwen3, path) == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    check(np.array([result["embedding"]]), unit(oracle(qwen3, ["one"])))


def test_modules_and_settings_that_are_not_computed_are_refused(tmp_path, texts, sentences, capsys):
    modules = json.loads((sentences[0] / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"}
    own = {"idx": 2, "name": "2", "path": "2_Own", "type": "own.Transformer"}
    folder = tmp_path / "st"

    def message_of(file, content):
        shutil.copytree(sentences[0], folder)
        (folder / file).write_text(json.dumps(content))
        message = failing(capsys, folder, texts)
        shutil.rmtree(folder)
        return message

    for listed, expected in [
        ([*modules[:2], dense], "has the module sentence_transformers.base.modules.dense.Dense, which radix-ops embed"),
        ([*modules[:2], own], "has the module own.Transformer, which radix-ops embed can't compute"),
        (modules[:1], "has the modules Transformer; radix-ops embed computes Transformer, Pooling and then"),
        ({"a": 1}, "its modules.json does not list modules with type and path"),
    ]:
        assert expected in message_of("modules.json", listed)
    for config, expected in [
        ({"pooling_mode": "sum"}, "pools by sum; radix-ops embed pools by lasttoken, mean, weightedmean, mean_sqrt_le"),
        ({"pooling_mode": ["mean", "sum"]}, "pools by mean and sum"),
        ({"pooling_mode_cls_token": True, "include_prompt": False}, "sets include_prompt to false beside the pooling"),
    ]:
        assert expected in message_of("1_Pooling/config.json", config)
    for config, key in [
        ({"do_lower_case": True}, "do_lower_case"),
        ({"model_args": {"is_causal": False}}, "model_args"),
        ({"transformer_task": "text-generation"}, "transformer_task"),
        ({"modality_config": {"text": {"method": "other"}}}, "modality_config"),
    ]:
        assert f"sentence_bert_config.json sets {key}, which radix-ops" in message_of(
            "sentence_bert_config.json", config
        )


def test_old_folders_say_their_pooling_by_flags(tmp_path, texts, sentences):
    folder = tmp_path / "st"
    shutil.copytree(sentences[0], folder)
    flags = {"word_embedding_dimension": DIM, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(flags))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    assert embed(folder, "--output", tmp_path / "e.npy", texts) == 0
    check(np.load(tmp_path / "e.npy"), library.encode(TEXTS))


def test_bad_input_and_options_are_refused_before_a_model_is_loaded(tmp_path, texts, qwen3, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "b"}])
    assert 'bad.jsonl, line 2 has no "text" (a string); it has "txt"' in failing(capsys, qwen3, bad)
    write_jsonl(bad, [{"text": "a", "embedding": []}])
    assert 'line 1 has the key "embedding", which the output uses itself' in failing(capsys, qwen3, bad)
    for options, message in [
        (["--dim", 33], "--dim 33 is more than the model has, 32"),
        (["--max-length", 129], "--max-length 129 is more than the model reads, 128"),
        (["--max-length", 1], "--max-length 1 leaves no room beside 1 special tokens"),
        (["--max-length", 5], "line 1 has 14 tokens and the most are 5; --truncate-right"),
        (["--output", texts], "is the input file itself"),
        (["--output", tmp_path], "is not a regular file"),
    ]:
        assert message in failing(capsys, qwen3, *options, texts)


def test_ranges_are_not_overwritten(tmp_path, texts, qwen3, capsys):
    path = tmp_path / "ranges.npy"
    np.save(path, np.array([[-1.0] * 32, [1.0] * 32], np.float32))
    options = ["--output-dtype", "int8", "--ranges", path, "--output", path, "--overwrite"]
    assert "is the input file itself, or another one that the run reads" in failing(capsys, qwen3, *options, texts)
    assert np.load(path).dtype == np.float32


def test_texts_of_no_tokens_are_refused(tmp_path, qwen3, capsys):
    folder = tmp_path / "model"
    shutil.copytree(qwen3, folder)
    tiny_tokenizer(adds_bos=False).save_pretrained(folder)
    (tmp_path / "t.txt").write_text("a\n\nb\n")
    assert "t.txt, line 2 yields no tokens, so it has no embedding" in failing(capsys, folder, tmp_path / "t.txt")
    parts = [embedding.Text(f"line {n}", text, {}) for n, text in enumerate(["the sea", ""], 1)]
    recipe = Recipe("", poolings=("mean",), prompt="the ", pools_prompt=False)
    with pytest.raises(ValueError, match="line 2 has no tokens behind the prompt"):
        embedding.encode(parts, tiny_tokenizer(adds_bos=False), recipe, False)


def test_embeddings_that_are_not_finite_are_refused(tmp_path, texts, capsys):
    model = tiny_model("Qwen3").model
    model.embed_tokens.weight.data[embedding_tokenizer()("x")["input_ids"][0]] = float("nan")
    model.save_pretrained(tmp_path / "model")
    embedding_tokenizer().save_pretrained(tmp_path / "model")
    assert "line 8 got an embedding that is not finite; try --dtype float32" in failing(
        capsys, tmp_path / "model", texts
    )


def test_batches_that_do_not_fit_run_in_halves(tmp_path, texts, qwen3, monkeypatch, capsys):
    inner, sizes = Qwen3Runner.states, []

    def states(self, sequences, *tokens):
        sizes.append(len(sequences))
        if len(sequences) > 3:
            raise torch.OutOfMemoryError("too much")
        return inner(self, sequences, *tokens)

    monkeypatch.setattr(Qwen3Runner, "states", states)
    assert embed(qwen3, "--output", tmp_path / "e.npy", texts) == 0
    assert sizes == [8, 3, 3, 2]
    check(np.load(tmp_path / "e.npy"), unit(oracle(qwen3)))
    assert "out of memory: going on with batches of half the size" in capsys.readouterr().err

    monkeypatch.setattr(Qwen3Runner, "states", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    assert "out of memory: one sequence alone does not fit into it" in failing(capsys, qwen3, texts)
