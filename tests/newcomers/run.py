"""Each kind of new user, from nothing: ``make newcomers``; ``python tests/newcomers/run.py WHEEL [NAME …]``.

For every script here: a new environment, the wheel with the extras that the script's first line names, and the script
itself, run outside the checkout, where nothing but the installed package can be found. torch is asked for in the
version of $TORCH, so that pip need not choose a CUDA build of some gigabytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path != Path(__file__).resolve())


def extras_of(script: Path) -> str:
    """Return ``[train,timm]`` of a script whose first line ends in ``(extras: train, timm)``, or nothing."""
    found = re.search(r"\(extras: ([\w, ]+)\)", script.read_text().splitlines()[0])
    return f"[{found[1].replace(' ', '')}]" if found else ""


def welcome(script: Path, wheel: Path) -> bool:
    """Run one script in an environment of its own; say how it went."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "env", with_pip=True)
        binaries = home / "env" / ("Scripts" if os.name == "nt" else "bin")
        torch = f"torch=={version}" if (version := os.environ.get("TORCH")) else "torch"
        install = [binaries / "python", "-m", "pip", "install", "--quiet", torch, f"{wheel}{extras_of(script)}"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ESPALIER"))}
        environment = kept | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "HOME": folder,
            "HF_HUB_OFFLINE": "1",
        }
        (home / "work").mkdir()
        for command in (install, [binaries / "python", str(script)]):
            done = subprocess.run(command, cwd=home / "work", env=environment, check=False)
            if done.returncode:
                print(f"{script.stem}: failed with status {done.returncode}: {' '.join(map(str, command[-3:]))}")
                return False
    print(f"{script.stem}: welcome")
    return True


def main() -> None:
    """Run all scripts, or those that are named."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    wheel, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    chosen = [script for script in SCRIPTS if not names or script.stem in names]
    outcomes = [welcome(script, wheel) for script in chosen]
    raise SystemExit(0 if outcomes and all(outcomes) else 1)


if __name__ == "__main__":
    main()
