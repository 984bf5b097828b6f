#!/usr/bin/env bash
# Attention of Llama-3.1-8B, layers 1-31, without SAEs. Options go to zarrtrace extract:
# scripts/launch_attention_only.sh --gpu 1 --layer-start 20 --layer-end 31
# All output also goes to a log beside the run.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
output=${OUTPUT:-runs/llama_attention}
layers=(--layers 1-31)
scenarios=(--scenarios slot-machine)
[[ " $* " == *" --layer"* ]] && layers=()
[[ " $* " == *" --scenarios"* || " $* " == *" --prompt"* ]] && scenarios=()
mkdir -p "$(dirname "$output")"
log="${output%/}_$(date +%Y%m%d_%H%M%S).log"
echo "logging to $log"
zarrtrace extract --model "${MODEL:-meta-llama/Llama-3.1-8B}" --no-features \
    ${layers[@]+"${layers[@]}"} ${scenarios[@]+"${scenarios[@]}"} -o "$output" "$@" \
    2>&1 | tee "$log"
