"""Tensor parallelism: the same tokens from several processes, and nothing that outlives them."""

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.ranks import pack_step, rank_device, unpack_step
from nanovllm.utils.context import Context
from nanovllm.utils.rooms import find_room
from tests.parity import logprobs, worst_difference
from tests.processes import SCRIPTS, children, environment, run, started

NEW = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
SMALL = dict(device="cpu", num_kvcache_blocks=14, kvcache_block_size=4, max_model_len=48)
processes, slow = pytest.mark.processes, pytest.mark.slow


@pytest.mark.parametrize("samples", [[], [0], [0, 3, 6]])
@pytest.mark.parametrize("tables", [[[7, 3], [9], [1, 0, 5]], [[7], [9], [1]]])
def test_a_packed_step_is_unpacked_the_same(samples, tables):
    step = Context.pack([15, 21, 22, 23, 34, 35, 36], [4, 0, 1, 2, 3, 4, 5],
                        [12, 36, 37, 38, 7, 0, -1], [0, 1, 4, 7], [5, 3, 6], tables, samples)
    packed = pack_step(step)
    assert packed.dtype is torch.int32 and packed.dim() == 1
    there = unpack_step(packed)
    for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "context_lens",
                 "block_tables", "ints"):
        assert torch.equal(getattr(there, name), getattr(step, name)), name
    assert there.shape == step.shape and there.samples == samples


def test_devices_of_ranks():
    assert rank_device("cpu", 3) == "cpu"


@processes
@slow
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("size, shape", [
    (2, dict(num_key_value_heads=2)),
    (4, dict(num_key_value_heads=2)),
    (4, dict(num_key_value_heads=1, vocab_size=101, tie_word_embeddings=True)),
    (2, dict(attention_bias=True)), (2, dict(family="llama", vocab_size=97))])
def test_same_tokens(size, shape, look_ahead, tmp_path):
    """With little memory, so that sequences are preempted, and beginnings in common.

    look_ahead: as on GPUs, with ids that only rank 0's device has.
    """
    if look_ahead and find_room("gpu") is None:
        pytest.skip("nanovllm/gpu is not there")
    folder, model = make_checkpoint(folder=tmp_path, num_attention_heads=4, **shape)
    vocab = model.config.vocab_size
    common, *ends = random_prompts([9, 5, 2, 12, 7], vocab)
    prompts = [common + end for end in ends] * 2
    with LLM(folder, tensor_parallel_size=size, look_ahead=look_ahead, **SMALL) as llm:
        outs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.stats.preemptions and llm.stats.cached_tokens
        assert len(children()) == size - 1
        assert not look_ahead or llm.stepper.right > 3
    want = [hf_generate(model, p, NEW) for p in prompts]
    assert [out["token_ids"] for out in outs] == want
    assert not children()


@processes
def test_refused(tmp_path):
    folder, _ = make_checkpoint(folder=tmp_path)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide"):
        LLM(folder, tensor_parallel_size=3, **SMALL)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        LLM(folder, tensor_parallel_size=2, **SMALL)
    assert not children()


@processes
@slow
def test_two_engines_and_a_dead_worker():
    """A worker killed is an error within seconds; the engine beside it does not notice."""
    with LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=64) as one, \
            LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=64) as two:
        right = one.generate("What is a block table?", GREEDY, use_tqdm=False)
        for connection in psutil.net_connections():
            if connection.pid in [os.getpid(), *(p.pid for p in children())]:
                assert connection.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1")
        worker, = two.runner.workers.processes.values()
        os.kill(worker.pid, signal.SIGKILL)
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="rank 1 ended with code -9"):
                two.generate("What is a block table?", GREEDY, use_tqdm=False)
        assert time.monotonic() - start < 10
        again = one.generate("What is a block table?", GREEDY, use_tqdm=False)
        assert [o["token_ids"] for o in again] == [o["token_ids"] for o in right]
        two.close()
    assert not children()


@processes
@slow
def test_a_worker_ends_by_itself():
    """With the parent's pipe still open; a thread that waits on it must not abort the exit."""
    for _ in range(3):
        llm = LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=16)
        worker, = llm.runner.workers.processes.values()
        llm.runner.group.broadcast(torch.empty(0, dtype=torch.int32))  # the last step
        assert worker.wait(20) == 0
        llm.close()
    assert not children()


@processes
@slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_parent_ends(how):
    """Ctrl-C leaves an engine that goes on; after that or a kill no worker stays."""
    with started(sys.executable, SCRIPTS / "endless.py") as script:
        word, pid = script.stdout.readline().split()
        time.sleep(0.3)
        os.kill(script.pid, how)
        out, _ = script.communicate(timeout=60)
        assert word == "ready" and (how is signal.SIGKILL or "block" in out)
        deadline = time.monotonic() + 5
        while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not psutil.pid_exists(int(pid))


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them: prefixes of commands that run there."""
    names, cable = ([f"{kind}{os.getpid()}{end}" for end in "ab"] for kind in ("nanovllm", "nv"))

    def ip(*words):
        done = run("ip", *words, timeout=20)
        return done.returncode == 0

    for line in run("ip", "netns", "list", timeout=20).stdout.splitlines():
        if (old := re.match(r"nanovllm(\d+)[ab]", line)) and not psutil.pid_exists(int(old[1])):
            ip("netns", "delete", old[0])               # of a run that was killed
    try:
        if not all([ip("netns", "add", name) for name in names]):
            pytest.skip("needs root and `ip netns`")
        assert ip("link", "add", cable[0], "netns", names[0], "type", "veth",
                  "peer", "name", cable[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, cable)):
            assert ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            for device in (end, "lo"):
                assert ip("-n", name, "link", "set", device, "up")
        yield [(["ip", "netns", "exec", name], end) for name, end in zip(names, cable)]
    finally:
        for name in names:
            ip("netns", "delete", name)


@processes
@slow
def test_two_hosts(two_hosts, tmp_path):
    """torchrun on two hosts with two ranks each: the same script, the same tokens."""
    folder, model = make_checkpoint(folder=tmp_path / "model", num_attention_heads=4)
    prompts = random_prompts([9, 4, 17])
    settings = dict(device="cpu", num_kvcache_blocks=64)
    script = [SCRIPTS / "same_tokens.py", folder, *map(json.dumps, (4, settings, prompts, NEW))]
    with ExitStack() as stack:
        runs = [stack.enter_context(started(
            *prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            "--nproc-per-node=2", f"--node-rank={rank}", "--master-addr=10.77.0.1",
            "--master-port=29577", *script, env=environment(GLOO_SOCKET_IFNAME=interface)))
            for rank, (prefix, interface) in enumerate(two_hosts)]
        results = [each.communicate(timeout=120) for each in runs]
    assert [each.returncode for each in runs] == [0, 0], results
    lines = [line for out, _ in results for line in out.splitlines() if line.startswith("TOKENS")]
    assert lines == [f"TOKENS {[hf_generate(model, p, NEW) for p in prompts]}"], results


@processes
@slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_family_on_two_ranks(family, tmp_path):
    folder, model = make_checkpoint(family, folder=tmp_path, seed=2)
    prompts = random_prompts([5, 30])
    wish = SamplingParams(temperature=0, max_tokens=NEW, logprobs=3, prompt_logprobs=0)
    with LLM(folder, tensor_parallel_size=2, device="cpu", num_kvcache_blocks=32) as llm:
        outs = llm.generate(prompts, wish, use_tqdm=False)
    for prompt, out in zip(prompts, outs):
        assert out["token_ids"] == hf_generate(model, prompt, NEW)
        assert worst_difference(out, logprobs(model, prompt + out["token_ids"])) < 1e-4
