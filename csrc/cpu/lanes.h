// Arithmetic on vectors of lanes, for attention on the CPU: a lane is one query of one head, and a vector holds the
// same number of as many lanes as fit. Keys and values are read one number at a time and multiply all lanes, so that
// neither they nor the scores are ever transposed or summed across a vector.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

// Vectors wider than what the file is compiled for stay inside of functions that are compiled for them.
#pragma GCC diagnostic ignored "-Wpsabi"

#define RADIX_INLINE inline __attribute__((always_inline))

namespace radix {

// Vectors of kBytes of T, float or double, and of the integers of that width.
template <typename T, int kBytes>
struct Lanes {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kBytes), may_alias));
  typedef Int IntVector __attribute__((vector_size(kBytes), may_alias));
  static constexpr int kCount = kBytes / sizeof(T);

  // `data` must be aligned to kBytes.
  static RADIX_INLINE Vector& at(T* data) {
    return *reinterpret_cast<Vector*>(data);
  }
  static RADIX_INLINE const Vector& at(const T* data) {
    return *reinterpret_cast<const Vector*>(data);
  }
  static RADIX_INLINE const IntVector& at(const Int* data) {
    return *reinterpret_cast<const IntVector*>(data);
  }
};

// x = exp(x) where x <= 0, to two units in the last place; 0 where that is about the smallest normal number or less.
// NaN stays NaN.
template <typename T, int kBytes>
RADIX_INLINE void exp_of_negative(typename Lanes<T, kBytes>::Vector& x) {
  using L = Lanes<T, kBytes>;
  using Vector = typename L::Vector;
  constexpr bool kFloat = sizeof(T) == 4;
  // Adding 1.5 times 2 to the number of mantissa bits rounds to an integer, which then stands in the lowest bits.
  constexpr T kRound = kFloat ? T(12582912.0) : T(6755399441055744.0);
  constexpr T kLog2e = T(1.4426950408889634);
  // ln 2 in two parts, of which the first times any exponent is exact.
  constexpr T kLn2High = kFloat ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T kLn2Low = kFloat ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
  constexpr T kLeast = kFloat ? T(-87.0) : T(-708.0);
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr int kDegree = kFloat ? 7 : 13;
  constexpr T kInverseFactorial[] = {
      T(1),
      T(1),
      T(1.0 / 2),
      T(1.0 / 6),
      T(1.0 / 24),
      T(1.0 / 120),
      T(1.0 / 720),
      T(1.0 / 5040),
      T(1.0 / 40320),
      T(1.0 / 362880),
      T(1.0 / 3628800),
      T(1.0 / 39916800),
      T(1.0 / 479001600),
      T(1.0 / 6227020800),
  };
  const Vector least = Vector{} + kLeast;
  const Vector bounded = x < least ? least : x;
  const Vector shifted = bounded * kLog2e + kRound;
  const Vector exponent = shifted - kRound;
  const Vector rest = (bounded - exponent * kLn2High) - exponent * kLn2Low;
  Vector sum = Vector{} + kInverseFactorial[kDegree];
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) {
    sum = sum * rest + kInverseFactorial[i];
  }
  const typename L::IntVector power = reinterpret_cast<const typename L::IntVector&>(shifted) << kMantissa;
  const Vector one = Vector{} + T(1);
  const typename L::IntVector scale = reinterpret_cast<const typename L::IntVector&>(one) + power;
  x = x < least ? Vector{} : sum * reinterpret_cast<const Vector&>(scale);
}

// scores[key][lane] = factor * sum over d of keys[key][d] * queries[d][lane], of kKeys keys and kVectors vectors.
template <typename T, int kBytes, int kKeys, int kVectors>
RADIX_INLINE void score_lanes(
    const T* __restrict keys,
    const T* __restrict queries,
    int64_t size,
    int64_t num_lanes,
    T factor,
    T* __restrict scores) {
  using L = Lanes<T, kBytes>;
  typename L::Vector sums[kKeys][kVectors] = {};
  for (int64_t d = 0; d < size; ++d) {
#pragma GCC unroll 8
    for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        sums[key][i] += L::at(queries + d * num_lanes + i * L::kCount) * keys[key * size + d];
      }
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      L::at(scores + key * num_lanes + i * L::kCount) = sums[key][i] * factor;
    }
  }
}

// outs[d][lane] = fade[lane] * outs[d][lane] + sum over keys of values[key][d] * weights[key][lane], of kSizes numbers
// of each value and kVectors vectors. `stride` is from one value to the next.
template <typename T, int kBytes, int kSizes, int kVectors>
RADIX_INLINE void add_values(
    const T* __restrict values,
    const T* __restrict weights,
    const T* __restrict fade,
    int64_t num_keys,
    int64_t stride,
    int64_t num_lanes,
    T* __restrict outs) {
  using L = Lanes<T, kBytes>;
  typename L::Vector sums[kSizes][kVectors];
#pragma GCC unroll 8
  for (int d = 0; d < kSizes; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[d][i] = L::at(outs + d * num_lanes + i * L::kCount) * L::at(fade + i * L::kCount);
    }
  }
  for (int64_t key = 0; key < num_keys; ++key) {
#pragma GCC unroll 8
    for (int d = 0; d < kSizes; ++d) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        sums[d][i] += L::at(weights + key * num_lanes + i * L::kCount) * values[key * stride + d];
      }
    }
  }
#pragma GCC unroll 8
  for (int d = 0; d < kSizes; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      L::at(outs + d * num_lanes + i * L::kCount) = sums[d][i];
    }
  }
}

// Of one vector of lanes with the scores of num_keys keys: scores become exp(score - largest), `largest` and `total`,
// the sum of exponentials, take them in, and `fade` says what all before them is multiplied by.
template <typename T, int kBytes>
RADIX_INLINE void add_scores(T* scores, int64_t num_keys, int64_t num_lanes, T* largest, T* total, T* fade) {
  using L = Lanes<T, kBytes>;
  using Vector = typename L::Vector;
  const Vector before = L::at(largest);
  Vector now = before;
  for (int64_t key = 0; key < num_keys; ++key) {
    const Vector score = L::at(scores + key * num_lanes);
    now = score > now ? score : now;
  }
  // A lane that has seen no key yet has -inf here, and -inf from itself is NaN.
  const Vector base = now == -std::numeric_limits<T>::infinity() ? Vector{} : now;
  Vector sum = {};
  for (int64_t key = 0; key < num_keys; ++key) {
    Vector weight = L::at(scores + key * num_lanes) - base;
    exp_of_negative<T, kBytes>(weight);
    L::at(scores + key * num_lanes) = weight;
    sum += weight;
  }
  Vector kept = before - base;
  exp_of_negative<T, kBytes>(kept);
  L::at(fade) = kept;
  L::at(total) = L::at(total) * kept + sum;
  L::at(largest) = now;
}

// Whether none of the numbers is infinite or NaN; `count` must be a multiple of a vector's.
template <typename T, int kBytes>
RADIX_INLINE bool all_finite(const T* data, int64_t count) {
  using L = Lanes<T, kBytes>;
  typename L::Vector sum = {};
  for (int64_t i = 0; i < count; i += L::kCount) {
    sum += L::at(data + i) * T(0);  // NaN where it isn't finite
  }
  bool finite = true;
  for (int i = 0; i < L::kCount; ++i) {
    finite = finite && sum[i] == T(0);
  }
  return finite;
}

}  // namespace radix
