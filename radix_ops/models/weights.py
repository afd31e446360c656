"""Weights of a transformers model, read from the safetensors of a folder or of a model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .._extras import require
from .files import check_no_adapter, check_regular, shards

DTypeName: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_folder(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """Return the folder, or one with those files of a hub model that match the patterns.

    Raises FileNotFoundError for neither, NotADirectoryError for a file.
    """
    path = Path(path_or_hub_id)
    if str(path_or_hub_id) and path.is_dir():
        return path
    if str(path_or_hub_id) and path.exists():
        raise NotADirectoryError(f"{path} must be a folder that transformers wrote, or a model on the hub")
    require("huggingface_hub", "models", "a model on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{str(path_or_hub_id)!r} is no folder, and could not be read from the Hugging Face hub: {error}"
        ) from None


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight in model.safetensors, or in the shards that its index names.

    Raises FileNotFoundError for a file that is not there; ValueError for a pickle, an adapter, a damaged file, one
    outside of the folder or that is no regular file, a name that stands twice, and a dtype that is not in DTYPES.
    """
    check_no_adapter(folder)
    index = folder / "model.safetensors.index.json"
    # transformers leaves the index of shards behind where one file follows them.
    is_whole = (folder / "model.safetensors").exists() or not index.exists()
    held = set()
    for file in ["model.safetensors"] if is_whole else shards(index):
        for name, tensor in _read(folder, file):
            if name in held:
                raise ValueError(f"{folder} holds {name} twice; one of its shards must go")
            if tensor.dtype not in DTYPES.values():
                raise ValueError(
                    f"{folder / file} holds {name} of {tensor.dtype}; weights must be of {', '.join(DTYPES)}, and "
                    "quantised ones are not supported"
                )
            held.add(name)
            yield name, tensor


def _read(folder: Path, file: str) -> Iterator[tuple[str, Tensor]]:
    require("safetensors", "models", "a file of safetensors")
    from safetensors import SafetensorError, safe_open

    path = folder / file
    if not path.exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; "
                "convert it once, if you trust it: transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER)"
            )
        raise FileNotFoundError(f"{folder} lacks {file}")
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
