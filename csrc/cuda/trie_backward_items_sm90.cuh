// What the warp groups of the trie backward kernels for Hopper have in common: the call, its work items, shared memory.
#pragma once

#include "trie_items_sm90.cuh"

namespace radix::sm90 {

constexpr int kHeads = 128;      // head_dim
constexpr int kQueries = 64;     // pairs of a tile that gradients of keys are summed over
constexpr int kBlockKeys = 128;  // whose gradients are summed at once

// The name of the barrier at which the warps that load meet between items.
constexpr int kLoading = 1;

// A call. grad_out, grad_q, grad_k and grad_v are contiguous, as are means, [heads, num_rows] like logsumexp.
struct TrieBackward : TrieCall {
  const void* out;
  const void* grad_out;
  const float* logsumexp;
  float* means;  // of grad_out * value under each query's weights
  void* grad_q;
  void* grad_k;
  void* grad_v;
  int* taken;         // [2] of items, beyond the first of each thread block: blocks of keys, blocks of queries
  int num_key_items;  // blocks of keys and heads
  float scale;
  float factor;  // the scale times log2(e)
  bool has_query_maps;
};

struct TrieMaps {
  CUtensorMap q, grad_out, k, v;
};

// A block of keys, and the pairs of a number and a query head of the group that see some of them: from begin to end.
// Those from full_begin to full_end see all. Pairs behind ends[i] see none of the keys of computing warp group i.
struct KeyItem {
  int first;  // number
  int kv_head;
  int begin, full_begin, full_end, end;
  int ends[2];

  __device__ bool is_masked(int at) const {
    return at < full_begin || at >= full_end;
  }
};

// Two matrices of 128 rows are held while tiles of two others pass by: keys and values while queries and gradients do,
// or the other way round.
template <typename T, bool kOfKeys>
struct alignas(1024) BackwardShared {
  static constexpr int kTile = kOfKeys ? kQueries : kKeys;
  static constexpr int kStages = kOfKeys ? 4 : 2;
  static constexpr int kHeldPieceBytes = 128 * kRowBytes;
  static constexpr int kPieceBytes = kTile * kRowBytes;

  T held[2][kHeads / 64][128][64];
  T passing[kStages][2][kHeads / 64][kTile][64];
  // Of pairs that pass by: logsumexp, means, and the number.
  float sums[kStages][kTile];
  float means[kStages][kTile];
  int number[kStages][kTile];
  int leave[kStages][kTile];  // of keys that do
  // By item, of each row held: where its gradient goes, -1 for nowhere; a key's leave; a pair's logsumexp and mean.
  int held_row[2][128];
  int held_leave[2][128];
  float held_sums[2][128];
  float held_means[2][128];
  std::conditional_t<kOfKeys, KeyItem, Item> item[2];
  int is_end[2];
  int next[2];  // of those who load
  uint64_t held_full[2], held_empty[2];
  uint64_t full[kStages][2], empty[kStages];
};

}  // namespace radix::sm90
