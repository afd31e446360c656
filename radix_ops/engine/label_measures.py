"""What a run's labels say together where the right ones are known: accuracy, and precision and recall of each label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .intervals import INTERVAL, share_of


class LabelMeasures:
    """Counts over results of a `Classifier` that come one by one, in any order. Memory holds three numbers a label."""

    def __init__(self):
        self.num_rows = self.num_gold = self._correct = 0
        self._both: dict[str, int] = {}  # by label: how often it was right and predicted,
        self._right: dict[str, int] = {}
        self._predicted: dict[str, int] = {}

    def add(self, result: Mapping[str, Any]) -> None:
        """Add a result."""
        gold, _ = result.get("gold"), result["labels"]
        self.num_rows += 1
        if gold is None:
            return
        self.num_gold += 1
        right = {gold} if isinstance(gold, str) else set(gold)
        predicted = {result["best"]} if "predicted" not in result else set(result["predicted"])
        self._correct += right == predicted
        for counts, labels in ((self._both, right & predicted), (self._right, right), (self._predicted, predicted)):
            for label in labels:
                counts[label] = counts.get(label, 0) + 1

    def found(self) -> dict[str, Any]:
        """Return what `metrics` does."""
        found: dict[str, Any] = {"rows": self.num_rows, "rows_with_gold": self.num_gold}
        if not self.num_gold:
            return found
        labels = {label: self._of(label) for label in sorted({*self._right, *self._predicted})}
        found |= {"accuracy": share_of(self._correct, self.num_gold), "interval": INTERVAL, "labels": labels}
        if labels:
            names = ("precision", "recall", "f1")
            found["macro"] = {name: sum(label[name] for label in labels.values()) / len(labels) for name in names}
        return found

    def _of(self, label: str) -> dict[str, Any]:
        both, right, predicted = (c.get(label, 0) for c in (self._both, self._right, self._predicted))
        return {
            "rows": right,
            "predicted": predicted,
            "precision": both / predicted if predicted else 0.0,
            "recall": both / right if right else 0.0,
            "f1": 2 * both / (right + predicted),
        }
