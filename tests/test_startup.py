"""What an engine loads before its first token: nothing slow that it has no use for."""

import subprocess
import sys

# Each costs a tenth of a second or more, and a careless call draws it in: sympy came with
# torch.empty_like of a meta tensor.
NEEDLESS = ("sympy", "torch._dynamo", "torch._inductor", "transformers.modeling_utils",
            "matplotlib", "pandas", "scipy", "IPython", "sentencepiece")


def loaded_after(code: str) -> list[str]:
    """Which of the NEEDLESS modules a fresh process has loaded after `code`."""
    code += f"\nimport sys\nprint([name for name in {NEEDLESS} if name in sys.modules])"
    return eval(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                               text=True).stdout)


def test_import_loads_neither_transformers_nor_what_it_draws_in():
    assert loaded_after("import nanovllm, sys; assert 'transformers' not in sys.modules") == []


def test_first_token_on_a_cpu_loads_nothing_needless():
    assert loaded_after("from nanovllm import LLM\n"
                        "with LLM(device='cpu', num_kvcache_blocks=64) as llm:\n"
                        "    next(llm.stream('What is a block table?'))") == []
