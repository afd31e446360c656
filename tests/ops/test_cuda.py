"""The ops on CUDA: streams, graphs, copies to the host, asserts, other devices, sizes and times."""

from __future__ import annotations

import time

import pytest
import torch

import radix_ops
from helpers import processes
from helpers.batches import NAMED, pack, to
from helpers.cuda_calls import assert_same, calls, sample_batch, traced, waits
from radix_ops import FoldedBatch

pytestmark = pytest.mark.cuda
RADIX = torch.ops.radix


def test_ops_run_on_the_current_stream():
    """A side stream is busy for long before the arguments are written."""
    batch = sample_batch()
    fold_given = to("cuda", pack(NAMED["nested"]))
    want_plan = RADIX.fold_plan(*fold_given)
    functions = list(calls(batch))
    wanted = [function(src) for _, function, src in functions]
    late = [torch.zeros_like(src) for _, _, src in functions]
    late_ids = torch.zeros_like(fold_given[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, (_, _, src) in zip(late, functions, strict=True):
            x.copy_(src)
        late_ids.copy_(fold_given[0])
        got = [function(x) for x, (_, function, _) in zip(late, functions, strict=True)]
        assert not stream.query()  # nothing waited for the device
        plan = RADIX.fold_plan(late_ids, *fold_given[1:])
    torch.cuda.synchronize()
    for g, w in zip(got, wanted, strict=True):
        assert_same(g, w)
    assert_same(plan, want_plan)


def test_gathers_and_sums_in_a_captured_graph():
    batch = sample_batch(count=40)
    for _, function, src in calls(batch):
        function(src)
        given = torch.zeros_like(src)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = function(given)
        for scale in (1, -2):
            given.copy_(src * scale)
            graph.replay()
            assert_same(got, function(src * scale))


def test_a_gradient_in_a_captured_graph():
    batch = sample_batch()
    x = torch.randn(batch.num_rows, 8, device="cuda", requires_grad=True)
    weight = torch.randn(batch.num_tokens, 8, device="cuda")

    def gradient():
        return torch.autograd.grad((batch.unfold(x).sin() * weight).sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the batch
    with torch.cuda.stream(stream):
        gradient()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradient()
    graph.replay()
    assert torch.equal(got, gradient())


def test_a_fold_in_a_capture_is_refused():
    arguments = to("cuda", pack(NAMED["nested"]))
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for op in (RADIX.fold, RADIX.fold_plan):
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured, but the number of rows must reach"):
                op(*arguments)
        y = x * 2
    graph.replay()
    assert y.tolist() == [2, 2, 2]


@pytest.mark.parametrize("op", ["fold", "fold_plan", "fold_batch"])
def test_a_fold_copies_at_most_64_bytes_to_the_host_once(op, tmp_path):
    ids = torch.randint(0, 1000, (32, 300))
    ids[:, :200] = ids[0, :200]
    arguments = to("cuda", (ids.flatten(), torch.arange(300).repeat(32), torch.arange(33) * 300))
    events = traced(lambda: getattr(RADIX, op)(*arguments), tmp_path / "trace.json")
    copies = [e for e in events if e["cat"] == "gpu_memcpy" and "DtoH" in e["name"]]
    assert len(copies) == 1
    assert copies[0]["args"]["bytes"] <= 64
    assert waits(lambda: getattr(RADIX, op)(*arguments), tmp_path / "trace.json") == 1
    assert not [e for e in events if e["cat"] == "gpu_memcpy" and "HtoD" in e["name"]]


def test_a_batch_is_made_with_one_wait(tmp_path):
    ids = torch.randint(0, 1000, (32, 300))
    ids[:, :200] = ids[0, :200]
    mask = torch.ones_like(ids)
    mask[3, 250:] = mask[5, :7] = 0
    flat, ends, ids_there, mask_there = to("cuda", (ids.flatten(), torch.arange(33) * 300, ids, mask))
    for makes, count in (
        (lambda: radix_ops.fold(flat, ends, pad_multiple_of=8), 1),
        (lambda: radix_ops.pack(flat, ends), 1),
        (lambda: FoldedBatch.from_padded(ids_there, mask_there), 1),
        (lambda: FoldedBatch.from_padded(ids_there, mask_there, ids_there), 1),
        (lambda: FoldedBatch.from_padded(ids, mask, device="cuda"), 0),
        (lambda: FoldedBatch.from_sequences(ids.tolist(), device="cuda"), 0),
        (lambda: FoldedBatch.from_sequences(list(ids_there)), 1),
    ):
        assert waits(makes, tmp_path / "trace.json") == count


def test_a_batch_and_the_plan_of_its_attention_take_few_launches(tmp_path):
    ids = torch.randint(0, 1000, (32, 300), device="cuda")
    ids[:, :200] = ids[0, :200].clone()
    mask = torch.ones_like(ids)
    mask[3, 250:] = 0
    flat, ends = ids.flatten(), torch.arange(33, device="cuda") * 300
    batch = radix_ops.fold(flat, ends)
    for makes, most in (
        (lambda: radix_ops.fold(flat, ends), 2),
        (lambda: FoldedBatch.from_padded(ids, mask), 4),
        (lambda: RADIX.trie_order(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_rows), 1),
    ):
        kernels = [e["name"] for e in traced(makes, tmp_path / "trace.json") if e["cat"] == "kernel"]
        assert 0 < len(kernels) <= most, kernels


def test_gathers_and_sums_copy_nothing_and_wait_for_nothing(tmp_path):
    batch = sample_batch()
    for name, function, src in calls(batch):
        events = traced(lambda function=function, src=src: function(src), tmp_path / "trace.json")
        assert [e for e in events if e["cat"] == "kernel"], name
        assert not [e for e in events if e["cat"] == "gpu_memcpy"], name
        assert waits(lambda function=function, src=src: function(src), tmp_path / "trace.json") == 0, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ops_run_on_the_device_of_their_tensors():
    want = RADIX.fold_plan(*pack(NAMED["nested"]))
    arguments = to("cuda:1", pack(NAMED["nested"]))
    assert torch.cuda.current_device() == 0
    plan = RADIX.fold_plan(*arguments)
    assert {x.device for x in plan[:-1]} == {torch.device("cuda:1")}
    assert_same(plan, want)
    x, index = torch.randn(5, 8), torch.tensor([4, 0, 0])
    got = RADIX.gather(*to("cuda:1", (x, index)))
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), x[index])
    sums = RADIX.scatter_add(got, index.to("cuda:1"), 5)
    assert torch.equal(sums.cpu(), torch.zeros_like(x).index_add_(0, index, x[index]))
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_same(RADIX.fold_plan(*to("cuda:0", pack(NAMED["nested"]))), want)
        assert torch.equal(RADIX.gather(*to("cuda:0", (x, index))).cpu(), x[index])
        assert torch.cuda.current_device() == 1
    with pytest.raises(RuntimeError, match="index is on another device than cuda:1; all tensors must be on one device"):
        RADIX.gather(x.to("cuda:1"), index.to("cuda:0"))


ASSERTS = {
    "index too large": ("R.gather(x, index + 9)", "index out of range"),
    "index negative": ("R.gather(x, index - 3)", "index out of range"),
    "index of an empty row": ("R.gather(x[:, :0], index + 9)", "index out of range"),
    "gather_kv index": ("R.gather_kv(x, x, index + 9)", "index out of range"),
    "gather.csr index": ("R.gather.csr(x, index + 9, indptr, members)", "index out of range"),
    "scatter_add index": ("R.scatter_add(x[:2], index, 2)", "index out of range"),
    "scatter_add int64 index": ("R.scatter_add(x[:2], index - 2**40, 3)", "index out of range"),
    "indptr starts late": ("sums(x[:2], index, indptr + 1, members)", "indptr must"),
    "indptr falls": ("sums(x[:2], index, to([0, 2, 1, 2]), members)", "indptr must not decrease"),
    "indptr ends early": ("sums(x[:2], index, to([0, 1, 1, 1]), members)", "indptr must end at the length of members"),
    "members out of range": ("sums(x[:2], index, indptr, members + 1)", "members out of range"),
    "members of other rows": ("sums(x[:2], index, indptr, members.flip(0))", "not the inverse of index"),
    "member twice": ("sums(x, index[[0, 0, 1]], to([0, 1, 1, 3]), to([2, 0, 0]))", "lists an entry twice"),
    "member twice, apart": ("sums(wide[:4], zeros[:4], to([0, 4, 4, 4]), to([0, 2, 1, 2]))", "lists an entry twice"),
    "member twice in a long row": (
        "sums(wide, zeros, to([0, 300, 300, 300]), to([*range(200), *range(50, 100), *range(250, 300)]))",
        "lists an entry twice",
    ),
    # In int64, the length and the prefix of a run that ends at -2^63 overflow and are positive.
    "trie_order differences overflow": (
        "order(to([0, 4, 5, -(2**63)]), to([0, 4, 6, 4 - 2**64 + 2**63 + 2**63]), to([0, 1, 2, 3, 0, 0, 0, 0, 2]), 5)",
        "cu_seqlens_q must be a fold's",
    ),
    "trie_order int32 end": ("order(to([0, -(2**31), 3]).int(), *paths)", "cu_seqlens_q must be a fold's"),
    "trie_order end past int32": ("order(to([0, 2, 3 + 2**32]), *paths)", "cu_seqlens_q must be a fold's"),
    "trie_order path past int32": ("order(ends, to([0, 2, 4 + 2**32]), *paths[1:])", "cu_seqlens_k must be a fold's"),
    "trie_order ends fall": ("order(to([0, 2, 1]), *paths)", "cu_seqlens_q and cu_seqlens_k must be a fold's"),
    "trie_order parent past int32": ("order(ends, paths[0], to([0, 1, 2**32, 2]), 3)", "kv_index must be a fold's"),
    "trie_order parent of another depth": ("order(ends, paths[0], to([0, 1, 1, 2]), 3)", "kv_index must be a fold's"),
}


@pytest.mark.parametrize("name", ASSERTS)
def test_values_out_of_range_are_device_asserts(name):
    call, message = ASSERTS[name]
    program = f"""
import torch, radix_ops
R = torch.ops.radix
x, index = torch.randn(3, 2).cuda(), torch.tensor([2, 0]).cuda()
indptr, members = torch.tensor([0, 1, 1, 2]).cuda(), torch.tensor([1, 0]).cuda()
wide, zeros = torch.randn(300, 8).cuda(), torch.zeros(300, dtype=torch.int64).cuda()
to = lambda values: torch.tensor(values).cuda()
sums = lambda src, *inverse: R.scatter_add.csr(src, *inverse, 3)
R.gather.csr(x, index, indptr, members), sums(x[:2], index, indptr, members)
sums(wide, zeros, to([0, 300, 300, 300]), torch.arange(300).flip(0).cuda())
order, ends, paths = R.trie_order, to([0, 2, 3]), (to([0, 2, 4]), to([0, 1, 0, 2]), 3)
order(ends, *paths)
torch.cuda.synchronize()
print("sound")
try:
    {call}
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
"""
    run = processes.run_python("-c", program)
    assert run.stdout.startswith("sound\n"), run.stderr
    assert "device-side assert" in run.stdout
    assert message in run.stderr


def test_a_member_order_that_does_not_ascend_is_no_error():
    """Distinct members are right in any order; the slow comparison must not take them for doubles."""
    length = 70
    index = torch.zeros(length, dtype=torch.int64, device="cuda")
    members = torch.randperm(length, device="cuda")
    src = torch.randint(-9, 9, (length, 24), device="cuda").float()
    got = RADIX.scatter_add.csr(src, index, torch.tensor([0, length], device="cuda"), members, 1)
    assert torch.equal(got, src.sum(0, keepdim=True))


def test_members_in_any_order_take_no_longer_than_a_few_passes():
    """Comparing each with all before it would take minutes here."""
    length = 2**20
    src = torch.ones(length, 8, device="cuda")
    index = torch.zeros(length, dtype=torch.int32, device="cuda")
    indptr = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    ascending = torch.arange(length, dtype=torch.int32, device="cuda")
    shuffled = ascending[torch.randperm(length, generator=torch.Generator().manual_seed(0)).cuda()]
    seconds = []
    for members in (ascending, ascending, shuffled):
        torch.cuda.synchronize()
        start = time.perf_counter()
        got = RADIX.scatter_add.csr(src, index, indptr, members, 1)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert (got == length).all()
    assert seconds[2] < 100 * seconds[1]


def test_pairs_of_very_different_widths():
    """One row has more than 2^31 bytes, an odd number of them; the rows beside it have one byte."""
    wide = torch.zeros(2, 2**31 + 2**20 + 1, dtype=torch.uint8, device="cuda")
    wide[1, -1], wide[1, 0] = 3, 5
    narrow = torch.tensor([[7], [9]], dtype=torch.uint8, device="cuda")
    index = torch.tensor([1], device="cuda")
    for k, v in ((wide, narrow), (narrow, wide)):
        for got, want in zip(RADIX.gather_kv(k, v, index), (k, v), strict=True):
            assert torch.equal(got[0], want[1])
        for got, want in zip(RADIX.scatter_add_kv(k, v, torch.tensor([1, 0], device="cuda"), 2), (k, v), strict=True):
            assert torch.equal(got, want.flip(0))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GiB of device memory",
)
def test_fold_of_more_than_2_to_the_28_tokens():
    length = 100_000_000
    base = torch.randint(0, 2**31 - 1, (length,), device="cuda", dtype=torch.int32)
    other = base.clone()
    other[length // 2] += 1
    ids = torch.cat([base, other, base])
    positions = torch.arange(length, device="cuda", dtype=torch.int32).repeat(3)
    cu_seqlens = torch.arange(4, device="cuda") * length
    compact_ids, _, unfold_index, fold_index = RADIX.fold(ids, positions, cu_seqlens)
    assert len(compact_ids) == length + length - length // 2
    assert torch.equal(compact_ids[unfold_index], ids)
    assert torch.equal(unfold_index[:length], unfold_index[2 * length :])
    assert torch.equal(fold_index[:length], torch.arange(length, device="cuda", dtype=torch.int32))
    assert int(fold_index[length]) == length + length // 2
