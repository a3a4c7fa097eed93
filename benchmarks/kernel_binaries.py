"""What the machine code of compiled kernels tells: registers, spills, tensor cores. Read by NVIDIA's ``cuobjdump`` and
``nvdisasm``, which ship with Triton.
"""

from __future__ import annotations

import bisect
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Disassemblers(NamedTuple):
    """Where NVIDIA's two programs are."""

    cuobjdump: str
    nvdisasm: str


def find_disassemblers() -> Disassemblers:
    """The ones that ship with Triton, or else those on the path."""
    import triton

    found = []
    for name in Disassemblers._fields:
        try:
            found.append(getattr(triton.knobs.nvidia, name).path)
        except (AttributeError, RuntimeError) as error:
            if not (path := shutil.which(name)):
                raise SystemExit(
                    f"{name} is neither in the triton package nor on PATH; it is part of the CUDA toolkit"
                ) from error
            found.append(path)
    return Disassemblers(*found)


class Usage(NamedTuple):
    """What a kernel's header says, and its instructions."""

    registers: int  # a thread
    spilled_bytes: int  # of a thread: what it keeps in memory for want of registers
    architecture: str  # "sm_90a"
    code: bytes


def read_usage(cubin: bytes, cuobjdump: str) -> Usage:
    """Takes the file of a compiled kernel apart."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        usage, extracted = (  # with both options at once it extracts and prints no usage
            subprocess.run(
                [cuobjdump, *options, "kernel.cubin"], capture_output=True, text=True, check=True, cwd=folder
            )
            for options in (["--dump-resource-usage"], ["--extract-text", "all"])
        )
        figures = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout)
        file = re.fullmatch(r".*: (\S+\.(sm_\w+)\.elf\.bin)\n", extracted.stdout)
        if figures is None or file is None:
            printed = f"{usage.stdout[:500]!r}, {extracted.stdout[:500]!r}"
            raise RuntimeError(f"{cuobjdump} printed something that is not understood: {printed}")
        registers, stack, local = map(int, figures.groups())
        return Usage(registers, stack + local, file[2], (Path(folder) / file[1]).read_bytes())


class Instructions(NamedTuple):
    """What the machine code of a kernel shows."""

    spills_in_loops: int  # instructions that move spilled bytes, between a loop's first and last instruction
    tensor_cores: str  # names of the instructions that use them


def disassemble(codes: list[bytes], architecture: str, nvdisasm: str) -> list[Instructions]:
    """Reads the instructions of many kernels at once: nvdisasm takes 0.7 s to start, and milliseconds a kernel."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvdisasm, "--binary", architecture.replace("sm_", "SM"), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)(.*?);", text, re.MULTILINE)
    lines = [(int(address, 16), name, rest) for address, name, rest in found]
    ends = list(itertools.accumulate(map(len, codes)))
    kernels: list[list[tuple[int, str, str]]] = [[] for _ in codes]
    for line in lines:
        kernels[bisect.bisect_right(ends, line[0])].append(line)
    if [16 * len(kernel) for kernel in kernels] != [len(code) for code in codes]:  # 16 bytes an instruction
        raise RuntimeError(f"{' '.join(command)} printed something that is not understood: {text[:500]!r}")
    return [read_instructions(kernel) for kernel in kernels]


def read_instructions(code: list[tuple[int, str, str]]) -> Instructions:
    """Of one kernel: (address, name, operands)."""
    jumps = [
        (int(to[0], 16), at) for at, name, rest in code if name == "BRA" and (to := re.findall("0x[0-9a-f]+", rest))
    ]
    loops = [(start, end) for start, end in jumps if start < end]
    spills = [at for at, name, _ in code if name in ("LDL", "STL") and any(start <= at <= end for start, end in loops)]
    tensor_cores = sorted({name for _, name, _ in code if name.endswith("MMA")})
    return Instructions(len(spills), " ".join(tensor_cores) or "none")
