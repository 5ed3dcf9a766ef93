// Two kernels without tensor cores, for any shape that bitsandbytes stores and compute capability 7.5 and later.
//
// plain4bit       y = x W^T + bias for 1 to 16 rows of x. A warp sums the products of one row of W in float32.
// dequantize4bit  W in 16 bits: level * scale, rounded once. These are the bytes that bitsandbytes' own kernel writes.
//
// Codes lie one behind the other through all rows, two in a byte, the first in the upper half. Where rows have a multiple of 8
// columns, 8 codes are read at once, and lie in one block. Otherwise they are read one by one.
//
// Set by the compiler's options: WIDE (rows of x at most), HALF (float16 instead of bfloat16), NESTED (scales are 8-bit codes
// with second-level scales, one for 256 of them).

#define WARPS 8

// compute capability 7.5 has no instruction that rounds to bfloat16
__device__ __forceinline__ ushort narrow(float value) {
  ushort r;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
#elif __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
#else
  const uint bits = __float_as_uint(value);
  r = value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#endif
  return r;
}

// the 16 levels, once for each lane, so that lanes never meet in a bank of shared memory
#define TABLES                                                                                           \
  __shared__ float levels[16 * 32];                                                                      \
  __shared__ float levels2[256];                                                                         \
  for (int i = threadIdx.x; i < 16 * 32; i += WARPS * 32) levels[i] = level[i >> 5];                     \
  if (NESTED)                                                                                            \
    for (int i = threadIdx.x; i < 256; i += WARPS * 32) levels2[i] = code2[i];                           \
  __syncthreads();                                                                                       \
  const float off = NESTED ? *offset : 0.0f;                                                             \
  const int lane = threadIdx.x & 31;                                                                     \
  auto look = [&](uint code) { return levels[(code & 15) * 32 + lane]; };                                \
  auto scale = [&](size_t element) {                                                                     \
    const size_t at = element >> shift;                                                                  \
    if (!NESTED) return ((const float*)absmax)[at];                                                      \
    return __fadd_rn(__fmul_rn(levels2[((const uchar*)absmax)[at]], absmax2[at >> 8]), off);             \
  };                                                                                                     \
  auto one = [&](size_t element) { return look(element & 1 ? W[element >> 1] : W[element >> 1] >> 4); };

extern "C" __global__ void __launch_bounds__(WARPS * 32) plain4bit(
    const float* code2, const float* level, const ushort* x, int K, int B, int shift, const __grid_constant__ Part part) {
  const uchar* W = part.W;
  const void* absmax = part.absmax;
  const float *absmax2 = part.absmax2, *offset = part.offset;
  const int N = part.N;
  TABLES
  for (int n = blockIdx.x * WARPS + (threadIdx.x >> 5); n < N; n += gridDim.x * WARPS) {
    const size_t start = (size_t)n * K;
    float sum[WIDE] = {};
    if (K % 8 == 0) {
      for (int k = lane * 8; k < K; k += 256) {
        const uint codes = *(const uint*)(W + ((start + k) >> 1));
        const float s = scale(start + k);
        float w[8];
        #pragma unroll
        for (int j = 0; j < 8; j++) w[j] = s * look(codes >> (8 * (j >> 1) + (j & 1 ? 0 : 4)));
        #pragma unroll
        for (int b = 0; b < WIDE; b++)
          if (b < B) {
            const uint4 v = *(const uint4*)(x + (size_t)b * K + k);
            const uint pairs[4] = {v.x, v.y, v.z, v.w};
            #pragma unroll
            for (int j = 0; j < 8; j++) sum[b] += w[j] * widen((ushort)(pairs[j >> 1] >> (16 * (j & 1))));
          }
      }
    } else {
      for (int k = lane; k < K; k += 32) {
        const float w = scale(start + k) * one(start + k);
        #pragma unroll
        for (int b = 0; b < WIDE; b++)
          if (b < B) sum[b] += w * widen(x[(size_t)b * K + k]);
      }
    }
    #pragma unroll
    for (int b = 0; b < WIDE; b++) {
      #pragma unroll
      for (int far = 16; far; far >>= 1) sum[b] += __shfl_xor_sync(0xffffffffu, sum[b], far);
      if (lane == 0 && b < B) part.y[(size_t)b * N + n] = narrow(part.bias ? sum[b] + widen(part.bias[n]) : sum[b]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize4bit(
    const float* code2, const float* level, const uchar* W, const void* absmax, const float* absmax2, const float* offset,
    ushort* y, int N, int K, int shift) {
  TABLES
  const size_t all = (size_t)N * K, whole = all / 8, step = (size_t)gridDim.x * WARPS * 32;
  const size_t first = (size_t)blockIdx.x * WARPS * 32 + threadIdx.x;
  #pragma unroll 4
  for (size_t i = first; i < whole; i += step) {
    const uint codes = ((const uint*)W)[i];
    const float s = scale(i * 8);
    uint pairs[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint low = narrow(__fmul_rn(look(codes >> (8 * j + 4)), s)), high = narrow(__fmul_rn(look(codes >> (8 * j)), s));
      pairs[j] = low | high << 16;
    }
    ((uint4*)y)[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  for (size_t i = whole * 8 + first; i < all; i += step) y[i] = narrow(__fmul_rn(one(i), scale(i)));
}
