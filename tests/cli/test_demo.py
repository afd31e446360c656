"""The demo's questions, made of the prompts in lm-eval's package."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo():
    path = Path(__file__).parents[2] / "examples" / "mmlu_demo.py"
    spec = importlib.util.spec_from_file_location("mmlu_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_makes_questions_of_worked_examples(demo):
    lead = "\nA: Let's think step by step."
    prompt = (
        "Heading.\n\n"
        f"Q: One?\n(A) a (B) b (C) c (D) d{lead} Because. The answer is (C).\n\n"
        f"Q: Two?\n(A) a (B) b (C) c (D) d{lead} So. The answer is (A).\n\n"
        f"Q: Three (A)?\n(A) e\n(B) f\n(C) g\n(D) h{lead} Hence\n\n(B). The answer is (D).\n\n"
    )
    (line,) = demo.questions("rivers", prompt)
    assert line == {
        "id": "rivers/3",
        "context": prompt[: prompt.index(" Hence")] + " The answer is",
        "choices": [" e", " f", " g", " h"],
        "gold": 3,
    }


def test_demo_reads_every_subject_of_the_package(demo):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    prompts = json.loads(demo.package_file(*demo.PROMPTS).read_text(encoding="utf-8"))
    for subject, prompt in prompts.items():
        for line in demo.questions(subject, prompt):
            assert len(line["choices"]) in (4, 5)
            assert 0 <= line["gold"] < len(line["choices"])
            assert line["context"].count(demo.LEAD) == demo.SHOTS + 1
            assert line["context"].endswith(f"{demo.LEAD} The answer is")
            question = line["context"].rsplit("\n\nQ: ", 1)[1]
            assert all(choice in question for choice in line["choices"])


def test_demo_names_a_package_that_is_missing(demo):
    with pytest.raises(SystemExit, match="the demo needs nothing==1: pip install --no-deps nothing==1"):
        demo.package_file("no_such_package", "file", "nothing==1")


@pytest.mark.parametrize("every", ["0", "-7"])
def test_demo_takes_every_so_many_subjects_from_one_on(demo, monkeypatch, capsys, every):
    monkeypatch.setattr("sys.argv", ["mmlu_demo.py", "--every", every])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"--every must be at least 1, got {every}" in capsys.readouterr().err
