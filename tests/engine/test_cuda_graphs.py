"""Recorded steps, with a stand-in for CUDA Graphs: sizes, padded rows, and the same tokens."""

import gc
import random
import weakref

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import Recordings, StaticStep, graph_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.backends import ATTENTION_BACKENDS
from nanovllm.utils.context import Context
from nanovllm.utils.rooms import find_room
from tests.doubles import EagerRecordings, PaddedBackend


def test_ladder_reaches_the_largest_batch():
    for largest in (1, 2, 3, 5, 8, 9, 255, 256, 257, 300, 512, 1000):
        sizes = graph_sizes(largest)
        assert sizes[-1] == largest and sizes == sorted(set(sizes))


def decode_step(rows, width=2):
    """A step of rows with one token each, all numbers different."""
    numbers = lambda start: list(range(start, start + rows))
    return Context.pack(numbers(1), numbers(20), numbers(40), list(range(rows + 1)), numbers(60),
                        [[80 + 2 * i + j for j in range(width)] for i in range(rows)])


def static_step(rows=8, width=3):
    """One whose memory holds the rests of something else."""
    host = torch.full((StaticStep.size(rows, width),), 99, dtype=torch.int32)
    return StaticStep(host, host.clone(), rows, width, 48)


def test_padded_rows_touch_nothing():
    """Stale contents of an earlier, larger batch are gone, and rows beyond the batch do nothing."""
    inputs = static_step()
    for loaded in (8, 5, 0):
        inputs.load(decode_step(loaded) if loaded else None)
        step = inputs.context
        assert (step.slot_mapping[loaded:] == -1).all()
        assert (step.context_lens[loaded:] == 0).all()
        assert not step.block_tables[loaded:].any()
        assert step.cu_seqlens_q.tolist() == list(range(9))


def test_what_is_loaded_stands_in_the_first_rows():
    inputs, step = static_step(), decode_step(5)
    inputs.load(step)
    for name in ("input_ids", "positions", "slot_mapping", "context_lens"):
        assert torch.equal(getattr(inputs.context, name)[:5], getattr(step, name))
    assert torch.equal(inputs.context.block_tables[:5, :2], step.block_tables)
    assert not inputs.context.block_tables[:, 2].any()
    assert (inputs.context.max_seqlen_q, inputs.context.max_context_len) == (1, 48)


@pytest.mark.parametrize("seed", range(4))
def test_replayed_steps(seed, tmp_path, monkeypatch):
    """Requests come and go, batch sizes go up and down: the same tokens as transformers'."""
    folder, model = make_checkpoint(folder=tmp_path, seed=seed)
    rng = random.Random(seed)
    prompts = random_prompts([rng.randrange(1, 30) for _ in range(12)], seed=seed)
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 16)) for _ in prompts]
    settings = dict(device="cpu", attention_backend="padded", max_model_len=48,
                    kvcache_block_size=rng.choice([4, 16]), num_kvcache_blocks=rng.choice([14, 40]),
                    max_num_seqs=rng.choice([3, 7, 16]),
                    max_num_batched_tokens=rng.choice([16, 64]))
    monkeypatch.setitem(ATTENTION_BACKENDS, "padded", PaddedBackend)
    if look_ahead := seed % 2 == 0 and find_room("gpu") is not None:
        settings["look_ahead"] = True
    with LLM(folder, **settings) as llm:
        llm.runner.recordings = recordings = EagerRecordings(llm.runner)
        recordings.capture()
        pending, outputs = list(zip(prompts, params)), {}
        while pending or not llm.is_finished():
            if pending and rng.random() < .5:
                llm.add_request(*pending.pop(0))
            outputs.update({o.request_id: o.output for o in llm.step() if o.output})
        if look_ahead:
            assert llm.stepper.right > 0
    assert len(set(recordings.sizes_replayed)) > 1
    for request_id, prompt, param in zip(sorted(outputs), prompts, params):
        assert outputs[request_id]["token_ids"] == hf_generate(model, prompt, param.max_tokens)


def test_what_is_recorded_and_what_is_not(good, monkeypatch):
    """Prefill and batches larger than the largest recording are launched."""
    monkeypatch.setitem(ATTENTION_BACKENDS, "padded", PaddedBackend)
    with LLM(good[0], device="cpu", attention_backend="padded", num_kvcache_blocks=16) as llm:
        assert llm.runner.recordings is None and not llm.runner.uses_graphs
        llm.runner.recordings = recordings = EagerRecordings(llm.runner)
        recordings.capture([1, 2])
        assert [recordings.fits(decode_step(rows)) for rows in (1, 2, 3)] == [True, True, False]
        prefill = Context.pack([1, 2], [0, 1], [0, 1], [0, 2], [2], [[0]])
        assert not recordings.fits(prefill)
        recordings.clear()
        assert not recordings.fits(decode_step(1))


def test_recordings_are_in_the_sum_before_there_is_a_cache(good, monkeypatch):
    """The largest has the memory that all share, the next shows what each other adds."""
    class PretendedRecordings(Recordings):
        def record(self, inputs):
            return None, None

    monkeypatch.setitem(ATTENTION_BACKENDS, "padded", PaddedBackend)
    runner = ModelRunner(Config(good[0], device="cpu", attention_backend="padded",
                                max_num_seqs=20, num_kvcache_blocks=12))
    left = iter([1000, 900, 890])
    monkeypatch.setattr("nanovllm.engine.cuda_graphs.free_memory", lambda device: next(left))
    recordings = PretendedRecordings(runner)
    assert recordings.estimate_bytes() == 100 + 10 * (len(graph_sizes(20)) - 1)
    assert not recordings.recorded
    assert all(layer.k_cache is None for layer in runner.attention_layers())


def test_a_closed_engine_gives_its_memory_back(good, monkeypatch):
    """At once, although recordings know their runner: a GPU's memory waits for no collector."""
    monkeypatch.setitem(ATTENTION_BACKENDS, "padded", PaddedBackend)
    llm = LLM(good[0], device="cpu", attention_backend="padded", num_kvcache_blocks=16)
    llm.runner.recordings = EagerRecordings(llm.runner)
    llm.runner.recordings.capture([1])
    model = weakref.ref(llm.runner.model)
    gc.collect()
    gc.disable()
    try:
        llm.close()
        assert model() is None
    finally:
        gc.enable()
