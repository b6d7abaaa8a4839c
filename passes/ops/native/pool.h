// Memory of large results, kept for the next call: on a fresh mapping the kernel zeroes page after page, which takes
// several times as long as writing the map.
#pragma once

#include <ATen/core/Tensor.h>

namespace hasten {

// An uninitialised float32 tensor, channels last if it has four axes and `channels_last`, else contiguous.
at::Tensor pooled_empty(at::IntArrayRef sizes, bool channels_last);

}  // namespace hasten
