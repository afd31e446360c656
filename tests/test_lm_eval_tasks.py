"""Whole tasks of lm-evaluation-harness by `--model radix` and by the harness' own `hf`, in Python and as a command."""

import json
import os
import random

import pytest

from helpers import processes
from helpers.language_models import tiny_model, tiny_tokenizer

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval with its dependencies is not installed", exc_type=ImportError)
pytest.importorskip("radix_ops.lm_eval", exc_type=ImportError)

from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = {
    "rivers": """
        output_type: multiple_choice
        doc_to_text: "Question: {{question}} Answer:"
        doc_to_target: gold
        doc_to_choice: "{{choices}}"
        num_fewshot: 3
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "letters": """
        output_type: multiple_choice
        doc_to_text: "{{question}} A. {{choices[0]}} B. {{choices[1]}} Answer: "
        doc_to_target: "{{gold % 2}}"
        doc_to_choice: [A, B]
        num_fewshot: 1
        metric_list: [{metric: acc}, {metric: acc_mutual_info}]
        """,
    "perplexity": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        num_fewshot: 0
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
    "generation": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[gold]}}"
        generation_kwargs: {until: ["."], max_gen_toks: 8}
        num_fewshot: 2
        metric_list: [{metric: exact_match}]
        """,
}


SPLITS = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s, shots: %s}}
test_split: test
fewshot_split: shots
"""


WORDS = ["which", "river", "flows", "through", "the", "sea", "and", "Seine", "or", "Thames", "is", "Paris"]


def document(rng: random.Random) -> dict:
    def words(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    choices = [words(1, 3) for _ in range(4)]
    return {"question": words(2, 5), "choices": choices, "gold": rng.randrange(4), "text": words(5, 70)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model, its tokenizer and tasks with their documents in a folder."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tiny_model(max_position_embeddings=300).save_pretrained(folder / "model")
    tiny_tokenizer(adds_bos=True).save_pretrained(folder / "model")
    rng = random.Random(0)
    for name, count in (("test", 9), ("shots", 4)):
        lines = [json.dumps(document(rng)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, text in TASKS.items():
        lines = [line.strip() for line in text.strip().splitlines()]
        head = f"task: {name}" + SPLITS % (folder / "test.jsonl", folder / "shots.jsonl")
        (folder / f"{name}.yaml").write_text(head + "\n".join(lines) + "\n")
    return folder


def evaluate(model: str, folder, **options):
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **{"batch_size": 4, "model_args": {"pretrained": str(folder / "model")}, **options},
    )


def test_evaluation_is_that_of_hf(folder):
    plain, folded = evaluate("hf", folder), evaluate("radix", folder)
    assert plain["results"].keys() == TASKS.keys()
    for task in TASKS:
        for metric, value in plain["results"][task].items():
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert folded["results"][task][metric] == wanted, (task, metric)
        pairs = list(zip(plain["samples"][task], folded["samples"][task], strict=True))
        assert len(pairs) == 9
        for want, got in pairs:
            assert [want["doc_id"], want["arguments"]] == [got["doc_id"], got["arguments"]]
            for (wanted,), (answer,) in zip(want["resps"], got["resps"], strict=True):
                check_answer(answer, wanted)
    config = folded["config"]
    assert 0 < config["radix_rows"] < config["radix_tokens"] / 2


def check_answer(answer, wanted):
    """Compare a loglikelihood's pair, a rolling request's number or a text."""
    if isinstance(wanted, tuple):
        assert answer == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
        assert type(answer[0]) is float
        assert type(answer[1]) is bool
    else:
        assert answer == (wanted if isinstance(wanted, str) else pytest.approx(wanted, abs=1e-3))


# The harness reads thousands of task files of its own first, which no test needs.
WITHOUT_OTHER_TASKS = """
import runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__.__defaults__ = (None, None, False, None)
runpy.run_module("radix_ops.lm_eval", run_name="__main__", alter_sys=True)
"""


def test_command_line(folder):
    command = [
        *("-c", WITHOUT_OTHER_TASKS, "run", "--model", "radix", "--device", "cpu"),
        *("--batch_size", "auto", "--model_args", f"pretrained={folder / 'model'}", "dtype=float32"),
        *("--include_path", str(folder), "--tasks", "rivers", "--output_path", str(folder / "results.json")),
    ]
    done = processes.run_python(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "|rivers|" in done.stdout
    (results,) = folder.glob("results*.json")
    results = json.loads(results.read_text())
    assert results["config"]["model"] == "radix"
    assert results["config"]["radix_rows"] < results["config"]["radix_tokens"]
