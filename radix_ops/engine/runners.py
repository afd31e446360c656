"""Hidden states of batches of token sequences, folded or plain, on the CPU or on CUDA, for the radix-ops command.

A runner holds a model: `Qwen3Runner` our Qwen3 on folded or packed batches, `TransformersRunner` a decoder of
transformers' through `radix_ops.hf.enable` or on padded batches. `run` takes a store of sequences through it in
planned batches.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import fold, pack
from ..plan.budget import Budget
from ..plan.planner import Plan, plan_folded, plan_padded
from .errors import UserError
from .items import Items

_TOKENS_AT_ONCE = 16_384  # whose hidden states a mean takes in fp32
_WARM_UP = 4  # sequences: a whole batch may be the whole job

_logger = logging.getLogger(__name__)


@dataclass
class RunStats:
    """What one run did; all counts and times are measured."""

    tokens: int = 0  # of all sequences
    rows: int = 0  # that went through the decoder stack, a padded run's padding included
    head_rows: int = 0  # that went through a language model's head
    batches: int = 0
    seconds: float = 0.0


@dataclass
class States:
    """Hidden states of a batch of B sequences, of which packed token i has `rows[token_rows[i]]`."""

    rows: Tensor  # [R, D] on the model's device
    token_rows: Tensor  # int [N] on the CPU
    lengths: np.ndarray  # int64 [B]

    @property
    def starts(self) -> np.ndarray:
        """The packed token that each sequence starts with, int64 [B]."""
        return np.cumsum(self.lengths) - self.lengths

    def at(self, tokens: np.ndarray) -> Tensor:
        """[len(tokens), D] of packed tokens."""
        return self.rows[self.token_rows[torch.from_numpy(tokens)].to(self.rows.device)]

    def last(self) -> Tensor:
        """[B, D] of each sequence's last token."""
        return self.at(self.starts + self.lengths - 1)

    def mean(self, skip: int = 0) -> Tensor:
        """[B, D] in fp32 over each sequence's tokens but the first `skip`; every sequence must have more."""
        device = self.rows.device
        sums = torch.zeros(len(self.lengths), self.rows.shape[1], device=device)
        sequence_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        tokens = np.flatnonzero(np.arange(len(sequence_of)) - self.starts[sequence_of] >= skip)
        for part in np.array_split(tokens, range(_TOKENS_AT_ONCE, len(tokens), _TOKENS_AT_ONCE)):
            index = torch.from_numpy(sequence_of[part]).to(device)
            sums += torch.ops.radix.scatter_add(self.at(part).float(), index, len(self.lengths))
        return sums / torch.from_numpy(self.lengths - skip).to(device)[:, None]


class Qwen3Runner:
    """Our Qwen3, a Qwen3Model or Qwen3ForCausalLM in eval mode; its plain batches are packed."""

    max_padding = float("inf")  # there is none
    own_attention = False  # scores have neither cap nor sinks

    def __init__(self, model, hf_config):
        self.model, self.hf_config = model, hf_config
        self.stack = getattr(model, "model", model)
        self.head = getattr(model, "lm_head", None)
        self.parameter = next(model.parameters())
        self.rows = 0
        self.folded = False

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def check(self, probe: np.ndarray, folded: bool) -> None:
        """Nothing to find out: folded and packed are one code, compared with transformers' by its tests."""

    @contextlib.contextmanager
    def running(self, folded: bool) -> Iterator[None]:
        self.folded = folded
        yield

    def states(self, sequences: list[np.ndarray]) -> States:
        """Hidden states of sequences of token ids, int32, none empty."""
        lengths = np.array([len(sequence) for sequence in sequences])
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        batch = (fold if self.folded else pack)(torch.from_numpy(np.concatenate(sequences)), ends)
        self.rows += batch.num_rows
        return States(self.stack(batch.to(self.device, non_blocking=True)), batch.unfold_index, lengths)


class TransformersRunner:
    """A decoder of transformers' in eval mode, alone or with a head; its plain batches are padded on the right."""

    max_padding = 0.05

    def __init__(self, model):
        self.model, self.hf_config = model, model.config
        model.config.use_cache = False
        self.stack, self.head = self._parts(model)
        self.folded = False
        self._rows = 0  # of runs that have ended, and of padded batches

    @staticmethod
    def _parts(model):
        head = model.get_output_embeddings()
        if head is None:
            return model, None
        stack = model.get_decoder()
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

    @torch.inference_mode()
    def check(self, probe: np.ndarray, folded: bool) -> None:
        """UserError unless logits are the head on the stack's output and, if wanted, folding is right for the model."""
        probe = torch.from_numpy(probe[:8].astype(np.int64))[None].to(self.device)
        # Logit scaling, soft caps and the like sit between head and logits in some model types.
        if self.head is not None:
            logits = self.model(input_ids=probe).logits
            ours = self.head(self.stack(input_ids=probe).last_hidden_state)
            if not torch.allclose(ours, logits.to(ours.dtype), rtol=1e-5, atol=1e-5, equal_nan=True):
                raise UserError(
                    f"{type(self.model).__name__} does more to its logits than its output head, so it can't be used"
                )
        if folded:
            # Batches are large: the proof that folding is right for this model is a small one.
            probe = torch.cat([probe, probe.roll(1, 1)], 1).repeat(2, 1)
            probe[1, -1] = probe[0, 0]
            try:
                with self._folding(verify="always"):
                    self.stack(input_ids=probe, attention_mask=torch.ones_like(probe))
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(f"{error}; --plain runs without folding") from error

    @contextlib.contextmanager
    def running(self, folded: bool) -> Iterator[None]:
        if not folded:
            yield
            return
        with self._folding(verify="never"):
            self.folded = True
            try:
                yield
            finally:
                self._rows, self.folded = self.rows, False

    def _folding(self, verify: str):
        from .. import hf

        # Every planned batch is folded: as a padded one it would hold much padding.
        return hf.folded(self.model, threshold=1.0, verify=verify)

    def states(self, sequences: list[np.ndarray]) -> States:
        """Hidden states of sequences of token ids, int32, none empty."""
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


class ClassifierRunner(TransformersRunner):
    """A transformers model with a classification head of one label, called as a whole."""

    def __init__(self, model, pad_token_id: int):
        super().__init__(model)
        self.pad_token_id = pad_token_id

    @staticmethod
    def _parts(model):
        return model.base_model, None

    def logits(self, sequences: list[np.ndarray]) -> Tensor:
        """[B] in fp32: the one logit of each sequence."""
        inputs = {name: x.to(self.device) for name, x in self._padded(sequences, self.pad_token_id).items()}
        return self.model(**inputs).logits[:, 0].float()


def plan_batches(runner, items: Items, budget: Budget, folded: bool) -> Plan:
    """Batches of the items' sequences: shared prefixes meet, or padding stays small."""
    if not folded:
        return plan_padded(items.lengths, max_positions=budget.max_rows, max_padding=runner.max_padding)
    # Only transformers' models give their states padded.
    positions = budget.max_tokens if isinstance(runner, TransformersRunner) else None
    limits = {"max_rows": budget.max_rows, "max_tokens": budget.max_tokens, "max_positions": positions}
    return plan_folded(items.store, **limits, lengths=items.lengths)


@torch.inference_mode()
def run(
    runner,
    items: Items,
    budget: Budget,
    folded: bool,
    compute: Callable[[np.ndarray, list[np.ndarray]], object],
    on_batch: Callable[[np.ndarray, object], object] | None = None,
    warm_up: bool = False,
) -> RunStats:
    """Takes all sequences through `compute(indices, sequences)`, whose result goes to `on_batch(indices, result)`.

    Where a batch does not fit into a GPU's memory, it and those behind it run in halves, with a warning in the log. The
    time counts planning, folding, the model and `on_batch`; `warm_up` runs a few sequences of the smallest
    batch before the clock starts.
    """

    def compute_batch(indices: np.ndarray):
        return compute(indices, [items.store[i][: lengths[i]] for i in indices])

    lengths = items.lengths
    stats = RunStats()
    started = time.perf_counter()
    plan = plan_batches(runner, items, budget, folded)
    planned = time.perf_counter() - started
    with runner.running(folded):
        if warm_up and len(plan):
            compute_batch(list(plan)[int(plan.rows.argmin())][:_WARM_UP])
        rows_before = runner.rows
        started = time.perf_counter() - planned
        for indices, result in _in_memory(plan, compute_batch):
            stats.batches += 1
            stats.tokens += int(lengths[indices].sum())
            if on_batch:
                on_batch(indices, result)
        stats.seconds = time.perf_counter() - started
        stats.rows = runner.rows - rows_before
    return stats


def _in_memory(plan: Plan, compute: Callable[[np.ndarray], object]) -> Iterator[tuple[np.ndarray, object]]:
    """Each batch with its result, in parts where the whole does not fit into memory."""
    num_parts = 1
    for batch in plan:
        waiting = np.array_split(batch, min(num_parts, len(batch)))
        while waiting:
            part = waiting.pop(0)
            result = None
            try:
                result = compute(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise UserError("out of memory: one sequence alone does not fit into it") from error
            if result is not None:
                yield part, result
                continue
            # Outside of the handler nothing holds on to what was computed.
            torch.cuda.empty_cache()
            num_parts *= 2
            _logger.warning("out of memory: going on with batches of half the size")
            waiting = [half for part in (part, *waiting) for half in np.array_split(part, min(2, len(part)))]
