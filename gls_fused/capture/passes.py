"""What a layer keeps over the backward passes of a step: sums of rows, and what of D is in p.grad.

Rows count where their gradient is in p.grad when the step comes. A backward pass that begins asks
whether that of earlier ones is still there: who clears it, by whatever means, takes its rows back.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import get_gradient_edge

from gls_fused.capture.graph import Reach, at_end_of_pass, reach_of, running_task
from gls_fused.capture.rows import Rows
from gls_fused.capture.transforms import outside_transforms
from gls_fused.curvature.precision import without_tf32
from gls_fused.distributed.sharding import rows_here, shards_of
from gls_fused.reference import Inverse, undo_inverse

# Of a gradient, see `_version_of`.
Version: TypeAlias = tuple[weakref.ref[Tensor], int] | None


class Passes(Rows):
    """The backward passes of a weight and bias between two steps.

    Attributes:
        weight: [m, k], or [m, c, kh, kw]; [k, m] and the like where it is turned.
        bias: [m] or None.
        shape: the weight's, its outputs first; of a stack, that of one of its matrices.
        blocks: of a stack, how many matrices of one shape the weight is, each with inputs and a P
            of its own, along its first axis; None where it is one.
        shards: over which ranks the rows of weight and bias are spread, see
            gls_fused.distributed.sharding.
        curvature: the kind of running estimate.
        promised: whether D in p.grad is what the user asked for, and not this layer's own choice.
        by_node: whether P applies in the backward, or did at the step's beginning.
        bias_trains: whether the optimizer still has the bias, where there is one.
        stays_at_step: whether p.grad has turned out to be in use, so that it keeps the gradient.
        compiled: whether a graph that torch.compile traced has shown rows.
        captured: whether its modules' forward asks this layer now.
        called: whether rows have been seen.
        cleared: whether some D in p.grad has been cleared since the last step.
        midway: whether p.grad had a part of the step's gradient when a state was loaded; it keeps
            the gradient until the step.
        unseen: why what its module was called with has shown no rows, or None.
        idle: why it takes part in no statistics, or None; such as never having been called. Its
            sums are then of size 0, and there are some once it has been called.
        marks: some entries of the D that this step's backward passes have left in p.grad.
        reduced: of a sharded layer, the sums over the rows whose gradient is in p.grad; `sums` are
            then of rows whose gradient fully_shard holds back.
        tally: in graphs that torch.compile traces, the leaf whose gradient is the sums, which its
            hook adds to `sums`; one number in memory. None before the first step that gathers.
    """

    shape: torch.Size
    blocks: int | None
    device: torch.device
    backend_name: str
    curvature: Any

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name, self.weight, self.bias = name, weight, bias
        self.shards = shards_of(weight)
        self.promised = self.stays_at_step = self.compiled = self.captured = False
        self.called = self.cleared = self.midway = self._counted = False
        self.by_node, self.bias_trains = False, True
        self.idle: str | None = None
        self.unseen: str | None = None
        self.marks: Any = None
        self.tally: Tensor | None = None
        self.reduced: Tensor | None = None
        # Gradients as the last step left them: with D in them, and without.
        self._left: Version = None
        self._earlier: Version = None
        self._watch: Any = None
        self._task = -1

    @property
    def outputs(self) -> int:
        """The number m of outputs."""
        return self.shape[0]

    @property
    def params(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        """What the coming step asks of the layer; see `Rows`."""
        self.inverse, self.gathers, self.at_backward = inverse, gathers, at_backward
        self.by_node = at_backward
        if inverse is not None:
            self.test_matrix = None
        if not self.weight.requires_grad or self.idle is not None:
            self.test_matrix = None
        if gathers and (self.tally is None or self.tally.numel() != self._sums_size):
            if self.idle is None:
                self.sketched_with()
            zero = torch.zeros(1, dtype=self.statistics_dtype, device=self.device)
            self.tally = zero.expand(self._sums_size).requires_grad_()
            # Not this layer itself, which then nothing would free but the cycle collector.
            take = functools.partial(_take_tally, weakref.ref(self))
            self.tally.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    @property
    def couples(self) -> bool:
        return self.by_node or self.promised or not self.ones

    def train_bias(self, trains: bool) -> None:
        """Told whether the optimizer has the bias."""
        self.bias_trains = trains

    def take_over(self, inverse: Inverse) -> None:
        """Hold the same P in other tensors from here on; what has been seen stays."""
        self.inverse = inverse

    # ---- the backward ----------------------------------------------------------------------------

    def set_out(self, ctx: Any) -> None:
        ctx.within = running_task()

    def enter(self, ctx: Any, weight: int) -> tuple[bool, bool]:
        """See `Rows.enter`.

        Raises:
            RuntimeError: it would differentiate through the D that the user has asked for.
        """
        reach = reach_of(ctx, weight)
        if reach is Reach.NOTHING or not self.captured:
            return False, False
        if reach is Reach.GRADIENT:
            self._begin_pass(running_task())
            self._counted = True
        elif reach is Reach.NESTED:
            # What a function's backward asks for, as adjoint methods do, it gives to p.grad.
            self._counted = True
            if self.shards is None:
                self._begin_pass(ctx.within)
        # Beside those that p.grad is made of, rows of a gradient that somebody asks for are others.
        beside = reach is Reach.CAPTURED and self._counted and self.weight.grad is not None
        if self.at_backward and torch.is_grad_enabled():
            if self.promised:
                raise RuntimeError(
                    f"layer {self.name!r}: a backward with create_graph=True would differentiate "
                    'through the preconditioned gradient; use GLS(..., site="step")'
                )
            self.leave_backward_site()
        # Who asks torch.autograd.grad for the gradient gets the gradient.
        applies = self.at_backward and (self.promised or reach is Reach.GRADIENT)
        if self.gathers and self.idle is not None:
            self.sums = self.no_sums()
        return self.gathers and self.idle is None and not beside, applies

    def deposit(self, direction: Tensor, bias_direction: Tensor | None) -> None:
        if not self.promised:
            self.marks.add_marks(direction, bias_direction)

    def gather(self, inputs: Tensor) -> None:
        if inputs.numel():
            self.called = True
        elif not self.called:
            self.unseen = "it is called with no rows"
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
        # On a CPU by no product of torch's.
        with nullcontext() if rows.is_cpu else without_tf32():
            add_sketch_(rows, basis, self.ones, fresh)
        if weight != 1:
            fresh *= weight
        return fresh if sums is None or fresh is sums else sums.add_(fresh)

    def sketched_with(self) -> Tensor | None:
        """U, or the test matrix, which is made when the first rows come; None where dense."""
        if self.inverse is None and self.test_matrix is None:
            self.test_matrix = self.curvature.test_matrix(self.statistics_dtype, self.device)
        return super().sketched_with()

    def add_traced(self, sums: Tensor) -> None:
        """Add what a traced graph has summed over rows whose gradient counts."""
        self._begin_pass(running_task())
        self.compiled = True
        if self.gathers:
            self.called = True
            self.sums = sums if self.sums is None else self.sums + sums
            self._watch_gradient()

    def _begin_pass(self, task: int) -> None:
        """To be called in the backward pass `task` before it adds to the weight's gradient."""
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

    @property
    def has_rows(self) -> bool:
        """Whether there are sums of this step."""
        return self.sums is not None or self.reduced is not None

    def take_sums(self) -> Tensor | None:
        sums, self.sums = self.sums, None
        if self.reduced is not None:
            sums = self.reduced if sums is None else self.reduced + sums
            self.reduced = None
        if self._watch is not None:
            self._watch[1].remove()
            self._watch = None
        return sums

    def rested(self) -> list[Tensor]:
        """Parameters that do not train, and whose gradient has been kept as zeros.

        P takes no share of their partner's gradient to them. One that was frozen after the backward
        has a gradient. Of shards the ranks would not agree.
        """
        frozen = [p for p in self.params if not p.requires_grad and p.grad is not None]
        return [p for p in frozen if self.shards is None and not p.grad.any()]  # type: ignore[union-attr]

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
        if self.has_rows or self._watch is not None:
            self.take_sums()
        self._counted = False
        if self.marks.has_marks:
            self.cleared = True
            self.marks.clear_marks()

    def finish_step(self) -> None:
        """Forget what belonged to the step that has been taken."""
        if self.promised:
            self._earlier = None if self.at_backward else _version_of(self.weight.grad)
        if self.at_backward and not self.promised and self.marks.has_marks:
            gradient = self.weight.grad
            if gradient is not None:
                # Until somebody writes to it.
                self._left = _version_of(gradient)
            elif self._bias_gradient is not None:
                self._warn_of_use()
        self.forget()
        self.cleared = self.midway = False

    def holds_direction(self) -> bool:
        """Whether p.grad, which there is, holds D, so that P is not to be applied again.

        Where p.grad is not what the backward left there up to one factor, it says so once, and the
        layer's site is the step from the next step on.
        """
        gradient = self.weight.grad
        if not self.at_backward or gradient is None:
            return self.at_backward
        if self.promised:
            return not _is_version(gradient, self._earlier)
        if not self.marks.has_marks:
            if self._left is not None and self._left[0]() is gradient:
                # What an earlier step has taken already.
                return _is_version(gradient, self._left)
            # Nothing, or what somebody has made of D and put there after it was cleared.
            if not (self.cleared and gradient.any()):
                return False
            self._warn_of_use()
        elif not self.marks.match(gradient, self._bias_gradient):
            self._warn_of_use()
        return True

    @property
    def _bias_gradient(self) -> Tensor | None:
        """That of the layer's own bias."""
        return self.bias.grad if self.bias is not None and self.bias_trains else None

    @torch.no_grad()
    def restore_gradient(self) -> None:
        """What of D is in p.grad becomes D0; what somebody has put there instead stays."""
        gradient = self.weight.grad
        there = gradient is not None and self.marks.has_marks
        there = there and self.marks.match(gradient, self._bias_gradient)
        if there:
            # It is the gradient from here on, and nobody's D put back.
            self.cleared = False
        if there and self.inverse is not None:
            ours = self.params if self.bias_trains else [self.weight]
            params = [param for param in ours if param.grad is not None]
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
        with outside_transforms():
            self.restore_gradient()
            self.stays_at_step = True
            self.expect(self.inverse, gathers=self.gathers, at_backward=False)
        # A checkpoint may compute again what has been computed so, with the same tensors.
        self.by_node = True

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


def _version_of(gradient: Tensor | None) -> Version:
    """What tells whether a gradient has been replaced or written to."""
    return None if gradient is None else (weakref.ref(gradient), gradient._version)


def _is_version(gradient: Tensor, version: Version) -> bool:
    return version is not None and version[0]() is gradient and version[1] == gradient._version


def _where_nonzero(gradients: list[Tensor], sums: Tensor) -> Tensor:
    """The sums, or zeros where all entries of the gradients are zero."""
    # Where the host need not wait for them, a few entries tell most often.
    if gradients[0].is_cpu and gradients[0].flatten(1).diagonal().any():
        return sums
    entries = sum(torch.count_nonzero(gradient) for gradient in gradients)
    return torch.where(entries != 0, sums, 0.0)  # type: ignore[arg-type]


@_disable_dynamo
def _take_tally(layer: weakref.ref[Passes], tally: Tensor) -> None:
    """The hook of a tally, which has its gradient."""
    found, sums = layer(), tally.grad
    tally.grad = None
    if found is not None and found.tally is tally and sums is not None:
        found.add_traced(sums)


@_disable_dynamo
def _begin_pass(layer: weakref.ref[Passes], _gradients: Any) -> None:
    """The hook before the weight's gradient is added to p.grad."""
    found = layer()
    if found is not None:
        found._begin_pass(running_task())
