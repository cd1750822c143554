"""Where the tests find the package, the notebooks' fixtures and each other; no network is used."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs"))
sys.path.append(str(ROOT))  # last: a copy of the package named by PYTHONPATH goes first
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only cost
# A shell without job control starts what runs in the background with Ctrl-C ignored, for its
# children too; and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Tests of many minutes run when they are asked for: `python -m pytest -m long`."""
    if "long" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="takes many minutes: python -m pytest -m long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """name of tests.parity.SHAPES -> checkpoint, prompts by length, what transformers answers."""
    from fixtures import hf_generate, make_checkpoint, random_prompts

    from tests.parity import ALL_LENGTHS, NEW, SHAPES
    made = {}

    def get(name):
        if name not in made:
            folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("model"), **SHAPES[name])
            prompts = dict(zip(ALL_LENGTHS, random_prompts(ALL_LENGTHS, model.config.vocab_size)))
            tokens = {n: hf_generate(model, p, NEW) for n, p in prompts.items()}
            made[name] = SimpleNamespace(folder=folder, model=model, prompts=prompts, tokens=tokens)
        return made[name]

    return get


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A checkpoint that nobody changes, a prompt, and the 8 tokens that must follow it."""
    from fixtures import hf_generate, make_checkpoint, random_prompts
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("good"))
    prompt, = random_prompts([9])
    return folder, prompt, hf_generate(model, prompt, 8)


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a checkpoint that a test may spoil."""
    from fixtures import make_checkpoint
    return make_checkpoint(folder=tmp_path)[0]


@pytest.fixture
def demo():
    """An engine with the demo model."""
    from nanovllm import LLM
    with LLM(device="cpu", num_kvcache_blocks=128) as llm:
        yield llm
