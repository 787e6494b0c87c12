#!/usr/bin/env bash
# A tokenizer of scenes from the bundled one, a language model that draws and describes them, and a next-scale transformer.
#   training/bundled/scenes.sh WORK OUT
# WORK: folder for everything between. OUT: folder to write the language model to. Run it again to resume. FONT is where NotoColorEmoji.ttf lies.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$1 out=$2
mkdir -p "$work"

if [ ! -d "$work/scenes" ]; then
    rm -rf "$work/scenes.partial"
    python training/bundled/make_scenes.py "$work/scenes.partial" ${FONT:+--font "$FONT"}
    mv "$work/scenes.partial" "$work/scenes"
fi

# The bundled tokenizer with 1,024 of its codes, which k-means sets anew.
[ -d "$work/start" ] || python - "$work/start" <<'PY'
import sys

from svqvae_hf import DEFAULT_MODEL, SVQVAE

model, size = SVQVAE.from_pretrained(DEFAULT_MODEL), 1024
state = model.state_dict()
codes = state["quantize.embedding.weight"]
state["quantize.embedding.weight"] = codes[:: len(codes) // size]
resized = SVQVAE.from_config({**model.config, "codebook_size": size, "num_vq_embeddings": size, "sample_size": 96})
resized.load_state_dict(state)
resized.save_pretrained(sys.argv[1])
PY

# Twelve minutes on one core of a CPU with bfloat16 instructions.
run=(accelerate launch --cpu --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 1 --mixed_precision no --dynamo_backend no)
"${run[@]}" training/train.py --pretrained_model_name_or_path "$work/start" --train_data_dir "$work/scenes" --output_dir "$work/tokenizer" \
    --resolution 96 --crop_sizes 96 --no_random_flip --per_device_train_batch_size 8 --max_steps 1200 --dataloader_num_workers 0 \
    --scales 0.25 0.5 1 --scale_probabilities 0.04 0.08 0.88 --kmeans_steps 1 --kmeans_batches 40 --codebook_decay 0.99 --dead_code_reset_steps 200 \
    --causal_weight 8e-4 \
    --optimizer soap --adam_beta1 0.95 --weight_decay 0 --learning_rate 4e-4 --warmup_steps 30 --use_ema --ema_decay 0.99 \
    --mixed_precision bf16 --save_steps 300 --save_total_limit 1 --resume_from_checkpoint latest

# All sides, as next-scale generation needs them; a language model takes the last.
svqvae tokenize "$work/scenes/train.parquet" --output "$work/tokens" --model "$work/tokenizer" --crops centre --resolution 96 --sides $(seq 12) \
    --scale-from latents --keep caption short_caption

[ -d "$work/words" ] || python training/bundled/make_scene_words.py "$work/words"
[ -d "$work/extended" ] || svqvae extend-lm "$work/words" --output "$work/extended" --vqvae "$work/tokenizer"

# One run that learns to rewrite captions, to draw and to describe, from new weights.
python training/train_language_model.py --token_set "$work/tokens" --model_name_or_path "$work/extended" --output_dir "$work/language_model" \
    --per_device_train_batch_size 16 --use_cpu --bf16 --attn_implementation eager --no_packing \
    --condition_dropout 0.08 --caption_fraction 0.2 --first_caption_fraction 0.1 --rewrite_fraction 0.3 --replaced_fraction 0.3 \
    --optimizer muon --learning_rate 6e-3 --adam_beta2 0.95 --warmup_steps 80 --max_steps 12500 \
    --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs '{"num_decay_steps": 6250, "decay_type": "linear"}' \
    --logging_steps 20 --save_steps 200 --save_total_limit 2 --report_to none --resume_from_checkpoint latest --seed 1

# A next-scale transformer for the same ids, in 42 minutes; it reads the plain captions alone.
echo '{"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32}' >"$work/next_scale.json"
"${run[@]}" training/train_next_scale.py --vqvae_name_or_path "$work/tokenizer" --model_config_name_or_path "$work/next_scale.json" \
    --token_set "$work/tokens" --output_dir "$work/next_scale" --caption_column short_caption --tokenizer_name_or_path "$work/words" \
    --max_text_length 24 --num_inference_steps 5 --schedule_share 1 --per_device_train_batch_size 32 --max_steps 1000 --condition_dropout 0.1 \
    --optimizer soap --adam_beta1 0.95 --adam_beta2 0.95 --weight_decay 0 --learning_rate 2e-3 --lr_scheduler_type linear --warmup_steps 40 \
    --use_ema --ema_decay 0.99 --mixed_precision bf16 --logging_steps 20 --save_steps 100 --save_total_limit 2 \
    --eval_steps 100000 --num_validation_images 1 --resume_from_checkpoint latest

python - "$work/language_model" "$out" <<'PY'
import sys

import torch
from transformers import GenerationConfig

from svqvae_hf import DEFAULT_GENERATOR
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.known_objects_file import read_known_objects

model = ImageLanguageModel.from_pretrained(sys.argv[1], dtype=torch.float16)
model.vqvae.half().register_to_config(_name_or_path="svqvae-scenes")
tokens = {f"{name}_token_id": getattr(model.processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
sampling = {"guidance_scale": 1.5, "temperature": 0.1, "top_k": 20, "rewrite_captions": True}
model.language_model.generation_config = GenerationConfig(**tokens, generation_kwargs=sampling)
model.known_objects = read_known_objects(DEFAULT_GENERATOR)  # `wordnet.py` makes the file
model.save_pretrained(sys.argv[2])
PY
