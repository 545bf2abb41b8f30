"""What the doctor catches of the corpus of real faults, by check.

    PYTHONPATH=src:tests python experiments/doctor_corpus.py > docs/results/doctor-corpus.md

Half a minute on one core.
"""

from __future__ import annotations

import torch

import espalier
from doctor.corpus import direction, memory, state_space, training, weights  # noqa: F401  (they fill CASES)
from doctor.corpus.case import CASES


def main() -> None:
    """Run every case with its fault and without, and print two tables."""
    counts: dict[str, list[int]] = {}
    rows = []
    for case in CASES:
        torch.manual_seed(0)
        found = espalier.diagnose(**case.build(True)).findings
        caught = any((f.check, f.layer, f.severity) == (case.check, case.layer, case.severity) for f in found)
        torch.manual_seed(0)
        twin = any(f.severity != "note" for f in espalier.diagnose(**case.build(False)).findings)
        row = counts.setdefault(case.check, [0, 0, 0, 0])
        for index, value in enumerate((1, caught, not caught, twin)):
            row[index] += value
        repository, _, number = case.thread.partition("#")
        thread = f"[{case.thread}](https://github.com/{repository}/issues/{number})" if case.thread else "–"
        rows.append(f"| {case.name} | {thread} | {case.check} | `{case.layer or '(model)'}` | {case.severity} |")
    print("# Faults that the doctor must catch\n")
    print(
        "Written by `experiments/doctor_corpus.py` from `tests/doctor/corpus`: each case rebuilds the cause of a public"
    )
    print("report on a tiny model, beside the same model without the fault.\n")
    print("| check | cases | caught | missed | healthy twins with an error or a warning |\n|---|---|---|---|---|")
    for check, row in sorted(counts.items()):
        print(f"| {check} | {' | '.join(map(str, row))} |")
    print(f"| all | {' | '.join(str(sum(column)) for column in zip(*counts.values(), strict=True))} |\n")
    print("`ranks` is tested with two processes (`tests/doctor/test_ranks.py`): replicas drawn from different seeds")
    print("(facebookresearch/detr#544) and equal shards under FSDP2 (pytorch/torchtitan#3106).\n")
    print("| fault | thread | check | layer | severity |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
