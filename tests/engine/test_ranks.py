"""Tensor parallelism: the same tokens from several processes, and nothing that outlives them."""

import gc
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.ranks import STEP, follow, pack_step, rank_device, unpack_step
from nanovllm.layers.linear import check_tensor_parallel_size
from nanovllm.utils.context import Context
from nanovllm.utils.distributed import TensorParallelGroup
from nanovllm.utils.rooms import find_room
from nanovllm.utils.workers import WorkerProcesses
from tests.parity import logprobs, worst_difference
from tests.processes import (
    SCRIPTS, children, ctrl_c_once_ready, environment, run, started, stopping_at,
)
from tests.utils.test_distributed import on_ranks

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


def test_all_ranks_take_the_blocks_of_the_poorest(tmp_path):
    """And follow: rank 0 has the logits of a step that it tells, the others have none."""
    class UnequalRunner(ModelRunner):
        def _cache_bytes(self):
            return super()._cache_bytes() // (1000 + 100 * self.group.rank)

    def lead_or_follow(group):
        runner = UnequalRunner(config, group)
        if group.rank > 0:
            return runner.num_blocks, follow(runner)
        step = Context.pack([5, 6, 7], [0, 1, 2], [0, 1, 2], [0, 3], [3], [[0]], [2])
        group.broadcast(torch.cat([torch.tensor([STEP]).int(), pack_step(step)]))
        logits = runner.execute(step)
        group.broadcast(torch.empty(0).int())
        return runner.num_blocks, logits

    folder, model = make_checkpoint(folder=tmp_path, num_attention_heads=4, num_key_value_heads=2)
    config = Config(folder, device="cpu")
    (blocks, logits), other = on_ranks(torch.inference_mode()(lead_or_follow))
    assert blocks == other[0] and other[1] is None
    right = model(torch.tensor([[5, 6, 7]])).logits[0, -1:]
    torch.testing.assert_close(logits, right, atol=1e-4, rtol=1e-4)


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


def ask(llm):
    """The tokens of a question."""
    return llm.generate("What is a block table?", GREEDY, use_tqdm=False)[0]["token_ids"]


DEMO = dict(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=16)


@processes
def test_a_worker_that_is_stopped():
    """SIGSTOP, a debugger, a frozen container: an error within the time limit, and no process."""
    with LLM(worker_timeout=2, **DEMO) as llm:
        ask(llm)
        os.kill(llm.runner.workers.processes[1].pid, signal.SIGSTOP)
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="rank 1 has not answered for 2 seconds"):
                ask(llm)
        assert time.monotonic() - start < 10
    assert not children()


@processes
@slow
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_gets_out_of_a_step_that_hangs(times):
    """At once where a worker is stopped; at the third time if it only never comes."""
    with LLM(worker_timeout=100, **DEMO) as llm:
        ask(llm)
        if times == 1:
            os.kill(llm.runner.workers.processes[1].pid, signal.SIGSTOP)
        else:
            llm.runner._tell = lambda kind, ints: None      # the worker is not told of the step

        def interrupt():
            for _ in range(times):
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGINT)

        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt, daemon=True).start()
            ask(llm)
        assert time.monotonic() - start < 15
        with pytest.raises(RuntimeError, match="the engine is closed.*KeyboardInterrupt"):
            ask(llm)
    assert not children()


@processes
@slow
def test_a_worker_that_is_stopped_during_the_start(monkeypatch):
    """Where nothing can be seen but that it does not come."""
    def ready_and_stopped(workers):
        right(workers)
        os.kill(workers.processes[1].pid, signal.SIGSTOP)

    right = WorkerProcesses.wait_until_ready
    monkeypatch.setattr(WorkerProcesses, "wait_until_ready", ready_and_stopped)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1"):
        LLM(worker_timeout=2, **DEMO)
    assert time.monotonic() - start < 60 and not children()


@processes
def test_what_others_ask_of_a_runner_a_leader_has_too():
    """The engine and the rooms take either; a GPU's way is not run here, and asks for more."""
    package = Path(nanovllm.__file__).parent
    use = r"(?:self|llm|engine)\.(?:runner|stepper)\.(\w+)"
    asked = {name for file in package.rglob("*.py") if file.name != "cuda_graphs.py"
             for name in re.findall(use, file.read_text())}
    assert {"run", "dtype", "collect"} <= asked
    with LLM(**DEMO) as leader, LLM(**{**DEMO, "tensor_parallel_size": 1}) as alone:
        for llm in (leader, alone):
            assert [name for name in sorted(asked) if not hasattr(llm.runner, name)] == []


@processes
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_all_ranks_sum_before_the_store_is_gone(kernels, monkeypatch):
    """NCCL connects at its first sum, by way of the store: without that it waits for ever."""
    there, sum_up = [], TensorParallelGroup.all_reduce

    def all_reduce(self, x):
        there.append(os.path.exists(self.store.folder))
        return sum_up(self, x)

    monkeypatch.setattr(TensorParallelGroup, "all_reduce", all_reduce)
    with LLM(**DEMO, kernels=kernels) as llm:
        assert there and all(there)
        ask(llm)
    assert not there[-1]


@processes
@pytest.mark.parametrize("place", [
    "utils.distributed:TensorParallelGroup.all_reduce",
    *(pytest.param(place, marks=slow) for place in (
        "engine.ranks:ModelRunner", "utils.distributed:TensorParallelGroup.gather",
        "utils.distributed:TensorParallelGroup.minimum"))])
def test_a_worker_that_is_stopped_while_the_runners_are_made(place, monkeypatch):
    monkeypatch.setattr("nanovllm.utils.workers.START", stopping_at(place))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 has not answered for 2 seconds"):
        LLM(worker_timeout=2, **DEMO)
    assert time.monotonic() - start < 60 and not children()


@processes
@pytest.mark.skipif(find_room("cpu") is None, reason="nanovllm/cpu is not there")
def test_a_fast_path_that_fails_on_one_rank_alone(monkeypatch):
    """The others are in its sums: they learn of it by that rank's end."""
    monkeypatch.setattr("nanovllm.utils.workers.START", stopping_at("cpu:optimize", (
        "import datetime, nanovllm.utils.distributed as there; "
        "there.PATIENCE = datetime.timedelta(seconds=1); raise MemoryError('none left')")))
    with pytest.raises(RuntimeError, match="(?s)rank 1 ended.*rank 1 alone.*MemoryError: none lef"):
        LLM(**DEMO)
    assert not children()


@processes
def test_ctrl_c_while_the_runners_are_made(monkeypatch):
    monkeypatch.setattr("nanovllm.utils.workers.START",
                        stopping_at("utils.distributed:TensorParallelGroup.all_reduce"))
    ctrl_c_once_ready(monkeypatch, seconds=3)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LLM(**DEMO)
    assert time.monotonic() - start < 25 and not children()


@processes
@pytest.mark.parametrize("layer, part", [
    (2, "mlp"), pytest.param(0, "self_attn", marks=slow), pytest.param(3, "self_attn", marks=slow)])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_rank_0_fails_in_the_middle_of_a_step(layer, part, error):
    """The other rank waits for a sum and cannot be told: the engine is over, and says so."""
    with LLM(**DEMO) as llm:
        ask(llm)
        target, calls = getattr(llm.runner.model.model.layers[layer], part), []
        right = target.forward

        def fails(*args):
            calls.append(1)
            if len(calls) == 3:
                raise error("injected")
            return right(*args)

        target.forward = fails
        with pytest.raises(error):
            ask(llm)
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"a step failed.*{error.__name__}.*injected"):
                ask(llm)
        assert time.monotonic() - start < 2
    assert not children()


@processes
def test_a_constructor_that_fails_behind_the_start(monkeypatch):
    """Its workers end with it, and not only when it is collected."""
    def fails(llm, *args):
        raise ValueError("damaged")

    monkeypatch.setattr(LLM, "_make_stepper", fails)
    with pytest.raises(ValueError, match="damaged") as kept:
        LLM(**DEMO)
    assert kept and not children()


@processes
@slow
def test_the_parent_is_killed_while_it_starts(tmp_path):
    """No worker stays, and no file."""
    script = "from nanovllm import LLM; LLM(tensor_parallel_size=2, device='cpu')"
    for seconds in (0, 0.5, 2):
        with started(sys.executable, "-c", script,
                     env=environment(TMPDIR=str(tmp_path))) as owner:
            deadline = time.monotonic() + 60
            while not (workers := children(owner.pid)) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(seconds + 0.5)
            os.kill(owner.pid, signal.SIGKILL)
            _, alive = psutil.wait_procs(workers, timeout=20)
            assert workers and not alive and not list(tmp_path.glob("nanovllm-*"))


@processes
@slow
def test_nothing_is_left_of_eight_engines(tmp_path):
    """No file, no thread, no process."""
    folder, _ = make_checkpoint(folder=tmp_path)
    this, held = psutil.Process(), []
    for _ in range(8):
        with LLM(folder, tensor_parallel_size=2, **SMALL) as llm:
            llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
        del llm
        gc.collect()
        held.append((this.num_fds(), this.num_threads()))
    assert held[-1] == held[1] and not children()


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
@pytest.mark.parametrize("sizes, says", [
    (dict(moe_intermediate_size=25), "moe_intermediate_size 25"),
    (dict(mlp_only_layers=[1], intermediate_size=81), " intermediate_size 81"),
    (dict(intermediate_size=81, moe_intermediate_size=24), None)])
def test_sizes_of_a_mixture(sizes, says, tmp_path):
    """Those that its layers have are told by name; one that no layer has forbids nothing."""
    folder, _ = make_checkpoint("qwen3_moe", folder=tmp_path, **sizes)
    config = Config(folder).hf_config
    if says is None:
        return check_tensor_parallel_size(config, 2)
    with pytest.raises(ValueError, match=f"{says}.*; choose one of 1"):
        check_tensor_parallel_size(config, 2)


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
