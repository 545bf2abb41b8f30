"""The parts of a training as processes of their own find them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def parts_in_new_processes(folder: Path, module: str) -> list[dict[str, str]]:
    """Return what two processes, with hashes of two seeds, find of ``train`` in a module of a folder."""
    code = f"import json, {module} as m; from espalier.study.training_parts import training_parts as parts; "
    runs = (
        subprocess.run(
            [sys.executable, "-c", f"{code}print(json.dumps(parts(m.train)))"],
            cwd=folder,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(["", *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    )
    return [json.loads(run.stdout) for run in runs]
