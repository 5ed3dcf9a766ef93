// y = x W^T + bias for 1 to 16 rows of x and W in 4 bits, as bitsandbytes stores it; compute capability 8.0 and later.
//
//     y[b, n] = bias[n] + sum over k of x[b, k] * level[code[n, k]] * scale[(n K + k) / block] / gain
//
// `level` are the levels of the code book times `gain`, a number for which they lose little when they are rounded to 16 bits.
//
// One block of threads computes 16 rows of W at a time (a tile), and its warps share the columns. Each warp copies pieces of
// 16 rows x 256 columns (128 bytes a row) into a ring of its own by cp.async, several pieces ahead. It waits for other warps
// only at the sum over all columns.
//
// A byte has two codes. Both are looked up at once: a table in shared memory has a pair of 16-bit levels for each of the 256
// bytes, and a copy of that for each of the 32 lanes, so that two lanes never meet in a bank (32 KB). The pairs are operands of
// the tensor core's m16n8k16 as they come out of the table. Its order of columns differs from that of W, which changes nothing
// if x is read in the same order.
//
// A scale multiplies the float32 sum of 64 columns, not the 64 weights. With PIECES, scales are copied with the codes: blocks
// of 64 and columns a multiple of 256. Otherwise each thread reads them from memory when it needs them.
//
// PDL (programmatic dependent launch, compute capability 9.0): codes and table are fetched before the kernel waits for the one
// before it, whose result it needs in x only.
//
// Set by the compiler's options: WARPS, STAGES (of the ring), WIDE (rows of x: 1, 8 or 16), HALF (float16 instead of bfloat16),
// NESTED (scales are 8-bit codes with second-level scales), PIECES, PDL. SUMS and STAGE are known to `linear4bit.py` too.
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
#define ROW 160                                    // 128 bytes, padded against bank conflicts
#define SCALES (NESTED ? 128 : 256)                // 16 x 4 codes and 16 second-level scales, or 16 x 4 floats
#define STAGE (16 * ROW + SCALES)
#define NT ((WIDE + 7) / 8)                        // operands of 8 rows of x
#define SUMS 20                                    // 16 sums, padded against bank conflicts
#define LOOK(s) (*(const uint*)(table + (((s) & 0x7f80u) | lane4)))

__device__ __forceinline__ uint pack(float low, float high) {
  uint r;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float unpack(ushort value) {
  float r;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(value));
#else
  r = __uint_as_float((uint)value << 16);
#endif
  return r;
}

__device__ __forceinline__ void mma(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// not through the read-only cache: x may be written by the kernel before, while this one has already started
__device__ __forceinline__ uint4 read16(const ushort* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes into shared memory; zeros if `there` is false
__device__ __forceinline__ void copy16(uint to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0));
}

__device__ __forceinline__ void copy4(uint to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) linear4bit(
    const uchar* __restrict__ W,        // N x K / 2 bytes, the first code in the upper half
    const void* __restrict__ absmax,    // a scale for each block: uchar with NESTED, else float
    const float* __restrict__ code2,    // 256 levels of the scales' codes, with NESTED
    const float* __restrict__ absmax2,  // a second-level scale for each 256 scales
    const float* __restrict__ offset,   // what was subtracted from the scales
    const float* __restrict__ level,    // 16 levels, times gain
    const ushort* x,                    // B x K
    const ushort* __restrict__ bias,    // N, or null
    ushort* y,                          // B x N
    int N, int K, int B, int shift,     // blocks have 2^shift weights, 64 at least
    float gain) {
  extern __shared__ __align__(128) uchar smem[];
  uchar* table = smem;
  float* levels2 = (float*)(smem + 32768);
  uchar* ring = smem + 32768 + 1024;
  float* sums = (float*)(ring + WARPS * STAGES * STAGE);  // twice, so that a tile need not wait for the last one's readers
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint lane4 = lane * 4;
  const int units = K >> 6, chunks = (units + 3) >> 2, tiles = (N + 15) >> 4;
  const int mine = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int each = (chunks - warp + WARPS - 1) / WARPS;
  const size_t rowbytes = K >> 1;
  uchar* own = ring + warp * STAGES * STAGE;
  const uint own_s = (uint)__cvta_generic_to_shared(own);

  int next_tile = 0, next_piece = 0, slot = 0;
  auto fetch = [&]() {
    if (next_tile < mine && each > 0) {
      const int first = (blockIdx.x + next_tile * gridDim.x) * 16, c = warp + next_piece * WARPS;
      const bool there = c * 4 + ((lane & 7) >> 1) < units;
      const uint to = own_s + slot * STAGE + (lane >> 3) * ROW + (lane & 7) * 16;
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = min(first + (lane >> 3) + 4 * i, N - 1);
        copy16(to + i * 4 * ROW, there ? W + row * rowbytes + c * 128 + (lane & 7) * 16 : W, there);
      }
#if PIECES
      const size_t at = (size_t)min(first + (lane & 15), N - 1) * units + c * 4;
      const uint scales = own_s + slot * STAGE + 16 * ROW;
#if NESTED
      copy4(scales + lane4, lane < 16 ? (const void*)((const uchar*)absmax + at) : (const void*)(absmax2 + (at >> 8)));
#else
      if (lane < 16) copy16(scales + lane * 16, (const float*)absmax + at, true);
#endif
#endif
      if (++next_piece == each) { next_piece = 0; next_tile++; }
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    asm volatile("cp.async.commit_group;");
  };
  #pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch();

  for (int i = threadIdx.x; i < 2048; i += WARPS * 32) {
    const int byte = i >> 3;
    const uint v = pack(level[byte >> 4], level[byte & 15]);
    ((uint4*)table)[i] = make_uint4(v, v, v, v);
  }
#if NESTED
  for (int i = threadIdx.x; i < 256; i += WARPS * 32) levels2[i] = code2[i];
  const float off = offset[0];
#endif
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __syncthreads();

  auto scale = [&](int row, int unit) -> float {
    if (unit >= units) return 0.0f;
    const size_t at = ((size_t)min(row, N - 1) * K + unit * 64) >> shift;
#if NESTED
    return levels2[((const uchar*)absmax)[at]] * absmax2[at >> 8] + off;
#else
    return ((const float*)absmax)[at];
#endif
  };
  uint xb[NT][4][8];
  auto read_x = [&](int c) {
    #pragma unroll
    for (int n = 0; n < NT; n++)
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        uint4 p = make_uint4(0, 0, 0, 0), q = p;
        if (n * 8 + g < B && c * 4 + u < units) {
          const ushort* s = x + (size_t)(n * 8 + g) * K + (c * 4 + u) * 64 + t * 16;
          p = read16(s);
          q = read16(s + 8);
        }
        xb[n][u][0] = p.x; xb[n][u][1] = p.y; xb[n][u][2] = p.z; xb[n][u][3] = p.w;
        xb[n][u][4] = q.x; xb[n][u][5] = q.y; xb[n][u][6] = q.z; xb[n][u][7] = q.w;
      }
  };
  const bool once = chunks <= WARPS;  // a warp has the same columns in every tile
  if (once && each > 0) read_x(warp);

  int use = 0;
  for (int i = 0; i < mine; i++) {
    const int first = (blockIdx.x + i * gridDim.x) * 16;
    float total[NT][4] = {};
    for (int j = 0; j < each; j++) {
      const int c = warp + j * WARPS;
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2));
      __syncwarp();
      const uchar* at = own + use * STAGE;
      if (!once) read_x(c);
      float s0[4], s1[4];
#if PIECES && NESTED
      const uint q0 = *(const uint*)(at + 16 * ROW + g * 4), q1 = *(const uint*)(at + 16 * ROW + (g + 8) * 4);
      const float f0 = *(const float*)(at + 16 * ROW + 64 + g * 4), f1 = *(const float*)(at + 16 * ROW + 64 + (g + 8) * 4);
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        s0[u] = levels2[(q0 >> (8 * u)) & 255] * f0 + off;
        s1[u] = levels2[(q1 >> (8 * u)) & 255] * f1 + off;
      }
#elif PIECES
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        s0[u] = ((const float*)(at + 16 * ROW + g * 16))[u];
        s1[u] = ((const float*)(at + 16 * ROW + (g + 8) * 16))[u];
      }
#else
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        s0[u] = scale(first + g, c * 4 + u);
        s1[u] = scale(first + g + 8, c * 4 + u);
      }
#endif
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        const uint2 v0 = *(const uint2*)(at + g * ROW + u * 32 + t * 8), v1 = *(const uint2*)(at + (g + 8) * ROW + u * 32 + t * 8);
        float part[NT][4] = {};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint p = h ? v0.y : v0.x, q = h ? v1.y : v1.x;
          const uint p0 = LOOK(p << 7), p1 = LOOK(p >> 1), p2 = LOOK(p >> 9), p3 = LOOK(p >> 17);
          const uint r0 = LOOK(q << 7), r1 = LOOK(q >> 1), r2 = LOOK(q >> 9), r3 = LOOK(q >> 17);
          #pragma unroll
          for (int n = 0; n < NT; n++) {
            mma(part[n], p0, r0, p1, r1, xb[n][u][4 * h], xb[n][u][4 * h + 1]);
            mma(part[n], p2, r2, p3, r3, xb[n][u][4 * h + 2], xb[n][u][4 * h + 3]);
          }
        }
        #pragma unroll
        for (int n = 0; n < NT; n++) {
          total[n][0] += s0[u] * part[n][0];
          total[n][1] += s0[u] * part[n][1];
          total[n][2] += s1[u] * part[n][2];
          total[n][3] += s1[u] * part[n][3];
        }
      }
      __syncwarp();
      fetch();
      use = use + 1 == STAGES ? 0 : use + 1;
    }
    float* out = sums + (i & 1) * WARPS * WIDE * SUMS;
    #pragma unroll
    for (int n = 0; n < NT; n++) {
      float* o = out + (warp * WIDE + n * 8 + 2 * t) * SUMS + g;
      if (WIDE > 1 || t == 0) { o[0] = total[n][0]; o[8] = total[n][2]; }
      if (WIDE > 1) { o[SUMS] = total[n][1]; o[SUMS + 8] = total[n][3]; }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 16 * B; k += WARPS * 32) {
      const int n = k / 16, r = k % 16;
      float sum = 0;
      #pragma unroll
      for (int w = 0; w < WARPS; w++) sum += out[(w * WIDE + n) * SUMS + r];
      sum /= gain;
      if (first + r < N) {
        if (bias) sum += unpack(bias[first + r]);
        y[(size_t)n * N + first + r] = (ushort)pack(sum, 0);
      }
    }
  }
}
