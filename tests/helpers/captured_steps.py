"""Captured training steps without CUDA."""

from __future__ import annotations

import torch

from radix_ops.graphs import step


class StandIn:
    """What `CapturedStep` is, with every kernel launched anew. Its backward reads the weights as they are then."""

    made = forwards = backwards = 0

    def __init__(self, layers, inputs, states, weights, memory):
        StandIn.made += 1
        self.layers, self.inputs, self.weights, self.needs = layers, inputs, weights, states.requires_grad
        self.states = states
        self.has_gradient = [grad is not None for grad in self.gradients(self.run()[:0])]

    def run(self):
        self.leaf = self.states.detach().requires_grad_(self.needs)
        return self.layers(self.leaf, self.inputs)

    def gradients(self, grad):
        with torch.enable_grad():
            out = self.run()
        padded = torch.zeros_like(out)
        padded[: len(grad)] = grad
        return step._gradients(out, [self.leaf, *self.weights], padded)

    def forward(self, batch, rows, embed):
        StandIn.forwards += 1
        self.inputs.fill(batch, rows)
        self.states = embed(self.inputs.batch.input_ids.clone())
        return self.states, self.run()[: batch.num_rows if rows is None else len(rows)].detach().clone()

    def backward(self, grad):
        StandIn.backwards += 1
        return [grad for grad in self.gradients(grad) if grad is not None]


class HostMemory(step.StepMemory):
    def __init__(self, device):
        self.device, self._awaited = device, None


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def eager_step(model, loss_of, *arguments):
    """Return the loss and the gradients of a step without graphs, which stay as they are."""
    model._training_graphs = False
    model.zero_grad()
    loss = loss_of(model, *arguments)
    loss.backward()
    got = gradients(model)
    model.zero_grad()
    model._training_graphs = True
    return loss.detach(), got
