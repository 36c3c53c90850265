// Every operator of fastnets: the table of contents. Each device file registers its own implementations; shapes and
// meaning are in fastnets/reference, the definition of every operator. Arguments arrive validated (fastnets/ops).
#include <torch/csrc/stable/library.h>

// The SIMT device registers its operators, the CUDA kernels on the CPU, in a library of its own.
#if !defined(FASTNETS_LIBRARY)
#define FASTNETS_LIBRARY fastnets
#endif

STABLE_TORCH_LIBRARY(FASTNETS_LIBRARY, m) {
  // activation(conv + bias + residual). x[N, C, *], weight[K, C / groups, *kernel], `size` the result's, `padding` the
  // zeros before the first element (those behind the last follow from size), up to 3 spatial dimensions; x, residual
  // and the result contiguous or, with channels_last, their channels innermost. tf32: float32 products may be computed
  // in TF32. activation: an index into fastnets.reference.conv.ACTIVATIONS. Returns the result and, with keep, the
  // activation's input (else nothing).
  m.def(
      "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] size, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool channels_last, bool tf32, int activation, bool keep) -> "
      "(Tensor, Tensor)");
  // The gradient in x, of spatial size `size`, from the result's; with an epilogue, the transposed convolution.
  m.def(
      "conv_grad_input(Tensor grad, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] size, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool channels_last, bool tf32, int activation, bool keep) -> "
      "(Tensor, Tensor)");
  // The gradient in weight, of weight's shape and strides, and, with bias, in the bias (else nothing).
  m.def(
      "conv_grad_weight(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool channels_last, bool tf32, bool bias) -> (Tensor, Tensor)");
  // The gradient in the activation's input; saved: that input (gelu, silu) or its output (relu, sigmoid, tanh).
  m.def("conv_grad_epilogue(Tensor grad, Tensor saved, int activation) -> Tensor");
  // One recurrent layer in one direction over a whole sequence, as fastnets.reference.recurrent defines it: x[T, B, I],
  // h0[B, P], c0[B, H], w_ih[G H, I], w_hh[G H, P], biases [G H], w_hr[P, H], lengths[B]; cell: an index into its
  // CELLS. Returns y[T, B, P], the last h and c, and, with save, what backward needs of the gates [T, B, 4 H] and of
  // lstm's cell states [T, B, H] in the type that arithmetic runs in. What a cell does not have, or nobody asked for,
  // is empty. tf32: whether a GPU may round a float product's operands to TF32. From peephole on: an lstm's variant,
  // see Variant in the reference; with layer norm the gates are [T, B, 12 H], the products before it behind them.
  m.def(
      "recurrent_forward(Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor? lengths, int cell, bool reverse, bool tf32, bool save, Tensor? peephole=None, "
      "Tensor? norm=None, Tensor? keep_g=None, Tensor? hold_h=None, Tensor? hold_c=None, float keep_scale=1.0, "
      "float zoneout_h=0.0, float zoneout_c=0.0, float clip=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The gradients in x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole and norm, from those in y and the last states.
  m.def(
      "recurrent_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? w_hr, Tensor? lengths, Tensor y, Tensor? gates, Tensor? cells, int cell, "
      "bool reverse, bool tf32, bool need_x, bool need_weights, Tensor? peephole=None, Tensor? norm=None, "
      "Tensor? keep_g=None, Tensor? hold_h=None, Tensor? hold_c=None, float keep_scale=1.0, float zoneout_h=0.0, "
      "float zoneout_c=0.0, float clip=0.0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Both directions of a layer at once, on GPUs. `ahead` and `back`: h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole,
  // norm, keep_g, hold_h and hold_c of each; likewise the results of recurrent_forward one after the other, and those
  // of recurrent_backward. `of_ahead` and `of_back`: the gradients of y, h and c, then y, gates and cells.
  m.def(
      "recurrent_forward_both(Tensor x, Tensor?[] ahead, Tensor?[] back, Tensor? lengths, int cell, bool tf32, "
      "bool save, float keep_scale=1.0, float zoneout_h=0.0, float zoneout_c=0.0, float clip=0.0) -> Tensor[]");
  m.def(
      "recurrent_backward_both(Tensor x, Tensor?[] ahead, Tensor?[] back, Tensor?[] of_ahead, Tensor?[] of_back, "
      "Tensor? lengths, int cell, bool tf32, bool need_x, bool need_weights, float keep_scale=1.0, "
      "float zoneout_h=0.0, float zoneout_c=0.0, float clip=0.0) -> Tensor[]");
  // softmax over `dim` of x * scale + mask, mask boolean (True takes part) or additive, of x's shape (strides may be
  // 0).
  m.def("softmax_forward(Tensor x, Tensor? mask, int dim, float scale) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor y, int dim, float scale) -> Tensor");
  // Dropout of x with probability p, plus residual, of x's shape; seed [2]: see fastnets/reference/dropout.py. Its own
  // gradient in x, with the same seed. On the CPU alone.
  m.def("dropout(Tensor x, Tensor? residual, Tensor seed, float p) -> Tensor");
  // Attention, see fastnets/reference/attention.py. q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] with
  // contiguous rows; mask of 4 dimensions, each of full size or 1; slopes [B, Hq]; seed [2]; starts [N + 1]; tf32:
  // float32 products may be computed in TF32.
  // Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq], the rows' log-sum-exp in log2.
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? seed, Tensor? starts_q, "
      "Tensor? starts_k, float scale, float softcap, int? left, int? right, int? offset, float dropout, "
      "bool tf32) -> (Tensor, Tensor)");
  // The softmax weights [B, Hq, Lq, Lk], after dropout.
  m.def(
      "attention_weights(Tensor q, Tensor k, Tensor lse, Tensor? mask, Tensor? slopes, Tensor? seed, float scale, "
      "float softcap, int? left, int? right, int? offset, float dropout, bool tf32) -> Tensor");
  // The gradients of q, k, v and, with bias_gradient, of the additive mask (else an empty tensor). grad_lse is what the
  // natural logarithm of the rows' sums receives, less the sum over each row of weights * grad_weights.
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? mask, Tensor? slopes, Tensor? seed, Tensor? starts_q, Tensor? starts_k, "
      "float scale, float softcap, int? left, int? right, int? offset, float dropout, bool tf32, "
      "bool bias_gradient, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
  // The instruction set that the CPU kernels run on: 0 generic, 1 avx2, 2 avx512, 3 avx512_bf16.
  m.def("cpu_capability() -> int");
  // Whether the processor is one of AMD's.
  m.def("cpu_is_amd() -> bool");
  // Does nothing but multiply-adds of float32, on every thread; returns how many.
  m.def("cpu_multiply_adds(int rounds) -> int");
}
