"""The types and dtypes in which FoldedBatch takes token ids, positions and lengths."""

from __future__ import annotations

import array
import warnings

import numpy as np
import pytest
import torch

import radix_ops
from helpers.batches import NAMED, pack
from radix_ops import FoldedBatch

SEQUENCES = [[1, 2, 3], [1, 2, 100], [], [1, 2, 3, 4]]
LARGE = {2: [2**15 - 1, 2**15, 2**16 - 1], 4: [2**31 - 1, 2**31, 2**32 - 1], 8: [2**53 + 1, 2**63 - 1]}
TORCH_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]
NUMPY_DTYPES = [f"{order}{kind}{size}" for size in (2, 4, 8) for kind in "iu" for order in "<>"] + ["i1", "u1"]


class Interface:
    """An array of another library: NumPy's protocol and nothing else."""

    def __init__(self, values):
        self._array = np.array(values, np.uint16)
        self.__array_interface__ = self._array.__array_interface__


class Index:
    """An integer of another library."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def packed_as(convert):
    ids, positions, cu_seqlens = pack(SEQUENCES)
    return [convert(x.tolist()) for x in (ids, cu_seqlens, positions)]


def assert_is_the_batch(got, device="cpu"):
    ids, positions, _ = pack(SEQUENCES)
    assert got.input_ids.device.type == device
    assert got.unfold(got.input_ids).tolist() == ids.tolist()
    assert got.unfold(got.position_ids).tolist() == positions.tolist()
    assert got.lengths.tolist() == [len(s) for s in SEQUENCES]
    assert got.num_rows == got.num_nodes


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_of_every_integer_dtype(device, dtype):
    tensors = [torch.tensor(s, dtype=dtype, device=device) for s in SEQUENCES]
    batch = FoldedBatch.from_sequences(tensors)
    assert_is_the_batch(batch, device)
    assert (batch.num_nodes, batch.input_ids.dtype) == (5, torch.int64)
    arguments = packed_as(lambda x: torch.tensor(x, dtype=dtype, device=device))
    kept = dtype if dtype == torch.int32 else torch.int64
    for make in (radix_ops.fold, radix_ops.pack):
        batch = make(*arguments)
        assert_is_the_batch(batch, device)
        assert batch.input_ids.dtype == batch.position_ids.dtype == kept
    ids = torch.tensor([[0, 7, 8], [7, 9, 0]], dtype=dtype, device=device)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=dtype, device=device)
    positions = torch.tensor([[0, 1, 2], [1, 2, 3]], dtype=dtype, device=device)
    batch = FoldedBatch.from_padded(ids, mask, positions)
    assert batch.unfold(batch.input_ids).tolist() == [7, 8, 7, 9]
    assert batch.unfold(batch.position_ids).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_arrays_of_every_integer_dtype(dtype):
    assert_is_the_batch(FoldedBatch.from_sequences([np.array(s, dtype) for s in SEQUENCES]))
    for make in (radix_ops.fold, radix_ops.pack):
        batch = make(*packed_as(lambda x: np.array(x, dtype)))
        assert_is_the_batch(batch)
        assert batch.input_ids.dtype == (torch.int32 if dtype[1:] == "i4" else torch.int64)
    ids = np.array([[0, 7, 8], [7, 9, 0]], dtype)
    for mask in (ids > 0, (ids > 0).astype(dtype)):
        batch = FoldedBatch.from_padded(ids, mask, np.array([[0, 1, 2], [1, 2, 3]], dtype))
        assert batch.unfold(batch.input_ids).tolist() == [7, 8, 7, 9]
        assert batch.unfold(batch.position_ids).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        lambda s: range(s[0], s[0] + len(s)) if s == [*range(1, len(s) + 1)] else s,
        lambda s: [np.uint64(x) if i % 2 else x for i, x in enumerate(s)],
        lambda s: [np.array(x, np.int8) for x in s],
        lambda s: [torch.tensor(x) for x in s],
        lambda s: [Index(x) for x in s],
        lambda s: np.array(s, object),
        lambda s: array.array("H", s),
        lambda s: memoryview(bytes(s)),
        lambda s: np.array(s, np.uint16)[::-1].copy()[::-1],
        lambda s: np.array([s, s], np.int32).T[:, 0],
        lambda s: np.frombuffer(b"\0" + np.array(s, np.int32).tobytes(), np.int32, offset=1),
        lambda s: np.ma.masked_array(s, [False] * len(s), np.int64),
        lambda s: torch.tensor([s, s]).T[:, 1],
        Interface,
    ],
)
def test_sequences_of_every_kind(convert):
    assert_is_the_batch(FoldedBatch.from_sequences([convert(s) if s else s for s in SEQUENCES]))


def test_an_array_and_a_tensor_are_lists_of_their_rows():
    rows = [[1, 2, 3], [1, 2, 4]]
    for convert in (lambda x: np.array(x, np.uint16), torch.tensor):
        batch = FoldedBatch.from_sequences(convert(rows))
        assert batch.unfold(batch.input_ids).tolist() == [*rows[0], *rows[1]]
        assert batch.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("number", [np.array(3), torch.tensor(3)])
def test_a_number_is_no_list_of_sequences(number):
    with pytest.raises(ValueError, match=r"^sequences must be a list of lists of token ids, got shape \[\]$"):
        FoldedBatch.from_sequences(number)


def test_values_near_the_limits_of_their_dtypes_are_kept(device):
    for size, values in LARGE.items():
        for found in (np.array(values, f"u{size}"), np.array(values, f">u{size}")):
            assert FoldedBatch.from_sequences([found]).input_ids.tolist() == values
            assert radix_ops.fold(found, np.array([0, len(values)])).input_ids.tolist() == values
        tensor = torch.tensor(values, dtype=getattr(torch, f"uint{8 * size}"), device=device)
        assert FoldedBatch.from_sequences([tensor]).input_ids.tolist() == values
        assert radix_ops.pack(tensor, torch.tensor([0, len(values)], device=device)).input_ids.tolist() == values


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_read_only_maps_are_read_and_not_written(tmp_path, dtype):
    np.array([1, 2, 3, 1, 2, 100, 1, 2, 3, 4], dtype).tofile(tmp_path / "ids.bin")
    shard = np.memmap(tmp_path / "ids.bin", dtype, "r")
    assert_is_the_batch(FoldedBatch.from_sequences([shard[:3], shard[3:6], shard[:0], shard[6:]]))
    batch = radix_ops.pack(shard, np.array([0, 3, 6, 6, 10]))
    assert_is_the_batch(batch)
    batch.input_ids.zero_()
    assert shard.tolist() == [1, 2, 3, 1, 2, 100, 1, 2, 3, 4]


UINT64 = torch.tensor([1, 2**64 - 2], dtype=torch.uint64)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (UINT64, ValueError, "must hold integers that int64 holds, got 18446744073709551614"),
        (UINT64.numpy(), ValueError, "must hold integers that int64 holds, got 18446744073709551614"),
        (np.array([1.0, 2.0]), TypeError, "must hold integers, got torch.float64"),
        (torch.ones(2, dtype=torch.bfloat16), TypeError, "must hold integers, got torch.bfloat16"),
        (np.array([True, False]), TypeError, "must hold integers, got torch.bool"),
        (np.array([1, 2], np.longdouble), TypeError, f"must hold integers, got (torch.)?{np.dtype(np.longdouble)}"),
        (np.array(["1", "2"]), TypeError, "must hold integers, got <U1"),
        (np.array([1, 2], "m8[s]"), TypeError, r"must hold integers, got timedelta64\[s\]"),
        (np.array([1, None]), TypeError, "must hold integers, got None"),
        (np.ma.masked_array([1, 2], [False, True]), TypeError, "must hold integers, got an array with masked values"),
    ],
)
def test_what_int64_does_not_hold_is_refused(values, error, message):
    with pytest.raises(error, match=r"^sequences\[1\] " + message):
        FoldedBatch.from_sequences([[1, 2], values])
    lengths = np.array([0, 2])
    with pytest.raises(error, match="^input_ids " + message):
        radix_ops.fold(values, lengths)
    with pytest.raises(error, match="^position_ids " + message):
        radix_ops.pack(lengths, lengths, values)
    with pytest.raises(error, match="^cu_seqlens " + message):
        radix_ops.fold(lengths, values)
    if values.dtype != object:
        with pytest.raises(error, match="^input_ids " + message):
            FoldedBatch.from_padded(values[None], torch.ones(1, 2))


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        ([1, np.True_], TypeError, "must hold integers, got np.True_"),
        ([1, torch.tensor(True)], TypeError, r"must hold integers, got tensor\(True\)"),
        ([1, 2.0], TypeError, "must hold integers, got 2.0"),
        ([1, -(2**63) - 1], ValueError, "must hold integers that int64 holds, got -9223372036854775809"),
        ({1: 2}, TypeError, "must hold integers, got dict"),
        ("12", TypeError, "must hold integers, got str"),
        (b"12", TypeError, "must hold integers, got bytes"),
        (None, TypeError, "must hold integers, got NoneType"),
        ([[1], [2]], ValueError, r"must be a flat list of token ids, got shape \[2, 1\]"),
        ([torch.tensor([1]), torch.tensor([2])], ValueError, r"must be a flat list .*, got shape \[2, 1\]"),
        ([np.array([1]), np.array([2])], ValueError, r"must be a flat list .*, got shape \[2, 1\]"),
        (torch.tensor([1, 2]).to_sparse(), TypeError, "must be a dense tensor, got one that is torch.sparse_coo"),
        (np.array([[1, 2]]), ValueError, r"must be a flat list of token ids, got shape \[1, 2\]"),
    ],
)
def test_sequences_that_are_no_lists_of_integers_are_refused(sequence, error, message):
    with pytest.raises(error, match=r"^sequences\[1\] " + message):
        FoldedBatch.from_sequences([[1, 2], sequence])


MASKS = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, *TORCH_DTYPES]


@pytest.mark.parametrize("dtype", MASKS)
def test_masks_of_bools_integers_and_floats(dtype, device):
    ids = torch.tensor([[0, 7, 8], [7, 9, 0]], device=device)
    batch = FoldedBatch.from_padded(ids, torch.tensor([[0, 1, 1], [1, 1, 0]], device=device).to(dtype))
    assert batch.unfold(batch.input_ids).tolist() == [7, 8, 7, 9]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.bits8])
def test_masks_of_other_dtypes_are_refused(dtype):
    mask = torch.empty(1, 2, dtype=dtype)
    with pytest.raises(TypeError, match=f"^attention_mask must hold bools, integers or floats, got {dtype}$"):
        FoldedBatch.from_padded(torch.ones(1, 2, dtype=torch.int64), mask)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, lambda x: torch.nested.as_nested_tensor([x[0], x[0]])])
def test_tensors_that_are_not_dense_are_refused(convert):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about nested tensors
        odd = convert(torch.tensor([[1, 2]]))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(
        TypeError, match="^input_ids must be a dense tensor, got one that is (nested|torch.sparse_coo)$"
    ):
        FoldedBatch.from_padded(odd, ids)
    with pytest.raises(TypeError, match="^attention_mask must be a dense tensor"):
        FoldedBatch.from_padded(ids, odd)
    with pytest.raises(TypeError, match="^cu_seqlens must be a dense tensor"):
        radix_ops.fold(ids[0], odd)


def test_other_dtypes_compile():
    ids, _, cu_seqlens = pack(NAMED["nested"])
    torch.compiler.reset()
    compiled = torch.compile(lambda x, ends: radix_ops.fold(x, ends).input_ids, fullgraph=True, dynamic=True)
    want = radix_ops.fold(ids, cu_seqlens).input_ids
    for dtype in (torch.uint8, torch.uint16, torch.uint64):
        assert torch.equal(compiled(ids.to(dtype), cu_seqlens.to(dtype)), want)
