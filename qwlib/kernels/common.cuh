// What both sources share: it is put before each of them. HALF: float16 instead of bfloat16.
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// one weight of a launch, N x K
struct Part {
  const uchar* W;        // N x K / 2 bytes, the first code in the upper half
  const void* absmax;    // a scale for each block: uchar with NESTED, else float
  const float* absmax2;  // with NESTED, a second-level scale for each 256 scales
  const float* offset;   // what was subtracted from the scales
  const ushort* bias;    // N, or null
  ushort* y;             // B x N
  int N;
  int begin;             // its first tile of 16 rows; a part that does not exist begins behind the last one
};

__device__ __forceinline__ float widen(ushort value) {
  float r;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(value));
#else
  r = __uint_as_float((uint)value << 16);
#endif
  return r;
}

