"""radix_ops.compat, against the radix-mlp package that it stands in for."""

from __future__ import annotations

import inspect
import types

import numpy as np
import pytest
import radix_mlp
import torch

from helpers import processes
from helpers.batches import NAMED, pack, random_positions, random_sequences
from radix_ops import compat

NAMES = ("input_ids", "position_ids", "cu_seq_lengths")


def arrays(sequences, positions=None):
    ids, default_positions, cu_seqlens = pack(sequences)
    tensors = (ids, default_positions if positions is None else positions, cu_seqlens)
    return [tensor.numpy().astype(np.uint32) for tensor in tensors]


def assert_same(got, want):
    assert isinstance(got, tuple)
    assert len(got) == len(want) == 4
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g, w)


def test_every_public_function_of_radix_mlp_is_here():
    assert compat.__all__ == radix_mlp.__all__
    assert compat.__version__ == radix_mlp.__version__
    assert isinstance(compat.torch, types.ModuleType)
    assert compat.torch.__name__ == "radix_ops.compat.torch"
    assert compat.torch.__all__ == radix_mlp.torch.__all__
    for name in radix_mlp.__all__:
        ours, theirs = inspect.signature(getattr(compat, name)), inspect.signature(getattr(radix_mlp, name))
        assert list(ours.parameters)[: len(theirs.parameters)] == list(theirs.parameters)


PROGRAM = """
import numpy as np
import torch
from radix_mlp import __version__, compute_fold_and_scatter
from radix_mlp.torch import compute_fold_and_scatter_torch
arrays = [np.array(x, np.uint32) for x in ([1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6])]
print(__version__, [x.tolist() for x in compute_fold_and_scatter(*arrays, 8)])
print([x.tolist() for x in compute_fold_and_scatter_torch(*[torch.from_numpy(x.astype(np.int16)) for x in arrays])])
"""


def test_a_program_for_radix_mlp_runs_unchanged():
    instead = "import sys, radix_ops.compat; sys.modules['radix_mlp'] = radix_ops.compat"
    runs = [processes.run_python("-c", program) for program in (PROGRAM, instead + PROGRAM)]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert runs[0].stdout == runs[1].stdout != ""


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name]])
@pytest.mark.parametrize("pad_multiple_of", [None, 1, 8])
def test_numpy_equals_radix_mlp(name, pad_multiple_of):
    given = arrays(NAMED[name])
    want = radix_mlp.compute_fold_and_scatter(*given, pad_multiple_of)
    assert_same(compat.compute_fold_and_scatter(*given, pad_multiple_of), want)
    assert_same(compat.compute_fold_and_scatter(*given, pad_multiple_of=pad_multiple_of, bound_checks=False), want)


@pytest.mark.parametrize("seed", range(3))
def test_numpy_and_torch_equal_radix_mlp_on_random_batches(seed):
    rng = np.random.default_rng(100 + seed)
    for _ in range(700):
        sequences = random_sequences(rng)
        given = arrays(sequences, random_positions(rng, sequences))
        multiple = [None, 1, 2, 32][int(rng.integers(4))]
        assert_same(
            compat.compute_fold_and_scatter(*given, multiple), radix_mlp.compute_fold_and_scatter(*given, multiple)
        )
        dtype = torch.int32 if rng.random() < 0.5 else torch.int64
        tensors = [torch.from_numpy(x.astype(np.int64)).to(dtype) for x in given]
        got = compat.compute_fold_and_scatter_torch(*tensors, multiple)
        want = radix_mlp.compute_fold_and_scatter_torch(*tensors, multiple)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.int32
            assert torch.equal(g, w.to(torch.int32))


def test_numpy_keeps_large_ids():
    given = [np.array(x, np.uint32) for x in ([2**32 - 1, 2**31, 5] * 2, [0, 2**32 - 1, 2] * 2, [0, 3, 6])]
    assert_same(compat.compute_fold_and_scatter(*given), radix_mlp.compute_fold_and_scatter(*given))


@pytest.mark.parametrize("repeats", [1, 2000])
def test_numpy_takes_arrays_however_they_are_stored(repeats):
    given = arrays(NAMED["nested"] * repeats)
    want = radix_mlp.compute_fold_and_scatter(*given)
    strided = [np.repeat(x, 2)[::2] for x in given]
    read_only = [np.frombuffer(x.tobytes(), np.uint32) for x in given]
    misaligned = [np.frombuffer(b"." + x.tobytes(), np.uint32, offset=1) for x in given]
    assert not misaligned[0].flags.aligned
    for stored in (given, strided, read_only, misaligned):
        assert_same(compat.compute_fold_and_scatter(*stored), want)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_torch_takes_every_integer(dtype):
    given = [torch.tensor(x).to(dtype) for x in ([1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6])]
    got = compat.torch.compute_fold_and_scatter_torch(*given, 4)
    for g, w in zip(got, radix_mlp.torch.compute_fold_and_scatter_torch(*given, 4), strict=True):
        assert g.dtype == w.dtype == torch.int32
        assert torch.equal(g, w)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.uint64])
def test_numpy_refuses_other_dtypes(position, dtype):
    given = arrays(NAMED["nested"])
    given[position] = given[position].astype(dtype)
    with pytest.raises(TypeError, match=f"{NAMES[position]} must be uint32, got {np.dtype(dtype)}"):
        compat.compute_fold_and_scatter(*given)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="input_ids must be a NumPy array of uint32, got list"):
        compat.compute_fold_and_scatter([1], [0], [0, 1])
    with pytest.raises(TypeError, match="position_ids must hold integers, got torch.float32"):
        compat.compute_fold_and_scatter_torch(torch.zeros(1).int(), torch.zeros(1), torch.tensor([0, 1]))
    for position, name in enumerate(NAMES):
        given = [torch.tensor(x) for x in ([1], [0], [0, 1])]
        given[position] = given[position].numpy()
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got ndarray"):
            compat.compute_fold_and_scatter_torch(*given)


def test_another_device_is_refused():
    given = torch.tensor([1]), torch.tensor([0], device="meta"), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="position_ids must be on the same device as input_ids, got meta and cpu"):
        compat.compute_fold_and_scatter_torch(*given)


MALFORMED = {
    "empty": ([1, 2], [0, 1], []),
    "starts late": ([1, 2], [0, 1], [1, 2]),
    "ends early": ([1, 2], [0, 1], [0, 1]),
    "ends late": ([1, 2], [0, 1], [0, 3]),
    "decreases": ([1, 2], [0, 1], [0, 2, 1, 2]),
    "only zero": ([1, 2], [0, 1], [0]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_cu_seq_lengths_are_refused(name):
    given = [np.array(x, np.uint32) for x in MALFORMED[name]]
    with pytest.raises(ValueError, match="cu_seq_lengths"):
        compat.compute_fold_and_scatter(*given)
    with pytest.raises(ValueError, match="cu_seq_lengths"):
        compat.compute_fold_and_scatter_torch(*[torch.from_numpy(x.astype(np.int64)) for x in given])
    with pytest.raises(ValueError, match="cu_seq_lengths"):
        compat.compute_fold_and_scatter(*given, bound_checks=False)


def test_a_multiple_that_is_no_integer_is_refused_as_by_radix_mlp():
    given = arrays(NAMED["nested"])
    message = "argument 'pad_multiple_of': 'float' object cannot be interpreted as an integer"
    for function in (radix_mlp.compute_fold_and_scatter, compat.compute_fold_and_scatter):
        with pytest.raises(TypeError, match=message):
            function(*given, 1.5)
    with pytest.raises(TypeError, match=message):
        compat.compute_fold_and_scatter_torch(*[torch.from_numpy(x.astype(np.int32)) for x in given], 1.5)


@pytest.mark.parametrize("ends", [[], [0], [0, 0]])
@pytest.mark.parametrize("pad_multiple_of", [None, 8])
def test_no_tokens(ends, pad_multiple_of):
    given = [np.array(x, np.uint32) for x in ([], [], ends)]
    want = radix_mlp.compute_fold_and_scatter(*given, pad_multiple_of)
    assert_same(compat.compute_fold_and_scatter(*given, pad_multiple_of), want)
    got = compat.compute_fold_and_scatter_torch(*[torch.from_numpy(x.astype(np.int32)) for x in given], pad_multiple_of)
    assert [x.tolist() for x in got] == [[], [], [], []]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([[1, 2]], [0, 1], [0, 2]), r"input_ids must be 1-dimensional, got shape \[1, 2\]"),
        (([1, 2], [0], [0, 2]), "input_ids and position_ids must have same length: 2 != 1"),
        (([1, 2], [0, 1], [[0, 2]]), "cu_seq_lengths must be 1-dimensional"),
    ],
)
def test_shapes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        compat.compute_fold_and_scatter(*[np.array(x, np.uint32) for x in given])
    with pytest.raises(ValueError, match=message):
        compat.compute_fold_and_scatter_torch(*[torch.tensor(x) for x in given])


@pytest.mark.parametrize("pad_multiple_of", [0, -1])
def test_pad_multiple_of_below_1_is_refused(pad_multiple_of):
    given = arrays(NAMED["nested"])
    with pytest.raises(ValueError, match=f"pad_multiple_of must be from 1 to 2147483647, got {pad_multiple_of}"):
        compat.compute_fold_and_scatter(*given, pad_multiple_of)


def test_pad_multiple_of_must_be_an_integer():
    given = arrays(NAMED["nested"])
    assert_same(compat.compute_fold_and_scatter(*given, np.int64(8)), compat.compute_fold_and_scatter(*given, 8))
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        compat.compute_fold_and_scatter(*given, 2.5)


def test_torch_refuses_values_that_int32_does_not_hold():
    with pytest.raises(ValueError, match="input_ids must fit int32"):
        compat.compute_fold_and_scatter_torch(torch.tensor([2**31]), torch.tensor([0]), torch.tensor([0, 1]))
