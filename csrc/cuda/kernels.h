// What the operators (`*_op.cpp`, with torch's headers) may ask of the kernels (`*.cu`, without them). The parameters
// are those of the CPU's kernels.
#pragma once

#include <cstddef>

#include "../cpu/kernels.h"

namespace fastnets {

using Stream = void*;  // a cudaStream_t; the SIMT device has none

namespace cuda {

void softmax_forward(const SoftmaxForward& p, Stream stream);
void softmax_backward(const SoftmaxBackward& p, Stream stream);

// Attention's workspace: so many bytes of the device's memory, aligned to 256; no bytes, no pointer.
size_t attention_workspace(const AttentionForward& p);
void attention_forward(const AttentionForward& p, void* workspace, Stream stream);
void attention_weights(const AttentionWeights& p, Stream stream);
size_t attention_workspace(const AttentionBackward& p);
void attention_backward(const AttentionBackward& p, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace fastnets
