"""How a model's folder wants embeddings to be made of its hidden states, as sentence-transformers writes it down."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .loading import hub_file
from .records import UserError

POOLINGS = ("last", "mean")
# What sentence-transformers calls poolings, and how old folders say it.
_POOLING_NAMES = {"lasttoken": "last", "mean": "mean"}
_OLD_POOLING = "pooling_mode_"
_OLD_POOLING_NAMES = {"lasttoken": "lasttoken", "mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
_POOLED = "sentence_embedding"
# Of sentence_bert_config.json: keys that don't change an embedding, or that are looked at here.
_KNOWN_TRANSFORMER_KEYS = {
    "max_seq_length",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "unpad_inputs",
}
_KNOWN_MODEL_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}


@dataclass(frozen=True)
class Recipe:
    """How a text becomes an embedding."""

    source: str  # folder, hub id or .gguf file of the transformers model
    pooling: str = "last"
    normalize: bool = True
    prompt: str = ""  # stands before each text
    pools_prompt: bool = True  # whether a mean is over the prompt's tokens, too
    dim: int | None = None  # numbers that are kept; all of them by default
    cuts_last: bool = False  # whether numbers go after the normalisation, as a folder's truncate_dim has it
    max_length: int | None = None  # tokens, special ones included


def find_recipe(name: str) -> Recipe:
    """What a sentence-transformers folder or hub model (one with a modules.json) says; elsewhere the defaults.

    UserError for modules and settings that would need something else than pooling and normalisation.
    """
    modules = _read_json(name, "modules.json")
    if modules is None:
        return Recipe(name)
    try:
        types, paths = [module["type"] for module in modules], [module["path"] for module in modules]
    except (TypeError, KeyError) as error:
        raise UserError(f"--model {name}: its modules.json does not list modules with type and path") from error
    kinds = [type.rpartition(".")[2] for type in types]
    for type, kind in zip(types, kinds, strict=True):
        if kind not in ("Transformer", "Pooling", "Normalize") or not type.startswith("sentence_transformers."):
            raise UserError(f"--model {name} has the module {type}, which radix-ops embed can't compute")
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"--model {name} has the modules {', '.join(kinds)}; radix-ops embed computes Transformer, Pooling and "
            "then perhaps Normalize"
        )
    for path in paths[2:]:
        if (_read_json(name, f"{path}/config.json") or {}).get("module_input_name", _POOLED) != _POOLED:
            raise UserError(f"--model {name} normalises something else than {_POOLED}, which radix-ops embed can't do")
    settings = _read_json(name, "config_sentence_transformers.json") or {}
    recipe = _with_pooling(Recipe(name, normalize="Normalize" in kinds), name, paths[1])
    recipe = _with_transformer(recipe, name, paths[0])
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""
    dim = settings.get("truncate_dim")
    return dataclasses.replace(recipe, prompt=prompt, dim=dim, cuts_last=dim is not None)


def _with_pooling(recipe: Recipe, name: str, path: str) -> Recipe:
    config = _read_json(name, f"{path}/config.json") or {}
    modes = config.get("pooling_mode")
    if modes is None:
        chosen = [key.removeprefix(_OLD_POOLING) for key in config if key.startswith(_OLD_POOLING) and config[key]]
        modes = [_OLD_POOLING_NAMES.get(mode, mode) for mode in chosen] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in _POOLING_NAMES:
        raise UserError(f"--model {name} pools by {' and '.join(modes)}; radix-ops embed pools by lasttoken or by mean")
    return dataclasses.replace(
        recipe, pooling=_POOLING_NAMES[modes[0]], pools_prompt=config.get("include_prompt", True) is not False
    )


def _with_transformer(recipe: Recipe, name: str, path: str) -> Recipe:
    config = _read_json(name, f"{path}/sentence_bert_config.json".lstrip("/")) or {}
    for key, value in config.items():
        is_model_option = key in ("model_args", "model_kwargs") and not set(value or ()) - _KNOWN_MODEL_OPTIONS
        if value and key not in _KNOWN_TRANSFORMER_KEYS and not is_model_option:
            raise _unknown_setting(name, key)
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _unknown_setting(name, "transformer_task")
    if "modality_config" in config:
        text = config["modality_config"].get("text") or {}
        if text.get("method") != "forward" or text.get("method_output_name") != "last_hidden_state":
            raise _unknown_setting(name, "modality_config")
    if path and not Path(name).is_dir():
        raise UserError(f"--model {name} has its weights in {path}: download it and name the folder")
    source = str(Path(name) / path) if path else name
    return dataclasses.replace(recipe, source=source, max_length=config.get("max_seq_length"))


def _unknown_setting(name: str, key: str) -> UserError:
    return UserError(f"--model {name}: its sentence_bert_config.json sets {key}, which radix-ops embed can't do")


def _read_json(name: str, file: str):
    path = hub_file(name, file)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def check_cross_encoder(name: str) -> None:
    """UserError where a sentence-transformers folder asks for more than the model's own classification head."""
    kinds = [module["type"].rpartition(".")[2] for module in _read_json(name, "modules.json") or []]
    if kinds not in ([], ["Transformer"]):
        raise UserError(
            f"--model {name} has the modules {', '.join(kinds)}; radix-ops rerank computes Transformer alone"
        )
    settings = _read_json(name, "config_sentence_transformers.json") or {}
    if (settings.get("prompts") or {}).get(settings.get("default_prompt_name")):
        raise UserError(f"--model {name} has a default prompt, which radix-ops rerank can't put before its pairs")
