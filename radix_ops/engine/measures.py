"""What a run's results say together: accuracy where the right choice is known, perplexity of texts."""

from __future__ import annotations

import array
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .calibration import Calibration
from .errors import UserError
from .intervals import INTERVAL, share_of
from .label_measures import LabelMeasures
from .rolling import perplexity_of

ACCURACIES = ("sum", "per_token", "per_char")


def metrics(results: Iterable[Mapping[str, Any]], *, calibration: bool = False) -> dict[str, Any]:
    """Return what results of a `Scorer`, or of a `Classifier`, say together, whichever call or file they come from.

    Results of questions: "rows", "rows_with_gold", which alone are counted, and, where there are some, "accuracy" by
    "sum" (acc of lm-evaluation-harness), "per_token" and "per_char" (acc_norm), each with the number that is "correct",
    its share as "value" and the "low" and "high" of the Wilson score interval, whose confidence is "level". With
    `calibration` also the bins of the answers by their confidence, the softmax of a question's "logprobs" at the best,
    and the expected calibration error.

    Results of texts: "rows", the sums of "logprob", "tokens", "words" and "bytes", "token_perplexity",
    "word_perplexity", "byte_perplexity" and "bits_per_byte" over all of them, as lm-evaluation-harness has them.

    Results of a Classifier: "rows", "rows_with_gold" and, where there are some, "accuracy" as above, of rows whose
    labels are the right ones and no others; "labels", which has of each label that is right or predicted anywhere the
    "rows" that it is right in, those where it is "predicted", "precision", "recall" and "f1", 0 where they have nothing
    to count; and the means of these as "macro".

    Raises UserError, a ValueError, for what is no result, and for `calibration` where no right choice is known.
    """
    measures: Measures | LabelMeasures | None = None
    for index, result in enumerate(results):
        try:
            if measures is None:
                measures = LabelMeasures() if "labels" in result else Measures(calibration)
            measures.add(result)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            kind = "Classifier" if isinstance(measures, LabelMeasures) else "Scorer"
            raise UserError(f"results[{index}] is no result of a {kind}, or not of the kind before it") from error
    measures = Measures() if measures is None else measures
    if calibration and isinstance(measures, LabelMeasures):
        raise UserError("calibration=True is for results of a Scorer, and these are of a Classifier")
    if calibration and not measures.num_gold:
        raise UserError('calibration=True needs results with "gold", the right choice; none has it')
    return measures.found()


def is_of_text(result: Mapping[str, Any]) -> bool:
    """Return whether a Scorer's result is of a text, and not of a question. A row may have had keys of its own that
    results of the other kind have, but not "tokens", of which a question has an array."""
    return not isinstance(result["tokens"], (list, tuple))


class Measures:
    """Counts over results that come one by one, in any order. Memory holds 8 bytes a text, and those of Calibration."""

    def __init__(self, calibration: bool = False):
        self.num_rows = self.num_gold = 0
        self._correct = dict.fromkeys(ACCURACIES, 0)
        self._calibration = Calibration() if calibration else None
        self._logprobs = array.array("d")  # of texts; their exact sum does not depend on their order
        self._sizes = {"tokens": 0, "words": 0, "bytes": 0}

    def add(self, result: Mapping[str, Any]) -> None:
        """Add a result, of a question or of a text like those before."""
        is_text = is_of_text(result)
        if self.num_rows and is_text != bool(self._logprobs):
            raise ValueError("questions and texts")
        if is_text:
            self._logprobs.append(result["logprob"])
            # Results of token ids have no words, bytes or characters; then none of those is counted.
            self._sizes = {name: size + result[name] for name, size in self._sizes.items() if name in result}
        else:
            self._add_question(result)
        self.num_rows += 1

    def _add_question(self, result: Mapping[str, Any]) -> None:
        logprobs, tokens = np.array(result["logprobs"], float), np.array(result["tokens"])
        best = {"sum": result["best"], "per_token": int(np.argmax(logprobs / tokens))}
        if "best_per_char" in result:
            best["per_char"] = result["best_per_char"]
        gold = result.get("gold")
        if gold is None:
            return
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(logprobs):
            raise ValueError("gold is no index")
        self.num_gold += 1
        self._correct = {name: count + (best[name] == gold) for name, count in self._correct.items() if name in best}
        if self._calibration is not None:
            self._calibration.add(logprobs, best["sum"] == gold)

    def found(self) -> dict[str, Any]:
        """Return what `metrics` does."""
        if self._logprobs:
            return {"rows": self.num_rows, **self._of_texts()}
        found: dict[str, Any] = {"rows": self.num_rows, "rows_with_gold": self.num_gold}
        if self.num_gold:
            accuracy = {name: share_of(count, self.num_gold) for name, count in self._correct.items()}
            found |= {"accuracy": accuracy, "interval": INTERVAL}
            if self._calibration is not None:
                found["calibration"] = self._calibration.table()
        return found

    def _of_texts(self) -> dict[str, Any]:
        logprob = math.fsum(self._logprobs)
        found = {f"{name[:-1]}_perplexity": perplexity_of(logprob, count) for name, count in self._sizes.items()}
        if "bytes" in self._sizes:
            count = self._sizes["bytes"]
            found["bits_per_byte"] = -logprob / count / math.log(2) if count else None
        return {"logprob": logprob, **self._sizes, **found}
