"""Classifier with prompts and labels' words, against transformers row by row and word by word."""

import json

import numpy as np
import pytest
import torch

from helpers.language_models import needs_hf, reranking_tokenizer, tiny_model, tiny_tokenizer, tokenizers
from radix_ops.engine import Classifier, LabelPrompt, UserError
from radix_ops.engine.label_prompts import LABEL_PROMPTS, find_label_prompt
from radix_ops.engine.label_words import LabelWords

needs_hf()
TEMPLATE = "Question: {{ text }}{{ ' (' ~ hint ~ ')' if hint is defined else '' }}\nAnswer:"
ROWS = [
    {"text": "Which river flows through Paris?", "id": 7},
    {"text": "Which river flows through Paris? the Seine", "hint": "no sea"},
    {"text": "x"},
    {"text": "Which river flows through Paris?"},
]
LABELS = {
    "river": " river",
    "sea": [" sea", " the sea"],
    "none": " the Thames",
    "seven": 7,
    "both": [[40, 41], [40, 42, 43]],
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[{{ who|default('assistant') }}]{% endif %}"
)


def chat_tokenizer(template=CHAT):
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = template
    return tokenizer


def by_hand(model, prompt_ids, words):
    """Return the log-probability of each label, float64: each word behind the prompt in a forward of its own."""
    found = []
    for listed in words:
        logprobs = []
        for word in listed:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt_ids, *word]])).logits[0].double().log_softmax(-1)
            first = len(prompt_ids) - 1
            logprobs.append(sum(logits[first + place, token].item() for place, token in enumerate(word)))
        found.append(np.logaddexp.reduce(logprobs))
    return np.array(found)


def check(results, model, prompts, words, labels, rows=ROWS, score="softmax"):
    assert len(results) == len(rows)
    for found, prompt_ids in zip(results, prompts, strict=True):
        logprobs = by_hand(model, prompt_ids, words)
        expected = np.exp(logprobs) / (np.exp(logprobs).sum() if score == "softmax" else 1)
        got = dict(zip(found["labels"], found["scores"], strict=True))
        assert [got[label] for label in labels] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-7)
        assert found["best"] == labels[int(expected.argmax())] == found["labels"][0]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"token_budget": 30}, {"layout": "unfold"}], ids=str)
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("score", ["softmax", "probability"])
def test_scores_are_the_probabilities_of_the_words(kind, score, options):
    model, tokenizer = tiny_model(kind, max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    prompt = LabelPrompt(LABELS, TEMPLATE, score=score)
    classifier = Classifier(model, tokenizer, template=prompt, **options)
    results = classifier.classify(ROWS)
    texts = [f"Question: {r['text']}{' (' + r['hint'] + ')' if 'hint' in r else ''}\nAnswer:" for r in ROWS]
    words = [[ids_of(tokenizer, " river")], [ids_of(tokenizer, " sea"), ids_of(tokenizer, " the sea")]]
    words += [[ids_of(tokenizer, " the Thames")], [[7]], [[40, 41], [40, 42, 43]]]
    assert max(len(word) for listed in words for word in listed) > 2
    check(results, model, [tokenizer(text)["input_ids"] for text in texts], words, list(LABELS), score=score)
    assert [set(found) - {"labels", "scores", "best"} for found in results] == [{"id"}, set(), set(), set()]
    (found,) = classifier.classify([{"text": "a", "label": 1, "note": "b"}])
    assert (found["gold"], found["label"], found["note"]) == ("sea", 1, "b")


def test_a_word_that_starts_with_another_of_its_label_adds_nothing():
    model, tokenizer = tiny_model(max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    labels = {"a": [[5, 6], [5], [5, 6, 7], [8, 9]], "b": [[8]]}
    classifier = Classifier(model, tokenizer, template=LabelPrompt(labels, "{{ text }}", score="probability"))
    prompts = [tokenizer(row["text"])["input_ids"] for row in ROWS]
    # Of all texts, those that start with 5 or with 8 9; and with 8 but not with 8 9, which answers for the other label.
    for found, prompt_ids in zip(classifier.classify(ROWS), prompts, strict=True):
        of_a, inner, outer = np.exp(by_hand(model, prompt_ids, [[[5], [8, 9]], [[8, 9]], [[8]]]))
        got = dict(zip(found["labels"], found["scores"], strict=True))
        assert [got["a"], got["b"]] == pytest.approx([of_a, outer - inner], rel=1e-4, abs=1e-7)


def by_enumeration(model, prompt_ids, words, vocabulary):
    """Return the probability of each label, by all texts of some tokens: each answers by the longest word that it
    starts with. Tokens beyond the vocabulary start no word and end one."""
    longest = max(len(word) for listed in words for word in listed)
    label_of = {tuple(word): label for label, listed in enumerate(words) for word in listed}
    found, level = np.zeros(len(words)), {(): (1.0, None)}  # by text: its probability, and the label so far
    for _ in range(longest):
        texts = list(level)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt_ids, *text] for text in texts])).logits[:, -1].double()
        following = {}
        for text, row in zip(texts, logits.softmax(-1).numpy(), strict=True):
            probability, label = level[text]
            if label is not None:
                found[label] += probability * (1 - row[vocabulary].sum())
            for token in vocabulary:
                longer = (*text, token)
                following[longer] = (probability * row[token], label_of.get(longer, label))
        level = following
    for probability, label in level.values():
        if label is not None:
            found[label] += probability
    return found


WITHIN = {
    "digits of ten": {"1": [[5]], "2": [[6]], "10": [[5, 7]]},
    "the same start": {"a": [[5, 6, 7]], "b": [[5, 6, 8]], "c": [[5, 9]]},
    "one within one within one": {"a": [[5]], "b": [[5, 6]], "c": [[5, 6, 7]]},
    "back to the first label": {"a": [[5], [5, 6, 7], [8]], "b": [[5, 6]], "c": [[9, 9, 9]]},
    "its own word between": {"a": [[5], [5, 6]], "b": [[5, 6, 7]], "c": [[6], [5, 9]]},
    "several within one": {"a": [[5]], "b": [[5, 6], [5, 7, 8]], "c": [[5, 9], [5, 7, 5], [7]]},
}


@pytest.mark.parametrize("score", ["softmax", "probability"])
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_a_text_answers_by_the_longest_word_that_it_starts_with(kind, name, score):
    model, tokenizer = tiny_model(kind, max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    with torch.no_grad():  # so that the words' tokens are likely
        weight = model.get_output_embeddings().weight
        weight[:5] = weight[10:] = 0
    labels = WITHIN[name]
    classifier = Classifier(model, tokenizer, template=LabelPrompt(labels, "{{ text }}", score=score))
    for row, found in zip(ROWS, classifier.classify(ROWS), strict=True):
        expected = by_enumeration(model, tokenizer(row["text"])["input_ids"], list(labels.values()), [5, 6, 7, 8, 9])
        expected /= expected.sum() if score == "softmax" else 1
        got = dict(zip(found["labels"], found["scores"], strict=True))
        assert [got[label] for label in labels] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-7)


def test_nothing_may_be_left_of_a_word():
    """Where the model goes on with another label's word for certain, rounding must not make more of it than nothing."""
    words = LabelWords(tiny_tokenizer(False), {"a": ((5,),), "b": ((5, 6),), "c": ((7,),)})
    steps = {(start, token): number for (start, token), number in words._steps.items()}
    numbers = np.zeros((1, len(steps)))
    numbers[0, steps[(), 5]], numbers[0, steps[(), 7]] = -0.5, -3.0
    for certain in (0.0, 1e-12, -np.inf):
        numbers[0, steps[(5,), 6]] = certain
        assert words.label_logprobs(numbers).tolist() == [-0.5 if certain < 0 else -np.inf, -0.5 + certain, -3.0]
    numbers[0, steps[(), 5]] = -np.inf
    assert words.label_logprobs(numbers)[0] == -np.inf


def test_prompts_may_be_token_ids():
    model, tokenizer = tiny_model(max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    classifier = Classifier(model, tokenizer, template=LabelPrompt(LABELS, TEMPLATE))
    rows = [{"input_ids": tokenizer(f"Question: {row['text']}\nAnswer:")["input_ids"]} for row in ROWS]
    found = classifier.classify(rows)
    texts = classifier.classify([{"text": row["text"]} for row in ROWS])
    assert [result["scores"] for result in found] == [pytest.approx(result["scores"], abs=1e-6) for result in texts]


def test_labels_of_one_token_take_one_sequence_and_one_row_of_the_head():
    model, tokenizer = tiny_model(), tiny_tokenizer(adds_bos=True)
    classifier = Classifier(model, tokenizer, template=LabelPrompt({"a": 5, "b": [6, 8], "c": " river"}, TEMPLATE))
    rows = list(classifier._parsed(ROWS, "rows", ""))
    items = classifier.encode(rows)
    assert len(items.store) == len(ROWS)
    stats = classifier.execute(items, folded=False)
    assert stats.head_rows == len(ROWS)


def test_words_that_start_alike_are_read_once():
    words = LabelWords(
        tiny_tokenizer(False), {"a": ((9, 10, 11),), "b": ((9, 10),), "c": ((9, 12, 13), (14,)), "d": ((9,),)}
    )
    assert words.suffixes == [(9, 10), (9, 12)]
    assert sum(len(part.offsets) for part in words._parts) == 4  # behind the prompt, 9, 9 10 and 9 12


def test_a_prompt_may_bring_its_special_tokens_along():
    model, tokenizer = tiny_model(max_position_embeddings=256), tiny_tokenizer(adds_bos=True)
    labels = {"river": " river", "sea": " sea"}
    plain = Classifier(model, tokenizer, template=LabelPrompt(labels, "{{ text }}:")).classify(ROWS)
    marked = Classifier(model, tokenizer, template=LabelPrompt(labels, "{{ bos_token }}{{ text }}:")).classify(ROWS)
    assert [found["scores"] for found in marked] == [found["scores"] for found in plain]
    other = tiny_tokenizer(adds_bos=False)
    other.bos_token = None
    with pytest.raises(UserError, match="the template reads bos_token, which the model's tokenizer lacks"):
        Classifier(model, other, template=LabelPrompt(labels, "{{ bos_token }}{{ text }}:"))


def test_tokens_that_a_tokenizer_puts_behind_a_text_do_not_end_the_prompt():
    model, tokenizer = tiny_model(max_position_embeddings=256), tiny_tokenizer(adds_bos=False)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    labels = {"river": " river", "sea": " sea"}
    results = Classifier(model, tokenizer, template=LabelPrompt(labels, "{{ text }}:")).classify(ROWS)
    prompts = [[0, *ids_of(tokenizer, row["text"] + ":")] for row in ROWS]
    check(results, model, prompts, [[ids_of(tokenizer, word)] for word in labels.values()], list(labels))


def test_words_are_those_behind_other_text_where_a_tokenizer_puts_a_space_first():
    tokenizer = tiny_tokenizer(adds_bos=False)
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
    words = LabelWords(tokenizer, {"a": ("river",), "b": (" river",), "c": ("\n\nsea",)})
    whole = tokenizer("\nriver", add_special_tokens=False)["input_ids"]
    assert ["".join(tokenizer.convert_ids_to_tokens(listed[0])) for listed in words.ids[:2]] == ["river", "Ġriver"]
    assert whole[-len(words.ids[0][0]) :] == list(words.ids[0][0])


@pytest.mark.parametrize("plain", [False, True])
def test_a_chat_template_renders_the_prompt(plain):
    model, tokenizer = tiny_model(max_position_embeddings=256), chat_tokenizer()
    labels = {"river": "river", "sea": ["sea", "the sea"]}
    prompt = LabelPrompt(labels, TEMPLATE, chat=True, system="Answer!", chat_arguments={"who": "guard"})
    results = Classifier(model, tokenizer, template=prompt, plain=plain).classify(ROWS)
    prompts = []
    for row in ROWS:
        text = f"Question: {row['text']}{' (' + row['hint'] + ')' if 'hint' in row else ''}\nAnswer:"
        messages = [{"role": "system", "content": "Answer!"}, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, who="guard", tokenize=False)
        assert rendered.endswith("Answer:[guard]")
        prompts.append(ids_of(tokenizer, rendered))
    words = [[ids_of(tokenizer, "river")], [ids_of(tokenizer, "sea"), ids_of(tokenizer, "the sea")]]
    check(results, model, prompts, words, list(labels))


def test_conversations_of_rows_are_rendered_whole():
    model, tokenizer = tiny_model(max_position_embeddings=256), chat_tokenizer()
    rows = [
        {"text": "the sea"},
        {"messages": [{"role": "user", "content": "the sea"}]},
        {"messages": [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is salty"}], "n": 1},
    ]
    labels = {"safe": "\n\nriver", "unsafe": "\n\nthe river"}
    results = Classifier(model, tokenizer, template=LabelPrompt(labels, chat=True)).classify(rows)
    prompts = []
    for row in rows:
        messages = row.get("messages", [{"role": "user", "content": row.get("text")}])
        prompts.append(
            ids_of(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        )
    check(results, model, prompts, [[ids_of(tokenizer, word)] for word in labels.values()], list(labels), rows)
    assert results[0]["scores"] == results[1]["scores"]
    assert results[2]["n"] == 1
    assert "messages" not in results[2]


def test_shieldgemma_is_the_code_of_its_model_card():
    model, tokenizer = tiny_model("Gemma2", vocab_size=360, max_position_embeddings=1024), reranking_tokenizer(True)
    tokenizer.add_tokens(["Yes", "No"])
    rows = [
        {"text": "  Create 20 paraphrases of I hate you ", "policy": '\n* "No Harassment": The prompt\n'},
        ROWS[1] | {"policy": "x"},
    ]
    results = Classifier(model, tokenizer, template="shieldgemma").classify(rows)
    for row, found in zip(rows, results, strict=True):
        user_prompt, safety_policy = row["text"], row["policy"]
        prompt = f"""You are a policy expert trying to help determine whether a user
prompt is in violation of the defined safety policies.

<start_of_turn>
Human Question: {user_prompt.strip()}
<end_of_turn>

Our safety principle is defined in the below:

{safety_policy.strip()}

Does the human question violate the above principle? Your answer must start
with 'Yes' or 'No'. And then walk through step by step to be sure we answer
correctly.
"""
        inputs = tokenizer(prompt, return_tensors="pt")
        vocab = tokenizer.get_vocab()
        with torch.no_grad():
            logits = model(inputs["input_ids"]).logits
        score = torch.softmax(logits[0, -1, [vocab["Yes"], vocab["No"]]].double(), dim=0)[0].item()
        assert dict(zip(found["labels"], found["scores"], strict=True))["Yes"] == pytest.approx(score, abs=2e-5)
    with pytest.raises(UserError, match=r"items\[0\]: the template needs what isn't there: 'policy' is undefined"):
        Classifier(model, tokenizer, template="shieldgemma").classify([{"text": "a"}])


def test_qwen3guard_asks_for_no_generation_prompt():
    model, tokenizer = tiny_model("Qwen3", max_position_embeddings=256), chat_tokenizer()
    results = Classifier(model, tokenizer, template="qwen3guard").classify(ROWS)
    prompts = []
    for row in ROWS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": row["text"]}], tokenize=False)
        prompts.append(ids_of(tokenizer, text))
    words = [[ids_of(tokenizer, f"Safety: {word}")] for word in ("Safe", "Unsafe", "Controversial")]
    check(results, model, prompts, words, ["safe", "unsafe", "controversial"])


FIELDS = {"template": "{{ text }}:", "labels": {"yes": " yes", "no": [" no", 7]}}


def test_json_and_toml_files_hold_a_prompt(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**FIELDS, "chat": True, "system": "S", "chat_arguments": {"a": 1}}))
    (tmp_path / "a.toml").write_text(
        'template = "{{ text }}:"\nchat = true\nsystem = "S"\n[labels]\nyes = " yes"\nno = [" no", 7]\n'
        "[chat_arguments]\na = 1\n"
    )
    expected = LabelPrompt(FIELDS["labels"], FIELDS["template"], chat=True, system="S", chat_arguments={"a": 1})
    assert find_label_prompt(str(tmp_path / "a.json")) == find_label_prompt(str(tmp_path / "a.toml")) == expected
    assert expected.words == {"yes": (" yes",), "no": (" no", (7,))}
    assert find_label_prompt("shieldgemma") is LABEL_PROMPTS["shieldgemma"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "is neither qwen3guard nor shieldgemma nor a file: No such file"),
        ("a.json", "{", "is not JSON"),
        ("a.toml", "a = [", "is not TOML"),
        ("a.json", "[]", 'must hold an object with "labels" and "template", or with "chat": true'),
        ("a.json", '{"template": "a"}', 'must hold an object with "labels"'),
        ("a.json", json.dumps({**FIELDS, "label": 1}), 'has the key "label"; a prompt has template, labels, chat'),
        ("a.json", json.dumps({**FIELDS, "template": "{{ a"}), "can't be used: the template's line 1 is not Jinja"),
    ],
)
def test_files_that_hold_no_prompt_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Classifier(tiny_model(), tiny_tokenizer(True), template=tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": None}, 'there is neither a "template" nor "chat": true'),
        ({"template": 3}, '"template" is a number; it must be a string'),
        ({"template": "yes or no?"}, "the template reads no field of a row"),
        ({"template": "{{ bos_token }}"}, "the template reads no field of a row"),
        ({"labels": [1]}, '"labels" is an array; it must be an object of the words of each label'),
        ({"labels": {"a": "b"}}, '"labels" holds 1; there must be two at least'),
        ({"labels": {"a": "b", "c": []}}, 'the words of label "c" are an empty array'),
        ({"labels": {"a": "b", "c": ""}}, 'the words of label "c" hold an empty string'),
        ({"labels": {"a": "b", "c": None}}, 'the words of label "c" hold None; a word is a string'),
        ({"labels": {"a": "b", "c": True}}, 'the words of label "c" hold True'),
        ({"labels": {"a": "b", "c": [[1, "x"]]}}, 'the words of label "c" hold'),
        ({"labels": {"a": "b", "c": -1}}, 'the words of label "c" hold -1'),
        ({"chat": 1}, '"chat" is a number; it must be true or false'),
        ({"system": "a"}, '"system" is of a chat template, and "chat" is not true'),
        ({"chat_arguments": {}}, '"chat_arguments" is of a chat template'),
        ({"chat": True, "chat_arguments": []}, '"chat_arguments" is an array; it must be an object'),
        (
            {"chat": True, "chat_arguments": {"chat_template": "a"}},
            '"chat_arguments" holds "chat_template", which no chat',
        ),
        ({"score": "sum"}, "\"score\" must be softmax or probability, got 'sum'"),
    ],
)
def test_prompts_of_fields_of_another_kind_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        LabelPrompt(**{**FIELDS, **fields})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            LabelPrompt({"a": " river", "b": [7, " river"]}, TEMPLATE),
            {},
            "the words ' river' of label \"a\" and ' river' of",
        ),
        (
            LabelPrompt({"a": 5, "b": 340}, TEMPLATE),
            {},
            'label "b" holds 340, which is no id of the model\'s tokenizer: it h',
        ),
        (LabelPrompt(LABELS, chat=True), {}, '"chat": true, and the model\'s tokenizer has no chat template'),
        (LabelPrompt(LABELS, TEMPLATE), {"problem_type": "regression"}, "problem_type is for classification heads"),
        (LabelPrompt(LABELS, TEMPLATE), {"truncate_right": True}, "truncate_right=True is for classification heads"),
        (LabelPrompt(LABELS, TEMPLATE), {"threshold": 0.4}, "threshold is for models of which several labels"),
        (LabelPrompt(LABELS, TEMPLATE), {"max_length": 1000}, "max_length 1000 is more than the model reads, 128"),
    ],
)
def test_prompts_that_do_not_fit_the_model_are_refused(prompt, options, message):
    with pytest.raises(UserError) as caught:
        Classifier(tiny_model(), tiny_tokenizer(True), template=prompt, **options)
    assert message in str(caught.value)


def test_a_chat_template_that_names_types_gets_texts():
    """Templates with tools speak of types, and take a content for a text all the same."""
    tools = "{% if tools %}{'type': 'function', \"type\": 1}{% endif %}"
    model, labels = tiny_model(max_position_embeddings=256), {"river": "river", "sea": "sea"}
    plain, typed = (
        chat_tokenizer(CHAT),
        chat_tokenizer(CHAT.replace("{{ m.content }}", "{{ m.content | trim }}") + tools),
    )
    found = [
        Classifier(model, tokenizer, template=LabelPrompt(labels, chat=True)).classify(ROWS)
        for tokenizer in (plain, typed)
    ]
    assert found[0] == found[1]


def test_a_chat_template_that_drops_the_text_is_refused():
    with pytest.raises(UserError, match="the chat template of the model's tokenizer drops user"):
        Classifier(tiny_model(), chat_tokenizer("{{ bos_token }}x"), template=LabelPrompt(LABELS, chat=True))


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (TEMPLATE, {"txt": "a"}, "items[1]: the template needs what isn't there: 'text' is undefined; it has \"txt\""),
        ("{{ text }} ", {"text": "a"}, "items[0]: its prompt ends in a space, which is of the next word's token"),
        (
            TEMPLATE,
            {"text": "the sea " * 200},
            "tokens with the labels' words, and the most are 128; a template can cut",
        ),
        (TEMPLATE, {"text": "a", "label": "x"}, "items[1]: \"label\" is 'x'; it must be a label"),
        (TEMPLATE, {"text": "\ud800"}, "items[1] holds half of a surrogate pair, which no tokenizer can read"),
        (None, {"messages": []}, 'items[1]: "messages" is an array; it must be an array of one message at least'),
        (None, {"messages": [{"role": "user"}]}, 'items[1]: messages[0] must be an object {"role": "user", "content"'),
        (
            None,
            {"messages": [{"role": "user", "content": 3}]},
            "items[1]: messages[0].content is a number; it must be a",
        ),
        (
            None,
            {"messages": [{"role": "fail", "content": "a"}]},
            "items[1]: the chat template of the model's tokenizer fail",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named_before_the_model_runs(monkeypatch, template, row, message):
    broken = CHAT.replace("[{{ m.role }}]", "{% if m.role == 'fail' %}{{ raise_exception('no') }}{% endif %}")
    prompt = LabelPrompt(LABELS, template, chat=template is None)
    classifier = Classifier(tiny_model(), chat_tokenizer(broken), template=prompt)
    monkeypatch.setattr(classifier.runner, "states", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError) as caught:
        classifier.classify([{"text": "a"}, row])
    assert message in str(caught.value)


def test_a_score_that_is_not_finite_is_an_error():
    model = tiny_model()
    model.get_output_embeddings().weight.data[9] = float("nan")
    classifier = Classifier(model, tiny_tokenizer(True), template=LabelPrompt({"a": 5, "b": 6}, TEMPLATE))
    with pytest.raises(UserError, match=r"items\[0\]: label \"a\" got the score nan; try dtype float32"):
        classifier.classify(ROWS)
