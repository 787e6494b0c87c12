#!/usr/bin/env bash
# A tokenizer of scenes from the bundled one, and a language model that is to draw and describe them.
#   training/runs/scenes.sh WORK OUT
# WORK: folder for everything between. OUT: folder to write. Run it again to resume. FONT is where NotoColorEmoji.ttf lies.
# training/README.md says which steps have run in this form.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$1 out=$2
mkdir -p "$work"

[ -d "$work/scenes" ] || python training/make_scenes.py "$work/scenes" ${FONT:+--font "$FONT"}

# A model with a codebook of another size, to be set by k-means. Its codes are old ones, over and over.
resize_codebook() {
    [ -d "$3" ] || python - "$@" <<'PY'
import sys
from svqvae_hf import DEFAULT_MODEL, SVQVAE

source, size, out = sys.argv[1] or DEFAULT_MODEL, int(sys.argv[2]), sys.argv[3]
model = SVQVAE.from_pretrained(source)
state = model.state_dict()
name = "quantize.embedding.weight"
old = len(state[name])
state[name] = state[name][:: old // size] if size < old else state[name].repeat(size // old, 1)
resized = SVQVAE.from_config({**model.config, "codebook_size": size, "num_vq_embeddings": size, "sample_size": 96})
resized.load_state_dict(state)
resized.save_pretrained(out)
PY
}

# Half an hour on one core of a CPU with bfloat16 instructions.
train() {
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
        --train_data_dir "$work/scenes" --resolution 96 --crop_sizes 96 --no_random_flip --train_batch_size 8 --dataloader_num_workers 0 \
        --scales 0.25 0.5 1 --scale_probabilities 0.04 0.08 0.88 --optimizer soap --adam_beta1 0.95 --adam_weight_decay 0 --use_ema --ema_decay 0.99 \
        --mixed_precision bf16 --lr_warmup_steps 30 --kmeans_steps 1 --codebook_decay 0.99 --dead_code_reset_steps 200 \
        --checkpointing_steps 300 --checkpoints_total_limit 1 --resume_from_checkpoint latest "$@"
}
resize_codebook "" 2048 "$work/start_2048"
train --output_dir "$work/tokenizer_2048" --pretrained_model_name_or_path "$work/start_2048" --max_train_steps 1000 --learning_rate 4e-4 --kmeans_batches 40
resize_codebook "$work/tokenizer_2048" 4096 "$work/start_4096"
train --output_dir "$work/tokenizer" --pretrained_model_name_or_path "$work/start_4096" --max_train_steps 550 --learning_rate 3e-4 --kmeans_batches 60

# All sides, as next-scale generation needs them; a language model takes the last.
svqvae tokenize "$work/scenes/train.parquet" "$work/tokens" --model "$work/tokenizer" --crops centre --resolution 96 --sides $(seq 12) --scale-from latents

[ -d "$work/words" ] || python training/make_scene_words.py "$work/words"
[ -d "$work/extended" ] || svqvae extend-lm "$work/words" "$work/extended" --vqvae "$work/tokenizer"

# Four hours on the same core: at first the shortest wording of each scene alone, then the others as well.
train_words() {
    python training/train_image_text.py --token_set "$work/tokens" --per_device_train_batch_size 32 --use_cpu --bf16 --attn_implementation eager \
        --no_packing --no_completion_only_loss --condition_dropout 0.1 --use_soap --adam_beta1 0.95 --adam_beta2 0.95 --warmup_steps 40 \
        --lr_scheduler_type linear --logging_steps 20 --save_steps 100 --save_total_limit 2 --report_to none --resume_from_checkpoint latest "$@"
}
train_words --model_name_or_path "$work/extended" --output_dir "$work/shortest" --max_steps 4000 --learning_rate 2e-3 --caption_fraction 0.1 \
    --first_caption_fraction 1
train_words --model_name_or_path "$work/shortest" --output_dir "$work/trained" --max_steps 1450 --learning_rate 1.2e-3 --caption_fraction 0.15 \
    --first_caption_fraction 0.6 --scheduled_sampling 0.5

python - "$work/trained" "$out" <<'PY'
import sys

import torch
from transformers import GenerationConfig

from svqvae_hf.language.image_language_model import ImageLanguageModel

model = ImageLanguageModel.from_pretrained(sys.argv[1], dtype=torch.float16)
model.vqvae.half().register_to_config(_name_or_path="svqvae-scenes")
tokens = {f"{name}_token_id": getattr(model.processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
sampling = {"guidance_scale": 2.0, "temperature": 0.2, "top_k": 50}
model.language_model.generation_config = GenerationConfig(**tokens, generation_kwargs=sampling)
model.language_model.save_pretrained(sys.argv[2])
model.processor.save_pretrained(sys.argv[2])
PY
