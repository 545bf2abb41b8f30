"""How much faster and leaner are our Mamba blocks than other implementations on a CPU?

    python benchmarks/scans.py [--quick] [--family mamba1|mamba2] [--threads 2] [--rounds 7]

One block, width 256, expand 2, forward and backward with gradients of the input and of every weight, all candidates
with the same weights. Before anything is timed, every candidate's output and gradients are compared with ours. The
candidates then take turns, two steps each a round, of which the second is timed: as in training, where the step before
was one's own and the allocator has the memory at hand. Printed: the medians over the rounds, and their ratio to ours.

Peak memory is the growth of the resident set during one step in a process of its own: after a warm-up at a short length
the kernel's high-water mark (VmHWM) is reset, one full step runs, and the mark less the resident set before is printed
(Linux only). That counts the allocator's waste and every library's buffers, and the weights' gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.nn import Mamba1, Mamba2, backend, use_backend
from peers import plain_blocks, pscan
from peers.minimal_ssd import ssd_minimal
from timings import add_option, record, summary

DIM = 256
SHAPES = {
    "mamba1": [(32, 64), (8, 256), (8, 1024)],
    "mamba2": [(32, 64), (16, 256), (8, 1024), (8, 4096)],
}
SLOW = 4096  # from this length on, and for the plain loop, three rounds are enough
TOLERANCE = 1e-3

Step = Callable[[Tensor], Tensor]


def mixer(family: str) -> Mamba1 | Mamba2:
    """Return our block with its default weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return Mamba1(DIM, 16, generator=generator) if family == "mamba1" else Mamba2(DIM, 64, generator=generator)


def transformers_block(family: str, chunk: int = 256, parallel: bool = False) -> nn.Module:
    """Return transformers' mixer with our weights; its parallel scan needs mamba.py, or our copy of its formula."""
    if family == "mamba1":
        from transformers import MambaConfig
        from transformers.models.mamba import modeling_mamba

        if parallel and not modeling_mamba.is_mambapy_available():
            modeling_mamba.is_mambapy_available = lambda: True
            sys.modules["mambapy"] = types.ModuleType("mambapy")
            sys.modules["mambapy.pscan"] = pscan
        config = MambaConfig(hidden_size=DIM, state_size=16, num_hidden_layers=1, use_mambapy=parallel)
        block: nn.Module = modeling_mamba.MambaMixer(config, 0)
    else:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        sizes = {"hidden_size": DIM, "state_size": 64, "num_heads": 8, "head_dim": 64, "n_groups": 1}
        block = Mamba2Mixer(Mamba2Config(num_hidden_layers=1, chunk_size=chunk, **sizes), 0)
    block.load_state_dict(mixer(family).state_dict())
    return block


def candidates(family: str, length: int) -> dict[str, Callable[[], Step]]:
    """Return the name and the maker of everything that is compared; ours come first."""
    if family == "mamba2":
        return {
            "espalier": lambda: mixer("mamba2"),
            "transformers, chunk 256 (default)": lambda: transformers_block("mamba2"),
            "transformers, chunk 64": lambda: transformers_block("mamba2", chunk=64),
            "minimal listing, chunk 64": lambda: plain_blocks.PlainMamba2(mixer("mamba2"), ssd_minimal),
        }
    names = dict.fromkeys((backend().name, "torch"))  # the torch one alone where nothing could be compiled
    ours = {f"espalier, {name}": partial(forced, name) for name in names}
    theirs: dict[str, Callable[[], Step]] = {
        "transformers, parallel scan": lambda: transformers_block("mamba1", parallel=True),
        "mamba.py's parallel scan": lambda: plain_blocks.PlainMamba1(mixer("mamba1"), pscan.selective_scan_parallel),
    }
    if length <= 64:
        theirs["transformers, plain loop"] = lambda: transformers_block("mamba1")
    return {**ours, **theirs}


def forced(name: str) -> Step:
    """Return our Mamba-1 block, run by the implementation of that name."""
    block = mixer("mamba1")

    def run(x: Tensor) -> Tensor:
        with use_backend(name):
            return block(x)

    run.parameters = block.parameters  # type: ignore[attr-defined]
    return run


def step(block: Step, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run forward and backward and return (output, gradients of the input and of all weights)."""
    x = x.detach().requires_grad_()
    parameters = list(block.parameters())  # type: ignore[attr-defined]
    y = block(x)
    return y.detach(), list(torch.autograd.grad(y.square().mean(), [x, *parameters], allow_unused=True))


def tokens(batch: int, length: int) -> Tensor:
    """Return one input, the same in every process."""
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


def check(names: list[str], blocks: list[Step], x: Tensor) -> None:
    """Stop unless all candidates agree on the output and on the input's gradient."""
    y, (dx, *_) = step(blocks[0], x)
    for name, block in zip(names[1:], blocks[1:], strict=True):
        other, (other_dx, *_) = step(block, x)
        for what, one, two in (("output", y, other), ("gradient", dx, other_dx)):
            error = ((one - two).abs().max() / one.abs().max()).item()
            if not error <= TOLERANCE:
                raise SystemExit(f"{name} differs from {names[0]} in its {what} by {error:.1e}: nothing was timed")


def measure_times(family: str, shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Return seconds per step of every candidate, taking turns of one step to warm up and one that counts."""
    makers = candidates(family, shape[1])
    names, blocks = list(makers), [make() for make in makers.values()]
    x = tokens(*shape)
    check(names, blocks, x[:2])
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name, block in zip(names, blocks, strict=True):
            few = shape[1] >= SLOW or "loop" in name
            if few and turn >= min(rounds, 3):
                continue
            step(block, x)
            start = time.perf_counter()
            step(block, x)
            samples[name].append(time.perf_counter() - start)
    return samples


def status_mib(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def peak_here(family: str, name: str, shape: tuple[int, int]) -> float:
    """Return the peak growth of this process's resident set in one step, MiB."""
    block = candidates(family, shape[1])[name]()
    step(block, tokens(1, 64))
    x = tokens(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = status_mib("VmRSS")
    step(block, x)
    return status_mib("VmHWM") - before


def measure_memory(family: str, shape: tuple[int, int], threads: int) -> dict[str, float]:
    """Return every candidate's peak, each from a process of its own."""
    peaks = {}
    for name in candidates(family, shape[1]):
        request = json.dumps([family, name, shape])
        command = [sys.executable, __file__, "--threads", str(threads), "--peak", request]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return peaks


def report(family: str, shape: tuple[int, int], times: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Print one table: milliseconds with their range, and MiB, each with the ratio to our first."""
    print(f"\n{family}, batch {shape[0]} × length {shape[1]}", flush=True)
    first, *_ = times
    base = statistics.median(times[first])
    for name, samples in times.items():
        middle = statistics.median(samples)
        spread = f"{min(samples) * 1e3:.0f}…{max(samples) * 1e3:.0f}, n = {len(samples)}"
        line = f"  {name:<36}{middle * 1e3:9.1f} ms ({spread}) {middle / base:6.2f}×"
        if name in peaks:
            line += f"{peaks[name]:10.0f} MiB {peaks[name] / peaks[first]:6.2f}×"
        print(line, flush=True)


def main() -> None:
    """Print one table a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, lengths up to 256")
    parser.add_argument("--family", choices=list(SHAPES), help="one family only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        family, name, shape = json.loads(options.peak)
        print(peak_here(family, name, tuple(shape)))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, {backend()}, block of width {DIM}, expand 2")
    for family in [options.family] if options.family else list(SHAPES):
        for shape in SHAPES[family]:
            if options.quick and shape[1] > 256:
                continue
            times = measure_times(family, shape, 3 if options.quick else options.rounds)
            peaks = {} if options.no_memory else measure_memory(family, shape, options.threads)
            report(family, shape, times, peaks)
            rows = {name: summary(samples, peaks.get(name)) for name, samples in times.items()}
            record(options.record, "scans", f"{family}, {shape[0]} × {shape[1]}", rows, threads=options.threads)


if __name__ == "__main__":
    main()
