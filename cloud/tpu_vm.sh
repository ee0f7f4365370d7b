#!/usr/bin/env bash
# Trains on Cloud TPU VMs, with a work directory in a bucket, and continues after pre-emptions.
#
# docs/cloud.md explains it. Sources: verbs and flags, `gcloud compute tpus ... --help` of gcloud 528; states,
# docs.cloud.google.com/tpu/docs/queued-resources; runtime versions, docs.cloud.google.com/tpu/docs/runtimes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2016
usage='cloud/tpu_vm.sh VERB [OPTION ...] [-- ARGUMENT OF train.py ...]

  create   requests TPU VMs and waits until they are ready     copy     copies this repository to all workers
  install  makes .venv on all workers                          run      starts the training on all workers
  follow   shows the log of a worker                           status   shows the state of machines and training
  stop     ends the training after a checkpoint                delete   deletes the machines, which ends their cost
  resume   delete, create, copy, install and run               keep     resumes after each pre-emption until the end

  --name= --zone= --project= --accelerator-type= --runtime-version= --config= --workdir=, or the variables NAME, ZONE,
  PROJECT, ACCELERATOR_TYPE, RUNTIME_VERSION (which has a default), CONFIG, WORKDIR
  --on-demand            use on-demand machines, not spot ones
  --create-flag=FLAG     add a flag to `gcloud compute tpus queued-resources create`; may be repeated
  --data=PATH            also copy this file or folder, which git does not track; may be repeated
  --tfds=gs://...        with install, resume and keep: a folder of prepared TFDS data sets, which each worker copies
  --worker=N             the worker whose log is shown, or all (default 0)
  --delete-when-done     with keep: delete the machines when the training is done or the time is up
  --max-hours=N          with keep: stop the training after this many hours of keep
  --dry-run              print the commands without running them'

say() { echo "tpu_vm.sh: $1"; }

die() { # MESSAGE [STATUS]
  say "$1" >&2
  exit "${2:-2}"
}

: "${NAME:=}" "${ZONE:=}" "${PROJECT:=}" "${ACCELERATOR_TYPE:=}" "${RUNTIME_VERSION:=}" "${CONFIG:=}" "${WORKDIR:=}"
# Seconds between two looks, and how many looks in a row must fail, or find that the training has ended, before `keep`
# acts on it: when machines are taken away, the training ends before their state changes.
: "${POLL:=60}" "${PATIENCE:=5}" "${HOUR:=3600}"
# Arrays are expanded as ${a[@]+"${a[@]}"}, since bash before 4.4, as on macOS, treats empty ones as unset.
data=() extra=() create_flags=() spot=--spot worker=0 dry_run='' delete_when_done='' tfds='' max_hours=''

need() {
  local variable
  for variable; do
    [[ ${!variable} ]] || die "$variable is missing: give --$(tr A-Z_ a-z- <<<"$variable")=..., or set $variable"
  done
}

need_machines() {
  need ACCELERATOR_TYPE
  case ${RUNTIME_VERSION:+given}$ACCELERATOR_TYPE in
    given*) ;;
    v2-* | v3-* | v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
    v5e-*) die "$ACCELERATOR_TYPE is a product name: give --accelerator-type=v5litepod-${ACCELERATOR_TYPE#v5e-}" ;;
    tpu7x*) die "$ACCELERATOR_TYPE is not in the Cloud TPU API: use GKE or Compute Engine, or give another type" ;;
    *) die "no runtime version is known for $ACCELERATOR_TYPE: correct it, or give --runtime-version=..." ;;
  esac
}

need_bucket() {
  need WORKDIR
  WORKDIR=${WORKDIR%"${WORKDIR##*[!/]}"} # without slashes at its end
  [[ $WORKDIR == gs://?* ]] || die "--workdir is $WORKDIR: all workers must share it, so give gs://BUCKET/FOLDER"
}

need_training() {
  need CONFIG
  need_bucket
  git ls-files --error-unmatch -- "${CONFIG%%:*}" >/dev/null 2>&1 ||
    git ls-files --error-unmatch -- "configs/${CONFIG%%:*}.py" >/dev/null 2>&1 ||
    die "--config is $CONFIG, a file that git does not track, so it is not copied: give one of configs/, or git add it"
}

quote() { # WORD ...: on one line, as a shell reads them back
  local word mark="'\\''" line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$mark}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

call() {
  local command=(gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE" --quiet)
  if [[ $dry_run ]]; then quote "${command[@]}"; else "${command[@]}"; fi
}

remote() { call tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"; }

on() { # WORKER VERB ARGUMENT ...: of cloud/worker.sh, in the copy there
  remote "$1" "$(quote bash "$NAME/cloud/worker.sh" "${@:2}")"
}

# The verbs. Inside `keep`, `set -e` has no effect, so steps are joined by && or return.

describe() { call queued-resources describe "$NAME" '--format=value(state.state)'; }

request() {
  call queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$RUNTIME_VERSION" ${spot:+"$spot"} ${create_flags[@]+"${create_flags[@]}"}
}

see() { # sets `state` of the caller, and reports a change
  local last=$state
  state=$(describe) || return
  [[ $state == "$last" ]] || say "$NAME is $state"
}

create() {
  local state=''
  request || return
  [[ $verb != create || $dry_run ]] || rm -f "$archive" # of an earlier training
  [[ ! $dry_run ]] || { describe && return; }
  while see || return; [[ $state != ACTIVE ]]; do
    [[ $state != FAILED && $state != SUSPENDED ]] || die "delete $NAME and create it again, or let keep do so" 1
    sleep "$POLL"
  done
}

pack() { # the files that git tracks, as they are now, their revision, which a training records, and --data
  local path revision=build/revision
  [[ ! $dry_run ]] || return 0
  mkdir -p build && { git describe --always --dirty --abbrev=12 '--exclude=*' 2>/dev/null || :; } >$revision &&
    { git ls-files -z && for path in $revision ${data[@]+"${data[@]}"}; do printf '%s\0' "$path"; done; } |
    tar --null -T - -czf "$archive.part" && mv "$archive.part" "$archive"
}

send() { # what was packed last, so that later edits do not slip into a training that is continued
  if [[ ! -e $archive ]]; then
    pack || return
  elif [[ $verb != copy && ! $dry_run ]]; then
    say "sending the files as they were when $archive was packed; for others use copy"
  fi
  call tpu-vm scp "$archive" "$NAME:" --worker=all &&
    remote all "mkdir -p $NAME && tar -xzf $NAME.tar.gz -C $NAME"
}

copy() { pack && send; }

install() { on all install "$WORKDIR" ${tfds:+"$tfds"}; }

run() { on all run train.py --distributed "--config=$CONFIG" "--workdir=$WORKDIR" ${extra[@]+"${extra[@]}"}; }

follow() { on "$worker" follow; }

stop() { on all stop; }

look() { # a line from each worker, e.g. "HOST: running"
  remote all "if [ -e $NAME/cloud/worker.sh ]; then bash $NAME/cloud/worker.sh look; else echo \$HOSTNAME: empty; fi"
}

status() {
  local state=''
  if [[ $dry_run ]]; then describe; else see; fi
  [[ $state && $state != ACTIVE ]] || look
}

delete() { call queued-resources delete "$NAME" --force; }

resume() { delete && create && send && install && run; }

tend() { # one look of `keep`, whose variables it changes, and what follows from it
  local found failed
  if [[ $state == DELETED ]]; then
    # gcloud may report an error although Google has begun to create, so this looks first.
    if found=$(describe 2>&1); then
      [[ $found != *DELETING* ]] || return 0
    else
      [[ $found == *' NOT_FOUND: '* ]] || { say "$found" >&2 && return 1; }
      request || return
    fi
    state='' ended=0 restarts=0
    return
  fi
  see || return
  case $state in
    # Sorted by status, a worker that ended with an error comes before those that a signal ended.
    ACTIVE) found=$(look | sed 's/.*: //; s/^gone$/ended 137/' | sort -k 2n) || return ;;
    FAILED | SUSPENDED)
      # Google may have begun to delete although gcloud reports an error.
      delete || { failed=$? && [[ $(describe 2>&1) =~ DELETING|' NOT_FOUND: ' ]] || return $failed; }
      state=DELETED
      return 0
      ;;
    *) return 0 ;;
  esac
  case $found in # the worker that is furthest behind decides
    *empty* | *copied*) send && install && run ;;
    *installed*) run ;; # workers that are already running refuse, and the others join them
    *'ended '[1-9]*)
      ended=$((ended + 1))
      ((ended >= PATIENCE)) || return 0
      [[ $found =~ 'ended '([1-9][0-9]*) ]]
      found=${BASH_REMATCH[1]}
      # A status above 128 means a signal, perhaps because another worker ended; but 130 is Ctrl-C and 143 is `stop`.
      ended=0 restarts=$((restarts + 1))
      ((found > 128 && found != 130 && found != 143 && restarts <= 3)) ||
        die "the training ended with status $found; $NAME costs money: follow shows its log; then run or delete" "$found"
      say "the training ended with status $found: starting it again"
      stop && run
      ;;
    *running*) ended=0 ;;
    'ended 0'*)
      say 'the training is done'
      if [[ $delete_when_done ]]; then delete || return; else say "$NAME costs money until you delete it"; fi
      exit
      ;;
  esac
}

time_is_up() {
  say "$max_hours hours are over: stopping the training"
  stop || say 'it could not be stopped; the steps since its last checkpoint are lost if the machines are deleted'
  local failures=0 found
  if [[ $delete_when_done ]]; then
    until found=$(delete 2>&1) || [[ $found == *' NOT_FOUND: '* ]]; do
      say "$found" >&2
      failures=$((failures + 1))
      ((failures < PATIENCE)) || die "$NAME could not be deleted and costs money: delete it" 1
      sleep "$POLL"
    done
  else
    say "$NAME costs money until you delete it"
  fi
  exit 124
}

keep() {
  local state='' ended=0 restarts=0 failures=0 failure
  [[ ! $dry_run ]] || { describe && look && resume && return; }
  # A `keep` that was stopped between delete and create leaves no machines. Machines that disappear later were deleted
  # by somebody who does not want to pay for new ones.
  while state=$(describe 2>&1); [[ $state == *DELETING ]]; do sleep "$POLL"; done
  if [[ $state == *' NOT_FOUND: '* ]]; then
    say "$NAME does not exist: creating it"
    state=DELETED
  else
    state=''
  fi
  while :; do
    [[ ! $max_hours ]] || ((SECONDS < max_hours * HOUR)) || time_is_up
    failure=0
    tend || failure=$?
    failures=$((failure ? failures + 1 : 0))
    ((failures < PATIENCE)) || die "$failures attempts in a row failed, the last one as shown above" "$failure"
    sleep "$POLL"
  done
}

verb=${1:-}
case $verb in
  -h | --help) echo "$usage" && exit ;;
  create) needs=(machines) ;;
  run) needs=(training) ;;
  resume | keep) needs=(machines training) ;;
  install) needs=(bucket) ;;
  copy | follow | status | stop | delete) needs=() ;;
  *) die "${verb:-nothing} is not a verb: give create, copy, install, run, follow, status, stop, resume, keep, delete" ;;
esac
while shift && (($#)); do
  value=${1#*=}
  case $1 in
    --name=* | --zone=* | --project=* | --accelerator-type=* | --runtime-version=* | --config=* | --workdir=*)
      variable=$(tr a-z- A-Z_ <<<"${1%%=*}")
      printf -v "${variable#__}" %s "$value"
      ;;
    --worker=*) worker=$value ;;
    --max-hours=*)
      [[ $value =~ ^[1-9][0-9]*$ ]] || die "--max-hours is $value: give a whole number of hours"
      max_hours=$value
      ;;
    --tfds=*)
      [[ $value == gs://?* ]] || die "--tfds is $value: give the folder in a bucket, gs://BUCKET/FOLDER"
      tfds=$value
      ;;
    --create-flag=*) create_flags+=("$value") ;;
    --data=*)
      [[ -e $value && $value != /* && $value != *..* ]] ||
        die "--data is $value: give a file or folder inside this repository, by its path from the root"
      data+=("$value")
      ;;
    --on-demand) spot='' ;;
    --delete-when-done) delete_when_done=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      extra=("${@:2}")
      break
      ;;
    *) die "$1 is not an option: see --help; write --flag=VALUE as one word, and arguments of train.py after --" ;;
  esac
done
need NAME ZONE PROJECT
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name is $NAME: use a-z, 0-9 and hyphens, beginning with a letter"
for what in ${needs[@]+"${needs[@]}"}; do "need_$what"; done
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die 'gcloud is not installed: see cloud.google.com/sdk/docs/install, or print the commands with --dry-run'
archive=build/$NAME.tar.gz
"$verb"
