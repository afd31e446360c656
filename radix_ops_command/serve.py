"""The arguments of `radix-ops serve`."""

from __future__ import annotations

from .arguments import (
    MODEL_HELP,
    add_command,
    add_engine_arguments,
    add_flag,
    byte_count,
    names,
    port,
    positive_int,
    seconds,
    utf8_text,
)
from .names import LABEL_PROMPTS, POOLINGS, TASKS, TEMPLATES

_LIBRARIES = ("fastapi", "uvicorn", "orjson", "prometheus_client")  # of the extra `serve`
HELP = f"""\
Serves a model over HTTP. Requests that wait at the same time share batches, and what they share at their starts is
computed once. Nothing is kept between batches.

  radix-ops serve --model Qwen/Qwen3-Embedding-0.6B
  radix-ops serve --model Qwen/Qwen3-Reranker-0.6B --task rerank --host 0.0.0.0 --api-key-file keys.txt

Routes are those that clients of other servers ask for. Each task has its own:
  embed     OpenAI's /v1/embeddings; /embed, /embed_all and /similarity of text-embeddings-inference; /pooling, /score
  rerank    /rerank of text-embeddings-inference; /v1/rerank and /v2/rerank of Cohere and Jina; /score of vLLM
  classify  /predict of text-embeddings-inference; /classify and /pooling of vLLM
  score     /choices, the questions and texts of `radix-ops score`; OpenAI's /v1/completions for log-probabilities of
            prompts; /v1/score of SGLang
and all have /tokenize, /decode, /info, /v1/models, /health, /ready, /metrics, /stats, /openapi.json, and a page at /.

--task says which it is. By default that is what the model's folder says: embed where sentence-transformers saved an
encoder, rerank where it saved a cross-encoder and for a classification head of one label, classify for other heads,
score for language models, and embed for models without a head.

A text that is too long is refused, unless its request says "truncate": true. SIGTERM and Ctrl-C let the server refuse
new requests, finish those that it accepted within --shutdown-grace, and stop. Log lines are JSON, on standard error,
and hold nothing of what requests say.

Folding does not pay where requests start differently; --plain leaves it out.

Every option may come from the environment: RADIX_OPS_PORT, RADIX_OPS_API_KEY_FILE and so on.

{MODEL_HELP}"""


def add_parser(commands) -> None:
    command = add_command(commands, "serve", "serve a model over HTTP", HELP, "radix_ops.serve._command")
    command.set_defaults(libraries=_LIBRARIES)
    command.add_argument("-m", "--model", required=True, metavar="M", help="a local folder, a hub id or a .gguf file")
    command.add_argument("--task", choices=TASKS, help="what is served (default: what the model is for, see above)")
    command.add_argument(
        "--served-model-name",
        type=names,
        metavar="NAME,...",
        help="names of the model in requests, the first in replies (default: --model)",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    command.add_argument(
        "--port", type=port, default=8080, help="port to listen at; 0 is any that is free (default: %(default)s)"
    )
    command.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file of API keys, one a line; a request must bring one, as Authorization: Bearer KEY or as X-API-Key",
    )
    _add_task_arguments(command)
    _add_limits(command)
    add_flag(command, "--plain", help="batches that are not folded, for comparison")
    add_flag(command, "--warm-up", help="batches of several sizes before the server is ready")
    add_engine_arguments(command)


def _add_task_arguments(command) -> None:
    command.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="tokens of a text at most, with all that stands beside it (default: as the model and its tokenizer say)",
    )
    command.add_argument(
        "--pooling", choices=POOLINGS, help="embed: pooling (default: the folder's, or the last token)"
    )
    command.add_argument("--prompt", type=utf8_text, metavar="TEXT", help="embed: text before each text")
    command.add_argument(
        "--prompt-name", metavar="NAME", help="embed: the folder's prompt of this name, before each text"
    )
    command.add_argument(
        "--template",
        metavar="T",
        help=f"rerank: {' or '.join(TEMPLATES)}, or a JSON file; classify: {' or '.join(LABEL_PROMPTS)}, or a JSON or "
        "TOML file",
    )


def _add_limits(command) -> None:
    command.add_argument(
        "--max-queued-tokens",
        type=positive_int,
        default=4 * 2**20,
        metavar="N",
        help="tokens that wait at most; more gets 429 (default: %(default)s)",
    )
    command.add_argument(
        "--max-queued-requests",
        type=positive_int,
        default=2**14,
        metavar="N",
        help="requests that wait at most (default: %(default)s)",
    )
    command.add_argument(
        "--max-inputs",
        type=positive_int,
        default=1024,
        metavar="N",
        help="texts, pairs or documents of a request at most (default: %(default)s)",
    )
    command.add_argument(
        "--max-body",
        type=byte_count,
        default=16 * 2**20,
        metavar="BYTES",
        help="size of a body at most (default: 16MB)",
    )
    command.add_argument(
        "--max-overtakes",
        type=positive_int,
        default=16,
        metavar="N",
        help="batches of later requests that may go before a request whose turn it is (default: %(default)s)",
    )
    command.add_argument(
        "--request-timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="time from a request's arrival to its answer; later is 504 (default: %(default)g)",
    )
    command.add_argument(
        "--shutdown-grace",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for what was accepted when the server is told to stop (default: %(default)g)",
    )
