"""torch.nn's recurrent layers and cells on our kernels.

The classes hold no state of their own: `module.__class__ = fastnets.nn.LSTM` converts an instance in place. What an
LSTM's options need beyond torch's parameters is there only where they are in use.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..functional import dropout
from ..ops._checks import expect
from ..ops.recurrent import Direction, recurrent, recurrent_both, recurrent_step
from ..reference.recurrent import PLAIN, Variant
from . import _dynamo

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_dynamo.allow_recurrent_modules()


class LSTM(torch.nn.LSTM):
    """torch.nn.LSTM, drop-in: the same constructor, state_dict, initial values, arguments, results and errors.

    Besides torch's arguments it takes, by keyword alone, options that change the cell, in any combination and with all
    of torch's own (layers, directions, proj_size, packed sequences). docs/lstm.md has the formulas.

    Args:
        layer_norm: normalises W_ih x, W_hh h and, on its way to h, the cell state (Ba, Kiros and Hinton, "Layer
            normalization", 2016, equations 20 to 22). Parameters: gain_ih_l0 and gain_hh_l0 [4 H] and gain_c_l0 [H],
            initially 1, and, with bias, bias_c_l0 [H], 0.
        peephole: the gates see the cell state, i and f the former one, o the new one (Gers and Schmidhuber, "Recurrent
            nets that time and count", 2000). Parameter: weight_peephole_l0 [3 H], for i, f and o, initially as
            torch's.
        zoneout_h, zoneout_c: while training, the probability that a unit of h or c stays as it was before the step;
            in evaluation the expectation of that (Krueger et al., "Zoneout", 2016).
        recurrent_dropout: while training, the probability that a candidate g is zeroed in a step; the others grow by
            1 / (1 - p) (Semeniuta, Severyn and Barth, "Recurrent dropout without memory loss", 2016).
        cell_clip: the largest magnitude of a new cell state, as TensorFlow's LSTMCell has it; None: any.
        forget_bias: initial value of the forget gate's bias, both of torch's together (Jozefowicz, Zaremba and
            Sutskever, "An empirical exploration of recurrent network architectures", 2015, recommend 1); None:
            torch's random one.

    The random masks come from torch's generator, one for every layer, direction and step, of the padded rectangle where
    the input is packed.

    Raises:
        ValueError, TypeError: naming the option.
    """

    layer_norm: bool = False
    peephole: bool = False
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    cell_clip: float | None = None
    forget_bias: float | None = None

    def __init__(
        self,
        *args,
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        cell_clip: float | None = None,
        forget_bias: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        given = {
            **{"layer_norm": layer_norm, "peephole": peephole, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c},
            **{"recurrent_dropout": recurrent_dropout, "cell_clip": cell_clip, "forget_bias": forget_bias},
        }
        for name, value in given.items():
            if value != getattr(LSTM, name):
                setattr(self, name, value)
        if self.options:
            _check_options(self)
            for name, (units, _) in _OPTION_PARAMETERS.items():
                for suffix in _suffixes(self) if _has(self, name) else ():
                    like = getattr(self, f"weight_ih{suffix}")
                    parameter = torch.nn.Parameter(like.new_empty(units * self.hidden_size))
                    torch.nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
                    self.register_parameter(name + suffix, parameter)
            self._reset_options()

    @property
    def options(self) -> dict[str, bool | float]:
        """The options in use, which torch's LSTM lacks, by name."""
        return {name: value for name in _OPTIONS if (value := getattr(self, name)) != getattr(LSTM, name)}

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.options.items())])

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.options:
            self._reset_options()

    @torch.no_grad()
    def _reset_options(self) -> None:
        """The initial values that differ from torch's."""
        for suffix in _suffixes(self):
            for name, (_, value) in _OPTION_PARAMETERS.items():
                if value is not None and _has(self, name):
                    getattr(self, name + suffix).fill_(value)
            if self.forget_bias is not None:
                forget = slice(self.hidden_size, 2 * self.hidden_size)
                getattr(self, f"bias_ih{suffix}")[forget] = self.forget_bias
                getattr(self, f"bias_hh{suffix}")[forget] = 0.0

    def forward(self, input, hx=None):
        return _forward(self, input, hx)


_OPTIONS = ("layer_norm", "peephole", "zoneout_h", "zoneout_c", "recurrent_dropout", "cell_clip", "forget_bias")
# Parameter -> (multiples of the hidden size, initial value; None: random, as torch's own parameters).
_OPTION_PARAMETERS = {
    "weight_peephole": (3, None),
    "gain_ih": (4, 1.0),
    "gain_hh": (4, 1.0),
    "gain_c": (1, 1.0),
    "bias_c": (1, 0.0),
}


def _has(module: LSTM, parameter: str) -> bool:
    if parameter == "weight_peephole":
        return module.peephole
    return module.layer_norm and (module.bias or parameter != "bias_c")


def _suffixes(module: torch.nn.RNNBase) -> list[str]:
    """What ends the names of the parameters of every layer and direction, in order."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def _check_options(module: LSTM) -> None:
    for name in ("layer_norm", "peephole"):
        if not isinstance(getattr(module, name), bool):
            raise TypeError(f"{name}: expected a bool, got {type(getattr(module, name)).__name__}")
    for name in ("zoneout_h", "zoneout_c", "recurrent_dropout", "cell_clip", "forget_bias"):
        value = getattr(module, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    for name in ("zoneout_h", "zoneout_c"):
        expect(0 <= getattr(module, name) <= 1, name, "a number in [0, 1]", getattr(module, name))
    expect(0 <= module.recurrent_dropout < 1, "recurrent_dropout", "a number in [0, 1)", module.recurrent_dropout)
    clip = module.cell_clip
    expect(clip is None or 0 < clip < math.inf, "cell_clip", "None or a positive number", clip)
    forget = module.forget_bias
    expect(forget is None or module.bias, "forget_bias", "None without bias", forget)
    expect(forget is None or math.isfinite(forget), "forget_bias", "None or a finite number", forget)


def _variant(module: LSTM, suffix: str, x: Tensor, outputs: int) -> Variant:
    """A layer's variant, its random masks drawn for the input x[T, B, I]; `outputs`: the size of h."""
    norm, clip = None, module.cell_clip or 0.0
    peephole = getattr(module, f"weight_peephole{suffix}", None)
    if module.layer_norm:
        gain_c = getattr(module, f"gain_c{suffix}")
        bias_c = getattr(module, f"bias_c{suffix}") if module.bias else torch.zeros_like(gain_c)
        norm = torch.cat((getattr(module, f"gain_ih{suffix}"), getattr(module, f"gain_hh{suffix}"), gain_c, bias_c))
    if not module.training:
        return Variant(peephole, norm, zoneout_h=module.zoneout_h, zoneout_c=module.zoneout_c, clip=clip)

    def draw(probability: float, columns: int) -> Tensor | None:
        shape = (*x.shape[:2], columns)
        return torch.rand(shape, dtype=torch.float32, device=x.device) < probability if probability > 0 else None

    kept = 1 - module.recurrent_dropout
    return Variant(
        *(peephole, norm, draw(kept if kept < 1 else 0.0, module.hidden_size)),
        *(draw(module.zoneout_h, outputs), draw(module.zoneout_c, module.hidden_size)),
        keep_scale=1 / kept,
        clip=clip,
    )


class GRU(torch.nn.GRU):
    """torch.nn.GRU, drop-in: the same constructor, state_dict, initial values, arguments, results and errors."""

    def forward(self, input, hx=None):
        return _forward(self, input, hx)


class RNN(torch.nn.RNN):
    """torch.nn.RNN, drop-in: the same constructor, state_dict, initial values, arguments, results and errors."""

    def forward(self, input, hx=None):
        return _forward(self, input, hx)


def _forward(module: torch.nn.RNNBase, input, hx):
    if isinstance(input, PackedSequence):
        return _forward_packed(module, input, hx)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    if hx is not None:
        hx = _states(module, hx)
        for state in hx:
            if state.dim() != input.dim():
                raise RuntimeError(
                    f"hx: for {'batched' if batched else 'unbatched'} {input.dim()}-D input expected "
                    f"{input.dim()}-D states, got {state.dim()}-D"
                )
    batch_dim = 0 if module.batch_first else 1
    if not batched:
        input = input.unsqueeze(batch_dim)
        hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
    if hx is None:
        hx = _zero_states(module, input, input.size(batch_dim))
    _check(module, input, hx, None)
    if module.batch_first:
        input = input.transpose(0, 1)
    if input.size(0) == 0:
        raise RuntimeError("input: expected a sequence length larger than 0, got 0")
    y, hidden = _layers(module, input, hx, None)
    if module.batch_first:
        y = y.transpose(0, 1)
    if not batched:
        y, hidden = y.squeeze(batch_dim), tuple(state.squeeze(1) for state in hidden)
    return y, _as_given(module, hidden)


def _forward_packed(module: torch.nn.RNNBase, packed: PackedSequence, hx):
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    _check_packed(data, batch_sizes)
    batch = int(batch_sizes[0])
    if hx is None:
        hx = _zero_states(module, data, batch)
    else:
        hx = _states(module, hx)
        if sorted_indices is not None:
            hx = tuple(state.index_select(1, sorted_indices) for state in hx)
    _check(module, data, hx, batch_sizes)
    layout = _Packing(batch_sizes, data.device)
    y, hidden = _layers(module, layout.pad(data), hx, layout)
    if unsorted_indices is not None:
        hidden = tuple(state.index_select(1, unsorted_indices) for state in hidden)
    return PackedSequence(layout.pack(y), batch_sizes, sorted_indices, unsorted_indices), _as_given(module, hidden)


class _Packing:
    """Between a PackedSequence's data, longest sequence first, and a padded [T, B, ...]."""

    def __init__(self, batch_sizes: Tensor, device: torch.device):
        self.steps, self.batch = batch_sizes.numel(), int(batch_sizes[0])
        taken = torch.arange(self.batch) < batch_sizes.unsqueeze(1)  # [T, B]
        self.lengths = taken.sum(0).to(device)
        self.index = taken.flatten().nonzero().squeeze(1).to(device)

    def pad(self, data: Tensor) -> Tensor:
        rows = data.new_zeros(self.steps * self.batch, data.size(1))
        return rows.index_copy(0, self.index, data).view(self.steps, self.batch, -1)

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.index)


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""A direction's parameters, by the first part of their names."""


def _layers(
    module: torch.nn.RNNBase, x: Tensor, hx: tuple[Tensor, ...], packing: _Packing | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers and directions: x[T, B, I] to y[T, B, D P] and the last states, [layers D, B, P or H] each."""
    directions = 2 if module.bidirectional else 1
    lengths = None if packing is None else packing.lengths
    last = []
    options = isinstance(module, LSTM) and bool(module.options)
    has = _WEIGHTS[: 4 if module.bias else 2] + _WEIGHTS[4 if module.proj_size else 5 :]
    for layer in range(module.num_layers):
        own = []
        for direction in range(directions):
            index = layer * directions + direction
            suffix = f"_l{layer}_reverse" if direction else f"_l{layer}"
            weights = (getattr(module, name + suffix) if name in has else None for name in _WEIGHTS)
            variant = _variant(module, suffix, x, hx[0].shape[-1]) if options else PLAIN
            own.append(Direction(hx[0][index], hx[1][index] if len(hx) == 2 else None, *weights, variant))
        cell = module.mode.lower()
        if directions == 1:
            results = [recurrent(x, *own[0][:7], lengths=lengths, cell=cell, variant=own[0].variant)]
        else:
            results = recurrent_both(x, *own, lengths=lengths, cell=cell)
        outputs = [y for y, _, _ in results]
        last += [(h,) if c is None else (h, c) for _, h, c in results]
        x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
        if module.training and module.dropout > 0 and layer + 1 < module.num_layers:
            # On the packed rows alone, as torch.nn: of few elements the random numbers are those that it draws.
            x = dropout(x, module.dropout) if packing is None else packing.pad(dropout(packing.pack(x), module.dropout))
    if len(last) == 1:
        return x, tuple(state.unsqueeze(0) for state in last[0])
    return x, tuple(torch.stack(states) for states in zip(*last, strict=True))


def _states(module: torch.nn.RNNBase, hx) -> tuple[Tensor, ...]:
    """hx as a tuple of one or two tensors."""
    states = hx if module.mode == "LSTM" else (hx,)
    expected = "a pair (h_0, c_0) of Tensors" if module.mode == "LSTM" else "a Tensor"
    if not isinstance(states, (tuple, list)) or not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"hx: expected {expected}, got {type(hx).__name__}")
    if module.mode == "LSTM" and len(states) != 2:
        raise ValueError(f"hx: expected {expected}, got {len(states)} of them")
    return tuple(states)


def _as_given(module: torch.nn.RNNBase, hidden: tuple[Tensor, ...]):
    return hidden if module.mode == "LSTM" else hidden[0]


def _zero_states(module: torch.nn.RNNBase, input: Tensor, batch: int) -> tuple[Tensor, ...]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = input.new_zeros(count, batch, module.proj_size or module.hidden_size)
    return (h, input.new_zeros(count, batch, module.hidden_size)) if module.mode == "LSTM" else (h,)


def _check(module: torch.nn.RNNBase, input: Tensor, hx: tuple[Tensor, ...], batch_sizes: Tensor | None) -> None:
    """torch's own checks of dtype, rank and sizes."""
    module.check_forward_args(input, hx if module.mode == "LSTM" else hx[0], batch_sizes)


def _check_packed(data: Tensor, batch_sizes: Tensor) -> None:
    """A PackedSequence can be built from anything: its batch sizes must be positive and fall and add up to its rows."""
    if batch_sizes.dim() != 1 or batch_sizes.numel() == 0 or batch_sizes.is_floating_point():
        raise ValueError(
            f"batch_sizes: expected a 1-D tensor of integers, not empty, got {tuple(batch_sizes.shape)} "
            f"of {batch_sizes.dtype}"
        )
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or any(a < b for a, b in itertools.pairwise(sizes)) or sum(sizes) != data.size(0):
        raise ValueError(f"batch_sizes: expected positive, falling and adding up to {data.size(0)}, got {sizes}")


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell, drop-in: the same constructor, state_dict, initial values, arguments, results and errors."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = _cell(self, "lstm", input, hx)
        return h, c


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell, drop-in: the same constructor, state_dict, initial values, arguments, results and errors."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell(self, "gru", input, None if hx is None else (hx,))[0]


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell, drop-in: the same constructor, state_dict, initial values, arguments, results and errors."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return _cell(self, f"rnn_{self.nonlinearity}", input, None if hx is None else (hx,))[0]


def _cell(module: torch.nn.RNNCellBase, cell: str, input: Tensor, hx: tuple[Tensor, ...] | None) -> list[Tensor]:
    """The next states, batched or not as the input is."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(f"{type(module).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    count = 2 if cell == "lstm" else 1
    if hx is not None:
        if not isinstance(hx, (tuple, list)) or len(hx) != count or not all(isinstance(s, Tensor) for s in hx):
            expected = "a pair (h_0, c_0) of Tensors" if count == 2 else "a Tensor"
            raise TypeError(f"hx: expected {expected}, got {[type(s).__name__ for s in hx]}")
        for index, state in enumerate(hx):
            if state.dim() not in (1, 2):
                name = f"hx[{index}]" if count == 2 else "hidden"
                raise ValueError(f"{type(module).__name__}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    if input.size(1) != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {module.input_size}")
    if hx is None:
        states = [input.new_zeros(input.size(0), module.hidden_size)] * count
    else:
        states = [state if batched else state.unsqueeze(0) for state in hx]
        for index, state in enumerate(states):
            _check_cell_state(module, input, state, f"hidden{index}")
    states = recurrent_step(
        input,
        states[0],
        states[1] if count == 2 else None,
        *(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh),
        cell=cell,
    )
    return [state if batched or state is None else state.squeeze(0) for state in states]


def _check_cell_state(module: torch.nn.RNNCellBase, input: Tensor, state: Tensor, name: str) -> None:
    if state.dim() != 2:
        raise RuntimeError(f"{name}: expected the rank of input, got another")
    if state.size(0) != input.size(0):
        raise RuntimeError(f"Input batch size {input.size(0)} doesn't match {name} batch size {state.size(0)}")
    if state.size(1) != module.hidden_size:
        raise RuntimeError(f"{name} has inconsistent hidden_size: got {state.size(1)}, expected {module.hidden_size}")
