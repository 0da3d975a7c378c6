#!/usr/bin/env bash
# Cross-build the wheel for Linux on aarch64, as dist/de3-…-linux_aarch64.whl.
#
#   deploy/release/cross.sh [PYTHON]
#
# Needs aarch64-linux-gnu-gcc and its C library (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross). The headers are
# those of PYTHON, whose stable ABI is the same on both processors; Debian's Python has headers for its own processor
# only. The wheel runs with the C library that it was linked with, or a newer one; PyPI does not accept wheels with this
# tag.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
tools=$PWD/build/cross
compiler=aarch64-linux-gnu-gcc

rm -rf "$tools"
"$python" -m venv "$tools/env"
"$tools/env/bin/pip" install --quiet build
CC=$compiler LDSHARED="$compiler -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
    "$tools/env/bin/python" -m build --outdir "$tools" # the sdist, and from it the wheel
mkdir -p dist
mv "$tools"/*-linux_aarch64.whl dist/
wheel=$(ls dist/*-linux_aarch64.whl)

# The extension is optional, so a build without it succeeds: check that it is there.
"$python" -m zipfile -e "$wheel" "$tools/wheel"
extension=$tools/wheel/de3/native/kernels.abi3.so
aarch64-linux-gnu-readelf --file-header "$extension" | grep -q 'Machine: *AArch64'
aarch64-linux-gnu-nm --dynamic --defined-only "$extension" | grep -q ' T PyInit_kernels$'
newest=$(aarch64-linux-gnu-readelf --version-info "$extension" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
echo "$wheel: kernels for AArch64, with $newest or newer"
