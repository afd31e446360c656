"""The heads of language models that scale or cap their logits, which the output layer alone does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WholeHead:
    """All that a model of transformers does to hidden states behind its decoder stack, on states [..., D] by rows.

    It is the model's own forward, of which the stack is left out. `weight` is the output layer's.
    """

    def __init__(self, model: Any, stack: nn.Module, output_kind: type):
        from ..hf.proofs import class_of
        from ..hf.twins import with_part

        self._given: Tensor | None = None
        stand_in: Any = nn.Identity()
        stand_in.forward = lambda *args, **kwargs: output_kind(last_hidden_state=self._given)
        self._forward, self._twin = class_of(model).forward, with_part(model, stack, stand_in)
        self.weight = model.get_output_embeddings().weight

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits [..., vocabulary]."""
        self._given = states.reshape(1, -1, states.shape[-1])
        try:
            ids = torch.zeros(self._given.shape[:2], dtype=torch.int64, device=states.device)
            logits = self._forward(self._twin, input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            self._given = None
        return logits.reshape(*states.shape[:-1], -1)
