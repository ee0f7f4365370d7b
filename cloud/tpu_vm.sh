#!/usr/bin/env bash
# Takes a config and a folder in a bucket, and leaves a training on Cloud TPU VMs that goes on after a pre-emption.
#
# docs/cloud.md tells more. Read from: verbs and flags, `gcloud compute tpus ... --help` of gcloud 528; states,
# docs.cloud.google.com/tpu/docs/queued-resources; runtime versions, docs.cloud.google.com/tpu/docs/runtimes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2016
usage='cloud/tpu_vm.sh VERB [OPTION ...] [-- ARGUMENT OF train.py ...]

  create   asks for TPU VMs and waits until they are there     copy     brings this repository to all workers
  install  makes .venv on all workers                          run      starts the training on all workers
  follow   shows the log of a worker                           status   tells how the machines and the training are
  stop     lets the training write a checkpoint and end        delete   gives the machines back, which ends the bill
  resume   delete, create, copy, install and run               keep     does so after each pre-emption, to the end

  --name= --zone= --project= --accelerator-type= --runtime-version= --config= --workdir=, or the variables NAME, ZONE,
  PROJECT, ACCELERATOR_TYPE, RUNTIME_VERSION (it has a default), CONFIG, WORKDIR
  --on-demand            not spot machines
  --create-flag=FLAG     one more flag of `gcloud compute tpus queued-resources create`; may be repeated
  --data=PATH            text that is copied, though git does not know it; may be repeated
  --worker=N             whose log is followed, 0 if not given, or all
  --delete-when-done     keep deletes the machines when the training is done
  --dry-run              prints the commands, and runs none'

say() { echo "tpu_vm.sh: $1"; }

die() { # MESSAGE [STATUS]
  say "$1" >&2
  exit "${2:-2}"
}

: "${NAME:=}" "${ZONE:=}" "${PROJECT:=}" "${ACCELERATOR_TYPE:=}" "${RUNTIME_VERSION:=}" "${CONFIG:=}" "${WORKDIR:=}"
# Seconds between two looks, and how many in a row may fail, or find the training ended, before `keep` believes it: a
# training shows before the state does that its machines are being taken away.
: "${POLL:=60}" "${PATIENCE:=5}"
# Empty arrays are written ${a[@]+"${a[@]}"}: bash before 4.4, as on macOS, takes them for unset.
data=() extra=() create_flags=() spot=--spot worker=0 dry_run='' delete_when_done=''

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
    v5e-*) die "$ACCELERATOR_TYPE is the product's name: give --accelerator-type=v5litepod-${ACCELERATOR_TYPE#v5e-}" ;;
    tpu7x*) die "$ACCELERATOR_TYPE is not in the Cloud TPU API: use GKE or Compute Engine, or give another type" ;;
    *) die "no runtime version is known for $ACCELERATOR_TYPE: correct it, or give --runtime-version=..." ;;
  esac
}

need_training() {
  need CONFIG WORKDIR
  [[ $WORKDIR == gs://?* ]] || die "--workdir is $WORKDIR: all workers share it, give gs://BUCKET/FOLDER"
  git ls-files --error-unmatch -- "${CONFIG%%:*}" >/dev/null 2>&1 ||
    die "--config is $CONFIG, a file that git does not know, so it is not copied: give one of configs/, or git add it"
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

# The verbs. In what `keep` tries `set -e` is off: steps are joined by && or return.

describe() { call queued-resources describe "$NAME" '--format=value(state.state)'; }

request() {
  call queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$RUNTIME_VERSION" ${spot:+"$spot"} ${create_flags[@]+"${create_flags[@]}"}
}

see() { # into `state`, of the caller; a change is told
  local last=$state
  state=$(describe) || return
  [[ $state == "$last" ]] || say "$NAME is $state"
}

create() {
  local state=''
  request || return
  [[ ! $dry_run ]] || { describe && return; }
  while see || return; [[ $state != ACTIVE ]]; do
    [[ $state != FAILED && $state != SUSPENDED ]] || die "delete $NAME and create it again, or let keep do so" 1
    sleep "$POLL"
  done
}

pack() { # the files that git knows, as they are now, their revision, which a training notes there, and --data
  local path revision=build/revision
  [[ ! $dry_run ]] || return 0
  mkdir -p build && { git describe --always --dirty --abbrev=12 '--exclude=*' 2>/dev/null || :; } >$revision &&
    { git ls-files -z && for path in $revision ${data[@]+"${data[@]}"}; do printf '%s\0' "$path"; done; } |
    tar --null -T - -czf "$archive"
}

send() { # what was packed last, so that what is edited meanwhile does not slip into a training that goes on
  [[ -e $archive ]] || pack || return
  call tpu-vm scp "$archive" "$NAME:" --worker=all &&
    remote all "mkdir -p $NAME && tar -xzf $NAME.tar.gz -C $NAME"
}

copy() { pack && send; }

install() { on all install; }

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

tend() { # one look of `keep`, whose variables it works on, and what it asks for
  local found
  if [[ $state == DELETED ]]; then
    request && state='' ended=0 restarts=0
    return
  fi
  see || return
  case $state in
    # Of the workers that ended, the one that did so by a mistake comes first, since its status is the lowest.
    ACTIVE) found=$(look | sed 's/.*: //; s/^gone$/ended 137/' | sort -k 2n) || return ;;
    FAILED | SUSPENDED)
      delete && state=DELETED
      return
      ;;
    *) return 0 ;;
  esac
  case $found in # the worker that is least far decides
    *empty* | *copied*) send && install && run ;;
    *installed*) run ;; # those that run already refuse, and the others join them
    *'ended '[1-9]*)
      ended=$((ended + 1))
      ((ended >= PATIENCE)) || return 0
      [[ $found =~ 'ended '([1-9][0-9]*) ]]
      found=${BASH_REMATCH[1]}
      # Above 128 a signal ended it, which may come of another worker's end; but 130 is Ctrl-C and 143 is `stop`.
      ended=0 restarts=$((restarts + 1))
      ((found > 128 && found != 130 && found != 143 && restarts <= 3)) ||
        die "the training ended with status $found; $NAME costs money: see follow, then run or delete" "$found"
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

keep() {
  local state='' ended=0 restarts=0 failures=0 failure
  [[ ! $dry_run ]] || { describe && look && resume && return; }
  # A `keep` that was stopped between delete and create leaves no machines. But those that go later somebody deleted,
  # who does not want to pay for others.
  while state=$(describe 2>&1); [[ $state == *DELETING ]]; do sleep "$POLL"; done
  if [[ $state == *' NOT_FOUND: '* ]]; then
    say "$NAME is not there: creating it"
    state=DELETED
  else
    state=''
  fi
  while :; do
    failure=0
    tend || failure=$?
    failures=$((failure ? failures + 1 : 0))
    ((failures < PATIENCE)) || die "$failures tries in a row failed, the last as you see above" "$failure"
    sleep "$POLL"
  done
}

verb=${1:-}
case $verb in
  -h | --help) echo "$usage" && exit ;;
  create) needs=(machines) ;;
  run) needs=(training) ;;
  resume | keep) needs=(machines training) ;;
  copy | install | follow | status | stop | delete) needs=() ;;
  *) die "${verb:-nothing} is no verb: give create, copy, install, run, follow, status, stop, resume, keep or delete" ;;
esac
while shift && (($#)); do
  value=${1#*=}
  case $1 in
    --name=* | --zone=* | --project=* | --accelerator-type=* | --runtime-version=* | --config=* | --workdir=*)
      variable=$(tr a-z- A-Z_ <<<"${1%%=*}")
      printf -v "${variable#__}" %s "$value"
      ;;
    --worker=*) worker=$value ;;
    --create-flag=*) create_flags+=("$value") ;;
    --data=*)
      [[ -e $value && $value != /* && $value != *..* ]] ||
        die "--data is $value: give a file or folder of this repository, named from its root as the config names it"
      data+=("$value")
      ;;
    --on-demand) spot='' ;;
    --delete-when-done) delete_when_done=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      extra=("${@:2}")
      break
      ;;
    *) die "$1 is no option: see --help, --flag=VALUE is one word, and what is for train.py comes behind --" ;;
  esac
done
need NAME ZONE PROJECT
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name is $NAME: take a-z, 0-9 and hyphens, a letter first"
for what in ${needs[@]+"${needs[@]}"}; do "need_$what"; done
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die 'gcloud is not there: see cloud.google.com/sdk/docs/install, or print the commands with --dry-run'
archive=build/$NAME.tar.gz
[[ $verb != create || $dry_run ]] || rm -f "$archive" # of a training before this one
"$verb"
