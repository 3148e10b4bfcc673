"""A layer: what a weight, with its bias, and the modules that use it are to GLS.

While it is captured, its modules' forward, in a step that gathers rows, uses weight and bias as
`gls_fused.capture.observed` hands them out; in other steps it is the module's own. Only where P
acts on the rows themselves, nn.Linear at the backward site, an autograd function stands in for the
module's op.
"""

from __future__ import annotations

import abc
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from gls_fused.backends.dispatch import backend_name, resolve_backend
from gls_fused.capture.derived import Place, source_of
from gls_fused.capture.graph import Reach, at_end_of_pass, reach_of, running_task
from gls_fused.capture.marks import Marks, choose_places
from gls_fused.capture.modules import (
    capture_module,
    captured_by,
    plain_class,
    recapture_module,
    release_module,
)
from gls_fused.capture.observed import observe
from gls_fused.capture.rows import Rows
from gls_fused.curvature.estimate import State, make_curvature
from gls_fused.distributed.sharding import (
    is_sharded,
    part_here,
    rows_here,
    shards_of,
    spread_over_first,
)
from gls_fused.reference import Inverse, SubspaceInverse, undo_inverse


class Found(NamedTuple):
    """What has been found of one weight in a model.

    Attributes:
        name: qualified name of the weight's first module.
        modules: that use the weight.
        key: the name of the parameter that the weight is, in these modules.
        bias: [m] or None.
        table: an embedding that looks the same weight up, or None.
    """

    name: str
    modules: list[nn.Module]
    key: str
    bias: Tensor | None
    table: str | None


class Layer(Rows):
    """A weight and bias with the modules that use them, and what passes between them and a step.

    Attributes:
        found: its name, and what is in the model.
        weight: [m, k], or [m, c, kh, kw]; [k, m] and the like where it is turned.
        shape: the weight's, its outputs first; of a stack, that of one of its matrices.
        blocks: of a stack, how many matrices of one shape the weight is, each with inputs and a P
            of its own, along its first axis; None where it is one.
        weight_key: `found.key`.
        table: of `found`. Its part of the gradient has no rows, and P acts on the sum, so that
            p.grad keeps the gradient until the step.
        places: where each module has the weight, see gls_fused.capture.derived.
        derived: whether the modules compute with what they make of it.
        dim: d, the length of a row with its one.
        gated: whether the weight is several matrices of the same inputs, as a recurrent layer's.
        curvature: the kind of running estimate, as is the backend set by `assign`.
        promised: whether D in p.grad is what the user asked for, and not this layer's own choice.
        stays_at_step: whether p.grad has turned out to be in use, so that it keeps the gradient.
        compiled: whether a graph that torch.compile traced has shown rows.
        called: whether rows have been seen.
        lent: whether another module has used the weight by itself, and the rows were seen. Then
            p.grad keeps the gradient, unless `promised`.
        cleared: whether some D in p.grad has been cleared since the last step.
        idle: why it takes part in no statistics, or None; such as never having been called. Its
            sums are then of size 0, and there are some once it has been called.
        returned: whether rows of an idle layer have been seen since, with a gradient.
        marks: some entries of the D that this step's backward passes have left in p.grad.
        reduced: of a sharded layer, the sums over the rows whose gradient is in p.grad; `sums` are
            then of rows whose gradient fully_shard holds back.
        tally: in graphs that torch.compile traces, the leaf whose gradient is the sums, which its
            hook adds to `sums`; one number in memory. None before the first step that gathers.
        captured: False once another optimizer has taken the modules over.
        shards: over which ranks the rows of weight and bias are spread, see
            gls_fused.distributed.sharding.
    """

    kind: str
    # Whether P can act on the rows themselves, at the backward site.
    by_rows: bool = False
    # The names of a module's parameters that weight and bias are.
    weight_key: str = "weight"
    bias_key: str | None = "bias"
    gated: ClassVar[bool] = False
    # Why no rows are seen where nothing else is known.
    missed: ClassVar[str] = "its module is not called, its weight is used elsewhere"

    def __init__(self, found: Found) -> None:
        self.found = found
        self.name, modules, self.weight_key, bias, self.table = found
        self.modules = modules
        # Those whose forward is this layer's op.
        self.routed = modules
        sources = [source_of(module) if found.key == "weight" else None for module in modules]
        self.derived = any(sources)
        places = [
            source or Place(module, found.key)
            for source, module in zip(sources, modules, strict=True)
        ]
        self.places = dict(zip(modules, places, strict=True))
        weight = places[0].param
        assert weight is not None
        self.weight = weight
        self.bias = bias
        self.shards = shards_of(weight)
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
        self.promised = self.stays_at_step = self.compiled = self.captured = False
        self.called = self.cleared = self.returned = self.lent = False
        self.idle: str | None = None
        self.misses = 0
        self.marks: Any = None
        self.tally: Tensor | None = None
        self.reduced: Tensor | None = None
        self._watch: Any = None
        self._task = -1
        # Of all layers that an optimizer covers.
        self.last = False

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

    def __reduce__(self) -> tuple[type[Layer], tuple[Any, ...]]:
        # A copy has statistics of its own, and captures nothing until it is told to.
        return type(self), (self.found,)

    def turn(self, tensor: Tensor) -> Tensor:
        """See `Rows.turn`. What is spread over ranks by its first axis is so before and after."""
        turned = super().turn(tensor)
        if self.shards is None or turned is tensor or not is_sharded(turned):
            return turned
        return spread_over_first(turned)

    @property
    def turns_by_copy(self) -> bool:
        spread = self.shards is not None and not self.stacked
        return super().turns_by_copy or (self.turned and spread)

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        if not is_sharded(gradients[0]):
            return super().direction(gradients)
        upright = [self.turn(gradient) for gradient in gradients]
        here = list(map(rows_here, upright))
        found = self._upright_direction(here, self.inverse_for(len(gradients) == 2))
        for mine, direction in zip(here, found, strict=True):
            mine.copy_(direction)
        return [self.turn(each) for each in upright]

    # ---- what an optimizer tells it --------------------------------------------------------------

    def assign(self, kind: str, rank: Any, backend: str, *, promised: bool) -> None:
        """Choose the kind of running estimate, and the backend by name."""
        self._choice = (kind, rank, backend)
        self.promised = promised
        self.fit()

    def fit(self) -> None:
        """Be of the weight's dtype and device, which change where a model is cast or moved."""
        kind, rank, backend = self._choice
        self.dtype, self.device = self.weight.dtype, self.weight.device
        self.backend = resolve_backend(backend, {self.device.type})
        self.backend_name = backend_name(self.backend)
        self.curvature = make_curvature(
            kind, self.dim, self.outputs, rank, self.backend, self.blocks
        )
        self.statistics_dtype = torch.promote_types(self.dtype, torch.float32)
        self.take_sums()
        self.inverse = self.test_matrix = self.tally = None
        self.marks = Marks(choose_places(self.weight.numel()))
        self.at_backward = False

    @property
    def fits(self) -> bool:
        """Whether the weight is as it was when `fit` looked."""
        return self.weight.dtype == self.dtype and self.weight.device == self.device

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        """What the coming step asks of the layer; see `Rows`."""
        self.inverse, self.gathers, self.at_backward = inverse, gathers, at_backward
        if inverse is not None:
            self.test_matrix = None
        if not self.weight.requires_grad or self.idle is not None:
            self.test_matrix = None
        if not self.weight.requires_grad:
            self.tally = None
        elif gathers and (self.tally is None or self.tally.numel() != self._sums_size):
            if self.idle is None:
                self.sketched_with()
            zero = torch.zeros(1, dtype=self.statistics_dtype, device=self.device)
            self.tally = zero.expand(self._sums_size).requires_grad_()
            # Not this layer itself, which then nothing would free but the cycle collector.
            take = functools.partial(_take_tally, weakref.ref(self))
            self.tally.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    @property
    def matrices_here(self) -> int:
        """How many matrices the weight is, on this rank."""
        return 1 if self.blocks is None else len(range(self.blocks)[self.here])

    @property
    def outputs(self) -> int:
        """The number m of outputs."""
        return self.shape[0]

    @property
    def resharded(self) -> bool:
        """Whether the weight that a module has is sharded, and not the one known here."""
        held = [place.param for place in self.places.values()]
        return any(weight is not self.weight and is_sharded(weight) for weight in held)

    @property
    def params(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def capture(self) -> None:
        """Route the modules' forward through this layer."""
        for module in self.routed:
            earlier = captured_by(module)
            if earlier is not None and earlier is not self:
                earlier.release()
            capture_module(module, self)
        self.captured = True

    def recapture(self) -> None:
        """See that the modules' forward still goes through this layer, whatever became of them."""
        for module in self.routed:
            recapture_module(module)

    def release(self) -> None:
        """Give the modules their own forward back; gradients are true from here on."""
        if self.at_backward and not self.promised:
            self.leave_backward_site()
        for module in self.routed:
            release_module(module, self)
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
        if weight is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling():
            return (self.at_backward or self.gathers) and not _is_exporting()
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"layer {self.name!r}: torch.func's transforms (grad, vmap, ...) would give "
                "gradients of rows that GLS does not see; use a copy.deepcopy of the model, "
                "or call detach() of the optimizer first"
            )
        if not (self.at_backward or self.gathers):
            return False
        if torch._C._get_tracing_state() is not None:
            return False
        if weight is not self.weight and self.shards is None:
            # Another's: a parameter replaced, or those of torch.func.functional_call.
            return False
        if not self.fits:
            self.fit()
        if self.shards is not None and is_sharded(weight):
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
        if self.at_backward:
            return self.precondition(module, inputs)
        if not self.gathers:
            return self.plain(module, inputs)
        return self.observed(module, inputs)

    def forward_more(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a call with more than the inputs; that of the module's own forward.

        Raises:
            RuntimeError: its gradient would lack the P that the user has asked for.
        """
        self.unseen = reason = "it is called with more than its inputs"
        if self.at_backward and self.promised:
            raise RuntimeError(
                f'layer {self.name!r}: {reason}, where P cannot be applied; use site="step"'
            )
        if self.at_backward:
            self.leave_backward_site()
        plain: Any = plain_class(module)
        outputs: Tensor = plain.forward(module, *args, **kwargs)
        return outputs

    def leave_where_in_use(self, module: nn.Module) -> None:
        """Leave a backward site that is not promised, if D would be seen or lack a bias."""
        in_use = self.at_backward and (self._gradient_is_in_use() or not self.owns_bias_of(module))
        if in_use and not self.promised:
            self.leave_backward_site()

    def observed(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The output by torch's own op, of weight and bias that are observed."""
        return self.compute(module, *self.operands(module, inputs, self.gather))

    def operands(
        self, module: nn.Module, inputs: Tensor, gather: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, weight and bias of the module's op, observed where the step asks for it.

        Args:
            gather: see `gls_fused.capture.observed.observe`.
        """
        bias = bias_of(module)
        (inputs,) = autocast_inputs(inputs)
        seen = self.gathers and self.sees(inputs)
        if not (seen or self.at_backward):
            return inputs, self.used_by(module), bias
        # P couples weight and bias; without it the bias need not be observed.
        owned = self.at_backward and self.ones and self.owns_bias_of(module)
        owned = owned and bias is not None and bias.requires_grad
        rows = without_tangent(inputs) if seen else None
        weight, own = observe(self, rows, self.used_by(module), bias if owned else None, gather)
        return inputs, weight, own if owned else bias

    def takes_rows(self, module: nn.Module, inputs: Tensor) -> bool:
        """Whether a node of ours may compute the output, with rows and gradients in its backward.

        Rows that are no plain tensor, or have a tangent, take torch's own op; so does the bias of
        somebody else.
        """
        plain = type(inputs) in (Tensor, nn.Parameter) and self.sees(inputs)
        return plain and self.owns_bias_of(module)

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
        weight: Tensor = getattr(module, self.weight_key)
        return weight

    def owns_bias_of(self, module: nn.Module) -> bool:
        """Whether the bias that a module has now, if any, is as it was, so that P acts on it too.

        Somebody may have replaced it, put a mask or a parametrization on it, or call the module by
        torch.func.functional_call with another.
        """
        if not self.ones or self.shards is not None:
            return True
        return module._parameters.get(str(self.bias_key)) is self.bias

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
        return not (self.at_backward and _has_level())

    unseen: str | None = None

    # ---- the backward ----------------------------------------------------------------------------

    def enter(self, ctx: Any, weight: int) -> tuple[bool, bool]:
        """See `Rows.enter`.

        Raises:
            RuntimeError: it would differentiate through the D that the user has asked for.
        """
        reach = reach_of(ctx, weight)
        if reach is Reach.NOTHING or not self.captured:
            return False, False
        if reach is Reach.GRADIENT:
            self._begin_pass()
        if self.at_backward and torch.is_grad_enabled():
            if self.promised:
                raise RuntimeError(
                    f"layer {self.name!r}: a backward with create_graph=True would differentiate "
                    'through the preconditioned gradient; use site="step"'
                )
            self.leave_backward_site()
        # Who asks torch.autograd.grad for the gradient gets the gradient.
        applies = self.at_backward and (self.promised or reach is Reach.GRADIENT)
        if self.gathers and self.idle is not None:
            self.sums = self.no_sums()
        return self.gathers and self.idle is None, applies

    def deposit(self, direction: Tensor) -> None:
        if not self.promised:
            self.marks.add_marks(direction)

    def gather(self, inputs: Tensor) -> None:
        self.called = True
        self.sketched_with()
        super().gather(inputs)

    def add_sample(
        self, sums: Tensor | None, rows: Tensor, weight: float, basis: Tensor | None
    ) -> Tensor:
        add_sketch_ = getattr(self.backend, "add_sketch_", None)
        if add_sketch_ is None or basis is None:
            return super().add_sample(sums, rows, weight, basis)
        # Into the sums themselves, in one pass over the rows.
        dim, rank = basis.shape
        fresh = basis.new_zeros(2 + rank * (rank + dim)) if sums is None or weight != 1 else sums
        add_sketch_(rows, basis, self.ones, fresh)
        if weight != 1:
            fresh *= weight
        return fresh if sums is None or fresh is sums else sums.add_(fresh)

    def sketched_with(self) -> Tensor | None:
        """U, or the test matrix, which is made when the first rows come; None where dense."""
        if isinstance(self.inverse, SubspaceInverse):
            return self.inverse.basis
        if self.inverse is None and self.test_matrix is None:
            self.test_matrix = self.curvature.test_matrix(self.statistics_dtype, self.device)
        return self.test_matrix

    def add_traced(self, sums: Tensor) -> None:
        """Add what a traced graph has summed over rows whose gradient counts."""
        self._begin_pass()
        self.compiled = True
        if self.gathers:
            self.called = True
            self.sums = sums if self.sums is None else self.sums + sums
            self._watch_gradient()

    def _begin_pass(self) -> None:
        """To be called in a backward pass before it adds to the weight's gradient."""
        task = running_task()
        if task == self._task:
            return
        self._task = task
        if self.shards is not None:
            self._follow_reduction()
            return
        self._forget_dropped()
        if self.compiled and self.gathers:
            self._watch_gradient()

    def _watch_gradient(self) -> None:
        """See to it that the next backward pass begins before it adds to the weight's gradient.

        In a traced graph the sums may come after the gradient.
        """
        if self._watch is None and self.shards is None:
            # A hook of autograd's node, as one of the weight would count as a use of its gradient.
            node = get_gradient_edge(self.weight).node
            begin = functools.partial(_begin_pass, weakref.ref(self))
            self._watch = node, node.register_prehook(begin)

    def _forget_dropped(self) -> None:
        """Forget rows of earlier backward passes whose gradient somebody has cleared since."""
        gradient = self.weight.grad
        if not (self.sums is not None or self.marks.has_marks):
            return
        if gradient is None:
            self.forget()
        elif self.marks.has_marks:
            if self.marks.are_gone_from(gradient):
                self.forget()
        elif self.sums is not None:
            # In a backward pass the bias may have its new gradient already.
            self.sums = _where_nonzero([gradient], self.sums)

    def _follow_reduction(self) -> None:
        """`_forget_dropped` of a sharded layer, and find whether this pass adds to p.grad.

        Passes without synchronisation do not: their gradient is held back, and nobody clears it.
        """
        if self.weight.grad is None:
            self.reduced = None
        if not self.gathers:
            return
        before = self._gradient_version()

        def follow() -> None:
            if self._gradient_version() != before and self.sums is not None:
                sums, self.sums = self.sums, None
                self.reduced = sums if self.reduced is None else self.reduced + sums

        at_end_of_pass(follow)

    def _gradient_version(self) -> int | None:
        gradient = self.weight.grad
        return None if gradient is None else rows_here(gradient)._version

    # ---- the step --------------------------------------------------------------------------------

    def take_sums(self) -> Tensor | None:
        sums, self.sums = self.sums, None
        if self.reduced is not None:
            sums = self.reduced if sums is None else self.reduced + sums
            self.reduced = None
        if self._watch is not None:
            self._watch[1].remove()
            self._watch = None
        return sums

    def led_to(self) -> list[Tensor]:
        """The gradients that the rows led to; none where it is not known here whether all are zero.

        Others' part of a sharded gradient is not. Of rows that are zero the bias alone has one.
        """
        if self.shards is not None or self.weight.grad is None:
            return []
        return [param.grad for param in self.params if param.grad is not None]

    def counted(self, sums: Tensor) -> Tensor:
        """The sums, over no row where the gradients that the rows led to have been set to zero."""
        gradients = self.led_to()
        return _where_nonzero(gradients, sums) if gradients else sums

    def count_rows(self, sums: Tensor) -> Tensor:
        """Over how many rows the sums are, 0-d; of a stack, of all its matrices."""
        return sums.view(self.blocks or 1, -1)[:, 0].sum()

    def no_sums(self) -> Tensor:
        """The sums over no row."""
        return torch.zeros(self._sums_size, dtype=self.statistics_dtype, device=self.device)

    @property
    def _sums_size(self) -> int:
        return self.curvature.sums_size if self.idle is None else 0

    def forget(self) -> None:
        """Forget the rows of this step, and what of D is in p.grad."""
        # Asked in every step: in most there is nothing.
        if self.sums is not None or self.reduced is not None or self._watch is not None:
            self.take_sums()
        if self.marks.has_marks:
            self.cleared = True
            self.marks.clear_marks()

    def finish_step(self) -> None:
        """Forget what belonged to the step that has been taken."""
        self.forget()
        self.cleared = False

    def holds_direction(self) -> bool:
        """Whether p.grad, which there is, holds D, so that P is not to be applied again.

        Where p.grad is not what the backward left there up to one factor, it says so once, and the
        layer's site is the step from the next step on.
        """
        if not self.at_backward or self.promised:
            return self.at_backward
        gradient = self.weight.grad
        assert gradient is not None
        if not self.marks.has_marks:
            # Nothing, or what somebody has made of D and put there after it was cleared.
            if not (self.cleared and gradient.any()):
                return False
            self._warn_of_use()
        elif not self.marks.match(gradient):
            self._warn_of_use()
        return True

    @torch.no_grad()
    def restore_gradient(self) -> None:
        """What of D is in p.grad becomes D0."""
        if self.marks.has_marks and self.inverse is not None:
            params = [param for param in self.params if param.grad is not None]
            inverses = self.inverses_for(len(params) == len(self.params))
            stacks = [self.matrices(param.grad) for param in params]  # type: ignore[arg-type]
            for inverse, *gradients in zip(inverses, *stacks, strict=True):
                matrices = [gradient.reshape(self.outputs, -1) for gradient in gradients]
                restored = undo_inverse(torch.cat(matrices, dim=1), inverse)
                parts = torch.split(restored, [matrix.shape[1] for matrix in matrices], dim=1)
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.reshape(gradient.shape))
        self.marks.clear_marks()

    def leave_backward_site(self) -> None:
        """From here on p.grad keeps the gradient."""
        self.restore_gradient()
        self.stays_at_step = True
        self.expect(self.inverse, gathers=self.gathers, at_backward=False)

    def _warn_of_use(self) -> None:
        self.stays_at_step = True
        warnings.warn(
            f"layer {self.name!r}: its p.grad is not what backward() left there, which was D = "
            "D0 P and not the gradient: a penalty, hook, mask, noise or use of the weight outside "
            'its module added to it, or it was written by hand. GLS(..., site="step") keeps the '
            "gradient in p.grad; this layer does so from here on",
            stacklevel=3,
        )

    def _gradient_is_in_use(self) -> bool:
        """Whether hooks of the parameters see their gradients."""
        # Asked in every forward: without a loop.
        weight, bias = self.weight, self.bias
        return bool(
            weight._backward_hooks
            or weight._post_accumulate_grad_hooks
            or (bias is not None and (bias._backward_hooks or bias._post_accumulate_grad_hooks))
        )


def _where_nonzero(gradients: list[Tensor], sums: Tensor) -> Tensor:
    """The sums, or zeros where all entries of the gradients are zero."""
    # Where the host need not wait for them, a few entries tell most often.
    if gradients[0].is_cpu and gradients[0].flatten(1).diagonal().any():
        return sums
    entries = sum(torch.count_nonzero(gradient) for gradient in gradients)
    return torch.where(entries != 0, sums, 0.0)  # type: ignore[arg-type]


@_disable_dynamo
def _take_tally(layer: weakref.ref[Layer], tally: Tensor) -> None:
    """The hook of a tally, which has its gradient."""
    found, sums = layer(), tally.grad
    tally.grad = None
    if found is not None and found.tally is tally and sums is not None:
        found.add_traced(sums)


@_disable_dynamo
def _begin_pass(layer: weakref.ref[Layer], _gradients: Any) -> None:
    """The hook before the weight's gradient is added to p.grad."""
    found = layer()
    if found is not None:
        found._begin_pass()


def bias_of(module: nn.Module) -> Tensor | None:
    """The present bias of a module, a parameter or what somebody has put in its place."""
    bias: Any = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def autocast_inputs(inputs: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What torch's own op would do under autocast, seen by autograd."""
    device, tensors = inputs.device.type, (inputs, *others)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in tensors
    )


def without_tangent(inputs: Tensor) -> Tensor:
    """Rows as they are without their tangent, which the weight has not."""
    if not _has_level():
        return inputs
    rows: Tensor = forward_ad.unpack_dual(inputs).primal  # type: ignore[no-untyped-call]
    return rows


def _has_level() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def _is_exporting() -> bool:
    # Of torch.compiler.is_exporting, which torch 2.11 takes for true in every graph that it traces.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))
