from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str  # the release compiled against, without its local part: "2.14.1"
    compiler: str
    flags: str
    cuda: str | None  # the toolkit's version, None where no CUDA kernel was built

def build_info() -> BuildInfo: ...
