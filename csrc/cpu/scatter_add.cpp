// radix::scatter_add and radix::scatter_add.csr on the CPU: each output row is one sum over its segment of source
// rows, always in the same order, so the result does not depend on the number of threads.
#include "../integers.h"
#include "index_checks.h"
#include "inverse.h"
#include "parallel.h"

#include <memory>
#include <tuple>
#include <type_traits>

namespace radix {
namespace {

// Columns that one task sums at a time, in a buffer that stays in the first-level cache.
constexpr int64_t kColumns = 2048;
// Source rows added in one pass over that buffer.
constexpr int64_t kRowsAtOnce = 4;

// Memory that is written before it is read.
template <typename T>
using Buffer = std::unique_ptr<T[]>;

template <typename T>
inline Buffer<T> buffer_of(int64_t length) {
  return Buffer<T>(new T[length]);
}

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
  const Buffer<int32_t> targets = buffer_of<int32_t>(rows.count);
  copy_checked(op, "index", as_contiguous(index), rows.count, num_rows, "rows (num_rows)", targets.get());
  Tensor out = empty_rows(src, num_rows, cpu());
  auto sum = [&](auto inverse_type) {
    using Out = decltype(inverse_type);
    const Buffer<Out> indptr = buffer_of<Out>(num_rows + 1);
    const Buffer<Out> members = buffer_of<Out>(rows.count);
    invert_index(targets.get(), rows.count, num_rows, indptr.get(), members.get());
    sum_by_dtype(op, name, rows, indptr.get(), members.get(), num_rows, out);
  };
  rows.count <= kMaxRows ? sum(int32_t{}) : sum(int64_t{});
  return out;
}

// An inverse of an index in memory that nobody else writes to.
template <typename T>
struct Inverse {
  Buffer<T> indptr;
  Buffer<T> members;
};

// Raises unless the members of each row j are the i with index[i] == j, each once: anything else is a wrong sum.
template <typename T>
Inverse<T> checked_inverse(
    const char* op, Integers index, const Tensor& indptr, const Tensor& members, int64_t length, int64_t num_rows) {
  const Tensor held_indptr = as_contiguous(indptr);
  Buffer<T> ends = buffer_of<T>(num_rows + 1);
  const Integers given_ends = integers_of(held_indptr);
  int64_t end = given_ends[0];
  RADIX_CHECK(end == 0, op, "indptr must start at 0, got ", end);
  ends[0] = 0;
  for (int64_t j = 0; j < num_rows; ++j) {
    const int64_t next = given_ends[j + 1];
    RADIX_CHECK(end <= next, op, "indptr must not decrease, got ", end, " and then ", next, " at index ", j + 1);
    end = next;
    ends[j + 1] = static_cast<T>(end);
  }
  RADIX_CHECK(end == length, op, "indptr must end at the length of members, ", length, ", got ", end);
  Buffer<T> entries = buffer_of<T>(length);
  copy_checked(op, "members", as_contiguous(members), length, length, "entries of index", entries.get());
  std::vector<uint8_t> seen(length, 0);
  for (int64_t j = 0; j < num_rows; ++j) {
    for (int64_t m = ends[j]; m < ends[j + 1]; ++m) {
      const int64_t i = entries[m];
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
  return Inverse<T>{std::move(ends), std::move(entries)};
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
  auto sum = [&](auto inverse_type) {
    const auto inverse =
        checked_inverse<decltype(inverse_type)>(op, integers_of(held_index), indptr, members, rows.count, num_rows);
    Tensor out = empty_rows(src, num_rows, cpu());
    sum_by_dtype(op, name, rows, inverse.indptr.get(), inverse.members.get(), num_rows, out);
    return out;
  };
  return rows.count <= kMaxRows ? sum(int32_t{}) : sum(int64_t{});
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
