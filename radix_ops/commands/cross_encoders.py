"""How a cross-encoder scores a pair of texts, as sentence-transformers, or its config alone, writes it down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .messages import Chat, Messages
from .records import UserError
from .sentence_folder import (
    Module,
    Settings,
    find_model_settings,
    find_modules,
    find_transformer,
    kind_of_class,
)

_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
}


@dataclass(frozen=True)
class CrossEncoder:
    """How a query and a document become a score, where no template of radix-ops' own is used."""

    classifies: bool  # by a classification head; else by a token's logit against another's
    answers: tuple[int, int | None] | None = None  # those tokens; of one alone the logit counts
    activation: str = "sigmoid"  # or "identity"
    prompt: str = ""  # stands before the query, or is the system's message
    max_length: int | None = None
    messages: Messages | None = None  # where a chat template renders each pair
    is_saved: bool = True  # by sentence-transformers, with modules


def find_cross_encoder(name: str, config) -> CrossEncoder | None:
    """What a folder or hub model says of scoring pairs, given its transformers config; None for a language model of
    which nothing is said.

    A classification head counts as a cross-encoder without a modules.json, too. UserError for modules and settings that
    would need something else than a classification head of one label, or two tokens' logits.
    """
    modules = find_modules(name, "rerank", lambda types: _check_modules(name, types))
    classifies = (getattr(config, "architectures", None) or [""])[0].endswith("ForSequenceClassification")
    if modules is None:
        encoder = CrossEncoder(classifies, messages=Messages(), is_saved=False)
        return dataclasses.replace(encoder, activation=_old_activation(name, config)) if classifies else None
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
        _old_activation(name, config) if given is None else _activation(name, given),
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


def _old_activation(name: str, config) -> str:
    """That of config.json, where older folders have it, and the sigmoid without one."""
    given = getattr(config, "sentence_transformers", None)
    settings = Settings(name, "config.json, sentence_transformers,", "rerank", {} if given is None else given)
    found = settings.text("activation_fn")
    settings.text("version")
    settings.close()
    return _activation(
        name, found or getattr(config, "sbert_ce_default_activation_function", None) or "torch.nn.Sigmoid"
    )


def _activation(name: str, activation) -> str:
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"--model {name} sets activation_fn to {activation!r}; radix-ops rerank computes "
            f"{' and '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]


def chat_of(encoder: CrossEncoder, tokenizer, config) -> Chat | None:
    """What renders the pairs of a cross-encoder, None where they are pairs to the tokenizer.

    A folder that says nothing of that is rendered where its tokenizer has a chat template that takes a query and a
    document, as sentence-transformers 6 does. UserError for a template that drops one of them where the folder says so.
    """
    if encoder.messages is None:
        return None
    messages = encoder.messages.fitted(tokenizer, config.model_type)
    chat = Chat(tokenizer, messages, encoder.prompt)
    if encoder.is_saved:
        chat.check(("query", "document"))
        return chat
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        return None if chat.dropped(("query", "document")) else chat
    except UserError:  # of a template that knows no such roles
        return None
