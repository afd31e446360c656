"""The reference of the losses on compact rows: torch.nn.functional on the packed batch, token by token."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch.nn import functional as F

from radix_ops import losses

VOCABULARY, WIDTH = 13, 5


@dataclasses.dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    with_bias: bool = False

    @property
    def scalars(self):
        return {"temperature": self.temperature, "logit_scale": self.logit_scale, "softcap": self.softcap}


OPTIONS = [
    Options(),
    Options(with_bias=True),
    Options(temperature=0.6),
    Options(logit_scale=0.3, with_bias=True),
    Options(softcap=2.0, with_bias=True),
    Options(temperature=1.7, logit_scale=2.5, softcap=1.5, with_bias=True),
]


class Packed:
    """The reference: logits of all packed tokens, and the targets that stand one behind them in their sequence."""

    def __init__(self, hidden, batch, labels, weight, bias, options, ignore_index=-100):
        logits = F.linear(hidden[batch.unfold_index.long()], weight, bias).to(
            torch.promote_types(hidden.dtype, torch.float32)
        )
        logits = logits * options.logit_scale
        if options.softcap:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        ends = batch.cu_seqlens.tolist()
        places = [i for start, end in itertools.pairwise(ends) for i in range(start + 1, end)]
        self.places = [i for i in places if labels[i] != ignore_index]
        self.logits = logits[[i - 1 for i in self.places]] / options.temperature
        self.targets = labels.long()[self.places]
        self.ends, self.num_tokens = ends, batch.num_tokens

    def spread(self, values):
        return values.new_zeros(self.num_tokens).index_put(
            (torch.tensor(self.places, device=values.device, dtype=torch.long),), values
        )

    def losses(self, label_smoothing=0.0):
        return self.spread(
            F.cross_entropy(self.logits, self.targets, reduction="none", label_smoothing=label_smoothing)
        )

    def entropy(self):
        # torch's own gives NaN where a token has no probability.
        logprobs = self.logits.log_softmax(-1)
        return self.spread(-(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1))

    def by_sequence(self, values):
        sums = [values[start:end].sum() for start, end in itertools.pairwise(self.ends)]
        return torch.stack(sums) if sums else values[:0]

    def counts(self):
        return self.by_sequence(self.spread(torch.ones_like(self.targets, dtype=torch.float64)))


def tensors(batch, with_bias, dtype=torch.float64, vocabulary=VOCABULARY, width=WIDTH, device="cpu"):
    shapes = [(batch.num_rows, width), (vocabulary, width), (vocabulary,)]
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    return hidden, weight, bias if with_bias else None


def random_labels(batch, vocabulary=VOCABULARY, ignored=0.3, ignore_index=-100):
    labels = torch.randint(0, vocabulary, (batch.num_tokens,))
    labels[torch.rand(batch.num_tokens) < ignored] = ignore_index
    return labels.to(batch.fold_index.device)


def assert_same(got, want, inputs, **tolerance):
    """Compare values, and gradients for random ones of the result."""
    torch.testing.assert_close(got, want, **tolerance)
    inputs = [x for x in inputs if x is not None]
    grad = torch.randn_like(want)
    wants = torch.autograd.grad(want, inputs, grad, allow_unused=True, retain_graph=True)
    for g, w, x in zip(torch.autograd.grad(got, inputs, grad), wants, inputs, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(x) if w is None else w, **tolerance)


def check_all(batch, options, rows_per_chunk, device="cpu"):
    """Check every public function on one batch."""
    hidden, weight, bias = inputs = tensors(batch, options.with_bias, device=device)
    labels = random_labels(batch)
    head = {"weight": weight, "bias": bias, "rows_per_chunk": rows_per_chunk, **options.scalars}
    packed = Packed(hidden, batch, labels, weight, bias, options)
    logprobs, entropy = losses.token_logprobs_and_entropy(hidden, batch, labels, **head)
    assert_same(torch.stack([logprobs, entropy]), torch.stack([-packed.losses(), packed.entropy()]), inputs)
    assert_same(losses.token_logprobs(hidden, batch, labels, **head), -packed.losses(), inputs)
    assert_same(losses.token_entropy(hidden, batch, labels, **head), packed.entropy(), inputs)
    sums, counts = packed.by_sequence(-packed.losses()), packed.counts()
    assert_same(losses.sequence_logprobs(hidden, batch, labels, **head), sums, inputs)
    means = losses.sequence_logprobs(hidden, batch, labels, reduction="mean", **head)
    assert_same(means, sums / counts.clamp(min=1), inputs)

    own = batch.input_ids[batch.unfold_index.long()]
    smoothed = Packed(hidden, batch, own, weight, bias, options, ignore_index=3)
    settings = {"ignore_index": 3, "label_smoothing": 0.2, **head}
    for reduction, want in (("sum", torch.sum), ("sequence", smoothed.by_sequence)):
        got = losses.causal_lm_loss(hidden, batch, reduction=reduction, **settings)
        assert_same(got, want(smoothed.losses(0.2)), inputs)
    got = losses.causal_lm_loss(hidden, batch, **settings)
    if smoothed.places:
        assert_same(got, smoothed.losses(0.2).sum() / len(smoothed.places), inputs)
    else:
        assert got.isnan()
        assert not any(grad.any() for grad in torch.autograd.grad(got, [x for x in inputs if x is not None]))
