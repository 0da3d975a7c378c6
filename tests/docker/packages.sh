#!/usr/bin/env bash
# For CI: installs the tools that some tests need besides Python: Prometheus, faketime, Chromium, a cross compiler and
# an emulator for Arm, nginx, and Docker with the tools that make stand-ins for base images; then starts Docker's engine.
# Tests whose tools are missing are skipped, with the reason; this script only reports the missing tools, and exits with
# 0.
set -uo pipefail

# command:package,package, as Debian names them; installed one by one, so that a missing one does not affect the others.
for pair in prometheus:prometheus promtool:prometheus dockerd:docker.io docker:docker-cli \
    docker-compose:docker-compose debootstrap:debootstrap iptables:iptables faketime:faketime \
    chromium:chromium aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu,libc6-dev-arm64-cross \
    qemu-aarch64:qemu-user nginx:nginx-light; do
    command -v "${pair%%:*}" > /dev/null && continue
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "not installed, because this is not Debian as root: ${pair%%:*}"
        continue
    fi
    [ -n "${updated:-}" ] || { apt-get update -qq -o DPkg::Lock::Timeout=60 || true; updated=1; }
    packages=${pair##*:}
    # --no-remove: never replace another Docker that is installed.
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends --no-remove \
        -o DPkg::Lock::Timeout=60 ${packages//,/ } > /dev/null || echo "could not be installed: $packages"
done

works() { timeout 10 docker info > /dev/null 2>&1; }

if command -v dockerd > /dev/null && ! works; then
    log=$(mktemp)
    setsid dockerd > "$log" 2>&1 < /dev/null &
    for _ in $(seq 60); do
        works && break
        sleep 0.5
    done
    works || tail -5 "$log"
fi
if works && command -v docker-compose > /dev/null; then
    echo "Docker engine $(docker version --format '{{.Server.Version}}'): the tests of the image and of compose run"
else
    echo "NO DOCKER ENGINE CAN START HERE: the tests of the image and of docker compose are skipped"
fi
