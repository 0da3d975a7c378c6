#!/usr/bin/env bash
# What some tests need beyond Python: Prometheus, and a running Docker engine with what makes stand-ins for base
# images. Tests for which something is missing are skipped and say so; this script says it, too, and succeeds.
set -uo pipefail

missing=()
for command in prometheus promtool dockerd docker docker-compose debootstrap iptables; do
    command -v "$command" > /dev/null || missing+=("$command")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -qq -y --no-install-recommends \
            prometheus docker.io docker-cli docker-compose debootstrap iptables > /dev/null
    else
        echo "not installed, and this is no Debian with root rights: ${missing[*]}"
    fi
fi

if command -v dockerd > /dev/null && ! docker info > /dev/null 2>&1; then
    log=$(mktemp)
    setsid dockerd > "$log" 2>&1 < /dev/null &
    for _ in $(seq 60); do
        docker info > /dev/null 2>&1 && break
        sleep 0.5
    done
    docker info > /dev/null 2>&1 || tail -5 "$log"
fi
if docker info > /dev/null 2>&1; then
    echo "Docker engine $(docker version --format '{{.Server.Version}}'): its tests run"
else
    echo "NO DOCKER ENGINE CAN START HERE: the tests of the image and of docker compose are skipped"
fi
