// The warp group of the trie backward kernels for Hopper that loads.
#pragma once

#include "trie_backward_items_sm90.cuh"
#include "trie_copy_sm90.cuh"
#include "trie_find_sm90.cuh"

namespace radix::sm90 {

// The barriers at which a lane has yet to arrive for the rows that it copies: two at most, in the order of the copies.
// Rows copied one by one are published to products by who copied them, once they have come.
struct Arrivals {
  uint32_t first = 0, second = 0;

  // Arrives for copies since the last call, when they have come.
  __device__ void add(uint32_t barrier) {
    end_copies();
    if (second != 0) {
      wait_for_copies<2>();
      publish_to_products();
      arrive(first);
      first = second;
      second = barrier;
    } else if (first != 0) {
      second = barrier;
    } else {
      first = barrier;
    }
  }

  __device__ void finish() {
    if (first != 0) {
      wait_for_copies<0>();
      publish_to_products();
      arrive(first);
      if (second != 0) {
        arrive(second);
      }
      first = second = 0;
    }
  }

  // Waits for a barrier. Whoever it waits for may wait for these rows.
  __device__ void wait_for(uint32_t barrier, uint32_t parity) {
    if (first != 0 && !has_ended(barrier, parity)) {
      finish();
    }
    wait(barrier, parity);
  }
};

// Begins to copy 32 rows as boxes of 64 columns, whose bytes arrive at the barrier.
template <int D, int kPieceBytes>
__device__ void copy_boxes(uint32_t to, const CUtensorMap& map, int row, int group, uint32_t barrier) {
  announce_bytes(barrier, 32 * D * 2);
#pragma unroll
  for (int piece = 0; piece < D / 64; ++piece) {
    copy_group_box(to + piece * kPieceBytes, map, piece * 64, row, group, barrier);
  }
}

template <typename T, bool kOfKeys>
struct BackwardLoader {
  using Shared = BackwardShared<T, kOfKeys>;
  static constexpr int kTile = Shared::kTile;
  static constexpr int kStages = Shared::kStages;
  const TrieBackward& p;
  const TrieMaps& maps;
  Shared& shared;
  int warp, lane;
  Arrivals arrivals;

  // Takes the item of the next round, of which the first thread knows.
  __device__ int take() const {
    return threadIdx.x == 0 ? gridDim.x + atomicAdd(p.taken + (kOfKeys ? 0 : 1), 1) : 0;
  }

  // Tells all who load which item that is. They may wait here for those who compute.
  __device__ int share(int taken, int round) {
    arrivals.finish();
    if (threadIdx.x == 0) {
      shared.next[round % 2] = taken;
    }
    meet(kLoading, kWarpGroup);
    return shared.next[round % 2];
  }

  // Tells those who compute that no item follows.
  __device__ void end(int round) {
    arrivals.wait_for(shared_address(&shared.held_empty[0]), round % 2 ^ 1);
    if (warp == 0 && lane == 0) {
      shared.is_end[round % 2] = 1;
    }
    arrive(shared_address(&shared.held_full[0]));
    arrivals.finish();
  }

  // Loads this warp's 32 rows of one matrix held; row is null for zeros.
  __device__ void load_held(int which, const T* row, const void* any) {
    copy_rows<kHeads, Shared::kHeldPieceBytes>(lane, shared_address(&shared.held[which][0][warp * 32][0]), row, any);
    arrivals.add(shared_address(&shared.held_full[which]));
  }

  // Loads this warp's 32 rows of one matrix of a tile; row is null for zeros.
  __device__ void load_passing(
      Way way,
      int stage,
      int which,
      const CUtensorMap& map,
      int first_row,
      int kv_head,
      const T* row,
      const void* any) {
    const uint32_t to = shared_address(&shared.passing[stage][which][0][warp * 32][0]);
    const uint32_t barrier = shared_address(&shared.full[stage][which]);
    if (way == Way::kRows) {
      copy_rows<kHeads, Shared::kPieceBytes>(lane, to, row, any);
      arrivals.add(barrier);
      return;
    }
    if (way == Way::kBox && lane == 0) {
      copy_boxes<kHeads, Shared::kPieceBytes>(to, map, first_row, kv_head, barrier);
    }
    arrive(barrier);
  }

  __device__ const T* key_at(int kv_head, int row) const {
    return static_cast<const T*>(p.k) + kv_head * p.k_head + row * p.k_row;
  }
  __device__ const T* value_at(int kv_head, int row) const {
    return static_cast<const T*>(p.v) + kv_head * p.v_head + row * p.v_row;
  }
  __device__ const T* query_at(int head, int row) const {
    return static_cast<const T*>(p.q) + head * p.q_head + row * p.q_row;
  }
  __device__ const T* grad_at(int head, int row) const {
    return static_cast<const T*>(p.grad_out) + (static_cast<int64_t>(row) * p.heads + head) * kHeads;
  }

  __device__ KeyItem find_keys(int at) const {
    KeyItem item{};
    item.kv_head = at % p.kv_heads;
    item.first = at / p.kv_heads * kBlockKeys;
    if (item.first >= p.num_nodes) {
      return item;
    }
    int least = INT_MAX;
    int most[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kBlockKeys / 32; ++i) {
      const int number = item.first + lane + 32 * i;
      if (number < p.num_nodes) {
        const int leave = max(min(p.leave[row_in(p, p.row_of[number])], p.num_nodes), 0);
        least = min(least, leave);
        most[i / 2] = max(most[i / 2], leave);
      }
    }
    item.ends[0] = __reduce_max_sync(~0u, most[0]) * p.group;
    item.ends[1] = __reduce_max_sync(~0u, most[1]) * p.group;
    item.begin = item.first * p.group;
    item.end = max(item.ends[0], item.ends[1]);
    item.full_begin = item.begin + kBlockKeys * p.group;
    const int seen_by_all = __reduce_min_sync(~0u, least) * p.group;
    item.full_end = item.full_begin + max(seen_by_all - item.full_begin, 0) / kQueries * kQueries;
    return item;
  }

  // What the table says is the row of this lane's pair of a tile that begins at `at`.
  __device__ int load_pair_row(const KeyItem& item, int at) const {
    const int pair = at + warp * 32 + lane;
    return pair < item.end ? p.row_of[pair / p.group] : 0;
  }

  // Loads a block of keys and values.
  __device__ void load_key_block(const KeyItem& item, int round) {
    const int slot = round % 2;
    const int key = warp * 32 + lane;
    const int number = item.first + key;
    const bool is_key = number < p.num_nodes;
    const int row = is_key ? row_in(p, p.row_of[number]) : number;
    const int leave = is_key ? p.leave[row] : 0;
    arrivals.wait_for(shared_address(&shared.held_empty[0]), slot ^ 1);
    shared.held_row[slot][key] = number < p.num_rows ? row : -1;
    shared.held_leave[slot][key] = leave;
    if (warp == 0 && lane == 0) {
      shared.item[slot] = item;
      shared.is_end[slot] = 0;
    }
    load_held(0, is_key ? key_at(item.kv_head, row) : nullptr, p.k);
    arrivals.wait_for(shared_address(&shared.held_empty[1]), slot ^ 1);
    load_held(1, is_key ? value_at(item.kv_head, row) : nullptr, p.v);
  }

  // Passes queries and gradients by blocks of keys.
  __device__ void run_keys() {
    int tile = 0;
    int round = 0;
    for (int at = blockIdx.x; at < p.num_key_items; ++round) {
      const int taken = take();
      const KeyItem item = find_keys(at);
      int table_row = warp < kQueries / 32 ? load_pair_row(item, item.begin) : 0;
      load_key_block(item, round);
      if (warp < kQueries / 32) {
        for (int start = item.begin; start < item.end; start += kQueries, ++tile) {
          const int pair = start + warp * 32 + lane;
          const bool is_pair = pair < item.end;
          const int number = pair / p.group;
          const int head = item.kv_head * p.group + pair % p.group;
          const int row = is_pair ? row_in(p, table_row) : -1;
          float sum = 0.0f, mean = 0.0f;
          if (is_pair) {
            sum = p.logsumexp[static_cast<int64_t>(head) * p.num_rows + row];
            mean = p.means[static_cast<int64_t>(head) * p.num_rows + row];
          }
          table_row = load_pair_row(item, start + kQueries);
          const int first_row = __shfl_sync(~0u, row, 0);
          const bool is_side_by_side = __all_sync(~0u, is_pair && row == first_row + lane / p.group) != 0;
          const Way way = p.has_query_maps && is_side_by_side ? Way::kBox : Way::kRows;
          const int stage = tile % kStages;
          arrivals.wait_for(shared_address(&shared.empty[stage]), tile / kStages % 2 ^ 1);
          shared.sums[stage][warp * 32 + lane] = sum;
          shared.means[stage][warp * 32 + lane] = mean;
          shared.number[stage][warp * 32 + lane] = is_pair ? number : INT_MAX;
          const T* query = is_pair ? query_at(head, row) : nullptr;
          const T* grad = is_pair ? grad_at(head, row) : nullptr;
          load_passing(way, stage, 0, maps.q, first_row, item.kv_head, query, p.q);
          load_passing(way, stage, 1, maps.grad_out, first_row, item.kv_head, grad, p.grad_out);
        }
      }
      at = share(taken, round);
    }
    end(round);
  }

  // Loads a block of queries and gradients.
  __device__ void load_query_block(const Item& item, int round) {
    const int slot = round % 2;
    const int pair = warp * 32 + lane;
    const int number = item.first + pair / p.members;
    const int member = pair % p.members;
    const bool is_pair = pair < p.numbers * p.members && member < item.members && number < p.num_rows;
    const bool is_query = is_pair && number < p.num_nodes;
    const int row = is_query ? row_in(p, p.row_of[number]) : is_pair ? number : -1;
    const int head = item.head + member;
    float sum = 0.0f, mean = 0.0f;
    if (is_query) {
      sum = p.logsumexp[static_cast<int64_t>(head) * p.num_rows + row];
      mean = p.means[static_cast<int64_t>(head) * p.num_rows + row];
    }
    arrivals.wait_for(shared_address(&shared.held_empty[0]), slot ^ 1);
    shared.held_row[slot][pair] = row;
    shared.held_sums[slot][pair] = sum;
    shared.held_means[slot][pair] = mean;
    if (warp == 0 && lane == 0) {
      shared.item[slot] = item;
      shared.is_end[slot] = 0;
    }
    load_held(0, is_query ? query_at(head, row) : nullptr, p.q);
    arrivals.wait_for(shared_address(&shared.held_empty[1]), slot ^ 1);
    load_held(1, is_query ? grad_at(head, row) : nullptr, p.grad_out);
  }

  // Passes keys and values by blocks of queries.
  __device__ void run_queries() {
    Finder<false> finder{p, lane};
    const int key = warp * 32 + lane;  // of a tile
    int tile = 0;
    int round = 0;
    for (int at = blockIdx.x; at < p.num_items; ++round) {
      const int taken = take();
      finder.load_rows(first_of(p, at));
      finder.load_depths();
      const Item item = finder.find(at);
      int table_row = finder.load_key_row(item, key);
      load_query_block(item, round);
      const int whole_end = item.whole_end();
      for (int start = 0; start < item.count; start += kKeys, ++tile) {
        const bool is_key = start + key < item.count;
        const int row = is_key ? row_in(p, table_row) : -1;
        const int leave = item.is_masked(start) && is_key ? p.leave[row] : 0;
        table_row = finder.load_key_row(item, start + kKeys + key);
        const int first_row = __shfl_sync(~0u, row, 0);
        const bool is_side_by_side = __all_sync(~0u, is_key && row == first_row + lane) != 0;
        const bool is_read = warp * 32 < kFewKeys || start < whole_end;
        const Way way = !is_read ? Way::kNone : p.has_maps && is_side_by_side ? Way::kBox : Way::kRows;
        const int stage = tile % kStages;
        arrivals.wait_for(shared_address(&shared.empty[stage]), tile / kStages % 2 ^ 1);
        shared.leave[stage][key] = leave;
        const T* k = is_key ? key_at(item.kv_head, row) : nullptr;
        const T* v = is_key ? value_at(item.kv_head, row) : nullptr;
        load_passing(way, stage, 0, maps.k, first_row, item.kv_head, k, p.k);
        load_passing(way, stage, 1, maps.v, first_row, item.kv_head, v, p.v);
      }
      at = share(taken, round);
    }
    end(round);
  }
};

}  // namespace radix::sm90
