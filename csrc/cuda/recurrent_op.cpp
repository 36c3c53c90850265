#include "../recurrent_op.h"

#include <array>

#include "op.h"

namespace fastnets {
namespace {

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

Tensor narrow(Tensor x, int64_t dim, int64_t first, int64_t count) {
  return torch::stable::narrow(x, dim, first, count);
}

Tensor new_zeros(const Tensor& x, std::initializer_list<int64_t> size, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_zeros(x, {size.begin(), size.size()}, dtype);
}

// Elements from one padded row to the next.
int64_t padded(const Tensor& x, int64_t columns) {
  const int64_t piece = 16 / x.element_size();
  return (columns + piece - 1) / piece * piece;
}

// Rows with zeros behind their columns, the columns not set.
Tensor new_padded(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t row = padded(x, columns);
  return row == columns ? new_empty(x, {rows, row}) : new_zeros(x, {rows, row});
}

bool is_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0; }

// A matrix whose rows are whole pieces of 16 bytes: itself, or a copy with zeros behind its columns.
Tensor padded(const Tensor& x) {
  const int64_t columns = x.size(1), row = padded(x, columns);
  if (row == columns && x.is_contiguous() && is_aligned(x)) return x;
  const Tensor copy = new_padded(x, x.size(0), columns);
  Tensor to = narrow(copy, 1, 0, columns);
  torch::stable::copy_(to, x);
  return copy;
}

void copy_rows(const Tensor& to, int64_t first, const Tensor& from, int64_t from_first, int64_t count) {
  Tensor target = narrow(to, 0, first, count);
  torch::stable::copy_(target, narrow(from, 0, from_first, count));
}

Tensor column_sums(const Tensor& x) {
  const std::array<int64_t, 1> rows = {0};
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), rows.size()));
}

// Whether a step of few rows makes its product with x in the same launch: what the weights cost is reading them once.
bool makes_from_x(const RecurrentShape& s, const RecurrentOperands& o) {
  constexpr int64_t kRows = 32;
  return s.steps == 1 && s.batch <= kRows && padded(o.x, s.input) == s.input && is_aligned(o.x) && is_aligned(o.w_ih);
}

// The products over all steps are torch's: they are as large as any in a network, and its own library knows every GPU.
struct Gpu {
  static void forward(const RecurrentForward& params, const RecurrentOperands& o) {
    const RecurrentShape& s = params.shape;
    STD_TORCH_CHECK(s.variant.norm == nullptr, "the CUDA kernels have no layer norm");
    if (s.batch == 0) return;
    STD_TORCH_CHECK(s.steps < (int64_t{1} << 32), "x has too many steps");
    const Queue queue(o.x);
    cuda::RecurrentForwardPass p{};
    static_cast<RecurrentForward&>(p) = params;
    p.output_row = padded(o.x, s.output), p.hidden_row = padded(o.x, s.hidden);
    const bool alone = makes_from_x(s, o);
    const Tensor from_x = alone ? o.x : torch::stable::matmul(o.x, transposed(o.w_ih));
    const Tensor w_hh = padded(o.w_hh), first_h = padded(o.h0), w_hr = o.w_hr ? padded(*o.w_hr) : o.x;
    const Tensor exchange = new_zeros(o.x, {p.output_row == s.output ? 0 : 2 * s.batch * p.output_row});
    const Tensor unprojected = new_zeros(o.x, {o.w_hr ? s.batch * p.hidden_row : 0});
    const Tensor state = new_empty(o.x, {s.batch * s.hidden}, ScalarType::Float);
    const int64_t count = cuda::recurrent_flags(s);
    const Tensor flags =
        p.waits() ? new_zeros(o.x, {count}, ScalarType::Int) : new_empty(o.x, {count}, ScalarType::Int);
    p.w_hh = w_hh.data_ptr(), p.w_hr = o.w_hr ? w_hr.data_ptr() : nullptr;
    p.from_x = alone ? nullptr : from_x.data_ptr(), p.first_h = first_h.data_ptr();
    p.exchange = exchange.numel() > 0 ? exchange.data_ptr() : nullptr;
    p.unprojected = unprojected.data_ptr();
    p.state = static_cast<float*>(state.data_ptr());
    p.flags = static_cast<uint32_t*>(flags.data_ptr());
    cuda::recurrent_forward(p, queue.stream());
  }

  static RecurrentGradients backward(const RecurrentBackward& params, const RecurrentOperands& o, const Tensor& y,
                                     bool need_x, bool need_weights) {
    const RecurrentShape& s = params.shape;
    STD_TORCH_CHECK(s.variant.norm == nullptr, "the CUDA kernels have no layer norm");
    const int64_t rows = s.steps * s.batch, gates = o.w_hh.size(0);
    const bool gru = s.cell == Cell::kGru;
    const Queue queue(o.x);
    cuda::RecurrentBackwardPass p{};
    static_cast<RecurrentBackward&>(p) = params;
    p.output_row = padded(o.x, s.output), p.gates_row = padded(o.x, gates);
    const Tensor grad_gates = new_padded(o.x, rows, gates);
    const Tensor grad_inputs = gru ? new_empty(o.x, {rows, gates}) : narrow(grad_gates, 1, 0, gates);
    const Tensor grad_projected = new_padded(o.x, o.w_hr ? rows : 0, s.output);
    const Tensor unprojected = new_empty(o.x, {o.w_hr ? rows : 0, s.hidden});
    const bool peephole = need_weights && o.variant.peephole;
    const Tensor grad_peepholes = new_empty(o.x, {peephole ? rows : 0, 3 * s.hidden}, ScalarType::Float);
    if (peephole) p.grad_peepholes = static_cast<float*>(grad_peepholes.data_ptr());
    const Tensor h_before = new_empty(o.x, {need_weights ? rows : 0, s.output});
    if (need_weights && rows > 0) {  // but for the first steps of shorter sequences, reversed, which the kernel sets
      const int64_t first = s.reverse ? rows - s.batch : 0, from = s.reverse ? s.batch : 0;
      copy_rows(h_before, first, o.h0, 0, s.batch);
      copy_rows(h_before, s.batch - from, torch::stable::view(y, {rows, s.output}), from, rows - s.batch);
      p.h_before = h_before.data_ptr();
    }
    if (s.batch > 0) {
      const Tensor w_hh = padded(transposed(o.w_hh)), w_hr = o.w_hr ? padded(transposed(*o.w_hr)) : o.x;
      const Tensor carried = new_empty(o.x, {s.batch * s.output}, ScalarType::Float);
      const Tensor state = new_empty(o.x, {s.batch * s.hidden}, ScalarType::Float);
      const Tensor flags = new_zeros(o.x, {cuda::recurrent_flags(s)}, ScalarType::Int);
      p.w_hh = w_hh.data_ptr(), p.w_hr = o.w_hr ? w_hr.data_ptr() : nullptr;
      p.grad_gates = grad_gates.data_ptr(), p.grad_inputs = grad_inputs.data_ptr();
      p.grad_projected = grad_projected.data_ptr(), p.unprojected = unprojected.data_ptr();
      p.carried = static_cast<float*>(carried.data_ptr()), p.state = static_cast<float*>(state.data_ptr());
      p.flags = static_cast<uint32_t*>(flags.data_ptr());
      cuda::recurrent_backward(p, queue.stream());
    }
    const Tensor none = new_empty(o.x, {0});
    RecurrentGradients of{none, none, none, none, none, none, none, none};
    if (need_x) {
      of.x = torch::stable::view(torch::stable::matmul(grad_inputs, o.w_ih), {s.steps, s.batch, s.input});
    }
    if (!need_weights) return of;
    const Tensor of_gates = narrow(grad_gates, 1, 0, gates);
    of.w_ih = torch::stable::matmul(transposed(grad_inputs), torch::stable::view(o.x, {rows, s.input}));
    of.w_hh = torch::stable::matmul(transposed(of_gates), h_before);
    of.b_ih = column_sums(grad_inputs), of.b_hh = column_sums(of_gates);
    if (peephole) {
      of.peephole = torch::stable::empty_like(*o.variant.peephole);
      torch::stable::copy_(of.peephole, column_sums(grad_peepholes));
    }
    if (o.w_hr) {
      const Tensor of_h = narrow(grad_projected, 1, 0, s.output);
      of.w_hr = torch::stable::matmul(transposed(of_h), unprojected);
    }
    return of;
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(FASTNETS_LIBRARY, FASTNETS_KEY, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastnets::recurrent_forward<fastnets::Gpu>));
  m.impl("recurrent_backward", TORCH_BOX(&fastnets::recurrent_backward<fastnets::Gpu>));
}
