// radix::gather and radix::gather.csr on the CPU: x[index] over dim 0, of any dtype, as copies of rows.
#include "rows.h"

#include <tuple>

namespace radix {
namespace {

// Rows may stand at any byte, so they are moved as bytes; the compiler makes one load and store of each.
template <int64_t kRowBytes, typename Index>
void copy_fixed_rows(const Rows& x, const Index* index, int64_t begin, int64_t end, char* out) {
  const char* data = x.data;
  const int64_t stride_bytes = x.stride_bytes;
  for (int64_t i = begin; i < end; ++i) {
    std::memcpy(out + i * kRowBytes, data + static_cast<int64_t>(index[i]) * stride_bytes, kRowBytes);
  }
}

template <typename Index>
void copy_rows(const Rows& x, const Index* index, int64_t begin, int64_t end, char* out) {
  // Rows of one element are common (ids, positions, masks) and too short for a call each.
  switch (x.row_bytes) {
    case 1:
      return copy_fixed_rows<1>(x, index, begin, end, out);
    case 2:
      return copy_fixed_rows<2>(x, index, begin, end, out);
    case 4:
      return copy_fixed_rows<4>(x, index, begin, end, out);
    case 8:
      return copy_fixed_rows<8>(x, index, begin, end, out);
    default:
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(out + i * x.row_bytes, x.data + static_cast<int64_t>(index[i]) * x.stride_bytes, x.row_bytes);
      }
  }
}

Tensor gather_rows(const char* op, const char* name, const Tensor& x, const Tensor& index) {
  check_index_like(op, "index", index, cpu());
  const Rows rows = rows_of(op, name, x, cpu());
  const Tensor held_index = as_contiguous(index);
  const int64_t length = held_index.size(0);
  Tensor out = empty_rows(x, length, cpu());
  with_index_type(index, [&](auto type) {
    using Index = decltype(type);
    const Index* wanted = static_cast<const Index*>(held_index.const_data_ptr());
    check_in_range(op, "index", wanted, length, rows.count, "rows");
    if (rows.row_bytes > 0) {
      char* out_data = static_cast<char*>(out.mutable_data_ptr());
      parallel_over(
          length, rows.row_bytes, [&](int64_t begin, int64_t end) { copy_rows(rows, wanted, begin, end, out_data); });
    }
  });
  return out;
}

Tensor gather_cpu(const Tensor& x, const Tensor& index) {
  return gather_rows("gather", "x", x, index);
}

// The inverse serves the backward, which checks its values; here the forward needs index alone.
Tensor gather_csr_cpu(const Tensor& x, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather.csr";
  check_index_like(op, "index", index, cpu());
  check_defined(op, "x", x);
  RADIX_CHECK(x.dim() >= 1, op, "x must have at least 1 dimension, got a scalar");
  check_inverse_shapes(op, index, indptr, members, x.size(0), cpu());
  return gather_rows(op, "x", x, index);
}

std::tuple<Tensor, Tensor> gather_kv_cpu(const Tensor& k, const Tensor& v, const Tensor& index) {
  const char* op = "gather_kv";
  check_kv(op, "k", k, "v", v);
  return {gather_rows(op, "k", k, index), gather_rows(op, "v", v, index)};
}

std::tuple<Tensor, Tensor> gather_kv_csr_cpu(
    const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather_kv.csr";
  check_kv(op, "k", k, "v", v);
  check_index_like(op, "index", index, cpu());
  check_inverse_shapes(op, index, indptr, members, k.size(0), cpu());
  return {gather_rows(op, "k", k, index), gather_rows(op, "v", v, index)};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("gather", TORCH_BOX(&radix::gather_cpu));
  m.impl("gather.csr", TORCH_BOX(&radix::gather_csr_cpu));
  m.impl("gather_kv", TORCH_BOX(&radix::gather_kv_cpu));
  m.impl("gather_kv.csr", TORCH_BOX(&radix::gather_kv_csr_cpu));
}
