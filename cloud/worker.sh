#!/usr/bin/env bash
# The part of cloud/tpu_vm.sh that runs on each worker: installs .venv, starts or stops a training, or shows its state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verb=$1
shift

running() {
  # After a reboot the number may belong to another process.
  local pid
  pid=$(cat train.pid 2>/dev/null) && grep -aqs train.py "/proc/$pid/cmdline"
}

case $verb in
  install)
    # The machines have Ubuntu 22.04 with Python 3.10. The library needs 3.11, which uv installs without root.
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --seed --python=3.12 .venv
    .venv/bin/python -m pip install --quiet '.[tpu,gcs]'
    touch .venv/installed
    ;;
  run) # train.py ARGUMENT ...
    if running; then
      echo "$HOSTNAME: a training is already running here: stop it first" >&2
      exit 1
    fi
    rm -f train.pid train.status
    # It outlives the connection. With JAX_PLATFORMS, a worker that does not get its TPU ends with an error instead of
    # training on its CPU.
    (
      trap '' HUP
      JAX_PLATFORMS=tpu,cpu .venv/bin/python "$@" &
      echo $! >train.pid
      wait $! && status=0 || status=$?
      echo "$status" >train.status
    ) </dev/null >>train.log 2>&1 &
    ;;
  stop)
    # Waits until train.py has finished its step and written a checkpoint.
    running && kill -TERM "$(cat train.pid)"
    while ((SECONDS < 600)); do
      running || exit 0
      sleep 0.2
    done
    echo "$HOSTNAME: the training is still running 600 s after SIGTERM: look at its log with follow" >&2
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
      how=gone # the machine was rebooted
    else
      how=installed
    fi
    echo "$HOSTNAME: $how"
    ;;
  follow) tail -n 100 -F train.log ;;
esac
