"""Index tables that another thread rewrites while an op reads them: an error or some answer, never a crash.

`torch.index_select` checks an entry as it reads it; an op that checks a table and then reads it again does not.
"""

from __future__ import annotations

import pytest

from helpers.processes import run_python

PROGRAM = """
import sys, threading, time
import torch
import radix_ops

torch.set_num_threads(1)
RADIX = torch.ops.radix
width = getattr(torch, sys.argv[1])
count, num_rows = 20_000, 500
x, src = torch.randn(num_rows, 16), torch.randn(count, 1)
ids = torch.randint(0, 9, (count,))
index = torch.randint(0, num_rows, (count,)).sort().values
indptr = torch.searchsorted(index, torch.arange(num_rows + 1))
starts = torch.arange(0, count, 10)
lengths = torch.full((len(starts),), 10)
batch = radix_ops.FoldedBatch.from_sequences([[1, i, i] for i in range(3000)])
tables = dict(index=index, indptr=indptr, members=torch.arange(count), starts=starts, lengths=lengths,
              order=torch.arange(len(starts)), shared=lengths // 2, cu_q=batch.cu_seqlens_q, cu_k=batch.cu_seqlens_k,
              kv_index=batch.kv_index)
t = {name: table.to(width).contiguous() for name, table in tables.items()}
calls = {
    "gather": (lambda: RADIX.gather(x, t["index"]), ["index"]),
    "scatter_add": (lambda: RADIX.scatter_add(src, t["index"], num_rows), ["index"]),
    "scatter_add.csr": (
        lambda: RADIX.scatter_add.csr(src, t["index"], t["indptr"], t["members"], num_rows),
        ["index", "indptr", "members"],
    ),
    "trie_order": (
        lambda: RADIX.trie_order(t["cu_q"], t["cu_k"], t["kv_index"], batch.num_rows), ["cu_q", "cu_k", "kv_index"]
    ),
    "lexicographic_order": (lambda: RADIX.lexicographic_order(ids, t["starts"], t["lengths"]), ["starts", "lengths"]),
    "common_prefix_lengths": (
        lambda: RADIX.common_prefix_lengths(ids, t["starts"], t["lengths"], t["order"]), ["starts", "lengths", "order"]
    ),
    "cut_batches": (
        lambda: RADIX.cut_batches(t["lengths"], t["shared"], 100, 100, 100, 100, 1), ["lengths", "shared"]
    ),
}


def rewrite(names, stop):
    good = {name: t[name].clone() for name in names}
    while time.monotonic() < stop:
        for name in names:
            t[name].fill_(2**30)
            t[name].copy_(good[name])


for op, (call, names) in calls.items():
    print(op, flush=True)
    stop = time.monotonic() + float(sys.argv[2])
    thread = threading.Thread(target=rewrite, args=(names, stop))
    thread.start()
    while time.monotonic() < stop:
        try:
            call()
        except RuntimeError as error:
            assert str(error).startswith("radix::"), error
    thread.join()
print("done")
"""


@pytest.mark.parametrize("width", ["int32", "int64"])
def test_tables_that_change_meanwhile_crash_nothing(width):
    run = run_python("-c", PROGRAM, width, "0.8")
    assert run.returncode == 0, f"in {run.stdout.split()[-1]}: exit status {run.returncode}, {run.stderr[-2000:]}"
    assert run.stdout.endswith("done\n")
