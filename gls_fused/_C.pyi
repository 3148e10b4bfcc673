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
        places: Tensor,
        leave: Callable[[], None],
    ) -> None: ...
    def expect(
        self, basis: Tensor | None, core_inverse: Tensor | None, shift: Tensor | None
    ) -> None: ...
    def take_marks(self) -> tuple[Tensor | None, int]: ...

def captured_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, capture: LinearCapture
) -> Tensor: ...
