#!/usr/bin/env bash
# Run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
build=build/sanitized
checks="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
if ! asan=$(gcc -print-file-name=libasan.so) || [ ! -e "$asan" ]; then
    echo "no gcc with AddressSanitizer here: the kernels are not sanitized"
    exit 0
fi
CFLAGS="$checks" LDFLAGS="$checks" "$python" -c "from setuptools import setup; setup()" -q \
    build_ext --build-lib "$build" --build-temp "$build/objects" --force
# Python does not free its memory at exit; these leaks are not the kernels'. Capturing "sys" leaves the reports visible.
LD_PRELOAD="$(realpath "$asan") $(realpath "$(gcc -print-file-name=libubsan.so)")" \
    ASAN_OPTIONS=detect_leaks=0 SANITIZED_KERNELS="$(find "$build" -name 'kernels*.so')" \
    "$python" -m pytest --capture=sys tests/test_native.py tests/test_hostile_models.py \
    -k "not proves and not proving and not verify and not bad_model and not no_tensor"
