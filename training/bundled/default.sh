#!/usr/bin/env bash
# The bundled model, svqvae_hf/pretrained: 4.8 hours on one core of a CPU with bfloat16 instructions.
#   training/bundled/default.sh CID22_TRAIN WORK OUT
# CID22_TRAIN: folder of the CID22 training images (Cloudinary, CC BY-SA 4.0). WORK: folder for images and checkpoints.
# OUT: folder to write. Run it again to resume from the latest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
cid22=$1 work=$2 out=$3

[ -d "$work/photos" ] || python training/bundled/prepare_photos.py "$work/photos" --list training/bundled/free_photos.tsv --folder "$cid22"
[ -d "$work/drawings" ] || python training/bundled/prepare_drawings.py "$work/drawings" --photos "$work/photos"

# Drawings beside photographs, which are linked in several times, so that drawings are a smaller fraction.
mix() {
    [ ! -d "$work/$1" ] || return 0
    rm -rf "$work/$1.partial" && mkdir "$work/$1.partial"
    cp -rl "$work/drawings/train" "$work/$1.partial/drawings"
    for copy in $(seq "$2"); do cp -rl "$work/photos/train" "$work/$1.partial/photos-$copy"; done
    mv "$work/$1.partial" "$work/$1"
}
mix mixture_40 6   # 39 % drawings
mix mixture_20 15  # 20 % drawings

train() {
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
        --synthetic_fraction 0.1 --dataloader_num_workers 0 \
        --scales 0.25 0.5 1 2 --scale_probabilities 0.1 0.12 0.76 0.02 \
        --optimizer soap --adam_beta1 0.95 --weight_decay 0 --use_ema --ema_decay 0.998 --mixed_precision bf16 \
        --validation_data_dir "$work/photos/validation" --num_validation_images 36 --eval_steps 500 \
        --save_steps 250 --save_total_limit 2 --resume_from_checkpoint latest "$@"
}

# From the linear start, on crops of 64 and 128 pixels, which are fast and show the most different content.
train --output_dir "$work/start" --model_config_name_or_path training/configs/model_small.json --start linear \
    --train_data_dir "$work/mixture_20" --resolution 128 --crop_sizes 64 --per_device_train_batch_size 4 --max_steps 3000 \
    --learning_rate 1e-3 --lr_scheduler_type constant_with_warmup --warmup_steps 100 \
    --kmeans_steps 1 1200 --kmeans_batches 60 --dead_code_reset_steps 300

# Norms see crops of all sizes, from images shrunk by up to 2.5.
continue_from() {
    train --pretrained_model_name_or_path "$work/$1" --output_dir "$work/$2" --train_data_dir "$work/$3" \
        --resolution 256 --per_device_train_batch_size 2 --resize_range 0.4 1 --warmup_steps 50 "${@:4}"
}
# New codes: the means of their latents, first by k-means and then by a moving average.
new_codes() {
    continue_from "${@:1:3}" --crop_sizes 256 256 128 128 64 32 --lr_scheduler_type constant_with_warmup \
        --kmeans_steps 1 --kmeans_batches 60 --codebook_decay 0.99 --dead_code_reset_steps 300 "${@:4}"
}
# Codes for flat colours take the place of the rarest.
add_colours() {
    [ -d "$work/$2" ] || python training/bundled/add_colours.py "$work/$1" "$work/mixture_20" "$work/$2"
}
# The learning rate falls to 0.
anneal() {
    continue_from "$1" "$2" mixture_20 --crop_sizes 256 256 256 128 128 64 32 --learning_rate 5e-4 --codebook_decay 0.998 "${@:3}"
}

new_codes start codes mixture_20 --max_steps 2062 --learning_rate 6e-4
add_colours codes colours
continue_from colours annealed mixture_20 --crop_sizes 256 256 128 128 64 32 --max_steps 2100 --learning_rate 6e-4 --codebook_decay 0.995

# The same again, with codes for more drawings, and for longer.
new_codes annealed more_codes mixture_40 --max_steps 1300 --learning_rate 5e-4
add_colours more_codes more_colours
anneal more_colours annealed_again --max_steps 3700

# And once more, with means of more latents, and for longer still.
new_codes annealed_again last_codes mixture_20 --max_steps 400 --learning_rate 5e-4 --kmeans_batches 200
add_colours last_codes last_colours
anneal last_colours last --max_steps 6200

# Half precision for the networks halves the size; the codebook stays in float32.
python - "$work/last" "$out" <<'PY'
import sys
import torch
from svqvae_hf import SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default", sample_size=256)
model.save_pretrained(sys.argv[2])
PY
