"""Sets of real prompts, as texts: each set yields groups of prompts that share what their dataset lets them share.

Groups and prompts stand in the order of their sources, so that a set is the same wherever it is made. Nothing is
fetched: texts come out of the package lm-eval, whose code is not run, or of files that the user has. UserError for a
source that is missing or that holds something else.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where the demo makes MMLU's questions

import mmlu_demo  # noqa: E402

from radix_ops.data.beir import is_beir  # noqa: E402
from radix_ops.data.kinds import kind_by_name  # noqa: E402
from radix_ops.data.records import Records  # noqa: E402
from radix_ops.data.sources import LineSource  # noqa: E402
from radix_ops.data.streams import ByteFile, StreamError  # noqa: E402
from radix_ops.engine.errors import UserError  # noqa: E402
from radix_ops.engine.inputs import Record, check_text, kind_of  # noqa: E402
from radix_ops.engine.templates import QWEN3_RERANKER, Template  # noqa: E402
from radix_ops.models.files import read_object  # noqa: E402

Groups = Iterator[list[str]]
Query = tuple[str, list[str]]  # with its documents

LM_EVAL = "lm-eval==0.4.13"
COPIES = 8
SOLUTIONS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_THINK = "A: Let's think step by step."
_OPTION = re.compile(r"^(\([A-Z]\)) ", re.MULTILINE)


def of_lm_eval(option: str, name: str) -> Path:
    """Find a file of lm-eval's tasks."""
    try:
        return mmlu_demo.package_file("lm_eval", f"tasks/{name}", LM_EVAL, option)
    except SystemExit as error:
        raise UserError(str(error)) from error


def mmlu(shots: int) -> Groups:
    """Yield the questions of all subjects with each of their choices, behind so many worked examples."""
    prompts = json.loads(of_lm_eval("--mmlu", "mmlu/flan_cot_fewshot/_cot_prompts.json").read_text(encoding="utf-8"))
    for subject in sorted(prompts):
        for question in mmlu_demo.questions(subject, prompts[subject], shots):
            yield [question["context"] + choice for choice in question["choices"]]


def bbh() -> Groups:
    """Yield the third worked example of each task of choices with each of its letters, behind the other two."""
    folder = of_lm_eval("--bbh", "bbh/cot_fewshot/_bbh.yaml").parent
    for path in sorted(folder.glob("[!_]*.yaml")):
        task = _yaml(path)
        *shots, asked = task["fewshot_config"]["samples"]
        letters = _OPTION.findall(asked["input"])
        if letters:
            worked = "".join(f"Q: {shot['input']}\n{_THINK}\n{shot['target']}\n\n" for shot in shots)
            context = f"{task['description']}{worked}Q: {asked['input']}\n{_THINK}\nSo the answer is"
            yield [f"{context} {letter}." for letter in letters]


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def gsm8k(path: Path) -> Groups:
    """Yield the questions of a file of GSM8K, each by itself behind lm-eval's eight worked examples."""
    shots = _yaml(of_lm_eval("--gsm8k", "gsm8k/gsm8k-cot.yaml"))["fewshot_config"]["samples"]
    worked = "".join(f"Q: {shot['question']}\nA: {shot['target']}\n\n" for shot in shots)
    for question in rows(path, lambda record: record.text("question")):
        yield [f"{worked}Q: {question}\nA:"]


def gsm8k_solutions(path: Path) -> Groups:
    """Yield the questions of GSM8K's example_model_solutions.jsonl, each with its right solution and four others."""

    def parse(record: Record) -> list[str]:
        solutions = [record.text("ground_truth")]
        for key in SOLUTIONS:
            found = record.field(key, "an object with a solution")
            if not isinstance(found, dict):
                raise UserError(f'{record.where}: "{key}" is {kind_of(found)}; it must be an object with a solution')
            solutions.append(Record(f'{record.where}: "{key}"', found).text("solution"))
        return [f"Q: {record.text('question')}\nA: {solution}" for solution in solutions]

    yield from rows(path, parse)


def humaneval(path: Path) -> Groups:
    """Yield each prompt of HumanEval.jsonl.gz eight times, as sampling begins."""
    for prompt in rows(path, lambda record: record.text("prompt")):
        yield [prompt] * COPIES


def rows(path: Path, parse: Callable[[Record], Any]) -> Iterable[Any]:
    """Read a file of rows, of JSON lines where its name names no other format that the radix-ops command reads."""
    return Records(path, parse, format=None if path.is_dir() or kind_by_name(str(path)) else "jsonl")


@dataclasses.dataclass(frozen=True)
class Article:
    """An article of XQuAD: its paragraphs, each with its questions."""

    contexts: list[str]
    questions: list[list[str]]


def xquad(path: Path) -> list[Article]:
    """Read a file of XQuAD, or of SQuAD."""
    try:
        found = read_object(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    articles = []
    for number, article in enumerate(_objects(found, "data", str(path))):
        where = f"{path}: data[{number}]"
        paragraphs = _objects(article, "paragraphs", where)
        contexts, questions = [], []
        for index, paragraph in enumerate(paragraphs):
            place = f"{where}: paragraphs[{index}]"
            contexts.append(Record(place, paragraph).text("context"))
            asked = _objects(paragraph, "qas", place)
            questions.append([Record(f"{place}: qas[{i}]", fields).text("question") for i, fields in enumerate(asked)])
        articles.append(Article(contexts, questions))
    return articles


def _objects(fields: dict, key: str, where: str) -> list[dict]:
    found = Record(where, fields).field(key, "an array of objects")
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise UserError(f'{where}: "{key}" must be an array of objects, as in SQuAD')
    return found


def context_qa(articles: list[Article]) -> Groups:
    """Yield each paragraph with each of its questions."""
    for article in articles:
        for context, questions in zip(article.contexts, article.questions, strict=True):
            yield [_asked(context, question) for question in questions]


def article_qa(articles: list[Article]) -> Groups:
    """Yield all paragraphs of an article with each of their questions."""
    for article in articles:
        context = "\n\n".join(article.contexts)
        yield [_asked(context, question) for questions in article.questions for question in questions]


def _asked(context: str, question: str) -> str:
    return f"{context}\n\nQuestion: {question}\nAnswer:"


def xquad_queries(articles: list[Article], top: int) -> Iterator[Query]:
    """Yield each question with the paragraph that answers it and those that follow in the file."""
    contexts = [context for article in articles for context in article.contexts]
    if len(contexts) < top:
        raise UserError(f"--xquad holds {len(contexts)} paragraphs; --top {top} takes as many documents for each query")
    asked = [questions for article in articles for questions in article.questions]
    for number, questions in enumerate(asked):
        documents = [contexts[(number + i) % len(contexts)] for i in range(top)]
        for question in questions:
            yield question, documents


def msmarco_queries(path: Path, top: int) -> Iterator[Query]:
    """Yield queries as soon as the file has given them so many documents, each text once.

    Lines are those of MS MARCO's top1000 files (query id, passage id, query, passage) or of its triples (query,
    relevant passage, another), parted by tabs, and may be packed by gzip. What is behind the last query that is asked
    for is not read.
    """
    open_queries: dict[str, list[str]] = {}
    done: set[str] = set()
    columns = None
    try:
        source = LineSource(str(path), ByteFile(str(path)), is_text=True)
        for row in source:
            if isinstance(row.fields, UserError):
                raise row.fields
            cells = row.fields["text"].split("\t")
            columns = columns or len(cells)
            if len(cells) != columns or columns not in (3, 4):
                raise UserError(
                    f"{source.where_of(row.number)} has {len(cells)} columns; a top1000 file has query id, passage id, "
                    "query and passage in all lines, and a file of triples query, relevant passage and another"
                )
            query, found = (cells[2], cells[3:]) if columns == 4 else (cells[0], cells[1:])
            if query in done:
                continue
            documents = open_queries.setdefault(query, [])
            documents += [document for document in dict.fromkeys(found) if document not in documents]
            if len(documents) >= top:
                done.add(query)
                yield query, open_queries.pop(query)[:top]
    except StreamError as error:
        raise UserError(f"{path}{error}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    if columns is None:
        raise UserError(f"{path} is empty; it must hold queries with their passages, parted by tabs")
    if not done:
        most = max(map(len, open_queries.values()))
        raise UserError(
            f"{path} has no query with {top} documents; --top must be less: the most that one has are {most}"
        )


def check_beir(folder: Path, candidates: str | None) -> None:
    """UserError for what is no folder of BEIR, and without candidates: the first of a corpus are nobody's."""
    if not is_beir(folder):
        raise UserError(f"{folder} is no folder of BEIR, which holds corpus.jsonl, queries.jsonl and qrels")
    if candidates is None:
        raise UserError("--beir needs --candidates, a run whose first documents each query gets")


def beir_queries(folder: Path, top: int, candidates: str, split: str | None) -> Iterator[Query]:
    """Yield the judged queries of a BEIR folder with the first of their candidates; those with fewer are left out."""
    found = 0
    for record in Records(folder, candidates=candidates, split=split):
        documents = record.fields["documents"][:top]
        if len(documents) == top:
            found += 1
            texts = [f"{document['title']} {document['text']}" if "title" in document else document["text"]
                     for document in documents]  # fmt: skip
            yield check_text(record.fields["query"], record.where), texts
    if not found:
        raise UserError(f"{folder} has no query with {top} candidates; --top must be less")


def rerank(queries: Iterable[Query], document_first: bool) -> Groups:
    """Yield the prompts of Qwen3-Reranker: each query with its documents, in two orders."""
    template = document_first_template() if document_first else QWEN3_RERANKER
    for query, documents in queries:
        head, tail = template.parts(query, template.instruction)
        yield [f"{head}{document}{tail}" for document in documents]


def document_first_template() -> Template:
    query, document = "<Query>: {query}", "<Document>: {document}"
    text = QWEN3_RERANKER.text.replace(f"{query}\n{document}", f"{document}\n{query}")
    return dataclasses.replace(QWEN3_RERANKER, text=text)


def first_groups(groups: Groups, sequences: int) -> list[list[str]]:
    """Take whole groups, none empty, until they hold so many prompts, or all there are."""
    taken: list[list[str]] = []
    count = 0
    for group in filter(None, groups):
        taken.append(group)
        count += len(group)
        if count >= sequences:
            break
    return taken
