"""Day 6 without a GPU: kernels in Triton's interpreter, recordings with a stand-in, no Triton."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import GraphModelRunner, StaticInputs, graph_sizes
from nanovllm.layers.attention import ATTENTION_BACKENDS, SDPABackend, store_kvcache

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed")

# In a process of its own: the interpreter is chosen when kernels are defined, for good.
KERNELS = """
import random, sys
import torch
import torch.nn.functional as F
from fixtures import hf_generate, make_checkpoint, random_prompts
from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import MODEL_OPTIMIZERS
from nanovllm.layers import fused
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention, SDPABackend, store_kvcache
from nanovllm.layers.fused import fuse
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.triton_kernels import (norm_rope_store_, one_row_linear, paged_decode,
                                            paged_prefill)
from nanovllm.utils.context import Context

rng = random.Random(0)
torch.manual_seed(0)
for case in range(24):                                     # random shapes
    dtype, eps = rng.choice([(torch.float32, 2e-5), (torch.float16, 4e-3)])
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    head_dim, bs = rng.choice([8, 16, 24, 64, 80, 128, 192, 256]), rng.choice([16, 32, 64, 128])
    rows = rng.randrange(1, 5)
    news = [rng.randrange(1, 40) for _ in range(rows)]
    lens = [new + rng.choice([0, 1, 15, 16, 70]) for new in news]
    width = max(-(-n // bs) for n in lens)
    blocks = rows * width + 1
    layer = Attention(kv_heads * group, kv_heads, head_dim)
    layer.bind_kv_cache(SDPABackend(), *torch.randn(2, blocks, bs, kv_heads, head_dim).to(dtype))
    tables = torch.randperm(blocks)[:rows * width].view(rows, width).int()
    starts, ends = torch.tensor([0, *news]).cumsum(0).int(), torch.tensor(lens).int()
    q = torch.randn(sum(news), layer.num_heads, head_dim).to(dtype)
    want = torch.cat([layer.backend.prefill(layer, q[a:b], tables[i], lens[i])
                      for i, (a, b) in enumerate(zip(starts.tolist(), starts.tolist()[1:]))])
    got = paged_prefill(q, layer.k_cache, layer.v_cache, tables, starts, max(news), ends,
                        layer.scale)
    assert (got - want).abs().max() < eps, (case, "prefill")
    context = Context(starts, 1, ends, max(lens), None, tables, rows)
    want = layer.backend.decode(layer, q[:rows], context)
    for parts in (1, rng.choice([2, 4, 16])):
        got = paged_decode(q[:rows], layer.k_cache, layer.v_cache, tables, ends, layer.scale,
                           parts)
        assert (got - want).abs().max() < eps, (case, "decode")

def norm_of(n, dtype):
    norm = RMSNorm(n, rng.choice([1e-6, 1e-2]))
    norm.weight.data = (1 + .3 * torch.randn(n)).to(dtype)
    return norm.requires_grad_(False)

for case in range(16):                                     # the kernels around attention
    dtype, eps = rng.choice([(torch.float32, 2e-5), (torch.float16, 2e-2)])
    num_q, num_k, head_dim = rng.choice([1, 4, 9]), rng.choice([1, 3]), rng.choice([8, 24, 128])
    rotary, tokens = RotaryEmbedding(head_dim, 99, {"rope_theta": 1e4}), rng.randrange(1, 9)
    norms = norm_of(head_dim, dtype), norm_of(head_dim, dtype)
    norms[1].eps = norms[0].eps
    heads = torch.randn(tokens, num_q + 2 * num_k, head_dim).to(dtype)
    q, k, v = heads.clone().split((num_q, num_k, num_k), dim=1)
    if has_norm := rng.random() < .7:
        q, k = norms[0](q), norms[1](k)
    positions, slots = torch.randint(99, (tokens,)), torch.randperm(48)[:tokens] - 1
    q, k = rotary(positions, q, k)
    want = torch.randn(2, 3, 16, num_k + 2, head_dim + 1).to(dtype)
    caches, here = want.clone(), slots >= 0
    store_kvcache(k[here], v[here], *want[..., 2:, :-1], slots[here])
    norm_rope_store_(heads, positions, rotary.cos_sin,
                     torch.stack([norm.weight for norm in norms]) if has_norm else None,
                     norms[0].eps, *caches[..., 2:, :-1], slots)
    assert (heads[:, :num_q] - q).abs().max() < eps, (case, "q")
    assert (caches - want).abs().max() < eps, (case, "cache")

    n, k = rng.randrange(1, 12), rng.choice([5, 512, 1000, 1025, 2600])
    norm = norm_of(k, dtype)
    x, residual = torch.randn(1, k).to(dtype), torch.randn(1, n).to(dtype)
    weight = (torch.randn(2 * n, k) / k**.5).to(dtype)
    normed, around = rng.choice([(x, (None, 0.)), (norm(x), (norm.weight, norm.eps))])
    want = SiluAndMul()(F.linear(normed, weight))
    got = one_row_linear(x, weight, *around, gated=True)
    assert (got - want).abs().max() < eps, (case, "gated")
    want = residual + F.linear(normed, weight[:n])
    one_row_linear(x, weight[:n], *around, residual=residual)
    assert (residual - want).abs().max() < eps, (case, "residual")

rows = []                                   # of each call of the kernel for one row
fused.one_row_linear = lambda x, *rest, **kw: rows.append(len(x)) or one_row_linear(x, *rest, **kw)
MODEL_OPTIMIZERS.clear()                    # in place of the CPU's fused layers come the GPU's
# the whole engine against transformers: fused layers, our attention, recordings, preemption
greedy = SamplingParams(temperature=0, max_tokens=10)
for family, shape in (("qwen3", dict(head_dim=24)), ("llama", dict(num_key_value_heads=1)),
                      ("qwen2", {})):
    folder, model = make_checkpoint(family, **shape)
    common, *ends = random_prompts([17, 14, 13, 15, 12])
    prompts = [common + end for end in ends]
    with LLM(folder, device="cpu", attention_backend="triton", kvcache_block_size=16,
             num_kvcache_blocks=6, max_model_len=64, max_num_batched_tokens=24,
             max_num_seqs=4) as llm:
        fuse(llm.runner.model)
        llm.runner.capture_cudagraph([1, 2, 4])
        outs = llm.generate(prompts, greedy, use_tqdm=False)
        stats = llm.stats
        rows.clear()
        short = SamplingParams(temperature=0, max_tokens=4)
        alone = llm.generate(prompts[:1], short, use_tqdm=False)[0]["token_ids"]
    assert alone == outs[0]["token_ids"][:4], family
    # four matrices in each of three layers and steps, and the head in these and in the prefill
    assert len(rows) == 4 + (3 * 4 * 3 if family != "qwen2" else 0), (family, len(rows))
    assert stats.preemptions and stats.cached_tokens, stats
    assert [o["token_ids"] for o in outs] == [hf_generate(model, p, 10) for p in prompts], family
print("all equal")
"""


def python(code, *options, **environment):
    """Run code in a fresh Python that finds the package and the fixtures."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT / "nbs"), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.run([sys.executable, *options, "-c", code], env=env, capture_output=True,
                          text=True, timeout=300)


@needs_triton
def test_kernels_in_the_interpreter():
    done = python(KERNELS, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr[-3000:]


def test_without_triton():
    """The package imports, generates and splits a model; asking for triton says what is missing."""
    done = python("""
import sys
sys.modules["triton"] = None                                # an import of it fails from now on
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
from nanovllm import LLM, SamplingParams
greedy = SamplingParams(temperature=0, max_tokens=4)
answers = []
for size in (1, 2):
    with LLM(device="cpu", tensor_parallel_size=size, num_kvcache_blocks=16) as llm:
        answers.append(llm.generate("What is a rank?", greedy, use_tqdm=False)[0]["token_ids"])
assert answers[0] == answers[1]
try:
    LLM(device="cpu", attention_backend="triton")
except ValueError as error:
    assert "attention_backend" in str(error), error
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert "attention_backend 'triton' cannot work here" in done.stdout


class PaddedBackend(SDPABackend):
    """Day 3's backend for steps with padded rows: a slot of -1 is nobody's."""
    name = "padded"
    supports_graphs = True

    def forward(self, layer, q, k, v, context):
        real = context.slot_mapping >= 0
        store_kvcache(k[real], v[real], layer.k_cache, layer.v_cache, context.slot_mapping[real])
        if context.max_seqlen_q == 1:
            return self.decode(layer, q, context).nan_to_num()
        return super().forward(layer, q, k, v, context)


@pytest.mark.parametrize("seed", range(4))
def test_replayed_steps(seed, tmp_path):
    """Requests come and go, batch sizes go up and down: the same tokens as transformers'."""
    folder, model = make_checkpoint(folder=tmp_path, seed=seed)
    rng = random.Random(seed)
    prompts = random_prompts([rng.randrange(1, 30) for _ in range(12)], seed=seed)
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 16)) for _ in prompts]
    settings = dict(device="cpu", attention_backend="padded", max_model_len=48,
                    kvcache_block_size=rng.choice([4, 16]), num_kvcache_blocks=rng.choice([14, 40]),
                    max_num_seqs=rng.choice([3, 7, 16]),
                    max_num_batched_tokens=rng.choice([16, 64]))
    with patch.dict(ATTENTION_BACKENDS, padded=PaddedBackend), LLM(folder, **settings) as llm:
        assert isinstance(llm.runner, GraphModelRunner)
        llm.runner.capture_cudagraph()
        llm.runner.looks_ahead = seed % 2 == 0
        pending, outputs, sizes = list(zip(prompts, params)), {}, []
        replay = llm.runner.replay
        llm.runner.replay = lambda *step: sizes.append(len(step[0])) or replay(*step)
        while pending or not llm.is_finished():
            if pending and rng.random() < .5:
                llm.add_request(*pending.pop(0))
            outputs.update({o.request_id: o.output for o in llm.step() if o.output})
    assert len(set(sizes)) > 1
    for request_id, prompt, param in zip(sorted(outputs), prompts, params):
        assert outputs[request_id]["token_ids"] == hf_generate(model, prompt, param.max_tokens)


def test_padded_rows_touch_nothing():
    """Stale contents of an earlier, larger batch are gone, and rows beyond the batch do nothing."""
    host = torch.full((8 * (4 + 3),), 99, dtype=torch.int32)
    inputs = StaticInputs(host, host.clone(), 8, 3, 48)
    inputs.load()
    assert (inputs.context.slot_mapping == -1).all() and (inputs.context.context_lens == 0).all()
    assert not inputs.context.block_tables.any()


def test_ladder_reaches_the_largest_batch():
    for largest in (1, 2, 3, 5, 8, 9, 255, 256, 257, 300, 512, 1000):
        sizes = graph_sizes(largest)
        assert sizes[-1] == largest and sizes == sorted(set(sizes))
