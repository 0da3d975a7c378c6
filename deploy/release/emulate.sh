#!/usr/bin/env bash
# Import the kernels of a wheel for aarch64 in QEMU, with Debian's Python for Arm, and run a layer with each of them.
#
#   deploy/release/emulate.sh WHEEL
#
# Needs Debian with qemu-user. The packages for Arm are unpacked into a temporary folder and not installed. Exit code 2:
# they cannot be downloaded.
set -euo pipefail
wheel=$(realpath "$1")
layer=$(realpath "$(dirname "$0")/../../tests/native/layer.py")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

mkdir -p state/lists/partial cache/archives/partial root/usr/lib wheel
touch status
arm=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
    -o Dir::State="$folder/state" -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache")
packages=(--no-install-recommends python3-minimal libpython3-stdlib)
if ! apt-get "${arm[@]}" update || ! apt-get "${arm[@]}" install --yes --download-only "${packages[@]}" > /dev/null; then
    exit 2
fi
for package in cache/archives/*.deb; do dpkg -x "$package" root; done
[ -e root/lib ] || ln -s usr/lib root/lib

python3 -m zipfile -e "$wheel" wheel
qemu-aarch64 -cpu max -L root root/usr/bin/python3 "$layer" wheel
