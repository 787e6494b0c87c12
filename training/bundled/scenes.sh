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
    --scale-from latents --keep short_caption

[ -d "$work/words" ] || python training/bundled/make_scene_words.py "$work/words"
[ -d "$work/extended" ] || svqvae extend-lm "$work/words" --output "$work/extended" --vqvae "$work/tokenizer"

# A language model, in 7.7 hours on the same core: plain captions and others mixed, then plain ones alone, then mostly others.
train_words() {
    python training/train_language_model.py --token_set "$work/tokens" --per_device_train_batch_size 32 --use_cpu --bf16 --attn_implementation eager \
        --no_packing --no_completion_only_loss --condition_dropout 0.1 --optimizer soap --adam_beta1 0.95 --adam_beta2 0.95 --warmup_steps 40 \
        --logging_steps 20 --save_steps 100 --save_total_limit 2 --report_to none --resume_from_checkpoint latest "$@"
}
train_words --model_name_or_path "$work/extended" --output_dir "$work/mixed" --max_steps 800 --learning_rate 2e-3 \
    --lr_scheduler_type constant_with_warmup --caption_fraction 0.15 --first_caption_fraction 0.6 --seed 8
train_words --model_name_or_path "$work/mixed" --output_dir "$work/plain" --max_steps 900 --learning_rate 2e-3 \
    --lr_scheduler_type constant_with_warmup --caption_fraction 0.1 --first_caption_fraction 1 --seed 9
train_words --model_name_or_path "$work/plain" --output_dir "$work/wordings" --max_steps 1700 --learning_rate 1.5e-3 \
    --lr_scheduler_type linear --caption_fraction 0.2 --first_caption_fraction 0.2 --scheduled_sampling 0.5 --seed 10
train_words --model_name_or_path "$work/wordings" --output_dir "$work/more_wordings" --max_steps 2300 --learning_rate 1.2e-3 \
    --lr_scheduler_type linear --caption_fraction 0.2 --first_caption_fraction 0.1 --scheduled_sampling 0.5 --seed 11
train_words --model_name_or_path "$work/more_wordings" --output_dir "$work/most_wordings" --max_steps 1150 --learning_rate 9e-4 \
    --lr_scheduler_type linear --caption_fraction 0.2 --first_caption_fraction 0.1 --scheduled_sampling 0.5 --seed 12
train_words --model_name_or_path "$work/most_wordings" --output_dir "$work/warm" --max_steps 1524 --learning_rate 1.5e-3 \
    --lr_scheduler_type polynomial --lr_scheduler_kwargs '{"power": 1, "lr_end": 7.48e-4}' \
    --caption_fraction 0.2 --first_caption_fraction 0.2 --scheduled_sampling 0.5 --seed 13

# Scenes on black and red, on which the model failed most, are seen three times as often.
[ -d "$work/dark_tokens" ] || python - "$work" <<'PY'
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

work = Path(sys.argv[1])
shutil.rmtree(work / "dark_tokens.partial", ignore_errors=True)
shutil.copytree(work / "tokens", work / "dark_tokens.partial")
(file,) = (work / "dark_tokens.partial").rglob("*.parquet")
table = pq.read_table(file)
captions = table["short_caption"].to_pylist()
dark = [row for row, caption in enumerate(captions) if caption.endswith((" on black", " on red"))]
rows = np.random.default_rng(0).permutation([*range(len(captions)), *dark, *dark])
pq.write_table(table.take(rows), file, row_group_size=1500)
(work / "dark_tokens.partial").rename(work / "dark_tokens")
PY
train_words --token_set "$work/dark_tokens" --model_name_or_path "$work/warm" --output_dir "$work/dark" \
    --max_steps 1450 --learning_rate 8e-4 --lr_scheduler_type linear --caption_fraction 0.2 --first_caption_fraction 0.2 --scheduled_sampling 0.5 --seed 14

# New scenes, each seen once: after more steps on the same ones, the model draws fewer held-out pairs right. In the
# third part, two of five are on black and red.
if [ ! -d "$work/new_scenes" ]; then
    rm -rf "$work/new_scenes.partial"
    python training/bundled/make_scenes.py "$work/new_scenes.partial" --count 222000 ${FONT:+--font "$FONT"}
    python - "$work/new_scenes.partial" <<'PY'
import sys
from pathlib import Path

import pyarrow.parquet as pq

folder = Path(sys.argv[1])
table = pq.read_table(folder / "train.parquet")
captions = table["short_caption"].to_pylist()
dark = [row for row in range(94000, 222000) if (row - 94000) % 8 < 3 or captions[row].endswith((" on black", " on red"))]
for part, rows in enumerate((range(30000, 62000), range(62000, 94000), dark), start=1):
    pq.write_table(table.take([*rows]), folder / f"part_{part}.parquet", row_group_size=1500)
PY
    mv "$work/new_scenes.partial" "$work/new_scenes"
fi
for part in 1 2 3; do
    svqvae tokenize "$work/new_scenes/part_$part.parquet" --output "$work/new_tokens_$part" --model "$work/tokenizer" --crops centre --resolution 96 \
        --sides 12 --scale-from latents --keep short_caption
done
train_new() {
    train_words --lr_scheduler_type linear --caption_fraction 0.2 --first_caption_fraction 0.2 --scheduled_sampling 0.5 "$@"
}
train_new --token_set "$work/new_tokens_1" --model_name_or_path "$work/dark" --output_dir "$work/new_1" \
    --max_steps 1000 --learning_rate 8e-4 --seed 16
train_new --token_set "$work/new_tokens_2" --model_name_or_path "$work/new_1" --output_dir "$work/new_2" \
    --max_steps 1000 --learning_rate 8e-4 --seed 17
train_new --token_set "$work/new_tokens_3" --model_name_or_path "$work/new_2" --output_dir "$work/language_model" \
    --max_steps 1600 --learning_rate 1e-3 --seed 18

# A next-scale transformer for the same ids, in 42 minutes; it reads the plain captions alone.
echo '{"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32}' >"$work/next_scale.json"
"${run[@]}" training/train_next_scale.py --vqvae_name_or_path "$work/tokenizer" --model_config_name_or_path "$work/next_scale.json" \
    --token_set "$work/tokens" --output_dir "$work/next_scale" --caption_column short_caption --tokenizer_name_or_path "$work/words" \
    --max_text_length 14 --num_inference_steps 5 --schedule_share 1 --per_device_train_batch_size 32 --max_steps 1000 --condition_dropout 0.1 \
    --optimizer soap --adam_beta1 0.95 --adam_beta2 0.95 --weight_decay 0 --learning_rate 2e-3 --lr_scheduler_type linear --warmup_steps 40 \
    --use_ema --ema_decay 0.99 --mixed_precision bf16 --logging_steps 20 --save_steps 100 --save_total_limit 2 \
    --eval_steps 100000 --num_validation_images 1 --resume_from_checkpoint latest

python - "$work/language_model" "$out" <<'PY'
import sys

import torch
from transformers import GenerationConfig

from svqvae_hf.language.image_language_model import ImageLanguageModel

model = ImageLanguageModel.from_pretrained(sys.argv[1], dtype=torch.float16)
model.vqvae.half().register_to_config(_name_or_path="svqvae-scenes")
tokens = {f"{name}_token_id": getattr(model.processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
sampling = {"guidance_scale": 1.5, "temperature": 0.1, "top_k": 20}
model.language_model.generation_config = GenerationConfig(**tokens, generation_kwargs=sampling)
model.language_model.save_pretrained(sys.argv[2])
model.processor.save_pretrained(sys.argv[2])
PY
