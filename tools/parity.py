#!/usr/bin/env python3
"""Does this engine compute what transformers computes, for your checkpoint?

    python tools/parity.py                                   the bundled model
    python tools/parity.py FOLDER                            a folder in Hugging Face layout
    python tools/parity.py Qwen/Qwen3-0.6B --revision main   a Hub id (needs the network)
    python tools/parity.py FOLDER --prompt "Hello" --prompt "Once upon" --dtype auto

Both get the same prompts and answer greedily. Then transformers reads each prompt with *our* answer
behind it, in one forward pass, and says how likely it finds every token. For each prompt you see
how many tokens agree, where the answers first part, and the largest difference of any
log-probability. In float32 the answers are equal and the differences below 1e-3. In bfloat16 two
right implementations part after a while: look at the margin where they do, which says how close
the two tokens were.

Exit status: 0 if all is within the tolerance, 1 if not, 2 if the checkpoint cannot be loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: a copy of the package named by PYTHONPATH goes first

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Two households, both alike in dignity,\nIn fair Verona, where we lay our scene,",
    "Explain in one sentence what a KV cache is.",
    "The quick brown fox jumps over the lazy dog. " * 30 + "Then the fox",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id; default: the bundled model")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="a prompt of your own, any number of times; default: six of ours")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N",
                        help="tokens of each answer (default 32); the end of sequence is ignored")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16",
                                                              "auto"],
                        help="default float32, in which both must agree; auto: the checkpoint's")
    parser.add_argument("--device", default="auto", help='"auto", "cpu" or "cuda"')
    parser.add_argument("--attention-backend", default="auto", metavar="NAME", help="of the engine")
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="largest difference of a log-probability that is accepted; default: "
                             + ", ".join(f"{x:g} in {name}" for name, x in TOLERANCE.items()))
    args = parser.parse_args()
    if args.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    return args


def make_prompts(args, tokenizer, vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts; without a tokenizer, of random ones."""
    if tokenizer is not None:
        return [tokenizer.encode(text) for text in args.prompt or PROMPTS]
    if args.prompt:
        raise ValueError("--prompt: the checkpoint has no tokenizer; leave it out for random ids")
    import torch
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist()
            for n in (1, 5, 17, 64, 150)]


def run_engine(args) -> tuple:
    """Prompts, outputs, device, dtype, folder and tokenizer; the engine is gone afterwards."""
    from nanovllm import LLM, SamplingParams
    with LLM(args.model, revision=args.revision, dtype=args.dtype, device=args.device,
             attention_backend=args.attention_backend) as llm:
        prompts = make_prompts(args, llm.tokenizer, llm.config.hf_config.vocab_size)
        room = llm.config.max_model_len - args.max_tokens
        prompts = [ids[:room] for ids in prompts]
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True,
                                logprobs=0, prompt_logprobs=0)
        outs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        return outs, llm.runner.device, llm.runner.dtype, llm.config.model, llm.tokenizer


def compare(model, out: dict, max_tokens: int) -> dict:
    """One prompt's figures: agreement, where the answers part, differences of log-probabilities."""
    import torch
    prompt, answer = out["prompt_token_ids"], out["token_ids"]
    ids = torch.tensor([prompt], device=model.device)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt):].tolist()
    part = next((i for i, (a, b) in enumerate(zip(answer, theirs)) if a != b), None)
    whole = torch.tensor([prompt + answer], device=model.device)
    right = model(whole).logits[0, :-1].float().log_softmax(-1)          # [n - 1, vocab]
    right = right.cpu()
    tokens = (prompt + answer)[1:]
    mine = torch.tensor([entry[t] for entry, t
                         in zip(out["prompt_logprobs"][1:] + out["logprobs"], tokens)])
    difference = (mine - right[torch.arange(len(tokens)), tokens]).abs()
    margin = None
    if part is not None:  # how much likelier transformers finds its own token than ours
        row = right[len(prompt) - 1 + part]
        margin = (row[theirs[part]] - row[answer[part]]).item()
    return {"agree": part if part is not None else len(answer), "part": part, "theirs": theirs,
            "difference": difference.max().item(), "at": int(difference.argmax()) + 1,
            "margin": margin}


def main() -> int:
    args = parse_args()
    if args.model and Path(args.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is there
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        outs, device, dtype, folder, tokenizer = run_engine(args)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[name] if args.tolerance is None else args.tolerance
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False).eval().to(device)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=args.max_tokens, pad_token_id=0)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {name} on {device}; "
          f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"\n{'prompt':34}{'tokens':>7}{'answer':>8}{'agree':>7}{'largest difference':>20} at")
    show = (lambda ids: repr(tokenizer.decode(ids))) if tokenizer else str
    found = []
    for out in outs:
        with torch.inference_mode():
            found.append(f := compare(model, out, args.max_tokens))
        text = show(out["prompt_token_ids"])
        print(f"{text if len(text) <= 32 else text[:29] + '...':34}{len(out['prompt_token_ids']):7}"
              f"{len(out['token_ids']):8}{f['agree']:7}{f['difference']:20.1e} {f['at']}")
        if f["part"] is not None:
            mine, theirs = out["token_ids"][f["part"]], f["theirs"][f["part"]]
            print(f"    after {f['part']} tokens they part: ours {show([mine])}, theirs "
                  f"{show([theirs])}, whose log-probability is larger by {f['margin']:.1e}")
    total, agree = sum(len(out["token_ids"]) for out in outs), sum(f["agree"] for f in found)
    worst = max(f["difference"] for f in found)
    # tokens may part where transformers itself is undecided, by less than the tolerance
    parted = [f for f in found if f["part"] is not None and abs(f["margin"]) > 2 * tolerance]
    good = worst <= tolerance and not parted
    print(f"\ngreedy: {agree} of {total} tokens agree up to where the answers first part"
          f"\nlog-probabilities: largest difference {worst:.1e}, accepted {tolerance:g}"
          f"\n{'equal within the tolerance' if good else 'NOT equal'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
