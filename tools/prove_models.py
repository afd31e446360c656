"""Find out which causal model types of transformers fold exactly, and on which terms: `make models`.

Every type is built small, with random weights, in a process of its own with a time limit, and run through
`radix_ops.hf.enable` and as it is: on batches that share prefixes, padded on the right, the left and both, packed, and
with gradient checkpointing. Hidden states and the gradient of every parameter must agree, and outputs and losses of the
heads. Then the config is varied field by field. With --write, what agreed goes to radix_ops/hf/models.json, which
`radix_ops.hf.enable` goes by, and to docs/models.md. A type that can't be built or run is refused, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING

from apart import run_apart
from config_search import Search, check_default, check_far, count_calls, vary
from fold_checks import (
    TOLERANCE,
    Refused,
    Unbuildable,
    build,
    check_checkpointing,
    difference,
    given_positions_fit,
    observed,
    packing_that_fits,
    pad,
    positions_that_fit,
)
from head_checks import heads_that_fit
from models_page import page
from radix_ops.hf import proofs
from radix_ops.hf.proofs import Proof
from small_configs import default_config, small_arguments

ROOT = Path(__file__).parent.parent
# Kinds of layers in which a token sees more than the tokens up to it, or no attention at all.
_OTHER_MIXERS = re.compile("linear|conv|mamba|recurrent|compress|sparse|lsh|hybrid|ssm|delta|lightning|chunk(?!ed_att)")
_MIXER_FIELDS = re.compile("(mamba|conv|ssm|lru|short_conv|kda|rwkv|time_step)_")
_INDEXER_FIELDS = re.compile("index_topk|index_n_heads|index_head_dim|indexer_")
_MIXER_CLASSES = re.compile("Mamba|ShortConv|DeltaNet|DeltaAttention|Rwkv|xLSTM|RecurrentBlock|Lightning|Conv1d$")


def kinds_of_layers(config) -> set[str]:
    found = set()
    for name in ("layer_types", "layers_block_type", "block_types", "attn_layers"):
        value = vars(config).get(name)
        found |= {kind for kind in value or () if isinstance(kind, str)}
    return found


def refuse_by_config(model_type: str) -> None:
    """Raise Refused where the default config makes folding wrong, before anything is built."""
    try:
        config = default_config(model_type)
    except Exception as error:
        said = " ".join(str(error).split()).rpartition("Error: ")[2]
        raise Refused(f"its default config can't be made: {said}") from error
    if config.model_type != model_type:
        raise Refused(f"its configs say {config.model_type!r}: see there")
    if getattr(config, "is_encoder_decoder", False) or vars(config).get("cross_attention_hidden_size", ...) is None:
        raise Refused("encoder-decoder")
    parts = {name: part.model_type for name, part in vars(config).items() if hasattr(part, "model_type")}
    if "text_config" in parts:
        raise Refused(f"more than a language model: its text model is of type {parts['text_config']!r}")
    if any(parts.values()):
        raise Refused(f"made of several models ({', '.join(sorted(set(filter(None, parts.values()))))})")
    others = sorted(kind for kind in kinds_of_layers(config) if _OTHER_MIXERS.search(kind))
    if others:
        raise Refused(f"has layers other than full and sliding attention ({', '.join(others)})")
    mixers = sorted({found[1] for name in vars(config) if (found := _MIXER_FIELDS.match(name))})
    if mixers:
        raise Refused(f"has layers other than attention ({', '.join(mixers)})")
    if any(_INDEXER_FIELDS.match(name) for name in vars(config)):
        raise Refused("has sparse attention: an indexer picks the tokens that a token sees")


def has_interface(model_type: str) -> bool:
    stack = MODEL_MAPPING[type(default_config(model_type))]
    stack = stack[0] if isinstance(stack, tuple) else stack
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[stack.__module__])


def first_model(model_type: str):
    """Return the arguments of a small config that works, and its model."""
    reason = None
    if not has_interface(model_type):
        raise Refused("its attention does not go through transformers' attention interface")
    arguments = small_arguments(model_type)
    without_head_dim = {name: value for name, value in arguments.items() if name != "head_dim"}
    for attempt in (arguments, arguments | {"head_dim": 8}, without_head_dim):
        try:
            model = build(model_type, attempt)
            run_plain(model)
            return attempt, model
        except Unbuildable as error:
            reason = reason or error
    raise reason


def run_plain(model) -> None:
    """Run the plain model. Raises Unbuildable, and Refused where a token sees those behind it."""
    stack = proofs.innermost_stack(model)
    ids, _ = pad("right")
    try:
        with torch.no_grad():
            one, other = (
                stack(input_ids=x, use_cache=False).last_hidden_state
                for x in (ids[:, :9], ids[:, :9].index_fill(1, torch.tensor(8), 60))
            )
    except Exception as error:
        raise Unbuildable(_short(error)) from error
    if difference(one[:, :8], other[:, :8]) > TOLERANCE:
        raise Refused("not causal: a token sees those behind it")


def refuse_by_modules(model_type: str, model) -> None:
    mixers = {type(module).__name__ for module in model.modules()}
    others = sorted({found[0] for name in mixers if (found := _MIXER_CLASSES.search(name))})
    if others:
        raise Refused(f"has layers other than attention ({', '.join(others)})")
    stack = proofs.innermost_stack(model)
    if stack.config.model_type != model_type:
        raise Refused(f"made of several models, among them {stack.config.model_type!r}")


def prove(model_type: str, log=lambda text: None, only_base: bool = False) -> Proof:
    """Return the type's proof. Raises Refused, or Unbuildable."""
    search, proof = search_terms(model_type, log, only_base)
    if not only_base:
        check_default(search, proof)
    return proof


def search_terms(model_type: str, log, only_base: bool = False) -> tuple[Search, Proof]:
    refuse_by_config(model_type)
    arguments, model = first_model(model_type)
    refuse_by_modules(model_type, model)
    search = Search(model_type, arguments, log)
    count_calls(search, model)
    search.learn(model)
    check_far(search)
    positions = sorted(search.positions)[-1]
    packing = packing_that_fits(model, positions, search.calls)
    proof = observed(model, positions, packing, search.calls)
    if not given_positions_fit(model, proof):
        raise Refused("it takes position_ids of padded rows in a way of its own")
    check_checkpointing(model, proof)
    with contextlib.suppress(Unbuildable):  # not all have it
        search.positions &= positions_that_fit(build(model_type, arguments, "sdpa"), search.calls)
    if not search.positions:
        raise Refused("its left-padded rows have positions that depend on the attention implementation")
    if not only_base:
        vary(search, model)
    heads, on_rows, around = heads_that_fit(model_type, arguments, observed(model, positions, packing, search.calls))
    search.classes |= set(around)
    return search, search.proof(model, packing, heads, on_rows)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def prove_or_refuse(model_type: str, verbose: bool = False) -> dict[str, Any] | str:
    """Return the proof, or why there is none."""

    def log(text: str) -> None:
        if verbose:
            print(f"  {text}", file=sys.stderr)

    try:
        return dataclasses.asdict(prove(model_type, log))
    except Refused as reason:
        return str(reason)
    except Unbuildable as reason:
        return f"a small one can't be built and run ({reason})"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"a small one can't be built and run ({_short(error)}, in {place.name})"


def as_json(content: dict) -> str:
    """Return the list as JSON, one type a line."""

    def lines(found: dict) -> str:
        return (
            "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()) + "\n }"
        )

    parts = [
        f" {json.dumps(name)}: {lines(value) if isinstance(value, dict) else json.dumps(value)}"
        for name, value in content.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def merged(old: dict[str, Any] | None, results: dict[str, dict[str, Any] | str]) -> dict[str, Any]:
    """Return the list with these results in it. A type whose proof is the listed one keeps its oldest version."""
    old = old or {"older": [], "proven": {}, "refused": {}}
    proven = {name: proof for name, proof in old["proven"].items() if name not in results}
    refused = {name: reason for name, reason in old["refused"].items() if name not in results}
    for name, result in results.items():
        if isinstance(result, str):
            refused[name] = result
        else:
            listed = old["proven"].get(name)
            proven[name] = listed if listed and _is_listed(result, listed) else result
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "older": old["older"],
        "proven": dict(sorted(proven.items())),
        "refused": dict(sorted(refused.items())),
    }


def _is_listed(proof: dict[str, Any], listed: dict[str, Any]) -> bool:
    """Compare a proof of this version with the listed one, which has the classes of older versions too."""
    by_version = {"since", "classes"}
    same = as_json({k: v for k, v in proof.items() if k not in by_version}) == as_json(
        {k: v for k, v in listed.items() if k not in by_version}
    )
    return same and set(proof["classes"]) <= set(listed["classes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to prove (default: all, and nothing old is kept)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one a core)")
    parser.add_argument("--write", action="store_true", help="write both files (default: only print)")
    parser.add_argument("--verbose", action="store_true", help="say of each config that doesn't fold why")
    arguments = parser.parse_args()
    path = ROOT / "radix_ops" / "hf" / "models.json"
    old = json.loads(path.read_text()) if arguments.types else None
    if arguments.write and old and old["transformers"] != transformers.__version__:
        parser.error(f"{path.name} is of transformers {old['transformers']}, not {transformers.__version__}: prove all")
    transformers.logging.set_verbosity_error()
    types = arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {}
    for name, result in run_apart({name: (prove_or_refuse, name, arguments.verbose) for name in types}, arguments.jobs):
        results[name] = result
        print(f"{name}: {result if isinstance(result, str) else 'proven'}", file=sys.stderr, flush=True)
    content = merged(old, results)
    print(f"{len(results.keys() & content['proven'].keys())} of {len(types)} types proven")
    if arguments.write:
        path.write_text(as_json(content))
        (ROOT / "docs" / "models.md").write_text(page(content))


if __name__ == "__main__":
    main()
