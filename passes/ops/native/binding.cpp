// torch.ops.hasten.*: every argument is checked here, since calls on the CPU do not pass through the Python declaration.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <bit>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

#include "attention.h"
#include "group_norm.h"
#include "pool.h"
#include "schemas.h"
#include "winograd.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

const float* data(const Optional& t) { return t.has_value() ? t->const_data_ptr<float>() : nullptr; }

void check_float(const Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.device().is_cpu(), "hasten: ", name, " must be float32 on the CPU, not ",
              t.scalar_type(), " on ", t.device());
}

void check_act(const char* op, c10::string_view act) {
  TORCH_CHECK(act == "none" || act == "silu", "hasten::", op, ": no activation '", act, "'; give 'none' or 'silu'");
}

void check_sizes(const char* op, const char* name, const Optional& t, at::IntArrayRef sizes) {
  if (!t.has_value()) return;
  check_float(*t, name);
  TORCH_CHECK(t->sizes() == sizes, "hasten::", op, ": ", name, " has shape ", t->sizes(), "; give ", sizes);
}

void check_tile(int64_t tile, bool phases) {
  TORCH_CHECK(tile == 2 || tile == 4 || (tile == 6 && !phases), "hasten::winograd_conv2d: no tile of ", tile,
              phases ? " for the phases of an upsampled map; tiles: 2, 4" : " for a 3x3 convolution; tiles: 2, 4, 6");
}

hasten::Padding padding_of(c10::string_view mode, at::IntArrayRef padding, const Tensor& x, bool phases) {
  for (const int64_t pad : padding)
    TORCH_CHECK(pad >= 0, "hasten::winograd_conv2d: padding is ", padding, "; give [top, left, bottom, right], from 0 up");
  if (phases)
    TORCH_CHECK(mode == "zeros" && padding == at::IntArrayRef({1, 1, 1, 1}),
                "hasten::winograd_conv2d: an upsampled map is padded by one row of zeros on each side");
  if (mode == "zeros") return hasten::Padding::zeros;
  TORCH_CHECK(mode == "reflect" || mode == "replicate" || mode == "circular", "hasten::winograd_conv2d: padding_mode '", mode,
              "' is none of zeros, reflect, replicate, circular");
  for (int i = 0; i < 4; ++i) {
    const int64_t size = x.size(2 + i % 2), most = mode == "reflect" ? size - 1 : mode == "circular" ? size : padding[i];
    TORCH_CHECK(size > 0 && padding[i] <= most, "hasten::winograd_conv2d: a map of ", x.sizes(), " is too small to be padded by ",
                padding, " with mode '", mode, "'");
  }
  return mode == "reflect"     ? hasten::Padding::reflect
         : mode == "replicate" ? hasten::Padding::replicate
                               : hasten::Padding::circular;
}

Tensor weight_of(const Tensor& weight, int64_t tile, bool phases) {
  check_float(weight, "the weight");
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "hasten::winograd_weight: the weight has shape ",
              weight.sizes(), "; give (outputs, channels, 3, 3)");
  check_tile(tile, phases);
  long shape[6];
  hasten::winograd_weight_shape(weight.size(0), weight.size(1), tile, phases, shape);
  Tensor u = at::empty({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]}, weight.options());
  const long strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  hasten::winograd_weight(weight.const_data_ptr<float>(), strides, weight.size(0), weight.size(1), tile, phases,
                          at::get_num_threads(), u.mutable_data_ptr<float>());
  return u;
}

// Transformed weights of modules whose parameters are inputs of the graph: kept as long as the parameter's storage
// lives, made again when it was written (its version counter, or the hash of its numbers, changed). Writes through
// `.data`, through numpy and to inference tensors count no version: only the hash sees those.
struct Kept {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const float* data;
  std::vector<int64_t> sizes, strides;
  int64_t tile;
  bool phases;
  uint32_t version;
  uint64_t hash;
  Tensor u;
};

constexpr int64_t PIECE = 32;          // floats that are hashed together: two cache lines
constexpr int64_t HASHED = 1 << 18;    // floats that are read of one weight: what hides in the time of a layer that large

// Of all numbers, or of `HASHED` and more where there are more: pieces at even steps, of every output at least two.
uint64_t hash_of(const Tensor& weight) {
  const Tensor dense = weight.is_non_overlapping_and_dense() ? weight : weight.contiguous();
  const float* p = dense.const_data_ptr<float>();
  const int64_t n = dense.numel(), of_an_output = n / std::max<int64_t>(1, dense.size(0));
  const int64_t step = std::clamp<int64_t>((n + HASHED - 1) / HASHED, 1, std::max<int64_t>(1, of_an_output / PIECE / 2)) * PIECE;
  constexpr int W = PIECE / 2;
  uint64_t lanes[W] = {}, words[W];
  int64_t i = 0;
  auto mix = [&] {
    for (int j = 0; j < W; ++j) lanes[j] = std::rotl(lanes[j] ^ words[j], 29) * 0x9e3779b97f4a7c15ull;
  };
  for (; i + PIECE <= n; i += step) {
    std::memcpy(words, p + i, sizeof words);
    mix();
  }
  if (n % PIECE != 0) {  // what is left at the end
    std::memset(words, 0, sizeof words);
    std::memcpy(words, p + n / PIECE * PIECE, n % PIECE * sizeof(float));
    mix();
  }
  uint64_t hash = n;
  for (const uint64_t lane : lanes) hash = std::rotl(hash ^ lane, 29) * 0x9e3779b97f4a7c15ull;
  return hash;
}

Tensor kept_weight(const Tensor& weight, int64_t tile, bool phases) {
  static std::mutex mutex;
  static std::list<Kept> all;
  check_float(weight, "the weight");
  const uint32_t version = weight.is_inference() ? 0 : weight.unsafeGetTensorImpl()->version_counter().current_version();
  const uint64_t hash = hash_of(weight);
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = all.begin(); it != all.end();) {
    if (it->storage.expired()) {
      it = all.erase(it);
      continue;
    }
    if (it->data == weight.const_data_ptr<float>() && it->tile == tile && it->phases == phases &&
        weight.sizes() == it->sizes && weight.strides() == it->strides) {
      if (it->version != version || it->hash != hash) {
        it->u = weight_of(weight, tile, phases);
        it->version = version;
        it->hash = hash;
      }
      all.splice(all.begin(), all, it);  // a model asks in the same order each time: the next one is near the end
      return all.front().u;
    }
    ++it;
  }
  all.push_front({weight.storage().getWeakStorageImpl(),
                  weight.const_data_ptr<float>(), weight.sizes().vec(), weight.strides().vec(), tile, phases, version, hash,
                  weight_of(weight, tile, phases)});
  return all.front().u;
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& norm, const Optional& other,
                       int64_t outputs, int64_t tile, bool phases, at::IntArrayRef padding, c10::string_view padding_mode,
                       c10::string_view act_in, c10::string_view act_out, int64_t workspace) {
  check_float(x, "the input");
  TORCH_CHECK(x.dim() == 4 && padding.size() == 4, "hasten::winograd_conv2d: the input has shape ", x.sizes(),
              "; give (batch, channels, height, width) and four paddings");
  TORCH_CHECK(x.size(1) > 0, "hasten::winograd_conv2d: an input of shape ", x.sizes(), " has no channels");
  TORCH_CHECK(outputs >= 0, "hasten::winograd_conv2d: there cannot be ", outputs, " outputs");
  check_tile(tile, phases);
  check_act("winograd_conv2d", act_in);
  check_act("winograd_conv2d", act_out);
  check_float(weight, "the weight");
  TORCH_CHECK(weight.dim() == 6 || (weight.dim() == 4 && weight.sizes() == at::IntArrayRef({outputs, x.size(1), 3, 3})),
              "hasten::winograd_conv2d: the weight has shape ", weight.sizes(), "; give [", outputs, ", ", x.size(1),
              ", 3, 3], or what hasten::winograd_weight made of it");
  check_sizes("winograd_conv2d", "bias", bias, {outputs});
  check_sizes("winograd_conv2d", "norm", norm, {3, x.size(0), x.size(1)});
  const Tensor u = weight.dim() == 6 ? weight.contiguous() : kept_weight(weight, tile, phases);
  long shape[6];
  hasten::winograd_weight_shape(outputs, x.size(1), tile, phases, shape);
  for (int i = 0; i < 6; ++i)
    TORCH_CHECK(u.size(i) == shape[i], "hasten::winograd_conv2d: transformed weights of shape ", u.sizes(), " are not those of ",
                x.size(1), " channels, ", outputs, " outputs and tiles of ", tile, " in blocks of ", shape[5],
                ", which this processor's vectors ask for; build the engine on a processor with the same instructions");
  const long scale = phases ? 2 : 1, taps = phases ? 0 : 2;
  hasten::Conv conv{};
  conv.padding = padding_of(padding_mode, padding, x, phases);
  conv.n = x.size(0), conv.c = x.size(1), conv.h = x.size(2), conv.w = x.size(3), conv.k = outputs;
  conv.oh = scale * (conv.h + (phases ? 0 : padding[0] + padding[2] - taps));
  conv.ow = scale * (conv.w + (phases ? 0 : padding[1] + padding[3] - taps));
  TORCH_CHECK(conv.oh >= 0 && conv.ow >= 0, "hasten::winograd_conv2d: a map of ", x.sizes(), " is smaller than the kernel");
  Tensor y = hasten::pooled_empty({conv.n, outputs, conv.oh, conv.ow}, true);
  if (y.numel() == 0) return y;
  conv.x = x.const_data_ptr<float>();
  for (int i = 0; i < 4; ++i) conv.xs[i] = x.stride(i);
  conv.u = u.const_data_ptr<float>();
  const Optional flat_bias = bias.has_value() ? Optional(bias->contiguous()) : bias;
  conv.bias = data(flat_bias);
  const Optional flat_norm = norm.has_value() ? Optional(norm->contiguous()) : norm;
  if (flat_norm.has_value()) {
    conv.origin = data(flat_norm);
    conv.scale = conv.origin + conv.n * conv.c;
    conv.shift = conv.scale + conv.n * conv.c;
  }
  Tensor rows;
  if (other.has_value()) {
    check_float(*other, "the added operand");
    const bool rows_only = other->dim() == 4 && other->size(2) == 1 && other->size(3) == 1;
    TORCH_CHECK(other->dim() == 4 && (other->size(0) == 1 || other->size(0) == conv.n) && other->size(1) == outputs &&
                    (rows_only || (other->size(2) == conv.oh && other->size(3) == conv.ow)),
                "hasten::winograd_conv2d: the added operand has shape ", other->sizes(), "; give that of the result, ", y.sizes(),
                ", or one number a picture and channel");
    if (rows_only) {
      rows = other->expand({conv.n, outputs, 1, 1}).contiguous();
      conv.add = rows.const_data_ptr<float>();
    } else {
      rows = other->expand({conv.n, outputs, conv.oh, conv.ow});
      conv.residual = rows.const_data_ptr<float>();
      for (int i = 0; i < 4; ++i) conv.rs[i] = rows.stride(i);
    }
  }
  conv.y = y.mutable_data_ptr<float>();
  conv.top = padding[0], conv.left = padding[1];
  conv.silu_in = act_in == "silu", conv.silu_out = act_out == "silu";
  conv.threads = at::get_num_threads();
  conv.workspace = workspace;
  try {
    hasten::winograd_conv2d(conv, tile, phases);
  } catch (const std::bad_alloc&) {
    TORCH_CHECK(false, "hasten::winograd_conv2d: there is no memory for a workspace of ",
                hasten::winograd_workspace(conv, tile, phases), " bytes, for an input of ", x.sizes(),
                "; give a smaller workspace, or keep the direct convolution (skip winograd-conv2d)");
  }
  return y;
}

hasten::GroupNorm norm_of(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& scale,
                          const Optional& shift, int64_t groups, double eps) {
  check_float(x, "the input");
  hasten::GroupNorm norm{};
  norm.x = x.const_data_ptr<float>();
  norm.channels_last = !x.is_contiguous();
  norm.n = x.size(0), norm.c = x.size(1), norm.groups = groups;
  norm.pixels = x.numel() / std::max<int64_t>(1, norm.n * norm.c);
  norm.weight = data(weight), norm.bias = data(bias), norm.scale = data(scale), norm.shift = data(shift);
  if (scale.has_value()) {
    norm.scale_row = scale->size(0) == 1 ? 0 : scale->stride(0);
    norm.scale_step = scale->size(1) == 1 ? 0 : scale->stride(1);
  }
  if (shift.has_value()) {
    norm.shift_row = shift->size(0) == 1 ? 0 : shift->stride(0);
    norm.shift_step = shift->size(1) == 1 ? 0 : shift->stride(1);
  }
  norm.eps = eps;
  norm.threads = at::get_num_threads();
  return norm;
}

// Contiguous or channels last, whichever it is nearer to.
Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  if (x.dim() == 4) return x.contiguous(at::MemoryFormat::ChannelsLast);
  if (x.dim() == 5) return x.contiguous(at::MemoryFormat::ChannelsLast3d);
  return x.contiguous();
}

Optional flat(const Optional& t) { return t.has_value() ? Optional(t->contiguous()) : t; }

void check_modulation(const char* name, const Optional& t, const Tensor& x) {
  if (!t.has_value()) return;
  check_float(*t, name);
  TORCH_CHECK(t->dim() == 2 && (t->size(0) == 1 || t->size(0) == x.size(0)) && (t->size(1) == 1 || t->size(1) == x.size(1)),
              "hasten::group_norm_affine: ", name, " has shape ", t->sizes(), "; give [", x.size(0), ", ", x.size(1),
              "], with 1 allowed for both");
}

Tensor group_norm_affine(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& scale,
                         const Optional& shift, int64_t groups, double eps) {
  check_float(x, "the input");
  TORCH_CHECK(x.dim() >= 2 && x.size(1) > 0 && groups > 0 && x.size(1) % groups == 0, "hasten::group_norm_affine: an input of shape ",
              x.sizes(), " has no ", groups, " groups of channels");
  check_sizes("group_norm_affine", "weight", weight, {x.size(1)});
  check_sizes("group_norm_affine", "bias", bias, {x.size(1)});
  check_modulation("scale", scale, x);
  check_modulation("shift", shift, x);
  const Tensor map = dense(x);
  const Optional w = flat(weight), b = flat(bias);
  Tensor out = at::empty({3, x.size(0), x.size(1)}, x.options());
  if (out.numel() == 0 || x.numel() == 0) return out.zero_();
  hasten::group_norm_affine(norm_of(map, w, b, scale, shift, groups, eps), out.mutable_data_ptr<float>());
  return out;
}

Tensor apply_affine(const Tensor& x, const Tensor& affine, c10::string_view act) {
  check_float(x, "the input");
  TORCH_CHECK(x.dim() >= 2, "hasten::apply_affine: the input has shape ", x.sizes(), "; give (batch, channels, ...)");
  check_sizes("apply_affine", "the table", affine, {3, x.size(0), x.size(1)});
  check_act("apply_affine", act);
  const Tensor map = dense(x), table = affine.contiguous();
  Tensor y = hasten::pooled_empty(map.sizes(), !map.is_contiguous());
  if (y.numel() == 0) return y;
  hasten::apply_affine(norm_of(map, {}, {}, {}, {}, 1, 0), table.const_data_ptr<float>(), act == "silu",
                       y.mutable_data_ptr<float>());
  return y;
}

// The last axis contiguous.
Tensor rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

Tensor flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  check_float(q, "q"), check_float(k, "k"), check_float(v, "v");
  const bool fit = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) && k.size(0) == v.size(0) &&
                   k.size(1) == v.size(1) && k.size(2) == v.size(2) && q.size(3) == k.size(3) &&
                   (k.size(1) == 0 ? q.size(1) == 0 : q.size(1) % k.size(1) == 0);
  TORCH_CHECK(fit, "hasten::flash_attention: q has shape ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              "; give (batch, heads, tokens, width), the heads of k dividing those of q");
  Tensor y = hasten::pooled_empty({q.size(0), q.size(2), q.size(1), v.size(3)}, false);
  if (k.size(2) == 0) y.zero_();
  if (y.numel() == 0 || k.size(2) == 0) return y.transpose(1, 2);
  const Tensor queries = rows(q), keys = rows(k), values = rows(v);
  hasten::Attention job{};
  job.q = queries.const_data_ptr<float>(), job.k = keys.const_data_ptr<float>(), job.v = values.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) job.qs[i] = queries.stride(i), job.ks[i] = keys.stride(i), job.vs[i] = values.stride(i);
  job.batch = q.size(0), job.heads = q.size(1), job.key_heads = k.size(1);
  job.n = q.size(2), job.m = k.size(2), job.d = q.size(3), job.dv = v.size(3);
  job.scale = scale;
  job.y = y.mutable_data_ptr<float>();
  job.threads = at::get_num_threads();
  try {
    hasten::attention(job);
  } catch (const std::bad_alloc&) {
    TORCH_CHECK(false, "hasten::flash_attention: there is no memory for the blocks of queries of shape ", q.sizes());
  }
  return y.transpose(1, 2);
}

bool known(const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}).has_value(); }

}  // namespace

// Python declares the operators where it runs; a process without it needs the declarations from here.
TORCH_LIBRARY_FRAGMENT(hasten, m) {
  if (!known("hasten::winograd_weight")) m.def(WINOGRAD_WEIGHT);
  if (!known("hasten::winograd_conv2d")) m.def(WINOGRAD_CONV2D);
  if (!known("hasten::group_norm_affine")) m.def(GROUP_NORM_AFFINE);
  if (!known("hasten::apply_affine")) m.def(APPLY_AFFINE);
  if (!known("hasten::flash_attention")) m.def(FLASH_ATTENTION);
}

TORCH_LIBRARY_IMPL(hasten, CPU, m) {
  m.impl("winograd_weight", weight_of);
  m.impl("winograd_conv2d", winograd_conv2d);
  m.impl("group_norm_affine", group_norm_affine);
  m.impl("apply_affine", apply_affine);
  m.impl("flash_attention", flash_attention);
}
