#!/usr/bin/env bash
# A TPU pod slice as a queued resource of Google Cloud: create, run, logs, delete.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_pod.sh create|run|logs|delete --name NAME --zone ZONE [OPTIONS] [--dry-run] [--help]
       launch/tpu_pod.sh run ... -- E2P-ARGUMENTS

  create  ask for the slice, and wait until it is there
  run     copy the committed state of this checkout to every host, install it, and run launch/run.sh on all of them
          until it ends; --workdir must be gs://BUCKET/NAME or on storage that all hosts share
  logs    follow the log of the first host (--worker I for another)
  delete  give the slice back, whatever runs on it

  --accelerator TYPE  such as v5litepod-16, v5p-64, v6e-16             (create; run, to create again)
  --runtime VERSION   such as v2-alpha-tpuv5-lite, v2-alpha-tpuv6e     (create; run, to create again)
  --spot              cheaper, and may be taken away; on-demand without it
  --restarts R        run: up to R times, start again what was preempted or lost a process, on a new slice where the
                      old one was taken away. Default 0
  --worker I          logs: host number. Default 0
  --dry-run           print the commands and run none
EOF
}

fail() {
  echo "launch/tpu_pod.sh: $1" >&2
  exit 2
}

command=${1-}
case $command in
  create | run | logs | delete) shift ;;
  --help) usage && exit 0 ;;
  *) fail "give create, run, logs or delete; see --help" ;;
esac
name='' zone='' accelerator='' runtime='' spot=() restarts=0 worker=0 dry_run=false
while (($#)); do
  case $1 in
    --name | --zone | --accelerator | --runtime | --restarts | --worker)
      [[ -n ${2-} ]] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=(--spot) && shift ;;
    --dry-run) dry_run=true && shift ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see --help, and put e2p's own arguments after --" ;;
  esac
done
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
[[ $restarts =~ ^[0-9]+$ && $worker =~ ^[0-9]+$ ]] || fail "--restarts and --worker take numbers"
$dry_run || command -v gcloud >/dev/null || fail "gcloud not found; install the Google Cloud CLI and log in"

say_and_do() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpus=(gcloud compute tpus)
on_all() { say_and_do "${tpus[@]}" tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

state() {
  "${tpus[@]}" queued-resources describe "$name" --zone "$zone" --format 'value(state.state)'
}

create() {
  [[ -n $accelerator && -n $runtime ]] || fail "--accelerator and --runtime are needed to create a slice"
  say_and_do "${tpus[@]}" queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$accelerator" --runtime-version "$runtime" "${spot[@]}"
  if $dry_run; then
    echo "# until its state is ACTIVE"
    return
  fi
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    [[ $now != FAILED && $now != SUSPENDED ]] || fail "$name is $now; see: gcloud compute tpus queued-resources describe"
    sleep 30
  done
}

delete() { say_and_do "${tpus[@]}" queued-resources delete "$name" --zone "$zone" --force --quiet; }

install() {
  local archive=/tmp/$name.tar.gz
  say_and_do git archive --output "$archive" HEAD
  say_and_do "${tpus[@]}" tpu-vm scp "$archive" "$name:e2p.tar.gz" --zone "$zone" --worker all
  # The hosts' own Python may be 3.10: uv brings a newer one.
  on_all "mkdir -p e2p && tar xzf e2p.tar.gz -C e2p && cd e2p && curl -LsSf https://astral.sh/uv/install.sh | sh && \
uv=~/.local/bin/uv && \$uv venv -q --allow-existing --python 3.12 .venv && \
\$uv pip install -q --python .venv -r requirements-tpu.txt"
}

case $command in
  create) create ;;
  delete) delete ;;
  logs)
    say_and_do "${tpus[@]}" tpu-vm ssh "$name" --zone "$zone" --worker "$worker" --command "tail -n +1 -F e2p/e2p.log"
    ;;
  run)
    (($#)) || fail "nothing to run; give e2p's arguments after --"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    start="cd e2p && PATH=\$PWD/.venv/bin:\$PATH launch/run.sh --restarts $restarts -- $(printf '%q ' "$@")>> e2p.log 2>&1"
    for ((done = 0; ; done++)); do
      install
      code=0
      on_all "$start" || code=$?
      if $dry_run; then
        echo "# where the slice was taken away, up to $restarts times: delete, create, and all of this again"
        exit 0
      fi
      if ((code == 0 || done == restarts)) || [[ $(state) == ACTIVE ]]; then exit "$code"; fi
      echo "launch/tpu_pod.sh: the slice was taken away; restart $((done + 1)) of $restarts" >&2
      delete
      create
    done
    ;;
esac
