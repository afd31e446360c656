// Arithmetic on vectors of lanes, for attention on the CPU: a lane is one query of one head, and a vector holds the
// same number of as many lanes as fit. Keys and values are read one number at a time and multiply all lanes, so that
// neither they nor the scores are ever transposed or summed across a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>

// Vectors wider than the file is compiled for stay inside functions that are compiled for them.
#pragma GCC diagnostic ignored "-Wpsabi"

#define RADIX_INLINE inline __attribute__((always_inline))

namespace radix {

// Vectors of kBytes of T, float or double, and of the integers of that width.
template <typename T, int kBytes>
struct Lanes {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kBytes), may_alias));
  typedef Int IntVector __attribute__((vector_size(kBytes), may_alias));
  typedef std::make_unsigned_t<Int> BitVector __attribute__((vector_size(kBytes), may_alias));
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
  // ln 2 in two parts: the product of the first and any exponent is exact.
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
  // Unsigned, since scores of hidden keys, whose result nobody uses, may be positive and overflow.
  const typename L::BitVector power = reinterpret_cast<const typename L::BitVector&>(shifted) << kMantissa;
  const Vector one = Vector{} + T(1);
  const typename L::BitVector scale = reinterpret_cast<const typename L::BitVector&>(one) + power;
  x = x < least ? Vector{} : sum * reinterpret_cast<const Vector&>(scale);
}

// a[row][i] stands at data[row * row_stride + i * stride].
template <typename T>
struct Strided {
  const T* __restrict data;
  int64_t row_stride, stride;
};

// The sums that a product is added to.
enum class Onto { kNothing, kItself, kFaded };

// sums[row][lane] = the sum over i < count of a[row][i] * b[i][lane], of kRows rows and kVectors vectors of lanes:
// times factor onto nothing, or onto sums[row][lane], or onto fade[lane] * sums[row][lane].
template <typename T, int kBytes, int kRows, int kVectors, Onto kOnto>
RADIX_INLINE void multiply_some(
    const Strided<T>& a,
    const T* __restrict b,
    int64_t b_stride,
    int64_t count,
    T factor,
    const T* __restrict fade,
    T* __restrict sums,
    int64_t sums_stride) {
  using L = Lanes<T, kBytes>;
  typename L::Vector inner[kRows][kVectors] = {};
  if constexpr (kOnto != Onto::kNothing) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        inner[row][i] = L::at(sums + row * sums_stride + i * L::kCount);
        if constexpr (kOnto == Onto::kFaded) {
          inner[row][i] *= L::at(fade + i * L::kCount);
        }
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        inner[row][j] += L::at(b + i * b_stride + j * L::kCount) * a.data[row * a.row_stride + i * a.stride];
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      L::at(sums + row * sums_stride + i * L::kCount) =
          kOnto == Onto::kNothing ? inner[row][i] * factor : inner[row][i];
    }
  }
}

// Does the same for num_rows rows, a multiple of kRows, and num_lanes lanes, which fill vectors.
template <typename T, int kBytes, int kRows, Onto kOnto>
RADIX_INLINE void multiply(
    int64_t num_rows,
    int64_t num_lanes,
    const Strided<T>& a,
    const T* b,
    int64_t b_stride,
    int64_t count,
    T factor,
    const T* fade,
    T* sums,
    int64_t sums_stride) {
  constexpr int64_t kCount = Lanes<T, kBytes>::kCount;
  for (int64_t lane = 0; lane < num_lanes;) {
    // 4 vectors go as 2 and 2: one alone would wait for its own sums.
    const int64_t left = (num_lanes - lane) / kCount;
    const int64_t vectors = left == 4 ? 2 : std::min<int64_t>(left, 3);
    for (int64_t row = 0; row < num_rows; row += kRows) {
      const Strided<T> rows{a.data + row * a.row_stride, a.row_stride, a.stride};
      T* const to = sums + row * sums_stride + lane;
      if (vectors == 3) {
        multiply_some<T, kBytes, kRows, 3, kOnto>(
            rows, b + lane, b_stride, count, factor, fade + lane, to, sums_stride);
      } else if (vectors == 2) {
        multiply_some<T, kBytes, kRows, 2, kOnto>(
            rows, b + lane, b_stride, count, factor, fade + lane, to, sums_stride);
      } else {
        multiply_some<T, kBytes, kRows, 1, kOnto>(
            rows, b + lane, b_stride, count, factor, fade + lane, to, sums_stride);
      }
    }
    lane += vectors * kCount;
  }
}

// Takes in the scores of num_keys keys for one vector of lanes: scores become exp(score - largest), `largest` and
// `total`, the sum of exponentials, are brought up to date, and earlier sums must be multiplied by `fade`.
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

// Tells whether no number is infinite or NaN; `count` must be a multiple of a vector's.
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

#if defined(__x86_64__) && defined(__GNUC__)
// Bytes of the processor's vectors, or fewer where ATEN_CPU_CAPABILITY holds it, like torch, to fewer.
inline int vector_bytes() {
  static const int bytes = [] {
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = wanted == nullptr ? "avx512" : wanted;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && most != "default";
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && most != "avx2";
    return has_avx512 ? 64 : has_avx2 ? 32 : 16;
  }();
  return bytes;
}

template <typename Kernel, typename... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(Args&... args) {
  Kernel::template run<64, 8>(args...);
}

template <typename Kernel, typename... Args>
__attribute__((target("avx2,fma"))) void run_avx2(Args&... args) {
  Kernel::template run<32, 4>(args...);
}

// Calls Kernel::run<bytes of a vector, rows that are multiplied together>(args...), which must be RADIX_INLINE, for
// this processor: its registers hold the sums of that many rows.
template <typename Kernel, typename... Args>
void run_for_processor(Args&... args) {
  switch (vector_bytes()) {
    case 64:
      return run_avx512<Kernel>(args...);
    case 32:
      return run_avx2<Kernel>(args...);
    default:
      return Kernel::template run<16, 4>(args...);
  }
}
#else
// 32 registers of 16 bytes, as Arm has them.
template <typename Kernel, typename... Args>
void run_for_processor(Args&... args) {
  Kernel::template run<16, 8>(args...);
}
#endif

}  // namespace radix
