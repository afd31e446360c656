"""Tokenizers, configs and models by name: a local folder, a hub id or a .gguf file; and the runner of a model.

Whatever can't be loaded is a UserError with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._attention import Layout
from ..models.files import check_folder, check_no_adapter, shards
from .errors import UserError, needs
from .runners import ClassifierRunner, Qwen3Runner, Runner, TransformersRunner

# The names are safetensors' and torch's.
_FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_DEVICES = ("cpu", "cuda")
_HUB_TIMEOUT = 10  # seconds
_on_hub: set[str] = set()  # models that are known to be there

_logger = logging.getLogger(__name__)


def load_tokenizer(name: str, option: str = "--model", trust_remote_code: bool = False):
    """Load the tokenizer of transformers; `option` is what the user gave the name by."""
    source, options = _source(name, option)
    with loading("tokenizer", source):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def has_tokenizer(name: str) -> bool:
    """Return False for a local folder that holds no file of a tokenizer."""
    path = Path(name)
    if not path.is_dir():
        return True
    return any(any(path.glob(pattern)) for pattern in ("*token*", "*vocab*", "*spiece*", "*.tiktoken", "merges.txt"))


def load_config(name: str, option: str = "--model", trust_remote_code: bool = False):
    """Load the config of transformers."""
    source, options = _source(name, option)
    with loading("config", source):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def load_runner(
    name: str,
    config,
    auto_class: str,
    dtype: str | None,
    device: torch.device,
    trust_remote_code: bool = False,
    pad_token_id: int | None = 0,
    layout: Layout = "auto",
) -> Runner:
    """Load the model onto `device` in eval mode, in a runner; `auto_class` is AutoModel, AutoModelForCausalLM or
    AutoModelForSequenceClassification.

    A Qwen3 runs on `radix_ops.models.qwen3`, but for a classification head and .gguf files, which run on transformers
    as all others do. Without a dtype the model computes in float32 on the CPU and in its own on CUDA, where one of
    float32 computes in bfloat16.
    """
    own = None if device.type == "cuda" else "float32"
    classifies = auto_class == "AutoModelForSequenceClassification"
    if _brings_code(config, auto_class) and not trust_remote_code:
        _logger.warning(
            f"{name} brings code of its own for {auto_class}, which is not run: transformers' class of model type "
            f"{config.model_type} is; --trust-remote-code runs the model's"
        )
    if runs_own_model(name, config, auto_class, trust_remote_code):
        with loading("weights", name):
            from ..models.qwen3 import Qwen3ForCausalLM, Qwen3Model

            kind: Any = Qwen3Model if auto_class == "AutoModel" else Qwen3ForCausalLM
            try:
                model = kind.from_pretrained(name, dtype=dtype or own)
            except ValueError as error:
                saved = (getattr(config, "architectures", None) or [kind.__name__])[0]
                if saved == kind.__name__:
                    raise
                raise ValueError(f"{error}; its config is of a {saved}") from error
        return Qwen3Runner(_on_device(model, device, dtype), config, layout)
    source, options = _source(name, "--model")
    with loading("weights", source):
        import transformers

        from ..hf.guards import has_own_attention

        is_quantised = bool(getattr(config, "quantization_config", None))
        if Path(source).is_dir() and not options:
            check_weights(Path(source), is_quantised)
        if has_own_attention(config):  # transformers before 5.24 may take sdpa, which leaves out caps on scores
            options["attn_implementation"] = "eager"
        load = getattr(transformers, auto_class).from_pretrained
        # What does not fit is named below, in place of a report that transformers prints.
        options |= {
            "trust_remote_code": trust_remote_code,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        model, report = load(source, dtype=dtype or own or "auto", **options)
        if not Path(source).is_dir() and (cached := hub_file(source, "config.json")) is not None:
            check_weights(cached.parent, is_quantised)  # the hub's files stand there once they are loaded
    # transformers draws at random what a checkpoint lacks, or has in other sizes.
    if report["mismatched_keys"]:
        name, *sizes = sorted(report["mismatched_keys"])[0]
        held, wanted = (list(size) for size in sizes)
        raise UserError(
            f"the weights of {source} hold {name} of the shape {held}, and its config says {wanted}; config.json and "
            "the weights must be of one model"
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(
            f"the weights of {source} lack {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''} for "
            f"{type(model).__name__}; the command needs a model that was trained for it"
        )
    saved = (getattr(config, "architectures", None) or [""])[0]
    if auto_class == "AutoModelForCausalLM" and saved.endswith(_OTHER_HEADS):  # whose embedding serves as the head
        raise UserError(f"{source} is a {saved}; the command needs a language model")
    model = _on_device(model.eval(), device, dtype)
    model.config.use_cache = False
    return ClassifierRunner(model, pad_token_id, layout) if classifies else TransformersRunner(model, layout)


def runner_of(model: nn.Module, pad_token_id: int | None = 0, layout: Layout = "auto") -> Runner:
    """Return the runner of a loaded model in eval mode: a model of transformers, or one of `radix_ops.models.qwen3`."""
    from ..models.qwen3 import Qwen3ForCausalLM, Qwen3Model

    check_model(model)
    if isinstance(model, (Qwen3Model, Qwen3ForCausalLM)):
        return Qwen3Runner(model, config_of(model), layout)
    if type(model).__name__.endswith("ForSequenceClassification"):
        return ClassifierRunner(model, pad_token_id, layout)
    return TransformersRunner(model, layout)


def check_model(model: nn.Module) -> None:
    """UserError for a loaded model with a part in training mode, where dropout is at work, or on another device."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        # resize_token_embeddings makes modules in training mode, in which these compute as ever.
        if module.training and (not name or type(module) not in (nn.Linear, nn.Embedding)):
            part = f"{name} of the {kind}" if name else f"the {kind}"
            raise UserError(f"{part} is in training mode; model.eval() takes it out")
    # Where accelerate keeps weights elsewhere, it brings them along.
    tensors = itertools.islice(model.parameters(), 1 if hasattr(model, "hf_device_map") else None)
    wrong = next((tensor.device for tensor in tensors if tensor.device.type not in _DEVICES), None)
    if wrong is not None:
        raise UserError(f"the {kind} has weights on the device {wrong}; it must be on cpu or cuda")


def config_of(model: nn.Module):
    """Return the config of a loaded model as transformers has it. UserError for a model of another library."""
    from transformers import PreTrainedModel, Qwen3Config

    from ..models.qwen3 import Qwen3ForCausalLM, Qwen3Model

    if isinstance(model, PreTrainedModel):
        return model.config
    if not isinstance(model, (Qwen3Model, Qwen3ForCausalLM)):
        raise UserError(
            f"the model is a {type(model).__name__}; it must be a model of transformers or of radix_ops.models, or the "
            "name of one: a folder, a hub id or a .gguf file"
        )
    fields = dataclasses.asdict(model.config)
    return Qwen3Config(**{name: value for name, value in fields.items() if name not in ("rope", "sliding_windows")})


def check_is_decoder(name: str, config) -> None:
    """UserError for an encoder-decoder model, whose decoder reads a second text."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"--model {name} is an encoder-decoder model of type {config.model_type}; radix-ops runs decoders alone"
        )


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name, by default CUDA's where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = None if isinstance(name, bool) else torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in _DEVICES:
        raise UserError(f"--device {name!r} can't be used: it must be cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name!r} can't be used: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def runs_own_model(name: str, config, auto_class: str, trust_remote_code: bool) -> bool:
    """Return whether the model runs on `radix_ops.models.qwen3`, and not on transformers."""
    if name.endswith(".gguf") or auto_class == "AutoModelForSequenceClassification":
        return False
    runs_code = trust_remote_code and _brings_code(config, auto_class)
    return config.model_type == "qwen3" and not runs_code


def _brings_code(config, auto_class: str) -> bool:
    return auto_class in (getattr(config, "auto_map", None) or {})


def _on_device(model, device: torch.device, dtype: str | None):
    if device.type == "cuda" and dtype is None and next(model.parameters()).dtype == torch.float32:
        _logger.warning("the model is of float32 and computes in bfloat16 on CUDA; --dtype float32 is slower")
        return model.to(device, torch.bfloat16)
    return model.to(device)


def _source(name: str, option: str) -> tuple[str, dict]:
    """Return (folder or hub id, further options) for transformers' from_pretrained."""
    needs("transformers", "hf")
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{option} {name} does not exist")
        for package in ("gguf", "accelerate"):
            needs(package, "gguf", "a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise UserError(f"{option} {name} is a file; it must be a model's folder, a hub id or a .gguf file")
    if path.is_dir():
        try:
            check_folder(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        return name, {}
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{option} {name} does not exist")
    _check_on_hub(name, option)
    return name, {}


def _check_on_hub(name: str, option: str) -> None:
    """Ask the hub once for a model that its cache doesn't have, where its own functions would ask for half a minute.

    UserError where it says that there is none, or can't be asked.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    is_cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").exists()
    if constants.HF_HUB_OFFLINE or is_cached or name in _on_hub:
        return
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{option} {name} is neither a folder nor a model on the hub, or one that only its owner may read"
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return  # a mirror may have the files and no more; the loader says what a name may hold
    except Exception as error:  # the connection's, of whatever library makes it
        raise UserError(f"{option} {name} is no folder, and the hub can't be asked for it: {error}") from error
    _on_hub.add(name)


def check_weights(folder: Path, is_quantised: bool) -> None:
    """ValueError for what transformers reads without a word: shards that an index has outside of the folder, weights of
    whole numbers in a model that isn't quantised; and for an adapter, whose weights folding doesn't know."""
    check_no_adapter(folder)
    for index in folder.glob("*.index.json"):
        shards(index)
    paths = [] if is_quantised else [*folder.glob("*.safetensors")]
    if not is_quantised and not any(folder.glob("model*.safetensors")):
        paths += folder.glob("pytorch_model*.bin")
    for path in paths:
        for name, dtype in _dtypes_of(path):
            if name.endswith(".weight") and dtype not in _FLOATS:
                raise ValueError(f"{path.name} holds {name} of {dtype}; weights must be of floating point")


def _dtypes_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and dtype of each tensor in a file of weights, none of which is read."""
    if path.suffix == ".bin":
        is_mappable = zipfile.is_zipfile(path)  # torch before 1.6 wrote others
        found = torch.load(path, map_location="meta", weights_only=True, mmap=is_mappable)
        yield from ((name, str(tensor.dtype)) for name, tensor in found.items() if isinstance(tensor, torch.Tensor))
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            yield name, tensors.get_slice(name).get_dtype()


@contextlib.contextmanager
def loading(what: str, source: str):
    """Turn any error inside into a UserError about `what` of `source`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason += "" if Path(source).exists() else f" (a folder {source} does not exist)"
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which runs with --trust-remote-code alone: only if you trust it"
        raise UserError(f"the {what} of {source} could not be loaded: {reason}") from error


def max_length_of(given: int | None, config, tokenizer, recommended: int | None = None) -> int | None:
    """Return the length that is given, or the least of what the model reads and what its tokenizer, or `recommended`,
    says. UserError where more is given than the model reads."""
    longest = context_length(config, tokenizer)
    if given and longest and given > longest:
        raise UserError(f"--max-length {given} is more than the model reads, {longest}")
    limit = min(recommended or tokenizer.model_max_length, longest or 2**31 - 1)
    return given or (int(limit) if limit < 2**31 - 1 else None)


def context_length(config, tokenizer) -> int | None:
    """Return the most tokens that the model reads, None where neither config nor tokenizer says."""
    config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else None


def hub_file(name: str, file: str) -> Path | None:
    """Return a file of a local folder or of a model on the hub; None where it has none, and for a .gguf file."""
    if name.endswith(".gguf"):
        return None
    if Path(name).is_dir():
        return path if (path := Path(name) / file).exists() else None
    _source(name, "--model")
    with loading(file, name):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:
            # Offline, a file that the cache lacks may still be on the hub.
            if _is_known_to_lack(name, file):
                return None
            raise
        except EntryNotFoundError:
            return None


def _is_known_to_lack(name: str, file: str) -> bool:
    """Return whether the cache says that a hub model has no such file: by a mark, or as it holds all that there is."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    # This file comes with a model that was downloaded whole; nobody asks for it alone.
    is_whole = isinstance(try_to_load_from_cache(name, ".gitattributes"), str)
    return is_whole or try_to_load_from_cache(name, file) is _CACHED_NO_EXIST
