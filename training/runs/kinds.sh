#!/usr/bin/env bash
# From the model of default.sh to a model of all kinds of pictures: 1.0 hours on one core of a CPU with bfloat16 instructions.
#   training/runs/kinds.sh MODEL WORK OUT
# MODEL: result of default.sh. WORK: its folder, with photographs. OUT: folder to write. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 work=$2 out=$3

[ -d "$work/drawings" ] || python training/prepare_drawings.py "$work/drawings" --photos "$work/photos"

# Drawings beside photographs, which are linked in several times, so that drawings are a smaller fraction.
mix() {
    [ ! -d "$work/$1" ] || return 0
    rm -rf "$work/$1.partial" && mkdir "$work/$1.partial"
    cp -rl "$work/drawings/train" "$work/$1.partial/drawings"
    for copy in $(seq "$2"); do cp -rl "$work/photos/train" "$work/$1.partial/photos-$copy"; done
    mv "$work/$1.partial" "$work/$1"
}
mix mixture_40 6  # 39 % drawings
mix mixture_20 15  # 20 % drawings
mix mixture_10 34  # 10 % drawings

# SOAP learns more per step than AdamW.
train() {
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
        --synthetic_fraction 0.1 --dataloader_num_workers 0 --scales 0.25 0.5 1 2 --scale_probabilities 0.1 0.12 0.76 0.02 \
        --resolution 256 --train_batch_size 2 --resize_range 0.4 1 --optimizer soap --adam_beta1 0.95 --adam_weight_decay 0 \
        --use_ema --mixed_precision bf16 --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest "$@"
}

# New codes for photographs and drawings, on crops of 32 to 256 pixels.
train --output_dir "$work/kinds" --pretrained_model_name_or_path "$model" --train_data_dir "$work/mixture_40" \
    --crop_sizes 256 256 128 128 64 32 --max_train_steps 1700 --learning_rate 3e-4 --lr_warmup_steps 50 --kmeans_steps 1 --kmeans_batches 60 \
    --codebook_decay 0.99 --dead_code_reset_steps 300 --ema_decay 0.998

# Codes for flat colours take the place of the rarest. More photographs and larger crops.
[ -d "$work/colours" ] || python training/add_colours.py "$work/kinds" "$work/mixture_20" "$work/colours"
train --output_dir "$work/more_photos" --pretrained_model_name_or_path "$work/colours" --train_data_dir "$work/mixture_20" \
    --crop_sizes 256 256 256 256 128 128 64 32 --max_train_steps 1200 --learning_rate 2e-4 --lr_warmup_steps 50 --codebook_decay 0.998 \
    --ema_decay 0.998
train --output_dir "$work/most_photos" --pretrained_model_name_or_path "$work/more_photos" --train_data_dir "$work/mixture_10" \
    --crop_sizes 256 256 256 256 128 128 64 32 --max_train_steps 450 --learning_rate 1.5e-4 --lr_warmup_steps 20 --codebook_decay 0.998 \
    --ema_decay 0.99

python - "$work/most_photos" "$out" <<'PY'
import sys
import torch
from svqvae_hf import SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default", sample_size=256)
model.save_pretrained(sys.argv[2])
PY
