// How the warps that load find a block of queries and its keys.
#pragma once

#include "trie_items_sm90.cuh"

#include <climits>

namespace radix::sm90 {

constexpr int kNumbersOfLane = kPairs / 32;

// The first number of an item's block; num_nodes behind the last item.
__device__ inline int first_of(const TrieCall& p, int at) {
  // The blocks of the largest numbers, which most often lie deepest, come first.
  return at < p.num_items ? (p.num_items - 1 - at) / (p.kv_heads * p.parts) * p.numbers : p.num_nodes;
}

template <bool kWindowed>
struct Finder {
  const TrieCall& p;
  int lane;

  // What items are found by, of each lane's numbers of a block: rows, for an item two rounds on, and depths, for the
  // next round's. All is loaded a round before it is used, so that nothing here waits for memory.
  int rows[kNumbersOfLane];
  int depths[kNumbersOfLane];
  int first_path;

  __device__ void load_rows(int first) {
#pragma unroll
    for (int i = 0; i < kNumbersOfLane; ++i) {
      const int number = lane + 32 * i;
      rows[i] = number < p.numbers && first + number < p.num_nodes ? p.row_of[first + number] : 0;
    }
  }

  __device__ void load_depths() {
#pragma unroll
    for (int i = 0; i < kNumbersOfLane; ++i) {
      depths[i] = p.depth[row_in(p, rows[i])];
    }
    first_path = p.path[row_in(p, rows[0])];
  }

  __device__ Item find(int at) const {
    Item item{};
    item.first = first_of(p, at);
    const int program = at % (p.kv_heads * p.parts);
    item.kv_head = program / p.parts;
    const int member = program % p.parts * p.members;
    item.head = item.kv_head * p.group + member;
    item.members = min(p.members, p.group - member);
    if (item.first >= p.num_nodes) {
      return item;
    }
    const int own = min(p.numbers, p.num_nodes - item.first);
    int shallowest = INT_MAX, deepest = 0;
#pragma unroll
    for (int i = 0; i < kNumbersOfLane; ++i) {
      if (lane + 32 * i < own) {
        shallowest = min(shallowest, depths[i]);
        deepest = max(deepest, depths[i]);
      }
    }
    shallowest = __reduce_min_sync(~0u, shallowest);
    // The rows of a path have lower numbers, and lie within kv_index.
    item.length = max(min(__shfl_sync(~0u, depths[0], 0), min(item.first, p.num_keys)), 0);
    item.path_at = max(min(__shfl_sync(~0u, first_path, 0), p.num_keys - item.length), 0);
    item.count = item.length + own;
    const int seen_by_all = max(min(shallowest, item.length), 0);
    item.full = seen_by_all / kKeys * kKeys;
    if (kWindowed) {
      deepest = max(min(__reduce_max_sync(~0u, deepest), p.num_nodes), 0);
      item.low = max(seen_by_all + 1 - p.window, 0) / kKeys * kKeys;
      item.full_low = (max(deepest + 1 - p.window, 0) + kKeys - 1) / kKeys * kKeys;
      item.full_low = max(min(item.full_low, item.full), item.low);
    }
    return item;
  }

  // What the tables say is the row of a key of an item; any number behind the last.
  __device__ int load_key_row(const Item& item, int key) const {
    if (key >= item.count) {
      return 0;
    }
    return key < item.length ? p.kv_index[item.path_at + key] : p.row_of[item.first + key - item.length];
  }
};

}  // namespace radix::sm90
