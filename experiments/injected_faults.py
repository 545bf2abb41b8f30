"""Does the doctor find a fault in models that it was not built on? Breaks one layer of hundreds, and counts.

    python -m experiments.injected_faults transformers espalier --out faults.jsonl       (the project's environment)
    PYTHONPATH=src:tests python -m experiments.injected_faults timm --out faults.jsonl   (the interop environment)
    python -m experiments.injected_faults --table faults.jsonl > docs/results/injected-faults.md

The other side of `false_alarms.py`: the same untouched models, each with every fault in turn at one layer, which a draw
decides, the same at every run. A fault counts as found where an error or a warning names that layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import espalier
from experiments.false_alarms import LIBRARIES, sweep

LIMIT = 12_000_000  # parameters

_QUERY = re.compile(r"(^|\.)(q|query|q_proj|wq|to_q|query_proj|q_lin)\.weight$")
_LAYER = re.compile(r"\.\d+\.")


def matrices(model: nn.Module) -> list[str]:
    """Names of the weights of linear layers and convolutions with at least 512 entries, tied ones once."""
    names = []
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        multiplies = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"
        wide = parameter.ndim > 1 and sum(size > 1 for size in parameter.shape) > 1 and parameter.shape[1] > 1
        if name.endswith(".weight") and multiplies and wide and parameter.numel() >= 512 and parameter.requires_grad:
            names.append(name)
    # A weight that starts at one number, or at an identity, is not one that a draw can be lost from.
    kept = dict(model.named_parameters())
    return [name for name in names if kept[name].unique().numel() > 64]


def queries(model: nn.Module) -> list[str]:
    """Names of the query projections."""
    return [name for name in matrices(model) if _QUERY.search(name)]


def stacked(model: nn.Module) -> list[str]:
    """Names of the weights that have at least three siblings of their shape in other layers."""
    shapes: dict[tuple[str, torch.Size], list[str]] = {}
    kept = dict(model.named_parameters())
    for name in matrices(model):
        shapes.setdefault((_LAYER.sub(".*.", name), kept[name].shape), []).append(name)
    return [name for group in shapes.values() if len(group) > 3 for name in group]


def norms(model: nn.Module) -> list[str]:
    """Names of the gains of torch's own norms."""
    kinds = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm, nn.RMSNorm)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    kept = dict(model.named_parameters())
    return [f"{n}.weight" for n in found if f"{n}.weight" in kept and bool((kept[f"{n}.weight"] == 1).all())]


def statistics(model: nn.Module) -> list[str]:
    """Names of the running variances."""
    return [name for name, _ in model.named_buffers() if name.endswith("running_var")]


def decays(model: nn.Module) -> list[str]:
    """Names of the state-space layers' decays."""
    return [name for name, p in model.named_parameters() if name.endswith("A_log") and p.numel() > 1]


def rotations(model: nn.Module) -> list[str]:
    """Names of the rotary frequencies."""
    return [name for name, b in model.named_buffers() if name.endswith("inv_freq") and b.numel() > 1]


def garbage(tensor: Tensor) -> None:
    """Fill a tensor with what lies in memory that nobody wrote: denormals, and here and there something huge."""
    tensor.copy_(torch.rand(tensor.shape) * 1e-39)
    tensor.view(-1)[:: max(1, tensor.numel() // 7)] = 3e22


def copied(model: nn.Module, name: str) -> None:
    """Write a sibling's weight into a layer."""
    pattern, kept = _LAYER.sub(".*.", name), dict(model.named_parameters())
    other = next(n for n in stacked(model) if n != name and _LAYER.sub(".*.", n) == pattern
                 and kept[n].shape == kept[name].shape)  # fmt: skip
    kept[name].copy_(kept[other])


def values(change: Callable[[Tensor], Any]) -> Callable[[nn.Module, str], None]:
    """Return a fault that changes one tensor."""

    def apply(model: nn.Module, name: str) -> None:
        change(dict([*model.named_parameters(), *model.named_buffers()])[name])

    return apply


def pinned(weight: Tensor) -> None:
    """Put a two-hundredth of the entries at one bound, a hundred deviations out."""
    weight.view(-1)[:: max(1, min(200, weight.numel() // 8))] = -100 * weight.std()


def interleaved(weight: Tensor) -> None:
    """Write every second row into the one after it."""
    weight[1::2] = weight[: len(weight) // 2 * 2 : 2]


def outer(weight: Tensor) -> None:
    """Make all rows multiples of the first, of the lengths that they had."""
    rows = weight.reshape(len(weight), -1)
    weight.copy_((rows.norm(dim=1, keepdim=True) * rows[0] / rows[0].norm()).view_as(weight))


def tables(kind: type[nn.Module]) -> Callable[[nn.Module], list[str]]:
    """Return what lists the trainable weights of one class."""

    def places(model: nn.Module) -> list[str]:
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]
        return [f"{n}.weight" for n, m in found if m.weight.requires_grad and m.weight.std() > 0]  # type: ignore[union-attr, operator, arg-type]

    return places


def wide(model: nn.Module) -> list[str]:
    """Names of the weights that map at least 16 inputs to at least 16 outputs."""
    return [name for name in matrices(model) if min(model.get_parameter(name).flatten(1).shape) >= 16]


def biases(model: nn.Module) -> list[str]:
    """Names of the biases of the weights that ``matrices`` lists."""
    kept = dict(model.named_parameters())
    names = [f"{name.removesuffix('.weight')}.bias" for name in matrices(model)]
    return [name for name in names if name in kept and kept[name].numel() >= 16]


def repeated(weight: Tensor) -> None:
    """Write the first half of the rows into the second."""
    half = len(weight) // 2
    weight[half : 2 * half] = weight[:half]


# What breaks, where, and how.
FAULTS: dict[str, tuple[Callable[[nn.Module], list[str]], Callable[[nn.Module, str], None]]] = {
    "one NaN": (matrices, values(lambda w: w.view(-1)[w.numel() // 3].fill_(torch.nan))),
    "one infinity": (matrices, values(lambda w: w.view(-1)[-1].fill_(torch.inf))),
    "memory that nobody wrote": (matrices, values(garbage)),
    "one number everywhere": (matrices, values(lambda w: w.fill_(0.02))),
    "queries all zero": (queries, values(lambda w: w.zero_())),
    "equal rows": (matrices, values(lambda w: w.copy_(w[:1].clone().expand_as(w)))),
    "two equal shards": (
        lambda model: [n for n in matrices(model) if len(model.get_parameter(n)) % 2 == 0],
        values(repeated),
    ),
    "every second row a copy": (matrices, values(interleaved)),
    "rows along one direction": (wide, values(outer)),
    "drawn off centre": (matrices, values(lambda w: w.copy_(torch.rand(w.shape) * 2 * w.std()))),
    "tokens a hundred times": (tables(nn.Embedding), values(lambda w: w.mul_(100 / w.std().clamp(max=1)))),
    "a bias drawn with deviation ten": (biases, values(lambda b: b.normal_(std=10))),
    "a third of the rows zero": (matrices, values(lambda w: w[: max(2, len(w) // 3)].zero_())),
    "a sibling's copy": (stacked, copied),
    "thirty times its siblings": (stacked, values(lambda w: w.mul_(30))),
    "a hundredth of its siblings": (stacked, values(lambda w: w.div_(100))),
    "deviation of one, by default": (
        lambda model: [n for n in matrices(model) if min(model.get_parameter(n).shape[:2]) > 100],
        values(lambda w: w.normal_()),
    ),
    "mass at one bound": (matrices, values(pinned)),
    "gain of zero": (norms, values(lambda w: w.zero_())),
    "gain drawn from noise": (norms, values(lambda w: w.normal_(std=0.02))),
    "variance never written": (statistics, values(lambda b: b.copy_(torch.rand(b.shape) * 1e-39))),
    "decay of minus infinity": (decays, values(lambda w: w.view(-1)[0].fill_(-torch.inf))),
    "decay of 1e30": (decays, values(lambda w: w.fill_(1e30))),
    "decay written over by zero": (decays, values(lambda w: w.zero_())),
    "frequencies all zero": (rotations, values(lambda b: b.zero_())),
    "frequencies never written": (rotations, values(lambda b: b.copy_(torch.rand(b.shape) * 1e-39))),
    "left on the meta device": (
        matrices,
        lambda model, name: setattr(
            model.get_submodule(name.rpartition(".")[0]), "weight",
            nn.Parameter(torch.empty_like(model.get_parameter(name), device="meta")),
        ),
    ),
    "no entries": (
        matrices,
        lambda model, name: setattr(
            model.get_submodule(name.rpartition(".")[0]), "weight", nn.Parameter(torch.empty(0))
        ),
    ),
}  # fmt: skip


def named(diagnosis: espalier.Diagnosis, layer: str) -> list[str]:
    """Return the checks whose errors and warnings name a layer, what holds it, or a pair that it is one of."""
    loud = [f for f in diagnosis.findings if f.severity != "note" and f.layer]
    return sorted({f.check for f in loud if layer == f.layer or layer.startswith(f"{f.layer}.") or layer in f.measured})


def examine(build: Callable[[], nn.Module], pipe: Any) -> None:
    """Build one model, break a copy of it in every way, and send what was found; runs in a child process."""
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        model = build()
        healthy = espalier.diagnose(model)
    except Exception as error:
        pipe.send({"left_out": f"does not build: {type(error).__name__}: {str(error)[:100]}"})
        return
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > LIMIT:
        pipe.send({"left_out": f"{numbers:,} parameters"})
        return
    results: dict[str, Any] = {}
    for fault, (places, apply) in FAULTS.items():
        draw = random.Random(f"{type(model).__name__} {numbers} {fault}")
        found = [place for place in places(model) if not named(healthy, place)]
        if not found:
            continue
        place = draw.choice(found)
        broken = copy.deepcopy(model)
        with torch.no_grad():
            apply(broken, place)
        results[fault] = {"layer": place, "checks": named(espalier.diagnose(broken), place)}
    pipe.send({"parameters": numbers, "faults": results})


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: a row for each fault, then every miss."""
    examined = list({(r["library"], r["model"]): r for r in records if "faults" in r}.values())
    lines = [
        "# Injected faults",
        "",
        "Written by `experiments/injected_faults.py`: untouched models of up to 12 million parameters, broken at one",
        "layer in one way at a time. A fault is found where an error or a warning names the layer.",
        "",
        f"{len(examined)} models of {', '.join(sorted({r['library'] for r in examined}))}, a sample by name.",
        "",
        "| fault | models | found | by |",
        "|---|---|---|---|",
    ]
    missed = []
    for fault in FAULTS:
        rows = [(r, r["faults"][fault]) for r in examined if fault in r["faults"]]
        checks: dict[str, int] = {}
        for record, result in rows:
            for check in result["checks"]:
                checks[check] = checks.get(check, 0) + 1
            if not result["checks"]:
                missed.append(f"| {fault} | {record['library']} {record['model']} | `{result['layer']}` |")
        by = ", ".join(f"{check} {count}" for check, count in sorted(checks.items(), key=lambda pair: -pair[1]))
        lines.append(f"| {fault} | {len(rows)} | {sum(bool(r['checks']) for _, r in rows)} | {by} |")
    lines += ["", "## Missed", "", "| fault | model | layer |", "|---|---|---|", *missed]
    return "\n".join(lines)


def main() -> None:
    """Run the sweeps that the command line names, or print the table of their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[*LIBRARIES, []])
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--share", type=int, default=1, help="every how manyth model")
    parser.add_argument("--table", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for path in arguments.table for line in path.read_text().splitlines()]))
        return
    for library in arguments.libraries:
        for name, result in sweep(library, examine, arguments.out, arguments.only, arguments.share):
            faults = result.get("faults", {})
            missed = [f"\n    missed: {fault} at {r['layer']}" for fault, r in faults.items() if not r["checks"]]
            print(f"{library} {name}: {result.get('left_out') or len(faults)}", *missed, flush=True)


if __name__ == "__main__":
    sys.exit(main())
