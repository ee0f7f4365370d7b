#!/usr/bin/env bash
# Takes a verb of cloud/tpu_vm.sh on one worker, and leaves .venv, a training, its end, or a word on how it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verb=$1
shift

running() {
  # When the machine was started anew the number may be another process's.
  local pid
  pid=$(cat train.pid 2>/dev/null) && grep -aqs train.py "/proc/$pid/cmdline"
}

case $verb in
  install)
    # The machines have Ubuntu 22.04, whose Python is 3.10; the library wants 3.11, and uv brings one without root.
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --seed --python=3.12 .venv
    .venv/bin/python -m pip install --quiet '.[tpu,gcs]'
    touch .venv/installed
    ;;
  run) # train.py ARGUMENT ...
    if running; then
      echo "$HOSTNAME: it runs already: stop it first" >&2
      exit 1
    fi
    rm -f train.pid train.status
    # It outlives the connection. With JAX_PLATFORMS a worker that does not get its TPU ends with an error, rather than
    # train on its CPU.
    (
      trap '' HUP
      JAX_PLATFORMS=tpu,cpu .venv/bin/python "$@" &
      echo $! >train.pid
      wait $! && status=0 || status=$?
      echo "$status" >train.status
    ) </dev/null >>train.log 2>&1 &
    ;;
  stop)
    # train.py finishes its step and writes a checkpoint, which is waited for.
    running && kill -TERM "$(cat train.pid)"
    while ((SECONDS < 600)); do
      running || exit 0
      sleep 0.2
    done
    echo "$HOSTNAME: it runs still, 600 s after SIGTERM: look with follow" >&2
    exit 1
    ;;
  look)
    if [[ ! -e .venv/installed ]]; then
      how=copied
    elif running; then
      how=running
    elif [[ -e train.status ]]; then
      how="ended $(cat train.status)"
    elif [[ -e train.pid ]]; then
      how=gone # the machine was started anew
    else
      how=installed
    fi
    echo "$HOSTNAME: $how"
    ;;
  follow) tail -n 100 -F train.log ;;
esac
