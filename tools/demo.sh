#!/usr/bin/env bash
# The main job on real text, offline, in minutes on two cores: raw text -> tokenizer -> shards ->
# pretraining -> evaluation -> text in English and Chinese; then more Chinese pieces, and on from there.
# Sets up its own environment first.
#   bash tools/demo.sh                 English documentation and the shipped Chinese sample
#   bash tools/demo.sh --text PATH     your own text instead (files or folders, repeatable)
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec llm-jax demo "$@"
