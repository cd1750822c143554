"""The KV cache takes what is left, and a run stays within it; nothing is lost in the long run."""

import json
import random
import subprocess
import sys

import pytest
import torch

from bench.models import make_model_folder
from nanovllm import LLM, SamplingParams
from tests.processes import ROOT, SCRIPTS, run_python, started

pytestmark = pytest.mark.gpu
HELD = 20 * 10**9


def engine_takes(folder):
    """(blocks, share of the GPU's memory that it took) of an engine after some requests."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    rng = random.Random(0)
    prompts = [[rng.randrange(150_000) for _ in range(1000)] for _ in range(40)]
    params = SamplingParams(temperature=.8, top_p=.9, max_tokens=8)
    with LLM(str(folder), device="cuda", load_format="dummy", max_num_seqs=256) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        return llm.runner.num_blocks, (free - torch.cuda.mem_get_info()[0]) / total


@pytest.mark.slow
@pytest.mark.processes
def test_the_cache_takes_what_is_left(tmp_path):
    """Alone, and beside another process that leaves it less than it could use."""
    total = torch.cuda.mem_get_info()[1]
    held = max(HELD, total - 60 * 10**9)
    if total < 2.5 * HELD:
        pytest.skip("the GPU is too small")
    folder = make_model_folder("qwen3-0.6b", tmp_path)
    alone, share = engine_takes(folder)
    torch.cuda.empty_cache()            # what PyTorch kept is free for others
    assert .7 < share < .92
    with started(sys.executable, SCRIPTS / "hold_gpu_memory.py", held,
                 stdin=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "ready\n"
        beside, share = engine_takes(folder)
    assert beside < alone and share < .92


def test_memory_comes_back(good):
    """After close() an engine holds none."""
    settings = dict(device="cuda", gpu_memory_utilization=.3, max_num_seqs=4)
    LLM(good[0], **settings).close()                       # what PyTorch keeps for itself
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with LLM(good[0], **settings) as llm:
            llm.generate([good[1]], use_tqdm=False)
        del llm
        torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soak(dtype, tmp_path):
    """Random requests, aborts and bad requests: memory, blocks, and tokens in fp32."""
    pytest.importorskip("psutil")
    file = tmp_path / "soak.json"
    done = run_python(ROOT / "bench.py", "--device", "cuda", "--dtype", dtype, "--soak", "0.4",
                      "--quiet", "--json", file, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(file.read_text())["soak"]
