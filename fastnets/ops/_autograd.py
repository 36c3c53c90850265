"""One autograd shell for every operator: a `Call` says how to run forwards, backwards and differentiably."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


class Call:
    """One call of an operator on one backend: its options, and how to run it.

    A family subclasses this; `run` is the only way in. `inputs` are the tensors that may need a gradient (None where
    absent), in a fixed order; everything else is an attribute of the call.
    """

    visible: int = 1
    """How many of forward's outputs belong to the caller and carry gradients; the rest are for backward alone."""

    saves_outputs: bool = True
    """Whether backward wants the visible outputs back; where it does not, they need not stay in memory for it."""

    def saved(self, inputs: Tensors) -> Tensors:
        """The inputs that backward wants, None in place of the others, which need not stay in memory for it."""
        return inputs

    def forward(self, *inputs: Tensor | None) -> Tensors:
        """Runs the operator: the visible outputs, then what backward needs besides."""
        raise NotImplementedError

    def backward(self, inputs: Tensors, outputs: Tensors, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        """A gradient for every input with `needs`; `grads` has one entry a visible output, None where unused.

        `outputs` are forward's, less the visible ones if not `saves_outputs`.
        """
        raise NotImplementedError

    def reference(self, *inputs: Tensor | None) -> Tensors:
        """The visible outputs by the differentiable definition in fastnets.reference."""
        raise NotImplementedError

    def differentiable_backward(self, inputs: Tensors, outputs: Tensors, grads: Tensors, needs: Sequence[bool]):
        """As `backward`, itself differentiable: through the reference."""

        def visible(*chosen: Tensor) -> Tensors:
            replaced = iter(chosen)
            return self.reference(*(next(replaced) if need else t for t, need in zip(inputs, needs, strict=True)))

        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        results, pull = torch.func.vjp(visible, *wanted)
        cotangents = tuple(
            torch.zeros_like(result) if grad is None else grad for result, grad in zip(results, grads, strict=True)
        )
        found = iter(pull(cotangents))
        return tuple(next(found) if need else None for need in needs)


def _keep(ctx, call: Call, inputs: Tensors, outputs: Tensors) -> None:
    ctx.call = call
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    hidden = outputs[call.visible :]
    ctx.mark_non_differentiable(*(t for t in hidden if t is not None))
    ctx.save_for_backward(*call.saved(inputs), *(outputs if call.saves_outputs else hidden))


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *inputs: Tensor | None) -> Tensors:
        outputs = call.forward(*inputs)
        _keep(ctx, call, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        saved = ctx.saved_tensors
        inputs, outputs = saved[: ctx.inputs], saved[ctx.inputs :]
        needs = ctx.needs_input_grad[1:]
        grads = grads[: ctx.call.visible]
        if all(g is None for g in grads):
            return (None,) * (1 + len(inputs))
        # Gradients of the gradients are wanted: only then is grad mode on here. (A graph being compiled has none.)
        differentiable = (torch.is_grad_enabled() or transforming()) and not torch.compiler.is_compiling()
        run = ctx.call.differentiable_backward if differentiable else ctx.call.backward
        return (None, *run(inputs, outputs, grads, needs))


class _Transformable(_Operator):
    """The same where torch.func's transforms or the compiler see it; setup_context costs as much as a small kernel."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor | None) -> Tensors:
        return call.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        call, *tensors = inputs
        _keep(ctx, call, tensors, outputs)

    @staticmethod
    def vmap(info, in_dims, call: Call, *inputs: Tensor | None):
        """torch.func.vmap maps the reference: the kernels know no batch dimension besides their own."""
        outputs = torch.vmap(call.reference, in_dims=in_dims[1:], randomness=info.randomness)(*inputs)
        return outputs, (0,) * len(outputs)


def transforming() -> bool:
    """True inside torch.func's transforms, whose tensors the kernels must not see."""
    return torch._C._are_functorch_transforms_active()


def _distinct(inputs: Tensors) -> Tensors:
    """The inputs with aliases in place of repeated ones (query is key), which dynamo does not take."""
    return tuple(
        t.view_as(t) if t is not None and any(t is former for former in inputs[:i]) else t for i, t in enumerate(inputs)
    )


def run(call: Call, *inputs: Tensor | None) -> Tensors:
    """Runs the call and returns its visible outputs, with autograd where an input asks for it."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if torch.compiler.is_compiling():
        if wanted:
            return _Transformable.apply(call, *_distinct(inputs))[: call.visible]
    elif transforming():
        return _Transformable.apply(call, *inputs)[: call.visible]
    elif wanted:
        return _Operator.apply(call, *inputs)[: call.visible]
    return call.forward(*inputs)[: call.visible]
