// Attention in one pass over keys and values: Milakov and Gimelshein's online softmax (arXiv 1805.02867) by blocks, as
// FlashAttention (arXiv 2205.14135) orders it. Everything is transposed: vectors run along queries, so that no sum ever
// crosses lanes and any head width fills them.
//
// A block is WIDE vectors of queries, kept as Q^T (D, queries), times scale * log2(e), and O^T (Dv, queries). For STEP keys
// at a time S^T = K Q^T is summed in registers and leaves them as P^T = 2^(S^T - m); after KEYS keys O^T += V^T P^T, STEP
// values at a time, in registers too. A thread takes as many blocks as its second-level cache holds and goes over the keys
// once for all of them.
//
// m is no running maximum: it is raised only where the weights of STEP keys add up to more than LARGEST. Weights are no less
// exact for being larger than 1, and O^T is hardly ever rescaled.

#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "scratch.h"
#include "transpose.h"
#include "vector.h"

namespace hasten {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int STEP = 8;  // 32 registers: STEP * WIDE sums, WIDE operands, one broadcast
#else
constexpr int STEP = 4;
#endif
constexpr int WIDE = 3;
constexpr long KEYS = 64;    // of a block; float32 sums of weights are no longer than this
constexpr long DEPTH = 128;  // channels that are summed at a stretch: the error does not grow with the width
// Bytes of Q^T and O^T that a thread works on, out of a cache of half a megabyte or more. Heads so wide that fewer than FEWEST
// blocks would fit take that many all the same: packing the keys for each block would cost more than what does not fit.
constexpr long STATE = 384 << 10, FEWEST = 4;
constexpr float LARGEST = 256.f;
constexpr double LOG2_E = 1.4426950408889634;
constexpr float LOWEST = -std::numeric_limits<float>::max();

long divide_up(long a, long b) { return (a + b - 1) / b; }
long round_up(long a, long b) { return divide_up(a, b) * b; }

// 2^x to less than one unit in the last place: 2^n * p(r), |r| <= 1/2, p the minimax polynomial with p(0) = 1. NaN stays
// NaN, -inf gives 0; where the result is below 2^-126 it is 0 but with AVX-512, which has such numbers too.
inline vf exp2_v(vf x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, 8);
  const __m512 r = (__m512)x - n;
#else
  const vf low = splat(-126.f), high = splat(128.f);
  const vi kept = (x >= low) | (x != x);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf magic = splat(12582912.f);
  const vf shifted = x + magic;
  const vf n = shifted - magic, r = x - n;
#endif
  auto p = r * 1.532646565e-4f + 1.339080627e-3f;
  p = p * r + 9.618505836e-3f;
  p = p * r + 5.550359935e-2f;
  p = p * r + 2.402264774e-1f;
  p = p * r + 6.931471825e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps(p, n);  // of NaN, which r is at -inf, and -inf: 0
#else
  vi exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits = (bits + (exponent << 23)) & kept;
  std::memcpy(&p, &bits, sizeof p);
  return p;
#endif
}

// V vectors of queries.
struct Block {
  float* q;      // (D, V * VL)
  float* o;      // (Dv, V * VL)
  float* most;   // (V * VL): m
  float* total;  // (V * VL): sums of the weights
};

struct Widths {
  long d, dv;  // multiples of STEP, what is beyond is zero
};

// VL rows of VL floats, times `factor` lane by lane, to columns; the last of `rows` stands in for those that are missing.
void transpose(const float* from, long step, long rows, vf factor, float* to, long to_step) {
  vf r[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = load(from + std::min<long>(i, rows - 1) * step) * factor;
  transpose_rows<VL>(r);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) store(to + i * to_step, r[i]);
}

// Q^T of a block of `width` queries, `rows` of which there are.
void load_queries(const Attention& job, const Widths& widths, const float* q, long rows, long width, float* to) {
  const long step = job.qs[2], d = job.d;
  const float factor = static_cast<float>(job.scale * LOG2_E);
  for (long r = 0; r < width; r += VL) {
    const long here = std::min<long>(VL, rows - r);
    for (long c = 0; c < d && d >= VL; c += VL) {
      const long at = std::min(c, d - VL);  // the last columns twice rather than a few of them one by one
      for (int i = 0; i < VL && r + VL + i < rows; ++i) __builtin_prefetch(q + (r + VL + i) * step + at);
      transpose(q + r * step + at, step, here, splat(factor), to + at * width + r, width);
    }
    for (long c = 0; c < d && d < VL; ++c)
      for (long i = 0; i < VL; ++i) to[c * width + r + i] = q[(r + std::min(i, here - 1)) * step + c] * factor;
  }
  std::fill(to + d * width, to + widths.d * width, 0.f);
}

// O^T divided by the sums of the weights, to `rows` rows of the result.
void store_result(const Attention& job, const Block& block, long rows, long width, float* y) {
  const long step = job.heads * job.dv, dv = job.dv;
  for (long r = 0; r < rows; r += VL) {
    const vf factor = 1.f / load(block.total + r);
    if (r + VL <= rows && dv >= VL) {
      for (long c = 0; c < dv; c += VL) {
        const long at = std::min(c, dv - VL);
        for (int i = 0; i < VL && r + VL + i < rows; ++i) __builtin_prefetch(y + (r + VL + i) * step + at, 1);
        transpose(block.o + at * width + r, width, VL, factor, y + r * step + at, step);
      }
      continue;
    }
    for (long i = 0; i < std::min<long>(VL, rows - r); ++i)
      for (long c = 0; c < dv; ++c) y[(r + i) * step + c] = block.o[c * width + r + i] * factor[i];
  }
}

// Rows of keys or values side by side: as they lie, a stride apart, they would share a few lines of the first-level cache.
void pack(const float* from, long step, long rows, long columns, float* to, long to_columns, long to_rows) {
  for (long r = 0; r < rows; ++r, from += step, to += to_columns) {
    long c = 0;
    for (; c + VL <= columns; c += VL) store(to + c, load(from + c));
    for (; c < columns; ++c) to[c] = from[c];
    for (; c < to_columns; ++c) to[c] = 0.f;
  }
  std::fill(to, to + (to_rows - rows) * to_columns, 0.f);
}

// sums[i][j] = sum over t < depth of a[i * row + t * column] * b[t * V + j].
template <int V>
[[gnu::always_inline]] inline void multiply(const float* a, long row, long column, const float* b, long depth, vf (&sums)[STEP][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < STEP; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = vf{};
#pragma GCC unroll 2
  for (long t = 0; t < depth; ++t) {
    vf w[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) w[j] = load(b + (t * V + j) * VL);
#pragma GCC unroll 8
    for (int i = 0; i < STEP; ++i) {
      const vf x = splat(a[i * row + t * column]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += x * w[j];
    }
  }
}

// S^T of STEP keys, -inf for those from `left` on.
template <int V, bool TAIL>
[[gnu::always_inline]] inline void scores(const Block& block, const float* k, long d, long left, vf (&s)[STEP][V]) {
  multiply<V>(k, d, 1, block.q, std::min(d, DEPTH), s);
  for (long t = DEPTH; __builtin_expect(t < d, 0); t += DEPTH) {
    vf more[STEP][V];
    multiply<V>(k + t, d, 1, block.q + t * V * VL, std::min(d - t, DEPTH), more);
#pragma GCC unroll 8
    for (int i = 0; i < STEP; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) s[i][j] += more[i][j];
  }
  if constexpr (TAIL) {
#pragma GCC unroll 8
    for (int i = 1; i < STEP; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) s[i][j] = i < left ? s[i][j] : splat(-std::numeric_limits<float>::infinity());
  }
}

// P^T of STEP keys, and its sums.
template <int V>
[[gnu::always_inline]] inline void weights(const vf (&s)[STEP][V], const vf* most, float* p, vf* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < STEP; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const vf e = exp2_v(s[i][j] - most[j]);
      sums[j] = i == 0 ? e : sums[j] + e;
      store(p + (i * V + j) * VL, e);
    }
}

// `weights` after m was raised to the largest score: what was made with the old m, by `before` keys here and, unless the
// block is `fresh`, by those of earlier calls, is brought to the new one.
template <int V, bool TAIL>
[[gnu::noinline]] void raise(const Block& block, const Widths& widths, const float* k, long left, long before, bool fresh,
                             float* p, vf* most, vf* total, vf* sums) {
  vf s[STEP][V], factor[V];
  scores<V, TAIL>(block, k, widths.d, left, s);
  for (int j = 0; j < V; ++j) {
    const vf old = most[j];
    for (int i = 0; i < STEP; ++i) most[j] = s[i][j] > most[j] ? s[i][j] : most[j];
    factor[j] = exp2_v(old - most[j]);
    total[j] *= factor[j];
    if (!fresh) store(block.total + j * VL, load(block.total + j * VL) * factor[j]);
  }
  for (float* at = p - before * V * VL; at < p; at += V * VL)
    for (int j = 0; j < V; ++j) store(at + j * VL, load(at + j * VL) * factor[j]);
  for (float* at = block.o; !fresh && at < block.o + widths.dv * V * VL; at += V * VL)
    for (int j = 0; j < V; ++j) store(at + j * VL, load(at + j * VL) * factor[j]);
  weights<V>(s, most, p, sums);
}

inline bool any_above(vf a, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  const vi above = a > limit;
  int64_t words[sizeof above / 8], any = 0;
  std::memcpy(words, &above, sizeof above);
  for (const int64_t word : words) any |= word;
  return any != 0;
#endif
}

template <int V, bool TAIL>
[[gnu::always_inline]] inline void attend_step(const Block& block, const Widths& widths, const float* k, long left, long before,
                                               bool fresh, float* p, vf* most, vf* total) {
  vf sums[V];
  {
    vf s[STEP][V];
    scores<V, TAIL>(block, k, widths.d, left, s);
    weights<V>(s, most, p, sums);
  }
  bool above = false;
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) above |= any_above(sums[j], LARGEST);
  if (__builtin_expect(above, 0)) raise<V, TAIL>(block, widths, k, left, before, fresh, p, most, total, sums);
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) total[j] += sums[j];
}

// A block and `keys` keys and values, packed; p is room for (KEYS, V * VL). A `fresh` block has met no keys before.
template <int V>
void attend(const Block& block, const Widths& widths, const float* k, const float* v, long keys, bool fresh, float* p) {
  const auto [d, dv] = widths;
  vf most[V], total[V];
  for (int j = 0; j < V; ++j) most[j] = fresh ? splat(LOWEST) : load(block.most + j * VL), total[j] = vf{};
  long t = 0;
  if (fresh) {  // any weight would exceed LARGEST
    keys < STEP ? raise<V, true>(block, widths, k, keys, 0, true, p, most, total, total)
                : raise<V, false>(block, widths, k, STEP, 0, true, p, most, total, total);
    t = std::min<long>(STEP, keys);
  }
  for (; t + STEP <= keys; t += STEP)
    attend_step<V, false>(block, widths, k + t * d, STEP, t, fresh, p + t * V * VL, most, total);
  if (t < keys) attend_step<V, true>(block, widths, k + t * d, keys - t, t, fresh, p + t * V * VL, most, total);
  for (int j = 0; j < V; ++j) {
    store(block.most + j * VL, most[j]);
    store(block.total + j * VL, fresh ? total[j] : load(block.total + j * VL) + total[j]);
  }
  for (long c = 0; c < dv; c += STEP) {
    vf sums[STEP][V];
    multiply<V>(v + c, 1, dv, p, keys, sums);
    float* o = block.o + c * V * VL;
#pragma GCC unroll 8
    for (int i = 0; i < STEP; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        float* at = o + (i * V + j) * VL;
        store(at, fresh ? sums[i][j] : load(at) + sums[i][j]);
      }
  }
}

// Blocks [first, last) of one head of one sample.
struct Task {
  const float *q, *k, *v;
  float* y;
  long first, last;
};

class Worker {
 public:
  Worker(const Attention& job, float* memory)
      : job_(job), widths_{round_up(job.d, STEP), round_up(job.dv, STEP)}, p_(memory) {}

  static long block_floats(const Attention& job) {
    return WIDE * VL * (round_up(job.d, STEP) + round_up(job.dv, STEP) + 2);
  }

  // What a worker on that many blocks at once needs: whole cache lines.
  static long floats(const Attention& job, long blocks) {
    const long packed = round_up(job.d, STEP) + round_up(job.dv, STEP);
    return round_up(KEYS * (WIDE * VL + packed) + blocks * block_floats(job), 16);
  }

  void run(const Task& task) const {
    float* const k = p_ + KEYS * WIDE * VL;
    float* const v = k + KEYS * widths_.d;
    for (long i = task.first; i < task.last; ++i) {
      const long row = i * WIDE * VL;
      load_queries(job_, widths_, task.q + row * job_.qs[2], job_.n - row, width(i), at(task, i).q);
    }
    for (long t = 0; t < job_.m; t += KEYS) {
      const long keys = std::min(KEYS, job_.m - t), more = std::min(KEYS, job_.m - t - keys);
      pack(task.k + t * job_.ks[2], job_.ks[2], keys, job_.d, k, widths_.d, round_up(keys, STEP));
      pack(task.v + t * job_.vs[2], job_.vs[2], keys, job_.dv, v, widths_.dv, keys);
      for (long i = task.first; i < task.last; ++i) {
        const long share = divide_up(more, task.last - task.first), begin = (i - task.first) * share;
        for (long r = begin; r < std::min(begin + share, more); ++r) prefetch(task, t + keys + r);
        switch (width(i) / VL) {
          case 1: attend<1>(at(task, i), widths_, k, v, keys, t == 0, p_); break;
          case 2: attend<2>(at(task, i), widths_, k, v, keys, t == 0, p_); break;
          default: attend<WIDE>(at(task, i), widths_, k, v, keys, t == 0, p_);
        }
      }
    }
    for (long i = task.first; i < task.last; ++i) {
      const long row = i * WIDE * VL, rows = std::min(width(i), job_.n - row);
      store_result(job_, at(task, i), rows, width(i), task.y + row * job_.heads * job_.dv);
    }
  }

 private:
  Block at(const Task& task, long i) const {
    float* const q = p_ + KEYS * (WIDE * VL + widths_.d + widths_.dv) + (i - task.first) * block_floats(job_);
    float* const o = q + WIDE * VL * widths_.d;
    float* const most = o + WIDE * VL * widths_.dv;
    return {q, o, most, most + WIDE * VL};
  }

  long width(long i) const { return std::min<long>(WIDE, divide_up(job_.n, VL) - i * WIDE) * VL; }

  // Rows lie far apart: no processor foresees the next one.
  void prefetch(const Task& task, long row) const {
    for (long c = 0; c < job_.d; c += 16) __builtin_prefetch(task.k + row * job_.ks[2] + c, 0, 2);
    for (long c = 0; c < job_.dv; c += 16) __builtin_prefetch(task.v + row * job_.vs[2] + c, 0, 2);
  }

  const Attention& job_;
  const Widths widths_;
  float* const p_;  // P^T, the packed keys and values, then the blocks
};

}  // namespace

void attention(const Attention& job) {
  const long blocks = divide_up(job.n, WIDE * VL), pairs = job.batch * job.heads;
  long at_once = std::min(std::max(STATE / (4 * Worker::block_floats(job)), FEWEST), blocks);
  while (at_once > 1 && pairs * divide_up(blocks, at_once) < 4 * job.threads) at_once = divide_up(at_once, 2);
  const long parts = divide_up(blocks, at_once), floats = Worker::floats(job, at_once);
  float* const memory = scratch(4 * job.threads * floats);
#pragma omp parallel num_threads(job.threads)
  {
    const Worker worker(job, memory + omp_get_thread_num() * floats);
#pragma omp for schedule(dynamic) nowait
    for (long i = 0; i < pairs * parts; ++i) {
      const long pair = i / parts, part = i % parts, b = pair / job.heads, h = pair % job.heads;
      const long shared = h / (job.heads / job.key_heads);
      worker.run({job.q + b * job.qs[0] + h * job.qs[1], job.k + b * job.ks[0] + shared * job.ks[1],
                  job.v + b * job.vs[0] + shared * job.vs[1], job.y + (b * job.n * job.heads + h) * job.dv,
                  part * blocks / parts, (part + 1) * blocks / parts});
    }
  }
}

}  // namespace hasten
