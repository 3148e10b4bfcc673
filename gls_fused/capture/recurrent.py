"""nn.RNN, nn.LSTM, nn.GRU and their cells: each weight of a layer, all gates in one, has rows.

Those of an input weight are the inputs of its layer, those of a recurrent weight the states before
each step: the layer's outputs, a step late. torch computes all layers in one call. In steps that
gather it is made layer by layer on a CPU, with the ops that the one call makes, so that all rows
are seen; cuDNN, which would compute otherwise, shows the first layer's inputs and the last one's
outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.layer import Found
from gls_fused.capture.linear import LinearLayer
from gls_fused.capture.observed import observe
from gls_fused.capture.transforms import values_of
from gls_fused.capture.uses import Use

OPS = (torch.rnn_tanh, torch.rnn_relu, torch.lstm, torch.gru)
CELL_OPS = (torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.lstm_cell, torch.gru_cell)


class RecurrentLayer(LinearLayer):
    """One weight of such a module, with the bias that is added to its product."""

    kind = "recurrent"
    own_op = False
    seen_in_transforms = False
    by_rows = False
    gated = True
    calls = (*OPS, *CELL_OPS)

    def __init__(self, found: Found) -> None:
        self.bias_key = found.key.replace("weight", "bias")
        super().__init__(found)

    def take_call(self, uses: Sequence[Use], func: Any, args: tuple[Any, ...]) -> Any:
        layers = {use.layer.weight_key: use.layer for use in uses}
        return run(layers, uses[0].owner, func, args)  # type: ignore[arg-type]

    def observe(
        self,
        module: nn.Module,
        rows: Tensor | Late | None,
        weight: Tensor,
        bias: Tensor | None,
        *,
        casts: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for one call.

        Args:
            rows: the weight's inputs, or what will hold them; None where they are not seen.
            casts: whether the op casts each weight by itself under autocast, as all but cuDNN's do.
        """
        late = rows if isinstance(rows, Late) else None
        inputs: Tensor | None = None
        if isinstance(rows, Tensor) and self.gathers:
            (inputs,) = autocast_inputs(rows)
            inputs = inputs if self.sees(inputs) else None
        owned = self.observes_bias(module, bias)
        seen: Any = self if late is None else late
        if casts:
            weight = self.shown_weight(weight)
        found, own = observe(seen, inputs, weight, bias if owned else None)
        return found, own if owned else bias


class Late:
    """Stands for a layer where autograd meets its weight, as its rows come with the outputs."""

    def __init__(self, layer: RecurrentLayer) -> None:
        self.layer = layer
        self._kept: Tensor | None = None
        self._reverse = False

    def keep(
        self, outputs: Tensor, first: Tensor, sizes: Tensor | None, weight: Tensor, *, reverse: bool
    ) -> None:
        """Keep what the rows are made of, as autograd keeps what it saves.

        Args:
            outputs: [steps, batch, h], or [rows, h] of a packed sequence.
            first: [batch, h], the states before the first step.
            sizes: of a packed sequence, how many sequences have each step.
            weight: any tensor with a gradient.
            reverse: whether the steps are taken from the last to the first.
        """
        if not (self.layer.gathers and self.layer.sees(outputs)):
            return
        self._reverse = reverse
        outputs, first = values_of(outputs), values_of(first)
        # A copy, as torch lets what it gives out be changed in place.
        self._kept = _Kept.apply(weight, outputs.detach().clone(), first.detach(), sizes)

    def enter(self, ctx: Any, weight: int) -> tuple[bool, bool]:
        """See `Rows.enter`; the rows are added to the sums where they count."""
        counts, applies = self.layer.enter(ctx, weight)
        if counts and self._kept is not None:
            outputs, first, sizes = self._kept.grad_fn.saved_tensors  # type: ignore[union-attr]
            self.layer.gather(states_before(outputs, first, sizes, reverse=self._reverse))
        return counts, applies

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Kept(torch.autograd.Function):
    """A node that saves tensors, for checkpointing and offloading to hold for them as well."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, outputs: Tensor, first: Tensor, sizes: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(outputs, first, sizes)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return None, None, None, None


def states_before(outputs: Tensor, first: Tensor, sizes: Tensor | None, *, reverse: bool) -> Tensor:
    """The state before each step, [rows, h]; see `Late.keep`."""
    first = first.to(outputs.dtype)
    if sizes is None:
        both = [outputs[1:], first[None]] if reverse else [first[None], outputs[:-1]]
        return torch.cat(both).flatten(0, 1)
    # Steps of a packed sequence stand one after another, each of the longest `sizes` sequences.
    sizes = sizes.to(outputs.device)
    steps = torch.arange(len(sizes), device=outputs.device).repeat_interleave(sizes)
    begins = sizes.cumsum(0) - sizes
    sequence = torch.arange(len(outputs), device=outputs.device) - begins[steps]
    before = steps + 1 if reverse else steps - 1
    inside = (before >= 0) & (before < len(sizes))
    before = before.clamp(0, len(sizes) - 1)
    inside &= sequence < sizes[before]
    place = torch.where(inside, len(first) + begins[before] + sequence, sequence)
    return torch.cat([first, outputs]).index_select(0, place)


def why_not_recurrent(role: str, modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`: of the weight of this name."""
    if role.startswith("weight_hr"):
        return "its rows, the states before the projection, are not seen"
    return None


def run(
    layers: Mapping[str, RecurrentLayer], module: nn.Module, func: Any, args: tuple[Any, ...]
) -> Any:
    """What one of `OPS` or `CELL_OPS` gives that a module calls, the rows of some weights seen.

    Args:
        layers: that ask for it, by the names of their weights in the module.
    """
    if func in CELL_OPS:
        return _run_cell(layers, module, func, *args)
    sizes = None
    if isinstance(args[3], bool):
        inputs, hx, weights, bias, count, dropout, training, bidirectional, batch_first = args
    else:
        inputs, sizes, hx, weights, bias, count, dropout, training, bidirectional = args
        batch_first = False
    call = _Call(layers, module, func, sizes, bias, training, bidirectional)
    names = list(module._flat_weights_names)  # type: ignore[arg-type]
    gathers = any(layer.gathers for layer in layers.values())
    if count == 1 or not (gathers and shows_layers(inputs)):
        return call.make(inputs, hx, weights, names, count, dropout, batch_first)
    outputs = inputs.transpose(0, 1) if batch_first else inputs
    size, directions = len(weights) // count, 1 + bidirectional
    after = []
    for layer in range(count):
        if layer and dropout and training:
            outputs = torch.dropout(outputs, dropout, True)
        part = slice(layer * size, (layer + 1) * size)
        own = slice(layer * directions, (layer + 1) * directions)
        before = hx[own] if isinstance(hx, Tensor) else tuple(states[own] for states in hx)
        outputs, *states = call.make(outputs, before, weights[part], names[part], 1, 0.0, False)
        after.append(states)
    outputs = outputs.transpose(0, 1) if batch_first else outputs
    return (outputs, *(torch.cat(states) for states in zip(*after, strict=True)))


def shows_layers(inputs: Tensor) -> bool:
    """Whether torch computes layer by layer, so that who does the same gets the same."""
    return inputs.is_cpu


class _Call(NamedTuple):
    """A call of one of `OPS`, of all layers of a module or of one."""

    layers: Mapping[str, RecurrentLayer]
    module: nn.Module
    func: Any
    sizes: Tensor | None
    bias: bool
    training: bool
    bidirectional: bool

    def make(
        self,
        inputs: Tensor,
        hx: Any,
        weights: Sequence[Tensor],
        names: Sequence[str],
        count: int,
        dropout: float,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        """Outputs and last states of `count` layers, the weights observed.

        The first one's inputs and the last one's states are rows.
        """
        given = list(weights)
        size = len(weights) // count
        late: dict[int, Late] = {}
        for place, key in enumerate(names):
            layer = self.layers.get(key)
            if layer is None:
                continue
            rows: Tensor | Late | None = None
            if "_hh_" in key and place >= len(weights) - size:
                rows = late[place] = Late(layer)
            elif "_ih_" in key and place < size:
                rows = inputs
            elif layer.gathers:
                layer.unseen = "its rows are inside of one kernel for all layers"
            bias = weights[place + 2] if self.bias else None
            given[place], bias = layer.observe(
                self.module, rows, weights[place], bias, casts=inputs.is_cpu
            )
            if bias is not None:
                given[place + 2] = bias
        flags = self.bias, count, dropout, self.training, self.bidirectional
        found: tuple[Tensor, ...]
        if self.sizes is None:
            found = self.func(inputs, hx, given, *flags, batch_first)
        else:
            found = self.func(inputs, self.sizes, hx, given, *flags)
        outputs = found[0].transpose(0, 1) if batch_first else found[0]
        first = hx if isinstance(hx, Tensor) else hx[0]
        width = first.shape[-1]
        for place, kept in late.items():
            reverse = names[place].endswith("_reverse")
            own = outputs[..., width:] if reverse else outputs[..., :width]
            before = first[-1] if reverse or not self.bidirectional else first[-2]
            kept.keep(own, before, self.sizes, weights[place], reverse=reverse)
        return found


def _run_cell(
    layers: Mapping[str, RecurrentLayer],
    module: nn.Module,
    func: Any,
    inputs: Tensor,
    hx: Any,
    *params: Tensor | None,
) -> Any:
    given = list(params)
    rows = {"weight_ih": inputs, "weight_hh": hx if isinstance(hx, Tensor) else hx[0]}
    for place, key in enumerate(rows):
        layer, weight = layers.get(key), params[place]
        if layer is not None and weight is not None:
            bias = params[place + 2]
            given[place], given[place + 2] = layer.observe(
                module, rows[key], weight, bias, casts=True
            )
    return func(inputs, hx, *given)
