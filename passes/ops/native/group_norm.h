// GroupNorm statistics and application, float32.
#pragma once

namespace hasten {

struct GroupNorm {
  const float* x;  // (N, C, pixels)
  bool channels_last;
  long n, c, pixels, groups;
  const float* weight;  // (C) or null
  const float* bias;    // (C) or null
  const float* scale;   // (N, C) or null: multiplies what weight and bias made
  const float* shift;   // (N, C) or null: then added
  long scale_row, scale_step, shift_row, shift_step;  // strides of scale and shift in elements; 0 where it is broadcast
  double eps;
  int threads;
};

// (3, N, C): the normalised map is (x - out[0]) * out[1] + out[2].
void group_norm_affine(const GroupNorm& norm, float* out);
// y = act((x - a[0]) * a[1] + a[2]) with a as above; y may not overlap x.
void apply_affine(const GroupNorm& norm, const float* affine, bool silu, float* y);

}  // namespace hasten
