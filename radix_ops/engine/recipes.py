"""The recipe of a model's folder for embeddings, as sentence-transformers writes it down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .errors import UserError
from .messages import Messages
from .pooling import POOLINGS, Pooling
from .sentence_folder import (
    Module,
    Settings,
    check_classes,
    find_model_settings,
    find_modules,
    find_transformer,
    kind_of_class,
)

# sentence-transformers' names are ours but for one. The flags of older folders stand in the order of their poolings.
_POOLING_NAMES = {{"last": "lasttoken"}.get(name, name): name for name in POOLINGS}
_OLD_POOLING_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLED = "sentence_embedding"


@dataclass(frozen=True)
class Recipe:
    """The way from a text to an embedding."""

    source: str  # folder, hub id or .gguf file of the transformers model
    poolings: tuple[Pooling, ...] = ("last",)  # an embedding is these side by side
    normalize: bool = True
    prompt: str = ""  # stands before each text, or is the system's message
    pools_prompt: bool = True  # whether a pooling but the last token's counts the prompt's tokens, too
    dim: int | None = None  # numbers that are kept; all of them by default
    cuts_last: bool = False  # whether numbers go after the normalisation, as a folder's truncate_dim has it
    max_length: int | None = None  # tokens, special ones included
    messages: Messages | None = None  # where a chat template renders each text
    prompts: dict[str, str] = field(default_factory=dict, compare=False)  # by name, for calls that name one

    @property
    def skips_prompt(self) -> bool:
        """Return whether a pooling leaves the prompt out."""
        return bool(self.prompt) and not self.pools_prompt and self.poolings != ("last",)

    @property
    def identity(self) -> tuple:
        """Return what decides about an embedding beside the tokens of its text."""
        return ("", self.poolings, self.normalize, "", self.pools_prompt, self.dim, self.cuts_last, None, None)


def find_recipe(name: str) -> Recipe:
    """Return what a sentence-transformers folder or hub model (one with a modules.json) says; elsewhere the defaults.

    UserError for modules and settings that would need something else than pooling and normalisation.
    """
    modules = find_modules(name, "embed", lambda types: _check_modules(name, types))
    if modules is None:
        return Recipe(name)
    for module in modules[2:]:
        _check_normalize(name, module)
    model = find_model_settings(name, "embed", "SentenceTransformer")
    recipe = _with_pooling(Recipe(name, normalize=len(modules) == 3), name, modules[1])
    transformer = find_transformer(name, modules[0], "embed", "feature-extraction")
    return dataclasses.replace(
        recipe,
        source=transformer.source,
        max_length=transformer.max_length,
        messages=transformer.messages,
        prompts=model.prompts,
        prompt=model.prompt,
        dim=model.truncate_dim,
        cuts_last=model.truncate_dim is not None,
        # A template's tokens don't tell where the prompt ends.
        pools_prompt=recipe.pools_prompt or transformer.messages is not None,
    )


def _check_modules(name: str, types: list[str]) -> None:
    check_classes(name, types, "embed", ("Transformer", "Pooling", "Normalize"))
    kinds = [kind_of_class(type) for type in types]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"--model {name} has the modules {', '.join(kinds)}; radix-ops embed computes Transformer, Pooling and "
            "then perhaps Normalize"
        )


def _check_normalize(name: str, module: Module) -> None:
    settings = Settings(name, f"{module.path}/config.json", "embed")
    for key in ("module_input_name", "module_output_name"):
        if (settings.text(key) or _POOLED) != _POOLED:
            raise UserError(f"--model {name} normalises something else than {_POOLED}, which radix-ops embed can't do")
    settings.close()


def _with_pooling(recipe: Recipe, name: str, module: Module) -> Recipe:
    settings = Settings(name, f"{module.path}/config.json", "embed")
    if not settings.is_there:
        raise UserError(f"--model {name} has the module Pooling, and no {module.path}/config.json that says how")
    flags = [mode for key, mode in _OLD_POOLING_NAMES.items() if settings.flag(key)]
    modes = settings.take("pooling_mode", "a pooling's name, or an array of them", _are_names, flags or ["mean"])
    modes = [modes] if isinstance(modes, str) else modes
    if set(modes) - set(_POOLING_NAMES):
        known = ", ".join(_POOLING_NAMES)
        raise UserError(f"--model {name} pools by {' and '.join(modes)}; radix-ops embed pools by {known}")
    for key in ("embedding_dimension", "word_embedding_dimension"):
        settings.count(key)
    pools_prompt = settings.flag("include_prompt", True)
    if "cls" in modes and not pools_prompt:  # the prompt's first token up to sentence-transformers 5, the text's to 6
        settings.refuse("include_prompt to false beside the pooling cls")
    settings.close()
    return dataclasses.replace(
        recipe, poolings=tuple(_POOLING_NAMES[mode] for mode in modes), pools_prompt=pools_prompt
    )


def _are_names(value) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
