"""The compiled kernels, as functions of addresses (0: null) and sizes.

Tensors are keyword arguments: by position, or under a wrong name, they fail the type check. The
structs of csrc/cpu/arguments.h and csrc/cuda/arguments.h describe each of them.
"""

from typing import TypeAlias

# (address, rows, width); (address, element, rows, width, stride).
_Single: TypeAlias = tuple[int, int, int]
_Rows: TypeAlias = tuple[int, int, int, int, int]
# (address, bytes); (address, stride).
_Memory: TypeAlias = tuple[int, int]
_Strided: TypeAlias = tuple[int, int]

# (tier, student, bank, weight, bias, logit_scale, half, threads).
_CpuInputs: TypeAlias = tuple[str, _Single, _Rows, int, int, float, bool, int]
# (target, (shift_rows, shift, M), ignore_index, label_smoothing, reduction).
_CpuTargets: TypeAlias = tuple[int, tuple[int, int, int], int, float, int]

# (student, bank, weight, bias, logit_scale, exact).
_CudaInputs: TypeAlias = tuple[_Rows, _Rows, _Strided, int, int, bool]
# (target, ignore_index, label_smoothing, shift_rows, shift, shift_count); (rows, entries).
_CudaTargets: TypeAlias = tuple[int, int, float, int, int, int]
_ShiftOrder: TypeAlias = tuple[int, int]
# (processors, most bank rows of a chunk, workspace, stream).
_Launch: TypeAlias = tuple[int, int, int, int]

def build_info() -> dict[str, str]: ...
def cpu_tiers() -> list[tuple[str, bool]]:
    """The instruction sets that run here, best first: (name, has bfloat16 arithmetic)."""

def cpu_gemm_peak(tier: str, half: bool, threads: int, seconds: float, /) -> float:
    """GFLOP/s of the tier's matrix product on operands that fit the cache."""

class CpuWorkspace:
    """A buffer of uninitialised bytes. Its memory returns to a pool, not to the system."""

    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def cpu_contrastive_ce_forward(
    *,
    inputs: _CpuInputs,
    targets: _CpuTargets,
    cache: _Memory,
    loss: int,
    kept: int,
    lse: int,
    p_other: int,
    residual: int,
    attention: int,
) -> int:
    """Returns -1, or the index of the first target out of range; then nothing is computed."""

def cpu_contrastive_ce_backward(
    *,
    inputs: _CpuInputs,
    targets: _CpuTargets,
    cache: _Memory,
    d_loss: int,
    kept: int,
    d_lse: int,
    lse: int,
    p_other: int,
    residual: int,
    attention: int,
    d_student: int,
    d_weight: int,
    d_bias: int,
    d_logit_scale: int,
) -> None: ...
def cpu_similarity_forward(*, inputs: _CpuInputs, logits: int) -> None: ...
def cpu_similarity_backward(
    *,
    inputs: _CpuInputs,
    d_logits: int,
    d_student: int,
    d_weight: int,
    d_bias: int,
    d_logit_scale: int,
) -> None: ...

# Functions of csrc/cuda launch kernels and return a cudaError, 0 for success. With a workspace of 0
# they launch nothing and return the size of the workspace that they need, in bytes.
def cuda_contrastive_ce_forward(
    *,
    inputs: _CudaInputs,
    targets: _CudaTargets,
    cache: int,
    reference: int,
    nll: int,
    loss: int,
    kept: int,
    lse: int,
    p_other: int,
    residual: int,
    attention: int,
    launch: _Launch,
) -> int: ...
def cuda_contrastive_ce_backward(
    *,
    inputs: _CudaInputs,
    targets: _CudaTargets = ...,
    shift_order: _ShiftOrder = ...,
    cache: int = ...,
    reference: int = ...,
    d_nll: _Strided = ...,
    kept: int = ...,
    d_lse: _Strided = ...,
    lse: int = ...,
    p_other: int = ...,
    residual: int = ...,
    attention: int = ...,
    d_student: int = ...,
    along: int = ...,
    d_weight: int = ...,
    d_bias: int = ...,
    weight_parts: int = ...,
    launch: _Launch,
) -> int: ...
def cuda_similarity_forward(*, inputs: _CudaInputs, logits: int, launch: _Launch) -> int: ...
def cuda_similarity_backward(
    *,
    inputs: _CudaInputs,
    d_logits: int,
    largest_of_student: int,
    largest_of_row: int,
    slope: int,
    slope_parts: int,
    d_weight: int,
    d_bias: int,
    weight_parts: int,
    launch: _Launch,
) -> int: ...
def cuda_error(error: int, /) -> str: ...
def cuda_error_is_of_earlier_work(error: int, /) -> bool:
    """Whether a cudaError comes from work that was launched before the call that returned it."""
