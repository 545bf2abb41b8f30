"""What does a training step gain where the process keeps the memory that it frees, as our programs do?

    python benchmarks/heap.py [--rounds 5] [--threads 1]

Every network trains in two processes, one as torch leaves the allocator and one that has called `keep_freed_memory`;
they take turns. Printed: the medians, their ratio, and the page faults of a step. Other allocators and systems than
glibc's on Linux show no difference.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F

from espalier.heap import keep_freed_memory
from espalier.models import build_model
from timings import add_option, record, summary

WARM, STEPS = 3, 5  # steps before the first turn, and those of a turn, timed together

NETS = {
    "ViT-192/6, patch 4, batch 64": ("vit", {"embed_dim": 192, "depth": 6, "num_heads": 3}, 64),
    "ConvMixer-64/4, kernel 5, patch 2, batch 64": (
        "convmixer",
        {"dim": 64, "depth": 4, "kernel_size": 5, "patch_size": 2},
        64,
    ),
    "ConvMixer-256/8, kernel 5, patch 2, batch 16": (
        "convmixer",
        {"dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2},
        16,
    ),
    "KWLarge, batch 32": ("kwlarge", {}, 32),
    "Mamba-2, 2 blocks of width 64, 256 tokens, batch 32": ("sequence", {"vocab_size": 32}, 32),
}
KEEPS = {"kept": True, "given back": False}


def train(pipe: Connection, net: str, keep: bool, threads: int) -> None:
    """Take turns of training steps as the other end asks for them; send back seconds and page faults of a step."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)  # a process of its own
    name, sizes, batch = NETS[net]
    model = build_model(name, **sizes)
    tokens = name == "sequence"
    inputs = torch.randint(32, (batch, 256)) if tokens else torch.randn(batch, 3, 32, 32)
    labels = torch.randint(32 if tokens else 10, (batch * (256 if tokens else 1),))
    optimizer = torch.optim.AdamW(model.parameters())
    steps = WARM
    while True:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, -2), labels).backward()
            optimizer.step()
        seconds = (time.perf_counter() - start) / steps
        pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / steps))
        steps = STEPS
        if not pipe.recv():
            return


def main() -> None:
    """Print, for each network, what keeping memory changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    add_option(parser)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for net in NETS:
        pipes, processes = {}, []
        for way, keep in KEEPS.items():
            pipes[way], there = spawn.Pipe()
            processes.append(spawn.Process(target=train, args=(there, net, keep, options.threads)))
            processes[-1].start()
            pipes[way].recv()
        turns: dict[str, list[tuple[float, float]]] = {way: [] for way in KEEPS}
        for _ in range(options.rounds):
            for way, pipe in pipes.items():
                pipe.send(True)
                turns[way].append(pipe.recv())
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(False)
            process.join()
        rows = {way: summary([seconds for seconds, _ in taken]) for way, taken in turns.items()}
        faults = {way: sum(count for _, count in taken) / len(taken) for way, taken in turns.items()}
        print(net)
        for way, row in rows.items():
            ratio = rows["given back"]["ms"] / row["ms"]
            print(f"  {way:<12} {row['ms']:8.1f} ms  {ratio:5.2f}×  {faults[way]:8.0f} page faults a step")
        record(options.record, "heap", net, rows, threads=options.threads)


if __name__ == "__main__":
    main()
