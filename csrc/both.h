// Functions that kernels of both devices call.
#pragma once

#ifdef __CUDACC__
#define RADIX_BOTH __host__ __device__
#else
#define RADIX_BOTH
#endif
