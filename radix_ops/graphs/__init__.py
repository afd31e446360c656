"""Captured CUDA graphs of a model's forward on folded batches, replayed for batches of the same sizes.

A forward of few rows takes the host longer to launch than the GPU to run. `CapturedForwards` pads such a batch up to
sizes that many batches share (`buckets`), copies it into the buffers of a graph (`inputs`) and replays that. The
padding is rows of a sequence of its own, so a graph computes what the model computes on the padded batch, to the bit.
A graph reads the model's weights where they lie; `watch` sees where they were replaced, or anything else was changed
that a graph does not see, and `circumstances` tells the calls that no graph may stand in for.

`CapturedSteps` does so with training steps, forward and backward: gradients come from a `twin` of the layers, whose
weights are the same memory, and a `step` gives them to autograd.
"""
