"""The settings of a folder or hub model that sentence-transformers saved, read file by file and field by field.

Each field is known or refused: one that is ignored may be the one that makes an embedding what it is. The files are as
sentence-transformers 5 and 6 write them, and mean what 6.2 takes them to mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..models.files import is_inside, read_json
from .errors import UserError
from .inputs import check_text
from .loading import hub_file
from .messages import Messages

_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# By a Transformer module's task: its default feature, and which of transformers' outputs that is.
_OUTPUTS = {
    "feature-extraction": ("token_embeddings", "last_hidden_state"),
    "sequence-classification": ("scores", "logits"),
    "text-generation": ("causal_logits", "logits"),
}
# These options of from_pretrained change no number beyond rounding or, as trust_remote_code, are never taken from a
# folder. sentence-transformers 5 and 6 name them differently.
_MODEL_OPTIONS = {"dtype", "torch_dtype", "attn_implementation", "trust_remote_code"}
_TOKENIZER_OPTIONS = {"model_max_length", "padding_side", "trust_remote_code"}
# These are options of apply_chat_template, not of the template.
_RENDERING_OPTIONS = {
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenize", "tokenizer_kwargs",
    "common_kwargs", "conversation", "return_assistant_tokens_mask", "sanitize_control_tokens",
}  # fmt: skip


class Settings:
    """The object of one of the model's JSON files, of which fields are taken one by one; `close` refuses the rest."""

    def __init__(self, model: str, file: str, command: str, fields: dict | None = None):
        self.where, self.command = f"--model {model}: its {file}", command
        fields = read_file(model, file) if fields is None else fields
        self.is_there = fields is not None
        if not isinstance(fields, (dict, type(None))):
            raise UserError(f"{self.where} must hold a JSON object")
        self._fields = dict(fields or {})

    def __bool__(self) -> bool:
        return bool(self._fields)

    def has(self, key: str) -> bool:
        return key in self._fields

    def take(self, key: str, what: str, is_right: Callable[[object], bool], default=None):
        """Return the value of a field, which null leaves out. UserError for one that is not `what` it must be."""
        value = self._fields.pop(key, None)
        if value is None:
            return default
        if not is_right(value):
            raise UserError(f"{self.where} sets {key} to {_shortened(value)}; it must be {what}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return self.take(key, "true or false", lambda value: isinstance(value, bool), default)

    def count(self, key: str) -> int | None:
        return self.take(key, "a whole number from 1", is_count)

    def text(self, key: str) -> str | None:
        found = self.take(key, "a string", lambda value: isinstance(value, str))
        return found if found is None else check_text(found, f"{self.where} sets {key}, which")

    def object(self, key: str) -> Settings:
        found = self.take(key, "an object", lambda value: isinstance(value, dict), {})
        inner = Settings("", "", self.command, found)
        inner.where = f"{self.where}, {key},"
        return inner

    def options(self, keys: tuple[str, ...], known: set[str]) -> dict:
        """Return the object under its names. UserError for one with other keys than `known`."""
        found: dict = {}
        for key in keys:
            given = self.take(key, "an object", lambda value: isinstance(value, dict), {})
            if set(given) - known:
                self.refuse(key)
            found |= given
        return found

    def refuse(self, key: str) -> None:
        raise UserError(f"{self.where} sets {key}, which radix-ops {self.command} can't do")

    def rest(self) -> dict:
        """Take all fields that are left."""
        found, self._fields = self._fields, {}
        return found

    def close(self) -> None:
        left = sorted(key for key, value in self._fields.items() if value is not None)
        if left:
            raise UserError(
                f"{self.where} sets {', '.join(map(_shortened, left))}, which radix-ops {self.command} does not know, "
                "and which may change the result"
            )


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _shortened(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_file(model: str, file: str):
    """Return the value of a JSON file of the model; None where it has no such file."""
    path = hub_file(model, file)
    if path is None:
        return None
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"--model {model}: {error}") from error
    if found is None:
        raise UserError(f"--model {model}: its {file} holds null")
    return found


@dataclass(frozen=True)
class Module:
    """One of a model's modules."""

    kind: str  # the name of its class
    path: str  # its folder inside the model's, "" for that itself


def kind_of_class(type: str) -> str:
    return type.rpartition(".")[2]


def check_classes(model: str, types: list[str], command: str, kinds: tuple[str, ...] | None = None) -> None:
    """UserError for a class that is not sentence-transformers', or of none of `kinds`."""
    for type in types:
        if not type.startswith("sentence_transformers.") or (kinds and kind_of_class(type) not in kinds):
            raise UserError(f"--model {model} has the module {type}, which radix-ops {command} can't compute")


def find_modules(model: str, command: str, check: Callable[[list[str]], None]) -> list[Module] | None:
    """Return the modules of a model in their order; None where it was not saved by sentence-transformers.

    UserError for what is no list of modules, for what `check` refuses of their classes, and for classes that are not
    sentence-transformers' own.
    """
    listed = read_file(model, "modules.json")
    if listed is None:
        return None
    where = f"--model {model}: its modules.json"
    is_list = isinstance(listed, list) and all(isinstance(module, dict) for module in listed)
    if not is_list or not all(isinstance(module.get("type"), str) for module in listed):
        raise UserError(f"{where} does not list modules with type and path")
    types = [module["type"] for module in listed]
    check(types)
    check_classes(model, types, command)
    found, names = [], set()
    for index, module in enumerate(listed):
        settings = Settings(model, f"modules.json, module {index},", command, module)
        kind, path = kind_of_class(settings.text("type") or ""), settings.text("path")
        if path is None:
            raise UserError(f"{where} does not list modules with type and path")
        if not is_inside(path):
            raise UserError(f"{where} names the folder {path!r}; a module's must lie inside the model's")
        name = settings.take("name", "a string", lambda value: isinstance(value, str), str(index))
        if name in names:
            raise UserError(f"{where} names two modules {name!r}")
        names.add(name)
        settings.take("idx", "a whole number", lambda value: isinstance(value, int))
        # It names the options of encode that the module takes.
        settings.take("kwargs", "an array of names", lambda value: isinstance(value, (list, dict)))
        settings.close()
        found.append(Module(kind, path.rstrip("/")))
    return found


@dataclass(frozen=True)
class ModelSettings:
    """The settings in config_sentence_transformers.json."""

    prompts: dict[str, str] = field(default_factory=dict)
    prompt: str = ""  # the default one
    truncate_dim: int | None = None
    activation: str | None = None  # a cross-encoder's, as Python names it


def find_model_settings(model: str, command: str, model_type: str) -> ModelSettings:
    """Return them. UserError unless the folder is of a `model_type`, "SentenceTransformer" or "CrossEncoder"."""
    settings = Settings(model, "config_sentence_transformers.json", command)
    # Files of sentence-transformers before 3 have no such key; null is none of its names.
    found = settings.text("model_type") if settings.has("model_type") else "SentenceTransformer"
    if found != model_type:
        kind = f"a {found}" if found else "of no model_type"
        raise UserError(f"--model {model} is {kind}; radix-ops {command} computes a {model_type}")
    prompts = settings.take("prompts", "an object of strings", _are_prompts, {})
    # A SentenceTransformer has these two, empty where the file doesn't say.
    known = {"query": "", "document": ""} if model_type == "SentenceTransformer" else {}
    known |= {name: prompt or "" for name, prompt in prompts.items()}
    default = settings.take(
        "default_prompt_name",
        f"one of {', '.join(known) or 'its prompts'}",
        lambda name: isinstance(name, str) and name in known,
    )
    prompt = check_text(known[default], f"{settings.where}: the prompt {default!r}") if default else ""
    settings.take("similarity_fn_name", "a string", lambda value: isinstance(value, str))  # which compares embeddings
    settings.take("__version__", "an object", lambda value: isinstance(value, dict))
    dim = settings.count("truncate_dim")
    activation = settings.text("activation_fn") if model_type == "CrossEncoder" else None
    settings.close()
    return ModelSettings(known, prompt, dim, activation)


def _are_prompts(value) -> bool:
    return isinstance(value, dict) and all(isinstance(prompt, (str, type(None))) for prompt in value.values())


@dataclass(frozen=True)
class TransformerSettings:
    """The settings of a Transformer module."""

    source: str  # folder or hub id of the transformers model
    max_length: int | None = None
    messages: Messages | None = field(default=None)  # where a chat template renders each text or pair


def find_transformer(model: str, module: Module, command: str, task: str) -> TransformerSettings:
    """Return a module's settings. UserError for a task other than `task`, and for any setting that is not done here."""
    if module.path and not Path(model).is_dir():
        raise UserError(f"--model {model} has its weights in {module.path}: download it and name the folder")
    for file in _TRANSFORMER_FILES:
        settings = Settings(model, f"{module.path}/{file}".lstrip("/"), command)
        if settings:
            break
    if (settings.text("transformer_task") or "feature-extraction") != task:
        settings.refuse("transformer_task")
    if settings.flag("do_lower_case"):
        settings.refuse("do_lower_case")
    max_length = settings.count("max_seq_length")
    for key in ("query_length", "document_length"):  # which encode_query and encode_document take
        settings.count(key)
    settings.flag("unpad_inputs")  # which changes a batch's place in memory alone
    settings.options(("model_args", "model_kwargs"), _MODEL_OPTIONS)
    settings.options(("config_args", "config_kwargs"), {"trust_remote_code"})
    tokenizer = settings.options(("tokenizer_args", "processor_kwargs", "tokenizer_kwargs"), _TOKENIZER_OPTIONS)
    if tokenizer.get("model_max_length") is not None:
        if not is_count(tokenizer["model_max_length"]):
            raise UserError(f"{settings.where} sets a model_max_length that is no whole number from 1")
        max_length = tokenizer["model_max_length"]
    messages = _messages(settings, task)
    settings.close()
    source = str(Path(model) / module.path) if module.path else model
    return TransformerSettings(source, max_length, messages)


def _messages(settings: Settings, task: str) -> Messages | None:
    """Return how the chat template is used where the module has the modality "message"; it goes before "text"."""
    feature, output = _OUTPUTS[task]
    has_modalities = settings.take("modality_config", "an object", lambda value: isinstance(value, dict))
    if (settings.text("module_output_name") or feature) != feature:
        settings.refuse("module_output_name")
    template, keeps_tail = _processing(settings.object("processing_kwargs"))
    if has_modalities is None:
        return None
    if not has_modalities or set(has_modalities) - {"text", "message"}:
        settings.refuse("modality_config")  # images and sound: a text that names a picture's file would be read as one
    for name, given in has_modalities.items():
        fields = dict(given) if isinstance(given, dict) else {}
        kind = fields.pop("format", "auto")
        is_known = kind in ("flat", "structured", "auto") and (name == "message" or kind == "auto")
        if not is_known or fields not in ({"method": "forward", "method_output_name": x} for x in (output, [output])):
            settings.refuse("modality_config")
    if "message" not in has_modalities:
        return None
    return Messages(has_modalities["message"].get("format", "auto"), template, keeps_tail)


def _processing(settings: Settings) -> tuple[dict, bool]:
    """Return the chat template's arguments, and whether its end outlives a cut."""
    text = settings.object("text")
    # The last token's logits are among those that are kept.
    text.take("logits_to_keep", "a whole number", lambda value: isinstance(value, int))
    text.close()
    template = settings.object("chat_template")
    keeps_tail = template.flag("restore_suffix", True)
    found = template.rest()
    if set(found) & _RENDERING_OPTIONS:
        template.refuse(min(set(found) & _RENDERING_OPTIONS))
    for key in ("common", "audio", "image", "video"):
        settings.object(key).close()
    settings.close()
    return found, keeps_tail
