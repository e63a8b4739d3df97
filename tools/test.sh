#!/usr/bin/env bash
# Runs the tests, after setting up what they need.
#   bash tools/test.sh                 the default suite, minutes on two cores
#   bash tools/test.sh --all           slow and multi-process ones too
#   bash tools/test.sh --oracle        live comparison with PyTorch, transformers, peft, rouge-score and lingua (installs them)
#   bash tools/test.sh --beam          the Apache Beam pipeline, in an environment of its own (.venv-beam)
#   bash tools/test.sh tests/data -k fill   anything else goes to pytest
EXTRAS=dev
if [ "${1:-}" = --beam ]; then EXTRAS=dev,beam VENV=${VENV:-.venv-beam}; fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in
  --beam) shift && set -- "$root/tests/data/cluster" "$@" ;;
  --all) shift && set -- -m "not tpu and not gpu and not oracle" "$@" ;;
  --oracle)
    shift && set -- -m oracle "$@"
    # the CPU wheel of this very version, where one is at hand, saves gigabytes
    python -c 'import torch, transformers' 2>/dev/null ||
      python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers>=5,<6"
    python -c 'import peft, rouge_score, lingua' 2>/dev/null ||
      python -m pip install --quiet --disable-pip-version-check "peft==0.21.2" "rouge-score==0.1.2" "lingua-language-detector==2.1.1"
    ;;
esac
cd "$root"
# two at a time, whole files each, so that fixtures compile once
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
