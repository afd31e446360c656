"""Named columns give a row the keys that a task parses."""

import pytest

from radix_ops.data.shapes import adapter
from radix_ops.engine.errors import UserError
from radix_ops.engine.inputs import Record
from radix_ops_command.arguments import columns

ROW = {"question": "q", "passages": [{"text": "a", "of": {"url": "x"}}, {"text": "b", "of": {"url": "y"}}], "id": 7}


def adapted(task, row, option="", **how):
    return adapter(task, columns(option) if option else {}, **how)(Record("rows.jsonl, line 2", row)).fields


def test_dots_go_into_objects_and_over_arrays():
    found = adapted("rerank", ROW, "query=question,documents=passages.text")
    assert found == {"query": "q", "documents": ["a", "b"], "id": 7}
    found = adapted("rerank", ROW, "query=question,documents=passages.of.url")
    assert found["documents"] == ["x", "y"]
    arrays = {"question": "q", "passages": {"text": ["a", "b"], "id": [1, 2]}}
    assert adapted("rerank", arrays, "query=question,documents=passages.text")["documents"] == ["a", "b"]


def test_a_name_may_hold_dots():
    assert adapted("rerank", {"q.text": "q", "d": ["a"]}, "query=q.text,documents=d") == {
        "query": "q",
        "documents": ["a"],
    }


def test_named_columns_may_make_a_shape_of_the_hub():
    row = {"prompt": "q", "options": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    found = adapted("score", row, "question=prompt,choices=options")
    assert found == {"question": "q", "choices": ["a", "b"], "gold": 1}


def test_a_named_key_decides_between_two_readings():
    row = {"context": "c", "question": "q", "choices": ["a"]}
    assert adapted("score", row, "context=context") == row
    assert adapted("score", row, shape="question") == {"question": "q", "choices": ["a"]}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pasages.text", "has no column 'pasages'; it has 'passages', "),
        ("passages.txt", "has no column 'txt' in passages[0]; it has 'text', 'of'"),
        ("question.text", "has no column 'text' in question, which is a string"),
    ],
)
def test_an_unknown_column_lists_those_that_there_are_nearest_first(path, message):
    with pytest.raises(UserError) as error:
        adapted("rerank", ROW, f"query=question,documents={path}")
    assert f"rows.jsonl, line 2 {message}" in str(error.value)
