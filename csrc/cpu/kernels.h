// What the operators (`*_op.cpp`, compiled once, with torch's headers) may ask of the kernels (`softmax.cpp`, ...,
// compiled once an instruction set, without torch's headers so that no inline symbol is shared between them).
#pragma once

#include <cstdint>

namespace fastnets {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class MaskKind : int { kNone, kBool, kAdditive };  // an additive mask has the tensor's own dtype

constexpr int kMaxDims = 8;

struct SoftmaxForward {
  Dtype dtype;
  const void* x;     // [outer, size, inner], contiguous
  const void* mask;  // of the same shape through mask_strides, or null
  void* y;           // [outer, size, inner], contiguous
  MaskKind mask_kind;
  int64_t outer, size, inner;
  double scale;
  // Sizes and mask strides (in elements) of the dimensions that make up `outer`, then those that make up `inner`.
  int outer_dims, inner_dims;
  int64_t outer_sizes[kMaxDims], outer_strides[kMaxDims];
  int64_t inner_sizes[kMaxDims], inner_strides[kMaxDims];
  int64_t mask_stride;  // along the softmax dimension
};

struct SoftmaxBackward {
  Dtype dtype;
  const void* grad;  // [outer, size, inner]
  const void* y;     // [outer, size, inner]
  void* grad_x;      // [outer, size, inner]
  int64_t outer, size, inner;
  double scale;
};

// y = x * (0 with this probability, else 1 / (1 - probability)) + residual, see fastnets/reference/dropout.py.
struct ElementDropout {
  Dtype dtype;
  const void* x;         // [count]
  const void* residual;  // [count], or null
  void* y;               // [count]
  int64_t count;
  const int64_t* seed;  // [2] words of 32 bits: the key of the random numbers
  double probability;
};

// The activations of an epilogue, in the order of fastnets.reference.conv.ACTIVATIONS.
enum class Activation : int { kNone, kRelu, kGelu, kSilu, kSigmoid, kTanh };

// A convolution y[N, G K, *out] of x[N, G C, *in] with weight[G K, C, *kernel], G groups; fewer than three spatial
// dimensions are led by ones. x and y are contiguous, or have their channels innermost.
struct ConvShape {
  Dtype dtype;
  bool channels_last;
  bool tf32;                                                             // float32 products may be TF32's
  int64_t batch, groups, in_channels, out_channels;                      // channels of one group: C, K
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];  // padding: before the first element
  int64_t weight_strides[5];                                             // K, C, kernel, in elements
};

// Forwards x -> y, or backwards y -> x, with the epilogue activation(... + bias + residual).
struct ConvGather {
  ConvShape shape;
  const void* source;    // x, or the gradient of y
  const void* weight;    // through shape.weight_strides
  const void* bias;      // [channels of the result], or null
  const void* residual;  // laid out as the result, or null
  void* result;          // y, or the gradient of x
  void* kept;            // laid out as the result: the activation's input; or null
  Activation activation;
};

struct ConvGradWeight {
  ConvShape shape;
  const void* grad;  // of y
  const void* x;
  void* grad_weight;  // through shape.weight_strides
  void* grad_bias;    // [channels of y], or null; GPU kernels leave it to torch
};

struct ConvGradEpilogue {
  Dtype dtype;
  Activation activation;
  const void* grad;   // [count]
  const void* saved;  // [count]: the activation's input (gelu, silu), or its output
  void* result;       // [count]
  int64_t count;
};

enum class Cell : int { kLstm, kGru, kRnnTanh, kRnnRelu };  // the order of fastnets.reference.recurrent.CELLS

// What an lstm does beyond the plain one, see Variant in fastnets/reference/recurrent.py. Null: not in use.
struct LstmVariant {
  const void* peephole;                     // [3 H]
  const void* norm;                         // [10 H]
  const uint8_t *keep_g, *hold_h, *hold_c;  // [T, B, H], [T, B, P], [T, B, H]: zero or one
  double keep_scale, zoneout_h, zoneout_c;
  double clip;  // infinity: none
};

// One recurrent layer in one direction: T steps, B rows, I inputs, H hidden units, P outputs (H without projection), G
// gates. Gates are kept in columns: lstm i, f, g, o; gru n's part from x, r, z, n's part from h; rnn its only one.
struct RecurrentShape {
  Dtype dtype;
  Cell cell;
  bool reverse, tf32;  // tf32: a GPU may round the operands of float products
  int64_t steps, batch, input, hidden, output;
  const int64_t* lengths;  // [B], within [0, T] or clamped; null: all T
  bool is_variant;         // an lstm that is not the plain one
  LstmVariant variant;
};

struct RecurrentForward {
  RecurrentShape shape;
  const void* x;     // [T, B, I]
  const void* h0;    // [B, P]
  const void* c0;    // [B, H], lstm only
  const void* w_ih;  // [G H, I]
  const void* w_hh;  // [G H, P]
  const void* b_ih;  // [G H] or null
  const void* b_hh;  // [G H] or null
  const void* w_hr;  // [P, H] or null
  void* y;           // [T, B, P]
  void* h;           // [B, P]
  void* c;           // [B, H], lstm only
  void* gates;  // [T, B, 4 H], behind the activation, in the type that arithmetic runs in; or null. With layer norm
                // [T, B, 12 H]: behind these W_ih x and W_hh h before it
  void* cells;  // [T, B, H], lstm's c of every step, likewise
};

struct RecurrentBackward {
  RecurrentShape shape;
  const void *grad_y, *grad_h, *grad_c;                              // of y, h and c; each may be null
  const void *x, *h0, *c0, *w_ih, *w_hh, *w_hr, *y, *gates, *cells;  // as in RecurrentForward
  // Of the shapes of what they are gradients of; null where nobody asks.
  void *grad_x, *grad_h0, *grad_c0, *grad_w_ih, *grad_w_hh, *grad_b_ih, *grad_b_hh, *grad_w_hr;
  void *grad_peephole, *grad_norm;
};

// A tensor [batch, head, row, ...] with contiguous rows; strides in elements.
struct AttentionArray {
  void* data;
  int64_t batch, head, row;
};

// What every attention kernel is told; starts, seed and slopes, too, lie where the tensors do. Lengths and shapes: q
// [batch, heads, lq, d], k [batch, heads / groups, lk, d], v [batch, heads / groups, lk, dv]. With `starts`, batch
// counts the sequences, which lie one after the other in the rows of one entry.
struct Attention {
  Dtype dtype;
  AttentionArray q, k, v;
  int64_t batch, heads, groups, lq, lk, d, dv;
  MaskKind mask_kind;
  Dtype mask_dtype;
  const void* mask;
  int64_t mask_strides[4];             // of [batch, heads, lq, lk]; 0 where it broadcasts
  const void* slopes;                  // ALiBi, float (double for kFloat64), or null
  int64_t slope_strides[2];            // of [batch, heads]
  const int64_t *starts_q, *starts_k;  // [batch + 1], or null
  // Query i sees keys i + offset - left <= j <= i + offset + right, offset counted from lk - lq with `bottom_right`.
  int64_t left, right, offset;
  bool bottom_right;
  double scale, softcap, dropout;
  const int64_t* seed;  // [2] words of 32 bits: the key of dropout's random numbers
  bool tf32;            // float32 products may be TF32's, on devices that have it
};
constexpr int64_t kUnlimited = int64_t{1} << 60;  // for left and right

struct AttentionForward : Attention {
  AttentionArray out;  // [batch, heads, lq, dv]
  void* lse;           // [batch, heads, lq], contiguous, in log2; float, double for kFloat64
};

struct AttentionWeights : Attention {
  const void* lse;
  void* weights;  // [batch, heads, lq, lk], contiguous
};

struct AttentionBackward : Attention {
  AttentionArray grad_out, out;
  const void* lse;
  const void* grad_lse;      // of the natural logarithm, as lse, or null
  const void* grad_weights;  // [batch, heads, lq, lk], contiguous, or null
  AttentionArray grad_q, grad_k, grad_v;
  // The keys of a head are dealt out to `splits` units of work, each with a sum for the queries' gradient of its own:
  // float or double, [batch * heads / groups, splits, groups, lq, d rounded up to 16]; null where splits is 1.
  int64_t splits;
  void* partial_grad_q;
  void* grad_mask;  // contiguous, of the mask's own sizes
  int64_t mask_sizes[4];
  bool deterministic;  // the same bits in every run, where that takes another way
};

// One row a kernel: its name and its parameters. Every instruction set implements all of them.
#define FASTNETS_CPU_KERNELS(X)            \
  X(conv_forward, ConvGather)              \
  X(conv_grad_input, ConvGather)           \
  X(conv_grad_weight, ConvGradWeight)      \
  X(conv_grad_epilogue, ConvGradEpilogue)  \
  X(recurrent_forward, RecurrentForward)   \
  X(recurrent_backward, RecurrentBackward) \
  X(softmax_forward, SoftmaxForward)       \
  X(softmax_backward, SoftmaxBackward)     \
  X(dropout, ElementDropout)               \
  X(attention_forward, AttentionForward)   \
  X(attention_weights, AttentionWeights)   \
  X(attention_backward, AttentionBackward)

struct Kernels {
#define FASTNETS_FIELD(name, Params) void (*name)(const Params&);
  FASTNETS_CPU_KERNELS(FASTNETS_FIELD)
#undef FASTNETS_FIELD
};

#define FASTNETS_DECLARE(name, Params) void name(const Params&);
namespace generic {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
namespace avx2 {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
namespace avx512 {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
// AVX-512 with products of bfloat16: these have kernels of their own there.
namespace avx512_bf16 {
void recurrent_forward(const RecurrentForward&);
void recurrent_backward(const RecurrentBackward&);
void attention_forward(const AttentionForward&);
void attention_weights(const AttentionWeights&);
void attention_backward(const AttentionBackward&);
}  // namespace avx512_bf16
#undef FASTNETS_DECLARE

// The kernels of the best instruction set of this machine, or of the one that FASTNETS_CPU names.
const Kernels& kernels();

}  // namespace fastnets
