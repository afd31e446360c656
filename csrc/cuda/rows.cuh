// Rows as units of 1 to 16 bytes, and how blocks of threads cover them, for gather and scatter_add on CUDA.
#pragma once

#include "../rows.h"
#include "common.cuh"

#include <torch/headeronly/macros/Macros.h>

#include <array>

namespace radix {

// Rows in and rows out: `stride_bytes` apart in `in`, side by side in `out`, each `units` units long.
struct Lane {
  const char* in;
  char* out;
  int64_t stride_bytes;
  int64_t units;
};

// One tensor, or K and V; blockIdx.y tells which.
struct Lanes {
  Lane lane[2];

  // With lane[blockIdx.y] every thread would copy both to its stack.
  __device__ Lane mine() const {
    return blockIdx.y == 0 ? lane[0] : lane[1];
  }

  int64_t most_units() const {
    return std::max(lane[0].units, lane[1].units);
  }
};

// An argument and the name that messages call it by.
struct Source {
  const char* name;
  const Tensor& tensor;
};

template <size_t kCount>
inline Lanes lanes_of(
    const std::array<Rows, kCount>& rows, const std::array<Tensor, kCount>& outs, int64_t unit_bytes) {
  Lanes lanes{};
  for (size_t t = 0; t < kCount; ++t) {
    lanes.lane[t] = Lane{
        rows[t].data,
        static_cast<char*>(outs[t].mutable_data_ptr()),
        rows[t].stride_bytes,
        rows[t].row_bytes / unit_bytes};
  }
  return lanes;
}

// The widest access, of at most 16 bytes, that every row of these tensors allows.
template <size_t kCount>
inline int64_t unit_bytes_of(const std::array<Rows, kCount>& tensors) {
  uint64_t bits = 16;
  for (const Rows& rows : tensors) {
    bits |= reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.row_bytes) |
            static_cast<uint64_t>(rows.stride_bytes);
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

// How blocks of x threads along a row, times y rows, cover all rows. Each thread covers kUnits units of its row, x
// apart; `chunks` blocks cover y rows.
struct Tiling {
  dim3 block;
  dim3 grid;
  unsigned chunks;
};

template <int kUnits>
inline Tiling tiling_of(
    const char* op, int64_t num_rows, int64_t units, size_t tensors, int64_t threads, int64_t max_x) {
  int64_t x = 1;
  while (x < max_x && x * kUnits < units) {
    x *= 2;
  }
  const int64_t y = threads / x;
  const int64_t chunks = std::max<int64_t>((units + x * kUnits - 1) / (x * kUnits), 1);
  const int64_t blocks = (num_rows + y - 1) / y * chunks;
  // More blocks than that, of at least 128 bytes each, are more than any device holds.
  RADIX_CHECK(blocks <= kMaxRows, op, "a result of ", num_rows, " rows of ", units, " units is too large");
  return Tiling{
      dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tensors)),
      static_cast<unsigned>(chunks)};
}

// The kUnits units of a row that a thread covers: `first`, first + step, ..., of which those before `left` exist.
template <int kUnits>
struct Columns {
  int64_t first;
  int step;
  int left;

  __device__ Columns(unsigned chunk, int64_t units)
      : first(static_cast<int64_t>(chunk) * kUnits * blockDim.x + threadIdx.x), step(static_cast<int>(blockDim.x)) {
    // The blocks cover the wider of two tensors, so the other may end before them.
    const int64_t after = units - first;
    left = after <= 0 ? 0 : after > kUnits * step ? kUnits * step : static_cast<int>(after);
  }

  __device__ bool has(int k) const {
    return k * step < left;
  }

  template <typename Unit>
  __device__ Unit* at(Unit* row, int k) const {
    return row + first + k * step;
  }
};

// Loads and stores of data that is touched once and need not stay in the caches.
template <typename Unit>
__device__ inline Unit load_once(const Unit* from) {
  return __ldcs(from);
}

template <typename Unit>
__device__ inline void store_once(Unit* to, const Unit& value) {
  __stcs(to, value);
}

// Loads a part of a row. `keep` says that the row is read again soon: the second-level cache then keeps it ahead of
// what is written.
template <typename Unit>
__device__ inline Unit load_row(const Unit* from, bool keep) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Unit) == 16) {
    Unit value;
    if (keep) {
      uint64_t policy;
      asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                   : "l"(from), "l"(policy));
    } else {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                   : "l"(from));
    }
    return value;
  }
#endif
  return __ldg(from);
}

}  // namespace radix
