"""How a layer's programs count how many of them are done, so that the last one can do the rest."""

import triton
import triton.language as tl


@triton.jit
def is_last(counter, count):
    """Whether the layer's other programs have all been here; what they wrote is then seen.

    The last one puts the count back.
    """
    # The count is one thread's, who must not be ahead of the others.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last
