#!/usr/bin/env bash
# The part of cloud/tpu_vm.sh that runs on each worker: installs .venv, starts or stops a training, or shows its state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verb=$1
shift

running() { # the shell that `run` left behind: it ends when the training has ended and its log is in the bucket
  # After a reboot the number may belong to another process.
  local pid
  pid=$(cat train.shell 2>/dev/null) && grep -aqs train.py "/proc/$pid/cmdline"
}

storage() { gcloud storage "$@" --quiet 2>/dev/null; }

case $verb in
  install) # WORKDIR [DATA]: DATA is a folder of prepared data sets in a bucket
    # The machines have Ubuntu 22.04 with Python 3.10. The library needs 3.11, which uv installs without root.
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --seed --python=3.12 .venv
    # All workers, and those of later machines, get the versions of the first installation.
    lock=$1/versions.txt locked=()
    if storage cp "$lock" versions.txt; then locked=(--constraint=versions.txt); fi
    .venv/bin/python -m pip install --quiet '.[tpu,gcs]' ${locked[@]+"${locked[@]}"}
    .venv/bin/python -m pip freeze --exclude=flax_transformer >versions.txt
    storage cp --no-clobber versions.txt "$lock" || :
    storage cat "$lock" | cmp -s - versions.txt || {
      echo "$HOSTNAME: the installed versions are not those of $lock, or the bucket cannot be written to" >&2
      exit 1
    }
    if [[ ${2-} ]]; then
      mkdir -p ~/tensorflow_datasets
      gcloud storage rsync --recursive --quiet "$2" ~/tensorflow_datasets
    fi
    touch .venv/installed
    ;;
  run) # train.py ARGUMENT ...
    if running; then
      echo "$HOSTNAME: a training is already running here: stop it first" >&2
      exit 1
    fi
    rm -f train.pid train.status
    workdir=
    for argument; do [[ $argument != --workdir=* ]] || workdir=${argument#*=}; done
    # One log for each machine, named by the time of its first training.
    [[ -e log.name ]] || echo "logs/$(date -u +%Y%m%dT%H%M%SZ)-$HOSTNAME.log" >log.name
    # It outlives the connection. With JAX_PLATFORMS, a worker that does not get its TPU ends with an error instead of
    # training on its CPU.
    (
      trap '' HUP
      keep_log() { timeout 60 gcloud storage cp --quiet train.log "$workdir/$(cat log.name)" >/dev/null 2>&1 || :; }
      nap() { sleep "${LOG_EVERY:-60}" & }
      JAX_PLATFORMS=tpu,cpu .venv/bin/python "$@" &
      pid=$!
      echo $pid >train.pid
      nap
      while wait -n; kill -0 $pid 2>/dev/null; do # the nap is over, the training is not
        keep_log
        nap
      done
      wait $pid && status=0 || status=$?
      kill $! 2>/dev/null || :
      keep_log
      echo "$status" >train.status
    ) </dev/null >>train.log 2>&1 &
    echo $! >train.shell
    ;;
  stop)
    # Waits until train.py has finished its step and written a checkpoint.
    # The training may have ended, while the rest still copies its log.
    if running; then kill -TERM "$(cat train.pid)" 2>/dev/null || :; fi
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
  follow) # without the lines in which Gloo, by which CPUs talk to each other, reports each connection
    tail -n 100 -F train.log | grep --line-buffered -av '^\[Gloo\]'
    ;;
esac
