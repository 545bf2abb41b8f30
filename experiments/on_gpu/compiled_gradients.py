"""Which of torch.compile's stages makes a wrong gradient of a Mamba block, and in which parameter or sub-module?

``python -m experiments.on_gpu.compiled_gradients [cuda|cpu]`` prints the gradients that are off, the most telling runs
first: Dynamo alone, with AOTAutograd, with inductor; then inductor without one of its steps, or without a sub-module.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/gpu"))
from cases_gpu import CASES, run

WAYS: list[tuple[str, str, dict[str, Any], str]] = [
    *(("mamba2", stage, {}, "") for stage in ("eager", "aot_eager", "inductor")),
    ("mamba1", "inductor", {}, ""),
    ("mamba2", "inductor", {"donated_buffer": False}, ""),
    ("mamba2", "inductor", {"shape_padding": False}, ""),
    ("mamba2", "inductor", {"triton.mix_order_reduction": False}, ""),
    ("mamba2", "inductor", {"pattern_matcher": False}, ""),
    *(("mamba2", "inductor", {}, part) for part in ("in_proj", "norm", "out_proj")),
]


def check(device: str, case: str, stage: str, options: dict[str, Any], part: str) -> str:
    """Return the gradients that are off by more than 1e-3 of their norm, each with its norm and the right one."""
    module, x = CASES[case].seeded()
    module, x = module.to(device), x.to(device)
    plain = run(copy.deepcopy(module), x)
    if part:
        child = getattr(module, part)
        child.forward = torch.compiler.disable(child.forward)
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = options.get("donated_buffer", True)
    known = {name: value for name, value in options.items() if name in torch._inductor.config.to_dict()}
    with torch._inductor.config.patch(known):
        found = run(torch.compile(module, backend=stage), x)
    off = []
    for name, exact in plain.items():
        value = found["_orig_mod." + name if name not in ("input", "output") else name]
        if not float((value - exact).norm()) <= 1e-3 * float(exact.norm()):
            off.append(f"{name}: norm {float(value.norm()):.3g}, rightly {float(exact.norm()):.3g}")
    return "; ".join(off) or "right"


def main(device: str) -> None:
    """Print one line a way."""
    for case, stage, options, part in WAYS:
        found = check(device, case, stage, options, part)
        print(case, stage, options or "", f"without {part}" if part else "", "|", found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
