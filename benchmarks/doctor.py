"""How long do the static checks take? Models from meta configurations, filled with noise; a checkpoint on disk.

    python benchmarks/doctor.py                       100 M parameters, 0.5 GiB of memory, half a minute on one core
    python benchmarks/doctor.py --parameters 1e9      1 B parameters, 4.5 GiB of memory

The bar: at most 1 s per 100 M parameters on one core, with one tensor more than the model in memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import espalier
from timings import add_option, record, summary


class Block(nn.Module):
    """The weights of one decoder layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        for name, rows in (
            ("q_proj", 1),
            ("k_proj", 1),
            ("v_proj", 1),
            ("o_proj", 1),
            ("gate_proj", 4),
            ("up_proj", 4),
        ):
            self.add_module(name, nn.Linear(width, rows * width, bias=False))
        self.down_proj = nn.Linear(4 * width, width, bias=False)


def build(parameters: float, dtype: torch.dtype) -> nn.Module:
    """Return a language model's weights, about as many as asked for, drawn with a deviation of 0.02."""
    width = 768 if parameters < 5e8 else 2048
    depth = max(1, round((parameters - 2 * 32_000 * width) / (16 * width**2)))
    with torch.device("meta"):
        model = nn.Module()
        model.embed_tokens, model.lm_head = nn.Embedding(32_000, width), nn.Linear(width, 32_000, bias=False)
        model.layers = nn.ModuleList(Block(width) for _ in range(depth))
    model.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def timed(subject: nn.Module | Path, runs: int) -> tuple[list[float], espalier.Diagnosis]:
    """Return the seconds of several diagnoses, and the last diagnosis."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        diagnosis = espalier.diagnose(subject)
        taken.append(time.perf_counter() - start)
    return taken, diagnosis


def main() -> None:
    """Print one row for each dtype and place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--runs", type=int, default=3)
    add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| weights | parameters | seconds | per 100 M | found |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = build(arguments.parameters, dtype)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, file)
            for place, subject in (("in memory", model), ("on disk", file)):
                taken, diagnosis = timed(subject, arguments.runs)
                count, seconds, weights = diagnosis.parameters, min(taken), f"{str(dtype)[6:]}, {place}"
                case = f"{weights}, {count:,} parameters"
                record(arguments.record, "doctor", case, {"diagnose": summary(taken)}, threads=1)
                print(
                    f"| {weights} | {count:,} | {seconds:.2f} | {1e8 * seconds / count:.2f} | "
                    f"{len(diagnosis.findings)} |",
                    flush=True,
                )
        del model, subject
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
