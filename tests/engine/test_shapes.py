"""Rows as the hub's data sets have them become questions and queries; prompts are those of lm-evaluation-harness."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest

from radix_ops.engine.errors import UserError
from radix_ops.engine.inputs import Record
from radix_ops.engine.scoring import parse_item
from radix_ops.engine.shapes.recognition import recognised

ARC = {
    "id": "Mercury_7175875",
    "question": "An astronomer observes that a planet rotates faster after a meteorite impact. Which is likely?",
    "choices": {
        "text": ["Planetary density will decrease.", "Years will become longer.", "Days will become shorter."],
        "label": ["A", "B", "C"],
    },
    "answerKey": "C",
}
ARC_DIGITS = ARC | {
    "choices": {"text": ["radio waves", "X-rays", "visible light"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
COMMONSENSE = {
    "id": "075e483d21c29a511267ef62bedc0461",
    "question": " The sanctions against the school were a punishing blow, and they seemed to what the efforts?",
    "question_concept": "punishing",
    "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["ignore", "enforce", "authoritarian", "yell at", "avoid"]},
    "answerKey": "A",
}
OPENBOOK = {
    "id": "7-980",
    "question_stem": "The sun is responsible for",
    "choices": {
        "text": ["puppies learning new tricks", "children growing up", "flowers wilting in a vase", "plants sprouting"],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "D",
}
MMLU = {
    "question": "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q. ",
    "subject": "abstract_algebra",
    "choices": ["0", "4", "2", "6"],
    "answer": 1,
}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "[header] How to remove a roof [title] Wear a harness. [step] A man is sitting  on a roof.",
    "ctx_b": "he Starts pulling",
    "ctx": "[header] How to remove a roof [title] Wear a harness. he Starts pulling",
    "endings": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off. [substeps] Use a rope.",
        "is holding a rubik's cube.",
        " starts pulling up roofing on a roof.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}
PIQA = {
    "goal": "How do I ready a guinea pig cage for its new occupants?",
    "sol1": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips.",
    "sol2": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material.",
    "label": 0,
}
WINOGRANDE = {
    "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
    "option1": "Sarah",
    "option2": "Maria",
    "answer": "2",
}
BOOLQ = {
    "question": "does ethanol take more energy make that produces",
    "passage": "All biomass goes through at least some of these steps: it needs to be grown, collected, dried.",
    "idx": 0,
    "label": 0,
}
SCIQ = {
    "question": "What type of organism is commonly used in preparation of foods such as cheese and yogurt?",
    "distractor3": "viruses",
    "distractor1": "protozoa",
    "distractor2": "gymnosperms",
    "correct_answer": "mesophilic organisms",
    "support": " Mesophiles grow best in moderate temperature.",
}
MSMARCO = {
    "answers": ["Approximately $15,000 per year."],
    "passages": {
        "is_selected": [1, 0],
        "passage_text": ["The average Walgreens salary ranges from $15,000.", "The average revenue in 2011 of a store"],
        "url": ["http://a", "http://b"],
    },
    "query": "walgreens store sales average",
    "query_id": 9652,
    "query_type": "numeric",
    "wellFormedAnswers": [],
}
MTEB = {"query": "angularjs infinite scroll", "positive": ["a", "b"], "negative": ["c"]}


def fields_of(task, row, name=None):
    return recognised(task, Record("rows.jsonl, line 3", row), name).fields


def yaml_of(task: str) -> dict:
    """Read a task of lm-evaluation-harness; what are functions there become their names."""
    yaml = pytest.importorskip("yaml")
    lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    path = Path(lm_eval.__file__).parent / "tasks" / task
    return yaml.load(path.read_text(), Loader)


def harness(task: str, row: dict) -> tuple[str, list[str], int]:
    """Return context, choices with their delimiter, and the index of the right one as the harness has them."""
    config, utils = yaml_of(task), importlib.import_module("lm_eval.utils")

    def value(text):
        return row[text] if text in row else utils.apply_template(text, row)

    choices, gold = config["doc_to_choice"], config["doc_to_target"]
    choices = choices if isinstance(choices, list) else value(choices)
    choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
    return (
        value(config["doc_to_text"]),
        [f" {choice}" for choice in choices],
        int(value(gold)) if isinstance(gold, str) else gold,
    )


def test_contexts_are_those_of_the_harness():
    for task, row in (
        ("openbookqa/openbookqa.yaml", OPENBOOK),
        ("super_glue/boolq/default.yaml", BOOLQ),
        ("sciq/sciq.yaml", SCIQ),
    ):
        found = fields_of("score", row)
        assert (found["context"], found["choices"], found["gold"]) == harness(task, row), task


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("arc/arc_easy.yaml", ARC),
        ("arc/arc_easy.yaml", ARC_DIGITS),
        ("piqa/piqa.yaml", PIQA),
        ("mmlu/continuation/_continuation_template_yaml", MMLU),
    ],
)
def test_questions_are_asked_as_by_the_harness(task, row):
    item = parse_item(recognised("score", Record("", row)))
    assert (item.context, item.choices, item.extra["gold"]) == harness(task, row)


@pytest.mark.parametrize(
    ("task", "row", "gold", "letters"),
    [("mmlu/default/_default_template_yaml", MMLU, 1, True), ("commonsense_qa/default.yaml", COMMONSENSE, 0, False)],
)
def test_letters_are_asked_as_by_the_harness(task, row, gold, letters):
    item = parse_item(recognised("score", Record("", row)), letters)
    config, utils = yaml_of(task), importlib.import_module("lm_eval.utils")
    assert item.context == utils.apply_template(config["doc_to_text"], row)
    assert item.choices == [f" {letter}" for letter in config["doc_to_choice"]]
    assert item.extra["gold"] == gold


def test_hellaswag_is_preprocessed_as_by_the_harness():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils", exc_type=ImportError)
    datasets = pytest.importorskip("datasets")
    expected = utils.process_docs(datasets.Dataset.from_list([HELLASWAG]))[0]
    found = fields_of("score", HELLASWAG)
    assert found["context"] == expected["query"]
    assert found["choices"] == [f" {choice}" for choice in expected["choices"]]
    assert found["gold"] == expected["gold"] == 3
    assert (found["ind"], found["split"], found.keys() & {"endings", "label", "ctx"}) == (24, "val", set())


def test_winogrande_scores_what_is_behind_the_blank():
    utils = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande", exc_type=ImportError)
    found = fields_of("score", WINOGRANDE)
    assert found["contexts"] == utils.doc_to_choice(WINOGRANDE)
    assert found["continuation"] == " " + utils.doc_to_target(WINOGRANDE)
    assert found["gold"] == utils.doc_to_text(WINOGRANDE)


def test_other_keys_stay():
    found = fields_of("score", ARC)
    assert found["id"] == "Mercury_7175875"
    assert "answerKey" not in found
    assert fields_of("score", MMLU)["subject"] == "abstract_algebra"
    assert fields_of("score", COMMONSENSE)["question_concept"] == "punishing"


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (MMLU | {"answer": "B"}, 1),
        (MMLU | {"answer": "6"}, 3),
        (MMLU | {"answer": "1"}, 1),
        (MMLU | {"choices": ["0", "1", "3", "2"], "answer": "1"}, 1),
        (MMLU | {"answer": "-1"}, None),
        (MMLU | {"choices": ["0", "-1"], "answer": "-1"}, 1),
        (MMLU | {"answer": -1}, None),
        (MMLU | {"answer": None, "gold": 2}, 2),
        (ARC | {"answerKey": ""}, None),
        (HELLASWAG | {"label": ""}, None),
        (PIQA | {"label": -1}, None),
        (WINOGRANDE | {"answer": ""}, None),
        (BOOLQ | {"label": None, "answer": True}, 1),
        (BOOLQ | {"label": None, "answer": "False"}, 0),
        (BOOLQ | {"label": None, "answer": "true"}, 1),
        (BOOLQ | {"label": "1"}, 1),
        (COMMONSENSE, 0),
        (ARC | {"gold": ""}, 2),
        (MMLU | {"gold": "", "label": ""}, 1),
    ],
)
def test_the_right_choice_is_an_index_and_test_sets_have_none(row, gold):
    assert fields_of("score", row).get("gold") == gold


@pytest.mark.parametrize("row", [ARC, COMMONSENSE, OPENBOOK, HELLASWAG, PIQA, WINOGRANDE, BOOLQ, MMLU], ids=str)
def test_gold_goes_before_what_a_shape_says_of_the_right_choice(row):
    answer = fields_of("score", row)["gold"]
    assert fields_of("score", row | {"gold": 1 - min(answer, 1)})["gold"] == 1 - min(answer, 1)
    unanswered = {key: value for key, value in row.items() if key not in ("answer", "answerKey")}
    unanswered |= {"label": -1} if "label" in row else {}
    assert fields_of("score", unanswered | {"gold": 1})["gold"] == 1


def test_relevance_goes_before_what_a_shape_says_of_documents():
    assert fields_of("rerank", MTEB | {"relevance": [2, 1, 0]})["relevance"] == [2, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ARC | {"answerKey": "E"}, "\"answerKey\" is 'E', which must be one of the labels"),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}}, '"choices" has 2 of text and 1 of label'),
        (MMLU | {"answer": 4}, '"answer" is 4; it must be a whole number from 0 to 3'),
        (
            MMLU | {"answer": "seven"},
            "which is none of the 4 choices; it must be an index from 0, a letter or the text",
        ),
        (MMLU | {"choices": ["A", "C", "B", "D"], "answer": "B"}, "which is several of the 4 choices"),
        (MMLU | {"choices": ["0", "2", "4", "6"], "answer": "2"}, 'under "gold" a number is an index'),
        (MMLU | {"choices": ["the sea", "a hill"], "answer": "2"}, "which is none of the 2 choices"),
        (MMLU | {"label": 2}, '"answer" and "label", and each may say which choice is right'),
        (HELLASWAG | {"label": "--1"}, "\"label\" is '--1'; it must be a whole number from 0 to 3"),
        (HELLASWAG | {"label": "1" * 5000}, "it must be a whole number from 0 to 3"),
        (MMLU | {"answer": np.array([1, 2])}, "which is none of the 4 choices"),
        (ARC | {"answerKey": np.array(["A", "B"])}, "which must be one of the labels"),
        (HELLASWAG | {"label": "4"}, "\"label\" is '4'; it must be a whole number from 0 to 3"),
        (
            COMMONSENSE | {"choices": {"text": ["a"] * 27, "label": list(map(str, range(27)))}, "answerKey": "1"},
            "has 27 choices, and 26 letters name them",
        ),
        (WINOGRANDE | {"sentence": "no blank"}, '"sentence" must hold a blank, "_"'),
        (PIQA | {"sol2": 3}, '"sol2" is a number; it must be a string'),
    ],
)
def test_a_row_that_lacks_what_its_shape_has_is_named(row, message):
    with pytest.raises(UserError) as error:
        fields_of("score", row)
    assert str(error.value).startswith("rows.jsonl, line 3")
    assert message in str(error.value)


def test_msmarco_rows_keep_their_judgements():
    found = fields_of("rerank", MSMARCO)
    assert found["documents"] == MSMARCO["passages"]["passage_text"]
    assert (found["relevance"], found["query_id"], found["query_type"]) == ([1, 0], 9652, "numeric")
    assert "passages" not in found
    entries = [
        dict(zip(MSMARCO["passages"], entry, strict=True)) for entry in zip(*MSMARCO["passages"].values(), strict=True)
    ]
    assert fields_of("rerank", MSMARCO | {"passages": entries}) == found


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        (
            [{"passage_text": "a"}, {"passage_text": "b", "is_selected": 1}],
            '"passages"[0] has no "is_selected", and others',
        ),
        ([{"passage_text": "a"}, {"passage_text": None, "is_selected": 1}], '"passages"[1] has no "passage_text", and'),
        ({"passage_text": ["a", "b"], "is_selected": [1]}, '"passages" has 2 of passage_text and 1 of is_selected'),
        ({"passage_text": "a", "is_selected": [1]}, '"passages".passage_text is a string; it must be an array'),
    ],
)
def test_passages_that_do_not_fit_together_are_named(passages, message):
    with pytest.raises(UserError) as error:
        fields_of("rerank", MSMARCO | {"passages": passages})
    assert message in str(error.value)


def test_positives_come_before_negatives():
    expected = {"query": MTEB["query"], "documents": ["a", "b", "c"], "relevance": [1, 1, 0]}
    assert fields_of("rerank", MTEB) == expected
    assert fields_of("rerank", {"query": MTEB["query"], "pos": ["a", "b"], "neg": ["c"]}) == expected
    assert fields_of("rerank", {"query": "q", "positive": "a", "negative": "c"})["documents"] == ["a", "c"]
    tevatron = {
        "query_id": "4",
        "query": "q",
        "positive_passages": [{"docid": "7", "title": "t", "text": "a"}],
        "negative_passages": [{"docid": "9", "title": "", "text": "c"}],
    }
    found = fields_of("rerank", tevatron)
    assert found["documents"] == [{"id": "7", "title": "t", "text": "a"}, {"id": "9", "title": "", "text": "c"}]
    assert (found["relevance"], found["query_id"]) == ([1, 0], "4")


@pytest.mark.parametrize(
    ("task", "row", "names"),
    [
        ("score", {"context": "c", "question": "q", "choices": ["a"]}, ("context", "question")),
        ("score", {"context": "c", "choices": ["a"], "input_ids": [1, 2]}, ("ids", "context")),
        ("score", {"text": "c", "input_ids": [1, 2]}, ("ids", "text")),
        ("rerank", MTEB | {"documents": ["a"]}, ("documents", "mteb")),
        ("rerank", MTEB | {"passages": MSMARCO["passages"]}, ("msmarco", "mteb")),
        ("embed", {"text": "t", "input_ids": [1]}, ("ids", "text")),
    ],
)
def test_a_row_of_two_readings_names_both_and_what_decides(task, row, names):
    with pytest.raises(UserError) as error:
        fields_of(task, row)
    for name in names:
        assert f"({name})" in str(error.value)
        assert f"--shape {name}" in error.value.as_option
    assert "leave out the keys of one" in str(error.value)
    first, second = (fields_of(task, row, name) for name in names)
    assert first != second


def test_the_named_shape_must_fit():
    with pytest.raises(
        UserError, match='is no row of --shape mteb, which has "query" and "positive" and "negative"; it'
    ):
        fields_of("rerank", MSMARCO, "mteb")


def test_rows_of_no_shape_stay_as_they_are():
    for task, row in (("score", {"question": "q"}), ("rerank", {"query": "q"}), ("embed", {"body": "b"})):
        assert fields_of(task, row) is row


def test_a_row_of_a_beir_corpus_is_one_text():
    row = {"_id": "MED-10", "title": "Statin Use", "text": "Recent studies", "metadata": {}}
    assert fields_of("embed", row) == {"_id": "MED-10", "text": "Statin Use Recent studies", "metadata": {}}
    assert fields_of("embed", {"_id": "PLAIN-2", "text": "a query"}) == {"_id": "PLAIN-2", "text": "a query"}
    assert fields_of("embed", row | {"title": ""})["text"] == "Recent studies"


PRO = {
    "question_id": 70,
    "question": "Which river flows through Paris?",
    "options": ["the Rhine", "the Seine", "the Thames"],
    "answer": "B",
    "answer_index": 1,
    "category": "geography",
}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (BOOLQ | {"label": 1, "answer": False}, '"label" is 1 and "answer" is False'),
        (BOOLQ | {"label": "0", "answer": "True"}, "\"label\" is '0' and \"answer\" is 'True'"),
        (BOOLQ | {"label": 0, "answer": "yes"}, '"label" is 0 and "answer" is \'yes\''),
        (BOOLQ | {"label": 1, "answer": 0}, '"label" is 1 and "answer" is 0'),
        (PRO | {"answer": "C"}, '"answer_index" is 1 and "answer" is \'C\''),
        (PRO | {"answer_index": 0}, '"answer_index" is 0 and "answer" is \'B\''),
    ],
)
def test_answers_that_contradict_each_other_are_named(row, said):
    with pytest.raises(UserError) as caught:
        fields_of("score", row)
    assert str(caught.value).startswith(f"rows.jsonl, line 3: {said}, which name different choices as the right one")
    assert caught.value.as_option.endswith("; --drop answer leaves that one out")
    dropped = {key: value for key, value in row.items() if key != "answer"}
    assert fields_of("score", dropped)["gold"] in (0, 1)
    assert fields_of("score", row | {"gold": 1})["gold"] == 1


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (BOOLQ | {"label": 1, "answer": True}, 1),
        (BOOLQ | {"label": 1, "answer": "Ethanol takes more energy than it gives"}, 1),
        (BOOLQ | {"label": -1, "answer": True}, 1),
        (BOOLQ | {"label": "", "answer": "false"}, 0),
        (BOOLQ | {"label": -1, "answer": "unknown"}, None),
        (PRO, 1),
        (PRO | {"answer": ""}, 1),
        (PRO | {"answer": "the Seine"}, 1),
    ],
)
def test_answers_that_agree_or_say_nothing_are_one(row, gold):
    assert fields_of("score", row).get("gold") == gold


COLUMNS = {"question": " Find the degree of the field. ", "A": "0", "B": "4", "C": "2", "D": "6", "answer": "B"}


@pytest.mark.parametrize("names", [("question", "answer"), ("Question", "Answer"), ("input", "target")], ids=str)
def test_mmlu_in_columns_is_asked_as_mmlu_with_choices(names):
    row = {{"question": names[0], "answer": names[1]}.get(key, key): value for key, value in COLUMNS.items()}
    choices = [COLUMNS[letter] for letter in "ABCD"]
    expected = {"question": COLUMNS["question"], "choices": choices, "answer": 1, "subject": "algebra"}
    for letters in (False, True):
        found, whole = (
            parse_item(recognised("score", Record("", row)), letters)
            for row in (row | {"subject": "algebra"}, expected)
        )
        assert (found.context, found.choices, found.extra) == (whole.context, whole.choices, whole.extra)
    unanswered = {key: value for key, value in row.items() if key != names[1]}
    assert "gold" not in fields_of("score", unanswered)
    # A letter is that of a column, whatever the choices are.
    assert fields_of("score", row | {"A": "B", "B": "C", names[1]: "A"})["gold"] == 0
    with pytest.raises(UserError, match=f"\"{names[1]}\" is 'E', which must be one of the labels, 'A', 'B', 'C', 'D'"):
        fields_of("score", row | {names[1]: "E"})
    with pytest.raises(UserError, match=f'"{names[1]}" is 2, which must be one of the labels'):
        fields_of("score", row | {names[1]: 2})


PAIRS = [
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text_a", "text_b"), ("text1", "text2"),
    ("question1", "question2"), ("question", "sentence"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_to_label_are_read(first, second):
    row = {first: "the sea", second: "is salty", "label": 1, "idx": 7}
    expected = {"text": "the sea", "text_pair": "is salty", "label": 1, "idx": 7}
    for task in ("classify", "inspect"):
        assert fields_of(task, row) == expected
    with pytest.raises(UserError, match=f'"{second}" is a number; it must be a string'):
        fields_of("classify", row | {second: 3})
    half = {first: "the sea", "label": 1}
    assert fields_of("classify", half) == half
    with pytest.raises(UserError, match="can be read by"):
        fields_of("classify", row | {"text": "a river"})
    assert fields_of("inspect", row | {"text": "a river"}) == row | {"text": "a river"}
    assert fields_of("prompt", row) == row


def test_texts_to_label_are_read():
    assert fields_of("classify", {"sentence": "the sea", "label": 1, "idx": 7}) == {
        "text": "the sea",
        "label": 1,
        "idx": 7,
    }
    several = {"text": "the sea", "labels": [2, 0], "id": "x"}
    assert fields_of("classify", several) == {"text": "the sea", "gold": [2, 0], "id": "x"}
    assert fields_of("classify", several | {"gold": [1]}) == {"text": "the sea", "gold": [1], "id": "x"}
    ids = {"input_ids": [3, 4], "labels": 1}
    assert fields_of("classify", ids) == {"input_ids": [3, 4], "gold": 1}
    with pytest.raises(UserError, match='has "label" and "labels", and each may say which label is right') as caught:
        fields_of("classify", several | {"label": 1})
    assert "--column gold=label or --column gold=labels says which" in caught.value.as_option
