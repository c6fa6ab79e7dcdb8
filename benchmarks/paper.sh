#!/usr/bin/env bash
# The paper's setting (arXiv 2505.17051, Persona-Chat and PENS), for whoever has the weights and the data. Not run with
# such weights yet; run from end to end with the embedded backbone, docs/results.md says how.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/paper.sh [--dry-run] BACKBONE PERSONA_CHAT PENS ENCODER OUT [FLAG ...]

  BACKBONE      Hugging Face directory or hub id of a Llama-3.2-class model, e.g. meta-llama/Llama-3.2-1B-Instruct
  PERSONA_CHAT  directory of the full ParlAI release: train_self_original.txt, valid_self_original.txt
  PENS          directory of news.tsv, train.tsv, valid.tsv, personalized_test.tsv
  ENCODER       directory or hub id of a text encoder, e.g. sentence-transformers/all-MiniLM-L6-v2
  OUT           directory to write: data, tables, runs, reports
  FLAG          further flags of `e2p compare`, which win over those below: --train.steps 100 --seeds 0, say

  --dry-run     print the commands and run none

Three seeds of each data set; a stopped command goes on where it was when the script is run again. Steps, rows and learning
rates are starting points: choose them on `dev`, never on a reported split.
TEXT
}

run=()
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --dry-run) run=(echo); shift ;;
esac
if [ $# -lt 5 ]; then usage >&2; exit 2; fi
backbone=$1 persona_chat=$2 pens=$3 encoder=$4 out=$5
shift 5

shared=(--conditions none shuffled mean static e2p text e2p+text lora --seeds 0 1 2
  --backbone.path "$backbone" --backbone.remat --train.learning_rate 3e-4)

prepare_and_embed() { # name, directory of original files, prepared directory below data/
  "${run[@]}" e2p prepare "$1" --manual-dir "$2" --data-dir "$out/data"
  "${run[@]}" e2p embed --data "$out/data/$3" --encoder "$encoder" --out "$out/vectors/$1"
}

compare_and_report() { # name, prepared directory below data/, flags of `e2p compare`
  local name=$1 data=$2
  shift 2
  "${run[@]}" e2p compare "$name" --workdir "$out/runs/$name" --data.path "$out/data/$data" \
    --data.embeddings "$out/vectors/$name" "${shared[@]}" "$@"
  "${run[@]}" e2p report "$out/runs/$name" --out "$out/report-$name"
}

prepare_and_embed persona_chat "$persona_chat" persona_chat/self_original/1.0.0
prepare_and_embed pens "$pens" pens/headlines/1.0.0
compare_and_report persona_chat persona_chat/self_original/1.0.0 --data.seq_len 1024 --train.rows 32 \
  --train.steps 3000 --train.eval_every 250 --evaluate.measures ranking users texts --evaluate.max_records 1000 "$@"
# An article of 300 words and 50 headlines are more than 1,024 tokens.
compare_and_report pens pens/headlines/1.0.0 --data.seq_len 2048 --train.rows 16 \
  --train.steps 10000 --train.eval_every 1000 --evaluate.measures texts --evaluate.max_records 0 "$@"
