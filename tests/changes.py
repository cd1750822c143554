"""Changes that a reader may make: (taught class, another forward), which no fast code knows."""

import torch

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3Model


def half_residual(self, positions, x):
    x = x + 0.5 * self.self_attn(positions, self.input_layernorm(x))
    return x + self.mlp(self.post_attention_layernorm(x))


def norm_without_mean(self, x):
    return self.weight * (x / (1 + x.abs().amax(-1, keepdim=True)))


def other_gate(self, x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


def turned_back(self, positions, q, k):
    cos, sin = self.cos_sin[positions].to(q.dtype).unbind(1)
    return (rotate(q, cos, -sin), rotate(k, cos, -sin * 0.5))


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def scaled_embedding(self, input_ids, positions):
    x = self.embed_tokens(input_ids) * 3
    for layer in self.layers:
        x = layer(positions, x)
    return self.norm(x)


def every_other_layer(self, input_ids, positions):
    x = self.embed_tokens(input_ids)
    for layer in self.layers[::2]:
        x = layer(positions, x)
    return self.norm(x)


def half_mlp(self, x):
    return 0.5 * self.down_proj(self.act_fn(self.gate_up_proj(x)))


CHANGES = [(Qwen3DecoderLayer, half_residual), (RMSNorm, norm_without_mean),
           (SiluAndMul, other_gate), (RotaryEmbedding, turned_back), (Qwen3MLP, half_mlp),
           (Qwen3Model, scaled_embedding), (Qwen3Model, every_other_layer)]
IDS = [forward.__name__ for _, forward in CHANGES]
