#!/usr/bin/env bash
# Tokenizers of scenes that differ in one option, for the table and the figure of docs/evaluation.md.
#   benchmarks/learnable.sh WORK
# They start from the bundled tokenizer of scenes; for the figures of the page, it was that of commit b997c25.
# WORK: folder for scenes, tokenizers and their tables. About eight minutes of one core each. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1
mkdir -p "$work"

if [ ! -d "$work/scenes" ]; then
    rm -rf "$work/scenes.partial"
    python training/bundled/make_scenes.py "$work/scenes.partial" --count 10000
    mv "$work/scenes.partial" "$work/scenes"
fi

# The bundled tokenizer of scenes, whole and with random ones of its codes, which k-means sets anew.
[ -d "$work/start-1024" ] || python - "$work" <<'PY'
import sys

import torch

from svqvae_hf import SVQVAE

model = SVQVAE.from_pretrained("svqvae_hf/pretrained_scenes/vqvae", dtype=torch.float32)
state = model.state_dict()
codes = state["quantize.embedding.weight"]
for size in (384, 640, 1024):
    chosen = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:size]
    state["quantize.embedding.weight"] = codes if size == len(codes) else codes[chosen]
    resized = SVQVAE.from_config({**model.config, "codebook_size": size, "num_vq_embeddings": size})
    resized.load_state_dict(state)
    resized.save_pretrained(f"{sys.argv[1]}/start-{size}")
PY

measure() { # CODES WEIGHT
    local name=$work/$1-$2 new_codes=()
    [ "$1" = 1024 ] || new_codes=(--kmeans_steps 1 --kmeans_batches 40)
    [ -e "$name/config.json" ] || accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        training/train.py --pretrained_model_name_or_path "$work/start-$1" --train_data_dir "$work/scenes" --output_dir "$name" \
        --resolution 96 --crop_sizes 96 --no_random_flip --per_device_train_batch_size 8 --max_steps 300 --dataloader_num_workers 0 \
        --scales 0.25 0.5 1 --scale_probabilities 0.04 0.08 0.88 --codebook_decay 0.99 "${new_codes[@]}" --causal_weight "$2" \
        --optimizer soap --adam_beta1 0.95 --weight_decay 0 --learning_rate 4e-4 --warmup_steps 30 --use_ema --ema_decay 0.99 \
        --mixed_precision bf16 --save_steps 150 --save_total_limit 1 --resume_from_checkpoint latest
    [ -e "$name.json" ] || python benchmarks/learnable.py "$name" "$work/scenes/train.parquet" --side 96 --threads 1 --output "$name.json"
}
for weight in 0 3e-4 8e-4 2e-3 5e-3; do
    measure 1024 "$weight"
done
measure 640 0
measure 384 0

python - "$work" docs/images/learnable.png <<'PY'
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

work, picture = map(Path, sys.argv[1:])
_, axes = plt.subplots(figsize=(6, 4), dpi=150, layout="constrained")
for label, names in {
    "1,024 codes, --causal_weight": ["1024-0", "1024-3e-4", "1024-8e-4", "1024-2e-3", "1024-5e-3"],
    "fewer codes": ["1024-0", "640-0", "384-0"],
}.items():
    points = []
    for name in names:
        tables = json.loads((work / f"{name}.json").read_text())["tables"]
        (mean,) = (row for row in tables["Bits"] if row["seed"] == "mean")
        points.append((mean["bits per id, step 300"], tables["Crops"][0]["PSNR, dB"]))
    axes.plot(*zip(*points), marker="o", label=label)
    for name, point in zip(names[1:], points[1:]):
        codes, weight = name.split("-", 1)
        axes.annotate(weight if codes == "1024" else codes, point, xytext=(6, -10), textcoords="offset points")
axes.set(xlabel="bits per id that a small transformer needs", ylabel="PSNR, dB")
axes.grid(alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.savefig(picture)
PY
