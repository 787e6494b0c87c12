#!/usr/bin/env bash
# The tests on a GPU, and tables of speed, memory, training steps and generation in outputs/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "There is no GPU that PyTorch can use, so nothing was run."
    exit
fi
pytest
for name in speed growth training llamagen; do
    python "benchmarks/$name.py" --device cuda --output "outputs/gpu/$name.json"
done
python benchmarks/token_sets.py docs/images --sides 256 --workers 4 16 --count 512 --device cuda --output outputs/gpu/token_sets.json
