"""What an engine loads before its first token: nothing slow that it has no use for."""

import json

import pytest

from tests.processes import SCRIPTS, run_python

# Each costs a tenth of a second or more, and a careless call draws it in: sympy came with
# torch.empty_like of a meta tensor.
NEEDLESS = ("sympy", "torch._dynamo", "torch._inductor", "transformers.modeling_utils",
            "matplotlib", "pandas", "scipy", "IPython", "sentencepiece")
pytestmark = pytest.mark.processes


def loaded_after(code: str, names=NEEDLESS) -> list[str]:
    """Which of these modules a fresh process has loaded after `code`."""
    done = run_python(SCRIPTS / "loaded_modules.py", code, *names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_neither_transformers_nor_what_it_draws_in():
    assert loaded_after("import nanovllm", ("transformers", *NEEDLESS)) == []


def test_first_token_on_a_cpu_loads_nothing_needless():
    assert loaded_after("from nanovllm import LLM\n"
                        "with LLM(device='cpu', num_kvcache_blocks=64) as llm:\n"
                        "    next(llm.stream('What is a block table?'))") == []


def test_several_threads_make_the_first_engines():
    """transformers imports its parts when they are asked for, and not for two threads at once."""
    script = """
import threading
from nanovllm import LLM, SamplingParams
made, wish = [], SamplingParams(temperature=0, max_tokens=3)

def make():
    with LLM(device="cpu", num_kvcache_blocks=8) as llm:
        made.append(llm.generate([[5, 6, 7]], wish, use_tqdm=False)[0]["token_ids"])

threads = [threading.Thread(target=make) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(made), len({*map(tuple, made)}))
"""
    done = run_python("-c", script)
    assert done.stdout == "4 1\n", done.stderr
