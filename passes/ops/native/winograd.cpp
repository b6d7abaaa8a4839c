// Winograd convolution, channels last, float32. Tiles are transformed by the chunk, so that transformed input and
// products stay in the caches; weights are streamed once a chunk; the epilogue is applied while tiles are written.
//
// A chunk is worked on in two phases with a barrier between: threads share out (run of tiles, 16 channels) and write
// V[frequency][block of tiles][16 channels][tile][channel]; then they share out (block of K, some blocks of tiles):
// for every frequency M = V U in registers, then the inverse transform. Layout and sizes follow Goto and van de Geijn
// (2008) for the product, and Jia et al., "L3 Fusion" (arXiv 1912.02165), for keeping V and M out of main memory.

#include "winograd.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "transpose.h"
#include "vector.h"

namespace hasten {
namespace {
#include "transforms.h"

constexpr int SUM_BLOCKS = 2;  // blocks of 16 channels that are summed in one go
constexpr int SEGMENT = 32;  // tiles of one row that are transformed together

template <class F, bool PHASES>
struct Shape {
  static constexpr int P = PHASES ? 4 : 1;
  static constexpr int WINDOW = F::T + (PHASES ? 1 : 0);  // rows and columns that a tile reads
  static constexpr int NF = P * F::T * F::T;
};

long divide_up(long a, long b) { return (a + b - 1) / b; }

long source(long i, long size, Padding padding) {
  if (i >= 0 && i < size) return i;
  switch (padding) {
    case Padding::zeros: return -1;
    case Padding::reflect: i = i < 0 ? -i : 2 * (size - 1) - i; break;
    case Padding::replicate: i = std::clamp(i, 0L, size - 1); break;
    case Padding::circular: i = ((i % size) + size) % size; break;
  }
  return i >= 0 && i < size ? i : -1;  // beyond what a whole tile needs
}

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));

// 16 rows of 16 floats, `step` apart, to 16 columns.
void transpose(const float* from, long step, float* to) {
  v16 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = *reinterpret_cast<const v16_unaligned*>(from + i * step);
  transpose_rows<16>(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) *reinterpret_cast<v16_unaligned*>(to + i * LANES) = r[i];
}

struct Segment {
  long n, ty, tx, tiles, first;  // first: index of its first tile in the chunk
};

struct Plan {
  long cblocks, kblocks, tiles, tblocks;  // of a chunk: at most this many tiles
  long vf_stride, mf_stride, sub;         // floats between frequencies; blocks of tiles that are multiplied together
  long v_floats, m_floats, buffer_floats;
};

template <class F, bool PHASES>
Plan plan_for(const Conv& conv) {
  using S = Shape<F, PHASES>;
  Plan plan;
  plan.cblocks = divide_up(conv.c, LANES);
  plan.kblocks = divide_up(conv.k, KB);
  const long phases = PHASES ? 2 : 1;
  const long rows = divide_up(conv.oh / phases, F::M), columns = divide_up(conv.ow / phases, F::M);
  const long all = conv.n * rows * columns;
  const long tile_bytes = S::NF * plan.cblocks * LANES * 4L;
  long tiles = std::max<long>(conv.workspace / tile_bytes, ROWS);
  tiles = std::max<long>(tiles / ROWS * ROWS, std::min<long>(columns, SEGMENT));
  if (tiles < all) {  // chunks of like size
    const long chunks = divide_up(all, tiles);
    tiles = divide_up(divide_up(all, chunks), ROWS) * ROWS;
  }
  plan.tiles = std::min(tiles, all);
  plan.tblocks = divide_up(plan.tiles, ROWS);
  // M of a thread in about a third of a megabyte, so that it, a panel of U and of V share the second-level cache.
  plan.sub = std::clamp<long>((400L << 10) / (S::NF * KB * 4L * ROWS), 1, plan.tblocks);
  while (plan.sub > 1 && plan.kblocks * divide_up(plan.tblocks, plan.sub) < conv.threads) plan.sub = divide_up(plan.sub, 2);
  plan.sub = divide_up(plan.tblocks, divide_up(plan.tblocks, plan.sub));
  // Odd multiples of a cache line: tables of 4096 bytes would all fall into the same few lines.
  plan.vf_stride = plan.tblocks * plan.cblocks * ROWS * LANES + LANES;
  plan.mf_stride = plan.sub * ROWS * KB + LANES;
  plan.v_floats = S::NF * plan.vf_stride;
  plan.m_floats = S::NF * plan.mf_stride;
  plan.buffer_floats = S::WINDOW * (SEGMENT * F::M + S::WINDOW) * LANES;
  return plan;
}

// One run of tiles, one block of channels: load a column of pixels once, transform it, then tiles from their columns.
template <class F, bool PHASES>
void transform_input(const Conv& conv, const Plan& plan, const Segment& seg, long cb, float* v, float* buffer) {
  using S = Shape<F, PHASES>;
  constexpr int W = S::WINDOW, T = F::T, M = F::M;
  const long channels = std::min<long>(LANES, conv.c - cb * LANES);
  const long width = (seg.tiles - 1) * M + W;
  const float* rows[W];
  long pixel = conv.xs[3];
  for (int i = 0; i < W; ++i) {
    const long y = source(seg.ty * M + i - conv.top, conv.h, conv.padding);
    rows[i] = y < 0 ? nullptr : conv.x + seg.n * conv.xs[0] + cb * LANES * conv.xs[1] + y * conv.xs[2];
  }
  long column[SEGMENT * M + W];
  for (long j = 0; j < width; ++j) column[j] = source(seg.tx * M + j - conv.left, conv.w, conv.padding);
  if (conv.xs[1] != 1 || channels < LANES) {  // bring it to channels last first
    for (int i = 0; i < W; ++i) {
      if (rows[i] == nullptr) continue;
      float* line = buffer + i * width * LANES;
      for (long j = 0; j < width;) {
        const bool whole = channels == LANES && conv.xs[3] == 1 && j + LANES <= width && column[j] >= 0 &&
                           column[j + LANES - 1] == column[j] + LANES - 1;  // runs of pixels, as maps are
        if (whole) {
          transpose(rows[i] + column[j], conv.xs[1], line + j * LANES);
          j += LANES;
          continue;
        }
        for (long c = 0; c < LANES; ++c)
          line[j * LANES + c] =
              c < channels && column[j] >= 0 ? rows[i][c * conv.xs[1] + column[j] * conv.xs[3]] : 0.f;
        ++j;
      }
      rows[i] = line;
    }
    for (long j = 0; j < width; ++j) column[j] = column[j] < 0 ? -1 : j;
    pixel = LANES;
  }
  alignas(64) float origin[LANES] = {}, scale[LANES], shift[LANES] = {};
  const bool affine = conv.scale != nullptr;
  for (long c = 0; c < LANES; ++c) scale[c] = 1.f;
  if (affine) {
    const long at = seg.n * conv.c + cb * LANES;
    for (long c = 0; c < channels; ++c) {
      origin[c] = conv.origin[at + c];
      scale[c] = conv.scale[at + c];
      shift[c] = conv.shift[at + c];
    }
  }
  for (int s = 0; s < LANES / VL; ++s) {
    const vf k = load(origin + s * VL), a = load(scale + s * VL), b = load(shift + s * VL);
    vf t[PHASES ? 2 : 1][T][W];
    auto take = [&](long j, int at) {
      vf d[W];
      if (column[j] < 0) {
        for (int i = 0; i < W; ++i) d[i] = vf{};
      } else {
        const long offset = column[j] * pixel + s * VL;
        for (int i = 0; i < W; ++i) {
          if (rows[i] == nullptr) {
            d[i] = vf{};
            continue;
          }
          vf value = load(rows[i] + offset);
          if (affine) value = (value - k) * a + b;
          if (conv.silu_in) value = silu(value);
          d[i] = value;
        }
      }
      for (int p = 0; p < (PHASES ? 2 : 1); ++p) {
        vf out[T];
        F::input(d + p, out);
        for (int i = 0; i < T; ++i) t[p][i][at] = out[i];
      }
    };
    for (int j = 0; j < W - M; ++j) take(j, M + j);
    for (long tile = 0; tile < seg.tiles; ++tile) {
      for (int p = 0; p < (PHASES ? 2 : 1); ++p)
        for (int i = 0; i < T; ++i)
          for (int j = 0; j < W - M; ++j) t[p][i][j] = t[p][i][M + j];
      for (int j = W - M; j < W; ++j) take(tile * M + j, j);
      const long index = seg.first + tile;
      float* to = v + ((index / ROWS) * plan.cblocks + cb) * ROWS * LANES + (index % ROWS) * LANES + s * VL;
      for (int p = 0; p < (PHASES ? 2 : 1); ++p)
        for (int q = 0; q < (PHASES ? 2 : 1); ++q)
          for (int i = 0; i < T; ++i) {
            vf out[T];
            F::input(t[p][i] + q, out);
            for (int j = 0; j < T; ++j) store(to + (((p * 2 + q) * T + i) * T + j) * plan.vf_stride, out[j]);
          }
    }
  }
}

template <int R>
void multiply_rows(const float* v, const float* u, float* m, long cblocks) {
  vf acc[R][VECTORS], total[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) acc[r][j] = vf{};
  for (long cb = 0; cb < cblocks; ++cb, v += ROWS * LANES, u += LANES * KB) {
#pragma GCC unroll 4
    for (int c = 0; c < LANES; ++c) {
      vf w[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) w[j] = load(u + c * KB + j * VL);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const vf x = splat(v[r * LANES + c]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[r][j] += x * w[j];
      }
    }
    // Sums of SUM_BLOCKS blocks are added up apart: one sum over all channels would lose several times as much, and
    // the inverse transform amplifies it.
    if (cb % SUM_BLOCKS == SUM_BLOCKS - 1 && cb + 1 < cblocks)
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) {
          total[r][j] = cb < SUM_BLOCKS ? acc[r][j] : total[r][j] + acc[r][j];
          acc[r][j] = vf{};
        }
  }
  const bool split = cblocks > SUM_BLOCKS;
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < VECTORS; ++j) store(m + r * KB + j * VL, split ? total[r][j] + acc[r][j] : acc[r][j]);
}

template <int R>
void multiply(long rows, const float* v, const float* u, float* m, long cblocks) {
  if constexpr (R > 0) {
    if (rows >= R) return multiply_rows<R>(v, u, m, cblocks);
    multiply<R - 1>(rows, v, u, m, cblocks);
  }
}

template <class F, bool PHASES>
void transform_output(const Conv& conv, const Plan& plan, const Segment& seg, long tile, long kb, const float* m) {
  constexpr int T = F::T, M = F::M;
  constexpr int step = PHASES ? 2 : 1;
  for (int s = 0; s < VECTORS; ++s) {
    const long channel = kb * KB + s * VL;
    const long left = conv.k - channel;
    if (left <= 0) return;
    alignas(64) float per_channel[VL] = {};
    for (long c = 0; c < std::min<long>(VL, left); ++c)
      per_channel[c] = (conv.bias != nullptr ? conv.bias[channel + c] : 0.f) +
                       (conv.add != nullptr ? conv.add[seg.n * conv.k + channel + c] : 0.f);
    const vf bias = load(per_channel);
    for (int p = 0; p < step; ++p)
      for (int q = 0; q < step; ++q) {
        vf half[M][T];
        for (int j = 0; j < T; ++j) {
          vf in[T], out[M];
          for (int i = 0; i < T; ++i) in[i] = load(m + (((p * 2 + q) * T + i) * T + j) * plan.mf_stride + s * VL);
          F::output(in, out);
          for (int i = 0; i < M; ++i) half[i][j] = out[i];
        }
        for (int i = 0; i < M; ++i) {
          const long y = (seg.ty * M + i) * step + p;
          if (y >= conv.oh) break;
          vf out[M];
          F::output(half[i], out);
          for (int j = 0; j < M; ++j) {
            const long x = ((seg.tx + tile) * M + j) * step + q;
            if (x >= conv.ow) break;
            vf value = out[j] + bias;
            if (conv.residual != nullptr) {
              const float* from = conv.residual + seg.n * conv.rs[0] + channel * conv.rs[1] + y * conv.rs[2] + x * conv.rs[3];
              if (conv.rs[1] == 1 && left >= VL) {
                value += load(from);
              } else {
                alignas(64) float taken[VL] = {};
                for (long c = 0; c < std::min<long>(VL, left); ++c) taken[c] = from[c * conv.rs[1]];
                value += load(taken);
              }
            }
            if (conv.silu_out) value = silu(value);
            float* to = conv.y + ((seg.n * conv.oh + y) * conv.ow + x) * conv.k + channel;
            if (left >= VL) {
              store(to, value);
            } else {
              alignas(64) float made[VL];
              store(made, value);
              std::memcpy(to, made, left * sizeof(float));
            }
          }
        }
      }
  }
}

template <class F, bool PHASES>
void run(const Conv& conv) {
  using S = Shape<F, PHASES>;
  const Plan plan = plan_for<F, PHASES>(conv);
  const long phases = PHASES ? 2 : 1;
  const long rows = divide_up(conv.oh / phases, F::M), columns = divide_up(conv.ow / phases, F::M);
  float* v = scratch(4 * (plan.v_floats + conv.threads * (plan.m_floats + plan.buffer_floats)));
  float* privates = v + plan.v_floats;
  std::vector<std::vector<Segment>> chunks(1);
  long held = 0;
  for (long n = 0; n < conv.n; ++n)
    for (long ty = 0; ty < rows; ++ty)
      for (long tx = 0; tx < columns;) {
        if (held == plan.tiles) {
          chunks.emplace_back();
          held = 0;
        }
        const long tiles = std::min({columns - tx, (long)SEGMENT, plan.tiles - held});
        chunks.back().push_back({n, ty, tx, tiles, held});
        held += tiles;
        tx += tiles;
      }
  const long u_kb = S::NF * plan.cblocks * LANES * KB, u_f = plan.cblocks * LANES * KB;
#pragma omp parallel num_threads(conv.threads)
  {
    float* m = privates + omp_get_thread_num() * (plan.m_floats + plan.buffer_floats);
    float* buffer = m + plan.m_floats;
    for (const auto& chunk : chunks) {
      const long tiles = chunk.back().first + chunk.back().tiles;
      const long jobs = (long)chunk.size() * plan.cblocks;
#pragma omp for schedule(dynamic)
      for (long job = 0; job < jobs; ++job)
        transform_input<F, PHASES>(conv, plan, chunk[job / plan.cblocks], job % plan.cblocks, v, buffer);
      const long tblocks = divide_up(tiles, ROWS), subs = divide_up(tblocks, plan.sub);
#pragma omp for schedule(dynamic)
      for (long job = 0; job < plan.kblocks * subs; ++job) {
        const long kb = job / subs, first = job % subs * plan.sub, last = std::min(first + plan.sub, tblocks);
        for (int f = 0; f < S::NF; ++f)
          for (long tb = first; tb < last; ++tb)
            multiply<ROWS>(tiles - tb * ROWS, v + f * plan.vf_stride + tb * plan.cblocks * ROWS * LANES,
                           conv.u + kb * u_kb + f * u_f, m + f * plan.mf_stride + (tb - first) * ROWS * KB,
                           plan.cblocks);
        for (const Segment& seg : chunk)
          for (long tile = std::max(0L, first * ROWS - seg.first);
               tile < std::min(seg.tiles, last * ROWS - seg.first); ++tile)
            transform_output<F, PHASES>(conv, plan, seg, tile, kb, m + (seg.first + tile - first * ROWS) * KB);
      }
    }
  }
}

// G g G^T of KB output channels at a time: every line of U that is written is whole.
template <class F, bool PHASES>
void transform_weight(const float* w, const long* ws, long k, long c, int threads, float* u) {
  using S = Shape<F, PHASES>;
  constexpr int T = F::T, R = F::R;
  const long padded = divide_up(c, LANES) * LANES, blocks = divide_up(k, KB);
#pragma omp parallel for num_threads(threads) collapse(2)
  for (long kb = 0; kb < blocks; ++kb)
    for (long ci = 0; ci < padded; ++ci)
      for (int p = 0; p < S::P; ++p) {
        double g[R][R][KB] = {}, half[T][R][KB];
        for (int i = 0; i < 3 && ci < c; ++i)
          for (int j = 0; j < 3; ++j) {
            // Phase 0 of an axis sees (w0, w1 + w2), phase 1 sees (w0 + w1, w2).
            const int y = PHASES ? i > (p >> 1) : i, x = PHASES ? j > (p & 1) : j;
            for (long l = 0; l < std::min<long>(KB, k - kb * KB); ++l)
              g[y][x][l] += w[(kb * KB + l) * ws[0] + ci * ws[1] + i * ws[2] + j * ws[3]];
          }
        for (int i = 0; i < T; ++i)
          for (int j = 0; j < R; ++j)
            for (int l = 0; l < KB; ++l) {
              double sum = 0;
              for (int r = 0; r < R; ++r) sum += F::G[i][r] * g[r][j][l];
              half[i][j][l] = sum;
            }
        for (int i = 0; i < T; ++i)
          for (int j = 0; j < T; ++j) {
            float* to = u + (((kb * S::P + p) * T + i) * T + j) * padded * KB + ci * KB;
            for (int l = 0; l < KB; ++l) {
              double sum = 0;
              for (int r = 0; r < R; ++r) sum += F::G[j][r] * half[i][r][l];
              to[l] = (float)sum;
            }
          }
      }
}

template <class F, bool PHASES>
long bytes(const Conv& conv) {
  const Plan plan = plan_for<F, PHASES>(conv);
  return 4 * (plan.v_floats + conv.threads * (plan.m_floats + plan.buffer_floats));
}

}  // namespace

void winograd_conv2d(const Conv& conv, int m, bool phases) {
  if (conv.n == 0 || conv.oh <= 0 || conv.ow <= 0 || conv.k == 0) return;
  if (phases) return m == 4 ? run<F42, true>(conv) : run<F22, true>(conv);
  return m == 2 ? run<F23, false>(conv) : m == 4 ? run<F43, false>(conv) : run<F63, false>(conv);
}

void winograd_weight_shape(long k, long c, int m, bool phases, long* shape) {
  const long t = phases ? m + 1 : m + 2;
  const long sizes[6] = {divide_up(k, KB), phases ? 4 : 1, t, t, divide_up(c, LANES) * LANES, KB};
  std::copy(sizes, sizes + 6, shape);
}

void winograd_weight(const float* w, const long* ws, long k, long c, int m, bool phases, int threads, float* u) {
  if (phases) return m == 4 ? transform_weight<F42, true>(w, ws, k, c, threads, u)
                            : transform_weight<F22, true>(w, ws, k, c, threads, u);
  return m == 2   ? transform_weight<F23, false>(w, ws, k, c, threads, u)
         : m == 4 ? transform_weight<F43, false>(w, ws, k, c, threads, u)
                  : transform_weight<F63, false>(w, ws, k, c, threads, u);
}

long winograd_workspace(const Conv& conv, int m, bool phases) {
  if (phases) return m == 4 ? bytes<F42, true>(conv) : bytes<F22, true>(conv);
  return m == 2 ? bytes<F23, false>(conv) : m == 4 ? bytes<F43, false>(conv) : bytes<F63, false>(conv);
}

}  // namespace hasten
