"""The settings by which a cross-encoder scores a pair of texts, read from its folder or from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from .errors import UserError
from .messages import Chat, Messages
from .sentence_folder import Module, Settings, find_model_settings, find_modules, find_transformer, kind_of_class
from .templates import TEMPLATES, Template, find_template

READINGS = ("pairs", "chat")  # a pair is read by the tokenizer, or by its chat template
_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
}


@dataclass(frozen=True)
class CrossEncoder:
    """The way from a query and a document to a score, where no `Template` is used."""

    classifies: bool  # by a classification head; else by a token's logit against another's
    answers: tuple[int, int | None] | None = None  # those tokens; without a second one the first's logit counts
    activation: str = "sigmoid"  # or "identity"
    prompt: str = ""  # stands before the query, or is the system's message
    max_length: int | None = None
    messages: Messages | None = None  # where a chat template renders each pair
    is_open: bool = False  # whether neither folder nor config says if a template renders pairs


def find_cross_encoder(name: str, config, loaded: str | None = None) -> CrossEncoder | None:
    """Return what a folder or hub model says of scoring pairs, given its transformers config; None for a language model
    of which nothing is said. `loaded` is the class of a model that is loaded already, which has the config alone.

    A classification head counts as a cross-encoder without a modules.json, too. UserError for modules and settings that
    would need something else than a classification head of one label, or two tokens' logits.
    """
    modules = None if loaded else find_modules(name, "rerank", lambda types: _check_modules(name, types))
    classifies = (loaded or (getattr(config, "architectures", None) or [""])[0]).endswith("ForSequenceClassification")
    if modules is None:
        if not classifies:
            return None
        activation, is_old = _of_config(name, config)
        return CrossEncoder(True, activation=activation, is_open=not is_old)
    kinds = [module.kind for module in modules]
    if classifies == (kinds[-1] == "LogitScore"):
        raise UserError(
            f"--model {name} has the modules {', '.join(kinds)} and {'a' if classifies else 'no'} classification head"
        )
    if modules[0].path:
        raise UserError(
            f"--model {name} has its weights in {modules[0].path}, and radix-ops rerank wants them beside modules.json"
        )
    model = find_model_settings(name, "rerank", "CrossEncoder")
    task = "sequence-classification" if classifies else "text-generation"
    transformer = find_transformer(name, modules[0], "rerank", task)
    given = model.activation
    return CrossEncoder(
        classifies,
        None if classifies else _answers(name, modules[1], config),
        _of_config(name, config)[0] if given is None else _activation(name, given),
        model.prompt,
        transformer.max_length,
        transformer.messages,
    )


def _check_modules(name: str, types: list[str]) -> None:
    kinds = [kind_of_class(type) for type in types]
    if kinds not in (["Transformer"], ["Transformer", "LogitScore"]):
        raise UserError(
            f"--model {name} has the modules {', '.join(kinds)}; radix-ops rerank computes Transformer alone, or "
            "Transformer and LogitScore"
        )


def _answers(name: str, module: Module, config) -> tuple[int, int | None]:
    settings = Settings(name, f"{module.path}/config.json", "rerank")
    size = config.get_text_config().vocab_size

    def is_token(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size

    true, false = (
        settings.take(key, f"a token's id, from 0 to {size - 1}", is_token)
        for key in ("true_token_id", "false_token_id")
    )
    if true is None:
        raise UserError(f"{settings.where} lacks true_token_id")
    if (settings.text("module_input_name") or "causal_logits") != "causal_logits":
        settings.refuse("module_input_name")
    settings.close()
    return true, false


def _of_config(name: str, config) -> tuple[str, bool]:
    """Return (activation, whether sentence-transformers saved it before it had modules) by the config.json."""
    given = getattr(config, "sentence_transformers", None)
    settings = Settings(name, "config.json, sentence_transformers,", "rerank", {} if given is None else given)
    older = getattr(config, "sbert_ce_default_activation_function", None)
    activation, version = settings.text("activation_fn"), settings.text("version")
    settings.close()
    is_old = older is not None or (version is not None and _is_before_modules(version))
    return _activation(name, activation or older or "torch.nn.Sigmoid"), is_old


def _is_before_modules(version: str) -> bool:
    try:
        return Version(version) < Version("5.4")
    except InvalidVersion:
        return False


def _activation(name: str, activation) -> str:
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"--model {name} sets activation_fn to {activation!r}; radix-ops rerank computes "
            f"{' and '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]


def template_of(name: str, config, given: str | Template | None, encoder: CrossEncoder | None) -> Template | None:
    """Return the template by which a model reads queries, None for a cross-encoder's pairs; `given` is what the user
    names. UserError where there is none."""
    if isinstance(given, Template):
        return given
    if given is not None and given not in READINGS:
        return find_template(given)
    if encoder is not None:
        return None
    if given is not None:
        raise UserError(f"--template {given} says how a cross-encoder reads, and --model {name} is none")
    if config.model_type == "qwen3":
        return TEMPLATES["qwen3-reranker"]
    raise UserError(
        f"--model {name} is a language model of type {config.model_type}, which has no template of its own: "
        f"name one by --template, {' or '.join(TEMPLATES)} or a JSON file"
    )


def check_head(name: str, config) -> int:
    """Return the token that a cross-encoder's batches are padded with. UserError for a head that can't be used."""
    if config.num_labels != 1:
        raise UserError(
            f"--model {name} has a classification head of {config.num_labels} labels; rerank needs one of 1, and "
            "`radix-ops classify` gives each label's probability"
        )
    pad_token_id = config.get_text_config().pad_token_id
    if pad_token_id is None:
        raise UserError(
            f"--model {name}: its config has no pad_token_id, by which the head finds the last token of each text of a "
            "batch"
        )
    return pad_token_id


def chat_of(name: str, encoder: CrossEncoder, reading: str | None, tokenizer, config) -> Chat | None:
    """Return what renders a cross-encoder's pairs, None where they are pairs to the tokenizer; `reading` is "chat" or
    "pairs" where the user says so.

    UserError for a template that drops a query or a document, and where a folder leaves open whether a template that
    takes both renders them: to sentence-transformers 6 it does, to those before and to transformers it doesn't.
    """
    if reading == "pairs" or (reading is None and encoder.messages is None and not encoder.is_open):
        return None
    messages = (encoder.messages or Messages()).fitted(tokenizer, config.model_type)
    chat, roles = Chat(tokenizer, messages, encoder.prompt), ("query", "document")
    if reading is None and encoder.is_open:
        if _takes(chat, tokenizer, roles):
            raise UserError(
                f"--model {name} does not say whether its chat template, which takes a query and a document, renders "
                "its pairs: --template chat does so, as sentence-transformers 6 does; --template pairs leaves it aside"
            )
        return None
    chat.check(roles)
    return chat


def _takes(chat: Chat, tokenizer, roles: tuple[str, ...]) -> bool:
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    try:
        return not chat.dropped(roles)
    except UserError:  # the template knows no such roles
        return False
