"""BEIR folders become queries with candidates; judgements are those of the files."""

import gzip
import json

import pytest

from radix_ops.data import beir
from radix_ops.data.beir import is_beir, judgements_of
from radix_ops.data.records import Records
from radix_ops.engine.errors import UserError

CORPUS = [
    {"_id": "d1", "title": "Rivers", "text": "The Seine flows through Paris.", "metadata": {}},
    {"_id": "d2", "title": "", "text": "The Thames flows through London."},
    {"_id": "d3", "title": "Sea", "text": "The sea is salty."},
    {"_id": "d4", "text": "A hill."},
]
QUERIES = [
    {"_id": "q1", "text": "Which river flows through Paris?", "metadata": {}},
    {"_id": "q2", "text": "Is the sea salty?"},
    {"_id": "q3", "text": "What is a hill?"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td4\t0\nq3\td4\t1\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "corpus.jsonl", CORPUS)
    write(tmp_path / "queries.jsonl", QUERIES)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(QRELS)
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td3\t1\n")
    return tmp_path


def documents_of(record):
    return [document["id"] for document in record.fields["documents"]]


def test_judged_queries_get_the_whole_corpus(folder):
    assert is_beir(folder)
    records = Records(folder)
    assert [record.fields["query_id"] for record in records] == ["q1", "q3"]
    assert [record.fields["query"] for record in records] == [QUERIES[0]["text"], QUERIES[2]["text"]]
    assert records[0].fields["documents"] == [
        {"id": "d1", "title": "Rivers", "text": "The Seine flows through Paris."},
        {"id": "d2", "text": "The Thames flows through London."},
        {"id": "d3", "title": "Sea", "text": "The sea is salty."},
        {"id": "d4", "text": "A hill."},
    ]
    assert judgements_of(str(folder), None) == {"q1": {"d1": 2, "d4": 0}, "q3": {"d4": 1}}
    assert records[1].where == f"{folder / 'queries.jsonl'}, line 3"
    assert "metadata" not in records[0].fields


def test_the_split_names_the_judgements(folder):
    assert [record.fields["query_id"] for record in Records(folder, split="dev")] == ["q2"]
    with pytest.raises(UserError, match=r"no judgements qrels/train.tsv for --split; it has dev, test"):
        Records(folder, split="train")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "train.tsv")
    with pytest.raises(UserError, match="has the judgements dev, train; --split must say which of them count"):
        Records(folder)
    (folder / "qrels" / "dev.tsv").unlink()
    assert len(Records(folder)) == 2
    (folder / "qrels" / "train.tsv").unlink()
    assert (len(Records(folder)), judgements_of(str(folder), None)) == (3, {})


def test_a_run_file_names_the_candidates_in_its_order(folder):
    run = folder / "bm25.trec"
    run.write_text("q1 Q0 d3 1 9.5 bm25\nq9 Q0 d2 1 1.0 bm25\nq1 Q0 d1 2 9.0 bm25\n\nq2 Q0 d2 1 3 bm25\n")
    records = Records(folder, candidates=str(run))
    assert [documents_of(record) for record in records] == [["d3", "d1"], []]


def test_records_know_their_places(folder):
    records = Records(folder)
    places = [records.origin(index) for index in range(2)]
    assert [place["line"] for place in places] == [1, 3]
    assert [records.index_of(place) for place in places] == [0, 1]
    assert records.index_of(places[0] | {"line": 2}) is None
    assert records.raw(0) != records.raw(1)


def test_the_key_of_a_query_knows_its_documents(folder):
    before = Records(folder).raw(0)
    assert Records(folder).raw(0) == before
    write(folder / "corpus.jsonl", [*CORPUS[:3], CORPUS[3] | {"text": "Another hill."}])
    assert Records(folder).raw(0) != before


def test_files_may_be_compressed(folder):
    text = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(text))
    assert is_beir(folder)
    assert documents_of(Records(folder)[1]) == ["d1", "d2", "d3", "d4"]


def test_a_corpus_too_large_to_score_whole_is_refused_with_its_size(folder, monkeypatch):
    monkeypatch.setattr(beir, "MOST_DOCUMENTS", 3)
    with pytest.raises(
        UserError, match="each of 2 judged queries would get all 4 documents of the corpus, and the most are 3; "
    ):
        Records(folder)
    run = folder / "run"
    run.write_text("".join(f"q1 Q0 d{number} {number} 1 x\n" for number in range(1, 5)))
    assert len(documents_of(Records(folder, candidates=str(run))[0])) == 4


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("corpus.jsonl", '{"text": "a"}\n', 'corpus.jsonl, line 1 has no "_id"'),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n',
            "corpus.jsonl, line 2 has the id 'd1' of ",
        ),
        ("corpus.jsonl", '{"_id": "d1", "title": 3, "text": "a"}\n', 'corpus.jsonl, line 1: "title" is a number'),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n',
            "queries.jsonl, line 2 has the id 'q1' of a query",
        ),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n', "test.tsv judges the query 'q3', which"),
        ("qrels/test.tsv", "q1\td1\n", "test.tsv, line 1 has 2 columns; judgements have query-id, corpus-id and score"),
        ("qrels/test.tsv", "q1\td1\tyes\n", "test.tsv, line 1 has the score 'yes'; it must be a whole number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv holds no judgements"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t2\n", "line 2 gives the document 'd1' of the query 'q1' the score 2"),
        ("run", "q1 d1 1\n", "run, line 1 has 3 columns; a run file in TREC format has six"),
        (
            "run",
            "q1 Q0 d1 1 2 x\nq1 Q0 d8 2 1 x\n",
            "run, line 2 names the document 'd8', which the corpus doesn't have",
        ),
        ("run", "q1 Q0 d1 1 2 x\nq1 Q0 d1 2 1 x\n", "run names a document twice for the query 'q1'"),
        ("run", "q7 Q0 d1 1 2 x\n", "run names no document for any of the 2 queries"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(UserError) as error:
        Records(folder, candidates=str(folder / "run") if file == "run" else None)
    assert message in str(error.value)


def test_judgements_may_name_documents_that_no_query_gets(folder):
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("q1\tgone\t1\n")
    assert judgements_of(str(folder), "test")["q1"]["gone"] == 1
    assert len(Records(folder)) == 2


def test_a_query_that_cannot_be_used_is_left_out_where_asked_for(folder):
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"text": "a query without an id"}\n')
    with pytest.raises(UserError, match='queries.jsonl, line 4 has no "_id"'):
        Records(folder)
    records = Records(folder, on_error="skip")
    assert [record.fields["query_id"] for record in records] == ["q1", "q3"]
    refused = Records(folder, on_error="record")
    assert 'has no "_id"' in refused.refused[2]
    assert refused.raw(2) == b'{"text": "a query without an id"}'


def test_queries_of_trecs_four_columns_are_read(folder):
    (folder / "qrels" / "test.tsv").write_text("q1 0 d1 2\nq3 0 d4 1\n")
    assert judgements_of(str(folder), None) == {"q1": {"d1": 2}, "q3": {"d4": 1}}


def test_a_query_whose_id_comes_twice_is_left_out_where_asked_for(folder):
    first = [record.fields for record in Records(folder)]
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"_id": "q1", "text": "another query"}\n')
    with pytest.raises(UserError, match="queries.jsonl, line 4 has the id 'q1' of a query before it"):
        Records(folder)
    records = Records(folder, on_error="skip")
    assert [record.fields for record in records] == first
    assert records.bad.count == 1
    assert "line 4 has the id 'q1'" in records.bad.lines[0]


def test_a_judged_query_that_can_not_be_used_is_named_and_left_out_where_asked_for(folder):
    text = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(text.replace('"q3"', "3.5"))
    with pytest.raises(UserError, match='queries.jsonl, line 3: "_id" is a number; it must be a string'):
        Records(folder)
    assert [record.fields["query_id"] for record in Records(folder, on_error="skip")] == ["q1"]
