#!/usr/bin/env bash
# The wheels of `make wheel` under several torches and Pythons, without numpy: of each what its tests say, as a table's row.
#   tests/fuzz/environments.sh [pytest's arguments]      TORCHES="2.10.0 2.15.0" PYTHONS="3.10 3.13"
# Environments are links into uv's cache, where three torches with their CUDA take 25 GB (UV_CACHE_DIR says where).
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TORCHES:=2.10.0 2.14.1 2.15.0}" "${PYTHONS:=3.10 3.11 3.12 3.13 3.14}"
[ $# -gt 0 ] || set -- tests/test_promises.py tests/test_core.py
folder=$(mktemp -d -p build)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/uv" && "$folder/uv/bin/pip" install -q uv || exit
cp -r tests benchmarks pyproject.toml "$folder"
for python in $PYTHONS; do
  wheel=$(ls dist/sslops-*-"cp${python/./}"-*.whl 2> /dev/null) || { echo "| $python | | no wheel in dist/ |"; continue; }
  for torch in $TORCHES; do
    # without numpy, which torch does not require
    "$folder/uv/bin/uv" venv -q --clear --no-python-downloads --python "$python" "$folder/env" &&
      "$folder/uv/bin/uv" pip install -q --python "$folder/env" "torch==$torch" "$wheel" pytest hypothesis packaging ||
      { echo "| $python | $torch | not to be had |"; continue; }
    said=$(cd "$folder" && OMP_NUM_THREADS=1 env/bin/python -m pytest -q -p no:cacheprovider "$@" 2>&1)
    echo "$said" | grep ^FAILED >&2  # to look at
    echo "| $python | $torch | $(echo "$said" | tail -1) |"
  done
done
