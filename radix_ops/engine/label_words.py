"""Words that answer for labels, as tokens: what a model must read for all of them, and their log-probabilities.

words = LabelWords(tokenizer, {"yes": (" yes", " Yes"), "no": (" no",)})
words.suffixes  # token ids that stand behind a prompt, one sequence each: a label of one token needs none
compute = words.scorer(runner)
words.label_logprobs(numbers)  # of an item's sequences, [labels]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batches import Compute
from .errors import UserError
from .runners import Runner, last_tokens
from .scoring import score_targets
from .tokenizing import in_turn

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """What one sequence of an item gives: log-probabilities of tokens behind some of its own."""

    offsets: np.ndarray  # tokens of the suffix that stand before each row, int64 [rows]
    row_of: np.ndarray  # of each step, int64 [steps]
    targets: np.ndarray  # the token that each step goes to, int64 [steps]
    steps: np.ndarray  # of all sequences' steps, which these are, int64 [steps]


class LabelWords:
    """The words of labels, by a tokenizer. UserError for a word that can't be told from another's or isn't there.

    A text answers by the longest word that it starts with. So a word doesn't count where the longest other word that it
    starts with is of its label; and where that is of another label, as the 1 of 10 may be, the word's texts are none of
    the other's. Words that start alike share what they start with: their steps, from a token to the next, make a trie.
    A model reads the trie's leaves alone, each behind the prompt and without its last token.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, tuple[str | Ids, ...]]):
        self.labels = list(words)
        found: dict[Ids, tuple[str, Any]] = {}
        self.ids: list[list[Ids]] = []
        for label, given in words.items():
            listed = [_ids_of(tokenizer, label, word) for word in given]
            for word, ids in zip(given, listed, strict=True):
                if ids in found:
                    other, name = found[ids][1], found[ids][0]
                    raise UserError(
                        f'the words {other!r} of label "{name}" and {word!r} of label "{label}" are the same tokens, '
                        f"{list(ids)}"
                    )
                found[ids] = (label, word)
            self.ids.append(listed)
        self._within = _counted({ids: label for ids, (label, _) in found.items()})
        self.ids = [[ids for ids in listed if ids in self._within] for listed in self.ids]
        counted = [ids for listed in self.ids for ids in listed]
        starts = list(dict.fromkeys(ids[:-1] for ids in counted))
        inner = {start[:end] for start in starts for end in range(len(start))}
        self.suffixes: list[Ids] = [start for start in starts if start not in inner]
        self._steps: dict[tuple[Ids, int], int] = {}
        for ids in counted:
            for end in range(len(ids)):
                self._steps.setdefault((ids[:end], ids[end]), len(self._steps))
        self._parts = self._split()

    def _split(self) -> list[_Part]:
        """Return the parts of the sequences; of those that share a start the first has its steps."""
        steps_of: dict[Ids, list[tuple[int, int]]] = {}  # behind a start: tokens with their steps
        for (start, token), step in self._steps.items():
            steps_of.setdefault(start, []).append((token, step))
        parts = []
        for suffix in self.suffixes:
            offsets: list[int] = []
            row_of: list[int] = []
            targets: list[int] = []
            steps: list[int] = []
            for end in range(len(suffix) + 1):
                found = steps_of.pop(suffix[:end], [])
                row_of += [len(offsets)] * len(found)
                targets += [token for token, _ in found]
                steps += [step for _, step in found]
                offsets += [end] * bool(found)
            parts.append(_Part(*(np.array(numbers, np.int64) for numbers in (offsets, row_of, targets, steps))))
        return parts

    def scorer(self, runner: Runner) -> Compute:
        """Return a function of (indices, inputs) that computes the log-probabilities of all steps, float64 [B, steps],
        zeros for those that other sequences of the item have. Sequences are prompts with the suffixes, item by item."""

        def compute(indices: np.ndarray, inputs: list[np.ndarray]) -> tuple[np.ndarray]:
            kinds = [index % len(self.suffixes) for index in indices.tolist()]
            parts = [self._parts[kind] for kind in kinds]
            lasts = last_tokens(inputs) - np.array([len(self.suffixes[kind]) for kind in kinds])
            sizes = [len(part.offsets) for part in parts]
            tokens = np.repeat(lasts, sizes) + np.concatenate([part.offsets for part in parts])
            rows = runner.states(inputs, tokens).at(tokens)
            firsts = np.cumsum([0, *sizes[:-1]])
            logprobs, _ = score_targets(
                lambda first, end: runner.head(rows[first:end]).float(),
                runner.head.weight.shape[0],
                np.concatenate([first + part.row_of for first, part in zip(firsts, parts, strict=True)]),
                np.concatenate([part.targets for part in parts]),
            )
            runner.head_rows += len(rows)
            found = np.zeros((len(inputs), len(self._steps)))
            sequence_of = np.repeat(np.arange(len(inputs)), [len(part.steps) for part in parts])
            found[sequence_of, np.concatenate([part.steps for part in parts])] = logprobs.double().numpy()
            return (found,)

        return compute

    def label_logprobs(self, numbers: np.ndarray) -> np.ndarray:
        """Return the log-probability of each label, float64 [labels], by the numbers of an item's sequences: that of
        its words together, where a word's is the sum over its tokens, less those of other labels' words within it."""
        steps = numbers.sum(axis=0)
        sums = {ids: sum(steps[self._steps[ids[:end], ids[end]]] for end in range(len(ids))) for ids in self._within}
        alone = {ids: _less(sums[ids], [sums[inner] for inner in inside]) for ids, inside in self._within.items()}
        return np.array([np.logaddexp.reduce([alone[ids] for ids in words]) for words in self.ids])


def _counted(label_of: Mapping[Ids, str]) -> dict[Ids, list[Ids]]:
    """Return the words that count, each with the next longer ones that start with it, which are of other labels."""
    found: dict[Ids, list[Ids]] = {}
    stand_in: dict[Ids, Ids] = {}  # of a word that doesn't count: the one whose texts hold all of its own
    for ids in sorted(label_of, key=len):
        outer = next((ids[:end] for end in range(len(ids) - 1, 0, -1) if ids[:end] in label_of), None)
        outer = stand_in.get(outer, outer) if outer else None
        if outer is not None and label_of[outer] == label_of[ids]:
            stand_in[ids] = outer
            continue
        found[ids] = []
        if outer is not None:
            found[outer].append(ids)
    return found


def _less(logprob: float, others: list[float]) -> float:
    """Return the log-probability of an event but for parts of it; rounding may leave nothing of it."""
    if not others or logprob == -np.inf:
        return logprob
    rest = -np.expm1(np.logaddexp.reduce(others) - logprob)
    return logprob + np.log(rest) if not rest <= 0 else -np.inf


def _ids_of(tokenizer: Any, label: str, word: str | Ids) -> Ids:
    """Return a word's token ids behind other text."""
    if isinstance(word, str):
        with in_turn(tokenizer):
            # Some tokenizers put a space before whatever comes first.
            before, both, alone = tokenizer(["\n", "\n" + word, word], add_special_tokens=False)["input_ids"]
        ids = both[len(before) :] if both[: len(before)] == before else alone
    else:
        ids = list(word)
    wrong = next((token for token in ids if not 0 <= token < len(tokenizer)), None)
    if wrong is not None:
        raise UserError(
            f'the word {list(word)} of label "{label}" holds {wrong}, which is no id of the model\'s tokenizer: it has '
            f"{len(tokenizer)}"
        )
    if not ids:
        raise UserError(f'the word {word!r} of label "{label}" is no token to the model\'s tokenizer')
    return tuple(ids)
