// radix::unpad on the CPU.
#include "../unpad.h"

#include <tuple>

namespace radix {
namespace {

std::tuple<Tensor, Tensor> unpad_cpu(const Tensor& attention_mask) {
  check_mask("unpad", attention_mask, cpu());
  const Tensor held = as_contiguous(attention_mask);
  const Mask mask{held.const_data_ptr(), static_cast<int64_t>(held.element_size())};
  const int64_t num_rows = held.size(0);
  const int64_t num_columns = held.size(1);
  Tensor cu_seqlens = empty_at(cpu(), num_rows + 1, aoti_torch_dtype_int32());
  Tensor places = empty_at(cpu(), held.numel(), aoti_torch_dtype_int64());
  int32_t* ends = cu_seqlens.mutable_data_ptr<int32_t>();
  int64_t* place = places.mutable_data_ptr<int64_t>();
  int64_t num_tokens = 0;
  int32_t num_broken = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    Stretch stretch = no_stretch(num_columns);
    for (int64_t column = 0; column < num_columns; ++column) {
      stretch = joined(stretch, stretch_of(mask[row * num_columns + column], column, num_columns));
    }
    num_broken += !stretch.is_unbroken();
    for (int64_t i = 0; i < stretch.length(); ++i) {
      place[num_tokens++] = row * num_columns + stretch.first + i;
    }
    ends[row + 1] = static_cast<int32_t>(num_tokens);
  }
  ends[0] = -num_broken;
  std::fill(place + num_tokens, place + held.numel(), int64_t{0});
  return {cu_seqlens, places};
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("unpad", TORCH_BOX(&radix::unpad_cpu));
}
