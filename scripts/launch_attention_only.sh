#!/usr/bin/env bash
# Attention of Llama-3.1-8B, layers 1-31, without SAEs. Options go to zarrtrace extract:
# scripts/launch_attention_only.sh --gpu 1 --layer-start 20 --layer-end 31
# All output also goes to a log beside the run.
set -euo pipefail
export OUTPUT=${OUTPUT:-runs/llama_attention}
exec "$(dirname "$0")/launch_full.sh" --no-features "$@"
