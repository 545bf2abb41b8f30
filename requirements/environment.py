"""Make the development environment: ``make env`` runs this with the standard library alone.

``python requirements/environment.py VENV TORCH [INDEX]`` creates VENV if it is not there, installs torch TORCH *with*
what it needs (from the package index INDEX if one is given), and then the other packages of dev.lock without asking
what they need: the lock lists all of it, and torchattacks must not drag in a torchvision that does not import beside
this torch.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parent / "dev.lock"
SIZES = """\
torch {torch} and what it needs will be downloaded now. Unless pip is set up to find another build first, that is on
Linux the CUDA build: about 2.5 GB to download and 6 GB on the disk. The build for the CPU alone is about 0.2 GB: stop
here and run the same command with TORCH_INDEX=URL (pytorch.org names the URL under "CPU").
"""


def refuse(message: str) -> None:
    """Stop with one line, the remedy in it."""
    raise SystemExit(f"make env: {message}")


def create(venv: Path) -> Path:
    """Return the interpreter of the environment, made if it is not there."""
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
        if missing:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            refuse(
                f"{sys.executable} has no module {' and '.join(missing)}: apt-get install python{version}-venv, "
                "or name another Python with PYTHON=…"
            )
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        refuse(f"{venv} has no pip: remove the folder and run this again, or {python} -m ensurepip")
    return python


def installed_torch(python: Path) -> str:
    """Return the version of torch in the environment without its build ("2.14.1" for "2.14.1+cu130"), or nothing."""
    probe = "from importlib.metadata import version; print(version('torch').partition('+')[0])"
    return subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False).stdout.strip()


def main(venv: Path, torch: str, index: str) -> None:
    """Create, say what torch costs, install torch, then the lock, then this project."""
    python = create(venv)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if installed_torch(python) != torch:
        if not index:
            print(SIZES.format(torch=torch), end="", flush=True)
        subprocess.run([*install, f"torch=={torch}", *(["--index-url", index] if index else [])], check=True)
    # A requirements file, not arguments: the list is long.
    others = venv / "dev-without-torch.lock"
    others.write_text("".join(line for line in LOCK.read_text().splitlines(True) if not line.startswith("torch==")))
    subprocess.run([*install, "--no-deps", "-r", others], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", LOCK.parents[1]], check=True)
    probe = "import torch; print(f'torch {torch.__version__} imports')"
    subprocess.run([python, "-c", probe], check=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) == 4 else "")
    except subprocess.CalledProcessError as error:
        refuse(f"{' '.join(map(str, error.cmd[:5]))} … failed with status {error.returncode}: its output is above")
