// radix::gather, gather_kv and their .csr overloads on CUDA: x[index] over dim 0, of any dtype, as copies of rows.
#include "rows.cuh"

#include <tuple>

namespace radix {
namespace {

constexpr int kUnits = 2;
constexpr int kMaxX = 64;

// indptr, which may be null, only tells which rows are worth keeping in the cache: a wrong one costs time.
template <typename Unit>
__global__ void gather_rows(
    Lanes lanes, Integers index, Integers indptr, int64_t length, int64_t num_rows, unsigned chunks) {
  const Lane lane = lanes.mine();
  const int64_t row = static_cast<int64_t>(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  const Columns<kUnits> columns(blockIdx.x % chunks, lane.units);
  if (row >= length) {
    return;
  }
  const int64_t wanted = index[row];
  CUDA_KERNEL_ASSERT(wanted >= 0 && wanted < num_rows && "index out of range");
  const bool keep = indptr.data == nullptr || indptr[wanted + 1] - indptr[wanted] > 1;
  const Unit* in = reinterpret_cast<const Unit*>(lane.in + wanted * lane.stride_bytes);
  Unit* out = reinterpret_cast<Unit*>(lane.out) + row * lane.units;
  Unit held[kUnits];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    if (columns.has(k)) {
      held[k] = load_row(columns.at(in, k), keep);
    }
  }
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    if (columns.has(k)) {
      store_once(columns.at(out, k), held[k]);
    }
  }
}

// Gathers one tensor, or two at once. `indptr` may be null.
template <size_t kCount>
std::array<Tensor, kCount> gather_all(
    const char* op,
    const std::array<Source, kCount>& sources,
    const Tensor& index,
    const Tensor* indptr,
    const Place& place) {
  check_index_like(op, "index", index, place);
  const Tensor held_index = as_contiguous(index);
  const Tensor held_indptr = indptr == nullptr ? Tensor() : as_contiguous(*indptr);
  const int64_t length = index.size(0);
  std::array<Rows, kCount> rows;
  std::array<Tensor, kCount> outs;
  for (size_t t = 0; t < kCount; ++t) {
    rows[t] = rows_of(op, sources[t].name, sources[t].tensor, place);
    outs[t] = empty_rows(sources[t].tensor, length, place);
  }
  const int64_t num_rows = rows[0].count;
  if (length == 0) {
    return outs;
  }
  RADIX_CHECK(num_rows > 0, op, "index holds ", length, " entries, but there are no rows to index");
  const int64_t unit_bytes = unit_bytes_of(rows);
  const Lanes lanes = lanes_of(rows, outs, unit_bytes);
  const Device device(op, place);
  const Tiling tiling = tiling_of<kUnits>(op, length, lanes.most_units(), kCount, kThreads, kMaxX);
  auto launch = [&](auto* kernel) {
    device.launch(
        kernel,
        tiling.grid,
        tiling.block,
        lanes,
        integers_of(held_index),
        indptr == nullptr ? Integers{nullptr, false} : integers_of(held_indptr),
        length,
        num_rows,
        tiling.chunks);
  };
  switch (unit_bytes) {
    case 16:
      launch(&gather_rows<uint4>);
      break;
    case 8:
      launch(&gather_rows<uint2>);
      break;
    case 4:
      launch(&gather_rows<uint32_t>);
      break;
    case 2:
      launch(&gather_rows<uint16_t>);
      break;
    default:
      launch(&gather_rows<uint8_t>);
  }
  return outs;
}

Tensor gather_cuda(const Tensor& x, const Tensor& index) {
  return gather_all<1>("gather", {{{"x", x}}}, index, nullptr, cuda_place({&x, &index}))[0];
}

Tensor gather_csr_cuda(const Tensor& x, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather.csr";
  const Place place = cuda_place({&x, &index, &indptr, &members});
  check_index_like(op, "index", index, place);
  check_defined(op, "x", x);
  RADIX_CHECK(x.dim() >= 1, op, "x must have at least 1 dimension, got a scalar");
  check_inverse_shapes(op, index, indptr, members, x.size(0), place);
  return gather_all<1>(op, {{{"x", x}}}, index, &indptr, place)[0];
}

std::tuple<Tensor, Tensor> gather_kv_cuda(const Tensor& k, const Tensor& v, const Tensor& index) {
  const char* op = "gather_kv";
  check_kv(op, "k", k, "v", v);
  const auto [out_k, out_v] = gather_all<2>(op, {{{"k", k}, {"v", v}}}, index, nullptr, cuda_place({&k, &v, &index}));
  return {out_k, out_v};
}

std::tuple<Tensor, Tensor> gather_kv_csr_cuda(
    const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& indptr, const Tensor& members) {
  const char* op = "gather_kv.csr";
  const Place place = cuda_place({&k, &v, &index, &indptr, &members});
  check_kv(op, "k", k, "v", v);
  check_index_like(op, "index", index, place);
  check_inverse_shapes(op, index, indptr, members, k.size(0), place);
  const auto [out_k, out_v] = gather_all<2>(op, {{{"k", k}, {"v", v}}}, index, &indptr, place);
  return {out_k, out_v};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("gather", TORCH_BOX(&radix::gather_cuda));
  m.impl("gather.csr", TORCH_BOX(&radix::gather_csr_cuda));
  m.impl("gather_kv", TORCH_BOX(&radix::gather_kv_cuda));
  m.impl("gather_kv.csr", TORCH_BOX(&radix::gather_kv_csr_cuda));
}
