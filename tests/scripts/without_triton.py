"""The package where Triton cannot be imported: it generates and splits a model all the same."""

import importlib.util
import sys

sys.modules["triton"] = None                                # an import of it fails from now on
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)

from nanovllm import LLM, SamplingParams  # noqa: E402

greedy, answers = SamplingParams(temperature=0, max_tokens=4), []
for size in (1, 2):
    with LLM(device="cpu", tensor_parallel_size=size, num_kvcache_blocks=16) as llm:
        answers.append(llm.generate("What is a rank?", greedy, use_tqdm=False)[0]["token_ids"])
assert answers[0] == answers[1]
try:
    LLM(device="cpu", attention_backend="triton")
except ValueError as error:
    print(error)
