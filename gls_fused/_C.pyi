from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    torch: str  # the release compiled against, without its local part: "2.14.1"
    compiler: str
    flags: str
    cpu_capabilities: list[str]  # of torch's, those that csrc/cpu was compiled for: "AVX512"

def build_info() -> BuildInfo: ...

class LinearCapture:
    def __init__(
        self,
        name: str,
        ones: bool,
        promised: bool,
        places: list[int],
        leave: Callable[[], None],
    ) -> None: ...
    def expect(
        self, basis: Tensor | None, core_inverse: Tensor | None, shift: Tensor | None
    ) -> None: ...
    @property
    def has_marks(self) -> bool: ...
    def clear_marks(self) -> None: ...
    def add_marks(self, part: Tensor) -> None: ...
    def match(self, gradient: Tensor) -> bool: ...
    def are_gone_from(self, gradient: Tensor) -> bool: ...

def captured_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, capture: LinearCapture
) -> Tensor: ...
