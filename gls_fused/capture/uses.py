"""Weights that a module's forward uses without calling the module that owns them.

torchvision's Swin calls `F.linear(x, self.qkv.weight)`, nn.MultiheadAttention hands its weights to
torch.nn.functional. Such a module is watched: in steps that ask for it, its forward runs under a
mode that is shown every call of a function of torch's. Products with a weight of a layer, or with
some rows of it, go to that layer; everything else stays what it is. Other modules run without.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gls_fused.capture.modules import (
    WATCH_KEY,
    as_plain,
    captured_by,
    is_captured,
    is_exporting,
    make_class,
    once_per_class,
    plain_class,
)
from gls_fused.capture.transforms import beneath

if TYPE_CHECKING:
    from gls_fused.capture.lending import Lender


class Use(NamedTuple):
    """A layer, the module whose parameters are its weight and bias, and its weight as it is now."""

    layer: Lender
    owner: nn.Module
    weight: Tensor


class Watch:
    """What ties a module to the layers whose weights its forward may use. Copies tie nothing."""

    __slots__ = ("module", "observer", "uses")

    def __init__(self, module: nn.Module, observer: Any) -> None:
        self.module: nn.Module | None = module
        self.observer = observer
        self.uses: list[tuple[Lender, nn.Module]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def run(self, plain: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The plain forward, watched where a layer wants to see rows or to apply P now."""
        # What torch.fx.symbolic_trace hands around has no rows.
        symbolic = any(isinstance(each, fx.Proxy) for each in (*args, *kwargs.values()))
        uses = [
            Use(layer, owner, layer.held_by(owner))  # type: ignore[arg-type]
            for layer, owner in ([] if symbolic else self.uses)
            # What fully_shard has apart from this module is whole in its own module's call alone.
            if not layer.is_spread(owner) and layer.watches(owner)
        ]
        if not uses:
            return plain.forward(self.module, *args, **kwargs)
        with self.observer(uses):
            return plain.forward(self.module, *args, **kwargs)


def watch_of(module: nn.Module) -> Watch | None:
    """The watch of a module, if there is one."""
    watch: Watch | None = module.__dict__.get(WATCH_KEY)
    return watch if watch is not None and watch.module is module else None


def watch_module(module: nn.Module, layer: Lender, owner: nn.Module) -> None:
    """From here on the module's forward shows the layer where it uses the weight of `owner`.

    A layer of another optimizer, of the same weight, is released. A module that is itself captured
    is left alone: its forward is a layer's op.
    """
    watch = watch_of(module)
    for earlier, _ in [] if watch is None else list(watch.uses):
        if earlier.weight is layer.weight and earlier is not layer:
            earlier.release()
    watch = watch_of(module)
    if watch is None:
        if captured_by(module) is not None:
            return
        watch = module.__dict__[WATCH_KEY] = Watch(module, layer.observer)
        kind: Any = plain_class(module)
        module.__class__ = _watched_class(kind)
    if layer.observer is watch.observer and (layer, owner) not in watch.uses:
        watch.uses.append((layer, owner))


def rewatch_module(module: nn.Module) -> None:
    """See that a watched module's forward still runs watched, see `recapture_module`."""
    kind: Any = type(module)
    watch = watch_of(module)
    if watch is not None and not is_captured(kind):
        module.__class__ = _watched_class(kind)


def unwatch_module(module: nn.Module, layer: Lender) -> None:
    """Forget the layer, and make the module plain where it was the last one."""
    watch = watch_of(module)
    if watch is None:
        return
    watch.uses = [use for use in watch.uses if use[0] is not layer]
    if not watch.uses:
        if captured_by(module) is None:
            module.__class__ = plain_class(module)
        module.__dict__.pop(WATCH_KEY)
        # Copies of the module's attributes may still hold it.
        watch.module = None


@once_per_class
def _watched_class(plain: Any) -> type[Any]:
    key, exporting = WATCH_KEY, is_exporting

    def forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        watch = getattr(self, key, None)
        if watch is None or watch.module is not self or exporting():
            return plain.forward(self, *args, **kwargs)
        return watch.run(plain, *args, **kwargs)

    found: Any = as_plain(plain, forward)
    if issubclass(plain, nn.RNNBase | nn.RNNCellBase):
        # torch.compile leaves recurrent modules as they are.
        return make_class(plain, _disable_dynamo(found))
    return make_class(plain, found)


# ---- a call of a watched module ----------------------------------------------------------------


def _unchecked(function: Any) -> Any:
    """A function of torch.nn.functional that does not ask for modes before it begins.

    Under a mode it would hand itself to the mode for ever, and never come to the products in it.
    The check of a mask's size is one that torch.compile can trace.
    """
    own = {
        "has_torch_function": lambda _tensors: False,
        "_check_key_padding_mask": _check_key_padding_mask,
    }
    names = {**function.__globals__, **own}
    found = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _check_key_padding_mask(mask: Tensor, length: int, batch: int) -> None:
    if tuple(mask.shape) != (batch, length):
        raise AssertionError(
            f"key_padding_mask: expected {[batch, length]}, got {list(mask.shape)}"
        )


_attention = _unchecked(F.multi_head_attention_forward)
MATMULS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__),
    *(torch.mm, Tensor.mm, torch.mv, Tensor.mv),
)


class Observer(TorchFunctionMode):
    """Hands products with the weights of some layers to them."""

    def __init__(self, uses: Sequence[Use]) -> None:
        super().__init__()
        self.uses = uses
        self.hooks = saved_tensors_hooks()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        if func is F.linear and torch.is_grad_enabled():
            return self.linear(*args, **kwargs)
        whole = [use for use in self.uses if func in use.layer.calls]
        if whole and not kwargs and torch.is_grad_enabled():
            return whole[0].layer.take_call(whole, func, args)
        if func in MATMULS and torch.is_grad_enabled():
            both = len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
            if both and not kwargs:
                return self.matmul(*args)
        return func(*args, **kwargs)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's name
        own = beneath(weight)
        use = self.find(own)
        if use is None:
            return F.linear(input, weight, bias)
        return use.layer.lend(use.owner, input, own, bias, F.linear)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """X @ W' and W @ x', and X @ W of a weight that is turned."""
        first, second = beneath(left), beneath(right)
        use = self.find(first)
        if use is not None and self.find(second) is None:
            if right.ndim == 1:
                return use.layer.lend(use.owner, right, first, None, _multiply_vector)
            rows = right.transpose(-2, -1)
            return use.layer.lend(use.owner, rows, first, None, _multiply_from_left, turned=True)
        turned = self.find(second, turned=True)
        if use is None and turned is not None:
            return turned.layer.lend(turned.owner, left, second, None, _multiply)
        if use is None and right.ndim == 2 and self.find(view := beneath(right.t())) is not None:
            use = self.find(view)
            assert use is not None
            return use.layer.lend(use.owner, left, view, None, _multiply_by_transposed)
        return torch.matmul(left, right)

    def find(self, weight: Tensor, *, turned: bool = False) -> Use | None:
        """Whose weight [m, k] it is, or some rows of whose; or whose [k, m], where it is turned."""
        if has_new_hooks(self.hooks):
            # Checkpointed inside the module, it would be computed again outside of this mode.
            return None
        for use in self.uses:
            known = use.weight
            if use.layer.turned != turned:
                continue
            if weight is known:
                return use
            if (
                not turned
                and weight._base is known
                and weight.ndim == known.ndim
                and weight.shape[1:] == known.shape[1:]
                and weight.stride()[1:] == known.stride()[1:]
            ):
                return use
        return None


def _multiply(rows: Tensor, weight: Tensor, _bias: None) -> Tensor:
    return torch.matmul(rows, weight)


def _multiply_by_transposed(rows: Tensor, weight: Tensor, _bias: None) -> Tensor:
    return torch.matmul(rows, weight.t())


def _multiply_vector(row: Tensor, weight: Tensor, _bias: None) -> Tensor:
    return torch.matmul(weight, row)


def _multiply_from_left(rows: Tensor, weight: Tensor, _bias: None) -> Tensor:
    return torch.matmul(weight, rows.transpose(-2, -1))


def saved_tensors_hooks() -> Any:
    """Those that checkpointing, offloading and users have put in force, the innermost pair."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def has_new_hooks(earlier: Any) -> bool:
    """Whether others are in force than `saved_tensors_hooks` gave earlier."""
    return bool(saved_tensors_hooks() != earlier)
