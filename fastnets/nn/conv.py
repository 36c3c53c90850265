"""torch.nn's convolutions on our kernels."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import functional

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class _Forward:
    """The forward path of a convolution in any number of dimensions; no state of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        conv = _CONV[len(self.kernel_size)]
        return conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _TransposedForward:
    """The forward path of a transposed convolution in any number of dimensions; no state of its own."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Applies the layer; `output_size` chooses among the sizes that stride > 1 leaves open, as in torch.nn."""
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        conv = _CONV_TRANSPOSE[dims]
        return conv(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class Conv1d(_Forward, torch.nn.Conv1d):
    """torch.nn.Conv1d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""


class Conv2d(_Forward, torch.nn.Conv2d):
    """torch.nn.Conv2d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""


class Conv3d(_Forward, torch.nn.Conv3d):
    """torch.nn.Conv3d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""


class ConvTranspose1d(_TransposedForward, torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""


class ConvTranspose2d(_TransposedForward, torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""


class ConvTranspose3d(_TransposedForward, torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d, drop-in: the same constructor, parameters, initial values, state_dict and repr."""
