# The functions of the extension module fusedrnn_C that take no tensors; the rest of it are ops.

from fusedrnn.cuda import Spec

def reserve_bytes(
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
) -> int: ...
def cpu_variants() -> list[tuple[str, bool]]: ...
def cpu_variant() -> str: ...
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
    steps: int,
    batch: int,
    tokens: int,
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
    backward: bool,
    tf32: bool,
    device: Spec,
    forced: str,
) -> str: ...
def cuda_archs() -> str: ...
