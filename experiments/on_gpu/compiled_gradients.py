"""Which of torch.compile's stages makes a wrong gradient of a Mamba block, and in which parameter or sub-module?

``python -m experiments.on_gpu.compiled_gradients [cuda|cpu]`` prints, for Dynamo alone, with AOTAutograd and with
inductor, every parameter whose gradient is off, then the same with each sub-module left out of the graph.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/gpu"))
from cases_gpu import CASES, run

PARTS = ("", "in_proj", "conv1d", "norm", "out_proj")


def main(device: str) -> None:
    """Print one line for each case, stage and part left out."""
    for case in ("mamba2", "mamba1", "sequence"):
        module, x = CASES[case].seeded()
        module, x = module.to(device), x.to(device)
        plain = run(copy.deepcopy(module), x)
        for stage in ("eager", "aot_eager", "inductor"):
            for part in PARTS if stage == "inductor" and case != "sequence" else ("",):
                copied = copy.deepcopy(module)
                if part and not hasattr(copied, part):
                    continue
                if part:
                    child = getattr(copied, part)
                    child.forward = torch.compiler.disable(child.forward)
                torch.compiler.reset()
                found = run(torch.compile(copied, backend=stage), x)
                off = []
                for name, exact in plain.items():
                    value = found["_orig_mod." + name if name not in ("input", "output") else name]
                    error = float((value - exact).norm() / exact.norm())
                    if not error < 1e-3:
                        off.append(f"{name} {error:.1e} (norm {float(value.norm()):.2g} of {float(exact.norm()):.2g})")
                print(case, stage, f"without {part}" if part else "whole", "|", "; ".join(off) or "right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
