"""radix::gather and gather_kv, against indexing of torch."""

from __future__ import annotations

import pytest
import torch

import radix_ops  # noqa: F401  (registers torch.ops.radix)
from helpers.large import require_memory, untouched_zeros

pytestmark = pytest.mark.usefixtures("default_device")
GATHER, GATHER_KV = torch.ops.radix.gather, torch.ops.radix.gather_kv
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
TAILS = [(), (1,), (2,), (3,), (7,), (8,), (63,), (1000,), (2, 3), (4, 1, 5), (2, 1, 3, 1, 2, 1, 2, 1, 2), (0,), (3, 0)]


def sample(shape, dtype):
    return torch.randint(0, 2, shape).bool() if dtype == torch.bool else (torch.rand(shape) * 200 - 100).to(dtype)


def assert_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_equals_indexing(dtype, tail, index_dtype):
    x = sample((11, *tail), dtype) if dtype != torch.uint8 else torch.randint(0, 255, (11, *tail), dtype=dtype)
    index = torch.randint(0, 11, (29,), dtype=index_dtype)
    assert_bits(GATHER(x, index), x[index.long()])


def test_gather_golden():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert GATHER(x, torch.tensor([2, 0, 2])).tolist() == [[5, 6], [1, 2], [5, 6]]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[:, ::3],
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 2),
        lambda x: x.flip(0),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x[1:, 1:, 1:],
        lambda x: x[:, :, 0],
        lambda x: x.to_dense().as_strided((4, 3), (2, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64])
def test_gather_takes_any_strides(view, dtype):
    x = view(sample((6, 7, 8), dtype))
    index = torch.randint(0, x.shape[0], (13,))
    assert_bits(GATHER(x, index), x[index])
    assert_bits(GATHER(x, torch.stack([index, index], 1)[:, 0]), x[index])


@pytest.mark.parametrize("offset", range(1, 5))
def test_gather_takes_any_alignment(offset):
    flat = torch.arange(200, dtype=torch.int8)
    x = flat[offset : offset + 9 * 16].view(9, 16)
    index = torch.tensor([8, 0, 3])
    assert_bits(GATHER(x, index), x[index])


def test_gather_takes_rows_at_odd_bytes():
    x = torch.arange(33, dtype=torch.int8).view(11, 3)[:, 1:]
    index = torch.tensor([10, 0, 7, 7])
    assert_bits(GATHER(x, index), x[index])


def test_gather_of_nothing():
    assert GATHER(torch.rand(0, 3), torch.zeros(0, dtype=torch.int32)).shape == (0, 3)
    assert GATHER(torch.rand(4, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def test_gather_resolves_lazy_views():
    x = torch.randn(4, 3, dtype=torch.complex64)
    index = torch.tensor([1, 3])
    assert torch.equal(GATHER(x.conj(), index), x.conj().resolve_conj()[index])
    assert torch.equal(GATHER(x.conj().imag, index), -x.imag[index])


@pytest.mark.usefixtures("many_threads")
def test_gather_of_many_rows():
    x = torch.randn(3000, 129)
    index = torch.randint(0, 3000, (20_001,), dtype=torch.int32)
    assert_bits(GATHER(x, index), x[index.long()])
    ids = torch.randint(0, 99, (3000,))
    assert_bits(GATHER(ids, index.repeat(20)), ids[index.long()].repeat(20))


def test_gather_offsets_past_2_to_the_31():
    require_memory(2.5)
    x = untouched_zeros(36 * 1024, 64 * 1024)
    x[-1, -1], x[-1, 0] = 7, 5
    assert_bits(GATHER(x, torch.tensor([0, 36 * 1024 - 1])), torch.stack([x[0], x[-1]]))
    wide = GATHER(x[-1:], torch.zeros(33 * 1024, dtype=torch.int32))
    assert wide.numel() > 2**31
    assert torch.equal(wide[-1], x[-1])


def test_gather_csr_equals_gather():
    x = torch.randn(5, 3)
    index = torch.tensor([4, 0, 0, 2], dtype=torch.int32)
    indptr, members = torch.tensor([0, 2, 2, 3, 3, 4]), torch.tensor([1, 2, 3, 0])
    assert_bits(GATHER.csr(x, index, indptr, members), x[index.long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("tails", [((8, 16), (8, 16)), ((2, 24), (2, 16)), ((3,), (2, 5)), ((), (4,)), ((0,), (4,))])
def test_gather_kv_equals_two_gathers(dtype, tails):
    k, v = (torch.randint(0, 99, (11, *tail)).to(dtype) for tail in tails)
    index = torch.randint(0, 11, (29,), dtype=torch.int32)
    indptr = torch.cat([torch.zeros(1), torch.bincount(index, minlength=11).cumsum(0)]).int()
    inverse = indptr, torch.argsort(index, stable=True).int()
    for got in (GATHER_KV(k, v, index), GATHER_KV.csr(k, v, index, *inverse)):
        assert_bits(got[0], k[index.long()])
        assert_bits(got[1], v[index.long()])


def test_gather_kv_takes_strided_rows():
    """K and V as they come from one projection: views of its columns."""
    rows = torch.randn(9, 3, 4, 8)
    k, v = rows[:, 1], rows[:, 2]
    index = torch.tensor([8, 1, 1, 0])
    for got, want in zip(GATHER_KV(k, v, index), (k[index], v[index]), strict=True):
        assert_bits(got, want)
