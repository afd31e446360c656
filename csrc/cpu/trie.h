// A compressed prefix trie over packed sequences: its edges are spans of tokens, its nodes are compact rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "inverse.h"

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
// comparing tokens and positions themselves; hashes only choose where to look.
template <typename Id, typename Position>
class Trie {
 public:
  // `ids` and `positions` must outlive the trie. It will hold at most `max_sequences` non-empty sequences.
  Trie(const Id* ids, const Position* positions, int64_t max_sequences) : ids_(ids), positions_(positions) {
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
      const uint64_t hash = hash_child(parent, at);
      const int64_t slot = find(hash, parent, at);
      if (slots_[slot].edge == kEmpty) {
        add_edge(slot, hash, parent, at, end);
        add_run(sequence, at, end, unfold_index);
        return;
      }
      const int32_t edge = slots_[slot].edge;
      const int64_t limit = std::min<int64_t>(edges_[edge].length, end - at);
      const int64_t shared = matching_tokens(edges_[edge].start, at, limit);
      fill_range(unfold_index + at, edges_[edge].first_row, shared);
      at += shared;
      if (at == end) {
        return;
      }
      if (shared < edges_[edge].length) {
        parent = split(slot, shared);
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

  // In order of rows: together they are all rows, and all sequences that add any.
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

  uint64_t hash_child(int32_t parent, int64_t at) const {
    uint64_t h = static_cast<uint64_t>(ids_[at]) * 0x9e3779b97f4a7c15ull;
    h = (h ^ (h >> 32) ^ static_cast<uint64_t>(positions_[at])) * 0xd6e8feb86659fd93ull;
    h = (h ^ (h >> 32) ^ static_cast<uint32_t>(parent)) * 0xa0761d6478bd642full;
    h ^= h >> 32;
#ifdef RADIX_TEST_HASH_BITS
    // Lets a test make nearly all hashes collide.
    h &= (uint64_t{1} << RADIX_TEST_HASH_BITS) - 1;
#endif
    return h;
  }

  // The slot that holds the child of `parent` for the token at `at`, or the empty slot where it belongs.
  int64_t find(uint64_t hash, int32_t parent, int64_t at) const {
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    for (uint64_t slot = hash & slot_mask_;; slot = (slot + 1) & slot_mask_) {
      const Slot& candidate = slots_[slot];
      if (candidate.edge == kEmpty) {
        return static_cast<int64_t>(slot);
      }
      if (candidate.tag == tag) {
        const Edge& edge = edges_[candidate.edge];
        if (edge.parent == parent && ids_[edge.start] == ids_[at] && positions_[edge.start] == positions_[at]) {
          return static_cast<int64_t>(slot);
        }
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

  void add_edge(int64_t slot, uint64_t hash, int32_t parent, int64_t begin, int64_t end) {
    slots_[slot] = Slot{static_cast<int32_t>(edges_.size()), static_cast<uint32_t>(hash >> 32)};
    edges_.push_back(
        Edge{begin, static_cast<int32_t>(end - begin), static_cast<int32_t>(num_rows_), parent, /*is_leaf=*/true});
    if (parent != kRoot) {
      edges_[parent].is_leaf = false;
    }
  }

  // Cuts the edge in `slot` after its first `length` tokens and returns the new upper part. The lower part keeps the
  // edge's number, so the entries of its children stay valid.
  int32_t split(int64_t slot, int64_t length) {
    const int32_t lower = slots_[slot].edge;
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
    slots_[slot].edge = upper;
    const uint64_t hash = hash_child(upper, lower_edge.start);
    // No entry has `upper` as its parent yet, so this finds an empty slot.
    slots_[find(hash, upper, lower_edge.start)] = Slot{lower, static_cast<uint32_t>(hash >> 32)};
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
  std::vector<Edge> edges_;
  std::vector<Slot> slots_;
  uint64_t slot_mask_ = 0;
  std::vector<Run> runs_;
  int64_t num_rows_ = 0;
};

}  // namespace radix
