"""radix-ops score on whole data sets, against tasks of lm-evaluation-harness that its own `hf` evaluates."""

import json
import os
import random
from pathlib import Path

import pytest

from helpers.commands import read_jsonl, score, write_jsonl
from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_hf()
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval with its dependencies is not installed", exc_type=ImportError)
yaml = pytest.importorskip("yaml")

from lm_eval.tasks import TaskManager  # noqa: E402

WORDS = ["which", "river", "flows", "through", "the", "sea", "and", "Seine", "or", "Thames", "is", "Paris"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM = "The following are multiple choice questions (with answers) about rivers."
KINDS = {"letters": "mmlu/default/_default_template_yaml", "words": "arc/arc_easy.yaml"}


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save a model, its tokenizer, data and the harness' tasks on them in a folder."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    tiny_model(max_position_embeddings=300).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer(adds_bos=False)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": words(rng, 2, 6), "choices": [words(rng, 1, 5) for _ in range(4)], "gold": rng.randrange(4)}
        for _ in range(40)
    ]
    write_jsonl(folder / "questions.jsonl", rows)
    write_jsonl(folder / "texts.jsonl", [{"text": words(rng, 5, 90)} for _ in range(12)])
    for name, file in KINDS.items():
        given = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / file).read_text())
        asked = {"doc_to_text": given["doc_to_text"], "doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
        asked |= {"doc_to_choice": given["doc_to_choice"]} if name == "letters" else {}
        metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
        save_task(folder, name, "questions", output_type="multiple_choice", metric_list=metrics, **asked)
    metrics = [{"metric": f"{unit}_perplexity"} for unit in ("word", "byte")] + [{"metric": "bits_per_byte"}]
    asked = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    save_task(folder, "texts", "texts", output_type="loglikelihood_rolling", metric_list=metrics, **asked)
    return folder


def save_task(folder: Path, name: str, data: str, **fields) -> None:
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.jsonl")}}}
    task = {"task": name, "test_split": "test", "num_fewshot": 0, **files, **fields}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def evaluated(folder, task: str, model_args=(), **options):
    """Return the harness' metrics, and what the model answered to each sample."""
    found = lm_eval.simple_evaluate(
        model="hf",
        tasks=[task],
        device="cpu",
        bootstrap_iters=0,
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        model_args={"pretrained": str(folder / "model"), **dict(model_args)},
        **options,
    )
    metrics = {name.removesuffix(",none"): value for name, value in found["results"][task].items()}
    return metrics, [[answer for (answer,) in sample["resps"]] for sample in found["samples"][task]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_chat", [False, True], ids=["", "chat"])
def test_accuracies_of_a_task(folder, tmp_path, kind, in_chat):
    chat = {"apply_chat_template": True, "system_instruction": SYSTEM} if in_chat else {}
    metrics, answers = evaluated(folder, kind, **chat)
    options = (["--letters"] if kind == "letters" else []) + (["--chat", "--system", SYSTEM] if in_chat else [])
    output, path = tmp_path / "scores.jsonl", tmp_path / "metrics.json"
    model = folder / "model"
    assert score(model, *options, "--output", output, "--metrics", path, folder / "questions.jsonl") == 0
    found, results = json.loads(path.read_text()), read_jsonl(output)
    for result, wanted in zip(results, answers, strict=True):
        assert result["logprobs"] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-3)
    assert found["accuracy"]["sum"]["value"] == pytest.approx(metrics["acc"])
    assert found["accuracy"]["per_char"]["value"] == pytest.approx(metrics["acc_norm"])
    assert found["rows"] == len(answers) == 40


@pytest.mark.parametrize("length", [None, 50])
def test_perplexities_of_a_task(folder, tmp_path, length):
    metrics, answers = evaluated(folder, "texts", {"max_length": length} if length else {})
    options = ["--max-length", length, "--stride", length] if length else []
    output, path = tmp_path / "scores.jsonl", tmp_path / "metrics.json"
    model = folder / "model"
    assert score(model, *options, "--output", output, "--metrics", path, folder / "texts.jsonl") == 0
    found, results = json.loads(path.read_text()), read_jsonl(output)
    assert [r["logprob"] for r in results] == pytest.approx([logprob for (logprob,) in answers], rel=1e-4)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-4)
    assert not length or max(result["tokens"] for result in results) > 2 * length
