"""Two GPUs: the same tokens over NCCL and over peer memory, torchrun, and a worker that dies."""

import json
import os
import random
import signal
import statistics
import subprocess
import threading
import time

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from bench.models import make_model_folder
from nanovllm import LLM, SamplingParams
from nanovllm.utils.rooms import find_room
from tests.processes import (
    SCRIPTS, children, ctrl_c_once_ready, environment, run_python, stopping_at,
)

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.processes]
NEW = 16
SMALL = dict(device="cuda", max_model_len=128, num_kvcache_blocks=5, kvcache_block_size=16,
             max_num_seqs=4)


@pytest.mark.parametrize("shape, way", [
    (dict(num_key_value_heads=2), {}), (dict(num_key_value_heads=2), dict(enforce_eager=True)),
    (dict(num_key_value_heads=2), dict(look_ahead=False)),
    (dict(num_key_value_heads=2), dict(kernels="plain")),
    (dict(num_key_value_heads=1, vocab_size=101, tie_word_embeddings=True), {}),
    (dict(family="qwen3_moe"), {})], ids=str)
def test_the_tokens_of_transformers(shape, way, tmp_path):
    """In fp32, with little memory; pools of equal size on both ranks."""
    folder, model = make_checkpoint(folder=tmp_path, num_attention_heads=4, **shape)
    prompts = random_prompts([5, 9, 33, 17], model.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(folder, tensor_parallel_size=2, **SMALL, **way) as llm:
        outs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats.preemptions > 0
    assert [out["token_ids"] for out in outs] == [hf_generate(model, p, NEW) for p in prompts]


def test_sums_go_by_peer_memory(tmp_path):
    if find_room("gpu") is None or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these GPUs cannot read each other's memory, or nanovllm/gpu is not there")
    from nanovllm.gpu.peers import PeerDecoder
    folder, _ = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    with LLM(folder, tensor_parallel_size=2, **SMALL) as llm:
        assert type(llm.runner.model.model) is PeerDecoder


@pytest.mark.slow
def test_log_probabilities(tmp_path):
    """Qwen3-4B's shape in bf16: two ranks are no further from fp32 than one is."""
    import transformers
    folder = make_model_folder("qwen3-4b", tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator("cuda").manual_seed(0)
    for name, weight in model.named_parameters():  # at the usual 0.02 most mistakes do not show
        mean, std = (1.0, 0.3) if "norm" in name else (0.0, 1.8 * config.hidden_size**-0.5)
        weight.data.normal_(mean, std, generator=generator)
    model.save_pretrained(folder)
    del model
    rng = random.Random(0)
    prompts = [[rng.randrange(150_000) for _ in range(64)] for _ in range(4)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found = {}
    for name, settings in {"fp32": dict(dtype="float32"), "one": {},
                           "two": dict(tensor_parallel_size=2)}.items():
        torch.cuda.empty_cache()
        with LLM(str(folder), device="cuda", max_model_len=128, num_kvcache_blocks=64,
                 max_num_seqs=4, **settings) as llm:
            outs = llm.generate(prompts, params, use_tqdm=False)
        found[name] = [entry[token] for out in outs for entry, token in zip(
            out["prompt_logprobs"][1:], out["prompt_token_ids"][1:])]

    def off(name):
        """Root mean square of the differences."""
        return statistics.fmean((x - y)**2 for x, y in zip(found[name], found["fp32"]))**.5

    assert 0 < off("two") < 1.5 * off("one")


def memory_in_use():
    """MiB in use on each GPU, whoever uses them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    shown = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    return [int(n) for n in shown.split()]


@pytest.mark.slow
def test_a_killed_worker(tmp_path):
    """In the middle of decoding: rank 0 says so within seconds, and no memory stays."""
    folder, before = make_model_folder("qwen3-0.6b", tmp_path), memory_in_use()
    llm = LLM(str(folder), device="cuda", load_format="dummy", tensor_parallel_size=2,
              max_model_len=1024, max_num_seqs=32)
    try:
        worker = llm.runner.workers.processes[1]
        for _ in range(8):
            llm.add_request([5] * 64, SamplingParams(temperature=0, max_tokens=900,
                                                     ignore_eos=True))
        for _ in range(5):
            llm.step()
        killed = []

        def kill():
            killed.append(time.perf_counter())
            os.kill(worker.pid, signal.SIGKILL)

        threading.Timer(.5, kill).start()
        with pytest.raises(RuntimeError, match="rank 1 ended"):
            while not llm.is_finished():
                llm.step()
        assert time.perf_counter() - killed[0] < 10
    finally:
        llm.close()
    assert worker.poll() is not None
    deadline = time.monotonic() + 10
    while memory_in_use()[1] > before[1] + 600 and time.monotonic() < deadline:
        time.sleep(.5)              # rank 0 itself may hold a context there
    assert memory_in_use()[1] <= before[1] + 600


@pytest.mark.parametrize("place", [
    "engine.ranks:ModelRunner", "utils.distributed:TensorParallelGroup.all_reduce",
    "utils.distributed:TensorParallelGroup.gather", "gpu.peers:peers_of",
    "engine.model_runner:ModelRunner.allocate_kv_cache",
    "engine.cuda_graphs:Recordings.record"])
def test_a_worker_that_is_stopped_during_the_start(place, tmp_path, monkeypatch):
    """Before, between and in NCCL's first exchanges: an error within the time that is allowed."""
    folder, _ = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    monkeypatch.setattr("nanovllm.utils.workers.START", stopping_at(place))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 has not answered for 5 seconds"):
        LLM(folder, tensor_parallel_size=2, worker_timeout=5,
            **{**SMALL, "num_kvcache_blocks": -1})
    assert time.monotonic() - start < 60 and not children()
    torch.cuda.synchronize()                     # nothing waits on the GPU


def test_the_first_engine_of_a_process_is_closed_at_once(tmp_path):
    """NCCL's monitor used to wait for the store, which is gone after the start."""
    folder, _ = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    code = f"""import time
from nanovllm import LLM
llm = LLM({str(folder)!r}, tensor_parallel_size=2, **{SMALL})
time.sleep(2.5)
start = time.monotonic()
llm.close()
print("CLOSED IN TIME", time.monotonic() - start < 6)"""
    assert "CLOSED IN TIME True" in run_python("-c", code).stdout


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_an_engine_on_another_gpu(kernels, tmp_path):
    """Kernels are launched where its tensors are, also those that sample."""
    folder, _ = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    prompts = random_prompts([5, 9, 33, 17], 100)
    wishes = [SamplingParams(temperature=t, seed=3 if t else None, top_p=p, max_tokens=m,
                             ignore_eos=True)
              for t, p, m in ((0, 1, NEW), (1, 1, 9), (1, .9, NEW), (0, 1, 12))]
    found = []
    for device in ("cuda", "cuda:1"):
        with LLM(folder, **{**SMALL, "device": device}, kernels=kernels) as llm:
            outs = llm.generate(prompts, wishes, use_tqdm=False)
            found.append([out["token_ids"] for out in outs])
        assert torch.cuda.current_device() == 0
    assert found[0] == found[1]


def test_ctrl_c_in_the_first_exchange(tmp_path, monkeypatch):
    folder, _ = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    monkeypatch.setattr("nanovllm.utils.workers.START",
                        stopping_at("utils.distributed:TensorParallelGroup.all_reduce"))
    ctrl_c_once_ready(monkeypatch, seconds=5)
    with pytest.raises(KeyboardInterrupt):
        LLM(folder, tensor_parallel_size=2, worker_timeout=120, **SMALL)
    assert not children()
    torch.cuda.synchronize()


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Two ranks on this host, the same script on both."""
    folder, model = make_checkpoint(folder=tmp_path, num_attention_heads=4)
    prompts = [[1, 2, 3], [7] * 20]
    settings = dict(num_kvcache_blocks=16, max_model_len=64, max_num_seqs=4)
    # an address in place of --standalone, which asks for the host's name: not every machine has one
    done = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", "29517", SCRIPTS / "same_tokens.py", folder,
        *map(json.dumps, (2, settings, prompts, NEW)),
        env=environment(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo"))
    assert f"TOKENS {[hf_generate(model, prompt, NEW) for prompt in prompts]}" in done.stdout, done
