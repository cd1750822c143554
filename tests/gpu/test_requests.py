"""On a GPU: what the calling thread has set, logits processors, requests that fail, a server."""

import asyncio
from dataclasses import replace

import pytest
import torch
from fixtures import make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.gpu
NEW = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
WISHES = [replace(GREEDY, logprobs=3, prompt_logprobs=2),
          replace(GREEDY, temperature=1.5, seed=3, top_p=.9, presence_penalty=.5,
                  logit_bias={7: 1.5}),
          replace(GREEDY, temperature=1.2, seed=4, top_k=40, top_p=.9, max_tokens=9),
          replace(GREEDY, temperature=1.2, seed=5, min_p=.01)]
PROMPTS = random_prompts([5, 33, 17, 8], 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(folder=tmp_path_factory.mktemp("model"), num_attention_heads=4)[0]


def make(folder, **settings):
    return LLM(folder, device="cuda", dtype="float32", num_kvcache_blocks=64, max_model_len=160,
               max_num_seqs=8, check_books=True, **settings)


@pytest.fixture(scope="module", params=["auto", "plain"])
def llm(request, folder):
    with make(folder, kernels=request.param) as llm:
        yield llm


def tokens(llm, wishes, prompts=PROMPTS):
    return [out["token_ids"] for out in llm.generate(prompts, wishes, use_tqdm=False)]


@pytest.mark.parametrize("setting", [lambda: torch.autocast("cuda", torch.bfloat16),
                                     lambda: torch.device("cuda"), lambda: torch.device("meta")],
                         ids=["autocast", "cuda", "meta"])
def test_what_the_caller_has_set_changes_nothing(setting, llm, folder, caplog):
    want = tokens(llm, WISHES)
    with setting():
        assert tokens(llm, WISHES) == want
        with make(folder, kernels=llm.config.kernels) as other:
            assert tokens(other, WISHES) == want
    assert "is not used" not in caplog.text


def test_the_same_tokens_as_on_a_cpu(llm, folder):
    """Penalties, bias and seeds; whoever is seeded draws the same noise everywhere."""
    with LLM(folder, device="cpu", num_kvcache_blocks=64, max_model_len=160) as other:
        assert tokens(other, WISHES) == tokens(llm, WISHES)


def only(*allowed):
    """A processor: nothing but these tokens; it runs on the host."""
    def processor(completion, logits):
        mask = torch.full_like(logits, -torch.inf)
        mask[list(allowed)] = 0
        return logits + mask
    return processor


def test_a_processor_beside_others(llm):
    alone = [tokens(llm, GREEDY, [prompt])[0] for prompt in PROMPTS]
    params = [GREEDY, replace(GREEDY, logits_processors=[only(3, 4)]), GREEDY, GREEDY]
    found = tokens(llm, params)
    assert [found[0], *found[2:]] == [alone[0], *alone[2:]] and set(found[1]) <= {3, 4}


def test_a_processor_that_fails_ends_its_own_request(llm):
    def fail(completion, logits):
        if len(completion) == 3:
            raise ValueError("lost")
        return logits

    want = tokens(llm, GREEDY)
    params = [GREEDY, replace(GREEDY, logits_processors=[fail]), GREEDY, GREEDY]
    outs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [outs[i]["token_ids"] for i in (0, 2, 3)] == [want[i] for i in (0, 2, 3)]
    assert outs[1]["finish_reason"] == "error" and "lost" in outs[1]["error"]
    assert not llm.block_manager.num_used_blocks


def test_many_users_of_whom_some_leave(folder):
    """The engine lives in a thread of its own, and steps are made ahead."""
    AsyncEngine = pytest.importorskip("nanovllm.serve").AsyncEngine
    prompts = random_prompts([5 + i % 40 for i in range(60)], 100)
    with make(folder) as llm:
        want = tokens(llm, GREEDY, prompts)

    async def user(engine, i):
        found = []
        outputs = engine.generate(prompts[i], GREEDY)
        async for output in outputs:
            found += output.token_ids
            if i % 3 == 0 and len(found) > 4:
                break
        await outputs.aclose()
        return found

    async def run():
        async with AsyncEngine(lambda: make(folder)) as engine:
            found = await asyncio.gather(*(user(engine, i) for i in range(len(prompts))))
            while engine.num_unfinished:
                await asyncio.sleep(.01)
            used = await engine.call(lambda llm: llm.block_manager.num_used_blocks)
        return found, used

    found, used = asyncio.run(run())
    assert used == 0
    for i, ids in enumerate(found):
        assert ids == (want[i][:len(ids)] if i % 3 == 0 else want[i])
