"""Multiple-choice rows of the hub: each becomes a context or a question with its choices, and perhaps `gold`, the index
of the right one.

Contexts are the prompts of lm-evaluation-harness 0.4.13. A `question` leaves the prompt to the scorer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..inputs import Record, check_text
from ..prompts import LETTERS
from .rows import (
    Shape,
    agreed,
    columns_of,
    gold_of_answer,
    gold_of_index,
    gold_of_label,
    is_nothing,
    is_string,
    is_strings,
    replaced,
    whole_number,
)

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")  # of its own tables, some of which have no header
_ANSWERS = ("answer", "answerKey", "label")


def _question(record: Record) -> dict:
    """Return a question whose right choice may stand under "gold", "answer", "answerKey" or "label"."""
    choices = record.texts("choices")
    if not is_nothing(record.fields.get("gold")):
        return replaced(record, ("context",))
    keys = [key for key in _ANSWERS if not is_nothing(record.fields.get(key))]
    if len(keys) > 1:
        words = " and ".join(f'"{key}"' for key in keys)
        raise UserError(
            f"{record.where} has {words}, and each may say which choice is right: rename all but one",
            f"{record.where} has {words}, and each may say which choice is right: --column gold={keys[0]} names one",
        )
    gold = None
    if keys:
        key = keys[0]
        # A label in digits is an index, as in the rows of HellaSwag; an answer in digits may be a choice's text.
        is_index = key == "label"
        gold = gold_of_index(record, key, len(choices)) if is_index else gold_of_answer(record, key, choices)
    return replaced(record, ("context", *_ANSWERS), gold=gold)


def _mmlu(record: Record) -> dict:
    return _question(record) | {"question": record.text("question").strip()}


def _in_columns(question: str, answer: str) -> Callable[[Record], dict]:
    """Return a reader of rows as MMLU's own tables have them: a column for each choice, named by its letter, and the
    right letter under `answer`."""
    letters = MMLU_COLUMNS[1:-1]

    def read(record: Record) -> dict:
        return replaced(
            record,
            (question, *letters, answer),
            question=record.text(question).strip(),
            choices=[record.text(letter) for letter in letters],
            gold=gold_of_label(record, answer, list(letters)),
        )

    return read


def _has_no_choices(fields: dict) -> bool:
    return fields.get("choices") is None


def _arc(record: Record) -> dict:
    """Return a row of ARC, whose answerKey is one of the labels: letters or digits."""
    choices, gold = _labelled(record, "choices")
    return replaced(record, ("answerKey",), choices=choices, gold=gold)


def _commonsense_qa(record: Record) -> dict:
    """Return a row of CommonsenseQA, which the harness asks by letters."""
    choices, gold = _labelled(record, "choices")
    if len(choices) > len(LETTERS):
        raise UserError(f"{record.where} has {len(choices)} choices, and {len(LETTERS)} letters name them, A to Z")
    letters = LETTERS[: len(choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, choices, strict=True))
    return replaced(
        record,
        ("question", "answerKey"),
        context=f"Question: {record.text('question').strip()}\n{listed}Answer:",
        choices=_behind_space(list(letters)),
        gold=gold,
    )


def _openbookqa(record: Record) -> dict:
    choices, gold = _labelled(record, "choices")
    return replaced(
        record,
        ("question_stem", "answerKey"),
        context=record.text("question_stem"),
        choices=_behind_space(choices),
        gold=gold,
    )


def _labelled(record: Record, key: str) -> tuple[list[str], int | None]:
    texts, labels = columns_of(record, key, ("text", "label"))
    _check_texts(record, texts, f"{key}.text")
    return texts, gold_of_label(record, "answerKey", labels)


def _check_texts(record: Record, texts: list, key: str) -> None:
    if not texts:
        raise UserError(f'{record.where}: "{key}" is empty; it must hold at least one string')
    for index, text in enumerate(texts):
        check_text(text, f"{record.where}: {key}[{index}]")


def _mmlu_pro(record: Record) -> dict:
    options = record.texts("options")
    answer = record.fields.get("answer")
    letter = LETTERS.find(answer.strip()) if isinstance(answer, str) and len(answer.strip()) == 1 else -1
    gold = agreed(
        record,
        answer_index=gold_of_index(record, "answer_index", len(options)),
        answer=letter if 0 <= letter < len(options) else None,
    )
    return replaced(record, ("options", "answer", "answer_index"), choices=options, gold=gold)


def _hellaswag(record: Record) -> dict:
    if record.fields.get("ctx_a") is not None:
        # str.capitalize lowers what is behind the first letter, which is what the harness does.
        context = f"{record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    else:
        context = record.text("ctx")
    endings = record.texts("endings")
    return replaced(
        record,
        ("ctx", "ctx_a", "ctx_b", "activity_label", "endings", "label"),
        context=_without_brackets(f"{record.text('activity_label')}: {context}"),
        choices=_behind_space([_without_brackets(ending) for ending in endings]),
        gold=gold_of_index(record, "label", len(endings)),
    )


def _without_brackets(text: str) -> str:
    """Return a text without the marks that WikiHow left in HellaSwag, as the harness has it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _piqa(record: Record) -> dict:
    choices = [record.text("sol1"), record.text("sol2")]
    gold = gold_of_index(record, "label", 2)
    return replaced(record, ("goal", "sol1", "sol2", "label"), question=record.text("goal"), choices=choices, gold=gold)


def _winogrande(record: Record) -> dict:
    """Return the sentence up to its blank with each option as contexts, and what is behind the blank to score."""
    sentence, options = record.text("sentence"), [record.text("option1"), record.text("option2")]
    before, blank, behind = sentence.partition("_")
    if not blank or not behind.strip():
        raise UserError(f'{record.where}: "sentence" must hold a blank, "_", and words behind it')
    return replaced(
        record,
        ("sentence", "option1", "option2", "answer"),
        contexts=[before + option for option in options],
        continuation=" " + behind.strip(),
        gold=gold_of_index(record, "answer", 2, first=1),
    )


def _boolq(record: Record) -> dict:
    label, answer = (_yes_or_no(record.fields.get(key)) for key in ("label", "answer"))
    key = "answer" if is_nothing(record.fields.get("label")) else "label"
    if (label if key == "label" else answer) is None:
        gold_of_index(record, key, 2)  # UserError but for what says nothing
    return replaced(
        record,
        ("passage", "question", "answer", "label"),
        context=f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:",
        choices=[" no", " yes"],
        gold=agreed(record, label=label, answer=answer),
    )


def _yes_or_no(value: object) -> int | None:
    """Return 1 for yes and 0 for no, as a truth, a number or a word; None for anything else."""
    if isinstance(value, str):
        return {"yes": 1, "true": 1, "1": 1, "no": 0, "false": 0, "0": 0}.get(value.strip().lower())
    number = int(value) if isinstance(value, bool) else whole_number(value)
    return number if number in (0, 1) else None


def _sciq(record: Record) -> dict:
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return replaced(
        record,
        ("support", "question", *names),
        context=f"{record.text('support').lstrip()}\nQuestion: {record.text('question')}\nAnswer:",
        choices=_behind_space([record.text(name) for name in names]),
        gold=3,
    )


def _behind_space(texts: list[str]) -> list[str]:
    """Return choices as they stand behind a context that ends without one."""
    return [f" {text}" for text in texts]


def _as_it_is(record: Record) -> dict:
    return record.fields


def _has_labels(fields: dict) -> bool:
    choices = fields["choices"]
    entries = choices if isinstance(choices, (list, tuple)) else [choices]
    return bool(entries) and all(isinstance(entry, dict) and {"text", "label"} <= entry.keys() for entry in entries)


def _truth(value: object) -> bool | None:
    """Return a boolean, or one that a cell of CSV holds as Python or JSON writes it; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def _is_truth(fields: dict) -> bool:
    answer, label = fields.get("answer"), fields.get("label")
    is_label = label in ("-1", "0", "1") if isinstance(label, str) else whole_number(label) in (-1, 0, 1)
    return is_label or _truth(answer) is not None


QUESTIONS = (
    Shape("ids", ("context_ids", "choices_ids"), _as_it_is),
    Shape("ids", ("input_ids",), _as_it_is, lambda fields: "context_ids" not in fields),
    # A text by itself is what remains where nothing else is there to score.
    Shape("text", ("text",), _as_it_is, lambda fields: "input_ids" in fields),
    Shape("context", ("context", "choices"), _as_it_is, lambda fields: is_strings(fields["choices"])),
    Shape("contexts", ("contexts", "continuation"), _as_it_is),
    Shape("question", ("question", "choices"), _question, lambda fields: is_strings(fields["choices"])),
    Shape("mmlu", ("question", "choices", "subject"), _mmlu, lambda fields: is_strings(fields["choices"])),
    *(
        Shape("mmlu", (question, *MMLU_COLUMNS[1:-1]), _in_columns(question, answer), _has_no_choices)
        for question, answer in (("question", "answer"), ("Question", "Answer"), ("input", "target"))
    ),
    Shape("commonsense-qa", ("question", "choices", "question_concept"), _commonsense_qa, _has_labels),
    Shape("arc", ("question", "choices"), _arc, lambda fields: is_string(fields["question"]) and _has_labels(fields)),
    Shape("openbookqa", ("question_stem", "choices"), _openbookqa, _has_labels),
    Shape("mmlu-pro", ("question", "options", "answer_index"), _mmlu_pro),
    Shape("hellaswag", ("activity_label", "endings"), _hellaswag, lambda fields: "ctx" in fields or "ctx_a" in fields),
    Shape("piqa", ("goal", "sol1", "sol2"), _piqa),
    Shape("winogrande", ("sentence", "option1", "option2"), _winogrande),
    Shape("boolq", ("question", "passage"), _boolq, _is_truth),
    Shape("sciq", ("question", "support", "correct_answer", "distractor1", "distractor2", "distractor3"), _sciq),
)


def columns_without_header(cells: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names of the columns where a table's first row is no header but a question, as in MMLU's own tables:
    six cells, of which the last is the letter of the right choice; None for anything else."""
    letters = MMLU_COLUMNS[1:-1]
    is_question = len(cells) == len(MMLU_COLUMNS) and cells[-1].strip() in letters and (*cells[2:],) != letters
    return MMLU_COLUMNS if is_question else None
