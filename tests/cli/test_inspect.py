"""radix-ops inspect: input formats, their errors, the report and its verdicts."""

import json
import zipfile

import numpy as np
import pytest
from expecttest import assert_expected_inline

from helpers.batches import trie_size
from helpers.commands import failing_inspect, inspect_json, report, write_jsonl
from helpers.language_models import TEXT, tiny_model, tiny_tokenizer
from radix_ops import cli

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def check_sequences(summary, sequences):
    lengths = sorted(map(len, sequences))
    assert summary["sequences"] == len(sequences)
    assert summary["tokens"] == sum(lengths)
    assert summary["rows"] == trie_size(sequences)
    assert (summary["lengths"]["min"], summary["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert sum(group["saved"] for group in summary["saved_by_sharers"]) == summary["tokens"] - summary["rows"]


CHAT = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": "yes"}]
OTHER_CHAT = [{"role": "user", "content": TEXT[0]}, {"role": "assistant", "content": "no, the sea"}]


def test_texts_with_the_tokenizers_special_tokens(capsys, tmp_path, tokenizer, tokenizer_folder):
    texts = [*TEXT, TEXT[0] + " And more.", ""]
    jsonl = write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "other": 1} for text in texts])
    plain = tmp_path / "texts.txt"
    plain.write_text("\n".join(texts) + "\n")
    for file in (jsonl, plain):
        summary = inspect_json(capsys, file, "--tokenizer", tokenizer_folder)
        check_sequences(summary, tokenizer(texts)["input_ids"])
        assert summary["lengths"]["min"] == 1
    summary = inspect_json(
        capsys, jsonl, "--tokenizer", tokenizer_folder, "--prompt", "Question: ", "--text-key", "text"
    )
    check_sequences(summary, tokenizer(["Question: " + text for text in texts])["input_ids"])
    assert summary["common_prefix"] == len(tokenizer("Question: ")["input_ids"]) - 1
    assert [p["text"] for p in summary["prefixes"] if p["start"] == 0] == ['"<s>Question:"']


def test_questions_are_read_as_score_reads_them(capsys, tmp_path, tokenizer, tokenizer_folder):
    questions = [{"context": TEXT[1], "choices": [" yes", " no", " the sea"]}, {"context": "the", "choices": [" sea"]}]
    file = write_jsonl(tmp_path / "questions.jsonl", questions)
    summary = inspect_json(capsys, file, "--tokenizer", tokenizer_folder)
    pairs = [q["context"] + choice for q in questions for choice in q["choices"]]
    check_sequences(summary, [ids[:-1] for ids in tokenizer(pairs)["input_ids"]])
    assert "`radix-ops score`" in summary["meaning"]


def test_queries_without_documents_have_no_sequences(capsys, tmp_path, tokenizer, tokenizer_folder):
    empty, whole = {"query": "a", "documents": []}, {"query": "sea", "documents": [{"id": 1, "text": "the sea"}]}
    file = write_jsonl(tmp_path / "queries.jsonl", [empty, whole, empty])
    summary = inspect_json(capsys, file, "--tokenizer", tokenizer_folder, "--template", "pairs")
    check_sequences(summary, tokenizer(["sea"], ["the sea"])["input_ids"])
    write_jsonl(file, [empty, empty])
    message = failing_inspect(capsys, file, "--tokenizer", tokenizer_folder, "--template", "pairs")
    assert "queries.jsonl: no sequences, so there is nothing to share" in message


def test_queries_need_a_template(capsys, tmp_path, tokenizer, tokenizer_folder):
    queries = [{"query": "Which river?", "documents": [TEXT[1], TEXT[2]]}, {"query": "sea", "documents": ["the sea"]}]
    file = write_jsonl(tmp_path / "queries.jsonl", queries)
    message = failing_inspect(capsys, file, "--tokenizer", tokenizer_folder)
    assert "queries.jsonl, line 1 holds a query and documents: --template must say" in message
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"text": "Query: {query}\nText: {document}\nRelevant:"}))
    summary = inspect_json(capsys, file, "--tokenizer", tokenizer_folder, "--template", template)
    pairs = [(q["query"], document) for q in queries for document in q["documents"]]
    heads = [f"Query: {query}\nText: {document}" for query, document in pairs]
    tail = tokenizer("\nRelevant:", add_special_tokens=False)["input_ids"]
    check_sequences(summary, [ids + tail for ids in tokenizer(heads, add_special_tokens=False)["input_ids"]])
    summary = inspect_json(capsys, file, "--tokenizer", tokenizer_folder, "--template", "pairs")
    check_sequences(summary, [tokenizer(query, document)["input_ids"] for query, document in pairs])


def test_conversations_and_training_data(capsys, tmp_path, tokenizer, tokenizer_folder):
    def rendered(chat):
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)

    cases = [
        ([{"messages": CHAT}, {"messages": OTHER_CHAT}], [rendered(CHAT), rendered(OTHER_CHAT)]),
        (
            [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER_CHAT[1:]}],
            [rendered(CHAT), rendered(OTHER_CHAT)],
        ),
        (
            [{"prompt": "the sea", "chosen": " yes", "rejected": " no"}],
            tokenizer(["the sea yes", "the sea no"])["input_ids"],
        ),
        # Texts and messages may take turns.
        (
            [
                {"prompt": "the sea", "completion": " yes"},
                {"prompt": CHAT[:1], "completion": CHAT[1:]},
                {"prompt": "the sea", "completion": ""},
            ],
            [tokenizer("the sea yes")["input_ids"], rendered(CHAT), tokenizer("the sea")["input_ids"]],
        ),
    ]
    for lines, sequences in cases:
        file = write_jsonl(tmp_path / "data.jsonl", lines)
        check_sequences(inspect_json(capsys, file, "--tokenizer", tokenizer_folder), sequences)


def test_token_ids_need_no_tokenizer(capsys, tmp_path):
    sequences = [[5, 6, 7], [5, 6, 8], [], [2**31 - 1]]
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": ids} for ids in sequences])
    summary = inspect_json(capsys, file)
    check_sequences(summary, sequences)
    assert summary["prefixes"] == [{"sequences": 2, "start": 0, "stop": 2, "saved": 2, "text": "[5, 6]"}]
    packed = tmp_path / "ids.npz"
    np.savez(packed, input_ids=np.concatenate(sequences).astype(np.int32), cu_seqlens=[0, 3, 6, 6, 7])
    assert inspect_json(capsys, packed) | {"file": 0, "meaning": 0} == summary | {"file": 0, "meaning": 0}


GOOD_LINES = {
    "input_ids": {"input_ids": [1]},
    "text": {"text": "a"},
    "messages": {"messages": CHAT},
    "prompt": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("text", {"txt": "a"}, 'line 2 has no "text" (a string); it has "txt"'),
        ("text", {"text": 3}, 'line 2: "text" is a number'),
        ("input_ids", {"text": "a"}, 'line 2: "input_ids" is missing; it must be an array of token ids'),
        ("input_ids", {"input_ids": "1 2"}, 'line 2: "input_ids" is a string'),
        ("input_ids", {"input_ids": [1, True]}, 'line 2: "input_ids"[1] is not a token id but a boolean'),
        ("input_ids", {"input_ids": [[1, 2]]}, 'line 2: "input_ids"[0] is not a token id but an array'),
        ("input_ids", {"input_ids": [1, -1]}, 'line 2: "input_ids"[1] is -1; a token id is from 0 to 2147483647'),
        ("input_ids", {"input_ids": [2**31]}, 'line 2: "input_ids"[0] is 2147483648; a token id is from 0'),
        ("messages", {"messages": []}, 'line 2: "messages" is an empty array; it must be an array of messages'),
        ("messages", {"messages": ["a"]}, 'line 2: "messages"[0] must be an object with a "role"'),
        ("messages", {"messages": CHAT, "tools": "x"}, 'line 2: "tools" is a string; it must be an array of tools'),
        (
            "messages",
            {"messages": [{"role": "tool", "content": ""}]},
            "line 2: the chat template can't render the messages: no tools here",
        ),
        ("prompt", {"prompt": "a"}, 'line 2 has no "completion" (a string); it has "prompt"'),
        ("prompt", {"prompt": CHAT, "completion": "b"}, 'line 2: "completion" is a string; it must be an array of'),
        ("text", "{", "line 2 is not JSON"),
    ],
)
def test_errors_name_the_line(capsys, tmp_path, tokenizer_folder, first, second, message):
    file = tmp_path / "data.jsonl"
    second = second if isinstance(second, str) else json.dumps(second)
    file.write_text(f"{json.dumps(GOOD_LINES[first])}\n{second}\n")
    assert message in failing_inspect(capsys, file, "--tokenizer", tokenizer_folder)


def test_errors_of_files_and_options(capsys, tmp_path, tokenizer_folder):
    unknown = write_jsonl(tmp_path / "unknown.jsonl", [{"question": "a", "answer": "b"}])
    message = failing_inspect(capsys, unknown, "--tokenizer", tokenizer_folder)
    assert 'unknown.jsonl, line 1 has "question", "answer"; a line may have {"input_ids"}, {"context", "choices"}' in (
        message
    )
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    assert "texts.jsonl holds text: --tokenizer must name the tokenizer" in failing_inspect(capsys, texts)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl is empty; it must hold one JSON object a line" in failing_inspect(
        capsys, tmp_path / "empty.jsonl"
    )
    bare = tiny_tokenizer(adds_bos=True)
    bare.save_pretrained(tmp_path / "bare")
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    message = failing_inspect(capsys, chats, "--tokenizer", tmp_path / "bare")
    assert "chats.jsonl, line 1 holds messages, and the tokenizer has no chat template" in message


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": [1]}, "has no array cu_seqlens; it must hold input_ids and cu_seqlens"),
        ({"input_ids": [1], "cu_seqlens": [0, 2]}, "cu_seqlens must start at 0, not decrease and end at the 1 tokens"),
        ({"input_ids": [1], "cu_seqlens": [0.0, 1.0]}, "cu_seqlens holds float64; it must hold whole numbers"),
        ({"input_ids": [-1], "cu_seqlens": [0, 1]}, "must hold token ids from 0 to 2147483647, got -1"),
        ({"input_ids": np.array([], np.int32), "cu_seqlens": [0]}, "holds no sequences"),
    ],
)
def test_errors_of_packed_arrays(capsys, tmp_path, arrays, message):
    np.savez(tmp_path / "ids.npz", **arrays)
    assert message in failing_inspect(capsys, tmp_path / "ids.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    assert "torn.npz is no .npz file, which is a zip archive of arrays" in failing_inspect(
        capsys, tmp_path / "torn.npz"
    )


def test_packed_ids_of_any_byte_order_are_taken_by_value(tmp_path, capsys):
    sequences = [[5, 300, 70_000], [5, 300, 2**31 - 1], [5]]
    for kind in (">i8", "<i8", ">u4", ">i4", ">u8"):
        ids, ends = np.concatenate(sequences).astype(kind), np.array([0, 3, 6, 7], kind)
        np.savez(tmp_path / "i.npz", input_ids=ids, cu_seqlens=ends)
        assert cli.main(["inspect", "--json", str(tmp_path / "i.npz")]) == 0
        check_sequences(json.loads(capsys.readouterr().out), sequences)
    np.savez(tmp_path / "i.npz", input_ids=np.array([5 << 32], ">i8"), cu_seqlens=[0, 1])
    assert "must hold token ids from 0 to 2147483647, got 21474836480" in failing_inspect(capsys, tmp_path / "i.npz")


def test_damaged_archives_end_in_a_sentence(tmp_path, capsys):
    """Each byte of a small archive is changed, the shapes of its arrays are huge, and ends overflow."""
    path = tmp_path / "ids.npz"
    np.savez_compressed(path, input_ids=np.arange(9), cu_seqlens=[0, 9])
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        for change in (0, 0xFF, whole[at] ^ 1):
            path.write_bytes(whole[:at] + bytes([change]) + whole[at + 1 :])
            status = cli.main(["inspect", "--json", str(path)])
            out, err = capsys.readouterr()
            assert status == 0 or (status == 1 and not out and err.startswith("radix-ops: ")), (at, change)
    header = np.lib.format.header_data_from_array_1_0(np.arange(9))
    for shape in ((2**40,), (2**62,), (2**64,), (-1,), (2**32, 2**32), ()):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("input_ids", "cu_seqlens"):
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
                    file.write(bytes(80))
        assert "ids.npz" in failing_inspect(capsys, path)
    for ends in ([0, 2**64 - 1], [0, 2**63 + 1], [2**64 - 1, 1]):
        np.savez(path, input_ids=[1], cu_seqlens=np.array(ends, np.uint64))
        assert "cu_seqlens must start at 0, not decrease and end at the 1 tokens" in failing_inspect(capsys, path)


# What the report says.


def verdict_of(text: str) -> str:
    return " ".join(text.split("\n\n")[-1].split())


def test_report(capsys, tmp_path):
    groups = [[g, *range(100, 110), question, choice] for question in (50, 60) for g in (1, 2) for choice in (7, 8, 9)]
    text = report(capsys, tmp_path, [*groups, [1]], "--batch-sizes", "2,6")
    assert_expected_inline(
        text,
        """\
ids.jsonl: 13 lines of {"input_ids"}
token ids

sequences          13
tokens            157  a sequence has 1 to 13, median 13, 90% at most 13
rows of one trie   38  4.13 times fewer: the most that sharing could save, in one batch of all
strict prefixes     1  sequences that another goes on from, which need none either

The shared prefixes that save most, each counted beyond the next shorter one that is shared:
sequences     their tokens        saved
        6          1 to 11   55 (35.0%)  [2, 100, 101, 102, 103, ..., 108, 109]
        6          2 to 11   50 (31.8%)  [100, 101, 102, 103, 104, ..., 108, 109]
        7                1    6  (3.8%)  [1]
        3               12    2  (1.3%)  [50]
        3               12    2  (1.3%)  [60]
        3               12    2  (1.3%)  [50]
        3               12    2  (1.3%)  [60]

Saved tokens by how many sequences share them, so how many have to meet in a batch:
      shared by   prefixes        saved
         2 to 4          4    8  (5.1%)
        5 to 16          3  111 (70.7%)

Rows of all batches (and tokens / rows) by their size and order; speed-up of the planned ones, at most:
a batch has                   as given          shuffled           planned      over      over
at most                                                                       packed    padded
2 sequences                109  (1.44)       157  (1.00)        87  (1.80)      1.80      1.80
6 sequences                 61  (2.57)        76  (2.07)        39  (4.03)      4.03      4.03
16,384 rows                 38  (4.13)        38  (4.13)        38  (4.13)      4.13      4.13
all sequences               38  (4.13)        38  (4.13)        38  (4.13)      4.13
Packed batches have no padding, padded ones hold sequences of similar length. Speed-ups compare rows;
attention and overheads take some, and --model counts attention.

It pays: planned batches of at most 16,384 rows compute 38 rows for 157 tokens, at most 4.13 times faster than
packed batches and 4.13 times faster than batches padded by length.
""",
    )


def test_one_sequence_has_none_to_share_with(capsys, tmp_path):
    assert verdict_of(report(capsys, tmp_path, [[1, 2, 3]])) == (
        "It does not pay: a single sequence has none to share with."
    )


def test_no_tokens(capsys, tmp_path):
    assert verdict_of(report(capsys, tmp_path, [[], []])) == "It does not pay: there are no tokens."


def test_all_equal(capsys, tmp_path):
    text = report(capsys, tmp_path, [[1, 2, 3]] * 40)
    assert "duplicates         39  sequences equal to another" in text
    assert "It pays: planned batches of at most 16,384 rows compute 3 rows for 120 tokens, at most 40.00" in text


def test_nothing_is_shared(capsys, tmp_path):
    text = report(capsys, tmp_path, [[i, 500 - i] for i in range(100)])
    assert "No two sequences share their first token." in text
    assert (
        "It does not pay: even one trie of all sequences would have only 1.00 times fewer rows than tokens, since"
        in (verdict_of(text))
    )


def test_a_short_instruction_before_long_texts(capsys, tmp_path):
    text = report(capsys, tmp_path, [[1, 2, 3, *range(i, i + 100)] for i in range(100, 8100, 100)])
    assert "All start with the same 3 tokens, which is short beside the 103 tokens that a sequence has" in (
        verdict_of(text)
    )


def test_what_is_shared_at_the_ends_is_named(capsys, tmp_path):
    text = report(capsys, tmp_path, [[i, *range(200, 250)] for i in range(100)])
    assert "It does not pay" in verdict_of(text)
    assert "Read from their ends, the first 100 sequences would have 34.00 times fewer rows" in verdict_of(text)


def test_shuffled_groups_are_told_to_meet(capsys, tmp_path):
    groups = [[g, *range(1000), 2000 + i] for i in range(4) for g in range(100)]
    text = verdict_of(report(capsys, tmp_path, groups))
    assert "planned batches of at most 16,384 rows compute 100,500 rows for 400,800 tokens, at most 3.9" in text
    assert "In the order given it is at most 1.00 times: put sequences that share a prefix into one batch" in text


def test_text_of_a_prefix_is_printed_on_one_line_without_control_characters(
    capsys, tmp_path, tokenizer, tokenizer_folder
):
    texts = [f"a\n\x1b[2J\u202eb {'the river ' * 40}end{i}" for i in range(4)]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    shown = inspect_json(capsys, file, "--tokenizer", tokenizer_folder)["prefixes"][0]["text"]
    assert shown.startswith('"<s>a\\n\\x1b[2J\\u202eb the river the river')
    assert shown.endswith('the river end"')
    assert " ... " in shown
    assert len(shown) < 110


def test_the_prompt_of_a_models_folder_is_counted(capsys, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tiny_model("Llama").model.save_pretrained(tmp_path / "base")
    (tokenizer := tiny_tokenizer(adds_bos=True)).save_pretrained(tmp_path / "base")
    options = {"prompts": {"of": "the river: "}, "default_prompt_name": "of", "device": "cpu"}
    made = library.SentenceTransformer(modules=[Transformer(str(tmp_path / "base")), Pooling(32, "mean")], **options)
    made.save_pretrained(str(tmp_path / "st"))
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXT])
    for given, prompt in (((), "the river: "), (("--prompt", ""), ""), (("--prompt", "a "), "a ")):
        summary = inspect_json(capsys, file, "--model", tmp_path / "st", *given)
        check_sequences(summary, tokenizer([prompt + text for text in TEXT])["input_ids"])


def test_a_cross_encoders_pairs_are_those_that_it_reads(capsys, tmp_path):
    pytest.importorskip("sentence_transformers")
    from helpers import sentence_folders

    (tmp_path / "chat").mkdir()
    prompts = {"prompts": {"query": "w30 w31 "}, "default_prompt_name": "query"}
    folder, made = sentence_folders.cross_encoder(tmp_path, None, **prompts)
    file = write_jsonl(tmp_path / "queries.jsonl", [{"query": "w1 w2", "documents": ["w3", "w4 w5"]}])
    summary = inspect_json(capsys, file, "--model", folder, "--template", "pairs")
    pairs = [("w30 w31 w1 w2", document) for document in ("w3", "w4 w5")]
    check_sequences(summary, [made.tokenizer(*pair)["input_ids"] for pair in pairs])
    assert inspect_json(capsys, file, "--model", folder) == summary
    chat, made = sentence_folders.cross_encoder(tmp_path / "chat")
    check_sequences(
        inspect_json(capsys, file, "--model", chat, "--template", "pairs"),
        [made.tokenizer("w1 w2", document)["input_ids"] for document in ("w3", "w4 w5")],
    )
    turns = [[{"role": "query", "content": "w1 w2"}, {"role": "document", "content": text}] for text in ("w3", "w4 w5")]
    rendered = made.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    check_sequences(inspect_json(capsys, file, "--model", chat), rendered)
