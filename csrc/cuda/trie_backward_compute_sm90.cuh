// The warp groups of the trie backward kernels for Hopper that compute.
#pragma once

#include "trie_backward_items_sm90.cuh"

namespace radix::sm90 {

// Exchanges a matrix of 4 x 4 words, of which each lane of four holds a row, with its transpose.
__device__ inline void transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool is_high = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {
        const uint32_t given = is_high ? words[i] : words[i | bit];
        const uint32_t got = __shfl_xor_sync(~0u, given, bit);
        words[i] = is_high ? got : words[i];
        words[i | bit] = is_high ? words[i | bit] : got;
      }
    }
  }
}

// With kOfKeys, sums the gradients of a block of keys and values, whose rows are held, over tiles of queries. Otherwise
// sums those of a block of queries over tiles of keys. A warp group has 64 of the rows held.
template <typename T, bool kOfKeys>
struct BackwardComputer {
  using Shared = BackwardShared<T, kOfKeys>;
  static constexpr int kTile = Shared::kTile;
  static constexpr int kStages = Shared::kStages;
  const TrieBackward& p;
  Shared& shared;
  int group;  // of warps, 0 or 1
  int warp;   // in it
  int lane;

  int slot;  // of what is held
  // Of a thread's two rows held, 8 apart, where these are queries.
  int numbers[2];
  float sums[2];
  float means[2];
  float weights[kTile / 2];  // first scores
  float slopes[kTile / 2];   // the gradients of weights
  uint32_t packed_weights[kTile / 4];
  uint32_t packed_slopes[kTile / 4];  // the gradients of scores
  float acc[kHeads / 2];
  float acc_values[kOfKeys ? kHeads / 2 : 1];

  __device__ void release(const uint64_t& barrier) const {
    __syncwarp();
    arrive(shared_address(&barrier));
  }

  __device__ int row_held(int half) const {
    return group * 64 + warp * 16 + lane / 4 + 8 * half;
  }

  __device__ int number_of(int half) const {
    return kOfKeys ? shared.item[slot].first + row_held(half) : numbers[half];
  }

  // Begins product = held passing^T.
  template <int kCount>
  __device__ void multiply(float (&result)[kTile / 2], int which, int stage) {
    auto& product = reinterpret_cast<float (&)[kCount / 2]>(result);
    uint32_t held = shared_address(shared.held[which]) + group * 64 * kRowBytes;
    // Keeps the compiler from holding the sums below, which are those of every tile, in registers.
    asm volatile("" : "+r"(held));
    const uint64_t a = describe(held);
    const uint64_t b = describe(shared_address(shared.passing[stage][which]));
#pragma unroll
    for (int step = 0; step < kHeads / 16; ++step) {
      const uint64_t shift_a = (step / 4 * Shared::kHeldPieceBytes + step % 4 * 32) / 16;
      const uint64_t shift_b = (step / 4 * Shared::kPieceBytes + step % 4 * 32) / 16;
      add_product(product, a + shift_a, b + shift_b, step > 0, T());
    }
    end_group();
  }

  // Begins sum += factors passing.
  template <int kCount>
  __device__ void add(float (&sum)[kHeads / 2], const uint32_t* factors, int which, int stage) {
    const uint64_t b = describe(shared_address(shared.passing[stage][which]), Shared::kPieceBytes);
#pragma unroll
    for (int step = 0; step < kCount / 16; ++step) {
      add_product(sum, factors + 4 * step, b + step * 16 * kRowBytes / 16, T());
    }
    end_group();
  }

  // Makes scores weights; where a query does not see a key, 0.
  template <int kCount, bool kMasked>
  __device__ void weigh(int shift, int stage) {
    const int column = lane % 4 * 2;
    int number[2], leave[2];
    if (kMasked) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        number[half] = number_of(half);
        leave[half] = kOfKeys ? shared.held_leave[slot][row_held(half)] : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      float2 sum{};
      int2 other{};
      if (kOfKeys) {
        sum = *reinterpret_cast<const float2*>(shared.sums[stage] + column + 8 * i);
      }
      if (kMasked) {
        const int* others = kOfKeys ? shared.number[stage] : shared.leave[stage];
        other = *reinterpret_cast<const int2*>(others + column + 8 * i);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* pair = weights + 4 * i + 2 * half;
        pair[0] = exp2_of(fmaf(pair[0], p.factor, kOfKeys ? -sum.x : -sums[half]));
        pair[1] = exp2_of(fmaf(pair[1], p.factor, kOfKeys ? -sum.y : -sums[half]));
        if (kMasked) {
          bool first_is_seen, second_is_seen;
          if (kOfKeys) {
            first_is_seen = number[half] <= other.x && other.x < leave[half];
            second_is_seen = number[half] <= other.y && other.y < leave[half];
          } else {
            const int last = number[half] - shift - column;
            first_is_seen = 8 * i <= last && number[half] < other.x;
            second_is_seen = 8 * i + 1 <= last && number[half] < other.y;
          }
          pair[0] = first_is_seen ? pair[0] : 0.0f;
          pair[1] = second_is_seen ? pair[1] : 0.0f;
        }
      }
    }
  }

  // Packs weights, where a product takes them, and the gradients of scores.
  template <int kCount>
  __device__ void find_slopes(int stage) {
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      float2 mean{};
      if (kOfKeys) {
        mean = *reinterpret_cast<const float2*>(shared.means[stage] + lane % 4 * 2 + 8 * i);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* weight = weights + 4 * i + 2 * half;
        const float* slope = slopes + 4 * i + 2 * half;
        const float first = weight[0] * (slope[0] - (kOfKeys ? mean.x : means[half]));
        const float second = weight[1] * (slope[1] - (kOfKeys ? mean.y : means[half]));
        packed_slopes[2 * i + half] = pack(first, second, T());
        if (kOfKeys) {
          packed_weights[2 * i + half] = pack(weight[0], weight[1], T());
        }
      }
    }
  }

  // Adds the shares of one tile; `shift` is what makes a key's place in it a number.
  template <int kCount, bool kMasked>
  __device__ void add_tile(int shift, int now, bool is_last) {
    const int stage = now % kStages;
    const uint32_t parity = now / kStages % 2;
    wait(shared_address(&shared.full[stage][0]), parity);
    pin(weights);
    begin_products();
    multiply<kCount>(weights, 0, stage);
    wait(shared_address(&shared.full[stage][1]), parity);
    pin(slopes);
    begin_products();
    multiply<kCount>(slopes, 1, stage);
    wait_for_groups<1>();
    pin(weights);
    if (is_last) {
      release(shared.held_empty[0]);
    }
    weigh<kCount, kMasked>(shift, stage);
    wait_for_groups<0>();
    pin(slopes);
    if (is_last) {
      release(shared.held_empty[1]);
    }
    find_slopes<kCount>(stage);
    pin(packed_slopes);
    pin(acc);
    if constexpr (kOfKeys) {
      pin(packed_weights);
      pin(acc_values);
      begin_products();
      add<kCount>(acc_values, packed_weights, 1, stage);
    } else {
      begin_products();
    }
    add<kCount>(acc, packed_slopes, 0, stage);
    wait_for_groups<0>();
    pin(acc);
    pin(packed_slopes);
    if constexpr (kOfKeys) {
      pin(acc_values);
      pin(packed_weights);
    }
    release(shared.empty[stage]);
  }

  __device__ void skip_tile(int now) {
    const int stage = now % kStages;
    wait(shared_address(&shared.full[stage][0]), now / kStages % 2);
    wait(shared_address(&shared.full[stage][1]), now / kStages % 2);
    release(shared.empty[stage]);
  }

  // Stores a sum times `scale`, or zeros for what is no query or key; `heads` are side by side.
  __device__ void store(const float (&sum)[kHeads / 2], float scale, void* to, int heads, const int (&head)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = shared.held_row[slot][row_held(half)];
      const bool is_node = number_of(half) < p.num_nodes;
      T* out = static_cast<T*>(to) + (static_cast<int64_t>(row) * heads + head[half]) * kHeads + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < kHeads / 32; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* pair = sum + 16 * i + 4 * j + 2 * half;
          words[j] = is_node ? pack(pair[0] * scale, pair[1] * scale, T()) : 0;
        }
        transpose(words, lane);
        if (row >= 0) {
          *reinterpret_cast<uint4*>(out + 32 * i) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) {
      acc[i] = 0.0f;
      if constexpr (kOfKeys) {
        acc_values[i] = 0.0f;
      }
    }
  }

  __device__ void release_held() const {
    release(shared.held_empty[0]);
    release(shared.held_empty[1]);
  }

  // Waits for the next item, and tells whether there is one.
  __device__ bool begin(int round) {
    wait(shared_address(&shared.held_full[0]), round % 2);
    if (shared.is_end[round % 2] != 0) {
      return false;
    }
    wait(shared_address(&shared.held_full[1]), round % 2);
    return true;
  }

  __device__ void run_keys() {
    int now = 0;  // the tile
    for (int round = 0; begin(round); ++round) {
      slot = round % 2;
      const KeyItem& item = shared.item[slot];
      clear();
      // Pairs that this warp group's keys are seen by.
      const int begin = (item.first + 64 * group) * p.group;
      const int end = min(item.end, group == 0 ? item.ends[0] : item.ends[1]);
      int at = item.begin;
      for (; at + kQueries <= begin && at < item.end; at += kQueries) {
        skip_tile(now++);
      }
      if (at >= end) {
        release_held();
      }
      for (; at < end; at += kQueries) {
        const bool is_last = at + kQueries >= end;
        if (item.is_masked(at)) {
          add_tile<kTile, true>(0, now++, is_last);
        } else {
          add_tile<kTile, false>(0, now++, is_last);
        }
      }
      for (; at < item.end; at += kQueries) {
        skip_tile(now++);
      }
      const int head[2] = {item.kv_head, item.kv_head};
      store(acc_values, 1.0f, p.grad_v, p.kv_heads, head);
      store(acc, p.scale, p.grad_k, p.kv_heads, head);
    }
  }

  __device__ void run_queries() {
    int now = 0;  // the tile
    for (int round = 0; begin(round); ++round) {
      slot = round % 2;
      const Item& item = shared.item[slot];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        numbers[half] = item.first + row_held(half) / p.members;
        sums[half] = shared.held_sums[slot][row_held(half)];
        means[half] = shared.held_means[slot][row_held(half)];
      }
      clear();
      const int shift = item.first - item.length;
      const int whole_end = item.whole_end();
      if (item.count == 0) {
        release_held();
      }
      int at = 0;
      for (; at < item.full; at += kKeys) {
        add_tile<kKeys, false>(shift + at, now++, at + kKeys >= item.count);
      }
      for (; at < whole_end; at += kKeys) {
        add_tile<kKeys, true>(shift + at, now++, at + kKeys >= item.count);
      }
      if (at < item.count) {
        add_tile<kFewKeys, true>(shift + at, now++, true);
      }
      int head[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        head[half] = item.head + row_held(half) % p.members;
      }
      store(acc, p.scale, p.grad_q, p.heads, head);
    }
  }
};

}  // namespace radix::sm90
