"""Hidden states of batches of token sequences, folded or plain, on the CPU or on CUDA.

A runner holds a model: `Qwen3Runner` our Qwen3, on folded or packed batches; `TransformersRunner` a decoder of
transformers', through `radix_ops.hf.enable` or on padded batches; `ClassifierRunner` one with a classification head.
A runner serves one thread at a time, but for `ahead`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .._attention import Layout
from .._interrupts import uninterrupted
from ..batch import FoldedBatch, fold, pack
from .errors import UserError
from .heads import WholeHead

if TYPE_CHECKING:
    from ..hf.forward import Verify

_CONFIG = {"use_cache": False, "return_dict": True}  # while the model runs


@dataclass
class States:
    """Hidden states of a batch of B sequences, of which packed token i has `rows[token_rows[i]]`, if it was wanted."""

    rows: Tensor  # [R, D] on the model's device
    token_rows: Tensor  # int [N] on the CPU
    lengths: np.ndarray  # int64 [B]

    @property
    def starts(self) -> np.ndarray:
        """The packed token that each sequence starts with, int64 [B]."""
        return np.cumsum(self.lengths) - self.lengths

    def at(self, tokens: np.ndarray) -> Tensor:
        """Return those of packed tokens, [len(tokens), D]."""
        return self.rows[self.token_rows[torch.from_numpy(tokens)].to(self.rows.device)]

    def last(self) -> Tensor:
        """Return those of each sequence's last token, [B, D]."""
        return self.at(self.starts + self.lengths - 1)


class Ahead(list[np.ndarray]):
    """The sequences of a batch that is folded, or packed, already."""

    def __init__(self, sequences: list[np.ndarray], batch: FoldedBatch):
        super().__init__(sequences)
        self.batch = batch


class Runner(Protocol):
    """A model as tasks use it: hidden states, or a classification head's logits, of batches of sequences."""

    model: nn.Module
    hf_config: Any  # transformers'
    head: Any  # what makes a language model's logits of hidden states, with a `weight`, or None
    head_rows: int  # rows that went through `head` so far; the task counts them
    layout: Layout  # of attention in folded batches, as `radix_ops.attention` has it
    max_padding: float  # of plain batches, as a share of their tokens
    pads_states: bool  # whether hidden states of a folded batch come padded
    keeps_salts: bool  # whether `ahead` knows salts

    @property
    def own_attention(self) -> bool:
        """Return whether the model's own attention computes the scores of padded batches in full."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows that went through the decoder stack so far, a plain batch's padding included."""

    def check(self, probe: np.ndarray, folded: bool) -> None:
        """Try a few tokens, int32 [L]. UserError where this model can't be run so."""

    def running(self, folded: bool) -> AbstractContextManager[None]:
        """Return a context in which batches are folded or plain."""

    def ahead(self, sequences: list[np.ndarray], salts: Sequence[bytes] = ()) -> list[np.ndarray]:
        """Return the sequences for `states`, with what can be done of a batch while another is computed.

        Another thread may do it, within `running`. salts: of each sequence, where the runner keeps them: sequences of
        different salts share no rows.
        """

    def states(self, sequences: list[np.ndarray], tokens: np.ndarray | None = None) -> States:
        """Compute hidden states of sequences of token ids, int32, none empty; those of some packed `tokens` will do."""


class Qwen3Runner:
    """Our Qwen3, a Qwen3Model or Qwen3ForCausalLM in eval mode; its plain batches are packed."""

    max_padding = float("inf")  # packed batches have none
    pads_states = False
    keeps_salts = True
    own_attention = False  # scores have neither cap nor sinks

    def __init__(self, model: Any, hf_config: Any, layout: Layout = "auto"):
        self.model, self.hf_config, self.layout = model, hf_config, layout
        self.stack = getattr(model, "model", model)
        self.head = getattr(model, "lm_head", None)
        self.parameter = next(model.parameters())
        self.rows = self.head_rows = 0
        self.folded = False

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def check(self, probe: np.ndarray, folded: bool) -> None:
        """UserError for a head of another dtype. Folded and packed batches run the same code."""
        check_head_dtype(self.model, self.head, self.parameter)

    @contextlib.contextmanager
    def running(self, folded: bool) -> Iterator[None]:
        self.folded = folded
        yield

    def ahead(self, sequences: list[np.ndarray], salts: Sequence[bytes] = ()) -> list[np.ndarray]:
        return Ahead(sequences, self._batch_of(sequences, salts))

    def _batch_of(self, sequences: list[np.ndarray], salts: Sequence[bytes]) -> FoldedBatch:
        starts = np.cumsum([0] + [len(sequence) for sequence in sequences])
        ids = np.concatenate(sequences)
        number_of = {salt: number for number, salt in enumerate(dict.fromkeys(salts))}
        if not self.folded or len(number_of) < 2:
            return (fold if self.folded else pack)(torch.from_numpy(ids), torch.from_numpy(starts))
        # Paths that start with different numbers have no row in common.
        marked = ids.astype(np.int64)
        marked[starts[:-1]] |= np.array([number_of[salt] for salt in salts]) << 32
        batch = fold(torch.from_numpy(marked), torch.from_numpy(starts))
        return replace(batch, input_ids=torch.from_numpy(ids)[batch.fold_index])

    def states(self, sequences: list[np.ndarray], tokens: np.ndarray | None = None) -> States:
        batch = sequences.batch if isinstance(sequences, Ahead) else self._batch_of(sequences, ())
        self.rows += batch.num_rows
        rows, token_rows = None, batch.unfold_index
        if tokens is not None:
            wanted, place = np.unique(token_rows.numpy()[tokens], return_inverse=True)
            rows = torch.from_numpy(wanted).to(self.device, non_blocking=True)
            token_rows = torch.full_like(token_rows, len(wanted))  # which there is not
            token_rows[torch.from_numpy(tokens)] = torch.from_numpy(place.astype(np.int32))
        hidden = self.stack(batch.to(self.device, non_blocking=True), layout=self.layout, rows=rows)
        return States(hidden, token_rows, batch.lengths.numpy().astype(np.int64))


class TransformersRunner:
    """A decoder of transformers' in eval mode, alone or with a head; its plain batches are padded on the right."""

    max_padding = 0.05
    pads_states = True
    keeps_salts = False

    def __init__(self, model: Any, layout: Layout = "auto"):
        self.model, self.hf_config, self.layout = model, model.config, layout
        self.stack, self.head = self._parts(model)
        self.folded = False
        self.head_rows = 0
        self._rows = 0  # in runs that have ended and in padded batches

    @staticmethod
    def _parts(model: Any) -> tuple[Any, Any]:
        head = model.get_output_embeddings()
        if head is None and model.base_model is model:
            return model, None
        stack: Any = None if head is None else model.get_decoder()
        stack = model.base_model if stack is model else stack
        if stack is None or stack is model:
            raise UserError(f"{type(model).__name__} has no decoder stack and output head that can be called apart")
        return stack, head

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def own_attention(self) -> bool:
        from ..hf.guards import has_own_attention

        return has_own_attention(self.hf_config)

    @property
    def rows(self) -> int:
        """All rows that went through the stack."""
        return self._rows + (self.model.radix_stats.rows if self.folded else 0)

    def check(self, probe: np.ndarray, folded: bool) -> None:
        """UserError unless logits are the head on the stack's output and, if wanted, folding is right for the model."""
        ids = torch.from_numpy(probe[:8].astype(np.int64))[None].to(self.device)
        with torch.inference_mode(), self._set_config():
            with self._plain():
                self._check_head(ids)
            if folded:
                self._check_folding(ids)

    def _check_head(self, probe: Tensor) -> None:
        head: Any = self._last_layer()
        if head is None:
            return
        outputs = self.stack(input_ids=probe)
        hidden = outputs.last_hidden_state
        if isinstance(head, nn.Module):
            check_head_dtype(self.model, head, hidden)
        if self.head is None:
            return
        logits = self.model(input_ids=probe).logits
        if _makes(self.head, hidden, logits):
            return
        # Scaling, soft caps and the like sit between head and logits in some model types.
        self.head = WholeHead(self.model, self.stack, type(outputs))
        if not _makes(self.head, hidden, logits):
            raise UserError(
                f"{type(self.model).__name__} makes its logits of more than its hidden states, so it can't be used"
            )

    def _last_layer(self) -> Any:
        """Return what makes logits of hidden states, or None."""
        return self.head

    def _check_folding(self, probe: Tensor) -> None:
        # A few tokens are enough to try whether folding is right for this model.
        probe = torch.cat([probe, probe.roll(1, 1)], 1).repeat(2, 1)
        probe[1, -1] = probe[0, 0]
        with _or_plain(), self._folding(verify="always"):
            self.stack(input_ids=probe, attention_mask=torch.ones_like(probe))

    @contextlib.contextmanager
    def running(self, folded: bool) -> Iterator[None]:
        with self._set_config():
            if not folded:
                with self._plain():
                    yield
                return
            with contextlib.ExitStack() as stack:
                with _or_plain():
                    stack.enter_context(self._folding(verify="never"))
                before = self.model.radix_stats.rows
                self._rows -= before
                self.folded = True
                try:
                    yield
                finally:
                    self._rows, self.folded = self.rows, False

    def _folding(self, verify: Verify):
        from .. import hf

        # A batch that was planned for folding would hold much padding.
        return hf.folded(self.model, threshold=1.0, layout=self.layout, verify=verify)

    def _plain(self) -> AbstractContextManager[Any]:
        """Return a context in which a model that its owner enabled folds nothing."""
        from .. import hf
        from ..hf.forward import StackForward

        is_enabled = any(isinstance(vars(module).get("forward"), StackForward) for module in self.model.modules())
        return hf.folded(self.model, threshold=0.0) if is_enabled else contextlib.nullcontext()

    @contextlib.contextmanager
    def _set_config(self) -> Iterator[None]:
        """Let the model make no cache, and outputs that are no tuples, until the end."""
        before: list[tuple[Any, str, bool, Any]] = []
        try:
            for config in {id(part.config): part.config for part in (self.model, self.stack)}.values():
                for name, value in _CONFIG.items():
                    before.append((config, name, hasattr(config, name), getattr(config, name, None)))
                    setattr(config, name, value)
            yield
        finally:
            with uninterrupted():
                for config, name, had, value in reversed(before):
                    if had:
                        setattr(config, name, value)
                    else:
                        delattr(config, name)

    def ahead(self, sequences: list[np.ndarray], salts: Sequence[bytes] = ()) -> list[np.ndarray]:
        return sequences  # the model folds

    def states(self, sequences: list[np.ndarray], tokens: np.ndarray | None = None) -> States:
        inputs = self._padded(sequences)
        token_rows = inputs["attention_mask"].flatten().nonzero()[:, 0]
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        hidden = self.stack(**inputs).last_hidden_state  # [B, T, D]
        return States(hidden.flatten(0, 1), token_rows, np.array([len(sequence) for sequence in sequences]))

    def _padded(self, sequences: list[np.ndarray], fill: int = 0) -> dict[str, Tensor]:
        width = max(len(sequence) for sequence in sequences)
        input_ids = np.full((len(sequences), width), fill, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, sequence in enumerate(sequences):
            input_ids[index, : len(sequence)] = sequence
            attention_mask[index, : len(sequence)] = 1
        self._rows += 0 if self.folded else input_ids.size
        return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def last_tokens(sequences: list[np.ndarray]) -> np.ndarray:
    """Return the packed token that each sequence ends with, int64 [B]."""
    return np.cumsum([len(sequence) for sequence in sequences]) - 1


def _makes(head: Any, hidden: Tensor, logits: Tensor) -> bool:
    """Return whether the head makes these logits of hidden states."""
    ours = head(hidden)
    return torch.allclose(ours, logits.to(ours.dtype), rtol=1e-5, atol=1e-5, equal_nan=True)


@contextlib.contextmanager
def _or_plain() -> Iterator[None]:
    """Turn the reason why a model can't be folded into a UserError with the remedy."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{error}; --plain runs without folding") from error


def check_head_dtype(model: nn.Module, head: nn.Module | None, states: Tensor) -> None:
    """UserError where the head is a linear layer of another dtype than the hidden states."""
    wanted = states.dtype
    if type(head) is nn.Linear and head.weight.dtype != wanted and not torch.is_autocast_enabled(states.device.type):
        raise UserError(
            f"the output head of the {type(model).__name__} is of {head.weight.dtype} and its hidden states are of "
            f"{wanted}; model.to({wanted}) makes them one"
        )


class ClassifierRunner(TransformersRunner):
    """A transformers model with a classification head, called as a whole where its config says how it pads."""

    def __init__(self, model, pad_token_id: int | None, layout: Layout = "auto"):
        super().__init__(model, layout)
        self.pad_token_id = pad_token_id

    @staticmethod
    def _parts(model: Any) -> tuple[Any, Any]:
        return model.base_model, None

    def _last_layer(self) -> Any:
        return getattr(self.model, "score", None)

    def _check_head(self, probe: Tensor) -> None:
        super()._check_head(probe)
        if self.pad_token_id is not None:
            return
        theirs = self.model(input_ids=probe).logits
        head = self._last_layer()
        ours = None if head is None else head(self.stack(input_ids=probe).last_hidden_state[:, -1])
        if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            raise UserError(
                f"the config of the {type(self.model).__name__} has no pad_token_id, by which its head finds the last "
                "token of each text of a batch"
            )

    def logits(self, sequences: list[np.ndarray]) -> Tensor:
        """Compute the logits of each sequence, [B, labels] in fp32."""
        if self.pad_token_id is None:  # the model takes one sequence at a time; its head reads the last token's state
            return self._last_layer()(self.states(sequences, last_tokens(sequences)).last()).float()
        inputs = {name: x.to(self.device) for name, x in self._padded(sequences, self.pad_token_id).items()}
        return self.model(**inputs).logits.float()
