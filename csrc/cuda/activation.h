// The activations of fused epilogues and their derivatives, of one element.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fastnets {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;                        // NaN stays
    case Activation::kGelu: return x * 0.5f * (1.0f + erff(x * 0.70710678f));  // x Phi(x), arXiv 1606.08415
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kTanh: return tanhf(x);
    default: return x;
  }
}

// From the activation's input (gelu, silu) or its output (relu, sigmoid, tanh).
__device__ __forceinline__ float derivative(Activation activation, float saved) {
  switch (activation) {
    case Activation::kRelu: return saved <= 0.0f ? 0.0f : 1.0f;
    case Activation::kGelu: {
      const float density = expf(saved * saved * -0.5f) * 0.39894228f;
      return 0.5f * (1.0f + erff(saved * 0.70710678f)) + saved * density;
    }
    case Activation::kSilu: {
      const float s = sigmoid(saved);
      return s * (1.0f + saved * (1.0f - s));
    }
    case Activation::kSigmoid: return saved * (1.0f - saved);
    case Activation::kTanh: return 1.0f - saved * saved;
    default: return 1.0f;
  }
}

}  // namespace fastnets
