"""Random garbage at each op: an error or a right answer, never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import radix_ops
from helpers.batches import to
from helpers.processes import run_python
from radix_ops import reference

RADIX = torch.ops.radix
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

DTYPES = [torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float64, torch.int16]
EXTREMES = [0, 1, -1, 2, 3, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63)]


@st.composite
def indices(draw, likely=10):
    """Draw mostly 1-D integer tensors of small numbers, sometimes of any dtype, rank, stride or value."""
    values = draw(st.lists(st.integers(0, likely) | st.sampled_from(EXTREMES), max_size=12))
    plain = draw(st.lists(st.integers(0, likely), max_size=12))
    values = plain if draw(st.integers(0, 3)) else values
    tensor = torch.tensor(values, dtype=torch.int64)
    tensor = tensor.to(draw(st.sampled_from([torch.int32, torch.int64, torch.int64, *DTYPES])))
    shape = draw(st.integers(0, 9))
    if shape == 0:
        tensor = tensor[None]
    elif shape == 1 and len(values):
        tensor = tensor[0]
    elif shape == 2:
        tensor = tensor.repeat_interleave(2)[::2]
    elif shape == 3 and len(values):
        tensor = tensor[:1].expand(draw(st.integers(0, 12)))
    return tensor


@st.composite
def rows(draw):
    sizes = draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = (torch.rand(sizes) * 8).to(draw(st.sampled_from(DTYPES)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, draw(st.integers(0, tensor.dim() - 1)))
    return tensor


@st.composite
def folds(draw):
    """Draw arguments of a fold that are often, but not always, well formed."""
    ids, positions, cu_seqlens = draw(indices(3)), draw(indices(2)), draw(indices(12))
    if draw(st.integers(0, 3)) and ids.dim() == 1:
        positions = torch.randint(0, 2, ids.shape)
        cuts = draw(st.lists(st.integers(0, len(ids)), max_size=5))
        cu_seqlens = torch.tensor([0, *sorted(cuts), len(ids)])
    return ids, positions, cu_seqlens, draw(st.sampled_from([1, 1, 2, 7, 0, -1, 2**31, 2**62]))


def is_index(tensor):
    return tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)


def fold_is_valid(ids, positions, cu_seqlens, pad_multiple_of):
    if not all(map(is_index, (ids, positions, cu_seqlens))) or len(ids) != len(positions):
        return False
    ends = cu_seqlens.tolist()
    ordered = bool(ends) and ends == sorted(ends) and ends[0] == 0 and ends[-1] == len(ids)
    return ordered and 1 <= pad_multiple_of < 2**31


@FUZZ
@given(folds())
def test_fold(device, on_cpu):
    arguments = to(device, on_cpu)
    if fold_is_valid(*on_cpu):
        for got, expected in zip(RADIX.fold(*arguments), reference.fold(*on_cpu), strict=True):
            assert torch.equal(got.cpu(), expected)
    else:
        for op in (RADIX.fold, RADIX.fold_plan):
            with pytest.raises(RuntimeError, match="radix::fold"):
                op(*arguments)
    # The Python face takes integers of any width.
    *tensors, pad_multiple_of = on_cpu
    wide = [x.to(torch.int64) if x.dtype in (torch.uint8, torch.int16) else x for x in tensors]
    if fold_is_valid(*wide, pad_multiple_of):
        batch = radix_ops.fold(arguments[0], arguments[2], *arguments[1::2])
        assert torch.equal(batch.unfold(batch.input_ids).cpu(), wide[0])
    else:
        with pytest.raises((ValueError, TypeError)):
            radix_ops.fold(arguments[0], arguments[2], *arguments[1::2])


def in_range(index, bound):
    return all(0 <= i < bound for i in index.tolist())


@FUZZ
@given(rows(), indices(4))
def test_gather(x, index):
    if x.dim() and is_index(index) and in_range(index, len(x)):
        assert torch.equal(RADIX.gather(x, index), x[index.long()])
    else:
        with pytest.raises(RuntimeError, match="radix::gather: "):
            RADIX.gather(x, index)


@FUZZ
@given(rows(), indices(4), st.integers(-1, 6) | st.sampled_from([-(2**63), 2**31]), st.booleans())
def test_scatter_add(src, index, num_rows, same_length):
    if same_length and src.dim() and index.dim() == 1 and len(index):
        index = index.repeat(len(src))[: len(src)]
    valid = src.dim() and is_index(index) and len(index) == len(src) and 0 <= num_rows < 2**31
    valid = valid and src.dtype != torch.bool and in_range(index, num_rows)
    if valid:
        want = reference.scatter_add(src, index, num_rows)
        torch.testing.assert_close(RADIX.scatter_add(src, index, num_rows), want)
    else:
        with pytest.raises(RuntimeError, match="radix::scatter_add: "):
            RADIX.scatter_add(src, index, num_rows)


@st.composite
def inverses(draw):
    """Draw an index with an inverse that is right, or has one thing wrong with it, or is unrelated."""
    num_rows = draw(st.integers(0, 4))
    index = torch.tensor(
        draw(st.lists(st.integers(0, num_rows - 1), max_size=8)) if num_rows else [], dtype=torch.int64
    )
    members = torch.argsort(index, stable=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(index, minlength=num_rows).cumsum(0)])
    spoil = draw(st.integers(0, 5))
    if spoil == 0 and len(members):
        members[draw(st.integers(0, len(members) - 1))] = draw(st.integers(0, 9) | st.sampled_from(EXTREMES))
    elif spoil == 1:
        indptr[draw(st.integers(0, num_rows))] = draw(st.integers(0, 9) | st.sampled_from(EXTREMES))
    elif spoil == 2:
        indptr, members = draw(indices(8)), draw(indices(8))
    return index, indptr, members, num_rows


def is_inverse(index, indptr, members, num_rows):
    if not (is_index(indptr) and is_index(members)) or len(indptr) != num_rows + 1 or len(members) != len(index):
        return False
    ends, entries = indptr.tolist(), members.tolist()
    if ends[0] != 0 or ends[-1] != len(entries) or ends != sorted(ends):
        return False
    wanted = [[i for i, row in enumerate(index.tolist()) if row == j] for j in range(num_rows)]
    return wanted == [sorted(entries[ends[j] : ends[j + 1]]) for j in range(num_rows)]


@FUZZ
@given(inverses())
def test_scatter_add_csr(arguments):
    index, *_, num_rows = arguments
    src = torch.rand(len(index), 3)
    if is_inverse(*arguments):
        want = reference.scatter_add(src, index, num_rows)
        torch.testing.assert_close(RADIX.scatter_add.csr(src, *arguments), want)
    else:
        with pytest.raises(RuntimeError, match=r"radix::scatter_add\.csr: "):
            RADIX.scatter_add.csr(src, *arguments)


@FUZZ
@given(indices(6), indices(9), st.integers(-1, 4))
def test_varlen_attention(cu_q, cu_k, window):
    q, k = torch.randn(5, 4, 3), torch.randn(8, 2, 3)
    if cu_q.dim() == cu_k.dim() == 1 and len(cu_q) and len(cu_k) and window >= 0:
        # Sorted and with their ends in place, many of them are well formed.
        cu_q, cu_k = cu_q.sort().values.clone(), cu_k.sort().values.clone()
        cu_q[0] = cu_k[0] = 0
        cu_k[-1] = 8
    arguments = (q, k, k, cu_q, cu_k, 0.5, window)
    valid = is_index(cu_q) and is_index(cu_k) and len(cu_q) == len(cu_k) > 0 and window >= 0
    valid = valid and cu_q[0] == cu_k[0] == 0 and cu_q[-1] <= 5 and cu_k[-1] == 8
    valid = valid and bool(((cu_q.diff() >= 0) & (cu_q.diff() <= cu_k.diff())).all())
    if valid:
        torch.testing.assert_close(RADIX.varlen_attention(*arguments), reference.varlen_attention(*arguments))
    else:
        with pytest.raises(RuntimeError, match="radix::varlen_attention: "):
            RADIX.varlen_attention(*arguments)


def test_calls_with_mutated_tables():
    """A few of the cases that `make sanitize` runs for longer and under sanitizers."""
    run = run_python(Path(__file__).with_name("fuzz_ops.py"), "--seed", "0", "--cases", "300", "--seconds", "600")
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "300 cases, no findings" in run.stdout
