"""What a server computes of batches that hold sequences of several requests, by kind.

    compute = computings(engine)["pooled"]
    found = compute(sequences, extras)  # one result for each sequence

A kind takes any sequences in any order: `extras[i]` says what else it has to know of sequences[i]. The runner must be
`running`, in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..batch import fold
from . import reranking, scoring
from ._classifier import Classifier
from ._embedder import Embedder
from ._engine import Engine
from ._reranker import Reranker
from ._scorer import Scorer
from .classifying import Row
from .errors import UserError
from .items import Items
from .pooling import pooled, tokens_read
from .runners import Runner, States, last_tokens
from .scoring import MAX_LOGIT_BYTES, Choices

_LEAST_NORM = 1e-12  # as torch's normalize has it
Sequences = list[np.ndarray]  # int32 token ids each, none empty
Computing = Callable[[Sequences, list[Any]], Sequence[Any] | np.ndarray]


class Chosen(NamedTuple):
    """What a sequence's choice is: all tokens from `start` on, and a last one that the model does not read."""

    item: object  # the same for choices of one question
    start: int
    last: int


class Read(NamedTuple):
    """Log-probabilities of a sequence's tokens: of each the next one's, and the likeliest ones'."""

    logprobs: np.ndarray  # float32 [L - 1], of the tokens from the second on
    likeliest: np.ndarray  # int64 [L, K], the likeliest first
    their_logprobs: np.ndarray  # float32 [L, K]


def computings(engine: Engine) -> dict[str, Computing]:
    """Return what an engine computes of sequences, by kind.

    An Embedder: "pooled", the poolings of each sequence side by side, float32 [D], neither cut nor normalised; extras
    are the tokens that poolings leave out. "states", the hidden states of all tokens, float32 [L, D].
    A Reranker: "logit", the float32 whose sigmoid says how relevant a document is.
    A Classifier: "labels", the numbers that its `scores` takes, [numbers]; extras are places among an item's sequences.
    A Scorer: "choices", (log-probability of the choice, whether greedy decoding would write it); extras are `Chosen`.
    "logprobs", a `Read`; extras are K. "next", the log-probabilities of tokens as the next one, float32 [tokens];
    extras are arrays of their ids.
    """
    runner = engine.runner
    if isinstance(engine, Embedder):
        poolings = engine.poolings
        return {
            "pooled": lambda sequences, skips: _pooled(runner, poolings, sequences, skips),
            "states": lambda sequences, _: _states(runner, sequences),
        }
    if isinstance(engine, Reranker):
        logits = reranking.scorer(runner, engine._answers, "identity")
        return {"logit": lambda sequences, _: logits(np.arange(len(sequences)), sequences)[0]}
    if isinstance(engine, Classifier):
        numbers = engine._compute(Items())
        return {"labels": lambda sequences, places: numbers(np.array(places), sequences)[0]}
    assert isinstance(engine, Scorer)
    return {
        "choices": lambda sequences, chosen: _choices(runner, sequences, chosen),
        "logprobs": lambda sequences, counts: _logprobs(runner, sequences, counts),
        "next": lambda sequences, tokens: _next(runner, sequences, tokens),
    }


def _pooled(runner: Runner, poolings: Sequence[str], sequences: Sequences, skips: list[int]) -> np.ndarray:
    skip = np.array(skips, np.int64)
    tokens = tokens_read(poolings, np.array([len(ids) for ids in sequences]), skip)
    return pooled(runner.states(sequences, tokens), poolings, skip).cpu().numpy()


def _states(runner: Runner, sequences: Sequences) -> list[np.ndarray]:
    found = runner.states(sequences)
    return [
        found.at(np.arange(start, start + length)).float().cpu().numpy()
        for start, length in zip(found.starts, found.lengths, strict=True)
    ]


def _choices(runner: Runner, sequences: Sequences, chosen: list[Chosen]) -> list[tuple[float, bool]]:
    choices, items = Choices(), dict[object, list[int]]()
    for place, choice in enumerate(chosen):
        items.setdefault(choice.item, []).append(place)
    for places in items.values():
        choices.append(_parts(sequences[place], chosen[place]) for place in places)
    indices = np.empty(len(chosen), np.int64)
    indices[[place for places in items.values() for place in places]] = np.arange(len(chosen))
    sums, greedy = scoring.scorer(runner, choices)(indices, sequences)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _parts(ids: np.ndarray, choice: Chosen) -> tuple[np.ndarray, np.ndarray]:
    """Return (context, choice) of a sequence."""
    return ids[: choice.start], np.append(ids[choice.start :], np.int32(choice.last))


def _logprobs(runner: Runner, sequences: Sequences, counts: list[int]) -> list[Read]:
    found = runner.states(sequences)
    packed = np.concatenate(sequences)
    tokens, row_of = _distinct(runner, found, packed)
    states = found.at(tokens)
    # Each token but a sequence's last one has a next token.
    inner = np.delete(np.arange(len(packed)), last_tokens(sequences))
    order = inner[np.argsort(row_of[inner], kind="stable")]
    targets, most = packed[order + 1].astype(np.int64), max(1, *counts)
    logprobs = np.empty(len(packed), np.float32)
    likeliest, theirs = np.empty((len(tokens), most), np.int64), np.empty((len(tokens), most), np.float32)
    size = max(1, MAX_LOGIT_BYTES // (4 * runner.head.weight.shape[0]))
    for first in range(0, len(tokens), size):
        scores = torch.log_softmax(runner.head(states[first : first + size]).float(), -1)
        top = scores.topk(most)
        likeliest[first : first + size], theirs[first : first + size] = top.indices.cpu(), top.values.cpu()
        part = slice(*np.searchsorted(row_of[order], [first, first + size]))
        row, target = torch.from_numpy(row_of[order[part]] - first), torch.from_numpy(targets[part])
        logprobs[order[part]] = scores[row.to(scores.device), target.to(scores.device)].cpu()
    runner.head_rows += len(tokens)
    results = []
    for start, length, count in zip(found.starts.tolist(), found.lengths.tolist(), counts, strict=True):
        places = row_of[start : start + length]
        results.append(Read(logprobs[start : start + length - 1], likeliest[places, :count], theirs[places, :count]))
    return results


def _distinct(runner: Runner, states: States, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return packed tokens of all hidden states that there are, int64 [R], and for each packed token which of them is
    its own, int64 [N]: tokens of one path have the same, so that the head reads each once."""
    if not runner.pads_states:
        _, first, row_of = np.unique(states.token_rows.numpy(), return_index=True, return_inverse=True)
        return first, row_of
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(states.lengths)]))
    batch = fold(torch.from_numpy(packed), ends)
    return batch.fold_index[: batch.num_nodes].numpy().astype(np.int64), batch.unfold_index.numpy().astype(np.int64)


def _next(runner: Runner, sequences: Sequences, tokens: list[np.ndarray]) -> list[np.ndarray]:
    last = runner.states(sequences, last_tokens(sequences)).last()  # [B, D]
    size = max(1, MAX_LOGIT_BYTES // (4 * runner.head.weight.shape[0]))
    found: list[np.ndarray] = []
    for part in last.split(size):
        scores = torch.log_softmax(runner.head(part).float(), -1)
        for row in scores:
            wanted = torch.from_numpy(np.asarray(tokens[len(found)], np.int64)).to(row.device)
            found.append(row[wanted].cpu().numpy())
    runner.head_rows += len(last)
    return found


def embeddings(
    engine: Embedder, pooled: np.ndarray, normalize: bool | None = None, dim: int | None = None
) -> np.ndarray:
    """Return the embeddings of poolings [B, D] as an Embedder makes them, float32 [B, dim].

    normalize, dim: in place of what the model's folder or the engine's arguments say; numbers that `dim` leaves out go
    before the normalisation. UserError for a `dim` that the model doesn't have.
    """
    check_dim(engine, dim)
    recipe = engine._pooling
    before = recipe.dim if dim is None else dim
    found = pooled[:, : None if recipe.cuts_last and dim is None else before]
    if recipe.normalize if normalize is None else normalize:
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), _LEAST_NORM)
    return np.ascontiguousarray(found[:, :before])


def check_dim(engine: Embedder, dim: int | None) -> None:
    """UserError for a `dim` that the model doesn't have."""
    if dim is not None and not 1 <= dim <= engine.dim:
        raise UserError(f"dimensions must be from 1 to {engine.dim}, got {dim}")


def relevance(engine: Reranker, logits: np.ndarray) -> np.ndarray:
    """Return the scores of logits [B] as a Reranker gives them, float32 [B]."""
    return logits if engine._activation == "identity" else torch.from_numpy(logits).sigmoid().numpy()


def label_logits(engine: Classifier, item: Row, numbers: np.ndarray) -> np.ndarray:
    """Return what stands before the scores of labels, float64 [labels]: a head's logits, or the logarithm of scores."""
    if engine.auto_class == "AutoModelForSequenceClassification":
        return numbers[0].astype(np.float64)
    return np.log(engine.scores(item, numbers))


def max_length(engine: Engine) -> int | None:
    """Return the most tokens of what an engine reads at once, None where nothing says it."""
    if isinstance(engine, Embedder):
        return engine.recipe.max_length
    if isinstance(engine, Scorer):
        return engine.max_length
    assert isinstance(engine, (Classifier, Reranker))
    return engine._max_length
