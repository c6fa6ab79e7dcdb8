#!/usr/bin/env bash
# Installs what the tests here run under: a real Slurm and Open MPI, from Debian or Ubuntu.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -yq --no-install-recommends slurm-wlm munge openmpi-bin
