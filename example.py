#!/usr/bin/env python3
"""Several users ask at once; one engine answers them together.

    python example.py                                           the bundled demo model
    python example.py --prompt "What is a block table?" --stream
    python example.py --model ~/Qwen3-0.6B --prompt "Why is the sky blue?" --temperature 0.7

With the demo model the users share a system prompt, so its keys and values are computed once and
found in the prefix cache by everyone else; a model of yours gets one with --system. What the engine
measured about itself stands at the end.
"""

import argparse
import os
import sys
import textwrap

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.config import max_positions, read_hf_config, resolve_model

SYSTEM_PROMPT = (  # the one that the demo model was trained with
    "You are the teaching assistant of nano-vLLM, a course in which students build a small "
    "inference engine for large language models. Answer in one to three short sentences, and say "
    "so when you do not know the answer."
)
QUESTIONS = {
    "Ada": "What is PagedAttention?",
    "Bela": "How are physical and logical blocks mapped?",
    "Chen": "How does prefix caching work?",
    "Dora": "What is the difference between continuous and static batching?",
    "Emeka": "How does the scheduler decide which sequences run?",
    "Farah": "How does FlashAttention speed attention up?",
    "Goro": "Why is decode memory bound?",
    "Hana": "What does one step of the engine do?",
}


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="PATH_OR_HUB_ID", help="a checkpoint in Hugging Face layout, or a Hub "
        "id to download (default: the bundled demo model)")
    add("--prompt", action="append", metavar="TEXT", help="a question; may be given several times")
    add("--system", metavar="TEXT", help="the system prompt they share (default: the one that the "
        "demo model was trained with; none for another model)")
    add("--stream", action="store_true", help="one after another, printed as they are generated")

    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sampling("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default)")
    sampling("--top-p", type=float, default=1.0, help="draw within this probability (default 1)")
    sampling("--max-tokens", type=int, default=128, help="per answer, at most (default 128)")
    sampling("--seed", type=int, help="makes a draw repeatable")
    sampling("--stop", action="append", default=[], metavar="TEXT",
             help="end an answer before this text; may be given several times")

    engine = parser.add_argument_group("engine (see nanovllm.Config)").add_argument
    engine("--device", default="auto", help='"auto", "cpu" or "cuda"')
    engine("--dtype", default="auto", help='"auto", "float32", "bfloat16" or "float16"')
    engine("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or 1 "
           "for the demo model, which is so small that a second only costs; else the idle cores)")
    engine("--max-model-len", type=int, help="prompt and answer together, in tokens (default: what "
           "the model is made for)")
    engine("--max-num-seqs", type=int, default=512, help="sequences that run at once, at most")
    engine("--max-num-batched-tokens", type=int, default=16384, help="token budget of a step")
    engine("--kvcache-block-size", type=int, help="tokens per block")
    engine("--num-kvcache-blocks", type=int, default=-1, help="size of the pool; -1: what fits")
    engine("--no-prefix-caching", action="store_true", help="compute every prompt in full")
    engine("--load-format", default="auto", help='"auto", or "dummy" for random weights')
    return parser.parse_args()


def chat_prompt(tokenizer, system, question):
    """The question as the model's chat template puts it; plain if the model has none."""
    if tokenizer is None:
        raise ValueError("model: the folder holds no tokenizer, so it cannot be asked in words")
    if not tokenizer.chat_template:
        return f"{question}\n"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(  # the last is for Qwen3; other templates ignore it
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def answer(llm, users, system, params, stream):
    """Print what the engine answers to each user's question."""
    prompts = [chat_prompt(llm.tokenizer, system, question) for question in users.values()]
    if stream:
        for (user, question), prompt in zip(users.items(), prompts):
            print(f"\n{user}: {question}\n  ", end="", flush=True)
            for text in llm.stream(prompt, params):
                print(text, end="", flush=True)
            print()
        return
    outputs = llm.generate(prompts, params)
    for (user, question), output in zip(users.items(), outputs):
        print(f"\n{user}: {question}")
        print(textwrap.fill(output["text"].strip(), 96, initial_indent="  ",
                            subsequent_indent="  "))
        print(f"  [{len(output['token_ids'])} tokens, {output['finish_reason']}; "
              f"{output['num_cached_tokens']} of {len(output['prompt_token_ids'])} prompt tokens "
              "from the cache]")


def print_stats(llm):
    """What the engine measured about itself."""
    stats = llm.stats
    wanted = stats.computed_tokens + stats.cached_tokens
    print(f"\nsteps        {stats.steps:,} for {stats.generated_tokens:,} generated tokens")
    print(f"tokens       {stats.computed_tokens:,} computed, {stats.cached_tokens:,} served from "
          f"the prefix cache ({stats.cached_tokens / max(wanted, 1):.0%})")
    print(f"KV cache     {stats.peak_blocks:,} blocks in use at the peak, of "
          f"{llm.block_manager.num_blocks:,} with {llm.block_manager.block_size} tokens each")
    print(f"preemptions  {stats.preemptions:,}")
    print(f"throughput   prefill {stats.prefill_throughput:,.0f} tokens/s, "
          f"decode {stats.decode_throughput:,.0f} tokens/s on {llm.runner.device}")


def own_length(folder):
    """Tokens that a checkpoint is made for: its positions, or its sliding window."""
    config = read_hf_config(folder)
    length = max_positions(config) or 4096
    return min(length, getattr(config, "sliding_window", None) or length)


def idle_threads():
    """As many CPU threads as PyTorch would take, but no more than cores that others leave idle."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0   # Windows has none
    return max(1, min(torch.get_num_threads(), round((os.cpu_count() or 1) - load)))


def main():
    """Make an engine, ask, print."""
    args = parse_args()
    is_demo = args.model is None
    system = SYSTEM_PROMPT if is_demo and args.system is None else args.system
    if args.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or (1 if is_demo else idle_threads()))
    users = QUESTIONS
    if args.prompt:
        users = {f"User {number}": text for number, text in enumerate(args.prompt, 1)}
    try:
        params = SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                max_tokens=args.max_tokens, seed=args.seed, stop=args.stop)
        folder = resolve_model(args.model)
        with LLM(folder, device=args.device, dtype=args.dtype,
                 max_model_len=args.max_model_len or own_length(folder),
                 max_num_seqs=args.max_num_seqs,
                 max_num_batched_tokens=args.max_num_batched_tokens,
                 kvcache_block_size=args.kvcache_block_size,
                 num_kvcache_blocks=args.num_kvcache_blocks,
                 enable_prefix_caching=not args.no_prefix_caching,
                 load_format=args.load_format) as llm:
            answer(llm, users, system, params, args.stream)
            print_stats(llm)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
