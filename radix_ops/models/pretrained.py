"""Loads a Qwen3 from the files of its folder, whose names of weights are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .qwen3_config import Qwen3Config
from .weights import DTYPES, DTypeName, find_folder, read_weights

M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """A Qwen3 with or without its language-model head, which is called `lm_head`."""

    @classmethod
    def from_pretrained(
        cls: type[M],
        path_or_hub_id: str | Path,
        dtype: torch.dtype | DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> M:
        """Load the safetensors of a folder or of a hub model, in their own dtype by default, for evaluation.

        Raises FileNotFoundError for what is not there, ValueError for a pickle, a dtype that is no floating point, and
        files that are not a Qwen3's.
        """
        return _from_pretrained(cls, path_or_hub_id, dtype, device)


def _from_pretrained(
    cls: type[M],
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> M:
    wanted_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted_dtype not in DTYPES.values():
        raise ValueError(f"dtype must be None or one of {', '.join(DTYPES)}, got {dtype!r}")
    device = torch.device("cpu" if device is None else device)
    folder = find_folder(path_or_hub_id, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    config = Qwen3Config.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = cls(config)
    has_head = hasattr(model, "lm_head")
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    embedding = "model.embed_tokens.weight" if has_head else "embed_tokens.weight"
    weights: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    head = None
    for name, tensor in read_weights(folder):
        # A base model's file lacks the prefix that a causal model's has.
        base = name.removeprefix("model.")
        place = f"model.{base}" if has_head and base != "lm_head.weight" else base
        if name.endswith("rotary_emb.inv_freq"):  # old files hold what is computed here
            continue
        if place in names:
            raise ValueError(f"{folder} holds both {names[place]} and {name}, which are one weight of a Qwen3")
        names[place] = name
        if base == "lm_head.weight" and (config.tie_word_embeddings or place not in wanted):
            head = tensor
            continue
        if not has_head and name.startswith("score."):  # a head on sequences or tokens
            continue
        if place not in wanted:
            raise ValueError(f"{folder} holds {name}, which a Qwen3 does not have")
        if tensor.shape != wanted[place]:
            raise ValueError(f"{name} must have shape {list(wanted[place])}, but the file has {list(tensor.shape)}")
        weights[place] = tensor
    # A file may hold either of the two names for one tensor, or both.
    if config.tie_word_embeddings and head is not None and not torch.equal(weights.setdefault(embedding, head), head):
        raise ValueError(
            f"{folder} holds an lm_head.weight that differs from the embedding, but tie_word_embeddings is set"
        )
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}")
    weights = {name: tensor.to(device, wanted_dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if has_head and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True).eval()
