#!/usr/bin/env bash
# The bundled model, svqvae_hf/pretrained: under five hours on one core of a CPU with bfloat16 instructions.
#   training/runs/default.sh CID22_TRAIN WORK
# CID22_TRAIN: folder of the CID22 training images (Cloudinary, CC BY-SA 4.0). WORK: folder for photographs and checkpoints.
# Run it again to resume from the latest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
cid22=$1 work=$2

[ -d "$work/photos" ] || python training/prepare_photos.py "$work/photos" --list training/free_photos.tsv --folder "$cid22"

train() {
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
        --train_data_dir "$work/photos/train" --synthetic_fraction 0.04 --dataloader_num_workers 0 \
        --scales 0.25 0.5 1 2 --scale_probabilities 0.1 0.12 0.76 0.02 \
        --adam_weight_decay 0 --use_ema --mixed_precision bf16 \
        --validation_data_dir "$work/photos/validation" --num_validation_images 36 --validation_steps 1000 \
        --checkpointing_steps 1000 --checkpoints_total_limit 2 --resume_from_checkpoint latest "$@"
}

# Half precision for the networks halves the size; the codebook stays in float32.
store() {
    python - "$@" <<'PY'
import sys
import torch
from svqvae_hf import SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default", sample_size=256)
model.save_pretrained(sys.argv[2])
PY
}

# From the linear start. Crops of 64 pixels grow to 128 late.
train --output_dir "$work/start" --model_config_name_or_path training/runs/default_config.json --start linear \
    --resolution 128 --crop_sizes 64 --full_crops_from 21500 --train_batch_size 2 --max_train_steps 26000 --learning_rate 6e-4 --lr_warmup_steps 150 \
    --kmeans_steps 1 10400 --kmeans_batches 300 --dead_code_reset_steps 300 --ema_decay 0.999

# Norms see large crops. Codes become the means of their latents.
train --output_dir "$work/large_crops" --pretrained_model_name_or_path "$work/start" \
    --resolution 256 --crop_sizes 128 --train_batch_size 1 --max_train_steps 1000 --learning_rate 1e-4 --lr_warmup_steps 50 \
    --kmeans_steps 1 --kmeans_batches 200 --codebook_decay 0.998 --dead_code_reset_steps 100 --ema_decay 0.998
store "$work/large_crops" "$work/first_release"

# The same crops for longer, at a higher learning rate.
train --output_dir "$work/longer" --pretrained_model_name_or_path "$work/first_release" \
    --resolution 256 --crop_sizes 128 --train_batch_size 1 --max_train_steps 16000 --learning_rate 3e-4 --lr_warmup_steps 200 \
    --codebook_decay 0.998 --dead_code_reset_steps 200 --ema_decay 0.999
store "$work/longer" "$work/second_release"

# Photographs that are shrunk by up to 2.5, for the smaller scales. Larger steps, and longer between resets, so that few codes die.
train --output_dir "$work/default" --pretrained_model_name_or_path "$work/second_release" \
    --resolution 256 --crop_sizes 128 --train_batch_size 2 --resize_range 0.4 1 --max_train_steps 4200 --learning_rate 3e-4 \
    --lr_warmup_steps 200 --codebook_decay 0.998 --dead_code_reset_steps 300 --ema_decay 0.998
store "$work/default" svqvae_hf/pretrained
