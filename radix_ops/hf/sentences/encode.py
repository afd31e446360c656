"""Stand-ins for the methods by which sentence-transformers' models take many texts. For `radix_ops.hf`.

The library's own code runs every batch. This module decides which texts go into which of its calls.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...plan.planner import plan_folded
from .. import guards, proofs
from ..forward import StackForward, Unfolded, must_fold
from ..payoff import pays
from . import modules
from .modules import Method, library
from .tokens import Tokenize, Tokens

# A folded batch has at most so many times the positions of the library's largest. Hidden states are unfolded into
# positions for the pooling; the layers, which take several times as much memory for each, see rows.
_MAX_POSITIONS = 4
_TEXTS_AT_ONCE = 256  # tokenised together
_QUANTISED = ("int8", "uint8", "binary", "ubinary")
_CALIBRATED = ("int8", "uint8")  # by all embeddings that are quantised together


def install(encoder: nn.Module, states: list[StackForward]) -> None:
    """Replace the methods of an encoder that run batches; `modules.remove` takes that back."""
    modules.remove(encoder)
    forwards = modules.transformer_forwards(encoder)
    methods: list[Method] = [*forwards]
    has = functools.partial(hasattr, type(encoder))
    call = "_inference" if has("_inference") else "predict" if modules.is_cross_encoder(encoder) else "encode"
    if _takes_texts(encoder) and getattr(type(encoder), call).__module__.startswith(f"{library().__name__}."):
        methods.append(PlannedCall(encoder, call, states, forwards))
        methods += [
            MultiProcessCall(encoder, name) for name in ("_multi_process", "_encode_multi_process") if has(name)
        ]
        methods += [Tokenize(encoder, name) for name in ("preprocess", "tokenize") if has(name)][:1]
    for method in methods:
        method.install()


def _takes_texts(encoder: nn.Module) -> bool:
    """Return whether it makes one result of each text or pair; a SparseEncoder's results are of other kinds."""
    is_dense = isinstance(encoder, library().SentenceTransformer) and not isinstance(encoder, library().SparseEncoder)
    return is_dense or modules.is_cross_encoder(encoder)


class PlannedCall(Method):
    """Stands in for `encode` or `predict`, or for what those run in each process: folds inputs that share prefixes.

    Results come from the library's own method, called with one planned batch after the other, in the caller's order.
    """

    def __init__(
        self,
        encoder: nn.Module,
        name: str,
        states: list[StackForward],
        forwards: list[modules.TransformerForward],
    ):
        super().__init__(encoder, name)
        self.states, self.forwards = states, forwards

    def __call__(self, *args, **kwargs):
        call = _Call.of(self.__wrapped__, args, kwargs)
        texts = _texts_of(self.module, call) if call is not None and self._may_plan(call) else None
        tokens = None if call is None or texts is None else call.tokens(self.module, texts)
        if call is None or texts is None or tokens is None:
            return self.__wrapped__(*args, **kwargs)
        batches = self._batches(tokens, call)
        with tokens.at_hand():
            return self._run(texts, batches, call) if batches else self.__wrapped__(*args, **kwargs)

    def _run(self, texts: list, batches: list[np.ndarray], call: _Call):
        results = _Results(len(texts))
        token = must_fold.set(True)
        try:
            for indices in call.progress(batches, "Folded batches"):
                some = [texts[i] for i in indices]
                results.put(indices, call(some, batch_size=len(some), show_progress_bar=False, **call.unquantised))
        except Unfolded:
            pass  # the batches behind it would not fold either, so the library runs all that are left
        finally:
            must_fold.reset(token)
        rest = results.missing()
        if len(rest):
            results.put(rest, call([texts[i] for i in rest], **call.unquantised))
        return call.quantised(results.all)

    def _may_plan(self, call: _Call) -> bool:
        """Return whether results don't depend on how texts are batched, and the model would fold at this moment."""
        given, stacks = call.arguments, [state.module for state in self.states]
        batch_size = given.get("batch_size")
        if not isinstance(batch_size, int) or batch_size <= 0 or self.states[0].options.threshold == 0:
            return False
        # Token embeddings are padded as their batch was.
        if given.get("output_value", "sentence_embedding") != "sentence_embedding":
            return False
        if given.get("precision") not in (None, "float32", *_QUANTISED):
            return False
        if given.get("pool") is not None or isinstance(given.get("device"), list) or call.device(self.module) is None:
            return False
        if not all(vars(state.module).get("forward") is state for state in self.states):
            return False
        # The processes of a sharded model have to make equally many forwards.
        if any(isinstance(module, FSDPModule) for module in self.module.modules()):
            return False
        self.module.eval()  # as the library does
        return not any(guards.why_unfoldable(stack) or guards.why_disturbed(stack) for stack in stacks)

    def _batches(self, tokens: Tokens, call: _Call) -> list[np.ndarray]:
        """Return the batches, as indices of texts, that it pays to fold."""
        lengths, sides = tokens.store.lengths, tokens.sides
        stacks = [state.module for state in self.states]
        counts_columns = any(proofs.proof_of(stack).positions == "columns" for stack in stacks)
        if lengths.max() == 0 or (counts_columns and "left" in sides):
            return []
        if any(sides & forward.reading().width for forward in self.forwards):
            return []  # a text's result depends on its batch
        max_rows = call.arguments["batch_size"] * int(lengths.max())
        own_attention = any(guards.has_own_attention(stack.config) for stack in stacks)
        is_large = own_attention or tokens.constants.get("logits_to_keep", 1) != 1
        plan = plan_folded(
            tokens.store, max_rows=max_rows, max_positions=max_rows * (1 if is_large else _MAX_POSITIONS)
        )
        threshold = self.states[0].options.threshold
        device: Any = call.device(self.module)  # where something folds, as _may_plan knows

        def is_worth_it(num_rows: int, num_tokens: int) -> bool:
            return all(pays(num_rows, num_tokens, num_tokens, threshold, stack, device) for stack in stacks)

        batches = zip(plan, plan.rows.tolist(), strict=True)
        return [indices for indices, num_rows in batches if is_worth_it(num_rows, int(lengths[indices].sum()))]


class MultiProcessCall(Method):
    """Stands in for the method that deals inputs out to a pool's processes: sorts them, so that neighbours share.

    Each process plans its own share.
    """

    def __call__(self, *args, **kwargs):
        call = _Call.of(self.__wrapped__, args, kwargs)
        texts = None if call is None else _texts_of(self.module, call)
        if call is None or texts is None or (call.arguments | call.further).get("precision") in _CALIBRATED:
            return self.__wrapped__(*args, **kwargs)
        order = np.array(sorted(range(len(texts)), key=texts.__getitem__))
        results = _Results(len(texts))
        results.put(order, call([texts[i] for i in order]))
        return results.all


def _texts_of(encoder: Any, call: _Call) -> list | None:
    """Return the inputs of the call if they are several texts or, for a CrossEncoder, pairs of texts; else None."""
    given = call.inputs
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, str):
        return None
    if hasattr(encoder, "is_singular_input") and encoder.is_singular_input(given):
        return None
    texts = given.tolist() if isinstance(given, np.ndarray) else list(given)
    is_text = _is_pair if modules.is_cross_encoder(encoder) else _is_text
    return texts if isinstance(texts, list) and len(texts) > 1 and all(map(is_text, texts)) else None


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_pair(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_text, value))


class _Call:
    """A call of one of the library's methods with many inputs; arguments go by name."""

    def __init__(self, method: Callable, inputs_name: str, arguments: dict[str, Any], further: dict[str, Any]):
        self.method, self.inputs_name, self.further = method, inputs_name, further
        self.inputs = arguments.pop(inputs_name)
        self.arguments = arguments

    @classmethod
    def of(cls, method: Callable, args: tuple, kwargs: dict[str, Any]) -> _Call | None:
        """Return the call, or None for arguments that don't fit, about which the method itself complains."""
        signature = inspect.signature(method)
        parameters = list(signature.parameters.values())
        if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return None  # not one of the library's methods
        name = given = parameters[0].name
        if not args and name not in kwargs and "sentences" in kwargs:  # the library's former name, which it still takes
            given = "sentences"
            kwargs = {name: kwargs[given]} | {key: value for key, value in kwargs.items() if key != given}
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        rest = next((parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), None)
        further = {} if rest is None else arguments.pop(rest, {})
        arguments[given] = arguments.pop(name)
        return cls(method, given, arguments, further)

    def __call__(self, inputs: list, **changes):
        return self.method(**{self.inputs_name: inputs}, **{**self.arguments, **changes}, **self.further)

    def tokens(self, encoder: Any, texts: list) -> Tokens | None:
        """Return the tokens of texts as the call will see them, prompt included, or None where that can't be told."""
        try:
            prompt = self._prompt(encoder)
        except KeyError:
            return None  # the library has the better message
        starts = self.progress(range(0, len(texts), _TEXTS_AT_ONCE), "Tokenizing")
        if hasattr(type(encoder), "preprocess"):
            batches = (texts[start : start + _TEXTS_AT_ONCE] for start in starts)
            return Tokens.of(encoder, batches, encoder.preprocess, {"prompt": prompt, **self.further})
        batches = ([(prompt or "") + text for text in texts[start : start + _TEXTS_AT_ONCE]] for start in starts)
        if hasattr(type(encoder), "tokenize"):
            return Tokens.of(encoder, batches, encoder.tokenize, self.further)
        batches = (texts[start : start + _TEXTS_AT_ONCE] for start in starts)
        arguments = {"padding": True, "truncation": True, "return_tensors": "pt"}
        return Tokens.of(encoder, batches, encoder.tokenizer, arguments)

    def _prompt(self, encoder: Any) -> str | None:
        """Return the prompt that the call puts first. Raises KeyError for a prompt_name that the encoder lacks."""
        prompt, name = self.arguments.get("prompt"), self.arguments.get("prompt_name")
        if prompt is not None or "prompt_name" not in self.arguments:
            return prompt
        if name is not None:
            return encoder.prompts[name]
        return encoder.prompts.get(encoder.default_prompt_name)

    def device(self, encoder: Any) -> torch.device | None:
        """Return the device that the call computes on, or None for one on which nothing folds."""
        given = self.arguments.get("device")
        try:
            device = torch.device(encoder.device if given is None else given)
        except (RuntimeError, TypeError):
            return None
        return device if device.type in guards.DEVICES else None

    def progress(self, steps: Iterable, description: str) -> Iterable:
        """Return the steps, with a progress bar where the caller asked for one or the library would show one."""
        from tqdm.autonotebook import tqdm  # sentence-transformers depends on it

        show = self.arguments.get("show_progress_bar")
        if show is None:
            show = logging.getLogger(self.method.__module__).getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        return tqdm(steps, desc=description, disable=not show)

    @property
    def unquantised(self) -> dict[str, Any]:
        """The changes of arguments with which parts of the inputs run: quantising needs all embeddings together."""
        if self.arguments.get("precision") not in _QUANTISED:
            return {}
        return {"precision": "float32", "convert_to_numpy": True, "convert_to_tensor": False}

    def quantised(self, results):
        if not self.unquantised:
            return results
        results = library().quantize_embeddings(results, precision=self.arguments["precision"])
        if self.arguments["convert_to_tensor"]:
            return torch.from_numpy(results)
        return results if self.arguments["convert_to_numpy"] else list(map(torch.from_numpy, results))


class _Results:
    """Collects the results of inputs part by part, in a tensor, an array or a list, as the parts are."""

    def __init__(self, num_inputs: int):
        self.all: Tensor | np.ndarray | list | None = None
        self._is_there = np.zeros(num_inputs, bool)

    def put(self, indices: np.ndarray, part) -> None:
        if self.all is None:
            shape = (len(self._is_there), *getattr(part, "shape", (0,))[1:])
            if isinstance(part, Tensor):
                self.all = part.new_empty(shape)
            elif isinstance(part, np.ndarray):
                self.all = np.empty(shape, part.dtype)
            else:
                self.all = [None] * len(self._is_there)
        if isinstance(self.all, list):
            for index, value in zip(indices, part, strict=True):
                self.all[index] = value
        else:
            self.all[indices] = part
        self._is_there[indices] = True

    def missing(self) -> np.ndarray:
        return np.flatnonzero(~self._is_there)
