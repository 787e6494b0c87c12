#!/usr/bin/env bash
# The bundled model, svqvae_hf/pretrained: about an hour and a half on one core of a CPU with bfloat16 instructions.
#   training/runs/default.sh CID22_TRAIN WORK
# CID22_TRAIN: folder of the CID22 training images (Cloudinary, CC BY-SA 4.0). WORK: folder for photographs and checkpoints.
# Run it again to resume from the latest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
cid22=$1 work=$2

[ -d "$work/photos" ] || python training/prepare_photos.py "$work/photos" --list training/free_photos.tsv --folder "$cid22"

train() {
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
        --train_data_dir "$work/photos/train" --validation_data_dir "$work/photos/validation" --num_validation_images 36 \
        --adam_weight_decay 0.01 --spread_weight 0.003 --mixed_precision bf16 --dataloader_num_workers 1 \
        --checkpointing_steps 500 --resume_from_checkpoint latest "$@"
}

# Not quantised, on small crops; k-means sets the codebook at the end.
train --output_dir "$work/start" --model_config_name_or_path training/runs/default_config.json \
    --resolution 64 --train_batch_size 16 --scales 1 --validation_scales 1 \
    --max_train_steps 2000 --learning_rate 1e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \
    --kmeans_steps 1999 --kmeans_batches 64 --validation_steps 500

# Quantised, at two scales a step, on mixed crops.
train --output_dir "$work/mixed" --pretrained_model_name_or_path "$work/start" \
    --resolution 256 --crop_sizes 64 128 --train_batch_size 1 --num_scales 2 --commitment_weight 0.1 \
    --max_train_steps 13000 --learning_rate 8e-4 --lr_warmup_steps 100 \
    --kmeans_steps 5000 10000 --kmeans_batches 128 --dead_code_reset_steps 500 --validation_steps 500

# Codes that none of some 130,000 latents uses are reset to latents.
train --output_dir "$work/default" --pretrained_model_name_or_path "$work/mixed" \
    --resolution 256 --crop_sizes 64 128 --train_batch_size 1 --num_scales 2 --commitment_weight 0.1 \
    --max_train_steps 800 --learning_rate 1e-4 --lr_warmup_steps 50 --dead_code_reset_steps 100 --validation_steps 400

# Half precision for the networks halves the size; the codebook stays in float32.
python - "$work/default" <<'PY'
import sys
import torch
from svqvae_hf import DEFAULT_MODEL, SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default")
model.save_pretrained(DEFAULT_MODEL)
PY
