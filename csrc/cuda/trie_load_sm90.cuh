// The warp group of the trie kernel for Hopper that loads.
#pragma once

#include "trie_items_sm90.cuh"

#include <climits>

namespace radix::sm90 {

// How a warp loads its 32 rows of a tile: not at all, as one box, or row by row.
enum class Way { kNone, kBox, kRows };

constexpr int kNumbersOfLane = kPairs / 32;

// The first number of an item's block; num_nodes behind the last item.
__device__ inline int first_of(const TrieForward& p, int at) {
  // The blocks of the largest numbers, which most often lie deepest, come first.
  return at < p.num_items ? (p.num_items - 1 - at) / (p.kv_heads * p.parts) * p.numbers : p.num_nodes;
}

template <typename T, int D, bool kWindowed>
struct Loader {
  using Shared = TrieShared<T, D>;
  const TrieForward& p;
  const CUtensorMap& k_map;
  const CUtensorMap& v_map;
  Shared& shared;
  int warp, lane;

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

  __device__ int load_query_row(const Item& item) const {
    const int number = item.first + (warp * 32 + lane) / p.members;
    return number < p.num_nodes ? p.row_of[number] : 0;
  }

  // Begins to copy the row that each lane points to, zeros for a null pointer, to 32 rows of a matrix. `any` is an
  // address that may be read.
  __device__ void copy_rows(uint32_t to, const T* row, const void* any, uint32_t barrier) const {
    constexpr int kChunks = D / 8;
    constexpr int kRows = 32 / kChunks;  // at once
    const int chunk = lane % kChunks;
    const uint32_t piece = to + chunk / 8 * Shared::kPieceBytes;
#pragma unroll 4
    for (int i = 0; i < 32; i += kRows) {
      const int at = i + lane / kChunks;
      const T* from = reinterpret_cast<const T*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), at));
      const bool is_row = from != nullptr;
      const uint32_t slot = piece + at * kRowBytes + ((chunk % 8) ^ (at % 8)) * 16;
      copy_16(slot, is_row ? from + chunk * 8 : any, is_row);
    }
    arrive_after_copies(barrier);
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
      copy_rows(to, row < 0 ? nullptr : rows_of_head + row * row_stride, from, barrier);
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
    copy_rows(
        shared_address(&shared.queries[slot][0][warp * 32][0]),
        is_query ? static_cast<const T*>(p.q) + row * p.q_row + head * p.q_head : nullptr,
        p.q,
        barrier);
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
