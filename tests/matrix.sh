#!/usr/bin/env bash
# The tests under other instruction sets, libraries' modes, thread counts and without a compiler, all on one machine.
#
#   tests/matrix.sh                            every setting, every test
#   tests/matrix.sh tests/nn tests/init        every setting, some tests
#   SETTINGS="plain no-compiler" tests/matrix.sh ...
#
# PYTHON names the interpreter (default: python3 on PATH) and WORKERS the processes (default 2). Goes through all
# settings whatever fails, ends with a table and with status 1 if one of them failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no Python ${PYTHON:-python3}: set PYTHON" >&2; exit 2; }
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
WORKERS=${WORKERS:-2}
# MKL takes fewer threads than it is given unless it is told not to.
declare -A ENVIRONMENT=(
  [default]=""
  [threads-1]="OMP_NUM_THREADS=1"
  [threads-4]="OMP_NUM_THREADS=4 MKL_DYNAMIC=FALSE"
  [aten-default]="ATEN_CPU_CAPABILITY=default"
  [aten-avx2]="ATEN_CPU_CAPABILITY=avx2"
  [torch-backend]="ESPALIER_BACKEND=torch"
  [mkl-avx2]="MKL_ENABLE_INSTRUCTIONS=AVX2"
  [mkl-compatible]="MKL_CBWR=COMPATIBLE"
  [no-compiler]="PATH=$PWD/.matrix-path CXX="
  # Two that differ from the default in everything at once, for a short run.
  [plain]="ATEN_CPU_CAPABILITY=default ESPALIER_BACKEND=torch OMP_NUM_THREADS=1"
  [narrow]="ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=4 MKL_DYNAMIC=FALSE"
)
ALL="default threads-1 threads-4 aten-default aten-avx2 torch-backend mkl-avx2 mkl-compatible no-compiler plain narrow"

# A PATH with everything but compilers: what tests and their programs call cannot be listed.
rm -rf .matrix-path && mkdir .matrix-path
IFS=: read -ra folders <<< "$PATH"
for folder in "${folders[@]}"; do
  ln -s -t .matrix-path "$folder"/* 2> /dev/null  # a name that is there already came first
done
(cd .matrix-path && rm -f cc c++ gcc* g++* cpp* clang* tcc icx icpx nvcc c89* c99* *-gcc* *-g++* *-cpp*)
# torch's compiler does not tell instruction sets apart in its cache: what it kept of one crashes under another.
kept=$(mktemp -d)
trap 'rm -rf .matrix-path "$kept"' EXIT

failed=0
table=""
for setting in ${SETTINGS:-$ALL}; do
  [ -n "${ENVIRONMENT[$setting]+known}" ] || { echo "unknown setting $setting: choose from $ALL" >&2; exit 2; }
  echo "== $setting: ${ENVIRONMENT[$setting]:-as it is}"
  log=$(mktemp)
  started=$(date +%s)
  # shellcheck disable=SC2086  # one word an assignment
  env TORCHINDUCTOR_CACHE_DIR="$kept/$setting" ${ENVIRONMENT[$setting]} "$PYTHON" -m pytest -q -n "$WORKERS" --dist loadfile "$@" 2>&1 | /usr/bin/tee "$log"
  verdict=${PIPESTATUS[0]}
  [ "$verdict" = 0 ] && word=pass || { word=FAIL; failed=1; }
  table+=$(printf '%-15s %-4s %5d s  %s' "$setting" "$word" "$(($(date +%s) - started))" "$(tail -1 "$log")")$'\n'
  rm -f "$log"
done
printf '\n%s: %s\n%s' "$("$PYTHON" -c 'import platform, torch; print(f"Python {platform.python_version()}, torch {torch.__version__}")')" "${*:-all tests}" "$table"
exit "$failed"
