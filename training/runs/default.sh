#!/usr/bin/env bash
# The bundled model, svqvae_hf/pretrained: about an hour on one core of a CPU with bfloat16 instructions.
#   training/runs/default.sh CID22_TRAIN WORK
# CID22_TRAIN: folder of the CID22 training images (Cloudinary, CC BY-SA 4.0). WORK: folder for photographs and checkpoints.
# Run it again to go on from the latest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
cid22=$1 work=$2

[ -d "$work/photos" ] || python training/prepare_photos.py "$work/photos" --list training/free_photos.tsv --folder "$cid22"

accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
    --train_data_dir "$work/photos" \
    --model_config_name_or_path training/runs/default_config.json \
    --output_dir "$work/default" \
    --resolution 256 --crop_sizes 64 128 --train_batch_size 1 --num_scales 2 \
    --max_train_steps 9000 --kmeans_steps 3000 7000 --kmeans_batches 256 --vq_loss_weight 0.1 \
    --learning_rate 5e-4 --lr_warmup_steps 200 --mixed_precision bf16 \
    --checkpointing_steps 500 --dataloader_num_workers 1 --resume_from_checkpoint latest

# Half precision for the networks halves the size; the codebook stays in float32.
python - "$work/default" <<'PY'
import sys
import torch
from svqvae_hf import DEFAULT_MODEL, SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default")
model.save_pretrained(DEFAULT_MODEL)
PY
