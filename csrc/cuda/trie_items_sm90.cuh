// What the warp groups of the trie kernel for Hopper have in common: the call, its work items, shared memory.
#pragma once

#include "sm90.cuh"

namespace radix::sm90 {

constexpr int kPairs = 128;   // of a number and a query head in a block
constexpr int kKeys = 128;    // of a tile
constexpr int kFewKeys = 64;  // of a last tile that holds no more
constexpr int kStages = 2;
constexpr int kComputing = 2 * kWarpGroup;
constexpr int kTrieThreads = kWarpGroup + kComputing;
constexpr int kLoadingRegisters = 40;
constexpr int kComputingRegisters = 232;

// Names of barriers; 0 is __syncthreads'.
constexpr int kTurn = 1;      // 1 and 2: the turn of each computing warp group to issue its products
constexpr int kOwnGroup = 3;  // 3 and 4: the threads of each

// What calls of the forward and of the backward have in common. Rows and heads of q, k and v stand apart as they do.
struct TrieCall {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* row_of;
  const int32_t* leave;
  const int32_t* depth;
  const int32_t* path;
  const int32_t* kv_index;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides, in elements
  int num_keys;                                         // entries of kv_index
  int num_rows;
  int num_nodes;
  int heads;
  int kv_heads;
  int group;      // query heads of a key/value head
  int members;    // of them in one block
  int parts;      // blocks that hold a group
  int numbers;    // of a block
  int num_items;  // blocks of queries and heads
  int window;
  bool has_maps;  // whether the copy engine takes k and v
};

// out is [num_rows, heads, D], logsumexp [heads, num_rows] in base 2.
struct TrieForward : TrieCall {
  void* out;
  float* logsumexp;
  float factor;  // the scale's absolute value times log2(e), more than 0
  bool is_negative;
};

// Returns a table's row, or the last for what is none.
__device__ inline int row_in(const TrieCall& p, int row) {
  return static_cast<int>(min(static_cast<unsigned>(row), static_cast<unsigned>(p.num_rows - 1)));
}

// A block of queries and its keys: `length` rows of the path to its first number, then its own, `count` in all. Some
// queries see keys from low on, all do from full_low to full, and some do from there.
struct Item {
  int first;
  int head;  // the first
  int kv_head;
  int members;
  int length;
  int path_at;
  int low, full_low, full, count;

  // Where tiles of all keys end; a tile of few keys follows where this is less than count.
  __device__ int whole_end() const {
    return low + (count - low + kKeys - 1 - kFewKeys) / kKeys * kKeys;
  }
  __device__ bool is_masked(int at) const {
    return at < full_low || at >= full;
  }
};

template <typename T, int D>
struct alignas(1024) TrieShared {
  static constexpr int kPieces = D / 64;
  static constexpr int kPieceBytes = 128 * kRowBytes;

  T queries[2][kPieces][kPairs][64];  // then results
  T keys[kStages][kPieces][kKeys][64];
  T values[kStages][kPieces][kKeys][64];
  int leave[kStages][kKeys];
  int key_depth[kStages][kKeys];
  int64_t query_at[2][kPairs];  // the place of a row and head in the results
  int query_row[2][kPairs];
  int query_depth[2][kPairs];
  Item item[2];
  uint64_t queries_full[2], queries_empty[2];
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
};

// The place in a ring of two buffers of what is loaded or computed `count`th, and the parity of that round.
static_assert(kStages == 2);
__device__ inline int place_of(int count) {
  return count & 1;
}
__device__ inline uint32_t parity_of(int count) {
  return count >> 1 & 1;
}

// The arrivals at a barrier of loads: from each warp one, and one of each lane.
constexpr int kArrivals = 33;

// The items of a thread block, by rounds. Items of a round differ in size, and the direction alternates, so that no
// thread block gets the largest of each.
__device__ inline int item_at(int round) {
  const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  return round * gridDim.x + place;
}

}  // namespace radix::sm90
