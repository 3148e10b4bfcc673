"""Mixtures of experts of transformers: one parameter holds a matrix for every expert.

Each expert has a P of its own, from the rows that were routed to it. The module's forward runs
under a mode that is shown where the parameter, or an expert of it, enters a product: the loop over
experts, torch's grouped product of rows sorted by expert, and the batched product, or einsum, of a
matrix for each row, or of every matrix with rows of its own. Rows that other kernels multiply are
not seen.
A graph that torch.compile traces shows the same products, but for those of experts that the loop
takes from the parameter itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.einsum import rows_of_einsum
from gls_fused.capture.layer import Found
from gls_fused.capture.linear import LinearLayer
from gls_fused.capture.modules import describe_class, plain_class
from gls_fused.capture.observed import observe
from gls_fused.capture.routed import Shown, add_routed_
from gls_fused.capture.traced import flatten_rows
from gls_fused.capture.transforms import values_of
from gls_fused.capture.uses import MATMULS, Use, has_new_hooks, saved_tensors_hooks

TRANSPOSES = (
    *(torch.transpose, Tensor.transpose, torch.t, Tensor.t),
    *(Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
    # These two as dynamo shows them.
    *(torch.ops.aten.numpy_T, torch.ops.aten.mT),
)
SPLITS = (torch.unbind, Tensor.unbind)
# Products of the matrices of all experts at once.
BATCHED = (torch.bmm, Tensor.bmm, *MATMULS)


class ExpertsLayer(LinearLayer):
    """The matrices [experts, m, k] of one parameter; [experts, k, m] where they are turned."""

    kind = "Experts"
    own_op = False
    missed = "its products are of a kind that is not seen"
    by_rows = False
    stacked = True
    seen_in_transforms = False
    blocks: int

    def __init__(self, found: Found) -> None:
        known = known_experts(found.modules[0])
        assert known is not None
        self.turned = known.turned
        self.bias_key = bias_key_of(found.key)
        super().__init__(found)

    @property
    def observer(self) -> Any:
        return _ExpertsObserver

    def watches(self, module: nn.Module) -> bool:
        # A graph has an op that shows rows, and none that applies P.
        return not (torch.compiler.is_compiling() and self.promised) and super().watches(module)

    def gather_routed(self, whose: Tensor | int, inputs: Tensor) -> None:
        """Add rows to the sums of the step.

        Args:
            whose: the expert that all are of; or that each is of, [n], `blocks` where it is none's.
            inputs: [n, k].
        """
        self.called = True
        basis = self.sketched_with()
        if self.sums is None:
            self.sums = self.no_sums()
        add_routed_(self, self.sums.view(self.blocks, -1), whose, inputs, basis)


class Known(NamedTuple):
    """What is known of the modules of a class.

    Attributes:
        keys: the names of the parameters that hold a matrix for every expert.
        turned: whether a matrix is [k, m].
    """

    keys: tuple[str, ...]
    turned: bool = False


_GATED = ("gate_up_proj", "down_proj")
# Of classes that `register_experts` has been told of, whether a matrix is [k, m].
_REGISTERED: dict[type[nn.Module], bool] = {}
# Others by their path: of torch_geometric those with a matrix for each relation, step or type, and
# of transformers those that its `use_experts_implementation` does not decorate.
_KNOWN = {
    "torch_geometric.nn.conv.gated_graph_conv.GatedGraphConv": Known(("weight",), turned=True),
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": Known(("weight",), turned=True),
    "torch_geometric.nn.dense.linear.HeteroLinear": Known(("weight",), turned=True),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": Known(("weight",)),
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": Known(_GATED, turned=True),
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Known(_GATED),
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": Known(_GATED),
}


def register_experts(module_class: type[nn.Module], *, turned: bool) -> None:
    """See `gls_fused.register`."""
    _REGISTERED[module_class] = turned


def bias_key_of(key: str) -> str:
    """The name of the bias [experts, m] beside the weight of this name, if there is one."""
    return f"{key}_bias"


def known_experts(module: nn.Module) -> Known | None:
    """What is known of a module of experts; None of others."""
    if all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias")):
        return Known((*_GATED, "up_proj"), bool(module.is_transposed))
    for base in plain_class(module).__mro__:
        if base in _REGISTERED:
            params = module._parameters.items()
            keys = tuple(key for key, param in params if param is not None and param.ndim == 3)
            return Known(keys, _REGISTERED[base])
        found = _KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None


def why_not_experts(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    for module in modules:
        known = known_experts(module)
        held = [module._parameters.get(key) for key in (known.keys if known else ())]
        if any(weight is not None and weight.ndim != 3 for weight in held):
            return f"{describe_class(plain_class(module))} holds its experts otherwise"
    return None


class _Part(NamedTuple):
    """What is known of a tensor: the layer's weight, or some experts of it.

    Attributes:
        experts: one; for each matrix of the tensor; or None, which is all in their order.
        turned: whether its matrices are [k, m].
    """

    tensor: Tensor
    layer: ExpertsLayer
    experts: int | Tensor | None
    turned: bool


class _ExpertsObserver(TorchFunctionMode):
    """Shows layers of experts the rows of the products with their weights."""

    def __init__(self, uses: Sequence[Use]) -> None:
        super().__init__()
        self.hooks = saved_tensors_hooks()
        self.parts: list[_Part] = []
        # Parameters, and what stands for them where P applies in the backward.
        self.aliases: list[tuple[Tensor, Tensor]] = []
        for use in uses:
            layer: Any = use.layer
            weight = use.weight
            if layer.by_node:
                bias = use.owner._parameters[layer.bias_key] if layer.ones else None
                if bias is not None and not (bias.requires_grad and layer.owns_bias_of(use.owner)):
                    bias = None
                weight, own = observe(layer, None, weight, bias)
                self.aliases.append((use.weight, weight))
                if own is not None and bias is not None:
                    self.aliases.append((bias, own))
            self.parts.append(_Part(weight, layer, None, layer.turned))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Checkpointed inside the module, it would be computed again outside of this mode.
        if not torch.is_grad_enabled() or has_new_hooks(self.hooks):
            return func(*args, **kwargs)
        if self.aliases:
            args = tuple(map(self.alias, args))
        if func is Tensor.__getitem__:
            return self.select(*args)
        if func in SPLITS and [*args[1:], *kwargs.values()] in ([], [0]):
            return self.split(args[0])
        if func in TRANSPOSES and not kwargs:
            return self.transpose(func, *args)
        if len(args) > 1:
            args = self.show(func, args, kwargs)
        return func(*args, **kwargs)

    def alias(self, value: Any) -> Any:
        return next((alias for param, alias in self.aliases if value is param), value)

    def find(self, tensor: Any) -> _Part | None:
        return next((part for part in self.parts if tensor is part.tensor), None)

    def select(self, tensor: Tensor, index: Any) -> Tensor:
        found = tensor[index]
        part = self.find(tensor)
        if part is None or part.experts is not None:
            return found
        if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
            if index.ndim == 0:
                index = int(index)
            elif index.ndim == 1:
                experts = index % part.layer.blocks
                self.parts.append(part._replace(tensor=found, experts=experts))
        if type(index) is int:
            expert = index % part.layer.blocks
            self.parts.append(part._replace(tensor=found, experts=expert))
        return found

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        found = tensor.unbind()
        part = self.find(tensor)
        if part is not None and part.experts is None:
            self.parts += [
                part._replace(tensor=each, experts=expert) for expert, each in enumerate(found)
            ]
        return found

    def transpose(self, func: Any, tensor: Tensor, *axes: int) -> Tensor:
        found: Tensor = func(tensor, *axes)
        part = self.find(tensor)
        turned = found.shape[:-2] == tensor.shape[:-2] and found.stride() == tensor.mT.stride()
        if part is not None and turned:
            self.parts.append(part._replace(tensor=found, turned=not part.turned))
        return found

    def show(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a product, its weight shown with the rows; of anything else, as is."""
        if func is torch.einsum:
            return self.show_einsum(*args)
        left, right, *rest = args
        if not isinstance(left, Tensor):
            return args
        part = self.find(right)
        if part is not None:
            rows = None
            if isinstance(part.experts, int):
                rows = left if func in (MATMULS if part.turned else (F.linear,)) else None
            elif func in BATCHED and part.turned and left.ndim in (2, 3):
                rows = left.expand(len(right), *left.shape[-2:])
            if rows is not None:
                return left, _show(part, rows), *rest
            ends = kwargs.get("offs", rest[0] if rest else None)
            if _is_grouped(func) and part.turned and part.experts is None and ends is not None:
                places = torch.arange(len(left), device=ends.device, dtype=ends.dtype)
                whose = torch.searchsorted(ends, places, right=True)
                # Autocast casts nothing of torch's own.
                rows = left if func is _GROUPED else autocast_inputs(left)[0]
                return left, _show_rows(part, whose, rows), *rest
        part = self.find(left)
        if part is not None and func in BATCHED and not part.turned and right.ndim in (2, 3):
            rows = right.mT
            if not isinstance(part.experts, int):
                rows = rows.expand(len(left), *rows.shape[-2:])
            return _show(part, rows), right, *rest
        return args

    def show_einsum(self, equation: Any, *operands: Any) -> tuple[Any, ...]:
        parts = list(map(self.find, operands))
        if len(parts) == 2 and parts.count(None) == 1:
            place = int(parts[0] is None)
            part, inputs = parts[place], operands[1 - place]
            assert part is not None
            rows = rows_of_einsum(equation, place, part.tensor, inputs, turned=part.turned)
            if rows is not None:
                shown = _show(part, rows)
                return (equation, shown, inputs) if place == 0 else (equation, inputs, shown)
        return equation, *operands


_GROUPED = getattr(torch, "_grouped_mm", None)


def _is_grouped(func: Any) -> bool:
    if func is _GROUPED:
        return True
    # What transformers has for devices and dtypes that torch's own has no kernel for.
    return getattr(func, "_qualified_op_name", None) == "transformers::grouped_mm_fallback"


def _whose_zeros_are_not(inputs: Tensor) -> Tensor:
    """Whose rows [experts, n, k] are, of which zeros are of inputs routed to other experts."""
    experts, n, _ = inputs.shape
    own = torch.arange(experts, device=inputs.device)[:, None].expand(experts, n)
    return torch.where(inputs.any(-1), own, experts).flatten()


def _show(part: _Part, rows: Tensor) -> Tensor:
    """The tensor, shown with rows [..., k] of an expert, or [matrices, n, k]."""
    (rows,) = autocast_inputs(rows)
    if isinstance(part.experts, int):
        return _show_rows(part, part.experts, rows)
    if part.experts is None:
        return _show_rows(part, _whose_zeros_are_not(rows), rows)
    return _show_rows(part, part.experts.repeat_interleave(rows.shape[1]), rows)


def _show_rows(part: _Part, whose: Tensor | int, inputs: Tensor) -> Tensor:
    layer = part.layer
    if not (layer.gathers and layer.sees(inputs)):
        return part.tensor
    rows = values_of(inputs).flatten(0, -2)
    if not torch.compiler.is_compiling():
        return Shown.apply(layer, whose, rows, None, part.tensor)  # type: ignore[no-any-return]
    if isinstance(whose, int):
        whose = torch.full((len(rows),), whose, device=rows.device)
    arguments = flatten_rows(layer)
    return torch.ops.gls_fused.traced_experts(  # type: ignore[no-any-return]
        rows, part.tensor, None, *arguments, whose, layer.blocks
    )
