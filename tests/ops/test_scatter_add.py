"""radix::scatter_add and scatter_add_kv, against sums in float64 and against index_add_."""

from __future__ import annotations

import pytest
import torch

from helpers.large import require_memory, untouched_zeros
from radix_ops import reference

pytestmark = pytest.mark.usefixtures("default_device")
SCATTER_ADD, SCATTER_ADD_KV = torch.ops.radix.scatter_add, torch.ops.radix.scatter_add_kv
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
TAILS = [(), (1,), (3,), (8,), (63,), (512,), (513,), (1000,), (2, 3), (4, 1, 5), (0,), (3, 0)]


def inverse_of(index, num_rows):
    members = torch.argsort(index.long(), stable=True)
    counts = torch.bincount(index.long(), minlength=num_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), members


def both(src, index, num_rows):
    """Return the result without the inverse; check that the one with it has the same bits."""
    plain = SCATTER_ADD(src, index, num_rows)
    inverse = inverse_of(index, num_rows)
    for index_dtype in (torch.int32, torch.int64):
        csr = SCATTER_ADD.csr(src, index, *(x.to(index_dtype) for x in inverse), num_rows)
        assert torch.equal(csr, plain)
    return plain


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_add_equals_float64_sum(dtype, tail, index_dtype):
    src = (torch.rand(29, *tail) * 20 - (0 if dtype == torch.uint8 else 10)).to(dtype)
    index = torch.randint(0, 9, (29,), dtype=index_dtype)
    index[index == 4] = 5
    got = both(src, index, 11)
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got, reference.scatter_add(src, index, 11))
    assert not got[[4, 9, 10]].any()


def test_scatter_add_golden():
    src = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert SCATTER_ADD(src, torch.tensor([2, 0, 2]), 4).tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_scatter_add_of_integers_wraps_as_index_add(dtype):
    limits = torch.iinfo(dtype)
    src = torch.tensor([limits.max, limits.max, limits.min, limits.min, 3], dtype=dtype)
    index = torch.tensor([0, 0, 1, 1, 0])
    # On the CPU: index_add_ on CUDA reads past small integers, which a memory checker would report.
    want = torch.zeros(2, dtype=dtype, device="cpu").index_add_(0, index.cpu(), src.cpu())
    assert torch.equal(both(src, index, 2).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("members", [2, 16, 1000])
def test_scatter_add_error_is_one_rounding(dtype, members):
    src = torch.randn(members * 16, 256).to(dtype)
    index = torch.arange(16).repeat(members)
    exact = torch.zeros(16, 256, dtype=torch.float64).index_add_(0, index, src.double())
    error = (both(src, index, 16).double() - exact).norm() / exact.norm()
    rounded_once = (exact.to(dtype).double() - exact).norm() / exact.norm()
    assert error <= 1.1 * rounded_once


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_scatter_add_bits_do_not_depend_on_threads(num_threads):
    src, index = torch.randn(5000, 300), torch.randint(0, 700, (5000,))
    want = SCATTER_ADD(src, index, 700)
    torch.set_num_threads(num_threads)
    for _ in range(3):
        assert torch.equal(both(src, index, 700), want)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[:, ::3],
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 2),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[:, :, 0],
    ],
)
def test_scatter_add_takes_any_strides(view):
    src = view(torch.randn(6, 7, 8))
    index = torch.randint(0, 4, (src.shape[0],))
    torch.testing.assert_close(both(src, index, 4), reference.scatter_add(src, index, 4))
    torch.testing.assert_close(both(src, torch.stack([index, index], 1)[:, 0], 4), reference.scatter_add(src, index, 4))


def test_scatter_add_takes_an_inverse_in_any_order():
    src, index = torch.randn(6, 3), torch.tensor([1, 1, 0, 1, 0, 1])
    got = SCATTER_ADD.csr(src, index, torch.tensor([0, 2, 6]), torch.tensor([4, 2, 5, 0, 3, 1]), 2)
    torch.testing.assert_close(got, reference.scatter_add(src, index, 2))


def test_scatter_add_of_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert both(torch.rand(0, 3), nothing, 4).tolist() == [[0.0] * 3] * 4
    assert both(torch.rand(0, 3), nothing, 0).shape == (0, 3)


def test_scatter_add_of_one_member_keeps_special_values():
    src = torch.tensor([[float("inf"), float("nan"), 5e-324]], dtype=torch.float64)
    got = SCATTER_ADD(src, torch.tensor([1]), 2)
    assert got[1].isinf()[0]
    assert got[1].isnan()[1]
    assert got[1, 2] == 5e-324
    large = torch.tensor([[6e4], [6e4], [-6e4]]).half()
    assert SCATTER_ADD(large, torch.zeros(3, dtype=torch.int32), 1).item() == torch.tensor(6e4).half().item()


def test_scatter_add_offsets_past_2_to_the_31():
    require_memory(2.5)
    src = untouched_zeros(36 * 1024, 64 * 1024)
    src[-1, -1], src[-2, -1] = 7, 5
    index = torch.zeros(36 * 1024, dtype=torch.int32)
    index[-2:] = 1
    last_two = [torch.tensor([0, 0, 2]), torch.tensor([0, 1])]
    rows = src[-2:], index[-2:]
    assert SCATTER_ADD.csr(*rows, *last_two, 2)[1, -1] == 12
    tall = SCATTER_ADD(src[-2:], torch.tensor([36 * 1024 - 1] * 2), 36 * 1024)
    assert tall.numel() > 2**31
    assert tall[-1, -1] == 12
    inverse = inverse_of(index, 2)
    narrow = src[:, -1]
    assert SCATTER_ADD.csr(narrow, index, *inverse, 2).tolist() == [0, 12]


@pytest.mark.parametrize("members", [3, 4, 5, 127, 128, 129, 130, 5000])
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
def test_scatter_add_of_long_segments(members, width, dtype):
    # Whole numbers, whose sums are exact in fp32 in any order.
    src = torch.randint(-8, 9, (members + 3, width)).to(dtype)
    index = torch.full((members + 3,), 2)
    index[[1, 5, -1]] = torch.tensor([0, 4, 0])
    exact = torch.zeros(6, width, dtype=torch.int64).index_add_(0, index, src.long())
    assert torch.equal(both(src, index, 6), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("tails", [((8, 16), (8, 16)), ((2, 24), (2, 16)), ((3,), (2, 5)), ((), (4,)), ((0,), (4,))])
def test_scatter_add_kv_equals_two_scatter_adds(dtype, tails):
    k, v = (torch.randint(0, 9, (290, *tail)).to(dtype) for tail in tails)
    index = torch.randint(0, 9, (290,), dtype=torch.int32)
    index[:50] = 3
    inverse = inverse_of(index, 11)
    for got in (SCATTER_ADD_KV(k, v, index, 11), SCATTER_ADD_KV.csr(k, v, index, *inverse, 11)):
        assert torch.equal(got[0], both(k, index, 11))
        assert torch.equal(got[1], both(v, index, 11))
