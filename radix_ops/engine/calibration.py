"""How far a model's confidence in its answers is from how often they are right."""

from __future__ import annotations

import array
import math
from typing import Any

import numpy as np


class Calibration:
    """Answers by confidence, the softmax of a question's log-probabilities at the best, in bins of equal width.

    A bin holds the confidences above its lower bound and up to its upper one, as in "On Calibration of Modern Neural
    Networks" (arXiv 1706.04599, section 2). Memory holds 9 bytes an answer.
    """

    def __init__(self, bins: int = 10):
        self._bins = bins
        self._confidences, self._is_right = array.array("d"), bytearray()

    def add(self, logprobs: np.ndarray, is_right: bool) -> None:
        """Add an answer by the log-probabilities of the question's choices."""
        self._confidences.append(1 / math.fsum(np.exp(logprobs - logprobs.max()).tolist()))
        self._is_right.append(is_right)

    def table(self) -> dict[str, Any]:
        """Return the bins that hold answers, and the expected calibration error: the mean over all answers of how far
        the accuracy of an answer's bin is from the bin's mean confidence."""
        confidences, is_right = np.frombuffer(self._confidences), np.frombuffer(self._is_right, bool)
        bounds = np.arange(self._bins + 1) / self._bins
        bin_of = np.searchsorted(bounds, confidences) - 1
        found, error = [], 0.0
        for number in range(self._bins):
            chosen = bin_of == number
            if count := int(chosen.sum()):
                confidence = math.fsum(confidences[chosen]) / count
                accuracy = int(is_right[chosen].sum()) / count
                error += count / len(confidences) * abs(accuracy - confidence)
                found.append(
                    {
                        "above": bounds[number].item(),
                        "up_to": bounds[number + 1].item(),
                        "answers": count,
                        "confidence": confidence,
                        "accuracy": accuracy,
                    }
                )
        return {"expected_calibration_error": error, "bins": found}
