// What the operators (`*_op.cpp`, with torch's headers) may ask of the kernels (`*.cu`, without them). The parameters
// are those of the CPU's kernels.
#pragma once

#include <cstddef>
#include <span>

#include "../cpu/kernels.h"

namespace fastnets {

using Stream = void*;  // a cudaStream_t; the SIMT device has none

namespace cuda {

// What the recurrent kernels are given beside the operators' parameters: work done by torch's products, and memory.
// Rows that they read in pieces of 16 bytes end on whole ones, with zeros: w_hh, w_hr and the padded rows here. So must
// those of x and w_ih where a single step is to make its product itself.
struct RecurrentForwardPass : RecurrentForward {
  int64_t output_row, hidden_row;  // elements from one padded row to the next: of P, of H
  const void* from_x;              // [T, B, G H], x times w_ih, float with layer norm; or null, of one step
  const void* first_h;             // [B, output_row], h0
  void* exchange;                  // [2, B, output_row], zeros; null where y's rows need no padding
  void* unprojected;               // [B, hidden_row], zeros, with w_hr
  float* state;                    // [B, H], lstm and gru
  float* made;                     // [B, H], with layer norm: the new states, before zoneout
  float* kept;                     // [B, 12 H], with layer norm, of one step, where its `gates` are null
  uint32_t* flags;                 // [recurrent_flags], zeros where blocks wait for each other

  // One step is made of what is there already; but w_hr takes that step's h, and layer norm all of a row.
  bool waits() const { return shape.steps > 1 || w_hr != nullptr || shape.variant.norm != nullptr; }
};

struct RecurrentBackwardPass : RecurrentBackward {  // w_hh and w_hr transposed, grad_x and those of weights not asked
  int64_t output_row, gates_row;                    // elements from one padded row to the next: of P, of G H
  void* grad_gates;                                 // [T, B, gates_row], zeros behind G H: what w_hh's rows receive
  void* grad_inputs;       // [T, B, G H]: what w_ih's rows receive, where that is not the same (gru, layer norm)
  void* h_before;          // [T, B, P], all but the sequences' first steps there already; or null
  void* grad_projected;    // [T, B, output_row], zeros behind P: what h receives behind w_hr
  void* unprojected;       // [T, B, H]: h before w_hr
  float* grad_peepholes;   // [T, B, 3 H]: what every row and step adds to that of a variant's peephole; or null
  float* grad_sums;        // [T, B, 14 H], with layer norm: of the gates, 4 H, and what `norm` is added
  float *grad_out, *made;  // [B, H], with layer norm: of h before w_hr; the new states, before zoneout
  float* carried;          // [B, P]
  float* state;            // [B, H], lstm
  uint32_t* flags;         // [recurrent_flags], zeros
};

// More than any launch for such a layer uses.
int64_t recurrent_flags(const RecurrentShape& s);
// One direction of a layer, or two that differ in nothing but `reverse` and what their pointers point at: those in one
// launch where the device runs all of their blocks at once, else one after the other.
void recurrent_forward(std::span<const RecurrentForwardPass> directions, Stream stream);
void recurrent_backward(std::span<const RecurrentBackwardPass> directions, Stream stream);

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
