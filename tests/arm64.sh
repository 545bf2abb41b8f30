#!/usr/bin/env bash
# The tests on arm64 from an x86-64 machine: a Debian of that kind in a folder, run by QEMU's user emulation.
#
#     tests/arm64.sh tests/nn/kernels tests/nn/ssm -m "not slow"        # as root; the first call downloads 1.5 GB
#
# Kernels are cross-compiled with the flags of setup.py. torch's arm64 wheel wants CUDA's libraries: stand-ins take their
# place in which every call says that there is no device. Its oneDNN generates code for a processor that it does not find
# under emulation, and F.linear came out wrong: the tests run without it.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=${ROOT:-$PWD/.arm64}
TORCH=${TORCH:-2.13.0}
SITE=$ROOT/opt/site

need() { command -v "$1" > /dev/null || { echo "$1 is missing: apt-get install $2" >&2; exit 1; }; }
need debootstrap debootstrap
need qemu-aarch64-static qemu-user-static
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu

if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  cat /usr/lib/binfmt.d/qemu-aarch64.conf > /proc/sys/fs/binfmt_misc/register
fi
if [ ! -e "$ROOT/opt/ready" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3.11,libgomp1,libstdc++6 bookworm "$ROOT"
  fetch() {
    "${PYTHON:-python3.11}" -m pip install --quiet --no-compile --upgrade --target "$SITE" --python-version 3.11 \
      --implementation cp --abi cp311 --abi abi3 --abi none --only-binary=:all: \
      --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "$@"
  }
  fetch --no-deps "torch==$TORCH" lightning-fabric lightning-utilities kornia kornia_rs
  fetch numpy safetensors tyro scipy typeguard pyyaml filelock cloudpickle pillow plotly rich scikit-learn hypothesis \
    pytest pytest-timeout pytest-xdist transformers sympy networkx jinja2 fsspec typing-extensions setuptools packaging
  printf 'import torch\ntorch.backends.mkldnn.set_flags(False)\n' > "$SITE/without_onednn.py"
  "${PYTHON:-python3.11}" tests/arm64_stubs.py "$SITE/torch/lib" "$ROOT/opt/stubs"
  touch "$ROOT/opt/ready"
fi

rm -rf "$ROOT/opt/espalier"
mkdir -p "$ROOT/opt/espalier"
git ls-files -z | xargs -0 tar c --ignore-failed-read | tar x -C "$ROOT/opt/espalier"
kernels=$ROOT/opt/espalier/src/espalier/nn/kernels
flags=$("${PYTHON:-python3.11}" -c '
import ast, pathlib
tree = ast.parse(pathlib.Path("setup.py").read_text())
lists = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
print(*ast.literal_eval(lists["FLAGS"]), *ast.literal_eval(lists["HIDE"]))')
# shellcheck disable=SC2086  # one word a flag
aarch64-linux-gnu-g++ -shared -fPIC $flags -o "$kernels/arm64.so" "$kernels"/*.cpp
echo "$(sha256sum "$kernels/arm64.so" | cut -d' ' -f1)  arm64.so" > "$kernels/arm64.sha256"

mountpoint -q "$ROOT/proc" || mount -t proc proc "$ROOT/proc"
mountpoint -q "$ROOT/dev" || mount --bind /dev "$ROOT/dev"
exec chroot "$ROOT" /usr/bin/env -C /opt/espalier HOME=/root LD_LIBRARY_PATH=/opt/stubs OMP_NUM_THREADS=1 \
  PYTHONPATH=/opt/espalier/src:/opt/espalier/tests:/opt/espalier:/opt/site \
  python3.11 -m pytest -q -p without_onednn --override-ini timeout=3000 "$@"
