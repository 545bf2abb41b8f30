"""Certify thousands of networks that are drawn to fool a certificate, and attack every certified image.

    python experiments/certificate_attack.py --nets 10000 --out docs/results/records/certificate_attack.json

About 0.3 s a network on one core. Seed n draws network n, its images and its attacks, so a violation can be drawn again
by ``--first n --nets 1``. The record is one JSON object; the exit status is 1 if an image fell within its radius.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import espalier
from espalier.certify import certify
from espalier.errors import EspalierError
from espalier.train.build import environment

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.adversarial_models import Attack, Draw, attack

IMAGES = 3


def drawn(rng: random.Random) -> tuple[nn.Module, Tensor, Tensor, str]:
    """Return a network, images, the classes that it gives them as it runs, and the arithmetic to certify it in."""
    torch.manual_seed(rng.randrange(2**63))  # layers draw their weights from torch's own generator
    draw = Draw(rng)
    net, shape = draw.network()
    arithmetic = rng.choice(["float64", "float64", "float32"])
    images = torch.rand(IMAGES, *shape, generator=draw.torch, dtype=rng.choice([torch.float32, torch.float64]))
    dtype = getattr(torch, arithmetic)
    with torch.no_grad():
        scores = copy.deepcopy(net).to(dtype)(images.to(dtype, copy=True))
    return net, images, scores.nan_to_num().argmax(1), arithmetic


def trial(seed: int) -> tuple[Attack | None, str]:
    """Certify and attack one network; return what was found, or why it was refused."""
    net, images, labels, arithmetic = drawn(random.Random(seed))
    try:
        certificate = certify(net, images, labels, arithmetic=arithmetic)
    except EspalierError as error:
        return None, str(error)
    return attack(net, images, labels, certificate.radii, getattr(torch, arithmetic), seed), arithmetic


def main() -> int:
    """Run the trials and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found, refused, fell, start = collections.defaultdict(list), 0, [], time.time()
    seeds = range(arguments.first, arguments.first + arguments.nets)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, torch.set_num_threads, (1,)) as pool:
        for seed, (result, arithmetic) in zip(seeds, pool.imap(trial, seeds, 20), strict=True):
            if result is None:
                refused += 1
            else:
                found[arithmetic].append(result)
            if result is not None and result.violations:
                fell.append(seed)
                print(f"seed {seed}: {result}", flush=True)
            if seed % 500 == 499:
                print(f"{seed + 1} networks, {time.time() - start:.0f} s, {len(fell)} fell", flush=True)
    results = [result for some in found.values() for result in some]
    attacked = [result for result in results if result.certified]
    record = {
        "first_seed": arguments.first,
        "networks": arguments.nets,
        "refused": refused,
        "certified": {kind: sum(result.certified > 0 for result in some) for kind, some in sorted(found.items())},
        "images_certified": sum(result.certified for result in results),
        "points_evaluated": sum(result.tried for result in results),
        "violations": sum(result.violations for result in results),
        "seeds_that_fell": fell[:20],
        "share_of_margin_taken": {
            "median": round(statistics.median(result.tightness for result in attacked), 4) if attacked else None,
            "largest": max((result.tightness for result in attacked), default=None),
        },
        "seconds": round(time.time() - start),
        "espalier": espalier.__version__,
        "torch": torch.__version__,
        "processor": environment()["processor"],
        "command": "python experiments/certificate_attack.py " + " ".join(sys.argv[1:]),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 1 if fell else 0


if __name__ == "__main__":
    raise SystemExit(main())
