"""The arguments of `radix-ops embed`."""

from __future__ import annotations

from .arguments import (
    FILE_HELP,
    MODEL_HELP,
    RESUME_HELP,
    add_command,
    add_flag,
    add_input_arguments,
    add_length_arguments,
    add_model_arguments,
    add_shape_arguments,
    positive_int,
    utf8_text,
)
from .names import OUTPUT_DTYPES, POOLINGS
from .schema_parts import NUMBER, array, kind, line

HELP = f"""\
Makes an embedding of each line: the hidden state of its last token, or another pooling over its tokens, normalised.
What texts of a batch share at their start, such as an instruction, is computed once.

FILE holds one text a line, or JSON objects like {{"text": "..."}}, whose other keys are copied to the output. A text
that is too long for the model is an error, unless --truncate-right.

--output PATH.npy gets a matrix [lines, dim] in the input's order, made as a memory map; PATH.ids.jsonl beside it says
which line each row is of, where lines have an "id" or "_id" or were left out, or there are several files. Any other
--output, and standard output, get objects: line (from 1), the input's other keys, embedding, and key, a hash of input
line, tokens, model, dtype and options.

--output-dtype float16 halves the numbers, and int8 makes each one of 256 steps between the least and the largest of its
column, as sentence-transformers' quantize_embeddings does. These ranges, float32 [2, dim], are those of --ranges; or
those of all texts of this run, which --output PATH.npy stores as PATH.ranges.npy. Texts that are compared with each
other, such as queries with documents, need the same. --pairs K shows on standard error which K pairs of texts are the
nearest by cosine; it compares all pairs, block by block.

A sentence-transformers folder (one with a modules.json) says itself how to pool and whether to normalise, and which
prompt stands before each text; options here go before that. Any other model pools the last token and normalises.
Special tokens are those that the model's tokenizer puts around a text. Where the folder has the modality "message", the
tokenizer's chat template renders each text as the user's message and the prompt as the system's, as in
sentence-transformers 6. What a folder sets and embed does not know is refused by name. --dim keeps the first numbers
of a Matryoshka model, and normalises after that; a folder's truncate_dim does before, as in sentence-transformers.

  radix-ops embed --model Qwen/Qwen3-Embedding-0.6B --output documents.npy documents.txt
  radix-ops embed --model Qwen/Qwen3-Embedding-0.6B --output queries.npy queries.txt \\
      --prompt $'Instruct: Given a web search query, retrieve relevant passages that answer the query\\nQuery:'

{RESUME_HELP}A .npy is made as PATH.npy.part, and a side file, PATH.npy.rows, says which rows are done, by a
checksum of each; both go when it is finished.

It does not pay where texts start differently: documents without a prompt, or with one that is short beside them.
`radix-ops inspect` says how much a file shares, --compare how much time that saves.

Rows of a BEIR corpus ("_id", "title" and "text") are title and text together. {{"input_ids": [...]}} holds the token
ids of a text with all that stands before it; they need no tokenizer, and nothing of them is cut.

{FILE_HELP}
{MODEL_HELP}"""

SCHEMA = line("embed", kind({"embedding": array(NUMBER, "the text's embedding", minItems=1)}))


def add_parser(commands) -> None:
    command = add_command(commands, "embed", "make embeddings of texts", HELP, "radix_ops.cli.embed")
    add_input_arguments(command, "the texts")
    add_shape_arguments(command, "embed")
    command.add_argument(
        "--text-key",
        type=utf8_text,
        default="text",
        metavar="KEY",
        help="key of the text in a JSON object (default: %(default)s)",
    )
    add_model_arguments(
        command,
        "file for the embeddings, by its ending a matrix (.npy), lines or a table (default: lines on standard output)",
    )
    command.add_argument(
        "--pooling", choices=POOLINGS, help="pooling of hidden states (default: as the model's folder says, else last)"
    )
    prompts = command.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        type=utf8_text,
        metavar="TEXT",
        help='text before each text; "" for none (default: as the model\'s folder says)',
    )
    prompts.add_argument(
        "--prompt-name", type=utf8_text, metavar="NAME", help="prompt that the model's folder has under this name"
    )
    command.add_argument(
        "--dim", type=positive_int, metavar="N", help="numbers that are kept, the first N (default: all)"
    )
    command.add_argument(
        "--output-dtype",
        choices=OUTPUT_DTYPES,
        default="float32",
        help="dtype of the embeddings (default: %(default)s)",
    )
    command.add_argument(
        "--ranges",
        metavar="PATH.npy",
        help="ranges of int8 numbers, as PATH.ranges.npy of a run holds them (default: those of this run's texts)",
    )
    command.add_argument("--pairs", type=positive_int, metavar="K", help="a look at the K nearest pairs of texts")
    add_flag(command, "--no-normalize", help="embeddings at the length that they have")
    add_length_arguments(command, "text", "texts")
