// What the operators (`*_op.cpp`, with torch's headers) may ask of the kernels (`*.cu`, without them). The parameters
// are those of the CPU's kernels.
#pragma once

#include "../cpu/kernels.h"

namespace fastnets {

using Stream = void*;  // a cudaStream_t; the SIMT device has none

namespace cuda {

void softmax_forward(const SoftmaxForward& p, Stream stream);
void softmax_backward(const SoftmaxBackward& p, Stream stream);

}  // namespace cuda
}  // namespace fastnets
