// The warp group of the trie kernel for Hopper that loads.
#pragma once

#include "trie_copy_sm90.cuh"
#include "trie_find_sm90.cuh"

namespace radix::sm90 {

template <typename T, int D, bool kWindowed>
struct Loader : Finder<kWindowed> {
  using Shared = TrieShared<T, D>;
  using Finder<kWindowed>::lane, Finder<kWindowed>::load_rows, Finder<kWindowed>::load_depths;
  using Finder<kWindowed>::find, Finder<kWindowed>::load_key_row;
  const TrieForward& p;
  const CUtensorMap& k_map;
  const CUtensorMap& v_map;
  Shared& shared;
  int warp;

  __device__ int load_query_row(const Item& item) const {
    const int number = item.first + (warp * 32 + lane) / p.members;
    return number < p.num_nodes ? p.row_of[number] : 0;
  }

  // Begins to load this warp's 32 rows of a tile, the first of which is lane 0's.
  __device__ void load_tile(
      Way way,
      uint32_t tile,
      const void* from,
      const CUtensorMap& map,
      int64_t row_stride,
      int64_t head_stride,
      int kv_head,
      int row,
      uint32_t barrier) const {
    const uint32_t to = tile + warp * 32 * kRowBytes;
    if (way == Way::kRows) {
      const T* rows_of_head = static_cast<const T*>(from) + kv_head * head_stride;
      copy_rows<D, Shared::kPieceBytes>(lane, to, row < 0 ? nullptr : rows_of_head + row * row_stride, from);
      arrive_after_copies(barrier);
    } else if (way == Way::kBox && lane == 0) {
      announce_bytes(barrier, 32 * D * sizeof(T));
#pragma unroll
      for (int piece = 0; piece < Shared::kPieces; ++piece) {
        copy_box(to + piece * Shared::kPieceBytes, map, piece * 64, row, kv_head, barrier);
      }
    }
  }

  // Arrives for this warp at the barrier of what it loads.
  __device__ void finish(Way way, uint32_t barrier) const {
    __syncwarp();
    if (lane == 0) {
      arrive(barrier, way == Way::kRows ? 1 : kArrivals);
    }
  }

  __device__ void load_queries(const Item& item, int round, int table_row) const {
    const int slot = place_of(round);
    const uint32_t barrier = shared_address(&shared.queries_full[slot]);
    const int pair = warp * 32 + lane;
    const int number = item.first + pair / p.members;
    const int member = pair % p.members;
    const bool is_pair = pair < p.numbers * p.members && member < item.members && number < p.num_rows;
    const bool is_query = is_pair && number < p.num_nodes;
    // Padding rows are given zeros; -1 is no row.
    const int row = is_query ? row_in(p, table_row) : is_pair ? number : -1;
    const int head = item.head + member;
    wait(shared_address(&shared.queries_empty[slot]), parity_of(round) ^ 1);
    shared.query_row[slot][pair] = row;
    shared.query_at[slot][pair] = is_pair ? static_cast<int64_t>(row) * p.heads + head : -1;
    if (kWindowed) {
      shared.query_depth[slot][pair] = is_query ? p.depth[row] : 0;
    }
    if (warp == 0 && lane == 0) {
      shared.item[slot] = item;
    }
    copy_rows<D, Shared::kPieceBytes>(
        lane,
        shared_address(&shared.queries[slot][0][warp * 32][0]),
        is_query ? static_cast<const T*>(p.q) + row * p.q_row + head * p.q_head : nullptr,
        p.q);
    arrive_after_copies(barrier);
    finish(Way::kRows, barrier);
  }

  __device__ void run() {
    int tile = 0;
    const int key = warp * 32 + lane;  // of a tile
    load_rows(first_of(p, item_at(0)));
    load_depths();
    Item next = find(item_at(0));
    load_rows(first_of(p, item_at(1)));
    load_depths();
    load_rows(first_of(p, item_at(2)));
    int query_row = load_query_row(next);
    int table_row = load_key_row(next, next.low + key);
    for (int round = 0; item_at(round) < p.num_items; ++round) {
      const Item item = next;
      load_queries(item, round, query_row);
      next = find(item_at(round + 1));
      load_depths();
      load_rows(first_of(p, item_at(round + 3)));
      query_row = load_query_row(next);
      const int whole_end = item.whole_end();
      for (int start = item.low; start < item.count; start += kKeys) {
        const bool is_key = start + key < item.count;
        const int row = is_key ? row_in(p, table_row) : -1;
        const bool is_masked = item.is_masked(start);
        int end = 0, depth = 0;
        if (is_masked && is_key) {
          end = p.leave[row];
          if (kWindowed) {
            depth = p.depth[row];
          }
        }
        const int first_row = __shfl_sync(~0u, row, 0);
        const bool is_side_by_side = __all_sync(~0u, is_key && row == first_row + lane) != 0;
        const bool is_read = warp * 32 < kFewKeys || start < whole_end;
        const Way way = !is_read ? Way::kNone : p.has_maps && is_side_by_side ? Way::kBox : Way::kRows;
        const int stage = place_of(tile);
        const uint32_t empty = parity_of(tile) ^ 1;
        const uint32_t keys_barrier = shared_address(&shared.keys_full[stage]);
        const uint32_t values_barrier = shared_address(&shared.values_full[stage]);
        wait(shared_address(&shared.keys_empty[stage]), empty);
        const uint32_t keys = shared_address(shared.keys[stage]);
        load_tile(way, keys, p.k, k_map, p.k_row, p.k_head, item.kv_head, row, keys_barrier);
        if (is_masked) {
          shared.leave[stage][key] = end;
          if (kWindowed) {
            shared.key_depth[stage][key] = depth;
          }
        }
        finish(way, keys_barrier);
        const bool is_last = start + kKeys >= item.count;
        const Item source = is_last ? next : item;
        table_row = load_key_row(source, (is_last ? next.low : start + kKeys) + key);
        wait(shared_address(&shared.values_empty[stage]), empty);
        const uint32_t values = shared_address(shared.values[stage]);
        load_tile(way, values, p.v, v_map, p.v_row, p.v_head, item.kv_head, row, values_barrier);
        finish(way, values_barrier);
        ++tile;
      }
      if (item.count == 0) {
        table_row = load_key_row(next, next.low + key);
      }
    }
  }
};

}  // namespace radix::sm90
