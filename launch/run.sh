#!/usr/bin/env bash
# What every host runs, on every platform: starts e2p, forwards signals, starts it again where that helps.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/run.sh [--processes N] [--restarts R] [--dry-run] [--help] -- E2P-ARGUMENTS

Runs `e2p E2P-ARGUMENTS` on this host. Where the host is one of several, its processes are found by e2p itself: from
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm, Open MPI, a TPU pod or Kubernetes.

  --processes N  start N processes that form the whole run, on this host alone, the i-th with its i-th GPU
  --restarts R   run again up to R times after a preemption or a lost process (exit code 75, or killed by a signal);
                 never after an error of the command (1, 2). Default 0: the scheduler above does it
  --dry-run      print the commands and start nothing

XLA is given flags for NVIDIA or TPU (--dry-run shows them); what XLA_FLAGS and LIBTPU_INIT_ARGS hold prevails.
SIGTERM and SIGINT go to e2p, which saves and leaves with 75; after them nothing is run again.
E2P names another command than `e2p`, such as "python -m e2p_jax".
EOF
}

fail() {
  echo "launch/run.sh: $1" >&2
  exit 2
}

processes='' restarts=0 dry_run=false
while (($#)); do
  case $1 in
    --processes | --restarts)
      [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 needs a number"
      [[ $1 == --processes ]] && processes=$2 || restarts=$2
      shift 2
      ;;
    --dry-run) dry_run=true && shift ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see --help, and put e2p's own arguments after --" ;;
  esac
done
(($#)) || fail "nothing to run; give e2p's arguments after --"
[[ $processes != 0 ]] || fail "--processes must be positive"
read -ra e2p <<<"${E2P:-e2p}"

# A checkpoint of a large model opens many files at once.
ulimit -Sn "$(ulimit -Hn)"
export PYTHONUNBUFFERED=1
# Of a GPU's memory jax takes 0.75 for its arrays; nothing else runs there. What `e2p plan` counts with, too.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# What XLA is told; what XLA_FLAGS and LIBTPU_INIT_ARGS hold already comes last, and so prevails.
on_nvidia=(
  # A layer's weights are gathered, and its sums sent, while another multiplies. By now XLA's own default.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # The scan over layers goes by twos: a gather may begin in the layer before the one that wants it.
  --xla_gpu_enable_while_loop_double_buffering=true
)
on_tpu=(
  # Gathers go on in steps between those of the products that do not wait for them.
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  # Gradients are summed between slices while the backward pass goes on, those of different sizes, too.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
export LIBTPU_INIT_ARGS="${on_tpu[*]} ${LIBTPU_INIT_ARGS-}" # libtpu alone reads them
# Every XLA reads these, and ends at one that it does not know.
if [[ ${JAX_PLATFORMS-} == @(cuda|gpu)* || (-z ${JAX_PLATFORMS-} && -e /dev/nvidiactl) ]]; then
  export XLA_FLAGS="${on_nvidia[*]} ${XLA_FLAGS-}"
fi

places() { # one line of environment for every process
  if [[ -z $processes ]]; then
    echo
    return
  fi
  local port=PORT i
  $dry_run || port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  for ((i = 0; i < processes; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i"
  done
}

if $dry_run; then
  for variable in XLA_FLAGS LIBTPU_INIT_ARGS; do echo "# $variable=${!variable-}"; done
  while read -r place; do
    printf '%s' "${place:+$place }"
    printf '%q ' "${e2p[@]}" "$@"
    echo
  done < <(places)
  echo "# again after 75 or a signal, up to $restarts times"
  exit 0
fi

command -v "${e2p[0]}" >/dev/null ||
  fail "${e2p[0]} not found; pip install -r requirements-tpu.txt (TPU), -e '.[cuda13]' (GPU) or -e . (CPU) on this host"

if [[ -n $processes ]]; then # known to these processes alone
  export E2P_TOKEN="${E2P_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
fi

pids=() told=''
forward() {
  told=yes
  kill -"$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

run_once() { # leaves in $code that of an error if there was one, else that of a process that is to run again
  local place pid ended left
  pids=() code=0
  while read -r place; do
    # shellcheck disable=SC2086  # a list of assignments
    env $place "${e2p[@]}" "$@" &
    pids+=($!)
  done < <(places)
  while ((${#pids[@]})); do
    wait -n "${pids[@]}" || true # until one of them ends, or a signal comes
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      ended=0
      wait "$pid" || ended=$?
      if ((code == 0 || (ended && ended < 75))); then code=$ended; fi
    done
    pids=("${left[@]}")
    if ((code && ${#pids[@]})); then # they end by themselves, unless they had not met yet
      sleep 5
      kill -TERM "${pids[@]}" 2>/dev/null || true
    fi
  done
}

for ((run = 0; ; run++)); do
  run_once "$@"
  if ((code == 75 || code > 128)) && ((run < restarts)) && [[ -z $told ]]; then
    echo "launch/run.sh: exit code $code; restart $((run + 1)) of $restarts" >&2
    continue
  fi
  exit "$code"
done
