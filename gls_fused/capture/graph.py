"""What autograd is doing: which gradients the running backward pass is for."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

NO_TASK = -1


class Reach(enum.Enum):
    """Where the gradient that a node gives to one of its inputs goes."""

    NOTHING = "nowhere: the backward pass is for gradients of other tensors"
    GRADIENT = "into a parameter's .grad"
    CAPTURED = "to the caller of torch.autograd.grad"
    NESTED = "to that of torch.autograd.grad in another backward pass, which ran the forward, too"


def reach_of(ctx: Any, index: int) -> Reach:
    """Of the running backward pass, for the gradient of a tensor that a parameter is, or came from.

    Args:
        ctx: of an autograd function whose backward runs, with `within`, see `Passes.set_out`.
        index: which of the tensors it was given.
    """
    node = ctx.next_functions[index][0]
    # Under autocast, or in a view, the parameter is some nodes away.
    while node is not None and node.next_functions:
        node = node.next_functions[0][0]
    if node is None:
        return Reach.NOTHING
    try:
        runs = torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # How torch says that a leaf's gradient is captured instead of accumulated.
        return Reach.CAPTURED if ctx.within == NO_TASK else Reach.NESTED
    return Reach.GRADIENT if runs else Reach.NOTHING


def running_task() -> int:
    """A number of the running backward pass, NO_TASK outside of one."""
    return int(torch._C._current_graph_task_id())


def at_end_of_pass(run: Callable[[], None]) -> None:
    """Call `run` when the running backward pass ends, after what was asked for earlier."""
    torch.autograd.Variable._execution_engine.queue_callback(run)
