// Winograd convolution of channels-last float32 maps: what the caller gives.
#pragma once

namespace hasten {

enum class Padding : int { zeros = 0, reflect = 1, replicate = 2, circular = 3 };

struct Conv {
  const float* x;         // (N, C, H, W), any strides
  long xs[4];             // in elements
  const float* u;         // (blocks of K, frequencies, C rounded up to 16, block): transformed weights
  const float* bias;      // (K) or null
  const float* origin;    // (N, C) or null: the convolution reads act_in((x - origin) * scale + shift)
  const float* scale;     // (N, C), null where origin is
  const float* shift;     // (N, C), null where origin is
  const float* add;       // (N, K) or null, added to every pixel
  const float* residual;  // (N, K, OH, OW) or null
  long rs[4];
  float* y;  // (N, K, OH, OW), dense, channels last
  long n, c, h, w, k, oh, ow;
  long top, left;  // padding
  Padding padding;
  bool silu_in, silu_out;
  int threads;
  long workspace;  // bytes that transformed tiles may take
};

// m: 2, 4 or 6 outputs a tile and axis of a 3x3 convolution; phases: the convolution of a map upsampled twice (nearest).
void winograd_conv2d(const Conv& conv, int m, bool phases);
// Bytes of scratch memory that such a call takes.
long winograd_workspace(const Conv& conv, int m, bool phases);

// Weights (K, C, 3, 3) with strides ws, transformed in float64, as Conv::u has them. What is beyond K and C is
// zero.
void winograd_weight(const float* w, const long* ws, long k, long c, int m, bool phases, int threads, float* u);
// (blocks of K, phases, T, T, C rounded up, block): the shape of what winograd_weight makes.
void winograd_weight_shape(long k, long c, int m, bool phases, long* shape);

}  // namespace hasten
