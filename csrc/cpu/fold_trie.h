// A compressed prefix trie over packed sequences: its edges are spans of tokens, its nodes are compact rows.
#pragma once

#include "../hash.h"
#include "inverse.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace radix {

// The rows that one sequence adds: its last `length` tokens, which become rows first_row, first_row + 1, ...
struct Run {
  int64_t sequence;
  int64_t first_row;
  int64_t length;
};

// Length of the common prefix of two spans of `length` elements. Blocks go through memcmp, which the C library
// vectorises for the machine it runs on.
template <typename T>
inline int64_t common_prefix(const T* a, const T* b, int64_t length) {
  constexpr int64_t kBlock = 64;
  int64_t i = 0;
  while (i + kBlock <= length && std::memcmp(a + i, b + i, kBlock * sizeof(T)) == 0) {
    i += kBlock;
  }
  const int64_t stop = std::min(i + kBlock, length);
  while (i < stop && a[i] == b[i]) {
    ++i;
  }
  return i;
}

// Inserts sequences one after another, in one pass over their tokens. Two tokens share a row exactly when the
// (token, position) paths that lead to them from the start of their sequences are equal: every match is decided by
// comparing tokens and positions themselves; hashes only choose where to look. Where looking takes long under a second
// key as well, the children are sorted instead: N tokens of B sequences take O(N log B), whatever they are.
template <typename Id, typename Position>
class Trie {
 public:
  // `ids` and `positions` must outlive the trie. It will hold at most `max_sequences` non-empty sequences.
  Trie(const Id* ids, const Position* positions, int64_t max_sequences, const HashKey& key = HashKey::draw())
      : ids_(ids), positions_(positions), key_(key) {
    // A sequence adds at most one edge and splits at most one, so the table stays at most half full.
    edges_.reserve(2 * max_sequences);
    int64_t capacity = 8;
    while (capacity < 4 * max_sequences) {
      capacity *= 2;
    }
    slots_.assign(capacity, Slot{});
    slot_mask_ = static_cast<uint64_t>(capacity - 1);
  }

  // Inserts the tokens [begin, end) of the packed arrays and writes the row of each to unfold_index[begin:end].
  void insert(int64_t sequence, int64_t begin, int64_t end, int32_t* unfold_index) {
    int32_t parent = kRoot;
    int64_t at = begin;
    while (at < end) {
      int32_t& child = find_child(parent, at);
      if (child == kEmpty) {
        child = add_edge(parent, at, end);
        add_run(sequence, at, end, unfold_index);
        return;
      }
      const int32_t edge = child;
      const int64_t limit = std::min<int64_t>(edges_[edge].length, end - at);
      const int64_t shared = matching_tokens(edges_[edge].start, at, limit);
      fill_range(unfold_index + at, edges_[edge].first_row, shared);
      at += shared;
      if (at == end) {
        return;
      }
      if (shared < edges_[edge].length) {
        parent = split(child, shared);
      } else if (edges_[edge].is_leaf && edges_[edge].first_row + edges_[edge].length == num_rows_) {
        extend(edge, at - shared, end);
        add_run(sequence, at, end, unfold_index);
        return;
      } else {
        parent = edge;
      }
    }
  }

  int64_t num_rows() const {
    return num_rows_;
  }

  // Writes what the rows hold and the tokens where they first occur; rows behind them, up to num_padded, hold zeros.
  // Sequence s ends at bounds[s + 1].
  void write_rows(
      const int64_t* bounds, int64_t num_padded, Id* out_ids, Position* out_positions, int32_t* out_tokens) const {
    for (const Run& run : runs_) {
      const int64_t first_token = bounds[run.sequence + 1] - run.length;
      std::copy_n(ids_ + first_token, run.length, out_ids + run.first_row);
      std::copy_n(positions_ + first_token, run.length, out_positions + run.first_row);
      fill_range(out_tokens + run.first_row, static_cast<int32_t>(first_token), run.length);
    }
    std::fill(out_ids + num_rows_, out_ids + num_padded, Id{0});
    std::fill(out_positions + num_rows_, out_positions + num_padded, Position{0});
    std::fill(out_tokens + num_rows_, out_tokens + num_padded, 0);
  }

  // The runs in order of rows: together they are all rows, and all sequences that add any.
  const std::vector<Run>& runs() const {
    return runs_;
  }

 private:
  static constexpr int32_t kRoot = -1;
  static constexpr int32_t kEmpty = -1;

  // The span of tokens [start, start + length) of the packed arrays, whose rows stand side by side from first_row.
  struct Edge {
    int64_t start;
    int32_t length;
    int32_t first_row;
    int32_t parent;
    bool is_leaf;
  };

  // One entry of an open-addressing table that maps (parent edge, first token, its position) to a child edge.
  struct Slot {
    int32_t edge = kEmpty;
    uint32_t tag = 0;
  };

  struct Child {
    int32_t edge = kEmpty;
  };

  // How many slots beyond their first look-ups may see in all: kGranted for each, and kSpare for chance to even out. In
  // a table that is half full look-ups that find nothing see 1.5 on average, the others 0.5.
#ifndef RADIX_TEST_HASH_BITS
  static constexpr int64_t kGranted = 16;
  static constexpr int64_t kSpare = 1024;
#else
  static constexpr int64_t kGranted = 1;
  static constexpr int64_t kSpare = 1;
#endif

  // Returns where the child of `parent` for the token at `at` is listed, or the empty place where it belongs. The place
  // is good until the next look-up.
  int32_t& find_child(int32_t parent, int64_t at) {
    if (is_sorted_) {
      return sorted_[{parent, ids_[at], positions_[at]}].edge;
    }
    uint64_t hash = key_.hash(ids_[at], positions_[at], static_cast<uint32_t>(parent));
#ifdef RADIX_TEST_HASH_BITS
    // Lets a test make nearly all hashes collide.
    hash &= (uint64_t{1} << RADIX_TEST_HASH_BITS) - 1;
#endif
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    uint64_t slot = hash & slot_mask_;
    steps_left_ += kGranted;
    while (true) {
      Slot& candidate = slots_[slot];
      if (candidate.edge == kEmpty) {
        candidate.tag = tag;
        return candidate.edge;
      }
      if (candidate.tag == tag) {
        const Edge& edge = edges_[candidate.edge];
        if (edge.parent == parent && ids_[edge.start] == ids_[at] && positions_[edge.start] == positions_[at]) {
          return candidate.edge;
        }
      }
      if (--steps_left_ < 0) [[unlikely]] {
        list_again();
        return find_child(parent, at);
      }
      slot = (slot + 1) & slot_mask_;
    }
  }

  // Lists all children again: first by another key, for which nobody can have chosen tokens, the next time in order.
  void list_again() {
    const std::vector<Slot> listed = std::move(slots_);
    if (has_second_key_) {
      is_sorted_ = true;
    } else {
      has_second_key_ = true;
      key_ = HashKey::draw();
      steps_left_ = kSpare;
      slots_.assign(listed.size(), Slot{});
    }
    for (const Slot& slot : listed) {
      if (slot.edge != kEmpty) {
        find_child(edges_[slot.edge].parent, edges_[slot.edge].start) = slot.edge;
      }
    }
  }

  // Tokens and positions are compared a stretch at a time, so that a long mismatch in one is not read in the other.
  int64_t matching_tokens(int64_t a, int64_t b, int64_t limit) const {
    constexpr int64_t kStretch = 1024;
    int64_t done = 0;
    while (done < limit) {
      const int64_t stretch = std::min(kStretch, limit - done);
      int64_t same = common_prefix(ids_ + a + done, ids_ + b + done, stretch);
      same = common_prefix(positions_ + a + done, positions_ + b + done, same);
      done += same;
      if (same < stretch) {
        break;
      }
    }
    return done;
  }

  int32_t add_edge(int32_t parent, int64_t begin, int64_t end) {
    edges_.push_back(
        Edge{begin, static_cast<int32_t>(end - begin), static_cast<int32_t>(num_rows_), parent, /*is_leaf=*/true});
    if (parent != kRoot) {
      edges_[parent].is_leaf = false;
    }
    return static_cast<int32_t>(edges_.size() - 1);
  }

  // Cuts the edge that is listed at `child` after its first `length` tokens and returns the new upper part. The lower
  // part keeps the edge's number, so the entries of its children stay valid.
  int32_t split(int32_t& child, int64_t length) {
    const int32_t lower = child;
    const int32_t upper = static_cast<int32_t>(edges_.size());
    Edge upper_edge = edges_[lower];
    upper_edge.length = static_cast<int32_t>(length);
    upper_edge.is_leaf = false;
    edges_.push_back(upper_edge);
    Edge& lower_edge = edges_[lower];
    lower_edge.start += length;
    lower_edge.first_row += static_cast<int32_t>(length);
    lower_edge.length -= static_cast<int32_t>(length);
    lower_edge.parent = upper;
    child = upper;
    // No entry has `upper` as its parent yet, so this finds an empty place.
    find_child(upper, lower_edge.start) = lower;
    return upper;
  }

  // A leaf that holds the newest rows grows in place: its tokens are now those of the sequence that walked all of it.
  void extend(int32_t edge, int64_t begin, int64_t end) {
    edges_[edge].start = begin;
    edges_[edge].length = static_cast<int32_t>(end - begin);
  }

  void add_run(int64_t sequence, int64_t begin, int64_t end, int32_t* unfold_index) {
    runs_.push_back(Run{sequence, num_rows_, end - begin});
    fill_range(unfold_index + begin, static_cast<int32_t>(num_rows_), end - begin);
    num_rows_ += end - begin;
  }

  const Id* ids_;
  const Position* positions_;
  HashKey key_;
  std::vector<Edge> edges_;
  std::vector<Slot> slots_;
  uint64_t slot_mask_ = 0;
  int64_t steps_left_ = kSpare;
  bool has_second_key_ = false;
  bool is_sorted_ = false;
  std::map<std::tuple<int32_t, Id, Position>, Child> sorted_;
  std::vector<Run> runs_;
  int64_t num_rows_ = 0;
};

}  // namespace radix
