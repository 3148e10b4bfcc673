"""A layer: what a weight, with its bias, and the modules that use it are to GLS.

While it is captured, its modules' forward, in a step that gathers rows, uses weight and bias as
`gls_fused.capture.observed` hands them out; in other steps it is the module's own. Only where P
acts on the rows themselves, nn.Linear at the backward site, an autograd function stands in for the
module's op.
"""

from __future__ import annotations

import abc
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gls_fused.backends.dispatch import backend_name, resolve_backend
from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.derived import Place, source_of
from gls_fused.capture.marks import BIAS_MARKS, Marks, choose_places
from gls_fused.capture.modules import (
    capture_module,
    captured_by,
    is_captured,
    is_exporting,
    plain_class,
    recapture_module,
    release_module,
)
from gls_fused.capture.observed import observe
from gls_fused.capture.passes import Passes
from gls_fused.capture.transforms import (
    beneath,
    has_level,
    in_function_mode,
    in_transform,
    outside_transforms,
    values_of,
)
from gls_fused.curvature.estimate import Curvature, State, make_curvature
from gls_fused.distributed.sharding import (
    is_sharded,
    part_here,
    spread_like,
    spread_over_first,
    whole_on_each,
)

# The classes of tensors that torch's own ops compute with.
PLAIN = (Tensor, nn.Parameter)
# An attribute that captured parameters have, for `Layer.is_own`.
OWNED = "_gls_owned"


class Owner:
    """Whose a captured parameter is, by a number. One that has been pickled is nobody's."""

    numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(Owner.numbers)

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[()]]:
        # A class of which torch.load(weights_only=True) knows.
        return OrderedDict, ()


class Found(NamedTuple):
    """What has been found of one weight in a model.

    Attributes:
        name: qualified name of the weight's first module.
        modules: that use the weight.
        key: the name of the parameter that the weight is, in these modules.
        bias: [m] or None.
        table: an embedding that looks the same weight up, or None.
        normalized: whether something in the model normalises activations.
    """

    name: str
    modules: list[nn.Module]
    key: str
    bias: Tensor | None
    table: str | None
    normalized: bool


class Layer(Passes):
    """A weight and bias with the modules that use them, and what passes between them and a step.

    Attributes:
        found: its name, and what is in the model.
        modules: that use the weight.
        weight_key: `found.key`.
        table: of `found`. Its part of the gradient has no rows, and P acts on the sum, so that
            p.grad keeps the gradient until the step.
        places: where each module has the weight, see gls_fused.capture.derived.
        derived: whether the modules compute with what they make of it.
        dim: d, the length of a row with its one.
        gated: whether the weight is several matrices of the same inputs, as a recurrent layer's.
        lent: whether another module has used the weight by itself, and the rows were seen. Then
            p.grad keeps the gradient, unless `promised`.
        misses: how many steps its weight has had a gradient in without rows that were asked for.
        due: whether it is to gather in the next step in which it has a part.
        growth_due: whether its growth is to be measured after that step.
        watched: whether modules are to show this layer where they use its weight by themselves.
        returned: whether rows of an idle layer have been seen since, with a gradient.
        last: whether it is the last of all that an optimizer covers.
        scaled: how its last step was scaled, None where that is not known.
    """

    kind: str
    # Whether P can act on the rows themselves, at the backward site.
    by_rows: bool = False
    # The names of a module's parameters that weight and bias are.
    weight_key: str = "weight"
    bias_key: str | None = "bias"
    gated: ClassVar[bool] = False
    # Whether its modules' forward is its op and nothing else.
    own_op: ClassVar[bool] = True
    # The outputs of a module with these parameters by name; None where it takes `watches` to know.
    through: Callable[[dict[str, Any], Any], Tensor | None] | None = None
    # How much of a row the layer's own op multiplies, where the rest is always zeros.
    filled: float = 1.0
    # Whether its rows are seen under torch.func's transforms of the inputs.
    seen_in_transforms: ClassVar[bool] = True
    # Why no rows are seen where nothing else is known.
    missed: ClassVar[str] = (
        "its module is not called, its weight is used elsewhere; or torch.autograd.grad takes its "
        "gradient from a compiled graph"
    )

    def __init__(self, found: Found) -> None:
        self.found = found
        name, modules, self.weight_key, bias, self.table, _ = found
        self.modules = modules
        # Those whose forward is this layer's op.
        self.routed = modules if self.own_op else []
        sources = [source_of(module) if found.key == "weight" else None for module in modules]
        self.derived = any(sources)
        places = [
            source or Place(module, found.key)
            for source, module in zip(sources, modules, strict=True)
        ]
        self.places = dict(zip(modules, places, strict=True))
        weight = places[0].param
        assert weight is not None
        super().__init__(name, weight, bias)
        self.owner = Owner()
        self.ones = bias is not None
        self.blocks = weight.shape[0] if self.stacked else None
        self.here = part_here(weight) if self.stacked else slice(None)
        shape = list(weight.shape[int(self.stacked) :])
        if self.turned:
            inputs, outputs = shape[:2]
            shape[:2] = outputs * self.groups, inputs // self.groups
        self.shape = torch.Size(shape)
        self.size = self.shape[1:].numel()
        self.dim = self.size + self.ones
        self.returned = self.lent = self.last = self.watched = False
        self.due = self.growth_due = False
        self.misses = 0
        self.scaled: str | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The first axes of what is kept for each matrix: of a stack its blocks, else none."""
        return () if self.blocks is None else (self.blocks,)

    @property
    def stays_whole(self) -> bool:
        """Whether P acts on the whole gradient, at the step, as rows see only a part of it."""
        return self.table is not None or self.derived

    def gains_by_rows(self, rows: float) -> bool:
        """Whether P takes less time on so many rows, before their product, than on the gradient."""
        return self.by_rows and rows < self.outputs

    @property
    def one_matrix(self) -> bool:
        """Whether the weight, or each of a stack, is one matrix, which has an orthogonal factor."""
        return self.groups == 1 and not self.gated

    @property
    def pointwise(self) -> bool:
        """Whether a row is what one place has, as of nn.Linear and convolutions of one tap."""
        return self.shape[2:].numel() == 1

    def __reduce__(self) -> tuple[type[Layer], tuple[Any, ...]]:
        # A copy has statistics of its own, and captures nothing until it is told to.
        return type(self), (self.found,)

    def turn(self, tensor: Tensor) -> Tensor:
        """See `Rows.turn`. What is spread over ranks by its first axis is so before and after."""
        if self.shards is None or not self.turned or not is_sharded(tensor):
            return super().turn(tensor)
        if self.groups > 1:
            # A view by group can be of the whole alone, where ranks share groups.
            return spread_like(super().turn(whole_on_each(tensor)), tensor)
        turned = super().turn(tensor)
        return turned if turned is tensor else spread_over_first(turned)

    @property
    def turns_by_copy(self) -> bool:
        spread = self.shards is not None and not self.stacked
        return super().turns_by_copy or (self.turned and spread)

    # ---- what an optimizer tells it --------------------------------------------------------------

    def assign(self, kind: str, rank: Any, backend: str, *, promised: bool) -> None:
        """Choose the kind of running estimate, and the backend by name."""
        self._choice = (kind, rank, backend)
        self.promised = promised
        self.begin()

    def fit(self) -> None:
        """Be of the weight's dtype and device, which change where a model is cast or moved."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        if self.weight.device == self.device and wide is self.statistics_dtype:
            # As where weights have 16 bits for the passes and 32 for the step.
            self.dtype = self.weight.dtype
            return
        if self.at_backward and not self.promised:
            self.restore_gradient()
        self.begin()

    def begin(self) -> None:
        """Without statistics, of the weight's dtype and device."""
        kind, rank, backend = self._choice
        self.dtype, self.device = self.weight.dtype, self.weight.device
        self.backend = resolve_backend(backend, {self.device.type})
        self.backend_name = backend_name(self.backend)
        self.curvature = self.curvature_of(kind, rank)
        self.statistics_dtype = torch.promote_types(self.dtype, torch.float32)
        self.take_sums()
        self.inverse = self.test_matrix = self.tally = None
        self.marks = Marks(*self.marked_places())
        self.at_backward = self.by_node = False

    def marked_places(self) -> tuple[list[int], list[int]]:
        """Which entries of D in the gradients of weight and bias are remembered."""
        bias = self.bias if self.ones and self.shards is None else None
        own = [] if bias is None else choose_places(bias.numel(), BIAS_MARKS)
        return choose_places(self.weight.numel()), own

    def curvature_of(self, kind: str, rank: Any) -> Curvature:
        """The running estimate that these options name, for a weight of this shape."""
        return make_curvature(kind, self.dim, self.outputs, rank, self.backend, self.blocks)

    @property
    def fits(self) -> bool:
        """Whether the weight is as it was when `fit` looked."""
        return self.weight.dtype == self.dtype and self.weight.device == self.device

    @property
    def matrices_here(self) -> int:
        """How many matrices the weight is, on this rank."""
        return 1 if self.blocks is None else len(range(self.blocks)[self.here])

    @property
    def resharded(self) -> bool:
        """Whether the weight that a module has is sharded, and not the one known here."""
        held = [place.param for place in self.places.values()]
        return any(weight is not self.weight and is_sharded(weight) for weight in held)

    def is_spread(self, module: nn.Module) -> bool:
        """Whether the weight that a module has is sharded now."""
        weight = self.held_by(module)
        return self.shards is not None and weight is not None and is_sharded(weight)

    @property
    def replaced(self) -> bool:
        """Whether its modules all have another weight by now, as where one has been tied since."""
        held = [place.param for place in self.places.values()]
        others = all(weight is not None and weight is not self.weight for weight in held)
        # What fully_shard gathers is another parameter than its shards.
        return others and self.shards is None

    @property
    def flattened(self) -> bool:
        """Whether the weight has lost its axes since it was found."""
        return self.weight.ndim != len(self.shape) + self.stacked

    def capture(self) -> None:
        """Route the modules' forward through this layer."""
        for module in self.routed:
            earlier = captured_by(module)
            if earlier is not None and earlier is not self:
                earlier.release()
            capture_module(module, self)
        for param in self.params:
            setattr(param, OWNED, self.owner)
        self.captured = True

    def recapture(self) -> None:
        """See that the modules' forward still goes through this layer, whatever became of them.

        Raises:
            RuntimeError: one's does not, and its gradient lacks the P that the user has asked for.
        """
        for module in self.routed:
            recapture_module(module)
            promises = self.at_backward and self.promised and self.weight.grad is not None
            if promises and not is_captured(type(module)):
                self.miss("its module's class was replaced, as by a parametrization")

    def release(self) -> None:
        """Give the modules their own forward back; gradients are true from here on."""
        if self.at_backward and not self.promised:
            self.leave_backward_site()
        for module in self.routed:
            release_module(module, self)
        for param in self.params:
            # Another optimizer's may have taken it over.
            if vars(param).get(OWNED) is self.owner:
                vars(param).pop(OWNED)
        self.captured = False
        self.expect(None, gathers=False, at_backward=False)
        self.take_sums()
        self.tally = self.test_matrix = None
        self.marks.clear_marks()

    def seek_uses(self) -> None:
        """Told that its weight has got a gradient and no rows of it have been seen."""

    def settle_uses(self, state: State) -> None:
        """Told before each step; see gls_fused.capture.lending."""

    # ---- the forward of a captured module --------------------------------------------------------

    def watches(self, module: nn.Module) -> bool:
        """Whether a call of the module is to go through `forward`."""
        weight = self.held_by(module)
        if not torch.is_grad_enabled():
            return False
        if weight is None:
            if not torch.compiler.is_compiling():
                self.miss("its weight is now computed from others")
            return False
        if not weight.requires_grad:
            return False
        if weight.is_complex():
            # Since the model was cast.
            self.unseen = "its weight is complex"
            return False
        # Another's: a parameter replaced, or those of torch.func.functional_call.
        own = self.shards is not None or self.is_own(weight, self.weight)
        if torch.compiler.is_compiling():
            applies = self.at_backward and self.promised
            asked = own and (applies or self.gathers) and not is_exporting()
            if asked and not applies and in_transform():
                # Torch has no rule to transform an op of ours; where P is to apply, it says so.
                self.unseen = "torch.func transforms its module in a compiled graph"
                return False
            return asked
        if not own and in_transform():
            self.unseen = "torch.func differentiates it, and gives its gradient to its caller"
        if not (own and (self.by_node or self.gathers)):
            return False
        if not self.seen_in_transforms and in_transform():
            self.miss("torch.func transforms its module")
            return False
        if torch._C._get_tracing_state() is not None:
            return False
        if not self.fits:
            with outside_transforms():
                self.fit()
        if self.is_spread(module):
            raise RuntimeError(
                f"layer {self.name!r}: expected its weight whole in the forward, as under "
                "fully_shard, got a DTensor; GLS does not cover tensor parallelism, pass "
                "such parameters as a list"
            )
        return True

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's output, its rows seen and P applied in the backward as the step asks."""
        if torch.compiler.is_compiling():
            return self.traced(module, inputs)
        self.leave_where_in_use(module)
        if self.by_node:
            return self.precondition(module, inputs)
        if not self.gathers:
            return self.plain(module, inputs)
        return self.observed(module, inputs)

    def forward_more(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a call with more than the inputs."""
        return self.forward_otherwise(
            module, "it is called with more than its inputs", *args, **kwargs
        )

    def forward_otherwise(
        self, module: nn.Module, reason: str, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The module's own output, of a call whose rows are not seen; see `miss`."""
        self.miss(reason)
        plain: Any = plain_class(module)
        outputs: Tensor = plain.forward(module, *args, **kwargs)
        return outputs

    def miss(self, reason: str) -> None:
        """Told of a call whose rows are not seen.

        Raises:
            RuntimeError: its gradient would lack the P that the user has asked for.
        """
        self.unseen = reason
        if self.at_backward and self.promised:
            raise RuntimeError(
                f"layer {self.name!r}: {reason}, where P cannot be applied; use "
                'GLS(..., site="step")'
            )
        if self.at_backward:
            self.leave_backward_site()

    def leave_where_in_use(self, module: nn.Module) -> None:
        """Leave a backward site that is not promised, if D would be seen or lack a bias."""
        in_use = self.at_backward and (self._gradient_is_in_use() or not self.owns_bias_of(module))
        if in_use and not self.promised:
            self.leave_backward_site()

    def observed(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The output by torch's own op, of weight and bias that are observed."""
        inputs = self.op_inputs(inputs)
        return self.compute(module, inputs, *self.seen_operands(module, inputs, self.gather))

    def seen_operands(
        self,
        module: nn.Module,
        inputs: Tensor,
        gather: Callable[[Tensor], None],
        source: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the module's op, observed where the step asks for it.

        Args:
            inputs: as the op is given them.
            gather: see `gls_fused.capture.observed.observe`.
            source: gives what of the inputs is kept for `gather`; the inputs, where it is None.
        """
        bias, weight = bias_of(module), self.used_by(module)
        seen = self.gathers and self.sees(inputs)
        if not (seen or self.by_node):
            return weight, bias
        owned = self.observes_bias(module, bias)
        with outside_transforms():
            rows = self.rows_of(inputs) if seen else None
            rows = rows if rows is None or source is None else source(rows)
        weight = self.shown_weight(weight)
        weight, own = observe(self, rows, weight, bias if owned else None, gather)
        return weight, own if owned else bias

    def observes_bias(self, module: nn.Module, bias: Tensor | None) -> bool:
        """Whether the bias of a module's op is observed with the weight, as P couples them."""
        owned = self.couples and self.ones and self.owns_bias_of(module)
        return owned and bias is not None and bias.requires_grad

    def op_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs as the module's op is given them."""
        (inputs,) = autocast_inputs(inputs)
        return inputs

    def rows_of(self, inputs: Tensor) -> Tensor:
        """What of an op's inputs is summed, outside of torch.func's transforms."""
        return values_of(inputs)

    def shown_weight(self, weight: Tensor) -> Tensor:
        """What of a weight is observed: as under autocast its op takes it, one cast for all calls.

        Itself where P applies to its gradient, which in 16 bits may be more than these hold.
        """
        if self.by_node:
            return weight
        # Autocast keeps the cast, also for calls after the transforms.
        with outside_transforms():
            shown: Tensor = autocast_inputs(beneath(weight))[0]
        return shown

    def takes_rows(self, module: nn.Module, inputs: Tensor) -> bool:
        """Whether a node of ours may compute the output, with rows and gradients in its backward.

        Rows or a bias that are no plain tensor, may have a tangent, are transformed by torch.func
        or shown to a mode take torch's own op; so does the bias of somebody else.
        """
        bias = bias_of(module)
        plain = type(inputs) in PLAIN and (bias is None or type(bias) in PLAIN)
        seen_by_others = has_level() or in_transform() or in_function_mode()
        return plain and self.sees(inputs) and not seen_by_others and self.owns_bias_of(module)

    def precondition(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The output where P applies in the backward."""
        return self.observed(module, inputs)

    def plain(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's own output."""
        return self.compute(module, inputs, self.used_by(module), bias_of(module))

    def held_by(self, module: nn.Module) -> Tensor | None:
        """The parameter that a module has now where this layer's weight was."""
        # No property of a tuple, which torch 2.9's compiler does not look into.
        owner, key = self.places[module] if self.derived else (module, self.weight_key)
        return owner._parameters.get(key)

    def used_by(self, module: nn.Module) -> Tensor:
        """The weight that the module's op is to use now, which may be computed from it."""
        # A parameter without nn.Module's search for an attribute, which takes longer in a call than
        # all else here.
        weight: Any = getattr(module, self.weight_key) if self.derived else self.held_by(module)
        return weight  # type: ignore[no-any-return]

    def owns_bias_of(self, module: nn.Module) -> bool:
        """Whether the bias that a module has now, if any, is as it was, so that P acts on it too.

        Somebody may have replaced it, put a mask or a parametrization on it, taken it out of the
        optimizer, or call the module by torch.func.functional_call with another.
        """
        if not self.ones or self.shards is not None:
            return True
        found = module._parameters.get(str(self.bias_key))
        return self.bias_trains and self.is_own(found, self.bias)

    def is_own(self, param: Tensor | None, own: Tensor | None) -> bool:
        """Whether what a module has is the layer's own parameter."""
        if param is own or not torch.compiler.is_compiling():
            return param is own
        # Dynamo guards that two parameters are one, and not that they are two: without this a graph
        # of somebody else's would be taken once the layer's own is back. Nor that of two objects.
        number = getattr(getattr(param, OWNED, None), "number", None)
        return bool(number == self.owner.number) and param is own

    @abc.abstractmethod
    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """What the module's own forward computes, with this weight and bias."""

    @abc.abstractmethod
    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """`forward` in a graph that torch.compile traces."""

    def sees(self, inputs: Tensor) -> bool:
        """Whether the inputs are rows that can be summed; where not, the report says why."""
        if inputs.layout != torch.strided:
            self.unseen = f"its inputs are {str(inputs.layout).removeprefix('torch.')}"
            return False
        if inputs.is_nested:
            self.unseen = "its inputs are nested"
            return False
        if type(inputs).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            self.unseen = f"its inputs are {type(inputs).__name__}s"
            return False
        return True


def bias_of(module: nn.Module) -> Tensor | None:
    """The present bias of a module, a parameter or what somebody has put in its place."""
    known: Any = module._parameters
    bias: Any = known["bias"] if "bias" in known else getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias
