#!/usr/bin/env bash
# Base images for the tests of the Dockerfile and docker-compose.yml: those of .env if they exist or can be pulled, else
# stand-ins made from Debian's packages, under separate names. Needs a Docker engine; stand-ins need root and
# debootstrap.
#
#   tests/docker/stand-ins.sh     prints PYTHON_IMAGE=… and PROMETHEUS_IMAGE=…; the rest goes to standard error
#
# Python: a minimal Debian with python3. Prometheus: the same, with Debian's package. There is no stand-in for Grafana,
# for which Debian has no package.
set -euo pipefail
cd "$(dirname "$0")/../.."
. ./.env
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
suite=${DEBIAN_SUITE:-trixie}

have() { docker image inspect "$1" > /dev/null 2>&1; }
have_or_pull() { have "$1" || timeout 120 docker pull --quiet "$1" > /dev/null 2>&1; }

if ! have_or_pull "$PYTHON_IMAGE"; then
    PYTHON_IMAGE=de3-test/$PYTHON_IMAGE
    if ! have "$PYTHON_IMAGE"; then
        root=$(mktemp -d)
        trap 'rm -rf "$root"' EXIT
        debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
            "$suite" "$root" "$mirror" > /dev/null
        # Python's own image includes the headers, which are needed to build extension modules.
        headers=$(basename "$(readlink -f "$root/usr/bin/python3")")
        chroot "$root" sh -c "cd /tmp && apt-get download -qq -o APT::Sandbox::User=root lib$headers-dev \
            && dpkg-deb -x lib*-dev*.deb x && cp -r x/usr/include/* /usr/include/ && rm -rf x lib*-dev*.deb"
        # A machine behind an inspecting proxy has its own certificate bundle, which pip must trust.
        bundle=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}
        if [ -r "$bundle" ]; then
            cp "$bundle" "$root/etc/ssl/certs/ca-certificates.crt"
            printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$root/etc/pip.conf"
        fi
        rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* \
            "$root"/usr/share/locale/* "$root"/usr/share/man/*
        tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$PYTHON_IMAGE" > /dev/null
        echo "made $PYTHON_IMAGE" >&2
    fi
fi

if ! have_or_pull "$PROMETHEUS_IMAGE"; then
    PROMETHEUS_IMAGE=de3-test/$PROMETHEUS_IMAGE
    if ! have "$PROMETHEUS_IMAGE"; then
        debian=$PYTHON_IMAGE
        DOCKER_BUILDKIT=0 docker build --quiet --tag "$PROMETHEUS_IMAGE" - > /dev/null << DOCKERFILE
FROM $debian
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* && mkdir -p /prometheus && chown nobody /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
DOCKERFILE
        echo "made $PROMETHEUS_IMAGE" >&2
    fi
fi

echo "PYTHON_IMAGE=$PYTHON_IMAGE"
echo "PROMETHEUS_IMAGE=$PROMETHEUS_IMAGE"
