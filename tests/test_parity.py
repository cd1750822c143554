"""Greedy output in fp32 is that of Hugging Face, token for token, whatever the settings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures import DEMO_MODEL, hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import MODEL_OPTIMIZERS, ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import ATTENTION_BACKENDS
from nanovllm.layers.layernorm import RMSNorm

COURSE = json.loads(
    (Path(__file__).parents[1] / "tools" / "course_qa.json").read_text(encoding="utf-8"))
NEW = 12  # tokens compared of each prompt
BLOCK_SIZES = (1, 4, 5, 16)
LONG = 21  # a prompt that is no neighbour of a block's end


def rope(theta, **more):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # small: short prompts must show the scaling
SHAPES = {  # in all but one, head_dim is not hidden_size / heads
    "qwen3": dict(seed=1),
    "qwen3-tied-1kv": dict(tie_word_embeddings=True, num_key_value_heads=1, head_dim=20,
                           vocab_size=97, **rope(1e6)),
    "qwen3-mha-bias": dict(num_key_value_heads=4, head_dim=8, attention_bias=True,
                           vocab_size=257, num_hidden_layers=2, **rope(500.0)),
    "llama-12": dict(family="llama", head_dim=12, **rope(5e5)),
    "llama3-tied-1kv": dict(family="llama", num_key_value_heads=1, tie_word_embeddings=True,
                            **rope(5e5, **LLAMA3)),
    "llama-mha-bias-linear": dict(family="llama", num_attention_heads=6, num_key_value_heads=6,
                                  head_dim=10, attention_bias=True, mlp_bias=True,
                                  vocab_size=203, **rope(1e4, rope_type="linear", factor=4.0)),
}


def lengths_for(block_size):
    """The lengths at which a block is nearly full, full, and just over."""
    bs = block_size
    return sorted({n for n in (bs - 1, bs, bs + 1, 2 * bs, LONG) if n > 0})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """name -> checkpoint, prompts by length and what transformers makes of them; made once."""
    made = {}

    def get(name):
        if name not in made:
            folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("model"), **SHAPES[name])
            lengths = sorted({n for bs in BLOCK_SIZES for n in lengths_for(bs)})
            prompts = dict(zip(lengths, random_prompts(lengths, model.config.vocab_size)))
            tokens = {n: hf_generate(model, p, NEW) for n, p in prompts.items()}
            made[name] = SimpleNamespace(folder=folder, model=model, prompts=prompts, tokens=tokens)
        return made[name]

    return get


def tokens_of(llm, prompts, max_tokens=NEW):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


def check(ref, block_size, **settings):
    """Each prompt twice in one batch, then once more; the engine's statistics."""
    bs, lengths = block_size, lengths_for(block_size)
    prompts, right = [ref.prompts[n] for n in lengths], [ref.tokens[n] for n in lengths]
    with LLM(ref.folder, kvcache_block_size=bs, **settings) as llm:
        assert tokens_of(llm, prompts * 2) == right * 2
        params = SamplingParams(temperature=0, max_tokens=NEW)
        again = llm.generate(prompts, params, use_tqdm=False)
        assert [out["token_ids"] for out in again] == right
        assert llm.block_manager.num_free_blocks == llm.block_manager.num_blocks
        return llm.stats, {n: out["num_cached_tokens"] for n, out in zip(lengths, again)}


def tight(block_size):
    """The smallest pool in which the longest request can run by itself."""
    return -(-(max(lengths_for(block_size)) + NEW) // block_size)


@pytest.mark.parametrize("name", SHAPES)
def test_the_checkpoint_would_show_a_bug(name, reference):
    """One that repeats a token gives the right tokens whatever is broken."""
    ref = reference(name)
    right = hf_generate(ref.model, ref.prompts[LONG], 64)
    assert len(set(right)) >= 15
    with LLM(ref.folder, num_kvcache_blocks=32) as llm:
        assert tokens_of(llm, [ref.prompts[LONG]], 64) == [right]


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("chunk", [1, 7, "bs", "bs+1", None])
@pytest.mark.parametrize("bs", BLOCK_SIZES)
def test_every_setting_gives_the_same_tokens(bs, chunk, caching, reference):
    ref = reference("qwen3")
    settings = dict(enable_prefix_caching=caching, max_num_batched_tokens={
        "bs": bs, "bs+1": bs + 1, None: 16384}.get(chunk, chunk))
    stats, cached = check(ref, bs, num_kvcache_blocks=512, **settings)
    assert stats.preemptions == 0
    # all full blocks come from the cache, but the last token is always computed
    assert cached == {n: (n - 1) // bs * bs * caching for n in cached}
    stats, _ = check(ref, bs, num_kvcache_blocks=tight(bs), **settings)
    if chunk is None:
        assert stats.preemptions > 0


@pytest.mark.parametrize("bs, chunk", [(1, 16384), (4, 7), (5, 16384), (16, 17)])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "qwen3"])
def test_every_shape_gives_the_same_tokens(name, bs, chunk, reference):
    stats, _ = check(reference(name), bs, num_kvcache_blocks=tight(bs),
                     max_num_batched_tokens=chunk)
    assert stats.preemptions > 0 or chunk < 16384


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 100])
def test_batch_size_does_not_matter(max_num_seqs, reference):
    check(reference("qwen3"), 4, num_kvcache_blocks=256, max_num_seqs=max_num_seqs)


@pytest.mark.parametrize("bs, chunk", [(1, 7), (4, 5), (5, 16384)])
@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
def test_every_backend_gives_the_same_tokens(backend, bs, chunk, reference):
    if reason := ATTENTION_BACKENDS[backend].why_not(torch.device("cpu"), torch.float32, 16):
        pytest.skip(reason)
    check(reference("qwen3"), bs, num_kvcache_blocks=tight(bs), max_num_batched_tokens=chunk,
          attention_backend=backend)


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "as-taught"])
@pytest.mark.parametrize("chunk", [5, 16384])
@pytest.mark.parametrize("name", SHAPES)
def test_logits(name, chunk, optimized, reference, monkeypatch):
    """Tokens do not catch a wrong eps: compare what they are chosen from, preempted or not."""
    if not optimized:
        monkeypatch.delitem(MODEL_OPTIMIZERS, "cpu")
    ref, bs = reference(name), 4
    config = Config(str(ref.folder), kvcache_block_size=bs, num_kvcache_blocks=tight(bs) + 1)
    runner = ModelRunner(config)
    manager = BlockManager(runner.num_blocks, bs)
    scheduler = Scheduler(manager, max_num_batched_tokens=chunk)
    seqs = [Sequence(ref.prompts[n], SamplingParams(temperature=0, max_tokens=NEW))
            for n in lengths_for(bs)]
    logits = {seq.seq_id: [] for seq in seqs}
    for seq in seqs:
        scheduler.add_sequence(seq)
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        rows = runner.run(batch)
        for row, values in zip([row for row in batch if row.samples], rows):
            logits[row.seq.seq_id].append(values)
        scheduler.postprocess(batch, rows.argmax(-1).tolist())
    for seq in seqs:
        with torch.inference_mode():
            right = ref.model(torch.tensor([seq.token_ids])).logits[0]
        mine = torch.stack(logits[seq.seq_id])
        torch.testing.assert_close(mine, right[seq.num_prompt_tokens - 1:-1], atol=1e-4, rtol=0)


def test_rms_norm_casts_in_the_order_of_transformers():
    """Only a narrow dtype shows it: variance in fp32, cast back, then the weight."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    x = 30 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine, right = RMSNorm(48).bfloat16(), Qwen3RMSNorm(48).bfloat16()
    with torch.no_grad():
        right.weight.copy_(torch.linspace(0.1, 2, 48))
        mine.weight.copy_(right.weight)
        assert torch.equal(mine(x), right(x))


@pytest.fixture(scope="module")
def demo():
    """Prompts for the demo model, and what transformers answers: ids and text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32")
    questions = ["What is PagedAttention?", "What is the capital of France?",
                 "What does the scheduler do?", "What is a KV cache?"]
    prompts = [tokenizer.apply_chat_template(
        [{"role": "system", "content": COURSE["system_prompt"]},
         {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        for question in questions] + ["What is prefill?"]
    tokens = [hf_generate(model, tokenizer.encode(prompt), 64) for prompt in prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return prompts, tokens, texts


@pytest.mark.parametrize("settings", [
    dict(), dict(kvcache_block_size=4, max_num_batched_tokens=7, num_kvcache_blocks=100),
    dict(kvcache_block_size=16, num_kvcache_blocks=14)], ids=["default", "chunks", "preempted"])
def test_demo_model_answers_like_transformers(settings, demo):
    prompts, tokens, texts = demo
    with LLM(**{"num_kvcache_blocks": 256, **settings}) as llm:
        outs = llm.generate(prompts, SamplingParams(temperature=0), use_tqdm=False)
        assert [out["token_ids"] for out in outs] == tokens
        assert [out["text"] for out in outs] == texts
        assert llm.stats.preemptions > 0 or settings.get("num_kvcache_blocks") != 14
