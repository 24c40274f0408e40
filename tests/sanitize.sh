#!/usr/bin/env bash
# The extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer: no read outside the memory of a segment,
# whatever its bytes are. Builds into a temporary copy; needs gcc and the Python that the tests run with.
#
#     tests/sanitize.sh [python] [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${1:-.venv/bin/python}")
shift || true

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r shmelim tests pyproject.toml "$copy"
rm -f "$copy"/shmelim/shm/_native*.so

include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
gcc -std=c11 -O1 -g -fPIC -shared -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
    -Wall -Wextra -Wconversion -Werror -isystem "$include" \
    "$copy/shmelim/shm/_native.c" -o "$copy/shmelim/shm/_native$suffix"

# Python's own allocator would hide overruns inside its arenas; what Python leaves at exit is not ours to report.
cd "$copy"
LD_PRELOAD=$(gcc -print-file-name=libasan.so) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 PYTHONDONTWRITEBYTECODE=1 \
    "$python" -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestConfigWarning \
    tests/faults/test_native_fuzz.py tests/unit/test_native.py tests/properties/test_native_differential.py \
    tests/unit/test_plain.py tests/unit/test_shm_attach.py tests/unit/test_shm_reads.py tests/unit/test_shm_image.py \
    tests/unit/test_shm_adoption.py tests/properties/test_shm_table.py -k 'not TestLeaks' "$@"
