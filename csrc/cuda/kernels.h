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

// A workspace is so many bytes of the device's memory, aligned to 256; no bytes, no pointer.
size_t attention_workspace(const AttentionForward& p);
void attention_forward(const AttentionForward& p, void* workspace, Stream stream);
void attention_weights(const AttentionWeights& p, Stream stream);
size_t attention_workspace(const AttentionBackward& p);
void attention_backward(const AttentionBackward& p, void* workspace, Stream stream);

size_t conv_forward_workspace(const ConvGather& p);
void conv_forward(const ConvGather& p, void* workspace, Stream stream);
size_t conv_grad_input_workspace(const ConvGather& p);
void conv_grad_input(const ConvGather& p, void* workspace, Stream stream);
size_t conv_grad_weight_workspace(const ConvGradWeight& p);
void conv_grad_weight(const ConvGradWeight& p, void* workspace, Stream stream);
void conv_grad_epilogue(const ConvGradEpilogue& p, Stream stream);

}  // namespace cuda
}  // namespace fastnets
