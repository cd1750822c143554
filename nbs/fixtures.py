"""Small models with random weights on which a bug shows, for checks against Hugging Face.

A random checkpoint with tied embeddings and the usual initialisation repeats one token for ever,
whatever is broken. These do not: their weights are larger, and their norm weights are not all 1.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch

HERE = Path(__file__).resolve().parent
DEMO_MODEL = HERE.parent / "nanovllm" / "demo_model"

SHAPE = dict(vocab_size=151, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False,
             rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
             bos_token_id=None, eos_token_id=None, pad_token_id=None)


def randomize(model, seed=0):
    """Weights of standard deviation 1.8 / sqrt(hidden), norm weights 1 + 0.3 N(0, 1), in place."""
    std = 1.8 * model.config.hidden_size**-0.5
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.3 * noise if is_norm else std * noise)
    return model.eval()


FAMILIES = {"qwen3": "Qwen3", "llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral",
            "qwen3_moe": "Qwen3Moe"}
EXTRA = {  # what only some families' configs know
    "mistral": dict(sliding_window=None),
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                      norm_topk_prob=True),
}


def make_hf_model(family="qwen3", seed=0, **shape):
    """A small random transformers model, fp32; `shape` overrides parts of SHAPE."""
    import transformers
    config_class = getattr(transformers, FAMILIES[family] + "Config")
    model_class = getattr(transformers, FAMILIES[family] + "ForCausalLM")
    settings = {**SHAPE, **EXTRA.get(family, {}), "dtype": "float32", **shape}
    settings["rope_parameters"] = dict(settings["rope_parameters"])  # transformers writes into it
    config = config_class(**settings)
    model = randomize(model_class(config), seed)
    model.generation_config.eos_token_id = None  # nothing ends early: every token is compared
    return model


def make_checkpoint(family="qwen3", seed=0, folder=None, **shape):
    """Save such a model; (folder, model). The folder holds no tokenizer: prompts are token ids."""
    model = make_hf_model(family, seed, **shape)
    if folder is None:
        folder = tempfile.mkdtemp(prefix="nanovllm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder = Path(folder)
    model.save_pretrained(folder)
    return folder, model


def random_prompts(lengths, vocab_size=SHAPE["vocab_size"], seed=0):
    """Lists of random token ids of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def hf_generate(model, prompt, max_new_tokens):
    """Greedy completion of one prompt by transformers: the token ids that must come out."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                         do_sample=False)
    return out[0, len(prompt):].tolist()


def define_kernels():
    """Whether kernels can run here. Where Triton is missing they can be defined all the same.

    Without a GPU they need Triton's interpreter, chosen before the first import of Triton.
    """
    if importlib.util.find_spec("triton") is not None:
        from triton.language import zeros
        if not torch.cuda.is_available() and type(zeros).__name__ == "JITFunction":
            print("Triton was imported before TRITON_INTERPRET=1 was set: no kernel is run here.")
            return False
        return True
    importlib.import_module("torch._dynamo")  # it looks for triton: before there is a stand-in
    for name in ("triton", "triton.language"):
        sys.modules[name] = MagicMock(jit=lambda kernel: kernel, __spec__=None)
    return False
