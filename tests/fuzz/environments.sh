#!/usr/bin/env bash
# One wheel under several torches and Pythons: a line for each of what its tests say. What is not there is skipped, and said.
#   tests/fuzz/environments.sh [pytest's arguments]      TORCHES="2.10.0 2.13.0" PYTHONS="python3.11 python3.13"
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TORCHES:=2.10.0 2.14.1 2.15.0}" "${PYTHONS:=python3.10 python3.11 python3.12 python3.13 python3.14}"
[ $# -gt 0 ] || set -- tests/test_nt_xent.py tests/test_info_nce.py tests/test_promises.py
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in $PYTHONS; do
  command -v "$python" > /dev/null || { echo "$python: not on this machine"; continue; }
  "$python" -m venv "$folder/build" && "$folder/build/bin/pip" install -q build && rm -rf "$folder/dist" &&
    SSLOPS_BUILD_CUDA=0 "$folder/build/bin/python" -m build -q --wheel --outdir "$folder/dist" ||
    { echo "$python: no wheel"; continue; }
  for torch in $TORCHES; do
    rm -rf "$folder/env"
    "$python" -m venv "$folder/env"
    # without numpy, which torch does not require
    "$folder/env/bin/pip" install -q "torch==$torch" "$folder"/dist/*.whl pytest hypothesis packaging ||
      { echo "$python, torch $torch: not to be had"; continue; }
    rm -rf "$folder/tests" "$folder/benchmarks" && cp -r tests benchmarks "$folder"
    said=$(cd "$folder" && OMP_NUM_THREADS=1 env/bin/python -m pytest -q -p no:cacheprovider "$@" 2>&1)
    # what failed, to look at
    echo "$said" | grep ^FAILED >&2
    echo "$python, torch $torch: $(echo "$said" | tail -1)"
  done
  rm -rf "$folder/build"
done
