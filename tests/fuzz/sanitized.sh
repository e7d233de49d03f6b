#!/usr/bin/env bash
# csrc under sanitizers: builds the package into build/sanitize-... and runs Python on it there.
#   tests/fuzz/sanitized.sh address,undefined python -m pytest -q tests/test_nt_xent.py
#   tests/fuzz/sanitized.sh thread python -m tests.fuzz.races
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python flavour=$1
shift
package=$PWD/build/sanitize-${flavour/,/-}
SSLOPS_SANITIZE=$flavour "$python" setup.py -q build --build-lib "$package"
cp -r tests benchmarks pyproject.toml "$package"  # some tests import benchmarks
case $flavour in thread) runtime=libtsan.so ;; *) runtime=libasan.so ;; esac
# Leaks are looked for by leaks.py: Python's own end is full of them. Nothing else in the process is instrumented;
# parallel.cpp tells ThreadSanitizer of torch's pool, which hands out our work.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 TSAN_OPTIONS=suppressions=$PWD/tests/fuzz/tsan.supp
export UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive  # waiting threads take no time from the slow ones
export LD_PRELOAD=$(${CXX:-c++} -print-file-name=$runtime):$(${CXX:-c++} -print-file-name=libstdc++.so.6)
cd "$package"  # which comes first among what is imported
[ "$1" = python ] && shift
exec "$python" "$@"
