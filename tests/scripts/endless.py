"""Two ranks that generate until Ctrl-C, and answer once more after it. No main guard: a script."""

from nanovllm import LLM, SamplingParams

llm = LLM(tensor_parallel_size=2, device="cpu", num_kvcache_blocks=256)
greedy = SamplingParams(temperature=0)
print("ready", *[p.pid for p in llm.runner.workers.processes.values()], flush=True)
try:
    while True:
        llm.generate("What is a block table?", greedy, use_tqdm=False)
except KeyboardInterrupt:
    out, = llm.generate("What is a block table?", greedy, use_tqdm=False)
    print(out["text"], flush=True)
