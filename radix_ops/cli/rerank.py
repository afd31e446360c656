"""`radix-ops rerank`: documents ordered by relevance to their query, with shared prefixes computed once."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch

from ..data.fingerprint import fingerprint
from ..data.results import key_of_parts
from ..engine import reranking
from ..engine.cross_encoders import READINGS, CrossEncoder, chat_of, find_cross_encoder
from ..engine.errors import UserError
from ..engine.loading import load_config, load_runner, load_tokenizer
from ..engine.runners import run as run_batches
from ..engine.templates import TEMPLATES, Template, find_template
from . import job
from .arguments import FILE_HELP, add_command, check_output, read_records

HELP = f"""\
Scores each document of each line by its relevance to the line's query. The query and what stands before it are
computed once for all its documents.

FILE holds one JSON object a line: {{"query": "...", "documents": ["...", "..."]}}, perhaps with an "instruction".
Other keys are copied to the output, which holds one object a line in the input's order:
  line    the input line, counted from 1, then the input's other keys
  scores  of each document, from 0 to 1, but for a cross-encoder whose folder says otherwise
  order   the documents by score, the best first, counted from 0
  key     a hash of input line, tokens, model, dtype, mode and template

A language model reads query and document in a template and answers yes or no: the score is P(yes) against P(no) as its
next token. The template qwen3-reranker is that of Qwen3-Reranker, and the default for Qwen3 models. Others come in a
JSON file:
  {{"text": "Query: {{query}}\\nDocument: {{document}}\\nRelevant:", "yes": " yes", "no": " no"}}
whose text may hold {{instruction}}, too; "instruction" is then the default for lines without one. yes and no are single
tokens, as text or as ids. What stands behind {{document}} is tokenised apart, so that a document that is cut leaves it
whole; the text brings all special tokens along.

A model with a classification head of one label (a cross-encoder) reads query and document as the pair that its
tokenizer makes (--template pairs) or as its tokenizer's chat template renders the roles query and document (--template
chat), or in another template if one is given. Its score is the sigmoid of its logit. A folder that
sentence-transformers saved says itself which of the two, how the logit becomes a score, and which prompt stands before
each query; so does that of a language model with a LogitScore. What it sets and rerank does not know is refused by
name. Where a folder says nothing and the template takes both roles, one of the two must be asked for.

A document that is too long with its query is an error, unless --truncate-right; nothing else is ever cut.

  radix-ops rerank --model Qwen/Qwen3-Reranker-0.6B --output ranked.jsonl queries.jsonl

{job.RESUME_HELP}
It does not pay where a line has one document, or documents that are long beside template and query.
`radix-ops inspect` says how much a file shares, --compare how much time that saves.

{FILE_HELP}
{job.MODEL_HELP}"""


def run(args: argparse.Namespace) -> None:
    check_output(args.output, args.file)
    device = job.find_device(args.device)
    with job.claimed_output(args):
        _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> None:
    trust = args.trust_remote_code
    config = load_config(args.model, trust_remote_code=trust)
    encoder = find_cross_encoder(args.model, config)
    classifies = encoder is not None and encoder.classifies
    pad_token_id = _check_head(args.model, config) if classifies else 0
    template = _template_of(args, config, encoder)

    def parse(record):
        return reranking.check_instruction(reranking.parse_query(record), template)

    records = read_records(args.file, parse, reranking.SHAPE)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
    answers, chat, prompt, activation, recommended = None, None, "", "sigmoid", None
    if encoder is not None:
        answers, activation, recommended = encoder.answers, encoder.activation, encoder.max_length
    if template is None:
        reading = args.template if args.template in READINGS else None
        chat, prompt = chat_of(args.model, encoder, reading, tokenizer, config), encoder.prompt
    elif not classifies:
        answers, activation = template.token_ids(tokenizer), "sigmoid"
    max_length = job.max_length_of(args, config, tokenizer, recommended)
    lines = job.with_progress(records, "tokenising")
    items = reranking.encode(lines, tokenizer, template, max_length, args.truncate_right, chat, prompt)
    auto_class = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    runner = load_runner(args.model, config, auto_class, args.dtype, device, trust, pad_token_id)
    job.check_runner(args, runner, items)
    how = template and dataclasses.astuple(template)
    base = fingerprint(runner, "rerank", "plain" if args.plain else "folded", how, answers, activation)

    def key_of(item: int) -> str:
        return key_of_parts(base, records.raw(item), *(ids.tobytes() for ids in items[item]))

    def fields_of(item: int, scores: np.ndarray) -> dict:
        return reranking.result(records[item], scores)

    def execute(chosen, budget, folded, on_batch, warm_up):
        return run_batches(
            runner, chosen, budget, folded, score, lambda indices, found: on_batch(indices, [found]), warm_up
        )

    score = reranking.scorer(runner, answers, activation)
    task = job.ItemJob(args, runner, items, records, key_of, execute, {"scores": np.float32}, fields_of, "reranked")
    if args.compare:
        task.compare("order", "orders", "score", "scores")
    else:
        task.run_remaining()


def _template_of(args: argparse.Namespace, config, encoder: CrossEncoder | None) -> Template | None:
    if args.template is not None and args.template not in READINGS:
        return find_template(args.template)
    if encoder is not None:
        return None
    if args.template is not None:
        raise UserError(f"--template {args.template} says how a cross-encoder reads, and --model {args.model} is none")
    if config.model_type == "qwen3":
        return TEMPLATES["qwen3-reranker"]
    raise UserError(
        f"--model {args.model} is a language model of type {config.model_type}, which has no template of its own: "
        f"name one by --template, {' or '.join(TEMPLATES)} or a JSON file"
    )


def _check_head(name: str, config) -> int:
    """The token that a cross-encoder's batches are padded with."""
    if config.num_labels != 1:
        raise UserError(
            f"--model {name} has a classification head of {config.num_labels} labels; rerank needs one of 1"
        )
    pad_token_id = config.get_text_config().pad_token_id
    if pad_token_id is None:
        raise UserError(
            f"--model {name}: its config has no pad_token_id, by which the head finds the last token of each text of a "
            "batch"
        )
    return pad_token_id


def add_parser(commands) -> None:
    command = add_command(commands, "rerank", "order documents by relevance to their query", HELP, run)
    command.add_argument("file", metavar="FILE", help="the queries with their documents, JSONL")
    job.add_model_arguments(command, "where the results go (default: standard output)")
    command.add_argument(
        "--template",
        metavar="T",
        help=f"{' or '.join(TEMPLATES)}, or a JSON file (default: qwen3-reranker for Qwen3 language models); of a "
        f"cross-encoder also {' or '.join(READINGS)}, see above",
    )
    job.add_length_arguments(command, "query with its document", "documents")
