#!/usr/bin/env bash
# The context model of the bundled model, which compresses its ids: 20 minutes on a shared core of a CPU.
#   training/bundled/context.sh MODEL WORK
# MODEL: folder of the model. WORK: folder of default.sh, with photographs and drawings. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 work=$2

# Every sixteenth drawing, so that photographs are four fifths of the images.
if [ ! -d "$work/some_drawings" ]; then
    rm -rf "$work/some_drawings.partial" && mkdir "$work/some_drawings.partial"
    find "$work/drawings/train" -type f | sort | awk 'NR % 16 == 1' | xargs cp -lt "$work/some_drawings.partial"
    mv "$work/some_drawings.partial" "$work/some_drawings"
fi
tokenize() { svqvae tokenize "$1" --output "$work/tokens/$2" --model "$model" --scales 0.25 0.5 1; }
tokenize "$work/photos/train" photos
tokenize "$work/some_drawings" drawings
tokenize "$work/photos/validation" validation
python training/train_context.py "$model" "$work/tokens/photos" "$work/tokens/drawings" --held_out "$work/tokens/validation"
