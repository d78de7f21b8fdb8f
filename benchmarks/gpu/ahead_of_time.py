"""Compile the Triton kernels for GPUs that this machine does not have, and read what they need.

    python -m benchmarks.gpu.ahead_of_time                # sm_80 and sm_90

Each kernel is compiled for every way in which the package's models launch it: the launches of small
calls are recorded, so that block sizes and warps are those of the package. (Heads of 64 and 128
channels, which no model here has, spill in float32.) A spilled register would cost
traffic to memory; the command ends with code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.markdown import markdown
from linearsr.config import MODELS
from linearsr.kernels import fused_ops, linear_attention

CAPABILITIES = (80, 90)
DTYPES = (torch.bfloat16, torch.float32)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Pointers and sizes that are multiples of this let Triton load whole vectors.
ALIGNED = 16


class Launch(NamedTuple):
    """A kernel with the arguments of one launch. options: num_warps and num_stages."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class Need(NamedTuple):
    """Needs of a compiled kernel: registers of a thread, bytes of shared memory of a block.

    spills: bytes of registers that do not fit, stored and loaded.
    """

    kernel: str
    shape: str
    capability: int
    warps: int
    registers: int
    shared: int
    spills: int


class _Recorder:
    """Stands for a kernel and remembers how it is launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, _: object) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> None:
            options = {k: v for k, v in keywords.items() if k in ("num_warps", "num_stages")}
            constants = {k: v for k, v in keywords.items() if k not in options}
            self.launches.append(Launch(self.kernel, arguments, constants, options))

        return launch


@contextlib.contextmanager
def _recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of the modules' kernels instead of running them."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as patches:
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    recorder = _Recorder(value, launches)
                    patches.enter_context(mock.patch.object(module, name, recorder))
            patches.enter_context(mock.patch.object(module, "check_input"))
        patches.enter_context(mock.patch("torch.cuda.device_of", contextlib.nullcontext))
        yield launches


def launches() -> dict[str, list[Launch]]:
    """Return the launches of all kernels for each kind of input, by a description of it."""
    found: dict[str, list[Launch]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for dim in sorted({c.denoiser.head_dim for c in MODELS.values()} | {16}):
            q, k, v = (torch.randn(1, 300, 2, dim, dtype=dtype, requires_grad=True) for _ in "qkv")
            with _recorded(linear_attention) as recorded:
                out = linear_attention.triton_attention(q, k, v, 1e-15)
                out.backward(torch.ones_like(out))
            found[f"heads of {dim}, {name}"] = recorded
        # Every width takes the same launch, in blocks of channels.
        hidden = torch.randn(1, 8, 8, 640, dtype=dtype)
        weight, bias = torch.randn(640, 1, 3, 3), torch.randn(640)
        with _recorded(fused_ops) as recorded:
            fused_ops.triton_depthwise_gate(hidden, weight.to(dtype), bias.to(dtype))
        found[f"any width, {name}"] = recorded
        for width in sorted({c.denoiser.width for c in MODELS.values()}):
            x = torch.randn(1, 8, 8, width, dtype=dtype)
            with _recorded(fused_ops) as recorded:
                fused_ops.triton_modulate(x, *torch.randn(2, 1, 1, 1, width, dtype=dtype))
            found[f"width {width}, {name}"] = recorded
    return found


def compile_for(launch: Launch, shape: str, capability: int) -> Need:
    """Compile a launch's kernel for GPUs of a compute capability, 90 for 9.0."""
    names = launch.kernel.arg_names
    constants, attributes, signature = dict(launch.constants), {}, {}
    for number, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(number,)] = [["tt.divisibility", ALIGNED]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # Triton makes a constant of it
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % ALIGNED == 0:
                attributes[(number,)] = [["tt.divisibility", ALIGNED]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(
        launch.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    registers, spills = _usage(compiled.asm["cubin"])
    return Need(
        launch.kernel.__name__,
        shape,
        capability,
        compiled.metadata.num_warps,
        registers,
        compiled.metadata.shared,
        spills,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return a kernel's registers and bytes of spills, as NVIDIA's cuobjdump reads them."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def needs(capabilities: tuple[int, ...] = CAPABILITIES) -> Iterator[Need]:
    """Yield what each kernel needs, once for each kind of input and compute capability."""
    for shape, recorded in launches().items():
        for launch in recorded:
            for capability in capabilities:
                yield compile_for(launch, shape, capability)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--capabilities", type=int, nargs="+", default=CAPABILITIES, help="90 means 9.0"
    )
    options = parser.parse_args()
    rows = list(needs(tuple(options.capabilities)))
    print(markdown(Need._fields, [[str(value) for value in row] for row in rows]))
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
