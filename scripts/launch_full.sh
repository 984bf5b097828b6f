#!/usr/bin/env bash
# Attention and SAE features of Llama-3.1-8B, layers 1-31. Options go to zarrtrace extract, and
# override: scripts/launch_full.sh --gpu 1 --layer-start 20 --layer-end 31
# All output also goes to a log beside the run.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
output=${OUTPUT:-runs/llama}
given=(--model "${MODEL:-meta-llama/Llama-3.1-8B}")
if [[ " $* " != *" --no-features "* ]]; then
    saes=(--sae-release "${SAE_RELEASE:-llama_scope_lxr_8x}")
    [ -n "${SAE_PATH:-}" ] && saes=(--sae-path "$SAE_PATH")
    given+=("${saes[@]}")
fi
[[ " $* " != *" --layer"* ]] && given+=(--layers 1-31)
[[ " $* " != *" --scenarios"* && " $* " != *" --prompt"* ]] && given+=(--scenarios slot-machine)
mkdir -p "$(dirname "$output")"
log="${output%/}_$(date +%Y%m%d_%H%M%S).log"
echo "logging to $log"
zarrtrace extract "${given[@]}" -o "$output" "$@" 2>&1 | tee "$log"
