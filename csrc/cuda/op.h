// What the CUDA operators share: where they are registered, and where their kernels are queued. No kernel is seen here:
// a host compiler builds the operators for the GPU as for the SIMT device (FASTNETS_LIBRARY=fastnets_simt).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "kernels.h"

#if defined(FASTNETS_LIBRARY)
#define FASTNETS_KEY CPU
#else
#define FASTNETS_LIBRARY fastnets
#define FASTNETS_KEY CUDA
#define FASTNETS_ON_GPU
#endif

namespace fastnets {

#if !defined(FASTNETS_ON_GPU)

class Queue {
 public:
  explicit Queue(const Tensor&) {}
  Stream stream() const { return nullptr; }
};

#else

// It is in libtorch_cuda.so; without that the library loads all the same, and no tensor ever gets here.
#pragma weak aoti_torch_get_current_cuda_stream

// Makes the tensor's device the current one for as long as it lives.
class Queue {
 public:
  explicit Queue(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {}

  // The device's current stream. (torch::stable's own would need torch 2.13.)
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

}  // namespace fastnets
