"""GLS, a fused first-order optimizer for PyTorch, made of damped least-squares steps.

`GLS` is the optimizer, `attach` lets other optimizers step on its directions, `register` tells them
of other classes to cover, `observe` shows them the rows of a weight that such a class uses by
itself, and `gls_fused.reference` is the definition of every op.
"""

from gls_fused import reference
from gls_fused._version import __version__
from gls_fused.attachment import Attachment, attach
from gls_fused.backends.dispatch import available_backends, build_info
from gls_fused.capture.custom import observe
from gls_fused.capture.find import register
from gls_fused.optimizer import GLS

__all__ = [
    "GLS",
    "Attachment",
    "__version__",
    "attach",
    "available_backends",
    "build_info",
    "observe",
    "reference",
    "register",
]
