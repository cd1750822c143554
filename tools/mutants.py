#!/usr/bin/env python3
"""Break the package on purpose, one line at a time, and see that the tests notice.

    python tools/mutants.py                  all the mutants
    python tools/mutants.py --only rope      those whose name holds a word

Each mutant is a copy of nanovllm/ with one change. The tests run on it, first those of the module
that was changed, and one must fail. A mutant that survives means that a bug of its kind would go
unnoticed. It takes half an hour or more, so it is no part of test.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name, module, what stands there, what takes its place
MUTANTS = [
    ("norm eps ignored", "layers/layernorm.py", "keepdim=True) + self.eps", "keepdim=True) + .01"),
    ("norm weight before the cast", "layers/layernorm.py", "return self.weight * wide.to(x.dtype)",
     "return (self.weight * wide).to(x.dtype)"),
    ("gate and up swapped", "layers/activation.py", "gate, up = x", "up, gate = x"),
    ("rope interleaved", "layers/rotary_embedding.py", "x1, x2 = x.chunk(2, dim=-1)",
     "x1, x2 = x[..., ::2], x[..., 1::2]"),
    ("rope theta fixed", "layers/rotary_embedding.py", 'rope["rope_theta"] **', "10_000.0 **"),
    ("llama3 rope scaling ignored", "layers/rotary_embedding.py",
     '"llama3": llama3_inv_freq', '"llama3": default_inv_freq'),
    ("linear rope scaling ignored", "layers/rotary_embedding.py",
     '"linear": linear_inv_freq', '"linear": default_inv_freq'),
    ("head_dim guessed", "models/qwen3.py", 'getattr(config, "head_dim", None) or ', ""),
    ("q norm left out", "models/qwen3.py", "self.q_norm(q), self.k_norm(k)", "q, self.k_norm(k)"),
    ("q and k norm swapped", "models/qwen3.py", "self.q_norm(q), self.k_norm(k)",
     "self.k_norm(q), self.q_norm(k)"),
    ("attention bias left out", "models/qwen3.py", 'getattr(config, "attention_bias", False)',
     "False"),
    ("Qwen2 without biases", "models/qwen2.py", "qkv_bias = True", "qkv_bias = False"),
    ("experts' shares not scaled", "models/qwen3_moe.py", "if self.norm_topk_prob:", "if False:"),
    ("experts unweighted", "models/qwen3_moe.py", " * weights[rows, rank, None]", ""),
    ("experts in every layer", "models/qwen3_moe.py",
     "and index not in (config.mlp_only_layers or ())", ""),
    ("yarn's factor on q and k left out", "layers/rotary_embedding.py",
     'if kind == "yarn" else 1.0', "if False else 1.0"),
    ("yarn's ramp not rounded", "layers/rotary_embedding.py", 'rope.get("truncate", True)',
     "False"),
    ("dynamic rope of the whole text", "layers/rotary_embedding.py",
     "factor * (positions + 1) / length", "factor * len(positions) / length"),
    ("scaling does not reach further", "config.py", "return int(limit * factor)", "return limit"),
    ("sliding window ignored", "config.py", "if window and self", "if False and self"),
    ("attention scale", "layers/attention.py", "head_dim ** -0.5", "(head_dim + 1) ** -0.5"),
    ("causal mask top left", "layers/attention.py", ".tril(context_len - n)", ".tril()"),
    ("decode sees one key too many", "layers/attention.py", "device=q.device) < lens",
     "device=q.device) <= lens"),
    ("values stored as keys", "layers/attention.py", "[slot_mapping] = v", "[slot_mapping] = k"),
    ("prompt that is to be scored taken from the cache", "engine/block_manager.py",
     " and seq.sampling_params.prompt_logprobs is None", ""),
    ("the last token is matched too", "engine/block_manager.py",
     "range((len(seq) - 1) // self.block_size)", "range(len(seq) // self.block_size)"),
    ("digest without its parent", "engine/block_manager.py",
     'parent = digests[-1] if digests else b""', 'parent = b""'),
    ("evicted block stays in the map", "engine/block_manager.py",
     "del self.cached_blocks[block.hash]\n            block.hash = None\n        block.ref_count",
     "block.hash = None\n        block.ref_count"),
    ("revived blocks not counted", "engine/block_manager.py",
     "if num_new + num_revived > self", "if num_new > self"),
    ("partial blocks announced", "engine/block_manager.py",
     "last = (seq.num_computed_tokens + num_new_tokens) // self.block_size",
     "last = self.blocks_for(seq.num_computed_tokens + num_new_tokens)"),
    ("pending survives a failed step", "engine/block_manager.py",
     "        self.discard_pending()\n", "        self.publish()\n"),
    ("chunk samples too", "engine/scheduler.py", "samples=n == seq.num_uncomputed_tokens",
     "samples=True"),
    ("blocks of the finished not freed", "engine/scheduler.py",
     "        self.block_manager.free(seq)\n        seq.finish(reason)",
     "        seq.finish(reason)"),
    ("decode positions off by one", "engine/model_runner.py",
     "positions.append(p)", "positions.append(p + 1)"),
    ("key length of the whole prompt", "engine/model_runner.py", "lens.append(end)",
     "lens.append(len(seq))"),
    ("kernel: norm eps", "cpu/small.c", "sum / n + eps", "sum / n + 0.01f"),
    ("kernel: rotation the other way", "cpu/small.c", "b * c + a * s",
     "b * c - a * s"),
    ("kernel: decode sees one key too few", "cpu/attention.c", "lengths[row], heads / parts",
     "lengths[row] - (lengths[row] > 1), heads / parts"),
    ("kernel: prefill sees a key too many", "cpu/attention.c", "before + 1 - first",
     "before + 2 - first"),
    ("kernel: prefill forgets to fade", "cpu/attention.c", "to[c] * remains[i]", "to[c]"),
    ("kernel: bias left out", "cpu/linear.c", "start[i] = load(bias[j + i])",
     "start[i] = 0"),
    ("kernel: values stored as keys", "cpu/small.c", "v + t * v_stride",
     "k + t * k_stride"),
    ("logits of the first tokens", "engine/model_runner.py", "hidden = hidden[step.samples]",
     "hidden = hidden[:len(step.samples)]"),
    ("triton: place within a block", "gpu/attention_kernels.py",
     "position % BS * slot_stride\n                  + kv_head * head_stride",
     "kv_head * head_stride"),
    ("triton: parts merged as equals", "gpu/attention_kernels.py",
     'tl.exp2(lse - tl.where(largest == -float("inf"), 0.0, largest))', "tl.exp2((lse - lse) * 0)"),
    ("triton: a token from the future", "gpu/attention_kernels.py",
     "position[None, :] <= q_position[:, None]", "position[None, :] < q_position[:, None] + 2"),
    ("triton: q's norm for k too", "gpu/layer_kernels.py", "(k_head >= 0)[:, None] * 2",
     "(k_head < -99)[:, None] * 2"),
    ("triton: values turned as keys are", "gpu/layer_kernels.py",
     "tl.where(is_v, v_low, turned_low.to(dtype))", "turned_low.to(dtype)"),
    ("triton: keys without a slot stored", "gpu/layer_kernels.py",
     "mask & (is_q | (slot >= 0))", "mask"),
    ("triton: one row's next weights cut off", "gpu/layer_kernels.py",
     "next_w = tl.load(tile_ptrs + start + BK, mask=exists & next_inside",
     "next_w = tl.load(tile_ptrs + start + BK, mask=exists & (next_inside & (k > 0))"),
    ("triton: one row's residual replaced", "gpu/layer_kernels.py",
     "        y += tl.load(out_ptr + n", "        y = y + 0 * tl.load(out_ptr + n"),
    ("one row without its bias", "gpu/fuse.py", " and matrix.bias is None", ""),
    ("triton: sum not kept", "gpu/layer_kernels.py",
     "        tl.store(residual_ptr + offsets, total, mask=mask)\n", ""),
    ("padded rows write to slot 0", "engine/cuda_graphs.py", "host.slot_mapping.fill_(-1)",
     "host.slot_mapping.fill_(0)"),
    ("step ahead without a slot", "gpu/lookahead.py",
     "manager.append_slot(seqs[i], ahead=1)", "pass"),
    ("step ahead at the old place", "engine/model_runner.py",
     "start = len(seq) if ahead else", "start = len(seq) - 1 if ahead else"),
    ("step ahead for whoever comes", "gpu/lookahead.py",
     "get((id(row), len(row.seq)))", "get((id(row), len(row.seq)), (0, None))"),
    ("failed step not rolled back", "engine/books.py", "self.scheduler.rollback(open_)", "pass"),
    ("failed generate leaves requests", "llm.py", "self._dropped.update(ids)", "pass"),
    ("stream closed in a step waits for nobody", "engine/books.py", "if not self._in_turn:",
     "if False:"),
    ("signals come while books are written", "engine/interrupts.py",
     "        if self.waits:\n", "        if False:\n"),
    ("NaN is token 0", "layers/sampler.py", "torch.where(best.isfinite(), tokens, -1)",
     "tokens"),
    ("NaN behind the mask", "layers/attention.py",
     "            x.masked_fill_(~mask[:, :, None, None], 0)\n", "            pass\n"),
    ("everybody is to blame", "engine/culprits.py", "if error}", "if True}"),
    ("log-probabilities of the token before", "engine/outputs.py",
     "found += [(request, p + 1,", "found += [(request, p,"),
    ("log-probabilities written twice", "engine/outputs.py",
     ".logprobs[due[i].seq.num_completion_tokens:] = [entry]", ".logprobs.append(entry)"),
    ("log-probabilities without their sum", "layers/sampler.py", ".float().log_softmax(-1)",
     ".float()"),
    ("greedy where the checkpoint says draw", "engine/text.py",
     "    if not samples:", "    if samples:"),
    ("pieces of a tensor in one place", "utils/loader.py", "target[first:first + step].copy_",
     "target[:step].copy_"),
    ("fused tensors in the wrong rows", "utils/loader.py", "start += rows", "start += 0"),
    ("missing tensors accepted", "utils/loader.py", "{*targets} - {*found}", "{}"),
    ("left-over tensors accepted", "utils/loader.py", "{*found} - {*targets}", "set()"),
    ("the fast path is believed", "engine/proof.py", "return agreed", "return True"),
    ("plain kernels are not plain", "engine/proof.py", 'if config.kernels == "plain":',
     "if False:"),
    ("ranks lose who samples", "engine/ranks.py", "packed[end:].tolist()", "[]"),
    ("the beginning of a stop string is shown", "engine/text.py",
     "if any(s.startswith(self.text[at:]) for s in self.stop)", "if False"),
    ("seeded draws depend on the batch", "layers/sampler.py",
     "stream_seed(p.seed, index), *noise", "stream_seed(p.seed, index) + row, *noise"),
    ("top-p without the token that crosses", "layers/sampler.py",
     "probs.cumsum(-1) - probs ", "probs.cumsum(-1) "),
    ("the bias once per rank", "layers/linear.py", "y if self.bias is None else y + self.bias",
     "y if self.bias is None else y + self.group.world_size * self.bias"),
    ("the youngest is spared", "engine/scheduler.py", "youngest = next(reversed(self.running))",
     "youngest = next(iter(self.running))"),
]


def nearest_tests(module: str) -> list[str]:
    """The tests of a module of the package, the nearest there are."""
    folder, _, name = module.removesuffix(".py").rpartition("/")
    folder = {"gpu": "gpu_room"}.get(folder, folder)
    file = ROOT / "tests" / folder / f"test_{name}.py"
    return [str(file if file.exists() else file.parent)]


REST = [str(ROOT / "tests" / name) for name in (
    "engine", "layers", "models", "utils", "test_llm.py", "test_config.py", "cpu", "gpu_room")]


def survives(module: str, before: str, after: str) -> bool:
    """Whether the tests pass on a package with this change."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "nanovllm"
        shutil.copytree(ROOT / "nanovllm", package)
        file = package / module
        text = file.read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise SystemExit(f"{module} holds {text.count(before)} times: {before!r}")
        file.write_text(text.replace(before, after), encoding="utf-8")
        return all(passes(Path(folder), tests) for tests in (nearest_tests(module), REST))


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether these tests pass with the package that stands in a folder."""
    # not `python -m pytest`: that would put the working folder in front of the mutant
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
               "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, cwd=folder, env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:      # an engine that never comes to an end: noticed
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode not in (0, 1) or re.search(r"^ERROR [^\s:]+\.py(\s|$)", output, re.M):
        raise SystemExit(output)           # tests that cannot even be read tell nothing
    return process.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose name holds it")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant[0]]
    if not chosen:
        parser.error(f"no mutant's name holds {args.only!r}")
    for tests in {tuple(nearest_tests(module)) for _, module, _, _ in chosen}:
        if not passes(ROOT, list(tests)):
            parser.error(f"these fail without any mutant: {' '.join(tests)}")
    survivors = []
    for number, (name, *change) in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {name} … ", end="", flush=True)
        start = time.perf_counter()
        if survives(*change):
            survivors.append(name)
        print("SURVIVES" if name in survivors else "noticed",
              f"({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed"
          + (f"; survivors: {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
