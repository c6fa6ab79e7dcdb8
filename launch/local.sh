#!/usr/bin/env bash
# N processes on this machine.
set -euo pipefail

if [[ ! ${1-} =~ ^[0-9]+$ ]]; then
  [[ ${1-} == --help ]] || exec >&2
  echo 'usage: launch/local.sh N [--restarts R] [--dry-run] -- E2P-ARGUMENTS

Runs e2p as N processes on this machine, the i-th with its i-th GPU; see launch/run.sh --help.
On CPU, XLA_FLAGS=--xla_force_host_platform_device_count=D gives each process D devices; with fewer cores than devices
set PJRT_NPROC to their number too, or collectives wait for each other.'
  [[ ${1-} == --help ]] && exit 0 || exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" --processes "$@"
