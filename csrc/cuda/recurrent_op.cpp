#include "../recurrent_op.h"

#include <algorithm>
#include <array>

#include "op.h"

namespace fastnets {
namespace {

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

Tensor part(Tensor x, int64_t dim, int64_t first, int64_t count) { return torch::stable::narrow(x, dim, first, count); }

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
  Tensor to = part(copy, 1, 0, columns);
  torch::stable::copy_(to, x);
  return copy;
}

void copy_rows(const Tensor& to, int64_t first, const Tensor& from, int64_t from_first, int64_t count) {
  Tensor target = part(to, 0, first, count);
  torch::stable::copy_(target, part(from, 0, from_first, count));
}

Tensor column_sums(const Tensor& x) {
  const std::array<int64_t, 1> rows = {0};
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), rows.size()));
}

// Whether a step of few rows makes its product with x in the same launch: what the weights cost is reading them once.
bool makes_from_x(const RecurrentShape& s, const RecurrentOperands& o) {
  constexpr int64_t kRows = 32;
  return s.steps == 1 && s.batch <= kRows && s.variant.norm == nullptr && padded(o.x, s.input) == s.input &&
         is_aligned(o.x) && is_aligned(o.w_ih);
}

Tensor new_floats(const Tensor& x, bool wanted, std::initializer_list<int64_t> size) {
  return wanted ? new_empty(x, size, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
}
float* floats(const Tensor& x) { return x.numel() > 0 ? static_cast<float*>(x.data_ptr()) : nullptr; }

// All of x W_ih. Layer norm enlarges what is rounded off of it: there it stays in float.
Tensor times_w_ih(const RecurrentOperands& o) {
  if (!o.variant.norm || o.x.scalar_type() == ScalarType::Float) return torch::stable::matmul(o.x, transposed(o.w_ih));
  const auto to_float = [](const Tensor& t) {
    Tensor copy = torch::stable::new_empty(t, t.sizes(), ScalarType::Float);
    torch::stable::copy_(copy, t);
    return copy;
  };
  return torch::stable::matmul(to_float(o.x), transposed(to_float(o.w_ih)));
}

// A direction on its way to the kernels, with the memory that they need.
struct ForwardMemory {
  Tensor from_x, w_hh, first_h, w_hr, exchange, unprojected, state, made, kept, flags;
  cuda::RecurrentForwardPass p{};

  // `alone`: the kernel makes the product with x.
  ForwardMemory(const RecurrentOperands& o, const RecurrentForward& params, bool alone)
      : from_x(alone ? o.x : times_w_ih(o)),
        w_hh(padded(o.w_hh)),
        first_h(padded(o.h0)),
        w_hr(o.w_hr ? padded(*o.w_hr) : o.x),
        exchange(o.x),
        unprojected(o.x),
        state(new_floats(o.x, true, {o.h0.size(0), params.shape.hidden})),
        made(new_floats(o.x, params.shape.variant.norm != nullptr, {o.h0.size(0), params.shape.hidden})),
        kept(new_floats(o.x, params.shape.variant.norm != nullptr && params.gates == nullptr,
                        {o.h0.size(0), 12 * params.shape.hidden})),
        flags(o.x) {
    static_cast<RecurrentForward&>(p) = params;
    const RecurrentShape& s = params.shape;
    p.output_row = padded(o.x, s.output), p.hidden_row = padded(o.x, s.hidden);
    exchange = new_zeros(o.x, {p.output_row == s.output ? 0 : 2 * s.batch * p.output_row});
    unprojected = new_zeros(o.x, {o.w_hr ? s.batch * p.hidden_row : 0});
    p.w_hh = w_hh.data_ptr(), p.w_hr = o.w_hr ? w_hr.data_ptr() : nullptr;
    p.from_x = alone ? nullptr : from_x.data_ptr(), p.first_h = first_h.data_ptr();
    p.exchange = exchange.numel() > 0 ? exchange.data_ptr() : nullptr;
    p.unprojected = unprojected.data_ptr();
    p.state = floats(state), p.made = floats(made), p.kept = floats(kept);
    const int64_t count = cuda::recurrent_flags(s);
    flags = p.waits() ? new_zeros(o.x, {count}, ScalarType::Int) : new_empty(o.x, {count}, ScalarType::Int);
    p.flags = static_cast<uint32_t*>(flags.data_ptr());
  }
};

struct BackwardMemory {
  Tensor grad_gates, grad_inputs, grad_projected, unprojected, grad_peepholes, grad_sums, h_before;
  Tensor w_hh, w_hr, carried, state, grad_out, made, flags;
  cuda::RecurrentBackwardPass p{};

  BackwardMemory(const BackwardCall& call, bool need_weights)
      : BackwardMemory(call, call.p.shape, call.operands, call.p.shape.steps * call.p.shape.batch,
                       call.operands.w_hh.size(0), need_weights) {}

 private:
  BackwardMemory(const BackwardCall& call, const RecurrentShape& s, const RecurrentOperands& o, int64_t rows,
                 int64_t gates, bool need_weights)
      : grad_gates(new_padded(o.x, rows, gates)),
        grad_inputs(s.cell == Cell::kGru || o.variant.norm ? new_empty(o.x, {rows, gates})
                                                           : part(grad_gates, 1, 0, gates)),
        grad_projected(new_padded(o.x, o.w_hr ? rows : 0, s.output)),
        unprojected(new_empty(o.x, {o.w_hr ? rows : 0, s.hidden})),
        grad_peepholes(new_floats(o.x, need_weights && o.variant.peephole, {rows, 3 * s.hidden})),
        grad_sums(new_floats(o.x, o.variant.norm.has_value(), {rows, 14 * s.hidden})),
        h_before(new_empty(o.x, {need_weights ? rows : 0, s.output})),
        w_hh(padded(transposed(o.w_hh))),
        w_hr(o.w_hr ? padded(transposed(*o.w_hr)) : o.x),
        carried(new_floats(o.x, true, {s.batch, s.output})),
        state(new_floats(o.x, true, {s.batch, s.hidden})),
        grad_out(new_floats(o.x, o.variant.norm.has_value(), {s.batch, s.hidden})),
        made(new_floats(o.x, o.variant.norm.has_value(), {s.batch, s.hidden})),
        flags(new_zeros(o.x, {cuda::recurrent_flags(s)}, ScalarType::Int)) {
    static_cast<RecurrentBackward&>(p) = call.p;
    p.output_row = padded(o.x, s.output), p.gates_row = padded(o.x, gates);
    if (need_weights && rows > 0) {  // but for the first steps of shorter sequences, reversed, which the kernel sets
      const int64_t first = s.reverse ? rows - s.batch : 0, from = s.reverse ? s.batch : 0;
      copy_rows(h_before, first, o.h0, 0, s.batch);
      copy_rows(h_before, s.batch - from, torch::stable::view(call.y, {rows, s.output}), from, rows - s.batch);
      p.h_before = h_before.data_ptr();
    }
    p.w_hh = w_hh.data_ptr(), p.w_hr = o.w_hr ? w_hr.data_ptr() : nullptr;
    p.grad_gates = grad_gates.data_ptr(), p.grad_inputs = grad_inputs.data_ptr();
    p.grad_projected = grad_projected.data_ptr(), p.unprojected = unprojected.data_ptr();
    p.grad_peepholes = floats(grad_peepholes), p.grad_sums = floats(grad_sums);
    p.carried = floats(carried), p.state = floats(state), p.grad_out = floats(grad_out), p.made = floats(made);
    p.flags = static_cast<uint32_t*>(flags.data_ptr());
  }
};

Tensor rounded_like(const Tensor& x, const Tensor& like) {
  Tensor result = torch::stable::empty_like(like);
  torch::stable::copy_(result, x);
  return result;
}

// What the kernels left of the gradients of x and the weights: products and sums over all steps.
RecurrentGradients gradients(const BackwardMemory& m, const RecurrentOperands& o, bool need_x, bool need_weights) {
  const RecurrentShape& s = m.p.shape;
  const int64_t rows = s.steps * s.batch, gates = o.w_hh.size(0);
  const Tensor none = new_empty(o.x, {0});
  RecurrentGradients of{none, none, none, none, none, none, none, none};
  if (need_x) {
    of.x = torch::stable::view(torch::stable::matmul(m.grad_inputs, o.w_ih), {s.steps, s.batch, s.input});
  }
  if (!need_weights) return of;
  const Tensor of_gates = part(m.grad_gates, 1, 0, gates);
  of.w_ih = torch::stable::matmul(transposed(m.grad_inputs), torch::stable::view(o.x, {rows, s.input}));
  of.w_hh = torch::stable::matmul(transposed(of_gates), m.h_before);
  if (o.variant.norm) {  // behind which both biases are added
    const Tensor sums = column_sums(m.grad_sums);
    of.norm = rounded_like(part(sums, 0, gates, 10 * s.hidden), *o.variant.norm);
    of.b_ih = new_empty(o.x, {gates});
    torch::stable::copy_(of.b_ih, part(sums, 0, 0, gates));
    of.b_hh = rounded_like(of.b_ih, of.b_ih);
  } else {
    of.b_ih = column_sums(m.grad_inputs), of.b_hh = column_sums(of_gates);
  }
  if (o.variant.peephole) of.peephole = rounded_like(column_sums(m.grad_peepholes), *o.variant.peephole);
  if (o.w_hr) {
    const Tensor of_h = part(m.grad_projected, 1, 0, s.output);
    of.w_hr = torch::stable::matmul(transposed(of_h), m.unprojected);
  }
  return of;
}

// The products over all steps are torch's: they are as large as any in a network, and its own library knows every GPU.
struct Gpu {
  static void forward(std::span<ForwardCall> calls) {
    const RecurrentShape& s = calls[0].p.shape;
    if (s.batch == 0) return;
    STD_TORCH_CHECK(s.steps < (int64_t{1} << 32), "x has too many steps");
    const Queue queue(calls[0].operands.x);
    const bool alone = std::all_of(calls.begin(), calls.end(),
                                   [](const ForwardCall& call) { return makes_from_x(call.p.shape, call.operands); });
    std::vector<ForwardMemory> memory;
    std::vector<cuda::RecurrentForwardPass> passes;
    for (const ForwardCall& call : calls) passes.push_back(memory.emplace_back(call.operands, call.p, alone).p);
    cuda::recurrent_forward(passes, queue.stream());
  }

  static void backward(std::span<BackwardCall> calls, bool need_x, bool need_weights) {
    const Queue queue(calls[0].operands.x);
    std::vector<BackwardMemory> memory;
    std::vector<cuda::RecurrentBackwardPass> passes;
    for (const BackwardCall& call : calls) passes.push_back(memory.emplace_back(call, need_weights).p);
    if (calls[0].p.shape.batch > 0) cuda::recurrent_backward(passes, queue.stream());
    for (size_t i = 0; i < calls.size(); ++i) {
      calls[i].of = gradients(memory[i], calls[i].operands, need_x, need_weights);
    }
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(FASTNETS_LIBRARY, FASTNETS_KEY, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastnets::recurrent_forward<fastnets::Gpu>));
  m.impl("recurrent_backward", TORCH_BOX(&fastnets::recurrent_backward<fastnets::Gpu>));
  m.impl("recurrent_forward_both", TORCH_BOX(&fastnets::recurrent_forward_both<fastnets::Gpu>));
  m.impl("recurrent_backward_both", TORCH_BOX(&fastnets::recurrent_backward_both<fastnets::Gpu>));
}
