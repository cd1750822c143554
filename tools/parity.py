#!/usr/bin/env python3
"""Does this engine compute what transformers computes, for your checkpoint?

    python tools/parity.py                                   the bundled model
    python tools/parity.py FOLDER                            a folder in Hugging Face layout
    python tools/parity.py Qwen/Qwen3-0.6B --revision main   a Hub id (needs the network)
    python tools/parity.py FOLDER --prompt "Hello" --prompt "Once upon" --dtype auto

Both get the same prompts and answer greedily. Then transformers reads each prompt with *our* answer
behind it, in one forward pass, and says how likely it finds every token. For each prompt you see
how many tokens agree, where the answers first part, and how much the log-probabilities differ: the
root mean square and the largest. In float32 the answers are equal and the differences below 1e-3.
In bfloat16 two right implementations part after a while: look at the margin where they do, which
says how close the two tokens were.

Three things are judged, over all prompts together. *Tokens* may part only where transformers itself
is nearly undecided. The *99th percentile* of the differences must be within the tolerance, and
their *root mean square*, without the outliers, within a third of it. Outliers are the few positions
beyond the tolerance: in a right engine they stand where a model has activations of thousands, as at
a first token that all others look at. Each is named. One in a hundred is accepted, or one in each
prompt; more is an error.

Where the folder has a tokenizer.json, a text must become the same tokens by it as by transformers'
AutoTokenizer. If not, both engines are asked something else than the model was made for: a warning.

Exit status: 0 if all is within the tolerance, 1 if not, 2 if the checkpoint cannot be loaded.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: a copy of the package named by PYTHONPATH goes first

# What a tokenizer may treat in its own way: capitals, numbers, code, accents, signs, a break
PROBE = ("Hello WORLD, it's 12345.67 for naïve users:\n\n    def f(x):  return x_1 + 2**10\t"
         "# 你好 🙂 don't we'll")
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
                        help="99th percentile of the differences of log-probabilities that is "
                             "accepted; default: "
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
            "differences": difference.tolist(), "at": int(difference.argmax()) + 1,
            "margin": margin, "tokens": prompt + answer}


def rms(values: list[float]) -> float:
    """The root of the mean of the squares."""
    return math.sqrt(sum(x * x for x in values) / max(1, len(values)))


def judge(found: list[dict], tolerance: float) -> dict:
    """Whether all prompts together are equal, and the figures that say so."""
    ordered = sorted(x for f in found for x in f["differences"])
    p99 = ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)]
    # (which prompt, position of the token whose log-probability differs, by how much)
    outliers = [(number, at, x) for number, f in enumerate(found)
                for at, x in enumerate(f["differences"], 1) if not x <= tolerance]
    usual = rms([x for x in ordered if x <= tolerance])
    # tokens may part where transformers itself is undecided, by less than the tolerance
    parted = [f for f in found if f["part"] is not None and not abs(f["margin"]) <= 2 * tolerance]
    lone = len({number for number, _, _ in outliers}) == len(outliers)
    few = p99 <= tolerance or lone
    good = few and usual <= tolerance / 3 and not parted and len(outliers) < len(ordered) / 4
    return {"good": good, "p99": p99, "rms": usual, "outliers": outliers, "parted": parted,
            "largest": ordered[-1], "positions": len(ordered)}


def tokenizers_disagree(tokenizer, folder: str) -> str | None:
    """What AutoTokenizer and tokenizer.json make of the probe, if it is not the same."""
    file = Path(folder) / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        return None
    from tokenizers import Tokenizer
    raw = Tokenizer.from_file(str(file))
    mine = tokenizer.encode(PROBE, add_special_tokens=False)
    theirs = raw.encode(PROBE, add_special_tokens=False).ids
    if mine == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine),
                                                                               len(theirs)))
    def show(ids):
        return repr(raw.decode(ids[max(0, at - 1):at + 3], skip_special_tokens=False))
    return (f"AutoTokenizer and tokenizer.json disagree on a probe: token {at} is in "
            f"{show(mine)} by the first, in {show(theirs)} by the second. Text prompts reach the "
            "model in pieces that it may not know: ask transformers for the class that "
            "tokenizer_config.json should name, or give token ids")


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
    if warning := tokenizers_disagree(tokenizer, folder):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"\n{'prompt':34}{'tokens':>7}{'answer':>8}{'agree':>7}{'rms':>9}{'largest':>10} at")
    show = (lambda ids: repr(tokenizer.decode(ids))) if tokenizer else str
    found = []
    for out in outs:
        with torch.inference_mode():
            found.append(f := compare(model, out, args.max_tokens))
        text = show(out["prompt_token_ids"])
        print(f"{text if len(text) <= 32 else text[:29] + '...':34}{len(out['prompt_token_ids']):7}"
              f"{len(out['token_ids']):8}{f['agree']:7}{rms(f['differences']):9.0e}"
              f"{max(f['differences']):10.1e} {f['at']}")
        if f["part"] is not None:
            mine, theirs = out["token_ids"][f["part"]], f["theirs"][f["part"]]
            print(f"    after {f['part']} tokens they part: ours {show([mine])}, theirs "
                  f"{show([theirs])}, whose log-probability is larger by {f['margin']:.1e}")
    total, agree = sum(len(out["token_ids"]) for out in outs), sum(f["agree"] for f in found)
    verdict = judge(found, tolerance)
    print(f"\ngreedy: {agree} of {total} tokens agree up to where the answers first part"
          f"\nlog-probabilities at {verdict['positions']} positions: 99% differ by at most "
          f"{verdict['p99']:.1e} (accepted {tolerance:g}), rms {verdict['rms']:.1e} "
          f"(accepted {tolerance / 3:.1g}), largest {verdict['largest']:.1e}")
    for number, at, x in verdict["outliers"][:8]:
        before, token = found[number]["tokens"][at - 1:at + 1]
        print(f"    outlier: prompt {number + 1}, token {at}: {show([token])} after "
              f"{show([before])}, by {x:.1e}")
    print("equal within the tolerance" if verdict["good"] else "NOT equal")
    return 0 if verdict["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
