"""How many graphs are kept, and which go."""

from __future__ import annotations

from radix_ops.graphs import shelf
from radix_ops.graphs.shelf import Shelf


def call(graphs, key):
    """Do what a call does; return whether it replays."""
    if graphs.take(key) is not None:
        return True
    if graphs.is_due(key):
        graphs.put(key, f"graph of {key}")
    return False


def test_the_second_call_of_a_kind_makes_a_graph_and_the_third_has_it():
    graphs = Shelf()
    assert [call(graphs, "a") for _ in range(4)] == [False, False, True, True]
    assert graphs.take("a") == "graph of a"


def test_the_least_recently_used_graph_goes_once_it_is_out_of_use():
    graphs = Shelf()
    for key in range(shelf._MOST_GRAPHS):
        call(graphs, key), call(graphs, key)
    for _ in range(shelf._IN_USE):
        for key in (1, 2):
            assert call(graphs, key)
    call(graphs, "new"), call(graphs, "new")
    assert "new" in graphs
    assert 0 not in graphs
    assert 1 in graphs
    assert len(graphs) == shelf._MOST_GRAPHS


def test_kinds_that_take_turns_do_not_push_each_other_out():
    """Were the oldest graph given up each time, none would ever be replayed."""
    graphs = Shelf()
    keys = range(2 * shelf._MOST_GRAPHS)
    replays = [sum(call(graphs, key) for key in keys) for _ in range(6)]
    assert replays == [0, 0, *[shelf._MOST_GRAPHS] * 4]


def test_what_was_refused_is_never_due():
    graphs = Shelf()
    graphs.refuse("a")
    assert not any(call(graphs, "a") for _ in range(4))


def test_what_it_remembers_is_bounded():
    graphs = Shelf()
    for key in range(10 * shelf._MOST_SEEN):
        call(graphs, key)
    assert len(graphs._seen) <= shelf._MOST_SEEN
    assert len(graphs) == 0
