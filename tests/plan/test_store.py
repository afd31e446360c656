"""TokenStore gives back its sequences after full disks and forks, and those of every kind of integer."""

import os
import resource
import signal

import numpy as np
import pytest
import torch

from helpers import processes
from radix_ops import FoldedBatch
from radix_ops.plan import TokenStore, plan_folded

LONG = 3000  # tokens: two such sequences are more than waits in memory
KINDS = [np.dtype(order + kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8") for order in "<>"]


def store_on_disk(count):
    store = TokenStore(max_memory=0)
    for value in range(count):
        store.append([value] * LONG)
    return store


def check_values(store, values):
    assert [(len(ids), set(ids.tolist())) for ids in map(store.__getitem__, range(len(store)))] == [
        (LONG, {value}) for value in values
    ]


@pytest.fixture
def disk_with_room():
    """Return a function that leaves so many bytes of room behind a file of that size."""
    old_limits, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def leave(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (old_limits[0] if size is None else size, old_limits[1]))

    yield leave
    leave(None)
    signal.signal(signal.SIGXFSZ, old_handler)


@pytest.mark.parametrize("room", [0, 1, 5000, 12_000])
@pytest.mark.parametrize("looks", [False, True])
def test_appends_that_fail_on_a_full_disk_leave_the_store_as_it_was(disk_with_room, room, looks):
    store = store_on_disk(5)
    if looks:
        assert len(store.input_ids) == store.num_tokens
    disk_with_room(4 * LONG * 4 + room)
    held, failures = list(range(5)), 0
    for value in range(100, 104):
        try:
            store.append([value] * LONG)
            held.append(value)
        except OSError:
            failures += 1
    assert failures
    assert len(store) == len(held)
    disk_with_room(None)
    store.append([200] * LONG)
    check_values(store, [*held, 200])


@pytest.mark.parametrize("count", [0, 2, 5])
def test_parent_and_child_of_a_fork_append_to_stores_of_their_own(count):
    store = store_on_disk(count)
    store.append([7] * 5000)  # longer than what waits, so that there is a file in any case
    before = store[count].copy()
    (child_reads, child_writes), (parent_reads, parent_writes) = os.pipe(), os.pipe()

    def work():
        for value in range(100, 105):
            store.append([value] * LONG)
        assert len(store.input_ids) == store.num_tokens
        os.write(child_writes, b"x")  # the parent appends between this process's writing and its reading
        os.read(parent_reads, 1)
        assert set(store[count].tolist()) == {7}
        for index in range(5):
            assert set(store[count + 1 + index].tolist()) == {100 + index}

    child = processes.in_a_fork(work)
    os.close(child_writes)  # so that the next line ends where the child has failed
    os.read(child_reads, 1)
    for value in range(200, 206):
        store.append([value] * LONG)
    assert len(store.input_ids) == store.num_tokens
    os.write(parent_writes, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert store[count].tolist() == before.tolist()
    assert [set(store[count + 1 + index].tolist()) for index in range(6)] == [{value} for value in range(200, 206)]
    for end in (child_reads, parent_reads, parent_writes):
        os.close(end)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integers_of_every_kind_are_taken_by_value(kind):
    largest = min(2**31 - 1, int(np.iinfo(kind).max))
    values = [0, 1, 5, largest]
    array = np.array(values, kind)
    frozen, strided, unaligned = array.copy(), np.repeat(array, 3)[::3], np.zeros(1, [("a", "u1"), ("b", kind, 4)])["b"]
    frozen.flags.writeable = False
    unaligned[0] = array
    store = TokenStore.from_sequences([array, frozen, strided, unaligned[0]])
    packed = TokenStore.from_packed(array, np.array([0, 4], kind))
    assert [ids.tolist() for ids in map(store.__getitem__, range(4))] == [values] * 4
    assert packed[0].tolist() == values
    wrong = [-1, -128] if kind.kind == "i" else []
    wrong += [2**31, 2**32 - 1] if np.iinfo(kind).max > 2**31 else []
    wrong += [5 << 32, 2**62] if kind.itemsize == 8 else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"must hold token ids from 0 to 2147483647, got .*{value}"):
            store.append(np.array([3, value, 3], kind))
    assert len(store) == 4


@pytest.mark.parametrize(
    "ids",
    [
        [np.uint64(3), 1],
        (1, np.uint64(2**31 - 1), np.int8(4)),
        [torch.tensor(3), 1],
        np.array([np.uint64(3), 1], object),
        [np.int64(3)],
    ],
    ids=repr,
)
def test_integers_of_several_kinds_are_taken_as_fold_takes_them(ids):
    want = [int(x) for x in ids]
    assert TokenStore.from_sequences([ids])[0].tolist() == want
    assert FoldedBatch.from_sequences([ids]).input_ids.tolist() == want


def test_integers_beyond_64_bits_are_refused_as_others_are():
    for value in (2**63, 2**64, -(2**64)):
        with pytest.raises(ValueError, match=f"sequence 0 must hold token ids from 0 to 2147483647, got .*{value}"):
            TokenStore.from_sequences([[1, value]])
    masked = np.ma.masked_array([1, 2], [False, True])
    for wrong in (
        [True, 2**64],
        [1, True],
        (np.True_, 1),
        [1, torch.tensor(True)],
        [True],
        [0.5, 2**64],
        [1, 2.0],
        ["a"],
        [None],
        masked,
    ):
        with pytest.raises(TypeError, match="sequence 0 must hold integers, got "):
            TokenStore.from_sequences([wrong])


def test_ends_of_packed_sequences_are_integers():
    for ends in ([0.0, 2.0], [0, 2.5], ["0", "2"]):
        with pytest.raises(TypeError, match="cu_seqlens must hold integers, got "):
            TokenStore.from_packed([1, 2], ends)
    for ends in (np.array([0, 2**64 - 1, 2], np.uint64), np.array([0, 2**63, 2], np.uint64)):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, not decrease and end at the 2 tokens"):
            TokenStore.from_packed([1, 2], ends)
    assert TokenStore.from_packed(torch.tensor([1, 2]), torch.tensor([0, 1, 2]))[1].tolist() == [2]


def test_a_plan_of_big_endian_ids_is_that_of_their_values():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 300, 20) for _ in range(50)]
    swapped = TokenStore.from_sequences(ids.astype(">i8") for ids in sequences)
    found, expected = (plan_folded(s, max_rows=90) for s in (swapped, TokenStore.from_sequences(sequences)))
    assert found.order.tolist() == expected.order.tolist()
