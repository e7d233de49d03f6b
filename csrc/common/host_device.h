// Functions that csrc/cpu and csrc/cuda share. Always inlined: compiled once per ISA, they must leave no symbol behind.
#pragma once

#define SSLOPS_HOST __attribute__((always_inline)) static inline
#ifdef __CUDACC__
#define SSLOPS_HOST_DEVICE __host__ __device__ __forceinline__ static
#else
#define SSLOPS_HOST_DEVICE SSLOPS_HOST
#endif
