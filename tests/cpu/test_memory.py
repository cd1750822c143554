"""Ever new numbers of rows cost no memory: oneDNN keeps a product for each that it has seen."""

import pytest

from tests.processes import run_python

CODE = """
import gc, os, random
import psutil
from nanovllm import LLM, SamplingParams
rng, memory = random.Random(0), psutil.Process().memory_info
with LLM(device="cpu", num_kvcache_blocks=512) as llm:
    def ask(rows):
        prompts = [[rng.randrange(100) for _ in range(rng.randrange(1, 12))] for _ in range(rows)]
        params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 20), ignore_eos=True)
                  for _ in range(rows)]
        llm.generate(prompts, params, use_tqdm=False)
    ask(250)
    before = memory().rss
    for _ in range(12):
        ask(rng.randrange(1, 250))
    gc.collect()
    print((memory().rss - before) // 10**6)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_many_numbers_of_rows_take_no_memory():
    result = run_python("-c", CODE)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100
