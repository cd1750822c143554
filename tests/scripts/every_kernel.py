"""Each kernel of a decode step, once, for a tool that watches what memory they touch."""

import torch

from nanovllm.gpu.attention_kernels import paged_decode, paged_prefill
from nanovllm.gpu.layer_kernels import (
    add_rms_norm, norm_rope_store_, one_row_linear, silu_and_mul,
)
from nanovllm.gpu.peers import PeerMemory, sum_add_rms_norm
from nanovllm.layers.triton_kernels import store_kvcache_triton

torch.manual_seed(0)
k, v = torch.randn(2, 9, 4, 64, device="cuda", dtype=torch.bfloat16)
caches = torch.zeros(2, 5, 16, 4, 64, device="cuda", dtype=torch.bfloat16)
slots = torch.tensor([3, -1, 79, 16, 17, 40, 0, 1, 2], dtype=torch.int32, device="cuda")
store_kvcache_triton(k, v, *caches, slots)
tables = torch.tensor([[4, 0, 1], [2, 0, 0], [3, 0, 0]], dtype=torch.int32, device="cuda")
lens = torch.tensor([45, 7, 0], dtype=torch.int32, device="cuda")
for parts in (1, 4):
    q = torch.randn(3, 8, 64, device="cuda", dtype=torch.bfloat16)
    out = paged_decode(q, *caches, tables, lens, .1, parts)
starts = torch.tensor([0, 9, 11], dtype=torch.int32, device="cuda")
q = torch.randn(11, 8, 64, device="cuda", dtype=torch.bfloat16)
paged_prefill(q, *caches, tables[:2], starts, 9, lens[:2], .1)
heads = torch.randn(9, 16, 64, device="cuda", dtype=torch.bfloat16)
cos_sin = torch.randn(9, 2, 32, device="cuda")
norm_rope_store_(heads, torch.arange(9, device="cuda"), cos_sin, torch.rand_like(heads[0, :2]),
                 1e-6, *caches, slots)
x, weight = torch.randn(1, 200, device="cuda"), torch.randn(94, 200, device="cuda")
add_rms_norm(x, torch.zeros_like(x), x[0], 1e-6)
silu_and_mul(weight)
one_row_linear(x, weight, x[0], 1e-6, gated=True)
one_row_linear(x, weight, residual=torch.zeros(1, 94, device="cuda"))
memory = torch.zeros(PeerMemory.size(2), device="cuda", dtype=torch.uint8)
peers = PeerMemory(memory, 0, [memory.data_ptr()] * 2)
peers.let_go()                                          # there is nobody to wait for
torch.cuda.synchronize()
place = peers.place(3, 94, torch.float32).zero_()
sum_add_rms_norm(peers, place, torch.ones(3, 94, device="cuda"), weight[:, 0].contiguous(), 1e-6)
torch.cuda.synchronize()
assert out.isfinite().all()
print("ran")
