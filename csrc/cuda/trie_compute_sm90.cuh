// The warp groups of the trie kernel for Hopper that compute.
#pragma once

#include "trie_items_sm90.cuh"

namespace radix::sm90 {

template <typename T, int D, bool kWindowed>
struct Computer {
  using Shared = TrieShared<T, D>;
  const TrieForward& p;
  Shared& shared;
  int group;  // of warps, 0 or 1
  int warp;   // in it
  int lane;

  // Of a thread's two rows of scores, 8 apart.
  float largest[2];
  float total[2];
  int number[2];
  int own_depth[2];
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 4];
  float acc[D / 2];

  __device__ void release(const uint64_t& barrier) const {
    __syncwarp();
    if (lane == 0) {
      arrive(shared_address(&barrier));
    }
  }

  // Begins scores = queries keys^T.
  template <int kCount>
  __device__ void multiply_keys(uint32_t queries, int stage) {
    auto& products = reinterpret_cast<float (&)[kCount / 2]>(scores);
    const uint64_t a = describe(queries + group * 64 * kRowBytes);
    const uint64_t b = describe(shared_address(shared.keys[stage]));
    begin_products();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t shift = (step / 4 * Shared::kPieceBytes + step % 4 * 32) / 16;
      add_product(products, a + shift, b + shift, step > 0, T());
    }
    end_group();
  }

  // Begins acc += weights values.
  template <int kCount>
  __device__ void multiply_values(int stage) {
    const uint64_t b = describe(shared_address(shared.values[stage]), Shared::kPieceBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < kCount / 16; ++step) {
      add_product(acc, weights + 4 * step, b + step * 16 * kRowBytes / 16, T());
    }
    end_group();
  }

  // Hides scores of keys that a row does not see.
  template <int kCount>
  __device__ void mask(const Item& item, int start, int stage) {
    const int column = lane % 4 * 2;
    // A key's number is its place plus this; keys of the path come before every number of the block, as they do here.
    const int shift = item.first - item.length + start + column;
    const int* ends = shared.leave[stage] + column;
    const int* depths = shared.key_depth[stage] + column;
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      const int2 end = *reinterpret_cast<const int2*>(ends + 8 * i);
      int2 depth{};
      if (kWindowed) {
        depth = *reinterpret_cast<const int2*>(depths + 8 * i);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int last = number[half] - shift;
        bool first_is_seen = 8 * i <= last && number[half] < end.x;
        bool second_is_seen = 8 * i + 1 <= last && number[half] < end.y;
        if (kWindowed) {
          first_is_seen = first_is_seen && own_depth[half] - depth.x < p.window;
          second_is_seen = second_is_seen && own_depth[half] - depth.y < p.window;
        }
        float* pair = scores + 4 * i + 2 * half;
        pair[0] = first_is_seen ? pair[0] : -INFINITY;
        pair[1] = second_is_seen ? pair[1] : -INFINITY;
      }
    }
  }

  // Makes scores exponentials, and returns in `fade` what becomes of earlier sums.
  template <int kCount, bool kMasked>
  __device__ void exponentiate(float (&fade)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
      for (int i = 1; i < kCount / 8; ++i) {
        most[0] = fmaxf(most[0], scores[4 * i + 2 * half]);
        most[1] = fmaxf(most[1], scores[4 * i + 2 * half + 1]);
      }
      float now = fmaxf(most[0], most[1]);
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      now = fmaxf(largest[half], now * p.factor);
      // A row that has seen no key yet has -inf here, and -inf from itself is NaN.
      const float base = kMasked && now == -INFINITY ? 0.0f : now;
      fade[half] = exp2_of(largest[half] - base);
      largest[half] = now;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kCount / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * i + 2 * half + j];
          score = exp2_of(fmaf(score, p.factor, -base));
          sum[j] += score;
        }
      }
      total[half] = total[half] * fade[half] + (sum[0] + sum[1]);
    }
  }

  // Turns raw products into scores that count: caps of scores and the like belong here.
  template <int kCount>
  __device__ void finish_scores() {
    if (p.is_negative) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        scores[i] = -scores[i];
      }
    }
  }

  template <int kCount, bool kMasked>
  __device__ void soften(const Item& item, int start, int stage, float (&fade)[2]) {
    finish_scores<kCount>();
    if (kMasked) {
      mask<kCount>(item, start, stage);
      release(shared.keys_empty[stage]);
    }
    exponentiate<kCount, kMasked>(fade);
  }

  template <int kCount>
  __device__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      weights[i] = pack(scores[2 * i], scores[2 * i + 1], T());
    }
  }

  // The first tile of an item: scores alone.
  template <int kCount, bool kMasked>
  __device__ void first_tile(const Item& item, uint32_t queries, int now) {
    wait(shared_address(&shared.keys_full[place_of(now)]), parity_of(now));
    publish_to_products();
    pin(scores);
    multiply_keys<kCount>(queries, place_of(now));
    wait_for_groups<0>();
    pin(scores);
    if (!kMasked) {
      release(shared.keys_empty[place_of(now)]);
    }
    float fade[2];
    soften<kCount, kMasked>(item, item.low, place_of(now), fade);
    pack_weights<kCount>();
  }

  // The scores of a tile beside the values of the tile before, which is a whole one.
  template <int kCount, bool kMasked>
  __device__ void next_tile(const Item& item, int start, uint32_t queries, int now) {
    wait(shared_address(&shared.keys_full[place_of(now)]), parity_of(now));
    meet(kTurn + group, kComputing);
    publish_to_products();
    pin(scores);
    multiply_keys<kCount>(queries, place_of(now));
    wait(shared_address(&shared.values_full[place_of(now - 1)]), parity_of(now - 1));
    publish_to_products();
    pin(acc);
    pin(weights);
    multiply_values<kKeys>(place_of(now - 1));
    announce(kTurn + 1 - group, kComputing);
    wait_for_groups<1>();
    pin(scores);
    if (!kMasked) {
      release(shared.keys_empty[place_of(now)]);
    }
    float fade[2];
    soften<kCount, kMasked>(item, start, place_of(now), fade);
    wait_for_groups<0>();
    pin(acc);
    pin(weights);
    release(shared.values_empty[place_of(now - 1)]);
    pack_weights<kCount>();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      acc[i] *= fade[i / 2 % 2];
    }
  }

  template <int kCount>
  __device__ void last_values(int now) {
    wait(shared_address(&shared.values_full[place_of(now)]), parity_of(now));
    publish_to_products();
    pin(acc);
    pin(weights);
    multiply_values<kCount>(place_of(now));
    wait_for_groups<0>();
    pin(acc);
    pin(weights);
    release(shared.values_empty[place_of(now)]);
  }

  // Stores results by way of the item's queries, which no product reads any more.
  __device__ void store(int slot) {
    const int first = group * 64 + warp * 16;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      const bool is_query = number[half] < p.num_nodes;
      inverse[half] = is_query && total[half] != 0.0f ? 1.0f / total[half] : 0.0f;
      const int pair = first + lane / 4 + 8 * half;
      const int row = shared.query_row[slot][pair];
      if (lane % 4 == 0 && row >= 0) {
        const int64_t head = shared.item[slot].head + pair % p.members;
        p.logsumexp[head * p.num_rows + row] = is_query ? largest[half] + __log2f(total[half]) : 0.0f;
      }
    }
    meet(kOwnGroup + group, kWarpGroup);
    const int row_here = lane % 16;
    const uint32_t to = shared_address(&shared.queries[slot][0][first + row_here][0]);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scale = inverse[j % 2];
        const float low = acc[8 * i + 2 * j] * scale;
        const float high = acc[8 * i + 2 * j + 1] * scale;
        // Padding rows are given zeros, whatever the values are.
        packed[j] = scale != 0.0f ? pack(low, high, T()) : 0;
      }
      const int chunk = 2 * i + lane / 16;
      store_matrices(
          to + chunk / 8 * Shared::kPieceBytes + ((chunk % 8) ^ (row_here % 8)) * 16,
          packed[0],
          packed[1],
          packed[2],
          packed[3]);
    }
    __syncwarp();
    constexpr int kChunks = D / 8;
    const int chunk = lane % kChunks;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / kChunks) {
      const int pair = first + i + lane / kChunks;
      const int64_t place = shared.query_at[slot][pair];
      if (place >= 0) {
        const T* from = &shared.queries[slot][chunk / 8][pair][((chunk % 8) ^ (pair % 8)) * 8];
        T* out = static_cast<T*>(p.out) + place * D + chunk * 8;
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
      }
    }
    release(shared.queries_empty[slot]);
  }

  __device__ void run() {
    int now = 0;  // the tile
    if (group == 1) {
      announce(kTurn, kComputing);  // the other group begins
    }
    for (int round = 0; item_at(round) < p.num_items; ++round) {
      wait(shared_address(&shared.queries_full[place_of(round)]), parity_of(round));
      const int slot = place_of(round);
      const Item& item = shared.item[slot];
      const uint32_t queries = shared_address(shared.queries[slot]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pair = group * 64 + warp * 16 + lane / 4 + 8 * half;
        number[half] = item.first + pair / p.members;
        own_depth[half] = kWindowed ? shared.query_depth[slot][pair] : 0;
        largest[half] = -INFINITY;
        total[half] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        acc[i] = 0.0f;
      }
      if (item.count > 0) {
        compute(item, queries, now);
      }
      store(slot);
    }
  }

  __device__ void compute(const Item& item, uint32_t queries, int& now) {
    int start = item.low;
    const int whole_end = item.whole_end();
    if (start >= whole_end) {
      first_tile<kFewKeys, true>(item, queries, now);
      last_values<kFewKeys>(now);
      ++now;
      return;
    }
    if (item.is_masked(start)) {
      first_tile<kKeys, true>(item, queries, now);
    } else {
      first_tile<kKeys, false>(item, queries, now);
    }
    ++now;
    start += kKeys;
    if (kWindowed) {
      for (; start < item.full_low; start += kKeys) {
        next_tile<kKeys, true>(item, start, queries, now);
        ++now;
      }
    }
    for (; start < item.full; start += kKeys) {
      next_tile<kKeys, false>(item, start, queries, now);
      ++now;
    }
    for (; start < whole_end; start += kKeys) {
      next_tile<kKeys, true>(item, start, queries, now);
      ++now;
    }
    if (start < item.count) {
      next_tile<kFewKeys, true>(item, start, queries, now);
      last_values<kFewKeys>(now);
      ++now;
    } else {
      last_values<kKeys>(now - 1);
    }
  }
};

}  // namespace radix::sm90
