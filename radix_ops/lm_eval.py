"""lm-evaluation-harness with shared prefixes computed once: `--model radix`, its `hf` class folded and planned.

    python -m radix_ops.lm_eval run --model radix --model_args pretrained=FOLDER_OR_HUB_ID --tasks TASK --batch_size 8

takes the arguments of `lm-eval`. In Python, importing this module registers the class:

    import lm_eval
    import radix_ops.lm_eval

    results = lm_eval.simple_evaluate(model="radix", model_args={"pretrained": "FOLDER_OR_HUB_ID"}, tasks=["TASK"])

Needs lm-eval >= 0.4.10 and what `radix_ops.hf` needs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ._extras import require
from .batch import FoldedBatch
from .engine.batches import in_memory
from .engine.scoring import score_targets
from .plan.budget import find_budget
from .plan.planner import Plan, TokenStore, plan_folded
from .plan.sharing import LEAST_SPEED_UP

for _package, _least in (("lm_eval", "0.4.10"), ("transformers", "5.2"), ("accelerate", None)):
    require(_package, "lm-eval", "radix_ops.lm_eval", _least)

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tqdm import tqdm  # noqa: E402

from .hf import RadixStats, verify  # noqa: E402
from .hf.guards import has_own_attention  # noqa: E402
from .hf.logits import RowLogits  # noqa: E402

__all__ = ["RadixLM"]

# A batch has at most so many tokens for each row, which bounds its index arrays where very much is shared.
_MAX_TOKENS_PER_ROW = 64
_PROBE_LENGTH = 8

_logger = logging.getLogger(__name__)
_harness_logger = logging.getLogger("lm_eval.models.radix")  # the harness shows what its own loggers tell


@register_model("radix")
class RadixLM(HFLM):
    """The harness' `hf` class, whose loglikelihood requests (multiple choice, perplexity) run folded.

    It takes the arguments of `hf` and gives its answers up to rounding. All requests of a call are planned together, so
    that shots, contexts and choices that they share meet in one batch and are computed once, and logits are made of
    scored tokens alone, in the dtype that `hf` makes them in. Texts are generated as `hf` does.

    batch_size: "auto", with or without a schedule, goes by the memory that is free: a batch computes at most 4,096
        rows on the CPU and 65,536 on CUDA. N bounds the rows by those of N sequences of max_length; where that is
        more than "auto" finds, by the larger of what it finds and N times the longest sequence at hand, which is the
        largest batch of `hf`. A batch that a GPU's memory doesn't hold is planned anew at half its rows. Generated
        texts take batches as `hf` does.
    logits_cache: without effect; the plan knows all that it would find.
    dtype: on CUDA attention is slow in float32; bfloat16 and float16 are what it is fast in.

    Requests longer than max_length lose tokens on their left, as in `hf`, each as many as it has too many: choices of
    unequal lengths behind one such context share nothing any more.

    One answer differs: where requests of a call are one text cut at several places, `hf` (0.4.13, with logits_cache)
    adds up log-probabilities at the wrong places for all but the longest continuation. Here they are right.

    Raises ValueError on construction for a model that folding isn't known to be right for (docs/models.md), for
    encoder-decoders and for models on several devices: `hf` evaluates those. Processes of `accelerate launch` score
    their shares of the requests each by itself. `radix_stats` counts the tokens that came in and the rows that were
    computed, which each call tells at its end and results["config"] repeats as radix_tokens and radix_rows.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.batch_size_per_gpu != "auto" and self.batch_size_per_gpu < 1:
            raise ValueError(f'batch_size must be at least 1 or "auto", got {self.batch_size_per_gpu}')
        self.radix_stats = RadixStats()
        self._is_rolling = False
        try:
            self._rows = RowLogits(self.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}; --model hf evaluates it unfolded") from error
        self._check_logits()

    def _get_backend(self, *args, **kwargs) -> None:
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"--model radix evaluates causal models; the backend is {self.backend!r}")

    def _check_logits(self) -> None:
        """ValueError unless the model, called as `hf` does, gives the logits that folding gives."""
        vocabulary = self._rows.stack.get_input_embeddings().weight.shape[0]
        ids = torch.arange(2 * _PROBE_LENGTH).view(2, _PROBE_LENGTH) % vocabulary
        ids[1, : _PROBE_LENGTH // 2] = ids[0, : _PROBE_LENGTH // 2]
        ids = ids[:, : self.max_length]
        batch = FoldedBatch.from_sequences(list(ids), device=self.device)
        with self._computing():
            plain = self._model_call(ids.to(self.device))  # [2, L, V]
            logits = self._rows.logits(self._rows.run(batch), batch.unfold_index)  # [2 * L, V]
            is_exact = verify.is_exact(self._rows.stack)
        is_equal = logits.numel() == plain.numel()
        if is_equal:
            is_real = torch.ones(ids.shape, dtype=torch.bool, device=plain.device)
            is_equal = verify.difference(logits.view_as(plain), plain, is_real, is_exact) is None
        if not is_equal:
            raise ValueError(
                f"{type(self.model).__name__} gives other logits than its decoder stack and head do when folded, as a "
                "model with virtual tokens would; --model hf evaluates it unfolded"
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    @property
    def batch_size(self) -> int | str:
        # The harness cuts rolling windows into batches of so many before it scores them, and they are planned together.
        return sys.maxsize if self._is_rolling else super().batch_size

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._is_rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._is_rolling = False

    def get_model_info(self) -> dict[str, Any]:
        return super().get_model_info() | {"radix_tokens": self.radix_stats.tokens, "radix_rows": self.radix_stats.rows}

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The harness' (key, context ids, continuation ids) -> (log-probability, whether greedy decoding would say it).

        `override_bs` is without effect. Raises ValueError for a request that can't be scored and RuntimeError where
        something done to the model since makes folding wrong, before anything is computed.
        """
        if not requests:
            return []
        self._check_requests(requests)
        if obstacle := self._rows.obstacle():
            raise RuntimeError(f"{type(self.model).__name__} can't be folded any more: {obstacle}")
        longest = self.max_length + 1
        inputs = TokenStore.from_sequences(
            (context + continuation)[-longest:][:-1] for _, context, continuation in requests
        )
        num_cut = sum(len(context) + len(continuation) > longest for _, context, continuation in requests)
        if num_cut:
            _logger.warning(
                f"{num_cut} of {len(requests)} requests are longer than max_length ({longest - 1}) and lose tokens on "
                "their left; where the model reads more, max_length=... allows it"
            )
        tokens_before, rows_before = self.radix_stats.tokens, self.radix_stats.rows
        answers: list[Any] = [None] * len(requests)
        is_quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=is_quiet, desc="Running loglikelihood requests") as bar:
            for indices, found in self._batches(inputs, [continuation for *_, continuation in requests]):
                for index, answer in zip(indices, found, strict=True):
                    answers[index] = answer
                    # Windows of rolling requests have no key of their own.
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(indices))
        self._report(self.radix_stats.tokens - tokens_before, self.radix_stats.rows - rows_before)
        return answers

    def _report(self, tokens: int, rows: int) -> None:
        """Tell how much the requests of a call shared."""
        per_row = tokens / max(rows, 1)
        outcome = "" if per_row >= LEAST_SPEED_UP else ": folding can't pay here, and --model hf takes about as long"
        _harness_logger.info(f"radix: {tokens:,} tokens as {rows:,} rows, {per_row:.2f} tokens a row{outcome}")

    def _check_requests(self, requests) -> None:
        vocabulary, max_length = self._rows.stack.get_input_embeddings().weight.shape[0], self.max_length
        for number, (key, context, continuation) in enumerate(requests):
            where = f"request {number}" + (f" ({key[0]!r:.80}, {key[1]!r:.80})" if key else "")
            if not context or not continuation:
                raise ValueError(f"{where} has a {'continuation' if context else 'context'} of no tokens")
            if len(continuation) > max_length:
                raise ValueError(
                    f"{where} has a continuation of {len(continuation)} tokens, and max_length is {max_length}"
                )
            largest = max(max(context), max(continuation))
            if largest >= vocabulary:
                raise ValueError(f"{where} holds token {largest}, and the model embeds {vocabulary}")

    def _max_rows(self, longest: int) -> int:
        count = self.batch_size_per_gpu
        owner = self._rows.owner
        found = find_budget(owner.config, owner.dtype, self.device, longest, has_own_attention(owner.config)).max_rows
        return found if count == "auto" else max(count * longest, min(count * self.max_length, found))

    def _batches(self, inputs: TokenStore, continuations: list[list[int]]) -> Iterator[tuple[np.ndarray, list]]:
        """Yield the indices of each batch's sequences, and their answers."""
        max_rows = self._max_rows(int(inputs.lengths.max()))
        has_own = has_own_attention(self._rows.stack.config)

        def plan(pending: np.ndarray, max_rows: int) -> Plan:
            return plan_folded(
                inputs if len(pending) == len(inputs) else TokenStore.from_sequences(inputs[i] for i in pending),
                max_rows=max_rows,
                max_tokens=_MAX_TOKENS_PER_ROW * max_rows,
                max_positions=max_rows if has_own else None,
            )

        def score(chosen: np.ndarray) -> list[tuple[float, bool]]:
            return self._score([inputs[i] for i in chosen], [continuations[i] for i in chosen])

        yield from in_memory(len(inputs), max_rows, plan, score)

    def _score(self, sequences: list[np.ndarray], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Return what the harness wants of each continuation, the last tokens of its sequence and one more."""
        batch = FoldedBatch.from_sequences(sequences)
        counts = np.array([len(continuation) for continuation in continuations])
        starts = np.cumsum(counts) - counts  # of each continuation among all scored tokens
        ends = np.cumsum([len(sequence) for sequence in sequences])
        positions = np.repeat(ends - counts - starts, counts) + np.arange(counts.sum())  # packed, that predict them
        rows = batch.unfold_index.numpy()[positions]
        with self._computing():
            outputs = self._rows.run(batch.to(self.device, non_blocking=True))
            wanted, row_of = np.unique(rows, return_inverse=True)
            logprobs, is_likeliest = score_targets(
                lambda first, end: self._rows.logits(outputs, torch.from_numpy(wanted[first:end]).to(self.device)),
                self._rows.owner.config.vocab_size,
                row_of,
                np.concatenate(continuations),
                self.softmax_dtype,
            )
        # The harness adds up, and so rounds, in the dtype of its log-probabilities.
        sums = torch.from_numpy(np.add.reduceat(logprobs.double().numpy(), starts)).to(logprobs.dtype)
        sharing = batch.num_tokens, batch.num_rows
        self.radix_stats._add(*sharing, sharing=sharing)
        return list(zip(sums.tolist(), np.logical_and.reduceat(is_likeliest.numpy(), starts).tolist(), strict=True))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
