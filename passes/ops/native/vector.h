// Vectors of the compiler's own (GCC, Clang): one source for AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hasten {

#if defined(__AVX512F__)
constexpr int VL = 16;    // floats in a vector
constexpr int ROWS = 14;  // tiles of the micro-kernel: ROWS * VECTORS accumulators, VECTORS weights, one to spare
constexpr int VECTORS = 2;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int ROWS = 6;
constexpr int VECTORS = 2;
#else
constexpr int VL = 4;
constexpr int ROWS = 6;
constexpr int VECTORS = 4;
#endif
constexpr int LANES = 16;            // channels that are stored together, whatever the vector
constexpr int KB = VL * VECTORS;     // output channels of a block

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
static inline vf splat(float x) { return x - vf{}; }

// e^x to about one unit in the last place: 2^n * p(r), |r| <= ln(2) / 2. NaN stays NaN.
static inline vf exp_v(vf x) {
  const vf low = splat(-87.33f), high = splat(88.72f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf magic = splat(12582912.f);
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  vi bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const vi half = bits << 23;  // the two factors: 2^n alone would overflow at n = 128
  vf scale;
  const vi one = vi{} + 0x3f800000;
  const vi sum = half + one;
  std::memcpy(&scale, &sum, sizeof scale);
  return p * scale;
}

// x / (1 + e^-x), to about two units in the last place. Below -88 the quotient is less than float32 holds, and what is
// taken for e^-x no longer grows with x: the result is x * 0, so -0, and NaN of -infinity as torch has it.
#if defined(__AVX512F__)
// The division alone would take half of the time: an estimate of the reciprocal and one step of Newton's do not.
static inline vf silu(vf x) {
  const __m512 v = (__m512)x;
  // NaN stays: the second operand wins.
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-88.f), _mm512_min_ps(_mm512_set1_ps(88.f), -v));
  const __m512 n = _mm512_roundscale_ps(t * _mm512_set1_ps(1.44269504088896341f), 8);
  __m512 r = t - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  __m512 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const __m512 d = _mm512_scalef_ps(p, n) + 1.f;
  const __m512 q = _mm512_rcp14_ps(d);
  const __mmask16 known = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-88.f), _CMP_NLT_UQ);
  return (vf)(v * _mm512_maskz_mov_ps(known, q * (2.f - d * q)));
}
#else
static inline vf silu(vf x) {
  const vf y = x / (exp_v(-x) + 1.f);
  return x < splat(-88.f) ? x * 0.f : y;
}
#endif

}  // namespace hasten
