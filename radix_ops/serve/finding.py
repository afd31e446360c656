"""The task that a model is for, as its folder says, and the engine that does it."""

from __future__ import annotations

from typing import Any

from ..engine import Classifier, Embedder, Reranker, Scorer
from ..engine.errors import UserError
from ..engine.loading import load_config
from ..engine.sentence_folder import find_modules

Served = Embedder | Reranker | Classifier | Scorer
_ENGINES: dict[str, type[Served]] = {"embed": Embedder, "rerank": Reranker, "classify": Classifier, "score": Scorer}
_HEAD = "ForSequenceClassification"


def find_task(name: str, trust_remote_code: bool = False) -> str:
    """Return embed, rerank, classify or score: what the model's folder is for. UserError where it does not say."""
    kinds: list[str] = []
    modules = find_modules(name, "embed", lambda types: kinds.extend(kind.rpartition(".")[2] for kind in types))
    if modules is not None:
        return "embed" if "Pooling" in kinds else "rerank"
    config = load_config(name, trust_remote_code=trust_remote_code)
    saved = (getattr(config, "architectures", None) or [""])[0]
    if saved.endswith(_HEAD):
        return "rerank" if getattr(config, "num_labels", 0) == 1 else "classify"
    if saved.endswith("ForCausalLM") or name.endswith(".gguf"):
        return "score"
    if saved.endswith("Model"):
        return "embed"
    raise UserError(f"--model {name} is a {saved or 'model'}, which does not say what it is for; name it by --task")


def find_engine(task: str, model: str, options: dict[str, Any]) -> Served:
    """Return the engine of a task, without its weights. UserError for an option that the task does not have."""
    own = {"embed": {"pooling", "prompt", "prompt_name"}, "rerank": {"template"}, "classify": {"template"}}
    for name in set().union(*own.values()) - own.get(task, set()):
        if options.pop(name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} is not for --task {task}")
    engine = _ENGINES[task](model, lazy=True, **options)
    engine.prepare()
    return engine
