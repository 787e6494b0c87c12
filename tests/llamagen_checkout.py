"""A stand-in for a checkout of LlamaGen: the same names, but it runs this library's model, changed or not."""

from pathlib import Path

GPT = """
import tempfile
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from svqvae_hf import LlamaGenConfig, LlamaGenForCausalLM

ModelArgs = SimpleNamespace

class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.block_size, self.num_classes = args, args.block_size, args.num_classes
        self.cls_token_num = getattr(args, "cls_token_num", 1)
        self.grid_size = int(args.block_size**0.5)
        self.layers = []
        config = LlamaGenConfig(
            args.vocab_size, args.num_classes, self.grid_size, hidden_size=args.dim, intermediate_size=args.dim,
            num_hidden_layers=args.n_layer, num_attention_heads=args.n_head
        )
        self.model = LlamaGenForCausalLM(config)
        self.output = self.model.lm_head

    def load_state_dict(self, weights):
        with tempfile.NamedTemporaryFile() as file:
            torch.save(weights, file.name)
            self.model = LlamaGenForCausalLM.from_single_file(
                file.name, grid_size=self.grid_size, num_attention_heads=self.args.n_head
            )
        self.cls_embedding = SimpleNamespace(uncond_embedding=getattr(self.model, "uncond_embedding", None))
        {change}

    def forward(self, ids, condition, mask=None):
        codes, captions = self.args.vocab_size, {{}}
        if condition.ndim == 3:
            captions = {{"prompt_embeds": condition, "prompt_attention_mask": mask[:, 0, -1, : self.cls_token_num]}}
            condition = torch.zeros(len(condition), dtype=torch.int64)
        tokens = torch.cat([codes + condition[:, None], ids], dim=1)
        logits = self.model(tokens, **captions).logits[..., :codes].float()
        return F.pad(logits, (0, 0, self.cls_token_num - 1, 0)), None
"""
GENERATE = """
import torch

def generate(model, condition, steps, mask=None, cfg_scale=1.0, top_k=0, sample_logits=True):
    count = len(condition)
    if cfg_scale > 1:
        captions = condition.ndim == 3
        null = model.cls_embedding.uncond_embedding.expand_as(condition) if captions else model.num_classes
        condition = torch.cat([condition, null if captions else torch.full_like(condition, null)])
    if mask is not None:
        mask = mask.repeat(len(condition) // count, 1)[:, None, None]
    ids = torch.zeros(count, 0, dtype=torch.int64)
    for _ in range(steps):
        logits = model(ids.repeat(len(condition) // count, 1), condition, mask)[0][:, -1]
        if cfg_scale > 1:
            logits = logits[count:] + cfg_scale * (logits[:count] - logits[count:])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids.int()
"""
MODULES = ("autoregressive.models.gpt", "autoregressive.models.generate", "autoregressive.models", "autoregressive")


def make_checkout(folder: Path, change: str = "pass") -> Path:
    """Writes the stand-in to a folder. `change` is a statement about `self.model` with its weights loaded."""
    models = folder / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(GPT.format(change=change))
    (models / "generate.py").write_text(GENERATE)
    return folder
