// Instructions of Hopper (sm_90a) that CUDA C++ has no words for: barriers that count bytes, copies into shared memory
// that nobody waits for, and products of matrices by a warp group, 128 threads.
//
// Matrices lie in shared memory in pieces of [rows][64] 16-bit numbers, a row being 128 bytes, whose 16-byte chunks are
// swizzled: chunk c of row r stands at c ^ (r % 8). A piece begins at a multiple of 1024 bytes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace radix::sm90 {

constexpr int kRowBytes = 128;
constexpr int kWarpGroup = 128;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier's phase ends when `count` arrivals and all bytes announced have come.
__device__ inline void init_barrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes barriers that were just initialised visible to copies of boxes.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits for the end of the barrier's phase of this parity, 0 being that of the first.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "TRY:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra TRY;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void arrive(uint32_t barrier, uint32_t count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void announce_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once when this thread's copies of 16 bytes so far have come.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Tells, without a wait, whether the barrier's phase of this parity has ended.
__device__ inline bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Copies 16 bytes, or none of them and fills with zeros.
__device__ inline void copy_16(uint32_t to, const void* from, bool is_copied) {
  const int bytes = is_copied ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of this thread's copies of 16 bytes.
__device__ inline void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last `kPending` of this thread's groups of copies have come.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Copies the box of a tensor map at (column, row, head); its bytes arrive at the barrier.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int column, int row, int head, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(&map),
      "r"(column),
      "r"(row),
      "r"(head),
      "r"(barrier)
      : "memory");
}

// The same where heads are grouped, at (column, first head of a group, row, group).
__device__ inline void copy_group_box(
    uint32_t to, const CUtensorMap& map, int column, int row, int group, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map),
      "r"(column),
      "r"(0),
      "r"(row),
      "r"(group),
      "r"(barrier)
      : "memory");
}

// Lets products see what this thread, or one that it waited for, wrote to shared memory by other means than boxes.
__device__ inline void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers of `threads` threads, some of which may only arrive.
__device__ inline void meet(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ inline void announce(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A kernel launched to overlap the one before it begins when all thread blocks of that one have called the first, or
// ended. Whoever calls the second waits until that one has ended, and sees what it wrote.
__device__ inline void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ inline void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Stores four 8 x 8 matrices; lanes 8i .. 8i + 7 give the addresses of the rows of matrix i.
__device__ inline void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ inline uint32_t pack(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

__device__ inline float to_float(__half x) {
  return __half2float(x);
}

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Describes a matrix in shared memory for a product. `piece_bytes`, from one piece of 64 columns to the next, matters
// where a product's 16 rows of depth are rows in memory, and its columns go past one piece.
__device__ inline uint64_t describe(uint32_t address, uint32_t piece_bytes = 16) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  return kSwizzle128 | kEightRows << 32 | static_cast<uint64_t>(piece_bytes / 16) << 16 | (address & 0x3FFFF) / 16;
}

// Products run on their own. Before the first, after the last of a group, and until all but `kPending` groups are done:
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void end_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ inline void wait_for_groups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers that products read or write across this line.
template <typename Number, int kCount>
__device__ inline void pin(Number (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Number, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// clang-format off
#define RADIX_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RADIX_32(d) RADIX_8(d, 0), RADIX_8(d, 8), RADIX_8(d, 16), RADIX_8(d, 24)
#define RADIX_64(d) RADIX_32(d), RADIX_8(d, 32), RADIX_8(d, 40), RADIX_8(d, 48), RADIX_8(d, 56)
#define RADIX_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RADIX_NAMES_64 \
  RADIX_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// add_product(d, a, b, adds): d = a b^T, or d += a b^T where `adds`, of a [64][16] and b [columns][16], both described.
// add_product(d, a, b): d += a b of a [64][16] in registers and b [16][columns], described.
#define RADIX_PRODUCTS(NUMBER, PTX, COLUMNS, COUNT, I0, I1, I2, I3, I4) \
  __device__ inline void add_product(float (&d)[COUNT], uint64_t a, uint64_t b, bool adds, NUMBER) { \
    asm volatile( \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %" I2 ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." PTX "." PTX \
        " {" RADIX_NAMES_##COUNT "}, %" I0 ", %" I1 ", adds, 1, 1, 0, 0;\n}\n" \
        : RADIX_##COUNT(d) \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  } \
  __device__ inline void add_product(float (&d)[COUNT], const uint32_t* a, uint64_t b, NUMBER) { \
    asm volatile( \
        "{\n.reg .pred adds;\n.reg .u32 one;\nmov.u32 one, 1;\nsetp.ne.u32 adds, one, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." PTX "." PTX \
        " {" RADIX_NAMES_##COUNT "}, {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", adds, 1, 1, 1;\n}\n" \
        : RADIX_##COUNT(d) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }

RADIX_PRODUCTS(__nv_bfloat16, "bf16", "64", 32, "32", "33", "34", "35", "36")
RADIX_PRODUCTS(__nv_bfloat16, "bf16", "128", 64, "64", "65", "66", "67", "68")
RADIX_PRODUCTS(__half, "f16", "64", 32, "32", "33", "34", "35", "36")
RADIX_PRODUCTS(__half, "f16", "128", 64, "64", "65", "66", "67", "68")
// clang-format on

#undef RADIX_PRODUCTS
#undef RADIX_NAMES_64
#undef RADIX_NAMES_32
#undef RADIX_64
#undef RADIX_32
#undef RADIX_8

}  // namespace radix::sm90
