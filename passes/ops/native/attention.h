// softmax(scale q k^T) v, float32, without ever writing the scores.
#pragma once

namespace hasten {

struct Attention {
  const float *q, *k, *v;     // (B, H, N, D), (B, Hk, M, D), (B, Hk, M, Dv), the last axis contiguous
  long qs[3], ks[3], vs[3];   // their other strides, in elements
  long batch, heads, key_heads, n, m, d, dv;
  double scale;
  float* y;                   // (B, N, H, Dv), contiguous
  int threads;
};

void attention(const Attention& job);

}  // namespace hasten
