"""What torchrun starts on every rank: FOLDER SIZE SETTINGS PROMPTS MAX_TOKENS; the last three JSON.

The rank that has the tokens prints them.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
from with_parent import end_with  # noqa: E402

end_with(os.getppid())           # torchrun's own end would leave a rank that waits for another

from nanovllm import LLM, SamplingParams  # noqa: E402

folder, size, settings, prompts, max_tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
with LLM(folder, tensor_parallel_size=size, **settings) as llm:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outs = llm.generate(prompts, params, use_tqdm=False)
print("TOKENS", [out["token_ids"] for out in outs])
