"""What cannot work is refused: the error names the argument and a remedy, nobody else suffers."""

import json

import pytest
from fixtures import hf_generate, make_checkpoint, random_prompts
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams

NEW = 8
SMALL = dict(num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint, a prompt, and the tokens that must follow it."""
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("good"))
    prompt, = random_prompts([9])
    return folder, prompt, hf_generate(model, prompt, NEW)


@pytest.fixture
def llm(good):
    with LLM(good[0], **SMALL) as llm:
        yield llm


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(folder=tmp_path)[0]


def is_right(llm, good):
    """No block is lost, nothing is left over, and the next answer is right."""
    assert llm.block_manager.num_free_blocks == llm.block_manager.num_blocks
    assert llm.is_finished()
    out, = llm.generate([good[1]], GREEDY, use_tqdm=False)
    assert out["token_ids"] == good[2]


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, file, metadata={"format": "pt"})


def make_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


NORM = "model.layers.1.self_attn.q_norm.weight"
SPOIL = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "load_format='dummy'"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "convert"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]), "cut short.*fetch it again"),
    "missing": (lambda f: set_tensors(f, lambda t: t.pop(NORM)), f"lacks.*{NORM}"),
    "extra": (lambda f: set_tensors(f, lambda t: t.update(odd=t[NORM])), "unexpected.*odd"),
    "shape": (lambda f: set_tensors(f, lambda t: t.update({NORM: t[NORM][:-1]})),
              rf"{NORM}.*\[15\].*\[16\]"),
    "architecture": (lambda f: set_config(f, architectures=["NopeForCausalLM"]),
                     "NopeForCausalLM.*Qwen3ForCausalLM"),
    "quantised": (lambda f: set_config(f, quantization_config={"quant_method": "fp8"}),
                  "quantised .fp8.*use the original"),
    "old gptq": (lambda f: (f / "quantize_config.json").write_text("{}"),
                 "quantised checkpoint.*give the original"),
    "adapter": (lambda f: make_adapter(f), "an adapter.*merge it"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"),
             "GGUF.*give the original"),
    "sliding": (lambda f: set_config(f, use_sliding_window=True, sliding_window=16,
                                     max_window_layers=0, layer_types=None),
                "max_model_len=40.*sliding_window=16.*choose 16"),
    "activation": (lambda f: set_config(f, hidden_act="gelu"), "hidden_act 'gelu'.*only 'silu'"),
    "rope": (lambda f: set_config(f, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8}), "rope_type 'longrope'.*default"),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_bad_checkpoint(kind, checkpoint):
    spoil, complaint = SPOIL[kind]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        LLM(checkpoint, **SMALL)


def test_a_file_is_no_checkpoint(checkpoint):
    with pytest.raises(ValueError, match="is a file.*Give the folder"):
        LLM(checkpoint / "model.safetensors")


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder.*Hub id"):
        LLM(tmp_path / "nope")


@pytest.mark.parametrize("name, value", [
    ("num_kvcache_blocks", 10**15), ("num_kvcache_blocks", 10**30), ("num_kvcache_blocks", 0),
    ("num_kvcache_blocks", 1.5), ("kvcache_block_size", 0), ("kvcache_block_size", "4"),
    ("dtype", "fp32"), ("dtype", "int8"), ("dtype", None), ("device", "gpu"), ("device", "meta"),
    ("device", None), ("attention_backend", "nope"), ("load_format", "gguf"),
    ("tensor_parallel_size", 3), ("max_model_len", 0), ("max_num_batched_tokens", 0),
    ("max_num_seqs", "a"), ("revision", 1), ("revision", "main"),
    ("gpu_memory_utilization", 1.5), ("gpu_memory_utilization", "a")])
def test_bad_setting(name, value, good):
    with pytest.raises(ValueError, match=name):
        LLM(good[0], **{**SMALL, name: value})


def test_a_block_larger_than_memory(good):
    with pytest.raises(ValueError, match="bytes are left.*lower kvcache_block_size"):
        LLM(good[0], device="cpu", kvcache_block_size=10**12, max_model_len=40)


def test_unknown_setting(good):
    with pytest.raises(TypeError, match="'max_num_seq'.*did you mean 'max_num_seqs'"):
        LLM(good[0], max_num_seq=3)


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5),
    ("top_k", -1), ("max_tokens", 0), ("stop", ""), ("stop", ("a", "")), ("stop", 5),
    ("seed", "x"), ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 1.5)])
def test_bad_sampling_parameter(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("prompt, error, complaint", [
    ([1] * 40, ValueError, "max_model_len=40.*shorten"),
    ([1] * 33, ValueError, "there are 8.*num_kvcache_blocks"),
    ([], ValueError, "prompt is empty"), ("text", ValueError, "no tokenizer.*token ids"),
    ([151], ValueError, "prompt.*151.*0 to 150"), ([-1], ValueError, "prompt.*-1.*0 to 150"),
    ([1.5], TypeError, "prompt must be"), (["5"], TypeError, "prompt must be"),
    (None, TypeError, "prompt must be")])
def test_bad_prompt_leaves_others_alone(prompt, error, complaint, llm, good):
    other = llm.add_request(good[1], GREEDY)
    llm.step()
    for call in (llm.add_request, llm.stream):
        with pytest.raises(error, match=complaint):
            call(prompt, GREEDY)
    with pytest.raises(error, match=complaint):  # the good one beside it is not queued either
        llm.generate([good[1], prompt], GREEDY, use_tqdm=False)
    done = []
    while not llm.is_finished():
        done += [out.output for out in llm.step() if out.output]
    assert [(out["request_id"], out["token_ids"]) for out in done] == [(other, good[2])]
    is_right(llm, good)


def test_empty_text():
    with LLM(num_kvcache_blocks=8) as llm, pytest.raises(ValueError, match="prompt is empty"):
        llm.generate("")


@pytest.mark.parametrize("prompts, params, error, complaint", [
    ([[1]], [GREEDY] * 2, ValueError, "got 2 for 1.*one for each"),
    ([[1], [2]], [GREEDY], ValueError, "got 1 for 2.*one for each"),
    ([[1]], {"temperature": 0}, TypeError, "sampling_params must be"),
    ([[1]], 0.5, TypeError, "sampling_params must be"),
    ([[1]], [{"temperature": 0}], TypeError, "must be SamplingParams"),
    ([1, 2], GREEDY, TypeError, "bare token id"),
    (None, GREEDY, TypeError, "prompts must be"), (5, GREEDY, TypeError, "prompts must be")])
def test_bad_call(prompts, params, error, complaint, llm, good):
    with pytest.raises(error, match=complaint):
        llm.generate(prompts, params, use_tqdm=False)
    is_right(llm, good)


def test_closed_engine(llm):
    llm.close()
    llm.close()
    for call in (lambda: llm.generate([[1]]), lambda: llm.generate([]), llm.step,
                 lambda: llm.add_request([1]), lambda: llm.stream([1])):
        with pytest.raises(RuntimeError, match="closed; make a new one"):
            call()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failing_step_is_rolled_back(at, error, llm, good, monkeypatch):
    run, calls = llm.runner.run, []

    def fail(batch):
        calls.append(batch)
        if len(calls) == at:
            raise error("injected")
        return run(batch)

    monkeypatch.setattr(llm.runner, "run", fail)
    other = llm.add_request(good[1], GREEDY)
    with pytest.raises(error):
        llm.generate([good[1][:5], good[1]], GREEDY, use_tqdm=False)
    assert list(llm.requests) == [other]
    done = []
    while not llm.is_finished():  # what was queued before goes on as if nothing had happened
        done += [out.output for out in llm.step() if out.output]
    assert [(out["request_id"], out["token_ids"]) for out in done] == [(other, good[2])]
    is_right(llm, good)


def test_nobody_shares_what_a_failed_step_was_to_write(llm, good, monkeypatch):
    """The second prompt found the blocks of the first in the step that failed."""
    run = llm.runner.run
    monkeypatch.setattr(llm.runner, "run", lambda batch: 1 / 0)
    first, second = (llm.add_request(good[1], GREEDY) for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        llm.step()
    monkeypatch.setattr(llm.runner, "run", run)
    llm.abort(first)
    done = []
    while not llm.is_finished():
        done += [out.output for out in llm.step() if out.output]
    assert [(out["request_id"], out["token_ids"]) for out in done] == [(second, good[2])]
    is_right(llm, good)


def test_abort(llm, good):
    first, second = (llm.add_request(good[1], GREEDY) for _ in range(2))
    llm.step()
    assert llm.abort(first)["finish_reason"] == "abort" and llm.abort(first) is None
    done = []
    while not llm.is_finished():
        done += [out.output for out in llm.step() if out.output]
    assert [(out["request_id"], out["token_ids"]) for out in done] == [(second, good[2])]
    is_right(llm, good)


def test_stream_closed_early():
    with LLM(num_kvcache_blocks=64) as llm:
        stream = llm.stream("What is prefill?", SamplingParams(temperature=0))
        assert next(stream)
        stream.close()
        assert llm.is_finished()
        assert llm.block_manager.num_free_blocks == llm.block_manager.num_blocks
