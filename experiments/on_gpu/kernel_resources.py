"""What do our Triton kernels cost on an H100: registers, spills, shared memory? Compiled for sm_90, no GPU is needed.

``python -m experiments.on_gpu.kernel_resources [--record]`` prints one row a kernel, as ``cuobjdump`` reads it from the
binary; Triton alone has to be installed (``pip install --no-deps triton``). ``--record`` keeps the rows for the page.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from espalier.nn.kernels import triton_scans
from espalier.tables import plain_table
from experiments.gpu_page import TABLES

# Alignment by 16, which a launch finds out of the tensors and sizes it is called with.
ALIGNED = [["tt.divisibility", 16]]
TABLE = "kernels"
RUNTIME = {"length", "steps", "pieces", "chunks"}


def compile_for_hopper(kernel: Any, constants: dict[str, Any], num_warps: int, absent: tuple[str, ...] = ()) -> Any:
    """Return the kernel as it is compiled for aligned float32 tensors; those ``absent`` are None."""
    fixed = {**constants, **dict.fromkeys(absent)}
    kinds = {
        name: "constexpr" if name in fixed else "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names
    }
    attributes = {
        (place,): ALIGNED
        for place, (name, kind) in enumerate(kinds.items())
        if kind != "constexpr" and name not in RUNTIME
    }
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, kinds, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def resources(compiled: Any) -> dict[str, int]:
    """Return registers and local memory (spills) a thread, shared memory a program, and barriers in the code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run.stdout)}
    barriers = len(re.findall(r"bar\.sync|barrier\.sync", compiled.asm["ptx"]))
    return {**found, "triton_shared": compiled.metadata.shared, "barriers": barriers}


def main() -> None:
    """Compile every kernel at the sizes of Mamba blocks, print the table, and keep it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"keep the rows in {TABLES.name}")
    arguments = parser.parse_args()
    cases: list[tuple[str, Any, dict[str, Any], int, tuple[str, ...]]] = []
    for size in (16, 64, 128):
        for batch in (8, 128):
            shape = triton_scans.tile(batch, 512, size)
            warps, block = shape.pop("num_warps"), f"N {shape['BLOCK_N']}, {shape['BLOCK_E']} channels"
            cases += [
                (f"Mamba-1 forward, {block}", triton_scans._scan_forward, {"HAS_INITIAL": False, **shape}, warps,
                 ("initial_ptr",)),
                (f"Mamba-1 backward, {block}", triton_scans._scan_backward, shape, warps, ()),
            ]  # fmt: skip
    walk = {"HAS_FIRST": True, "REVERSE": False, "BLOCK": 256}
    cases.append(("Mamba-2 between chunks", triton_scans._walk_chunks, walk, 4, ()))
    rows = []
    for name, kernel, constants, warps, absent in cases:
        found = resources(compile_for_hopper(kernel, constants, warps, absent))
        words = {"REG": "registers", "STACK": "stack", "LOCAL": "spilled", "SHARED": "shared"}
        rows.append({"kernel": name, "warps": warps, **{words.get(key, key): value for key, value in found.items()}})
    print(f"triton {triton.__version__}, sm_90")
    print(plain_table([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    if arguments.record:
        kept = [line for line in TABLES.read_text(encoding="utf-8").splitlines() if json.loads(line)["table"] != TABLE]
        kept += [json.dumps({"table": TABLE, "triton": triton.__version__, **row}) for row in rows]
        TABLES.write_text("\n".join(kept) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
