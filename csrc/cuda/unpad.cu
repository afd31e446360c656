// radix::unpad on CUDA; nothing is read on the host.
#include "../unpad.h"
#include "common.cuh"

#include <cooperative_groups.h>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <tuple>

namespace radix {
namespace {

struct Unpadding {
  Mask mask;
  int64_t num_rows;
  int64_t num_columns;
  int32_t* firsts;      // [num_rows] where each row's stretch begins
  int32_t* lengths;     // [num_rows]
  int32_t* broken;      // [num_rows] 1 for a row that is no unbroken stretch
  int32_t* cu_seqlens;  // [num_rows + 1]
  int64_t* places;      // [num_rows * num_columns]
};

struct Join {
  __device__ Stretch operator()(const Stretch& a, const Stretch& b) const {
    return joined(a, b);
  }
};

// The tokens of some rows, and how many of the rows are broken.
struct Row {
  int32_t length;
  int32_t broken;
};

struct AddRows {
  __device__ Row operator()(const Row& a, const Row& b) const {
    return Row{a.length + b.length, a.broken + b.broken};
  }
};

// One kernel, whose blocks wait for each other, as a small batch spends its time on launches.
__global__ void __launch_bounds__(kThreads) unpad_rows(Unpadding to) {
  using Reduce = cub::BlockReduce<Stretch, kThreads>;
  using Scan = cub::BlockScan<Row, kThreads>;
  __shared__ union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  } storage;
  const auto grid = cooperative_groups::this_grid();
  for (int64_t row = blockIdx.x; row < to.num_rows; row += gridDim.x) {
    Stretch stretch = no_stretch(to.num_columns);
    for (int64_t column = threadIdx.x; column < to.num_columns; column += kThreads) {
      stretch = joined(stretch, stretch_of(to.mask[row * to.num_columns + column], column, to.num_columns));
    }
    stretch = Reduce(storage.reduce).Reduce(stretch, Join{});
    if (threadIdx.x == 0) {
      to.firsts[row] = static_cast<int32_t>(stretch.first);
      to.lengths[row] = static_cast<int32_t>(stretch.length());
      to.broken[row] = !stretch.is_unbroken();
    }
    __syncthreads();
  }
  grid.sync();
  if (blockIdx.x == 0) {
    Row total{0, 0};
    for (int64_t base = 0; base < to.num_rows; base += kThreads) {
      const int64_t row = base + threadIdx.x;
      Row rows = row < to.num_rows ? Row{to.lengths[row], to.broken[row]} : Row{0, 0};
      Row sum;
      Scan(storage.scan).InclusiveScan(rows, rows, AddRows{}, sum);
      __syncthreads();
      if (row < to.num_rows) {
        to.cu_seqlens[row + 1] = total.length + rows.length;
      }
      total = AddRows{}(total, sum);
    }
    if (threadIdx.x == 0) {
      to.cu_seqlens[0] = -total.broken;
    }
  }
  grid.sync();
  const int64_t num_tokens = to.num_rows > 0 ? to.cu_seqlens[to.num_rows] : 0;
  for_each(to.num_rows * to.num_columns, [&](int64_t i) {
    const int64_t row = i / to.num_columns;
    const int64_t offset = i - row * to.num_columns - to.firsts[row];
    if (0 <= offset && offset < to.lengths[row]) {
      to.places[(row > 0 ? to.cu_seqlens[row] : 0) + offset] = i;
    }
    if (i >= num_tokens) {
      to.places[i] = 0;
    }
  });
}

std::tuple<Tensor, Tensor> unpad_cuda(const Tensor& attention_mask) {
  const char* op = "unpad";
  const Place place = cuda_place({&attention_mask});
  check_mask(op, attention_mask, place);
  const Tensor held = as_contiguous(attention_mask);
  const int64_t num_rows = held.size(0);
  const Device device(op, place);
  Tensor cu_seqlens = empty_at(place, num_rows + 1, aoti_torch_dtype_int32());
  Tensor places = empty_at(place, held.numel(), aoti_torch_dtype_int64());
  Workspace workspace;
  const int64_t firsts_at = workspace.add<int32_t>(num_rows);
  const int64_t lengths_at = workspace.add<int32_t>(num_rows);
  const int64_t broken_at = workspace.add<int32_t>(num_rows);
  workspace.allocate(place);
  static ConcurrentBlocks known;
  const int64_t wanted = std::max(num_rows, (held.numel() + kThreads - 1) / kThreads);
  device.launch_cooperative(
      &unpad_rows,
      static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, known.of(place, device, &unpad_rows))),
      Unpadding{
          Mask{held.const_data_ptr(), static_cast<int64_t>(held.element_size())},
          num_rows,
          held.size(1),
          workspace.at<int32_t>(firsts_at),
          workspace.at<int32_t>(lengths_at),
          workspace.at<int32_t>(broken_at),
          cu_seqlens.mutable_data_ptr<int32_t>(),
          places.mutable_data_ptr<int64_t>()});
  return {cu_seqlens, places};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CUDA, m) {
  m.impl("unpad", TORCH_BOX(&radix::unpad_cuda));
}
