#!/bin/sh
# Sends endless waves of requests to the server at $1: most with defaults, some with their own τ, some long.
set -eu
texts=$(dirname "$0")/texts.txt
while :; do
    for rate in 20 60 120 200 120 60; do
        de3 loadtest run "$1" --texts "$texts" --rate "$rate" --seconds 45 --long-share 0.01
    done
    de3 loadtest run "$1" --texts "$texts" --rate 40 --seconds 30 --tau 0 --tau 0.05 --tau 0.3
done
