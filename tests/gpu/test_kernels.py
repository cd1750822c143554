"""Every kernel on a GPU, in every dtype, against the plain layers in fp32."""

import random
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention, SDPABackend, store_kvcache
from nanovllm.layers.backends import attention_backends
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import Context
from nanovllm.utils.rooms import find_room
from tests.processes import SCRIPTS, environment, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_room("gpu") is None,
                                                  reason="nanovllm/gpu is not there")]
GPU = torch.device("cuda")
EPS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", EPS, ids=str)


def paged_case(heads, kv_heads, head_dim, block_size, lens, news, dtype, seed):
    """A layer over a random cache, and a step's queries: news[i] of lens[i] tokens in row i."""
    torch.manual_seed(seed)
    width = max(-(-n // block_size) for n in lens)
    blocks = width * len(lens) + 2
    layer = Attention(heads, kv_heads, head_dim)
    caches = torch.randn(2, blocks, block_size, kv_heads, head_dim, device=GPU).to(dtype)
    layer.bind_kv_cache(SDPABackend(), *caches)
    tables = torch.randperm(blocks)[:width * len(lens)].view(len(lens), -1).tolist()
    q = torch.randn(sum(news), 3 * heads, head_dim, device=GPU).to(dtype)[:, heads:2 * heads]
    starts = [sum(news[:i]) for i in range(len(news) + 1)]
    positions = [p for n, new in zip(lens, news) for p in range(n - new, n)]
    slots = [tables[i][p // block_size] * block_size + p % block_size
             for i, (n, new) in enumerate(zip(lens, news)) for p in range(n - new, n)]
    context = Context.pack([0] * len(q), positions, slots, starts, lens, tables)
    return layer, q, context.to(GPU)


def exact(layer, q, context):
    """Plain attention of each row, in fp32."""
    wide = Attention(layer.num_heads, layer.num_kv_heads, layer.head_dim)
    wide.bind_kv_cache(SDPABackend(), layer.k_cache.float(), layer.v_cache.float())
    starts, lens = context.cu_seqlens_q.tolist(), context.context_lens.tolist()
    return torch.cat([SDPABackend().prefill(wide, q[a:b].float(), context.block_tables[i], lens[i])
                      for i, (a, b) in enumerate(zip(starts, starts[1:]))])


@DTYPES
@pytest.mark.parametrize("name", ["flash_attn", "torch", "triton"])
@pytest.mark.parametrize("seed", range(8))
def test_attention(name, dtype, seed):
    """Decode rows, prompts and chunks together; head sizes and blocks of all kinds."""
    rng = random.Random(seed)
    kv_heads, group = rng.choice([1, 2, 8]), rng.choice([1, 2, 4, 5])
    head_dim = rng.choice([8, 24, 64, 80, 128, 256])
    cls = attention_backends()[name]
    if reason := cls.why_not(GPU, dtype, head_dim):
        pytest.skip(reason)
    block_size = 256 if name != "triton" else rng.choice([16, 32, 64, 128])
    news = sorted(rng.choice([1, 1, rng.randrange(1, 200)]) for _ in range(rng.randrange(1, 8)))
    lens = [new + rng.choice([0, 1, 15, 16, 70, 2000]) for new in news]
    layer, q, context = paged_case(kv_heads * group, kv_heads, head_dim, block_size, lens, news,
                                   dtype, seed)
    backend = cls()
    got = backend.attend(layer, q, context)
    assert (got.float() - exact(layer, q, context)).abs().max() < EPS[dtype]


@DTYPES
def test_store(dtype):
    """Negative slots are skipped, and strides are those of a slice."""
    from nanovllm.layers.triton_kernels import store_kvcache_triton
    k, v = torch.randn(9, 8, 96, device=GPU).to(dtype).split(4, dim=1)
    want = torch.zeros(2, 5, 16, 4, 96, dtype=dtype, device=GPU)
    got = want.clone()
    slots = torch.tensor([3, -1, 79, 16, 17, 40, 0, 1, 2], dtype=torch.int32, device=GPU)
    here = slots >= 0
    store_kvcache(k[here], v[here], *want, slots[here])
    store_kvcache_triton(k, v, *got, slots)
    assert torch.equal(got, want)


def norm_of(n, dtype, rng):
    norm = RMSNorm(n, rng.choice([1e-6, 1e-2])).to(GPU, dtype)
    norm.weight.data = (1 + .3 * torch.randn(n, device=GPU)).to(dtype)
    return norm.requires_grad_(False)


@DTYPES
@pytest.mark.parametrize("seed", range(8))
def test_around_attention(dtype, seed):
    """Norms, RoPE and the store in one kernel; and sums, gates, products of one row."""
    from nanovllm.gpu.layer_kernels import (
        add_rms_norm, norm_rope_store_, one_row_linear, silu_and_mul,
    )
    rng, eps = random.Random(seed), 5 * EPS[dtype]
    torch.manual_seed(seed)
    num_q, num_k, head_dim = rng.choice([1, 4, 16]), rng.choice([1, 8]), rng.choice([8, 24, 128])
    rotary, tokens = RotaryEmbedding(head_dim, 99, {"rope_theta": 1e4}).to(GPU), rng.choice([1, 7])
    norms = norm_of(head_dim, dtype, rng), norm_of(head_dim, dtype, rng)
    norms[1].eps = norms[0].eps
    heads = torch.randn(tokens, num_q + 2 * num_k, head_dim, device=GPU).to(dtype)
    q, k, v = heads.clone().split((num_q, num_k, num_k), dim=1)
    if has_norm := rng.random() < .7:
        q, k = norms[0](q), norms[1](k)
    positions = torch.randint(99, (tokens,), device=GPU)
    slots = torch.randperm(48, device=GPU)[:tokens] - 1
    q, k = rotary(positions, q, k)
    want = torch.randn(2, 3, 16, num_k, head_dim, device=GPU).to(dtype)
    caches, here = want.clone(), slots >= 0
    store_kvcache(k[here], v[here], *want, slots[here])
    norm_rope_store_(heads, positions, rotary.cos_sin,
                     torch.stack([norm.weight for norm in norms]) if has_norm else None,
                     norms[0].eps, *caches, slots)
    assert (heads[:, :num_q].float() - q.float()).abs().max() < eps
    assert (caches.float() - want.float()).abs().max() < eps

    n, k = rng.randrange(1, 300), rng.choice([5, 512, 1025, 4096])
    norm = norm_of(k, dtype, rng)
    x, residual = (torch.randn(3, k, device=GPU).to(dtype) for _ in "ab")
    total = x + residual
    assert (add_rms_norm(x, residual, norm.weight, norm.eps) - norm(total)).abs().max() < eps
    assert torch.equal(residual, total)
    both = torch.randn(3, 2 * n, device=GPU).to(dtype)
    assert (silu_and_mul(both) - SiluAndMul()(both)).abs().max() < eps
    x, residual = x[:1], torch.randn(1, n, device=GPU).to(dtype)
    weight = (torch.randn(2 * n, k, device=GPU) / k**.5).to(dtype)
    want = SiluAndMul()(F.linear(norm(x), weight))
    got = one_row_linear(x, weight, norm.weight, norm.eps, gated=True)
    assert (got - want).abs().max() < eps
    want = residual + F.linear(x, weight[:n])
    one_row_linear(x, weight[:n], residual=residual)
    assert (residual - want).abs().max() < eps


@pytest.mark.processes
def test_no_kernel_leaves_its_memory():
    """compute-sanitizer's memcheck over the kernels of a decode step."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on this machine")
    done = run(tool, "--tool", "memcheck", "--error-exitcode", "3", sys.executable,
               SCRIPTS / "every_kernel.py", timeout=200,
               env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
