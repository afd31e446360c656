// radix::scatter_add and radix::scatter_add.csr on the CPU: each output row is one sum over its segment of source
// rows, always in the same order, so the result does not depend on the number of threads.
#include "inverse.h"
#include "rows.h"

#include <tuple>
#include <type_traits>

namespace radix {
namespace {

// Columns that one task sums at a time, in a buffer that stays in the first-level cache.
constexpr int64_t kColumns = 2048;
// Source rows added in one pass over that buffer.
constexpr int64_t kRowsAtOnce = 4;

// out[c] = sum over i of (row members[i] of src)[column + c], added in the order of members, for c < columns.
template <typename T, typename Index>
RADIX_VECTOR_CLONES void sum_segment(
    const char* data,
    int64_t stride_bytes,
    const Index* members,
    int64_t count,
    int64_t column,
    int64_t columns,
    T* __restrict out) {
  using Accumulator = accumulator_t<T>;
  auto source = [&](int64_t i) {
    return reinterpret_cast<const T*>(data + static_cast<int64_t>(members[i]) * stride_bytes) + column;
  };
  if (count <= 1) {
    if (count == 1) {
      std::memcpy(out, source(0), columns * sizeof(T));
    } else {
      std::memset(out, 0, columns * sizeof(T));
    }
    return;
  }
  Accumulator sum[kColumns];
  const T* first = source(0);
  for (int64_t c = 0; c < columns; ++c) {
    sum[c] = static_cast<Accumulator>(first[c]);
  }
  int64_t i = 1;
  for (; i + kRowsAtOnce <= count; i += kRowsAtOnce) {
    const T *row0 = source(i), *row1 = source(i + 1), *row2 = source(i + 2), *row3 = source(i + 3);
    for (int64_t c = 0; c < columns; ++c) {
      Accumulator total = static_cast<Accumulator>(sum[c] + static_cast<Accumulator>(row0[c]));
      total = static_cast<Accumulator>(total + static_cast<Accumulator>(row1[c]));
      total = static_cast<Accumulator>(total + static_cast<Accumulator>(row2[c]));
      sum[c] = static_cast<Accumulator>(total + static_cast<Accumulator>(row3[c]));
    }
  }
  for (; i < count; ++i) {
    const T* row = source(i);
    for (int64_t c = 0; c < columns; ++c) {
      sum[c] = static_cast<Accumulator>(sum[c] + static_cast<Accumulator>(row[c]));
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    out[c] = static_cast<T>(sum[c]);
  }
}

template <typename T, typename Index>
void sum_segments(const Rows& src, const Index* indptr, const Index* members, int64_t num_rows, Tensor& out) {
  T* out_data = static_cast<T*>(out.mutable_data_ptr());
  const int64_t blocks = (src.width + kColumns - 1) / kColumns;
  const int64_t rows_each = num_rows == 0 ? 0 : 1 + src.count / num_rows;
  parallel_over(
      num_rows * blocks, rows_each * src.row_bytes / std::max<int64_t>(blocks, 1), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / blocks;
          const int64_t column = task % blocks * kColumns;
          sum_segment(
              src.data,
              src.stride_bytes,
              members + indptr[row],
              static_cast<int64_t>(indptr[row + 1] - indptr[row]),
              column,
              std::min(kColumns, src.width - column),
              out_data + row * src.width + column);
        }
      });
}

template <typename Index>
void sum_by_dtype(
    const char* op,
    const char* name,
    const Rows& src,
    const Index* indptr,
    const Index* members,
    int64_t num_rows,
    Tensor& out) {
  with_sum_type(op, name, out, [&](auto type) { sum_segments<decltype(type)>(src, indptr, members, num_rows, out); });
}

Tensor scatter_add_rows(const char* op, const char* name, const Tensor& src, const Tensor& index, int64_t num_rows) {
  check_index_like(op, "index", index, cpu());
  const Rows rows = rows_of(op, name, src, cpu());
  check_scatter_sizes(op, name, rows, index, num_rows);
  const Tensor held_index = as_contiguous(index);
  return with_index_type(index, [&](auto type) {
    using Index = decltype(type);
    const Index* targets = static_cast<const Index*>(held_index.const_data_ptr());
    check_in_range(op, "index", targets, rows.count, num_rows, "rows (num_rows)");
    Tensor out = empty_rows(src, num_rows, cpu());
    auto sum = [&](auto inverse_type) {
      std::vector<decltype(inverse_type)> indptr(num_rows + 1);
      std::vector<decltype(inverse_type)> members(rows.count);
      invert_index(targets, rows.count, num_rows, indptr.data(), members.data());
      sum_by_dtype(op, name, rows, indptr.data(), members.data(), num_rows, out);
    };
    rows.count <= kMaxRows ? sum(int32_t{}) : sum(int64_t{});
    return out;
  });
}

// Raises unless the members of each row j are the i with index[i] == j, each once: anything else is a wrong sum.
template <typename Index, typename Inverse>
void check_inverse(
    const char* op,
    const Index* index,
    const Inverse* indptr,
    const Inverse* members,
    int64_t length,
    int64_t num_rows) {
  RADIX_CHECK(indptr[0] == 0, op, "indptr must start at 0, got ", indptr[0]);
  for (int64_t j = 0; j < num_rows; ++j) {
    RADIX_CHECK(
        indptr[j] <= indptr[j + 1],
        op,
        "indptr must not decrease, got ",
        indptr[j],
        " and then ",
        indptr[j + 1],
        " at index ",
        j + 1);
  }
  RADIX_CHECK(
      indptr[num_rows] == length, op, "indptr must end at the length of members, ", length, ", got ", indptr[num_rows]);
  check_in_range(op, "members", members, length, length, "entries of index");
  std::vector<uint8_t> seen(length, 0);
  for (int64_t j = 0; j < num_rows; ++j) {
    for (int64_t m = indptr[j]; m < indptr[j + 1]; ++m) {
      const int64_t i = members[m];
      RADIX_CHECK(
          index[i] == j && !seen[i],
          op,
          "indptr and members are not the inverse of index: members[",
          m,
          "] is ",
          i,
          " under row ",
          j,
          seen[i] ? ", listed twice" : ", but index holds another row there");
      seen[i] = 1;
    }
  }
}

Tensor scatter_add_csr_rows(
    const char* op,
    const char* name,
    const Tensor& src,
    const Tensor& index,
    const Tensor& indptr,
    const Tensor& members,
    int64_t num_rows) {
  check_index_like(op, "index", index, cpu());
  const Rows rows = rows_of(op, name, src, cpu());
  check_scatter_sizes(op, name, rows, index, num_rows);
  check_inverse_shapes(op, index, indptr, members, num_rows, cpu());
  const Tensor held_index = as_contiguous(index);
  return with_index_type(index, [&](auto index_type) {
    using Index = decltype(index_type);
    // indptr and members may differ in type; they are int32 together or both read as int64.
    const bool narrow = is_int32(indptr) && is_int32(members);
    auto run = [&](auto inverse_type) {
      using Inverse = decltype(inverse_type);
      auto held_as = [](const Tensor& tensor) {
        constexpr ScalarType wanted = std::is_same_v<Inverse, int32_t> ? ScalarType::Int : ScalarType::Long;
        return as_contiguous(tensor.scalar_type() == wanted ? tensor : torch::stable::to(tensor, wanted));
      };
      const Tensor held_indptr = held_as(indptr);
      const Tensor held_members = held_as(members);
      const Inverse* starts = static_cast<const Inverse*>(held_indptr.const_data_ptr());
      const Inverse* entries = static_cast<const Inverse*>(held_members.const_data_ptr());
      check_inverse(op, static_cast<const Index*>(held_index.const_data_ptr()), starts, entries, rows.count, num_rows);
      Tensor out = empty_rows(src, num_rows, cpu());
      sum_by_dtype(op, name, rows, starts, entries, num_rows, out);
      return out;
    };
    return narrow ? run(int32_t{}) : run(int64_t{});
  });
}

Tensor scatter_add_cpu(const Tensor& src, const Tensor& index, int64_t num_rows) {
  return scatter_add_rows("scatter_add", "src", src, index, num_rows);
}

Tensor scatter_add_csr_cpu(
    const Tensor& src, const Tensor& index, const Tensor& indptr, const Tensor& members, int64_t num_rows) {
  return scatter_add_csr_rows("scatter_add.csr", "src", src, index, indptr, members, num_rows);
}

std::tuple<Tensor, Tensor> scatter_add_kv_cpu(
    const Tensor& src_k, const Tensor& src_v, const Tensor& index, int64_t num_rows) {
  const char* op = "scatter_add_kv";
  check_kv(op, "src_k", src_k, "src_v", src_v);
  return {scatter_add_rows(op, "src_k", src_k, index, num_rows), scatter_add_rows(op, "src_v", src_v, index, num_rows)};
}

std::tuple<Tensor, Tensor> scatter_add_kv_csr_cpu(
    const Tensor& src_k,
    const Tensor& src_v,
    const Tensor& index,
    const Tensor& indptr,
    const Tensor& members,
    int64_t num_rows) {
  const char* op = "scatter_add_kv.csr";
  check_kv(op, "src_k", src_k, "src_v", src_v);
  return {
      scatter_add_csr_rows(op, "src_k", src_k, index, indptr, members, num_rows),
      scatter_add_csr_rows(op, "src_v", src_v, index, indptr, members, num_rows)};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("scatter_add", TORCH_BOX(&radix::scatter_add_cpu));
  m.impl("scatter_add.csr", TORCH_BOX(&radix::scatter_add_csr_cpu));
  m.impl("scatter_add_kv", TORCH_BOX(&radix::scatter_add_kv_cpu));
  m.impl("scatter_add_kv.csr", TORCH_BOX(&radix::scatter_add_kv_csr_cpu));
}
