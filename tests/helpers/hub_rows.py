"""Rows as data sets publish them on the hub, of made-up words: the schema of each, by its data card, and any number."""

from __future__ import annotations

import random
from collections.abc import Callable

WORDS = [
    "which",
    "river",
    "flows",
    "through",
    "the",
    "sea",
    "and",
    "Seine",
    "or",
    "Thames",
    "is",
    "Paris",
    "rain",
    "salt",
    "hill",
]
LETTERS = "ABCDE"


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def several(rng: random.Random, count: int, most: int = 3) -> list[str]:
    return [words(rng, 1, most) for _ in range(count)]


def arc(rng: random.Random, index: int) -> tuple[dict, int]:
    """allenai/ai2_arc: three to five choices, whose labels are letters, or digits in some rows."""
    count, right = rng.randint(3, 5), rng.randrange(3)
    labels = [str(number + 1) if index % 4 == 0 else LETTERS[number] for number in range(count)]
    choices = {"text": several(rng, count), "label": labels}
    return {"id": f"M_{index}", "question": words(rng, 4, 9), "choices": choices, "answerKey": labels[right]}, right


def commonsense_qa(rng: random.Random, index: int) -> tuple[dict, int]:
    """tau/commonsense_qa"""
    row, right = arc(rng, 1)
    return row | {"id": f"{index:032x}", "question_concept": words(rng, 1, 1)}, right


def openbookqa(rng: random.Random, index: int) -> tuple[dict, int]:
    """allenai/openbookqa, main"""
    row, right = arc(rng, 1)
    return {"id": f"7-{index}", "question_stem": row.pop("question"), **row}, right


def mmlu(rng: random.Random, index: int) -> tuple[dict, int]:
    """cais/mmlu"""
    right = rng.randrange(4)
    row = {"question": words(rng, 4, 9), "subject": f"subject_{index // 50}", "choices": several(rng, 4)}
    return row | {"answer": right}, right


def mmlu_pro(rng: random.Random, index: int) -> tuple[dict, int]:
    """TIGER-Lab/MMLU-Pro"""
    right = rng.randrange(5)
    row = {"question_id": index, "question": words(rng, 4, 9), "options": several(rng, 5), "answer": LETTERS[right]}
    return row | {"answer_index": right, "cot_content": "", "category": "geography", "src": "made up"}, right


def hellaswag(rng: random.Random, index: int) -> tuple[dict, int]:
    """Rowan/hellaswag"""
    right, first, second = rng.randrange(4), words(rng, 3, 6), words(rng, 1, 2)
    row = {
        "ind": index,
        "activity_label": words(rng, 1, 2),
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
    }
    row |= {"endings": several(rng, 4, 5), "source_id": "activitynet~v_1", "split": "val", "split_type": "indomain"}
    return row | {"label": str(right)}, right


def piqa(rng: random.Random, index: int) -> tuple[dict, int]:
    """ybisk/piqa"""
    right = rng.randrange(2)
    return {"goal": words(rng, 3, 6), "sol1": words(rng, 2, 5), "sol2": words(rng, 2, 5), "label": right}, right


def winogrande(rng: random.Random, index: int) -> tuple[dict, int]:
    """allenai/winogrande, winogrande_xl"""
    right, sentence = rng.randrange(2), f"{words(rng, 3, 6)} _ {words(rng, 2, 4)}."
    return {"sentence": sentence, "option1": "Seine", "option2": "Thames", "answer": str(right + 1)}, right


def boolq(rng: random.Random, index: int) -> tuple[dict, int]:
    """google/boolq"""
    right = rng.randrange(2)
    return {"question": words(rng, 3, 6), "answer": bool(right), "passage": words(rng, 6, 12)}, right


def super_glue_boolq(rng: random.Random, index: int) -> tuple[dict, int]:
    """aps/super_glue, boolq"""
    row, right = boolq(rng, index)
    return {"question": row["question"], "passage": row["passage"], "idx": index, "label": right}, right


def sciq(rng: random.Random, index: int) -> tuple[dict, int]:
    """allenai/sciq"""
    names = ("distractor3", "distractor1", "distractor2", "correct_answer")
    return {
        "question": words(rng, 3, 6),
        **dict(zip(names, several(rng, 4), strict=True)),
        "support": words(rng, 4, 9),
    }, 3


def msmarco(rng: random.Random, index: int) -> tuple[dict, list[int]]:
    """microsoft/ms_marco, v1.1 and v2.1"""
    count = rng.randint(2, 4)
    selected = [int(number == index % count) for number in range(count)]
    passages = {"is_selected": selected, "passage_text": several(rng, count, 6), "url": ["https://x.example"] * count}
    row = {"answers": [words(rng, 1, 2)], "passages": passages, "query": words(rng, 2, 4), "query_id": index}
    return row | {"query_type": "numeric", "wellFormedAnswers": []}, selected


def mteb(rng: random.Random, index: int) -> tuple[dict, list[int]]:
    """mteb/scidocs-reranking, mteb/askubuntudupquestions-reranking"""
    row = {"query": words(rng, 2, 4), "positive": several(rng, 1 + index % 2, 6), "negative": several(rng, 2, 6)}
    return row, [1] * len(row["positive"]) + [0, 0]


def tevatron(rng: random.Random, index: int) -> tuple[dict, list[int]]:
    """Tevatron/msmarco-passage"""

    def passages(first: int, count: int) -> list[dict]:
        return [{"docid": str(first + n), "title": words(rng, 1, 2), "text": words(rng, 3, 6)} for n in range(count)]

    row = {"query_id": str(index), "query": words(rng, 2, 4), "positive_passages": passages(0, 1)}
    return row | {"negative_passages": passages(1, 2)}, [1, 0, 0]


QUESTIONS: dict[str, Callable] = {
    make.__name__: make
    for make in (
        arc, commonsense_qa, openbookqa, mmlu, mmlu_pro, hellaswag, piqa, winogrande, boolq, super_glue_boolq, sciq,
    )
}  # fmt: skip
RANKINGS: dict[str, Callable] = {make.__name__: make for make in (msmarco, mteb, tevatron)}


def rows_of(name: str, count: int = 1000) -> tuple[list[dict], list]:
    """Return rows of a data set, and of each the index of the right choice, or its documents' relevance."""
    rng = random.Random(name)
    rows, answers = zip(*((QUESTIONS | RANKINGS)[name](rng, index) for index in range(count)), strict=True)
    return list(rows), list(answers)
