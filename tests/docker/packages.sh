#!/usr/bin/env bash
# For CI: what some tests need beyond Python: Prometheus, faketime, Chromium, a cross compiler and an emulator for Arm, and
# a running Docker engine with what makes stand-ins for base images. Tests for which something is missing are skipped and
# say so; this script says it, too, and succeeds.
set -uo pipefail

# command:package,package, where Debian has them; each by itself, so that one that is missing costs nothing else.
for pair in prometheus:prometheus promtool:prometheus dockerd:docker.io docker:docker-cli \
    docker-compose:docker-compose debootstrap:debootstrap iptables:iptables faketime:faketime \
    chromium:chromium aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu,libc6-dev-arm64-cross \
    qemu-aarch64:qemu-user; do
    command -v "${pair%%:*}" > /dev/null && continue
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "not installed, and this is no Debian with root rights: ${pair%%:*}"
        continue
    fi
    [ -n "${updated:-}" ] || { apt-get update -qq -o DPkg::Lock::Timeout=60 || true; updated=1; }
    packages=${pair##*:}
    # --no-remove: never at the cost of another Docker that is there.
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
