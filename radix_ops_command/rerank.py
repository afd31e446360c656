"""The arguments of `radix-ops rerank`."""

from __future__ import annotations

from .arguments import (
    FILE_HELP,
    MODEL_HELP,
    RESUME_HELP,
    add_beir_arguments,
    add_command,
    add_flag,
    add_input_arguments,
    add_length_arguments,
    add_model_arguments,
    add_shape_arguments,
    positive_int,
)
from .names import READINGS, TEMPLATES
from .schema_parts import COUNT, NUMBER, TEXT, array, kind, line

HELP = f"""\
Scores each document of each line by its relevance to the line's query. The query and what stands before it are
computed once for all its documents.

FILE holds one JSON object a line: {{"query": "...", "documents": ["...", "..."]}}, perhaps with an "instruction".
A document is a string, or an object {{"text": "..."}}, perhaps with an "id" and a "title", which stands before the
text. Other keys are copied to the output, which holds one object a line in the input's order:
  line    the input line, counted from 1, then the input's other keys
  scores  of each document, from 0 to 1, but for a cross-encoder whose folder says otherwise
  order   the documents by score, the best first, counted from 0; the best N alone with --top-k N
  ids     those of the documents in that order, where they have some
  texts   the documents in that order, with --texts
  key     a hash of input line, tokens, model, dtype, mode and options

Where it is known which documents are relevant, rerank says on standard error how well it ranked them, as means over the
judged queries that ir-measures computes: nDCG@10, RR (whose mean is MRR) and R@10 (recall); --metrics writes them.
--qrels FILE has the relevance by "query_id" and documents' ids, as TREC or BEIR writes it; a query of FILE that was not
reranked counts as 0. Without it a row's own "relevance" counts, a whole number for each document.

A language model reads query and document in a template and answers yes or no: the score is P(yes) against P(no) as its
next token. The template qwen3-reranker is that of Qwen3-Reranker, and the default for Qwen3 models. Others come in a
JSON file:
  {{"text": "Query: {{query}}\\nDocument: {{document}}\\nRelevant:", "yes": " yes", "no": " no"}}
whose text may hold {{instruction}}, too; "instruction" is then the default for lines without one. yes and no are single
tokens, as text or as ids. What stands behind {{document}} is tokenised apart, so that a document that is cut leaves it
whole; the text brings all special tokens along.

A model with a classification head of one label (a cross-encoder; `radix-ops classify` is for others) reads query and
document as the pair that its tokenizer makes (--template pairs) or as its tokenizer's chat template renders the roles
query and document (--template chat), or in another template if one is given. Its score is the sigmoid of its logit. A
folder that sentence-transformers saved says itself which of the two, how the logit becomes a score, and which prompt
stands before each query; so does that of a language model with a LogitScore. What it sets and rerank does not know is
refused by name. Where a folder says nothing and the template takes both roles, one of the two must be asked for.

A document that is too long with its query is an error, unless --truncate-right; nothing else is ever cut.

An --output that ends in .trec or .run is a TREC run, qid Q0 docid rank score tag, for trec_eval and its like: by
"query_id" and the documents' ids where there are some, else by line and index. White space in an id is an error.

  radix-ops rerank --model Qwen/Qwen3-Reranker-0.6B --output ranked.jsonl queries.jsonl
  radix-ops rerank --model Qwen/Qwen3-Reranker-0.6B --output ranked.run queries.jsonl

{RESUME_HELP}
It does not pay where a line has one document, or documents that are long beside template and query.
`radix-ops inspect` says how much a file shares, --compare how much time that saves.

Rows of MS MARCO, of MTEB's reranking tasks, FlagEmbedding and Tevatron, as the hub has them, are known by their keys.
A folder of BEIR (corpus.jsonl, queries.jsonl, qrels) is one FILE: its judged queries, each with the documents that
--candidates names. {{"input_ids": [[...], ...]}} holds the token ids of whole prompts, one for each document; they need
no tokenizer where the template's yes and no are ids.

{FILE_HELP}
{MODEL_HELP}"""

_RANKED = kind(
    {
        "scores": array(NUMBER, "the score of each document, from 0 to 1 unless the model's folder says otherwise"),
        "order": array(COUNT, "the documents by score, the best first, counted from 0"),
    },
    {
        "ids": array({}, "the documents' ids in this order"),
        "texts": array(TEXT, "the documents' texts in this order"),
    },
)
SCHEMA = line("rerank", _RANKED)


def add_parser(commands) -> None:
    command = add_command(
        commands, "rerank", "order documents by relevance to their query", HELP, "radix_ops.cli.rerank"
    )
    add_input_arguments(command, "the queries with their documents")
    add_shape_arguments(command, "rerank")
    add_beir_arguments(command)
    add_model_arguments(
        command, "file for the results, by its ending lines, a table or a TREC run (default: lines on standard output)"
    )
    command.add_argument(
        "--template",
        metavar="T",
        help=f"template: {' or '.join(TEMPLATES)}, or a JSON file (default: qwen3-reranker for Qwen3 language models); "
        f"for a cross-encoder also {' or '.join(READINGS)}, see above",
    )
    command.add_argument(
        "--top-k", type=positive_int, metavar="N", help="order of the N best documents alone (default: of all)"
    )
    add_flag(command, "--texts", help="texts of the documents in their order")
    command.add_argument(
        "--qrels", metavar="FILE", help="relevance of documents to queries, TREC's qrels or BEIR's .tsv"
    )
    command.add_argument("--metrics", metavar="PATH.json", help="file for how well relevant documents are ranked")
    add_length_arguments(command, "query with its document", "documents")
