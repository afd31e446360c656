"""Scorer(chat=True), against the tokenizer's own chat template, lm-evaluation-harness and single sequences."""

from types import SimpleNamespace

import pytest

from helpers.language_models import Sequence, needs_hf, oracle, reranking_tokenizer, tiny_model
from radix_ops.engine import Scorer, UserError
from radix_ops.engine.inputs import Record

needs_hf()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
PARTS = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] if p is mapping %}{{ p['text'] }}{% endfor %}")
QUESTIONS = [
    {"context": "Which river flows through Paris?", "choices": ["the Seine", "the Rhine"]},
    {"context": "", "choices": ["yes", "no"]},
    {"question": "Is the sea saltier than the river?", "choices": ["yes", "no", "maybe"]},
]


def tokenizer_of(template, adds_bos=False):
    tokenizer = reranking_tokenizer(adds_bos)
    tokenizer.chat_template = template
    return tokenizer


def scorer_of(tokenizer, **options):
    return Scorer(tiny_model(vocab_size=360, max_position_embeddings=256), tokenizer, chat=True, **options)


def encoded(scorer, questions=QUESTIONS):
    items = [scorer.parse(Record(f"items[{n}]", question)) for n, question in enumerate(questions)]
    choices = scorer.encode(items)
    return [[(a.tolist(), b.tolist()) for a, b in choices[n]] for n in range(len(items))]


def messages_of(question, system):
    context = question["context"] if "context" in question else f"Question: {question['question']}\nAnswer:"
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": context}]


@pytest.mark.parametrize("system", [None, "Answer in a word."])
@pytest.mark.parametrize(
    ("template", "adds_bos"),
    [(CHATML, False), ("{{ bos_token }}" + CHATML, True), ("{{ bos_token }}" + CHATML, False)],
)
def test_tokens_are_those_of_lm_evaluation_harness(template, adds_bos, system):
    harness = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM
    tokenizer = tokenizer_of(template, adds_bos)
    lm = object.__new__(harness)
    lm.tokenizer, lm.backend, lm.enable_thinking, lm.chat_template_args = tokenizer, "causal", False, {}
    lm.add_bos_token = lm.custom_prefix_token_id = None
    lm._loglikelihood_tokens = lambda requests, disable_tqdm: [(context, rest) for _, context, rest in requests]
    requests = [
        SimpleNamespace(args=(lm.apply_chat_template(messages_of(question, system)), choice))
        for question in QUESTIONS
        for choice in question["choices"]
    ]
    found = [pair for pairs in encoded(scorer_of(tokenizer, system=system)) for pair in pairs]
    assert found == lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_an_answer_stands_behind_what_the_tokenizer_makes_of_the_chat(template, adds_bos):
    """The template brings all special tokens along: none stands twice, and none is added."""
    tokenizer = tokenizer_of(template, adds_bos)
    for question, pairs in zip(QUESTIONS, encoded(scorer_of(tokenizer, system="Be brief.")), strict=True):
        chat = tokenizer.apply_chat_template(
            messages_of(question, "Be brief."), add_generation_prompt=True, return_dict=False
        )
        for choice, (context, answer) in zip(question["choices"], pairs, strict=True):
            assert context + answer == chat + tokenizer.encode(choice, add_special_tokens=False)
        assert chat.count(tokenizer.bos_token_id) == template.startswith("{{ bos_token")


def test_scores_are_those_of_one_sequence_at_a_time():
    scorer = scorer_of(tokenizer_of(CHATML), system="Be brief.")
    results = scorer.score([{**question, "gold": "A"} for question in QUESTIONS])
    import numpy as np

    for result, pairs in zip(results, encoded(scorer), strict=True):
        wanted = [oracle(scorer.model, Sequence(0, np.array(a), np.array(b)))[0] for a, b in pairs]
        assert result["logprobs"] == pytest.approx(wanted, abs=1e-4)
        assert result["gold"] == 0


def test_letters_are_asked_in_a_chat():
    tokenizer = tokenizer_of(CHATML)
    question = {"question": "Which river?", "choices": ["Seine", "Rhine"]}
    ((first, second),) = encoded(scorer_of(tokenizer, letters=True), [question])
    text = tokenizer.decode(first[0] + first[1])
    assert text == "<|im_start|>user\nWhich river?\nA. Seine\nB. Rhine\nAnswer:<|im_end|>\n<|im_start|>assistant\nA"
    assert tokenizer.decode(second[1]).strip() == "B"


def test_a_template_of_typed_parts_gets_them():
    assert encoded(scorer_of(tokenizer_of(PARTS), system="s")) == encoded(scorer_of(tokenizer_of(CHATML), system="s"))


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "chat=True needs a chat template, and the model's tokenizer has none"),
        (NO_SYSTEM, {"system": "s"}, "the chat template of the model's tokenizer failed: .*No system role"),
        (DROPS_SYSTEM, {"system": "s"}, "the chat template of the model's tokenizer drops system"),
        ("{% for m in messages %}hello{% endfor %}", {}, "the chat template of the model's tokenizer drops user"),
        (CHATML, {"system": 3}, "system is a number; it must be a string"),
        (CHATML, {"chat": 1}, "chat must be True or False, got 1"),
        (CHATML, {"chat": False, "system": "s"}, "system is the system's message of a chat; it needs chat=True"),
    ],
)
def test_templates_and_arguments_that_cannot_be_used_are_named(template, options, message):
    with pytest.raises(UserError, match=message):
        Scorer(tiny_model(vocab_size=360), tokenizer_of(template), **{"chat": True, **options})


def test_templates_without_a_system_role_serve_chats_without_one():
    assert encoded(scorer_of(tokenizer_of(NO_SYSTEM))) == encoded(scorer_of(tokenizer_of(CHATML)))


def test_a_row_that_the_template_fails_for_is_named():
    template = "{% if 'sea' in messages[-1]['content'] %}{{ raise_exception('no sea') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"items\[2\]: the chat template .* failed: .*no sea"):
        scorer_of(tokenizer_of(template)).score(QUESTIONS)
