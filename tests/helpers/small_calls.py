"""A small right call of each op, whose arguments tests make wrong one by one."""

from __future__ import annotations

import torch

RADIX = torch.ops.radix
IDS, CU = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])
X, INDEX = torch.randn(3, 2), torch.tensor([2, 0])
INDPTR, MEMBERS = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0])
Q, K = torch.randn(3, 4, 8), torch.randn(5, 2, 8)
CU_Q, CU_K = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 5])
CU_ROWS = torch.tensor([0, 1, 2, 3, 4])
CALLS = [
    (RADIX.fold.default, (IDS, IDS, CU)),
    (RADIX.fold_plan.default, (IDS, IDS, CU)),
    (RADIX.fold_batch.default, (IDS, IDS, CU)),
    (RADIX.unpad.default, (MASK,)),
    (RADIX.gather.default, (X, INDEX)),
    (RADIX.gather.csr, (X, INDEX, INDPTR, MEMBERS)),
    (RADIX.gather_kv.default, (X, X, INDEX)),
    (RADIX.gather_kv.csr, (X, X, INDEX, INDPTR, MEMBERS)),
    (RADIX.scatter_add.default, (X[:2], INDEX, 3)),
    (RADIX.scatter_add.csr, (X[:2], INDEX, INDPTR, MEMBERS, 3)),
    (RADIX.scatter_add_kv.default, (X[:2], X[:2], INDEX, 3)),
    (RADIX.scatter_add_kv.csr, (X[:2], X[:2], INDEX, INDPTR, MEMBERS, 3)),
    (RADIX.varlen_attention.default, (Q, K, K, CU_Q, CU_K, 1.0)),
    (RADIX.flash_attention.default, (Q.half(), K.half(), K.half(), CU_Q, CU_K, 3, 2, 3, 1.0)),
    (RADIX.trie_order.default, (CU_Q, CU_K, INDEX, 3)),
    (RADIX.trie_attention.default, (Q, Q[:, :2], Q[:, :2], *[IDS[:3]] * 5, INDEX, CU_Q, 3, 1.0)),
    (RADIX.trie_attention_rows.default, (Q[:2], K, K, INDEX, *[CU_ROWS] * 5, INDEX, CU_Q, 3, 1.0)),
]


def to(device, arguments):
    """Return the arguments on a device; `Tensor.to` would store every element of an expanded tensor."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value[:1].to(device).expand(value.shape) if value.stride() == (0,) else value.to(device)
        return value

    return [move(value) for value in arguments]
