// GroupNorm in two passes over memory: per-channel sums, then one multiply-add and the activation.
//
// A run of a plane is read twice, the second time from the first-level cache: for a mean, then for sums and squares about
// it, in float32. Channels last, where a run is whole lines of all channels, it is read once, about the mean of the run
// before (of the first, its own): how far these two are apart is part of the variance, so no digits of it are lost.
// Across runs, and across channels, they are put together in float64 with Chan's formula. So neither a large mean nor a
// first pixel unlike the others costs digits.

#include "group_norm.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace hasten {
namespace {

constexpr long RUN = 64;        // pixels that are summed in float32, channels last
constexpr long PLANE_RUN = 4096;  // floats of a plane that are summed in float32
constexpr int UNROLL = 4;       // vectors of channels whose sums are independent
constexpr int WIDE = 8;         // the same where there are as many: memory is read faster in longer pieces

// Add what a run of n pixels has about `centre` to sums about `origin`.
void add_run(double n, double centre, double origin, double s, double q, double* sum, double* square) {
  const double off = centre - origin;
  *sum += s + n * off;
  *square += q + off * (2 * s + n * off);
}

// Sums and squares of the run [begin, end) about `centres`, of the U vectors of channels from `ch` on.
template <int U>
void run_about(const float* x, long c, long begin, long end, long ch, const float* centres, float* s_out, float* q_out) {
  vf k[U], s[U] = {}, q[U] = {};
  for (int j = 0; j < U; ++j) k[j] = load(centres + ch + j * VL);
  for (long p = begin; p < end; ++p)
    for (int j = 0; j < U; ++j) {
      const vf d = load(x + p * c + ch + j * VL) - k[j];
      s[j] += d;
      q[j] += d * d;
    }
  for (int j = 0; j < U; ++j) {
    store(s_out + ch + j * VL, s[j]);
    store(q_out + ch + j * VL, q[j]);
  }
}

// Sums over the runs of [first, last) of one picture, channels last, about its first pixel; sums and squares are (C) each.
void sums_channels_last(const float* x, long c, long first, long last, double* sums, double* squares) {
  std::vector<float> room(3 * c);
  float *centres = room.data(), *s = centres + c, *q = s + c;
  const float* start = x + first * c;
  const long head = std::min(RUN, last - first);
  for (long p = 0; p < head; ++p)
    for (long ch = 0; ch < c; ++ch) centres[ch] += (start[p * c + ch] - start[ch]) / head;
  for (long ch = 0; ch < c; ++ch) centres[ch] += start[ch];

  for (long begin = first; begin < last; begin += RUN) {
    const long end = std::min(begin + RUN, last);
    long ch = 0;
    for (; ch + WIDE * VL <= c; ch += WIDE * VL) run_about<WIDE>(x, c, begin, end, ch, centres, s, q);
    for (; ch + UNROLL * VL <= c; ch += UNROLL * VL) run_about<UNROLL>(x, c, begin, end, ch, centres, s, q);
    for (; ch + VL <= c; ch += VL) run_about<1>(x, c, begin, end, ch, centres, s, q);
    for (; ch < c; ++ch) {
      s[ch] = q[ch] = 0;
      for (long p = begin; p < end; ++p) {
        const float d = x[p * c + ch] - centres[ch];
        s[ch] += d;
        q[ch] += d * d;
      }
    }
    const float part = 1.f / (end - begin);
    for (ch = 0; ch < c; ++ch) {
      add_run(end - begin, centres[ch], x[ch], s[ch], q[ch], sums + ch, squares + ch);
      centres[ch] += s[ch] * part;
    }
  }
}

double total(const vf* values) {
  double sum = 0;
  for (int j = 0; j < UNROLL; ++j)
    for (int l = 0; l < VL; ++l) sum += values[j][l];
  return sum;
}

// Sums over one plane, about its first pixel.
void sums_plane(const float* x, long pixels, double* sum, double* square) {
  for (long begin = 0; begin < pixels; begin += PLANE_RUN) {
    const long end = std::min(begin + PLANE_RUN, pixels), whole = end - (end - begin) % (UNROLL * VL);
    const float first = x[begin];
    vf s[UNROLL] = {}, q[UNROLL] = {};
    for (long p = begin; p < whole; p += UNROLL * VL)
      for (int j = 0; j < UNROLL; ++j) s[j] += load(x + p + j * VL) - first;
    double mean = total(s);
    for (long p = whole; p < end; ++p) mean += x[p] - first;
    const float centre = (float)(first + mean / (end - begin));
    for (int j = 0; j < UNROLL; ++j) s[j] = vf{};
    for (long p = begin; p < whole; p += UNROLL * VL)
      for (int j = 0; j < UNROLL; ++j) {
        const vf d = load(x + p + j * VL) - centre;
        s[j] += d;
        q[j] += d * d;
      }
    double run_sum = total(s), run_square = total(q);
    for (long p = whole; p < end; ++p) {
      const double d = (double)x[p] - centre;
      run_sum += d;
      run_square += d * d;
    }
    add_run(end - begin, centre, x[0], run_sum, run_square, sum, square);
  }
}

float at(const float* values, long row, long step, long n, long c) { return values[n * row + c * step]; }

}  // namespace

void group_norm_affine(const GroupNorm& norm, float* out) {
  const long n = norm.n, c = norm.c, pixels = norm.pixels, width = c / norm.groups;
  const int parts = norm.channels_last ? norm.threads : 1;
  std::vector<double> sums(parts * n * c * 2);
  if (norm.channels_last) {
#pragma omp parallel for num_threads(norm.threads) collapse(2)
    for (long b = 0; b < n; ++b)
      for (int part = 0; part < parts; ++part) {
        const float* x = norm.x + b * pixels * c;
        double* to = sums.data() + (part * n + b) * c * 2;
        sums_channels_last(x, c, pixels * part / parts, pixels * (part + 1) / parts, to, to + c);
      }
  } else {
#pragma omp parallel for num_threads(norm.threads)
    for (long plane = 0; plane < n * c; ++plane) {
      const float* x = norm.x + plane * pixels;
      double* to = sums.data() + plane / c * c * 2 + plane % c;
      sums_plane(x, pixels, to, to + c);
    }
  }
  float *origins = out, *scales = out + n * c, *shifts = out + 2 * n * c;
  for (long b = 0; b < n; ++b)
    for (long g = 0; g < norm.groups; ++g) {
      double mean = 0, m2 = 0;
      std::vector<double> means(width), m2s(width);
      for (long i = 0; i < width; ++i) {
        const long ch = g * width + i;
        double s = 0, q = 0;
        for (int part = 0; part < parts; ++part) {
          s += sums[(part * n + b) * c * 2 + ch];
          q += sums[(part * n + b) * c * 2 + c + ch];
        }
        const double first = norm.channels_last ? norm.x[b * pixels * c + ch] : norm.x[(b * c + ch) * pixels];
        means[i] = first + s / pixels;
        m2s[i] = q - s * s / pixels;
        mean += means[i] / width;
      }
      for (long i = 0; i < width; ++i) m2 += m2s[i] + pixels * (means[i] - mean) * (means[i] - mean);
      m2 /= (double)pixels * width;
      const double rstd = 1 / std::sqrt((m2 < 0 ? 0 : m2) + norm.eps);
      const float origin = (float)mean;
      for (long i = 0; i < width; ++i) {
        const long ch = g * width + i;
        double a = rstd * (norm.weight != nullptr ? norm.weight[ch] : 1.0);
        // What the mean loses when it becomes a float goes into the shift.
        double shift = (origin - mean) * a + (norm.bias != nullptr ? norm.bias[ch] : 0.0);
        if (norm.scale != nullptr) {
          const double factor = at(norm.scale, norm.scale_row, norm.scale_step, b, ch);
          a *= factor;
          shift *= factor;
        }
        if (norm.shift != nullptr) shift += at(norm.shift, norm.shift_row, norm.shift_step, b, ch);
        origins[b * c + ch] = origin;
        scales[b * c + ch] = (float)a;
        shifts[b * c + ch] = (float)shift;
      }
    }
}

namespace {

template <bool SILU>
void apply_lines(const GroupNorm& norm, const float* affine, float* y) {
  const long n = norm.n, c = norm.c, pixels = norm.pixels;
  const float *origins = affine, *scales = affine + n * c, *shifts = affine + 2 * n * c;
  auto one = [](float x, float k, float a, float b) {
    vf value = (splat(x) - k) * a + b;
    if (SILU) value = silu(value);
    return value[0];
  };
  if (norm.channels_last) {
#pragma omp parallel for num_threads(norm.threads)
    for (long row = 0; row < n * pixels; ++row) {
      const long at = row / pixels * c;
      const float* from = norm.x + row * c;
      float* to = y + row * c;
      long ch = 0;
      for (; ch + VL <= c; ch += VL) {
        vf value = (load(from + ch) - load(origins + at + ch)) * load(scales + at + ch) + load(shifts + at + ch);
        if (SILU) value = silu(value);
        store(to + ch, value);
      }
      for (; ch < c; ++ch) to[ch] = one(from[ch], origins[at + ch], scales[at + ch], shifts[at + ch]);
    }
    return;
  }
#pragma omp parallel for num_threads(norm.threads)
  for (long plane = 0; plane < n * c; ++plane) {
    const float* from = norm.x + plane * pixels;
    const float k = origins[plane], a = scales[plane], b = shifts[plane];
    float* to = y + plane * pixels;
    long p = 0;
    for (; p + VL <= pixels; p += VL) {
      vf value = (load(from + p) - k) * a + b;
      if (SILU) value = silu(value);
      store(to + p, value);
    }
    for (; p < pixels; ++p) to[p] = one(from[p], k, a, b);
  }
}

}  // namespace

void apply_affine(const GroupNorm& norm, const float* affine, bool silu, float* y) {
  silu ? apply_lines<true>(norm, affine, y) : apply_lines<false>(norm, affine, y);
}

}  // namespace hasten
