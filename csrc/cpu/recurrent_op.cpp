#include "../recurrent_op.h"

namespace fastnets {
namespace {

struct Cpu {
  static void forward(std::span<ForwardCall> calls) {
    for (const ForwardCall& call : calls) kernels().recurrent_forward(call.p);
  }

  static void backward(std::span<BackwardCall> calls, bool need_x, bool need_weights) {
    for (BackwardCall& call : calls) call.of = backward(call.p, call.operands, need_x, need_weights);
  }

 private:
  static RecurrentGradients backward(RecurrentBackward& p, const RecurrentOperands& o, bool need_x, bool need_weights) {
    const auto gradient = [&](const Tensor& of, bool needed, void*& to) {
      Tensor grad = needed ? torch::stable::empty_like(of) : new_empty(of, {0});
      if (needed) to = grad.data_ptr();
      return grad;
    };
    const auto parameter = [&](const OptionalTensor& of, void*& to) {
      return gradient(of ? *of : o.x, of && need_weights, to);
    };
    RecurrentGradients of{.x = gradient(o.x, need_x, p.grad_x),
                          .w_ih = gradient(o.w_ih, need_weights, p.grad_w_ih),
                          .w_hh = gradient(o.w_hh, need_weights, p.grad_w_hh),
                          .b_ih = new_empty(o.x, {need_weights ? o.w_hh.size(0) : 0}),
                          .b_hh = new_empty(o.x, {need_weights ? o.w_hh.size(0) : 0}),
                          .w_hr = parameter(o.w_hr, p.grad_w_hr),
                          .peephole = parameter(o.variant.peephole, p.grad_peephole),
                          .norm = parameter(o.variant.norm, p.grad_norm)};
    p.grad_b_ih = of.b_ih.data_ptr(), p.grad_b_hh = of.b_hh.data_ptr();
    kernels().recurrent_backward(p);
    return of;
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastnets::recurrent_forward<fastnets::Cpu>));
  m.impl("recurrent_backward", TORCH_BOX(&fastnets::recurrent_backward<fastnets::Cpu>));
}
