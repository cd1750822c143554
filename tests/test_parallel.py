"""Tensor parallelism: the same tokens from several processes, and nothing that outlives them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams

NEW = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
SMALL = dict(device="cpu", num_kvcache_blocks=14, kvcache_block_size=4, max_model_len=48)


def children():
    """Live processes that this one started."""
    return [p for p in psutil.Process().children(recursive=True)
            if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("size, shape", [
    (2, dict(num_key_value_heads=2)), (4, dict(num_key_value_heads=2)),
    (4, dict(num_key_value_heads=1, vocab_size=101, tie_word_embeddings=True)),
    (2, dict(attention_bias=True)), (2, dict(family="llama", vocab_size=97))])
def test_same_tokens(size, shape, tmp_path):
    """With little memory, so that sequences are preempted, and beginnings in common."""
    folder, model = make_checkpoint(folder=tmp_path, num_attention_heads=4, **shape)
    vocab = model.config.vocab_size
    common, *ends = random_prompts([9, 5, 2, 12, 7], vocab)
    prompts = [common + end for end in ends] * 2
    with LLM(folder, tensor_parallel_size=size, **SMALL) as llm:
        outs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.stats.preemptions and llm.stats.cached_tokens
        assert len(children()) == size - 1
        llm.runner.looks_ahead = True  # as on GPUs, with ids that only rank 0's device has
        again = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.runner.guesses[True] > 3
    want = [hf_generate(model, p, NEW) for p in prompts]
    assert [out["token_ids"] for out in outs] == want
    assert [out["token_ids"] for out in again] == want
    assert not children()


def test_refused(tmp_path):
    folder, _ = make_checkpoint(folder=tmp_path)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide"):
        LLM(folder, tensor_parallel_size=3, **SMALL)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        LLM(folder, tensor_parallel_size=2, **SMALL)
    assert not children()


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


def test_a_worker_ends_by_itself():
    """With the parent's pipe still open; a thread that waits on it must not abort the exit."""
    for _ in range(3):
        llm = LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=16)
        worker, = llm.runner.workers.processes.values()
        llm.runner.group.broadcast(torch.empty(0, dtype=torch.int64))  # the last step
        assert worker.wait(20) == 0
        llm.close()
    assert not children()


ENDLESS = """
from nanovllm import LLM, SamplingParams
llm = LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=256)
print("ready", *[p.pid for p in llm.runner.workers.processes.values()], flush=True)
try:
    while True:
        llm.generate("What is a block table?", SamplingParams(temperature=0), use_tqdm=False)
except KeyboardInterrupt:
    out, = llm.generate("What is a block table?", SamplingParams(temperature=0), use_tqdm=False)
    print(out["text"], flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_parent_ends(how):
    """Ctrl-C leaves an engine that goes on; after that or a kill no worker stays."""
    script = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True,
                              start_new_session=True)  # no main guard, as in a plain script
    word, pid = script.stdout.readline().split()
    time.sleep(0.3)
    os.kill(script.pid, how)
    out, _ = script.communicate(timeout=30)
    assert word == "ready" and (how is signal.SIGKILL or "block" in out)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(pid))


SAME_SCRIPT = """
from nanovllm import LLM, SamplingParams
with LLM({folder!r}, tensor_parallel_size=4, device="cpu", num_kvcache_blocks=64) as llm:
    outs = llm.generate({prompts!r}, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
print("TOKENS", [out["token_ids"] for out in outs])
"""


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them: prefixes of commands that run there."""
    names, cable = ([f"{kind}{os.getpid()}{end}" for end in "ab"] for kind in ("nanovllm", "nv"))
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root and `ip netns`")
    try:
        ip("link", "add", cable[0], "netns", names[0], "type", "veth",
           "peer", "name", cable[1], "netns", names[1])
        for i, (name, end) in enumerate(zip(names, cable)):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [(["ip", "netns", "exec", name], end) for name, end in zip(names, cable)]
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts(two_hosts, tmp_path):
    """torchrun on two hosts with two ranks each: the same script, the same tokens."""
    folder, model = make_checkpoint(folder=tmp_path / "model", num_attention_heads=4)
    prompts = random_prompts([9, 4, 17])
    script = tmp_path / "script.py"
    script.write_text(SAME_SCRIPT.format(folder=str(folder), prompts=prompts))
    runs = [subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
         f"--node-rank={rank}", "--master-addr=10.77.0.1", "--master-port=29577", str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": interface})
        for rank, (prefix, interface) in enumerate(two_hosts)]
    try:
        results = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], results
    lines = [line for out, _ in results for line in out.splitlines() if line.startswith("TOKENS")]
    assert lines == [f"TOKENS {[hf_generate(model, p, NEW) for p in prompts]}"], results
