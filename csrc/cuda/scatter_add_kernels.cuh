// The kernel of scatter_add, which sums segments of source rows and checks an inverse that it was given.
#pragma once

#include "rows.cuh"

namespace radix {

constexpr int kBlock = 128;
constexpr int kMaxX = 32;
// Units of a thread, and source rows that it loads before it adds them.
constexpr int kUnits = 2;
constexpr int kRowsAtOnce = 4;
// Longer segments are summed by whole blocks.
constexpr int64_t kLongSegment = 128;

// kWidth elements of T that are loaded and stored as one: 16 bytes, or one element. They stay packed until they are
// added, which saves registers.
template <typename T, int kWidth>
using Packed = std::conditional_t<kWidth == 1, T, uint4>;

template <typename T, int kWidth>
struct alignas(sizeof(Packed<T, kWidth>)) Unpacked {
  T values[kWidth];
};

// The sums of one thread: kUnits units of its row.
template <typename T, int kWidth>
struct Sums {
  using Accumulator = accumulator_t<T>;
  Accumulator values[kUnits][kWidth];

  // Adding -0 changes no number, not even the sign of a zero.
  __device__ void reset() {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[k][e] = static_cast<Accumulator>(-0.0f);
      }
    }
  }

  __device__ void add(const Packed<T, kWidth> (&units)[kUnits]) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const auto& unit = reinterpret_cast<const Unpacked<T, kWidth>&>(units[k]);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[k][e] = static_cast<Accumulator>(values[k][e] + static_cast<Accumulator>(unit.values[e]));
      }
    }
  }

  // Unit k of the result; 0 if nothing was added.
  __device__ Packed<T, kWidth> unit(int k, bool none) const {
    Unpacked<T, kWidth> unit;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      unit.values[e] = none ? static_cast<T>(0) : static_cast<T>(values[k][e]);
    }
    return reinterpret_cast<const Packed<T, kWidth>&>(unit);
  }
};

template <typename Unit>
__device__ inline Unit load_unit(const Unit* from) {
  if constexpr (sizeof(Unit) == 16) {
    return load_once(from);
  } else {
    return *from;
  }
}

template <typename Unit>
__device__ inline void store_unit(Unit* to, const Unit& unit) {
  if constexpr (sizeof(Unit) == 16) {
    store_once(to, unit);
  } else {
    *to = unit;
  }
}

// The arguments of a launch.
struct Work {
  Lanes lanes;
  Integers index;
  Integers indptr;
  Integers members;
  int64_t length;
  int64_t num_rows;
  unsigned chunks;
  bool check;
  int64_t* places;  // [length] of any content, to check with

  // The end of a row's members, asserted to lie in order and to begin and end where the arrays do.
  __device__ int64_t checked_end(int64_t row, int64_t begin) const {
    const int64_t end = indptr[row + 1];
    CUDA_KERNEL_ASSERT(begin >= 0 && begin <= end && end <= length && "indptr must not decrease");
    CUDA_KERNEL_ASSERT((row > 0 || begin == 0) && "indptr must start at 0");
    CUDA_KERNEL_ASSERT((row + 1 < num_rows || end == length) && "indptr must end at the length of members");
    return end;
  }

  // members[m], asserted to be an entry that index holds this row for.
  __device__ int64_t checked_member(int64_t row, int64_t m) const {
    const int64_t entry = members[m];
    CUDA_KERNEL_ASSERT(entry >= 0 && entry < length && "members out of range");
    CUDA_KERNEL_ASSERT(index[entry] == row && "indptr and members are not the inverse of index");
    return entry;
  }

  // Asserts that index holds this row for entries m, m + step, ... of a short row's members, and that none is listed
  // twice. Members need not ascend; but between two equal ones, or at the latter, one does not ascend, and those that
  // ascend from there on are compared with all before it.
  __device__ void assert_members(int64_t row, int64_t begin, int64_t end, int64_t m, int64_t step) const {
    for (; m < end; m += step) {
      const int64_t entry = checked_member(row, m);
      if (m == begin || members[m - 1] < entry) {
        continue;
      }
      for (int64_t later = m; later < end && (later == m || members[later - 1] < members[later]); ++later) {
        for (int64_t earlier = begin; earlier < m; ++earlier) {
          CUDA_KERNEL_ASSERT(members[earlier] != members[later] && "members lists an entry twice");
        }
      }
    }
  }

  // Asserts the same for a long row, by all threads of a block, in linear time in any order: each place is written to
  // its entry's slot of `places`, and a slot that two places share keeps one of them. No other row has these slots,
  // since index holds this row there.
  __device__ void assert_members_of_long_row(int64_t row, int64_t begin, int64_t end, unsigned thread) const {
    bool ascends = true;
    for (int64_t m = begin + thread; m < end; m += kBlock) {
      const int64_t entry = checked_member(row, m);
      ascends = ascends && (m == begin || members[m - 1] < entry);
    }
    if (__syncthreads_and(ascends)) {
      return;
    }
    for (int64_t m = begin + thread; m < end; m += kBlock) {
      places[checked_member(row, m)] = m;
    }
    __syncthreads();
    for (int64_t m = begin + thread; m < end; m += kBlock) {
      CUDA_KERNEL_ASSERT(places[checked_member(row, m)] == m && "members lists an entry twice");
    }
    __syncthreads();
  }
};

// The source rows that a step of a sum reads. Their numbers are loaded a step ahead of the rows.
struct Sources {
  int64_t rows[kRowsAtOnce];

  // members[m], members[m + 1], ...; past the last, the last again.
  __device__ void load(const Integers& members, int64_t m, int64_t end) {
    if (members.wide) {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        rows[r] = static_cast<const int64_t*>(members.data)[m + r < end ? m + r : end - 1];
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        rows[r] = static_cast<const int32_t*>(members.data)[m + r < end ? m + r : end - 1];
      }
    }
  }

  __device__ void assert_in_range(int64_t length) const {
    bool in_range = true;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      in_range = in_range && rows[r] >= 0 && rows[r] < length;
    }
    CUDA_KERNEL_ASSERT(in_range && "members out of range");
  }
};

template <typename T, int kWidth>
__device__ inline void load_row(
    const Lane& lane, const Columns<kUnits>& columns, int64_t source, Packed<T, kWidth> (&units)[kUnits]) {
  const auto* row = reinterpret_cast<const Packed<T, kWidth>*>(lane.in + source * lane.stride_bytes);
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    if (columns.has(k)) {
      units[k] = load_unit(columns.at(row, k));
    }
  }
}

// The sums of the rows members[begin:end], added in that order.
template <typename T, int kWidth>
__device__ inline void sum_members(
    const Work& work,
    const Lane& lane,
    const Columns<kUnits>& columns,
    int64_t begin,
    int64_t end,
    Sums<T, kWidth>& sums) {
  sums.reset();
  if (begin == end) {
    return;
  }
  Sources sources;
  sources.load(work.members, begin, end);
  for (int64_t m = begin; m < end; m += kRowsAtOnce) {
    sources.assert_in_range(work.length);
    Packed<T, kWidth> units[kRowsAtOnce][kUnits];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (m + r < end) {
        load_row<T, kWidth>(lane, columns, sources.rows[r], units[r]);
      }
    }
    sources.load(work.members, m + kRowsAtOnce, end);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (m + r < end) {
        sums.add(units[r]);
      }
    }
  }
}

// Each y of a block sums one row; then the whole block sums those of its rows that are long.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kBlock, 5) sum_segments(Work work) {
  using Accumulator = accumulator_t<T>;
  __shared__ int64_t begins[kBlock];
  __shared__ int64_t ends[kBlock];
  __shared__ Accumulator shares[kBlock][kWidth];
  const Lane lane = work.lanes.mine();
  const unsigned chunk = blockIdx.x % work.chunks;
  const Columns<kUnits> columns(chunk, lane.units);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / work.chunks) * blockDim.y;
  const bool check = work.check && chunk == 0 && blockIdx.y == 0;
  int64_t begin = 0;
  int64_t end = 0;
  if (const int64_t row = first_row + threadIdx.y; row < work.num_rows) {
    begin = work.indptr[row];
    end = work.checked_end(row, begin);
    if (end - begin <= kLongSegment) {
      Packed<T, kWidth> units[kUnits];
      if (end - begin == 1) {
        const int64_t source = work.members[begin];
        CUDA_KERNEL_ASSERT(source >= 0 && source < work.length && "members out of range");
        load_row<T, kWidth>(lane, columns, source, units);
      } else {
        Sums<T, kWidth> sums;
        sum_members(work, lane, columns, begin, end, sums);
#pragma unroll
        for (int k = 0; k < kUnits; ++k) {
          units[k] = sums.unit(k, begin == end);
        }
      }
      auto* out = reinterpret_cast<Packed<T, kWidth>*>(lane.out) + row * lane.units;
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        if (columns.has(k)) {
          store_unit(columns.at(out, k), units[k]);
        }
      }
      if (check) {
        work.assert_members(row, begin, end, begin + threadIdx.x, blockDim.x);
      }
    }
  }
  if (!__syncthreads_or(end - begin > kLongSegment)) {
    return;
  }
  if (threadIdx.x == 0) {
    begins[threadIdx.y] = begin;
    ends[threadIdx.y] = end;
  }
  __syncthreads();
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (unsigned y = 0; y < blockDim.y; ++y) {
    const int64_t count = ends[y] - begins[y];
    if (count <= kLongSegment) {
      continue;
    }
    // Each y sums a share of the members, and the shares are added in order, a unit of each thread at a time.
    Sums<T, kWidth> sums;
    sum_members(
        work,
        lane,
        columns,
        begins[y] + count * threadIdx.y / blockDim.y,
        begins[y] + count * (threadIdx.y + 1) / blockDim.y,
        sums);
    auto* out = reinterpret_cast<Packed<T, kWidth>*>(lane.out) + (first_row + y) * lane.units;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        shares[thread][e] = sums.values[k][e];
      }
      __syncthreads();
      if (threadIdx.y == 0 && columns.has(k)) {
        Unpacked<T, kWidth> unit;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          Accumulator total = shares[threadIdx.x][e];
          for (unsigned share = 1; share < blockDim.y; ++share) {
            total = static_cast<Accumulator>(total + shares[share * blockDim.x + threadIdx.x][e]);
          }
          unit.values[e] = static_cast<T>(total);
        }
        store_unit(columns.at(out, k), reinterpret_cast<const Packed<T, kWidth>&>(unit));
      }
      __syncthreads();
    }
    if (check) {
      work.assert_members_of_long_row(first_row + y, begins[y], ends[y], thread);
    }
  }
}

}  // namespace radix
