"""Logits of one of transformers' causal language models at chosen rows of a folded batch.

Scoring needs logits at few places. The decoder stack runs on the rows of the batch; then the forward of the model
around it, which may scale or cap its logits, runs on the hidden states of the rows that are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .._attention import Layout
from ..batch import FoldedBatch
from . import guards, proofs
from .fold import run_rows
from .heads import causal_lm_class
from .twins import shallow_copy, with_part


class RowLogits:
    """Runs a causal language model on folded batches, without changing it.

    `model` is one of transformers', or one that PEFT has wrapped. Of the wrapper only its changes of weights take
    effect, and not, say, virtual tokens that it puts first: compare with the model itself before relying on it. Raises
    TypeError where there is no such model and ValueError for one that folding isn't known to be right for.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.owner = proofs.find_model(model)
        self.stack = proofs.find_stack(self.owner)
        name = type(self.owner).__name__
        if proofs.class_of(self.owner) is not causal_lm_class(self.owner.config):
            raise ValueError(f"{name} is not transformers' causal language model of its type")
        reason = guards.why_misplaced(self.owner, self.stack) or self.obstacle()
        if reason is not None:
            raise ValueError(f"{name} can't be folded: {reason}")

    def obstacle(self) -> str | None:
        """Return what was done to the model that makes folding wrong at this moment, or None."""
        inside = {id(module) for child in self.stack.children() for module in child.modules()}
        for name, module in self.model.named_modules():
            if id(module) in inside:
                continue
            if "forward" in vars(module):
                return (
                    f"the forward of {name or 'the model'} was replaced{guards.replacer(module)} "
                    "(radix_ops.hf.enable does that, and disable takes it back)"
                )
            if guards.has_foreign_hook(module):
                return f"{name or 'the model'} has a hook, which would see rows for positions"
        return guards.why_unfoldable(self.stack) or guards.why_disturbed(self.stack)

    def run(self, batch: FoldedBatch, layout: Layout = "auto") -> ModelOutput:
        """Return the decoder stack's output for a batch on its device; last_hidden_state is [1, num_rows, D]."""
        return run_rows(self.stack, batch, {}, layout, batch.num_rows)

    def logits(self, outputs: ModelOutput, rows: Tensor) -> Tensor:
        """Return the model's logits [len(rows), vocabulary] at `rows` of the batch that `run` made `outputs` of."""
        states = outputs.last_hidden_state[:, rows]  # [1, len(rows), D]
        chosen = type(outputs)(last_hidden_state=states)
        stack = shallow_copy(self.stack, forward=lambda *args, **kwargs: chosen)
        model = with_part(self.owner, self.stack, stack)
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        return model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
