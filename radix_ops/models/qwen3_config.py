"""The config of a Qwen3: a config.json of transformers, checked and completed by transformers' defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .files import read_object
from .weights import find_folder

_MOST = 2**31 - 1
# Bounds of whole numbers that no model comes near, and whose products are still numbers of bytes.
_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
}
_ROPE_NEEDS = {"default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The shape of a Qwen3. `from_pretrained` and `from_dict` read it from a config.json of transformers.

    Raises ValueError for a value that is of another kind or out of range, naming it and what is allowed.

    Attributes:
        rope: rope_type ("default", "linear" or "yarn"), rope_theta, and what the type needs.
        sliding_windows: each layer's window, None for full attention.
        pad_token_id: the token whose embedding gets no gradient, if any.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    head_dim: int
    rope: dict[str, Any]
    sliding_windows: tuple[int | None, ...]
    attention_bias: bool = False
    max_position_embeddings: int = 32768
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            _check_count(name, getattr(self, name), most, least=name != "num_hidden_layers")
        _check_count("head_dim", self.head_dim, 2**16)
        _check_count("max_position_embeddings", self.max_position_embeddings)
        for name in ("attention_bias", "tie_word_embeddings"):
            _check_flag(name, getattr(self, name))
        _check_real("rms_norm_eps", self.rms_norm_eps, "from 0", lambda value: value >= 0)
        _check_real("attention_dropout", self.attention_dropout, "from 0, less than 1", lambda value: 0 <= value < 1)
        _check_real("initializer_range", self.initializer_range, "from 0", lambda value: value >= 0)
        if self.pad_token_id is not None:
            low = -self.vocab_size  # counts from the end, as in nn.Embedding
            is_token = _is_whole(self.pad_token_id) and low <= self.pad_token_id < self.vocab_size
            _check("pad_token_id", self.pad_token_id, f"from {low} to {self.vocab_size - 1}", is_token)
        if len(self.sliding_windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows must hold one entry for each of {self.num_hidden_layers} layers, "
                f"got {len(self.sliding_windows)}"
            )
        for window in set(self.sliding_windows) - {None}:
            _check_count("sliding_window", window)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        _check_rope(self.rope)

    @property
    def longest_sequence(self) -> int:
        """max_position_embeddings, or the length that the rotary embedding is scaled for, where that is more."""
        if self.rope["rope_type"] == "default":
            return self.max_position_embeddings
        original = self.rope.get("original_max_position_embeddings") or self.max_position_embeddings
        return max(self.max_position_embeddings, int(original * self.rope["factor"]))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> Qwen3Config:
        """Read the config.json of a folder, or of a model on the Hugging Face hub.

        Raises FileNotFoundError for what is not there, ValueError as `from_dict` does and for a file that is no JSON
        object.
        """
        path = find_folder(path_or_hub_id, ["config.json"]) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} holds no config.json")
        return cls.from_dict(read_object(path))

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Qwen3Config:
        """Take the values of a config.json, and transformers' defaults for those it leaves out.

        Raises ValueError for what is not a Qwen3, and for what this model does not compute.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config must be the dict of a config.json, got {type(config).__name__}")
        if config.get("model_type") != "qwen3":
            raise ValueError(f'model_type must be "qwen3", got {config.get("model_type")!r}')
        required = (*_SIZES, "rms_norm_eps")
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f'hidden_act must be "silu", got {config["hidden_act"]!r}')
        if not _flag(config, "is_causal", True) or _flag(config, "use_bidirectional_attention"):
            raise ValueError("the config asks for attention that is not causal, which can't be folded")
        for name in ("quantization_config", "compression_config"):
            if config.get(name):
                raise ValueError(f"{name}: quantised weights are not supported")
        return cls(
            **{name: config[name] for name in required},
            head_dim=_given(config, "head_dim", 128),
            rope=_rope(config),
            sliding_windows=_sliding_windows(config),
            attention_bias=_flag(config, "attention_bias"),
            max_position_embeddings=_longest(config),
            attention_dropout=_given(config, "attention_dropout", 0.0),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            pad_token_id=config.get("pad_token_id"),
            initializer_range=_given(config, "initializer_range", 0.02),
        )


def _given(config: dict[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _flag(config: dict[str, Any], name: str, default: bool = False) -> bool:
    return _check_flag(name, _given(config, name, default))


def _check(name: str, value: Any, what: str, is_right: bool) -> Any:
    if not is_right:
        shown = repr(value)
        raise ValueError(f"{name} must be {what}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")
    return value


def _check_flag(name: str, value: Any) -> bool:
    return _check(name, value, "true or false", isinstance(value, bool))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_count(name: str, value: Any, most: int = _MOST, least: int = 1) -> int:
    right = _is_whole(value) and least <= value <= most
    return _check(name, value, f"a whole number from {int(least)} to {most}", right)


def _check_real(name: str, value: Any, what: str, is_right: Callable[[float], bool]) -> float:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    is_finite = is_real and abs(value) <= 1e300  # False for NaN
    return _check(name, value, f"a number {what}", is_finite and is_right(value))


def _longest(config: dict[str, Any]) -> int:
    return _check_count("max_position_embeddings", _given(config, "max_position_embeddings", 32768))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Read the rotary embedding in the form of transformers 5 or that of 4, which goes first where both are."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = _given(config, name, {})
    rope = dict(_check(name, given, "an object", isinstance(given, dict)))
    nested = [key for key, value in rope.items() if isinstance(value, (dict, list))]
    if nested:
        raise ValueError(f"{name} sets {', '.join(map(str, nested))} apart, which this model does not compute")
    older_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or older_name or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = _given(config, "rope_theta", 10_000.0)
    for place in (rope, config):
        if _given(place, "partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor must be 1, got {place['partial_rotary_factor']}")
    if rope["rope_type"] == "yarn":
        longest = _longest(config)
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or longest
        if rope.get("factor") is None:
            _check_count("original_max_position_embeddings", rope["original_max_position_embeddings"])
            rope["factor"] = longest / rope["original_max_position_embeddings"]
    return rope


def _check_rope(rope: dict[str, Any]) -> None:
    _check("rope", rope, "a dict", isinstance(rope, dict))
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise ValueError(f'rope_type must be "default", "linear" or "yarn", got {kind!r}')
    lacks = [name for name in ("rope_theta", *_ROPE_NEEDS[kind]) if rope.get(name) is None]
    if lacks:
        raise ValueError(f"rope_type {kind!r} needs {' and '.join(lacks)}")
    least = 1 if kind == "yarn" else 0  # YaRN divides by its logarithm
    _check_real("rope_theta", rope["rope_theta"], f"more than {least}", lambda value: value > least)
    if kind == "default":
        return
    for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name) is not None and (name == "factor" or kind == "yarn"):
            _check_real(name, rope[name], "more than 0", lambda value: value > 0)
    if rope.get("original_max_position_embeddings") is not None:
        _check_count("original_max_position_embeddings", rope["original_max_position_embeddings"])
    if rope.get("truncate") is not None:
        _check_flag("truncate", rope["truncate"])


def _sliding_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    layers = _check_count("num_hidden_layers", config["num_hidden_layers"], _SIZES["num_hidden_layers"], least=0)
    window = config.get("sliding_window", 4096) if _flag(config, "use_sliding_window") else None
    if window is not None:
        _check_count("sliding_window", window)
    types = config.get("layer_types")
    if types is None:
        first = _check_count("max_window_layers", _given(config, "max_window_layers", 28), least=0)
        types = [_LAYER_TYPES[bool(window) and i >= first] for i in range(layers)]
    is_list = isinstance(types, (list, tuple)) and all(isinstance(kind, str) for kind in types)
    unknown = sorted(set(_check("layer_types", types, "an array of strings", is_list)) - set(_LAYER_TYPES))
    if unknown or len(types) != layers:
        raise ValueError(
            f"layer_types must name {layers} layers full_attention or sliding_attention, got {len(types)} "
            f"{'of ' + ', '.join(unknown) if unknown else ''}".rstrip()
        )
    if "sliding_attention" in types and not window:
        raise ValueError("layer_types names sliding_attention, but use_sliding_window and sliding_window set no window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
