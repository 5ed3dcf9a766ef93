// y = x W^T + bias for 1 to 16 rows of x and W in 4 bits, as bitsandbytes stores it; compute capability 8.0 and later.
//
//     y[b, n] = bias[n] + sum over k of x[b, k] * (gain * level[code[n, k]]) * scale[(n K + k) / block] / gain
//
// The brackets are rounded to 16 bits, and `gain` is a number for which the levels of the code book lose little by that.
// Up to four weights that are multiplied by the same x (query, key and value) are parts of one launch. Each keeps its tensors.
//
// One block of threads computes 16 rows of W at a time (a tile), and its warps share the columns. Each warp copies pieces of
// 16 rows x 256 columns (128 bytes a row) into a ring of its own by cp.async, several pieces ahead. It waits for other warps
// only at the sum over all columns, which is taken for one row of x once in four tiles.
//
// A byte has two codes. Both are looked up at once: a table in shared memory has a pair of 16-bit levels for each of the 256
// bytes, and a copy of that for each of the 32 lanes, so that two lanes never meet in a bank (32 KB). Where there is room, the
// table is spread over 64 KB, of which half stays empty: then one instruction makes an address instead of two. The pairs are
// operands of the tensor core's m16n8k16 as they come out of the table. Its order of columns differs from that of W, which
// changes nothing if x is read in the same order.
//
// x stays in registers where a warp has the same columns in every tile (16 pieces a row). With more pieces, x for the next one is
// read while this one is multiplied.
//
// A scale multiplies the float32 sum of 64 columns, not the 64 weights. With PIECES, scales are copied with the codes: blocks
// of 64 and columns a multiple of 256. Otherwise each thread reads them from memory when it needs them. With HALVES, a scale
// multiplies the sum of 32 columns: blocks of 32, and columns that are a multiple of 32 only.
//
// PDL (programmatic dependent launch, compute capability 9.0): codes and table are fetched before the kernel waits for the one
// before it, whose result it needs in x only.
//
// Set by the compiler's options: WARPS, STAGES (of the ring), WIDE (rows of x: 1, 8 or 16), HALF (float16 instead of bfloat16),
// NESTED (scales are 8-bit codes with second-level scales), PIECES, HALVES, SPREAD, PDL. `linear4bit.py` knows Part, and the bytes
// of ROW, STAGE, SUMS, GROUP and TABLE.

#define UNITS 4                                    // of 64 columns, in a piece
#define COLUMNS (64 * UNITS)
#define ROW (HALVES ? 144 : 160)                   // 128 bytes, padded against bank conflicts
#define SCALES (NESTED ? 128 : 64 * UNITS)         // 16 x 4 codes and 16 second-level scales, or 16 x UNITS floats
#define STAGE (16 * ROW + SCALES)
#define NT ((WIDE + 7) / 8)                        // operands of 8 rows of x
#define SUMS 20                                    // 16 sums, padded against bank conflicts
#define GROUP (WIDE == 1 ? 4 : 1)                  // tiles whose sums over all columns are taken at once
#define SHARES (HALVES ? 2 : 1)                    // scales of a row and 64 columns
#define TABLE (SPREAD ? 65536 : 32768)
// the pair of levels for one of the four bytes of `codes`, from this lane's copy of the table
#if SPREAD
#define LOOK(codes, byte) (*(const uint*)(table + __byte_perm(codes, lane4, 0x5504 | (byte) << 4)))
#else
#define LOOK(codes, byte) (*(const uint*)(table + (((byte) ? (codes) >> (8 * (byte) - 7) : (codes) << 7) & 0x7f80u | lane4)))
#endif

__device__ __forceinline__ uint pack(float low, float high) {
  uint r;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
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

struct Parts { Part at[4]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) linear4bit(
    const float* __restrict__ code2,   // 256 levels of the scales' codes, with NESTED
    const float* __restrict__ level,   // 16 levels
    const ushort* x,                   // B x K
    int tiles, int K, int B, int shift,  // blocks have 2^shift weights, 64 at least; 32 with HALVES
    float gain, const __grid_constant__ Parts parts) {
  extern __shared__ __align__(128) uchar smem[];
  uchar* table = smem;
  float* levels2 = (float*)(smem + TABLE);
  float* offsets = levels2 + 256;
  uchar* ring = smem + TABLE + 1024 + 128;
  float* sums = (float*)(ring + WARPS * STAGES * STAGE);  // twice, so that a tile need not wait for the last one's readers
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint lane4 = lane * 4;
  const int units = (K + 63) >> 6, chunks = (units + UNITS - 1) / UNITS;
  const int mine = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  // In every tile a warp has the chunks slot, slot + WARPS and so on. Where these are not as many for all slots, the warps take
  // turns. Sums are kept by slot, so that the result does not depend on which warp it was.
  auto slot_of = [&](int i) { return (warp + i * chunks) & (WARPS - 1); };
  const size_t rowbytes = K >> 1;
  uchar* own = ring + warp * STAGES * STAGE;
  const uint own_s = (uint)__cvta_generic_to_shared(own);

  auto part_of = [&](int tile) {
    return (tile >= parts.at[1].begin) + (tile >= parts.at[2].begin) + (tile >= parts.at[3].begin);
  };

  int next_tile = -1, next_chunk = chunks, stage = 0, rows_in = 0, first_in = 0;
  const uchar *codes_in = nullptr, *scales_in = nullptr;
  const float* scales2_in = nullptr;
  auto fetch = [&]() {
    while (next_chunk >= chunks && ++next_tile < mine) {
      next_chunk = slot_of(next_tile);
      const int tile = blockIdx.x + next_tile * gridDim.x;
      const Part& part = parts.at[part_of(tile)];
      rows_in = part.N - 1;
      first_in = (tile - part.begin) * 16;
      codes_in = part.W;
      scales_in = (const uchar*)part.absmax;
      scales2_in = part.absmax2;
    }
    if (next_tile < mine) {
      const int c = next_chunk;
      const int across = lane % (2 * UNITS), down = lane / (2 * UNITS);
      const bool there = c * COLUMNS + across * 32 < K;
      const uint to = own_s + stage * STAGE + down * ROW + across * 16;
      #pragma unroll
      for (int i = 0; i < UNITS; i++) {
        const int row = min(first_in + down + 16 / UNITS * i, rows_in);
        copy16(to + i * (16 / UNITS) * ROW, there ? codes_in + row * rowbytes + c * (COLUMNS / 2) + across * 16 : codes_in, there);
      }
#if PIECES
      const size_t at = (size_t)min(first_in + (lane & 15), rows_in) * units + c * UNITS;
      const uint scales = own_s + stage * STAGE + 16 * ROW;
#if NESTED
      copy4(scales + lane4, lane < 16 ? (const void*)(scales_in + at) : (const void*)(scales2_in + (at >> 8)));
#else
      if (lane < 16) copy16(scales + lane * 16, (const float*)scales_in + at, true);
#endif
#endif
      next_chunk += WARPS;
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    asm volatile("cp.async.commit_group;");
  };
  const float own_level = gain * level[lane & 15];  // asked for before the codes, or it would come behind them
#if NESTED
  const float own_level2 = code2[threadIdx.x & 255];
  const float* of_part = threadIdx.x < 4 ? parts.at[threadIdx.x].offset : nullptr;
  const float own_offset = of_part ? *of_part : 0.0f;
#endif
  #pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch();

  #pragma unroll
  for (int i = threadIdx.x; i < 2048; i += WARPS * 32) {
    const int byte = i >> 3;
    const uint v = pack(__shfl_sync(~0u, own_level, byte >> 4), __shfl_sync(~0u, own_level, byte & 15));
    ((uint4*)table)[byte * (TABLE / 4096) + (i & 7)] = make_uint4(v, v, v, v);
  }
#if NESTED
  levels2[threadIdx.x & 255] = own_level2;
  if (threadIdx.x < 4) offsets[threadIdx.x] = own_offset;
#endif
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __syncthreads();

#if !PIECES
  auto scale = [&](const Part& part, float off, int row, int column) -> float {
    if (column >= K) return 0.0f;
    const size_t at = ((size_t)min(row, part.N - 1) * K + column) >> shift;
#if NESTED
    return levels2[((const uchar*)part.absmax)[at]] * part.absmax2[at >> 8] + off;
#else
    return ((const float*)part.absmax)[at];
#endif
  };
#endif
  uint xb[NT][UNITS][8];
  auto read_x = [&](int c, int u) {
    #pragma unroll
    for (int n = 0; n < NT; n++) {
      uint4 p = make_uint4(0, 0, 0, 0), q = p;
      const int column = (c * UNITS + u) * 64;
      const ushort* s = x + (size_t)(n * 8 + g) * K + column;
#if HALVES
      if (n * 8 + g < B && column < K) p = read16(s + t * 8);
      if (n * 8 + g < B && column + 32 < K) q = read16(s + 32 + t * 8);
#else
      if (n * 8 + g < B && column < K) {
        p = read16(s + t * 16);
        q = read16(s + t * 16 + 8);
      }
#endif
      xb[n][u][0] = p.x; xb[n][u][1] = p.y; xb[n][u][2] = p.z; xb[n][u][3] = p.w;
      xb[n][u][4] = q.x; xb[n][u][5] = q.y; xb[n][u][6] = q.z; xb[n][u][7] = q.w;
    }
  };
  const bool ahead = chunks > WARPS;  // x for the next piece is read while this one is multiplied
  #pragma unroll
  for (int u = 0; u < UNITS; u++) read_x(slot_of(0), u);

  int use = 0;
  for (int i = 0; i < mine; i++) {
    const int tile = blockIdx.x + i * gridDim.x;
    const int number = part_of(tile), slot = slot_of(i);
#if !PIECES
    const Part& part = parts.at[number];
    const int first = (tile - part.begin) * 16;
#endif
#if NESTED
    const float off = offsets[number];
#else
    const float off = 0;
#endif
    float total[NT][4] = {};
    for (int c = slot; c < chunks; c += WARPS) {
      const int after = c + WARPS < chunks ? c + WARPS : slot_of(i + 1);
      #pragma unroll
      for (int u = 0; u < UNITS; u++)
        if (chunks < WARPS) read_x(c, u);
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2));
      __syncwarp();
      const uchar* at = own + use * STAGE;
      float s0[UNITS * SHARES], s1[UNITS * SHARES];
#if PIECES && NESTED
      const uint q0 = *(const uint*)(at + 16 * ROW + g * 4), q1 = *(const uint*)(at + 16 * ROW + (g + 8) * 4);
      const float f0 = *(const float*)(at + 16 * ROW + 64 + g * 4), f1 = *(const float*)(at + 16 * ROW + 64 + (g + 8) * 4);
      #pragma unroll
      for (int u = 0; u < UNITS; u++) {
        s0[u] = levels2[(q0 >> (8 * u)) & 255] * f0 + off;
        s1[u] = levels2[(q1 >> (8 * u)) & 255] * f1 + off;
      }
#elif PIECES
      #pragma unroll
      for (int u = 0; u < UNITS; u++) {
        s0[u] = ((const float*)(at + 16 * ROW + g * 4 * UNITS))[u];
        s1[u] = ((const float*)(at + 16 * ROW + (g + 8) * 4 * UNITS))[u];
      }
#else
      #pragma unroll
      for (int u = 0; u < UNITS * SHARES; u++) {
        s0[u] = scale(part, off, first + g, c * COLUMNS + u * (64 / SHARES));
        s1[u] = scale(part, off, first + g + 8, c * COLUMNS + u * (64 / SHARES));
      }
#endif
      #pragma unroll
      for (int u = 0; u < UNITS; u++) {
#if HALVES
        const uchar* a = at + g * ROW + u * 32 + t * 4;
        const uint2 v0 = make_uint2(*(const uint*)a, *(const uint*)(a + 16));
        const uint2 v1 = make_uint2(*(const uint*)(a + 8 * ROW), *(const uint*)(a + 8 * ROW + 16));
#else
        const uchar* a = at + g * ROW + u * 32 + t * 8;
        const uint2 v0 = *(const uint2*)a, v1 = *(const uint2*)(a + 8 * ROW);
#endif
        float sum[NT][4] = {};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint p = h ? v0.y : v0.x, q = h ? v1.y : v1.x;
          const uint p0 = LOOK(p, 0), p1 = LOOK(p, 1), p2 = LOOK(p, 2), p3 = LOOK(p, 3);
          const uint r0 = LOOK(q, 0), r1 = LOOK(q, 1), r2 = LOOK(q, 2), r3 = LOOK(q, 3);
          #pragma unroll
          for (int n = 0; n < NT; n++) {
            mma(sum[n], p0, r0, p1, r1, xb[n][u][4 * h], xb[n][u][4 * h + 1]);
            mma(sum[n], p2, r2, p3, r3, xb[n][u][4 * h + 2], xb[n][u][4 * h + 3]);
          }
          if (h == 0 && SHARES == 1) continue;
          const int share = SHARES * u + (SHARES == 2 ? h : 0);
          #pragma unroll
          for (int n = 0; n < NT; n++) {
            total[n][0] += s0[share] * sum[n][0];
            total[n][1] += s0[share] * sum[n][1];
            total[n][2] += s1[share] * sum[n][2];
            total[n][3] += s1[share] * sum[n][3];
            if (SHARES == 2) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
          }
        }
        if (ahead) read_x(after, u);
      }
      __syncwarp();
      fetch();
      use = use + 1 == STAGES ? 0 : use + 1;
    }
    float* out = sums + ((i / GROUP & 1) * GROUP + i % GROUP) * WARPS * WIDE * SUMS;
    #pragma unroll
    for (int n = 0; n < NT; n++) {
      float* o = out + (slot * WIDE + n * 8 + 2 * t) * SUMS + g;
      if (WIDE > 1 || t == 0) { o[0] = total[n][0]; o[8] = total[n][2]; }
      if (WIDE > 1) { o[SUMS] = total[n][1]; o[SUMS + 8] = total[n][3]; }
    }
    const int back = i % GROUP;
    if (back != GROUP - 1 && i != mine - 1) continue;
    __syncthreads();
    for (int k = threadIdx.x; k < (back + 1) * 16 * B; k += WARPS * 32) {
      const int of = k / (16 * B), n = k / 16 - of * B, r = k % 16;
      const int its = tile - (back - of) * (int)gridDim.x;
      const Part& part = parts.at[part_of(its)];
      const float* from = out - (back - of) * WARPS * WIDE * SUMS;
      float all = 0;
      #pragma unroll
      for (int w = 0; w < WARPS; w++) all += from[(w * WIDE + n) * SUMS + r];
      all /= gain;
      const int row = (its - part.begin) * 16 + r;
      if (row < part.N) {
        if (part.bias) all += widen(part.bias[row]);
        part.y[(size_t)n * part.N + row] = (ushort)pack(all, 0);
      }
    }
  }
}
