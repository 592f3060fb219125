"""Compiles the Triton kernels for GPUs that need not be present.

`python -m tests.triton_compile [target ...]` prints docs/results/kernels-triton.md.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import triton
from ckd._triton import tuning
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ckd.backends import triton as backend
from ckd.backends.device import Simulated
from ckd.backends.interface import (
    Inputs,
    Keep,
    Needs,
    Plan,
    Problem,
    Reduction,
    Saved,
    Targets,
    Upstream,
)
from ckd.backends.triton import call

T = TypeVar("T")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES = {"sm_80": "ampere", "sm_86": "small", "sm_90": "hopper", "gfx942": "small"}
PROCESSORS = {"ampere": 108, "small": 84, "hopper": 132}
# Shared memory of a thread block (LDS of a workgroup), in bytes.
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
OPTIONS = ("num_warps", "num_stages")
PRODUCTS = ("bank_gradient", "forward", "product", "project", "similarity", "weight_gradient")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A specialisation of a kernel, as a launch compiles it."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # parameters that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def label(self) -> str:
        """Distinguishes it from other launches of the kernel."""
        flags = [k.lower() for k, v in self.constants if v is True and k != "HALF"]
        return " ".join([self.tiles, self.arithmetic, *flags])

    @property
    def tiles(self) -> str:
        constants = dict(self.constants)
        blocks = {k.removeprefix("BLOCK_").lower(): v for k, v in self.constants if "BLOCK_" in k}
        if constants.get("WHOLE"):
            del blocks["inner"]
        return ", ".join(f"{name} {size}" for name, size in blocks.items())

    @property
    def warps(self) -> int:
        return dict(self.options).get("num_warps", 4)

    @property
    def useful_products(self) -> int | None:
        """Multiply-adds that one iteration of the kernel's smallest loop needs; None for kernels
        whose loop is not known here. With a shift bank_gradient has a second, smaller one."""
        c = dict(self.constants)
        if self.name == "project" or self.name == "product":
            columns = c.get("BLOCK_COLUMNS", c.get("BLOCK_WIDTH"))
            return c["BLOCK_ROWS"] * columns * c.get("BLOCK_DIM", c.get("BLOCK_SUMS"))
        if self.name == "weight_gradient":
            return c["BLOCK_ROWS"] * c["BLOCK_COLUMNS"] * c["BLOCK_SUMS"]
        if self.name in ("forward", "bank_gradient") and c["WHOLE"]:
            shifted = c.get("MATRIX", False) or c.get("ENTRIES", False)
            products = 2 if c.get("KEEP_VALUES", True) and not shifted else 1
            return products * c["BLOCK_BATCH"] * c["BLOCK_BANK"] * c["BLOCK_WIDTH"]
        return None

    @property
    def arithmetic(self) -> str:
        if any(t in ("*fp16", "*bf16") for _, t in self.signature):
            return "half"
        return dict(self.constants).get("PRECISION", "float32")

    @property
    def uses_matrix_units(self) -> bool:
        half_weight = dict(self.signature).get("weight") in ("*fp16", "*bf16")
        half = ("HALF", True) in self.constants or half_weight or self.name == "weight_gradient"
        return self.name in PRODUCTS and half

    @property
    def rows(self) -> int:
        """Rows of the left operand of the kernel's matrix products."""
        c = dict(self.constants)
        blocks = {
            "forward": "BLOCK_BATCH",
            "bank_gradient": "BLOCK_BANK",
            "similarity": "BLOCK_BATCH",
        }
        return c[blocks.get(self.name, "BLOCK_ROWS")]

    def compile(self, target: GPUTarget) -> Any:
        attributes = {(i,): [["tt.divisibility", 16]] for i in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        return triton.compile(source, target=target, options=dict(self.options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records the launches made inside, in order, instead of running them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_launch(self, arguments, options))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = before


class TorchKernels(TorchDispatchMode):
    """Records the names of torch's operators called inside, except those that launch no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _launch(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    chosen = tuple((name, options.pop(name)) for name in OPTIONS if name in options)
    values = dict(zip(kernel.arg_names, arguments)) | options
    signature, constants, divisible = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        number = isinstance(value, int) and not isinstance(value, bool)
        special = number and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, "*" + TYPES[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(i)
        elif number:
            signature.append((parameter.name, "i32" if abs(value) < 2**31 else "i64"))
            if special and value % 16 == 0:
                divisible.append(i)
        else:
            signature.append((parameter.name, "fp32"))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), chosen)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inputs_of(
    batch: int, bank_rows: int, teacher_dim: int, student_dim: int, half: bool, learned: bool
) -> tuple[Inputs, int]:
    """Meta tensors, and the size of the cache between forward and backward."""
    student = empty(batch, student_dim, dtype=torch.float16 if half else torch.float32)
    bank = empty(bank_rows, teacher_dim, dtype=torch.float16)
    weight = empty(student_dim, teacher_dim) if learned else None
    bias = empty(student_dim) if learned else None
    problem = Problem(
        "contrastive_ce", batch, bank_rows, teacher_dim, student_dim, "cuda",
        student.dtype, bank.dtype, weight.dtype if weight is not None else None, half, 1 << 26,
        None,
    )  # fmt: skip
    cache_bytes = backend.contrastive_ce_cache_bytes(problem) if learned else 0
    return Inputs(student, bank, weight, bias, empty()), cache_bytes


def targets_of(batch: int, each: int, smoothing: float, reduction: Reduction) -> Targets:
    """`each`: weighted targets of a student; 0: one target."""
    shift_rows = empty(batch, each, dtype=torch.int64) if each else None
    shift = empty(batch, each) if each else None
    target = empty(batch, dtype=torch.int64)
    return Targets(target, shift_rows, shift, smoothing, -100, reduction)


def on_a_gpu(
    patch: pytest.MonkeyPatch, family: str, choose: Callable[..., Any], precision: str
) -> None:
    """Make the launch code treat meta tensors as tensors on a GPU of this family."""
    patch.setattr(backend, "gpu", Simulated(family, PROCESSORS[family]))
    patch.setattr(tuning, "choose", choose)
    patch.setattr(call, "float32_products", lambda device: precision)


def step(
    batch: int, bank_rows: int, teacher_dim: int, student_dim: int, targets_each: int = 0
) -> tuple[list[Launch], list[str]]:
    """The launches of a mean loss and all its gradients in half precision on Hopper, and the names
    of the torch operators that it calls."""
    inputs, cache_bytes = inputs_of(batch, bank_rows, teacher_dim, student_dim, True, True)
    targets = targets_of(batch, targets_each, 0.0, "mean")
    plan, needs, d_loss = Plan("triton", True), Needs(True, True, True, True), empty()
    with pytest.MonkeyPatch.context() as patch, recorded() as launches, TorchKernels() as others:
        on_a_gpu(patch, "hopper", lambda key, candidates, launch: candidates[0], "ieee")
        saved = backend.contrastive_ce_forward(
            inputs, targets, plan, Keep(True, False, cache_bytes)
        )
        backend.contrastive_ce_backward(
            Upstream(d_loss, None), inputs, targets, plan, Saved(*saved[1:]), needs
        )
    return launches, others.names


def launches_of(
    batch: int,
    bank_rows: int,
    teacher_dim: int,
    student_dim: int,
    *,
    half: bool,
    learned: bool = True,
    precision: str = "ieee",
    smoothing: float = 0.0,
    targets_each: int = 0,
    family: str,
) -> dict[Launch, None]:
    """Every launch of both ops, forward and backward, recorded with meta tensors."""
    inputs, cache_bytes = inputs_of(batch, bank_rows, teacher_dim, student_dim, half, learned)
    row = empty(batch)
    targets, plan = targets_of(batch, targets_each, smoothing, "none"), Plan("triton", half)
    needs, weight_alone = Needs(True, learned, learned, True), Needs(False, learned, learned, False)
    attention = smoothing > 0  # the problem with smoothing also has a gradient of lse
    rows = Upstream(row, row if attention else None)
    mean = targets._replace(reduction="mean")
    with recorded() as launches, pytest.MonkeyPatch.context() as patch:
        on_a_gpu(patch, family, every, precision)
        for upstream, wanted, reduced, keep in (
            (rows, needs, targets, Keep(True, attention, cache_bytes)),
            (Upstream(empty(), None), weight_alone, mean, Keep(False, False, 0)),
        ):
            saved = Saved(*backend.contrastive_ce_forward(inputs, reduced, plan, keep)[1:])
            backend.contrastive_ce_backward(upstream, inputs, reduced, plan, saved, wanted)
        if targets_each:
            for each, weighted in ((targets_each, True), (targets_each, False), (1, True)):
                target = empty(batch, each, dtype=torch.int64)
                weight = empty(batch, each) if weighted else None
                backend.split_targets(target, weight, bank_rows, -100, smoothing, torch.float32)
        table = backend.similarity_forward(inputs, plan)
        backend.similarity_backward(table, inputs, plan, needs)
    return dict.fromkeys(launches)


def every(key: object, candidates: Sequence[T], run: Callable[[T], None]) -> T:
    """In place of tuning.choose: launches every candidate."""
    for candidate in candidates:
        run(candidate)
    return candidates[0]


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop of the machine code that multiplies matrices."""

    instructions: int  # of a warp
    spills: int  # loads and stores of spilled registers
    products: int  # multiply-adds in matrix units, of all warps


@dataclass
class Resources:
    """The resources of one compiled launch on one target."""

    registers: int  # of a thread
    spilled: int  # bytes (NVIDIA) or registers (AMD)
    shared: int  # bytes
    matrix: set[str] = field(default_factory=set)  # the matrix instructions in the code
    loops: list[Loop] = field(default_factory=list)  # empty unless sm_90, or code that spills
    serialised: bool = False  # ptxas waits after every wgmma (C7510 to C7519)
    approximate_roots: bool = False  # then a row of one element is not exactly +-1 over its norm


def resources(launch: Launch, target: str) -> Resources:
    compiled = launch.compile(TARGETS[target])
    shared = compiled.metadata.shared
    if TARGETS[target].backend == "hip":
        code = compiled.asm["amdgcn"]
        return Resources(
            registers=_number(r"\.vgpr_count:\s+(\d+)", code),
            spilled=_number(r"\.vgpr_spill_count:\s+(\d+)", code),
            shared=shared,
            matrix=set(re.findall(r"\bv_(mfma)_f32", code)),
        )
    usage, ptx = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage"), compiled.asm["ptx"]
    found = Resources(
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        shared=shared,
        matrix=set(re.findall(r"\b(wgmma\.mma_async|mma\.sync)", ptx)),
        approximate_roots="sqrt.approx" in ptx,
    )
    # Disassembling takes as long as compiling, so only code whose loops are checked.
    if found.matrix and (target == "sm_90" or found.spilled > 0):
        code = _cuobjdump(compiled.asm["cubin"], "--dump-sass")
        found.loops = list(_loops(code, launch.warps))
    found.serialised = "wgmma" in ptx and _serialised(ptx)
    return found


def _loops(code: str, warps: int) -> Iterator[Loop]:
    """Loops of the machine code: the instructions between a backward jump and its target."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in lines]
    for address, text in instructions:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) >= address:
            continue
        body = [t for a, t in instructions if int(jump[1], 16) <= a <= address]
        products = sum(_products(t) * warps for t in body)
        if products:
            yield Loop(len(body), sum("LDL" in t or "STL" in t for t in body), products)


def _products(instruction: str) -> int:
    """Multiply-adds of a matrix instruction, for each warp that executes it."""
    if sizes := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):  # executed by four warps
        return math.prod(map(int, sizes.groups())) // 4
    if k := re.search(r"\bHMMA\.168(4|8|16)\b", instruction):  # m16n8k4 and so on
        return 16 * 8 * int(k[1])
    return 0


def _serialised(ptx: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "--gpu-name=sm_90a", source, "-o", binary]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.search(r"C751\d", log.stdout + log.stderr) is not None


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text[:2000])
    return int(found[1])


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
        ).stdout


# They cover every branch of the launch code: one block of the width or several, projection fused
# with the norm or not, one chunk of the bank or several, sizes divisible by 16 or not.
PROBLEMS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "W 64": ((256, 1000, 1024, 64), {"half": True}),
    "W 64, large bank": ((4096, 100_000, 768, 64), {"half": True}),
    "W 256, small bank": ((256, 1000, 1024, 256), {"half": True}),
    "W 128, smoothing": ((4096, 100_000, 1024, 128), {"half": True, "smoothing": 0.1}),
    "W 250": ((1000, 19997, 771, 250), {"half": True}),
    "W 256": ((4096, 1_280_000, 1024, 256), {"half": True}),
    "W 768": ((4096, 100_000, 768, 768), {"half": True}),
    "W 512, frozen": ((1024, 50_000, 512, 512), {"half": True, "learned": False}),
    "W 256, float32": ((1024, 20_000, 768, 256), {"half": False}),
    "W 48, float32": ((64, 1000, 96, 48), {"half": False}),
    "W 256, tf32": ((1024, 20_000, 768, 256), {"half": False, "precision": "tf32"}),
    "W 512, tf32": ((1024, 20_000, 768, 512), {"half": False, "precision": "tf32"}),
    "W 64, weighted": ((1024, 50_000, 64, 64), {"half": True, "targets_each": 32}),
    "W 128, weighted": ((100, 10_000, 768, 128), {"half": True, "targets_each": 5}),
    "W 256, weighted": ((1024, 50_000, 1024, 256), {"half": True, "targets_each": 32}),
    "W 256, weighted, small": ((1024, 1000, 1024, 256), {"half": True, "targets_each": 32}),
    "W 768, weighted": ((512, 20_000, 768, 768), {"half": True, "targets_each": 32}),
    "W 256, weighted, tf32": (
        (1024, 20_000, 768, 256),
        {"half": False, "precision": "tf32", "targets_each": 32},
    ),
    "W 48, weighted, float32": ((64, 1000, 96, 48), {"half": False, "targets_each": 32}),
}


def every_launch(target: str) -> dict[Launch, str]:
    found: dict[Launch, str] = {}
    for problem, (sizes, options) in PROBLEMS.items():
        for launch in launches_of(*sizes, family=FAMILIES[target], **options):
            found.setdefault(launch, problem)
    return found


def _longest(loops: list[Loop]) -> int:
    return max((loop.instructions for loop in loops), default=0)


TITLE = """\
# Triton kernels as compiled

Triton {version}, by `python -m tests.triton_compile`; [kernels](../kernels.md) says what is asked
of them. Registers, spilled bytes (AMD: registers) and shared memory are the most that any launch
with these tiles takes; `loop` counts the instructions of a warp in the longest loop that
multiplies. `width` is what a program keeps of its sums over rows; where `inner` is named, that is a
part of the student's width, and the logits are computed anew for each part. Kernels without matrix
products (norms, targets, joining of parts) are left out."""


def main(targets: Sequence[str]) -> None:
    """Print the largest resources over all launches of a kernel with the same tiles."""
    print(TITLE.format(version=triton.__version__))
    for target in targets:
        rows: dict[tuple[str, str, str], Resources] = {}
        for launch in every_launch(target):
            r = resources(launch, target)
            if not r.matrix:
                continue  # row-wise kernels take few registers and little shared memory
            most = rows.setdefault((launch.name, launch.tiles, launch.arithmetic), r)
            most.registers = max(most.registers, r.registers)
            most.spilled = max(most.spilled, r.spilled)
            most.shared = max(most.shared, r.shared)
            most.matrix |= r.matrix
            most.loops = max(most.loops, r.loops, key=_longest)
        print(f"\n## {target}\n")
        print(
            "| kernel | tiles | operands | registers | spilled | shared KiB | instruction | loop |"
        )
        print("| --- | --- | --- | ---: | ---: | ---: | --- | ---: |")
        for (name, blocks, arithmetic), r in sorted(rows.items()):
            loop = _longest(r.loops) or ""
            print(
                f"| `{name}` | {blocks} | {arithmetic} | {r.registers} | {r.spilled} | "
                f"{r.shared / 1024:.0f} | {' '.join(sorted(r.matrix))} | {loop} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
