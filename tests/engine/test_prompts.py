"""Questions as prompts, against the templates of lm-evaluation-harness, and the right choice that a row names."""

from pathlib import Path

import pytest

from radix_ops.engine import UserError
from radix_ops.engine.inputs import Record
from radix_ops.engine.prompts import gold_of
from radix_ops.engine.scoring import parse_item

ROWS = [
    {"question": " Which river flows through Paris? ", "choices": ["the Seine", "the Rhine", "the Po", "none"]},
    {"question": "2 + 2 =\nthat is", "choices": ["4", "5", "{{x}}", "été"]},
]


def item_of(fields, **options):
    return parse_item(Record("q.jsonl, line 1", fields), **options)


def harness_task(name: str) -> dict:
    lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / name).read_text())


def rendered(template: str, fields: dict) -> str:
    return pytest.importorskip("lm_eval.utils", exc_type=ImportError).apply_template(template, fields)


@pytest.mark.parametrize("row", ROWS)
def test_letters_are_asked_as_in_mmlu(row):
    task = harness_task("mmlu/default/_default_template_yaml")
    item = item_of(row, letters=True)
    assert item.context == rendered(task["doc_to_text"], row)
    # The harness puts its target_delimiter, by default a space, before a choice, and none in a chat.
    assert item.choices == [" " + letter for letter in task["doc_to_choice"]]
    chat = item_of(row, letters=True, in_chat=True)
    assert (chat.context, chat.choices) == (item.context, task["doc_to_choice"])


@pytest.mark.parametrize("row", ROWS)
def test_questions_are_asked_as_in_arc(row):
    item = item_of(row)
    assert item.context == rendered(harness_task("arc/arc_easy.yaml")["doc_to_text"], row)
    assert item.choices == [" " + choice for choice in row["choices"]]
    assert item_of(row, in_chat=True).choices == row["choices"]


def test_other_keys_stay_and_a_context_stands_for_the_question():
    item = item_of({**ROWS[0], "id": 7, "gold": "C"})
    assert item.extra == {"id": 7, "gold": 2}
    item = item_of({"context": "C", "choices": [" a", " b"], "question": "Q"})
    assert (item.context, item.choices, item.extra) == ("C", [" a", " b"], {"question": "Q"})


@pytest.mark.parametrize(
    ("choices", "gold", "index"),
    [
        ([" yes", " no"], 1, 1),
        ([" yes", " no"], "A", 0),
        ([" yes", " no"], "b", 1),
        ([" yes", " no"], " no", 1),
        ([" yes", " no"], "no", 1),
        (["yes", " yes"], " yes", 1),
        ([" x", " x", " y"], "x", 0),
        (["A", "B", "C"], "B", 1),
        (["2", "1", "0"], "1", 1),
        ([" yes", " no"], None, None),
        ([" yes", " no"], "", None),
    ],
)
def test_gold_is_an_index_a_letter_or_a_text(choices, gold, index):
    assert gold_of(Record("line 1", {"gold": gold}), choices) == index
    item = item_of({"context": "", "choices": choices, "gold": gold})
    assert item.extra["gold"] == index
    assert type(item.extra["gold"]) is type(index)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (2, 'line 1: "gold" is 2; it must be an index from 0 to 1, a letter from A to B, or the text of a choice'),
        (-1, '"gold" is -1; it must be'),
        ("C", "\"gold\" is 'C'; it must be"),
        ("maybe", "\"gold\" is 'maybe'; it must be"),
        ("0", "\"gold\" is '0'; it must be"),
        (" ", "\"gold\" is ' '; it must be"),
        (0.0, '"gold" is a number; it must be'),
        (True, '"gold" is a boolean; it must be'),
        ([0], '"gold" is an array; it must be'),
        ({"index": 0}, '"gold" is an object; it must be'),
    ],
)
def test_other_golds_are_errors_that_name_the_row(gold, message):
    with pytest.raises(UserError, match=message):
        item_of({"context": "c", "choices": [" yes", " no"], "gold": gold})


@pytest.mark.parametrize(("choices", "gold"), [(["B", "A"], "A"), (["yes", " yes"], "yes ")])
def test_a_gold_that_names_two_choices_is_refused(choices, gold):
    with pytest.raises(
        UserError, match=r'line 1: "gold" is .*, which names choices\[0\] and choices\[1\]; give the ind'
    ):
        item_of({"context": "c", "choices": choices, "gold": gold})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": "c", "choices": ["a"]}, 'line 1 has the key "context"; --letters asks a "question"'),
        ({"choices": ["a"]}, 'line 1 has no "question"'),
        ({"question": "q"}, 'line 1 has no "choices"'),
        ({"question": "q", "choices": ["a", ""]}, r"choices\[1\] is an empty string"),
        ({"question": "q", "choices": list("abcdefghijklmnopqrstuvwxyz!")}, "has 27 choices, and --letters names 26"),
    ],
)
def test_what_letters_cannot_ask_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        item_of(fields, letters=True)


def test_a_choice_of_white_space_cannot_be_spelled_out():
    with pytest.raises(UserError, match=r"choices\[1\] is white space alone"):
        item_of({"question": "q", "choices": ["a", " \n"]})
