#!/usr/bin/env bash
# Try a wheel as a new user would: install it into an empty environment, serve the demo model, classify a text. Prints
# how many seconds this took.
#
#   deploy/release/try.sh WHEEL [PYTHON] [FOLDER]
#
# FOLDER, which must not exist, keeps the environment (FOLDER/env) and the server's log (FOLDER/log). The server gets a
# free port.
set -euo pipefail
wheel=$(realpath "$1")
python=${2:-python3}
keep=${3:-}
port=$("$python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
server=

if [ -n "$keep" ]; then mkdir "$keep"; fi
folder=$(realpath "${keep:-$(mktemp -d)}")
clean_up() {
    if [ -n "$server" ]; then
        kill "$server" 2> /dev/null || true
        wait "$server" || true
    fi
    if [ -z "$keep" ]; then rm -rf "$folder"; fi
}
trap clean_up EXIT
fail() {
    echo "$1" >&2
    cat "$folder/log" >&2
    exit 1
}

cd "$folder" # away from the checkout, whose packages Python would import
unset PYTHONPATH
SECONDS=0
echo "installing $(basename "$wheel") and its dependencies"
"$python" -m venv env
env/bin/pip install --quiet "$wheel"
echo "installed after $SECONDS s"

env/bin/de3 serve --demo --port "$port" > log 2>&1 &
server=$!
until answer=$(curl --silent --fail "http://127.0.0.1:$port/classify" -d '{"input": "a warm , funny film"}'); do
    kill -0 "$server" 2> /dev/null || fail "the server ended"
    [ "$SECONDS" -lt 600 ] || fail "no answer"
    sleep 0.1
done
echo "answered after $SECONDS s: $answer"
[[ $answer == *'"label":"positive"'* ]] || fail "not the expected answer"

# The wheel must hold the kernels, even if this processor cannot run them.
runtime=$(env/bin/python -c "from de3.native import kernels; print(f'native, {kernels.supported()}' if kernels.supported() else 'onnxruntime')")
grep -q "sst2:1 is current ($runtime)" log || fail "expected the runtime $runtime"
echo "runtime: $runtime"
