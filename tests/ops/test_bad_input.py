"""Each malformed argument of each op: one sentence that names the argument, what it holds and what is allowed."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.small_calls import CU, CU_K, CU_Q, IDS, INDEX, INDPTR, MEMBERS, K, Q, X, to
from radix_ops.ops import flash, trie  # the package registers torch.ops.radix

RADIX = torch.ops.radix
# One number of storage seen as too many tokens or sequences: nothing of it may be read.
HUGE = torch.zeros(1, dtype=torch.int64).expand(2**31)
MANY = torch.zeros(1, dtype=torch.int64).expand(2**31 + 1)


@pytest.mark.parametrize("op", ["fold", "fold_plan", "fold_batch"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS[None], IDS, CU), "input_ids must have 1 dimension, got shape [1, 4]"),
        ((IDS, IDS[0], CU), "position_ids must have 1 dimension, got shape []"),
        ((IDS, IDS, CU[:, None]), "cu_seqlens must have 1 dimension, got shape [3, 1]"),
        ((IDS.float(), IDS, CU), "input_ids must be int32 or int64, got Float"),
        ((IDS, IDS.short(), CU), "position_ids must be int32 or int64, got Short"),
        ((IDS, IDS, CU.bool()), "cu_seqlens must be int32 or int64, got Bool"),
        ((IDS, IDS[1:], CU), "position_ids must be as long as input_ids, got 3 positions for 4 tokens"),
        ((HUGE, HUGE, CU), "input_ids holds 2147483648 tokens; at most 2147483647 are allowed"),
        ((IDS, IDS, CU[:0]), "cu_seqlens is empty; it must hold 0 and then the end of each sequence"),
        (
            (IDS, IDS, MANY),
            "cu_seqlens holds 2147483648 sequences; at most 2147483647 are allowed",
        ),
        ((IDS, IDS, CU + 1), "cu_seqlens must start at 0, got 1"),
        ((IDS, IDS, torch.tensor([-1, 4])), "cu_seqlens must start at 0, got -1"),
        ((IDS, IDS, torch.tensor([0, 3, 2, 4])), "cu_seqlens must not decrease, got 3 and then 2 at index 2"),
        ((IDS, IDS, torch.tensor([0, 99, 4])), "cu_seqlens must not decrease, got 99 and then 4 at index 2"),
        ((IDS, IDS, CU[:-1]), "cu_seqlens must end at the number of tokens, 4, got 2"),
        (
            (IDS, IDS, torch.tensor([0, 2**62])),
            "cu_seqlens must end at the number of tokens, 4, got 4611686018427387904",
        ),
        ((IDS, IDS, CU, 0), "pad_multiple_of must be from 1 to 2147483647, got 0"),
        ((IDS, IDS, CU, -8), "pad_multiple_of must be from 1 to 2147483647, got -8"),
        ((IDS, IDS, CU, 2**31), "pad_multiple_of must be from 1 to 2147483647, got 2147483648"),
    ],
)
def test_fold_refuses(op, arguments, message, device):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::{op}: {message}')}$"):
        getattr(RADIX, op)(*to(device, arguments))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (CU - 2, "cu_seqlens must start at 0, got -2"),
        (torch.tensor([0, 3, 2]), "cu_seqlens must not decrease, got 3 and then 2 at index 2"),
        (torch.tensor([0, 5]), "cu_seqlens must end at most at the number of tokens, 4, got 5"),
        (torch.tensor([5]), "cu_seqlens must start at 0, got 5"),
    ],
)
def test_the_fold_of_the_tokens_in_front_refuses(cu_seqlens, message, device):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::fold_batch: {message}')}$"):
        RADIX.fold_batch(*to(device, (IDS, IDS, cu_seqlens)), front=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (IDS, "attention_mask must have 2 dimensions, got shape [4]"),
        (IDS[None].float(), "attention_mask must be bool, int32 or int64, got Float"),
        (IDS[None].to(torch.uint8), "attention_mask must be bool, int32 or int64, got Byte"),
        (HUGE[None], "attention_mask holds 2147483648 values in 1 rows; at most 2147483647 are allowed"),
        (HUGE[:, None][:, :0], "attention_mask holds 0 values in 2147483648 rows; at most 2147483647 are allowed"),
    ],
)
def test_unpad_refuses(mask, message, device):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::unpad: {message}')}$"):
        RADIX.unpad(*to(device, (mask,)))


GATHER_SHAPES = [
    (torch.tensor(1.0), INDEX, "x must have at least 1 dimension, got a scalar"),
    (X.view(3, 2, *[1] * 63), INDEX, "x must have at most 64 dimensions, got 65"),
    (X, INDEX[None], "index must have 1 dimension, got shape [1, 2]"),
    (X, INDEX[0], "index must have 1 dimension, got shape []"),
    (X, INDEX.float(), "index must be int32 or int64, got Float"),
    (X, INDEX.to(torch.uint8), "index must be int32 or int64, got Byte"),
]
GATHER_VALUES = [
    (X, INDEX + 1, "index[0] is 3, out of range for 3 rows (allowed: 0 to 2)"),
    (X, INDEX.int() - 1, "index[1] is -1, out of range for 3 rows (allowed: 0 to 2)"),
    (X, INDEX - 2**62, "index[0] is -4611686018427387902, out of range for 3 rows (allowed: 0 to 2)"),
    (X[:0], INDEX, "index[0] is 2, but there are no rows to index"),
    (X[:, :0], INDEX + 9, "index[0] is 11, out of range for 3 rows (allowed: 0 to 2)"),
]


@pytest.mark.parametrize(("x", "index", "message"), GATHER_SHAPES + GATHER_VALUES)
def test_gather_refuses(x, index, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::gather: {message}')}$"):
        RADIX.gather(x, index)


SCATTER_ADD_SHAPES = [
    (torch.tensor(1.0), INDEX, 3, "src must have at least 1 dimension, got a scalar"),
    (X[:2].view(2, 2, *[1] * 63), INDEX, 3, "src must have at most 64 dimensions, got 65"),
    (X[:2], INDEX[None], 3, "index must have 1 dimension, got shape [1, 2]"),
    (X[:2], INDEX.half(), 3, "index must be int32 or int64, got Half"),
    (X, INDEX, 3, "index must hold one entry for each row of src, got 2 entries for 3 rows"),
    (X[:2], INDEX, -1, "num_rows must be from 0 to 2147483647, got -1"),
    (X[:2, :0], INDEX, 2**62, "num_rows must be from 0 to 2147483647, got 4611686018427387904"),
    (
        X[:2].bool(),
        INDEX,
        3,
        "src must be float64, float32, float16, bfloat16 or an integer of 8 to 64 bits, got Bool",
    ),
]
SCATTER_ADD_VALUES = [
    (X[:2], INDEX, 2, "index[0] is 2, out of range for 2 rows (num_rows) (allowed: 0 to 1)"),
    (X[:2], INDEX, 0, "index[0] is 2, but there are no rows (num_rows) to index"),
    (X[:2], INDEX - 1, 3, "index[1] is -1, out of range for 3 rows (num_rows) (allowed: 0 to 2)"),
]


@pytest.mark.parametrize(("src", "index", "num_rows", "message"), SCATTER_ADD_SHAPES + SCATTER_ADD_VALUES)
def test_scatter_add_refuses(src, index, num_rows, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::scatter_add: {message}')}$"):
        RADIX.scatter_add(src, index, num_rows)


PAIRS = [
    ((X, X[:2]), "must have equally many rows, got 3 and 2"),
    ((X, X.double()), "must have one dtype, got Float and Double"),
    ((X, torch.tensor(1.0)), "must have at least 1 dimension, got a scalar"),
]


@pytest.mark.parametrize(("pair", "message"), PAIRS)
@pytest.mark.parametrize("op", ["gather_kv", "scatter_add_kv"])
def test_pairs_are_refused(op, pair, message, device):
    rest = (INDEX,) if op == "gather_kv" else (torch.tensor([0, 1, 1]), 3)
    inverse = (INDPTR, MEMBERS)
    k, v = ("k", "v") if op == "gather_kv" else ("src_k", "src_v")
    named = f"{v} {message}" if "scalar" in message else f"{k} and {v} {message}"
    for overload, arguments in (("default", rest), ("csr", (rest[0], *inverse, *rest[1:]))):
        name = op if overload == "default" else f"{op}.csr"
        with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::{name}: {named}')}$"):
            getattr(getattr(RADIX, op), overload)(*to(device, (*pair, *arguments)))


@pytest.mark.parametrize(("x", "index", "message"), [case for case in GATHER_SHAPES if case[0].dim()])
def test_gather_kv_refuses(x, index, message, device):
    message = re.sub("^x must", "k must", message)
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::gather_kv: {message}')}$"):
        RADIX.gather_kv(*to(device, (x, x, index)))


@pytest.mark.cuda
@pytest.mark.parametrize(("x", "index", "message"), GATHER_SHAPES)
def test_gather_on_cuda_refuses(x, index, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::gather: {message}')}$"):
        RADIX.gather(*to("cuda", (x, index)))


@pytest.mark.cuda
@pytest.mark.parametrize(("src", "index", "num_rows", "message"), SCATTER_ADD_SHAPES)
def test_scatter_add_on_cuda_refuses(src, index, num_rows, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::scatter_add: {message}')}$"):
        RADIX.scatter_add(*to("cuda", (src, index, num_rows)))


@pytest.mark.cuda
def test_no_rows_on_cuda_are_refused_before_the_kernel():
    x, index = X.cuda(), INDEX.cuda()
    with pytest.raises(RuntimeError, match="radix::gather: index holds 2 entries, but there are no rows to index"):
        RADIX.gather(x[:0], index)
    message = re.escape("radix::scatter_add: index holds 2 entries, but there are no rows (num_rows) to index")
    with pytest.raises(RuntimeError, match=message):
        RADIX.scatter_add(x[:2], index, 0)


SHAPES = [
    (INDPTR[None], MEMBERS, "indptr must have 1 dimension, got shape [1, 4]"),
    (INDPTR, MEMBERS[0], "members must have 1 dimension, got shape []"),
    (INDPTR.float(), MEMBERS, "indptr must be int32 or int64, got Float"),
    (INDPTR, MEMBERS.short(), "members must be int32 or int64, got Short"),
    (INDPTR[1:], MEMBERS, "indptr must hold one entry more than there are rows, got 3 entries for 3 rows"),
    (INDPTR[:0], MEMBERS, "indptr must hold one entry more than there are rows, got 0 entries for 3 rows"),
    (INDPTR, MEMBERS[1:], "members must be as long as index, got 1 members for 2 entries of index"),
]
VALUES = [
    (INDPTR + 1, MEMBERS, "indptr must start at 0, got 1"),
    (torch.tensor([0, 2, 1, 2]), MEMBERS, "indptr must not decrease, got 2 and then 1 at index 2"),
    (torch.tensor([0, 99, 99, 99]), MEMBERS, "indptr must end at the length of members, 2, got 99"),
    (torch.tensor([0, 1, 1, 1]), MEMBERS, "indptr must end at the length of members, 2, got 1"),
    (INDPTR, MEMBERS + 1, "members[0] is 2, out of range for 2 entries of index (allowed: 0 to 1)"),
    (INDPTR, MEMBERS - 1, "members[1] is -1, out of range for 2 entries of index (allowed: 0 to 1)"),
    (
        INDPTR,
        MEMBERS.flip(0),
        "indptr and members are not the inverse of index: "
        "members[0] is 0 under row 0, but index holds another row there",
    ),
]


@pytest.mark.parametrize(("indptr", "members", "message"), SHAPES + VALUES)
def test_scatter_add_csr_refuses(indptr, members, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::scatter_add.csr: {message}')}$"):
        RADIX.scatter_add.csr(X[:2], INDEX, indptr, members, 3)


def test_scatter_add_csr_refuses_a_member_listed_twice():
    with pytest.raises(RuntimeError, match=re.escape("members[1] is 0 under row 1, listed twice")):
        RADIX.scatter_add.csr(X, torch.tensor([1, 1, 0]), torch.tensor([0, 0, 3]), torch.tensor([0, 0, 1]), 2)


@pytest.mark.parametrize(("indptr", "members", "message"), SHAPES)
def test_gather_csr_refuses(indptr, members, message, device):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::gather.csr: {message}')}$"):
        RADIX.gather.csr(*to(device, (X, INDEX, indptr, members)))


@pytest.mark.cuda
@pytest.mark.parametrize(("indptr", "members", "message"), SHAPES)
def test_scatter_add_csr_on_cuda_refuses(indptr, members, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::scatter_add.csr: {message}')}$"):
        RADIX.scatter_add.csr(*to("cuda", (X[:2], INDEX, indptr, members, 3)))


@pytest.mark.parametrize(("indptr", "members", "message"), VALUES)
def test_the_backward_of_gather_csr_refuses_a_wrong_inverse(indptr, members, message):
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        RADIX.gather.csr(x, INDEX, indptr, members).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], K, K, CU_Q, CU_K, 1.0), "q must have shape [rows, heads, head_dim], got [4, 8]"),
        ((Q.long(), K, K, CU_Q, CU_K, 1.0), "q must be float32, float64, bfloat16 or float16, got torch.int64"),
        (
            (Q, K.double(), K, CU_Q, CU_K, 1.0),
            "q, k and v must have one dtype, got torch.float32 for q and torch.float64 for k",
        ),
        ((Q, K, K[1:], CU_Q, CU_K, 1.0), "k and v must have equal rows and heads, got [5, 2, 8] and [4, 2, 8]"),
        ((Q[:, :, 1:], K, K, CU_Q, CU_K, 1.0), "q and k must have one head_dim, got 7 and 8"),
        ((Q[:, :3], K, K, CU_Q, CU_K, 1.0), "the 3 heads of q must be a multiple of the 2 heads of k and v"),
        (
            (Q[:, :0], K, K, CU_Q, CU_K, 1.0),
            "q must have at least one head and a head_dim of at least 1, got [3, 0, 8]",
        ),
        ((Q, K, K, CU_Q, CU_K, 1.0, -1), "sliding_window must be at least 0 (0: none), got -1"),
        (
            (Q, K, K, CU_Q[:0], CU_K[:0], 1.0),
            "cu_seqlens_q and cu_seqlens_k must be equally long and start at 0, got [] and []",
        ),
        (
            (Q, K, K, CU_Q, CU_K[1:], 1.0),
            "cu_seqlens_q and cu_seqlens_k must be equally long and start at 0, got [0, 1, 3] and [2, 5]",
        ),
        ((Q, K, K, CU_Q.flip(0) - 3, CU_K, 1.0), "run 0 has -2 queries and 2 keys; 0 <= queries <= keys is needed"),
        (
            (Q, K, K, torch.tensor([0, 3, 3]), CU_K, 1.0),
            "run 0 has 3 queries and 2 keys; 0 <= queries <= keys is needed",
        ),
        ((Q[:2], K, K, CU_Q, CU_K, 1.0), "cu_seqlens_q ends at 3, past the 2 rows of q"),
        ((Q, K, K, CU_Q, torch.tensor([0, 2, 6]), 1.0), "cu_seqlens_k must end at the 5 rows of k, got 6"),
        ((Q, K, K, CU_Q, CU_K[None], 1.0), "cu_seqlens_k must have 1 dimension, got shape [1, 3]"),
        ((Q, K, K, CU_Q.float(), CU_K, 1.0), "cu_seqlens_q must be int32 or int64, got torch.float32"),
    ],
)
def test_varlen_attention_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::varlen_attention: {message}')}$"):
        RADIX.varlen_attention(*arguments)


@pytest.mark.parametrize(
    "grad_out", [torch.ones(3, 4, 7), torch.ones(2, 4, 8), torch.ones(3, 4, 8).to(torch.complex64)]
)
def test_the_backward_of_varlen_attention_refuses_another_gradient(grad_out):
    message = f"grad_out must be torch.float32 of shape [3, 4, 8], got {grad_out.dtype} of {list(grad_out.shape)}"
    with pytest.raises(RuntimeError, match=f"^radix::varlen_attention: {re.escape(message)}$"):
        RADIX.varlen_attention_backward(grad_out, Q, K, K, CU_Q, CU_K, 1.0)


@pytest.mark.parametrize("attention", ["trie", "flash"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_out", torch.ones(3, 4, 7).bfloat16()),
        ("out", torch.ones(2, 4, 8).bfloat16()),
        ("out", torch.ones(3, 4, 8)),
        ("logsumexp", torch.ones(4, 2)),
        ("logsumexp", torch.ones(4, 3).bfloat16()),
    ],
)
def test_the_backward_on_cuda_refuses_what_no_forward_returned(attention, name, value):
    """The kernels read as many rows and heads of these as q has."""
    q, k = Q.bfloat16(), K[:3].bfloat16()
    out = torch.ones(3, 4, 8).bfloat16()
    saved = {"grad_out": out, "q": q, "k": k, "v": k, "out": out, "logsumexp": torch.ones(4, 3), name: value}
    message = re.escape(f"{name} must be ") + ".*" + re.escape(f", got {value.dtype} of {list(value.shape)}")
    tables = [torch.zeros(3, dtype=torch.int32)] * 6
    call, *others = {
        "trie": (trie.trie_attention_backward, *tables, CU_Q, 3, 1.0),
        "flash": (flash.flash_attention_backward, CU_Q, CU_K, 3, 2, 3, 1.0),
    }[attention]
    with pytest.raises(RuntimeError, match=message):
        call(*saved.values(), *others)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((4, 2, 3), "num_queries must be from 0 to the 3 rows of q, got 4"),
        ((-1, 2, 3), "num_queries must be from 0 to the 3 rows of q, got -1"),
        ((3, -2, 3), "max_seqlen_q must be from 0 to 2^31 - 1, got -2"),
        ((3, 2, 2**31), "max_seqlen_k must be from 0 to 2^31 - 1, got 2147483648"),
    ],
)
def test_flash_attention_refuses_counts(counts, message):
    q, k = Q.bfloat16(), K.bfloat16()
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'radix::flash_attention: {message}')}$"):
        flash.flash_attention(q, k, k, CU_Q, CU_K, *counts, 1.0)
