"""tools/make_prompts.py: sets of prompts from public data, for the benchmarks."""

import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.language_models import tiny_tokenizer

ROOT = Path(__file__).parents[2]
HEAD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
)
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture
def make_prompts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_prompts

    return make_prompts


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(adds_bos=False).save_pretrained(folder)
    return folder


@pytest.fixture
def made(make_prompts, tokenizer_folder, tmp_path, capsys):
    """Return a function that makes a file and returns its sets: by name, the prompts of each group."""
    tokenizer = tiny_tokenizer(adds_bos=False)

    def make(*options) -> dict[str, list[list[str]]]:
        path = tmp_path / "prompts.npz"
        given = ["--tokenizer", tokenizer_folder, "--output", path, *options]
        assert make_prompts.main([str(option) for option in given]) == 0, capsys.readouterr().err
        sets: dict[str, list[list[str]]] = {}
        with np.load(path) as data:
            names = list(dict.fromkeys(key.rpartition(".")[0] for key in data.files))
            assert sorted(data.files) == sorted(f"{name}.{part}" for name in names for part in ("ids", "cu", "group"))
            for name in names:
                ids, cu, group = (data[f"{name}.{part}"] for part in ("ids", "cu", "group"))
                assert ids.dtype == cu.dtype == group.dtype == np.int32
                assert cu[0] == 0
                assert cu[-1] == len(ids)
                assert group.tolist() == sorted(group.tolist())
                texts = [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(cu)]
                found = itertools.groupby(zip(group, texts, strict=True), key=lambda pair: pair[0])
                sets[name] = [[text for _, text in pairs] for _, pairs in found]
        return sets

    return make


def write(path: Path, *lines) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def squad(path: Path, *articles) -> Path:
    """Write a file of articles, each a list of (paragraph, questions)."""
    data = [
        {"paragraphs": [{"context": text, "qas": [{"question": q} for q in asked]} for text, asked in article]}
        for article in articles
    ]
    return write(path, {"version": "1.1", "data": data})


def test_gsm8k_stands_behind_the_worked_examples_of_lm_eval(made, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    file = write(tmp_path / "test.jsonl", {"question": "One?", "answer": "#### 1"}, {"question": "Two?", "answer": "2"})
    first, second = made("--gsm8k", file)["gsm8k_8shot_cot"]
    shots = first[0].removesuffix("Q: One?\nA:")
    assert second == [f"{shots}Q: Two?\nA:"]
    examples = shots.split("\n\n")
    assert examples.pop() == ""
    assert len(examples) == 8
    assert examples[0].startswith("Q: There are 15 trees in the grove.")
    assert all(" The answer is " in example.split("\nA: ")[1] for example in examples)


def test_solutions_of_gsm8k_stand_behind_their_question(made, tmp_path):
    keys = ("175b_verification", "6b_finetuning", "6b_verification", "175b_finetuning")
    solutions = {key: {"solution": f"{key} says 3", "is_correct": False} for key in keys}
    file = write(tmp_path / "solutions.jsonl", {"question": "Two?", "ground_truth": "2 #### 2", **solutions})
    (group,) = made("--gsm8k-solutions", file)["gsm8k_group5"]
    order = ["2 #### 2", *(f"{key} says 3" for key in (keys[1], keys[2], keys[3], keys[0]))]
    assert group == [f"Q: Two?\nA: {solution}" for solution in order]


def test_prompts_of_humaneval_are_copied_and_may_be_packed(made, tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"task_id": "a", "prompt": "def a():\\n"}\n{"task_id": "b", "prompt": "b = "}\n'))
    assert made("--humaneval", file)["humaneval_n8_prefill"] == [["def a():\n"] * 8, ["b = "] * 8]


def test_xquad_asks_paragraphs_articles_and_candidates(made, tmp_path):
    file = squad(tmp_path / "xquad.json", [("P1.", ["a?", "b?"]), ("P2.", ["c?"])], [("P3.", ["d?"])])
    sets = made("--xquad", file, "--top", 2)
    assert sets["xquad_context_qa"] == [
        ["P1.\n\nQuestion: a?\nAnswer:", "P1.\n\nQuestion: b?\nAnswer:"],
        ["P2.\n\nQuestion: c?\nAnswer:"],
        ["P3.\n\nQuestion: d?\nAnswer:"],
    ]
    assert sets["xquad_article_qa"] == [
        [f"P1.\n\nP2.\n\nQuestion: {question}?\nAnswer:" for question in "abc"],
        ["P3.\n\nQuestion: d?\nAnswer:"],
    ]
    assert sets["xquad_rerank_top2"][0] == [f"{HEAD}<Query>: a?\n<Document>: {text}{TAIL}" for text in ("P1.", "P2.")]
    assert sets["xquad_rerank_top2"][-1] == [f"{HEAD}<Query>: d?\n<Document>: {text}{TAIL}" for text in ("P3.", "P1.")]
    assert set(sets) == {"xquad_context_qa", "xquad_article_qa", "xquad_rerank_top2"}


def test_the_document_may_stand_first(made, tmp_path):
    file = write(tmp_path / "top.tsv", *(f"1\t{i}\ta river\tpassage {i}" for i in range(2)))
    sets = made("--msmarco", file, "--top", 2, "--document-first")
    assert sets == {
        "msmarco_rerank_top2": [[f"{HEAD}<Query>: a river\n<Document>: passage {i}{TAIL}" for i in range(2)]],
        "msmarco_rerank_top2_docfirst": [[f"{HEAD}<Document>: passage {i}\n<Query>: a river{TAIL}" for i in range(2)]],
    }


def passages(groups: list[list[str]]) -> list[list[str]]:
    return [[text.split("<Document>: ")[1].removesuffix(TAIL) for text in group] for group in groups]


def test_candidates_of_ms_marco_come_in_the_order_of_the_file(made, tmp_path):
    lines = [
        "1\t10\tone\ta",
        "2\t11\ttwo\tb",
        '2\t12\ttwo\tc "quoted',
        "1\t10\tone\ta",
        "1\t13\tone\td",
        "2\t14\ttwo\te",
    ]
    lines += ["3\t15\tthree\tf"]  # which has too few
    sets = made("--msmarco", write(tmp_path / "top1000.tsv", *lines), "--top", 2, 3)
    assert passages(sets["msmarco_rerank_top2"]) == [["b", 'c "quoted'], ["a", "d"]]
    assert passages(sets["msmarco_rerank_top3"]) == [["b", 'c "quoted', "e"]]


def test_triples_give_each_passage_once_and_are_read_as_far_as_needed(made, tmp_path):
    lines = ["one\ta\tb", "two\tc\td", "one\ta\te", "two\tf\tg", "damaged"]
    sets = made("--msmarco", write(tmp_path / "triples.tsv", *lines), "--top", 3, "--sequences", 6)
    assert passages(sets["msmarco_rerank_top3"]) == [["a", "b", "e"], ["c", "d", "f"]]


def test_beir_gives_the_first_candidates_of_a_run(made, tmp_path):
    folder = tmp_path / "sci.fact"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "T" if i == 2 else "", "text": f"text {i}"} for i in range(4)]
    write(folder / "corpus.jsonl", *documents)
    write(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"query {i}"} for i in range(3)))
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q0\td1\t1", "q1\td1\t1")
    run = write(tmp_path / "bm25.trec", *(f"q1 Q0 d{i} 1 1.0 bm25" for i in (3, 2, 0)), "q0 Q0 d1 1 1.0 bm25")
    sets = made("--beir", folder, "--candidates", run, "--top", 2)
    assert passages(sets["sci_fact_rerank_top2"]) == [["text 3", "T text 2"]]


def test_worked_examples_of_lm_eval_become_questions_with_their_choices(made):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    sets = made("--mmlu", "--bbh", "--sequences", 40)
    for name, examples in (("mmlu_4shot_4choice", 5), ("mmlu_0shot_4choice", 1)):
        for group in sets[name]:
            context, lead, _ = group[0].rpartition("\nA: Let's think step by step. The answer is ")
            assert all(prompt.startswith(context + lead) for prompt in group)
            assert context.count("\nA: Let's think step by step.") == examples - 1
            assert len(group) in (4, 5)
    for group in sets["bbh_2shot_choice"]:
        assert [prompt.rpartition("So the answer is")[2] for prompt in group] == [
            f" ({letter})." for letter in "ABCDEFGHIJKLMNOPQR"[: len(group)]
        ]
        assert group[0].count("\nA: Let's think step by step.\n") == 3
    assert all(sum(map(len, groups)) >= 40 for groups in sets.values())
    assert all(sum(map(len, groups[:-1])) < 40 for groups in sets.values())


def test_the_benchmarks_read_the_file(made, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import argparse

    import batches

    made("--xquad", squad(tmp_path / "xquad.json", [("P1.", ["a?", "b?", "c?"])]), "--top", 1)
    parser = argparse.ArgumentParser()
    batches.add_data_options(parser)
    options = ["--data", str(tmp_path / "prompts.npz"), "--sequences", "2"]
    with pytest.raises(SystemExit, match="holds xquad_article_qa, xquad_context_qa, xquad_rerank_top1; --workloads"):
        batches.real_batches(parser.parse_args([*options, "--workloads", "gsm8k_group5"]), "cpu")
    (default,) = batches.real_batches(parser.parse_args(options), "cpu")
    (named,) = batches.real_batches(parser.parse_args([*options, "--workloads", "xquad_context_qa"]), "cpu")
    assert [default.name, named.name] == ["xquad_article_qa (2)", "xquad_context_qa (2)"]
    expected = [tiny_tokenizer(adds_bos=False)(f"P1.\n\nQuestion: {q}?\nAnswer:")["input_ids"] for q in "ab"]
    assert named.ids.tolist() == [token for ids in expected for token in ids]
    assert named.lengths.tolist() == list(map(len, expected))


def test_the_bytes_depend_on_no_run_and_no_seed_of_hashes(tokenizer_folder, tmp_path):
    xquad = squad(tmp_path / "xquad.json", [(f"P{i}.", [f"q{i}{j}?" for j in range(3)]) for i in range(9)])
    lines = [f"{i % 3}\t{i}\tquery {i % 3}\tpassage {i}" for i in range(30)]
    msmarco = write(tmp_path / "top.tsv", *lines)
    found = []
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.npz"
        command = [sys.executable, ROOT / "tools/make_prompts.py", "--tokenizer", tokenizer_folder, "--output", output]
        command += ["--xquad", xquad, "--msmarco", msmarco, "--document-first"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        subprocess.run(list(map(str, command)), check=True, env=environment, cwd=tmp_path)
        found.append(output.read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gsm8k", "no.jsonl"], "no.jsonl does not exist; it must be a file that was downloaded before"),
        (["--humaneval", "rows.jsonl"], 'rows.jsonl, line 1 has no "prompt" (a string); it has "question", "6b_fin'),
        (["--gsm8k-solutions", "rows.jsonl"], 'rows.jsonl, line 1: "6b_finetuning" is a string; it must be an object'),
        (["--xquad", "list.json"], "list.json holds list; it must hold a JSON object"),
        (["--xquad", "flat.json"], 'flat.json: data[0]: "paragraphs" must be an array of objects, as in SQuAD'),
        (["--xquad", "squad.json"], "--xquad holds 1 paragraphs; --top 8 takes as many documents for each query"),
        (["--msmarco", "two.tsv"], "two.tsv, line 1 has 2 columns; a top1000 file has query id, passage id, query and"),
        (["--msmarco", "mixed.tsv"], "mixed.tsv, line 2 has 3 columns; a top1000 file has"),
        (["--msmarco", "top.tsv"], "top.tsv has no query with 8 documents; --top must be less"),
        (["--xquad", "none.json"], "xquad_context_qa has no prompts"),
        (["--humaneval", "no_text.jsonl"], "humaneval_n8_prefill has a prompt of no tokens, the 9th"),
        (["--msmarco", "top.tsv"], "--top must be less: the most that one has are 1"),
        (["--msmarco", "latin.tsv"], "latin.tsv, line 1 is not UTF-8: byte 0xe9"),
        (["--msmarco", "cut.gz"], "cut.gz is cut off: its gzip has no end"),
        (["--msmarco", "empty"], "empty is empty; it must hold queries with their passages, parted by tabs"),
        (["--msmarco", "."], ". can't be read: Is a directory"),
        (["--gsm8k", "no_ending"], "no_ending, line 1 is not JSON"),
        (
            ["--xquad", "squad.json", "--beir", "no"],
            "--beir no does not exist; it must be a folder that was downloaded",
        ),
        (["--xquad", "squad.json", "--beir", "xquad"], "xquad is no folder of BEIR, which holds corpus"),
        (["--beir", "beir"], "--beir needs --candidates, a run whose first documents each query gets"),
        (["--xquad", "squad.json", "--beir", "in/xquad", "--candidates", "run"], "--beir in/xquad would make sets of"),
        (["--bbh", "--output", "folder.npz"], "--output folder.npz is a folder; it must be a file"),
        (
            ["--msmarco", "top.tsv", "--top", "1", "--output", "held.npz"],
            "--output held.npz can't be written: Is a dir",
        ),
        (["--beir", "."], ". is no folder of BEIR, which holds corpus.jsonl, queries.jsonl and qrels"),
    ],
)
def test_what_is_missing_is_named(make_prompts, tokenizer_folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    row = {"question": "a?", "6b_finetuning": "text", "ground_truth": "b"}
    write(tmp_path / "rows.jsonl", row)
    write(tmp_path / "list.json", [row])
    write(tmp_path / "flat.json", {"data": [{"paragraphs": "text"}]})
    squad(tmp_path / "squad.json", [("P1.", ["a?"])])
    write(tmp_path / "two.tsv", "a\tb")
    write(tmp_path / "mixed.tsv", "1\t2\ta\tb", "a\tb\tc")
    write(tmp_path / "top.tsv", "1\t2\ta\tb")
    (tmp_path / "latin.tsv").write_bytes(b"1\t2\tcaf\xe9\tb\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"1\t2\ta\tb\n" * 9)[:-9])
    (tmp_path / "empty").touch()
    squad(tmp_path / "none.json")
    write(tmp_path / "no_text.jsonl", {"prompt": "a"}, {"prompt": ""})
    write(tmp_path / "no_ending", "text")
    for name in ("xquad", "folder.npz", "held.npz.part", "beir", "in/xquad"):
        (tmp_path / name).mkdir(parents=True)
    for folder in (tmp_path / "beir", tmp_path / "in" / "xquad"):
        write(folder / "corpus.jsonl", {"_id": "d", "text": "a"})
        write(folder / "queries.jsonl", {"_id": "q", "text": "b"})
    given = ["--tokenizer", str(tokenizer_folder), "--output", "out.npz", *options]
    assert make_prompts.main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("make_prompts: ")
    assert message in error
    assert not list(tmp_path.glob("out.npz*"))


def test_a_file_that_could_not_be_written_leaves_nothing_and_the_one_before(
    make_prompts, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    def full(file, **arrays):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_prompts.np, "savez_compressed", full)
    top, output = write(tmp_path / "top.tsv", "1\t2\ta\tb"), tmp_path / "out.npz"
    output.write_bytes(b"before")
    given = ["--tokenizer", tokenizer_folder, "--output", output, "--msmarco", top, "--top", 1]
    assert make_prompts.main([str(option) for option in given]) == 1
    assert f"--output {output} can't be written: No space left on device" in capsys.readouterr().err
    assert output.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.npz"]


def test_a_paragraph_without_questions_is_no_group(made, tmp_path):
    file = squad(tmp_path / "xquad.json", [("P1.", []), ("P2.", ["a?"])], [("P3.", [])])
    sets = made("--xquad", file, "--top", 1)
    with np.load(tmp_path / "prompts.npz") as data:
        assert all(data[f"{name}.group"].tolist() == [0] for name in sets)


def test_a_package_and_a_tokenizer_that_are_missing_are_named(make_prompts, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    tiny_tokenizer(adds_bos=False).save_pretrained(tmp_path / "tokenizer")
    output = str(tmp_path / "out.npz")
    assert make_prompts.main(["--tokenizer", str(tmp_path / "tokenizer"), "--output", output, "--bbh"]) == 1
    assert "--bbh needs lm-eval==0.4.13: pip install --no-deps lm-eval==0.4.13" in capsys.readouterr().err
    assert make_prompts.main(["--tokenizer", str(tmp_path / "none"), "--output", output, "--bbh"]) == 1
    assert f"--tokenizer {tmp_path / 'none'} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a source, such as --mmlu"),
        (["--bbh", "--output", "prompts.npy"], "--output prompts.npy must end in .npz"),
        (["--bbh", "--candidates", "run"], "--candidates and --split belong to --beir"),
        (["--bbh", "--top", "0"], "--sequences and --top must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(make_prompts, capsys, options, message):
    with pytest.raises(SystemExit):
        make_prompts.main(["--tokenizer", "t", "--output", "prompts.npz", *options])
    assert message in capsys.readouterr().err
