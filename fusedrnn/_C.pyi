# The extension module fusedrnn_C: its functions take no tensors, the ops are in the library.

from fusedrnn.cuda import Spec

LIBRARY: str  # its path

def reserve_rows(
    *,
    mode: str,
    dtype: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    zoneout: bool,
    all_states: bool,
    layer_norm: bool,
) -> list[int]: ...
def cpu_variants() -> list[tuple[str, bool]]: ...
def cpu_variant() -> str: ...
def release_scratch() -> None: ...
def cpu_plan(
    *,
    mode: str,
    dtype: str,
    input_size: int,
    one_hot: bool,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    layer_norm: bool,
    zoneout: bool,
    recurrent_dropout: bool,
    resets: bool,
    return_all: bool,
    stored: str,
    steps: int,
    batch: int,
    tokens: int,
    members: int,
    threads: int,
    backward: bool,
) -> str: ...
def cuda_device() -> Spec: ...
def cuda_plan(
    *,
    mode: str,
    dtype: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    layer_norm: bool,
    steps: int,
    batch: int,
    members: int,
    backward: bool,
    tf32: bool,
    tangent: bool,
    device: Spec,
    forced: str,
    struck: tuple[int, ...],
) -> tuple[str, int]: ...
def cuda_products(*, recurrent: bool, products: bool, capability: int) -> str: ...
def cuda_families() -> list[tuple[int, str, str, str, bool, bool, bool, str]]: ...
def cuda_versions() -> tuple[int, int]: ...
def cuda_plans(
    *,
    mode: str,
    dtype: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    steps: int,
    batch: int,
    backward: bool,
    tf32: bool,
    device: Spec,
    forced: str,
    model: dict[str, float],
) -> list[tuple[str, float]]: ...
def cuda_model() -> dict[str, float]: ...
def cuda_archs() -> str: ...
