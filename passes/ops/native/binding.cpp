// torch.ops.hasten.*: arguments checked by their Python declaration are checked again here, for packages that call us
// without Python.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <list>
#include <mutex>
#include <new>

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

Tensor weight_of(const Tensor& weight, int64_t tile, bool phases) {
  check_float(weight, "weight");
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "hasten::winograd_weight: the weight has shape ",
              weight.sizes(), "; give (outputs, channels, 3, 3)");
  TORCH_CHECK(tile == 2 || tile == 4 || (tile == 6 && !phases), "hasten::winograd_weight: no tile of ", tile);
  long shape[6];
  hasten::winograd_weight_shape(weight.size(0), weight.size(1), tile, phases, shape);
  Tensor u = at::empty({shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]}, weight.options());
  const long strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  hasten::winograd_weight(weight.const_data_ptr<float>(), strides, weight.size(0), weight.size(1), tile, phases,
                          at::get_num_threads(), u.mutable_data_ptr<float>());
  return u;
}

// Transformed weights of modules whose parameters are inputs of the graph: kept as long as the parameter's storage
// lives, made again when it was written (its version counter, or a sample of its numbers, changed).
struct Kept {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const float* data;
  std::vector<int64_t> sizes, strides;
  int64_t tile;
  bool phases;
  uint32_t version;
  uint64_t sample;
  Tensor u;
};

uint64_t sample_of(const Tensor& t) {
  const float* p = t.const_data_ptr<float>();
  const int64_t n = t.numel(), step = std::max<int64_t>(1, n / 61);
  uint64_t hash = 1469598103934665603ull;
  for (int64_t i = 0; i < n; i += step) {
    uint32_t bits;
    std::memcpy(&bits, p + i, sizeof bits);
    hash = (hash ^ bits) * 1099511628211ull;
  }
  return hash;
}

Tensor kept_weight(const Tensor& weight, int64_t tile, bool phases) {
  static std::mutex mutex;
  static std::list<Kept> all;
  const std::lock_guard<std::mutex> lock(mutex);
  check_float(weight, "weight");
  const uint32_t version = weight.is_inference() ? 0 : weight.unsafeGetTensorImpl()->version_counter().current_version();
  const uint64_t sample = weight.is_non_overlapping_and_dense() ? sample_of(weight) : 0;
  for (auto it = all.begin(); it != all.end();) {
    if (it->storage.expired()) {
      it = all.erase(it);
      continue;
    }
    if (it->data == weight.const_data_ptr<float>() && it->tile == tile && it->phases == phases &&
        weight.sizes() == it->sizes && weight.strides() == it->strides) {
      if (it->version != version || it->sample != sample) {
        it->u = weight_of(weight, tile, phases);
        it->version = version;
        it->sample = sample;
      }
      all.splice(all.begin(), all, it);  // a model asks in the same order each time: the next one is near the end
      return all.front().u;
    }
    ++it;
  }
  all.push_front({weight.storage().getWeakStorageImpl(),
                  weight.const_data_ptr<float>(), weight.sizes().vec(), weight.strides().vec(), tile, phases, version, sample,
                  weight_of(weight, tile, phases)});
  return all.front().u;
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& norm, const Optional& other,
                       int64_t outputs, int64_t tile, bool phases, at::IntArrayRef padding, c10::string_view padding_mode,
                       c10::string_view act_in, c10::string_view act_out, int64_t workspace) {
  check_float(x, "the input");
  TORCH_CHECK(x.dim() == 4 && padding.size() == 4, "hasten::winograd_conv2d: the input has shape ", x.sizes(),
              "; give (batch, channels, height, width) and four paddings");
  const Tensor u = weight.dim() == 6 ? weight.contiguous() : kept_weight(weight, tile, phases);
  long shape[6];
  hasten::winograd_weight_shape(outputs, x.size(1), tile, phases, shape);
  for (int i = 0; i < 6; ++i)
    TORCH_CHECK(u.size(i) == shape[i], "hasten::winograd_conv2d: transformed weights of shape ", u.sizes(), " are not those of ",
                x.size(1), " channels, ", outputs, " outputs and tiles of ", tile, " in blocks of ", shape[5],
                ", which this processor's vectors ask for; build the engine on a processor with the same instructions");
  const long scale = phases ? 2 : 1, taps = phases ? 0 : 2;
  hasten::Conv conv{};
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
    TORCH_CHECK(flat_norm->numel() == 3 * conv.n * conv.c, "hasten::winograd_conv2d: norm has shape ", norm->sizes(),
                "; give (3, batch, channels)");
    conv.origin = data(flat_norm);
    conv.scale = conv.origin + conv.n * conv.c;
    conv.shift = conv.scale + conv.n * conv.c;
  }
  Tensor rows;
  if (other.has_value()) {
    check_float(*other, "the added operand");
    TORCH_CHECK(other->dim() == 4, "hasten::winograd_conv2d: the added operand has shape ", other->sizes());
    if (other->size(2) == 1 && other->size(3) == 1) {
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
  conv.padding = padding_mode == "zeros"       ? hasten::Padding::zeros
                 : padding_mode == "reflect"   ? hasten::Padding::reflect
                 : padding_mode == "replicate" ? hasten::Padding::replicate
                                               : hasten::Padding::circular;
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

Tensor group_norm_affine(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& scale,
                         const Optional& shift, int64_t groups, double eps) {
  const Tensor map = dense(x);
  const Optional w = flat(weight), b = flat(bias);
  Tensor out = at::empty({3, x.size(0), x.size(1)}, x.options());
  if (out.numel() == 0 || x.numel() == 0) return out.zero_();
  hasten::group_norm_affine(norm_of(map, w, b, scale, shift, groups, eps), out.mutable_data_ptr<float>());
  return out;
}

Tensor apply_affine(const Tensor& x, const Tensor& affine, c10::string_view act) {
  const Tensor map = dense(x), table = affine.contiguous();
  Tensor y = hasten::pooled_empty(map.sizes(), !map.is_contiguous());
  if (y.numel() == 0) return y;
  hasten::apply_affine(norm_of(map, {}, {}, {}, {}, 1, 0), table.const_data_ptr<float>(), act == "silu",
                       y.mutable_data_ptr<float>());
  return y;
}

bool known(const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}).has_value(); }

}  // namespace

// Python declares the operators where it runs; a process without it needs the declarations from here.
TORCH_LIBRARY_FRAGMENT(hasten, m) {
  if (!known("hasten::winograd_weight")) m.def(WINOGRAD_WEIGHT);
  if (!known("hasten::winograd_conv2d")) m.def(WINOGRAD_CONV2D);
  if (!known("hasten::group_norm_affine")) m.def(GROUP_NORM_AFFINE);
  if (!known("hasten::apply_affine")) m.def(APPLY_AFFINE);
}

TORCH_LIBRARY_IMPL(hasten, CPU, m) {
  m.impl("winograd_weight", weight_of);
  m.impl("winograd_conv2d", winograd_conv2d);
  m.impl("group_norm_affine", group_norm_affine);
  m.impl("apply_affine", apply_affine);
}
