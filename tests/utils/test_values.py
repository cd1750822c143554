"""What counts as a number, whoever made it."""

import numpy as np
import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.utils.values import is_number, is_whole, plain, shown


@pytest.mark.parametrize("value, right", [
    (np.int64(3), 3), (np.float32(.5), .5), (np.bool_(True), True), (np.array(4), 4),
    (torch.tensor(5), 5), (7, 7), ("a", "a"), (None, None)])
def test_a_number_of_numpy_becomes_pythons(value, right):
    assert plain(value) == right and type(plain(value)) is type(right)


def test_what_is_no_single_number_stays():
    several = np.arange(3)
    assert plain(several) is several


def test_whole_numbers_and_numbers():
    values = [0, -5, True, 1.5, float("nan"), float("inf"), "1", None]
    assert [v for v in values if is_whole(v)] == [0, -5]
    assert [v for v in values if is_number(v)] == [0, -5, 1.5]


def test_an_error_can_show_every_value():
    assert shown("a") == "'a'" and len(shown("x" * 10**6)) == 200
    assert "digits" in shown(10**5000)            # Python refuses to print it
    assert "digits" in shown((10**5000,))


@pytest.mark.parametrize("name", ["max_model_len", "num_kvcache_blocks", "kvcache_block_size",
                                  "max_num_seqs"])
@pytest.mark.parametrize("value", [10**5000, 2**62, 2**31], ids=["long", "2**62", "2**31"])
def test_absurd_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number"):
        Config(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "logprobs", "stop", "seed", "top_k",
                                  "stop_token_ids", "logits_processors", "n"])
def test_absurd_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        SamplingParams(**{name: -10**5000})
    if name not in ("stop_token_ids",):
        with pytest.raises(ValueError, match=f"^{name} must"):
            SamplingParams(**{name: 10**5000})


@pytest.mark.parametrize("name, value", [
    ("seed", np.random.default_rng(0).integers(2**31)), ("max_tokens", np.int64(8)),
    ("top_k", np.int32(5)), ("temperature", np.float32(.5)), ("top_p", np.float16(.5)),
    ("logprobs", np.int64(1)), ("prompt_logprobs", np.uint8(1)), ("ignore_eos", np.bool_(True)),
    ("max_tokens", torch.tensor(8))])
def test_sampling_parameters_take_them(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value.item()


@pytest.mark.parametrize("name, value", [
    ("max_num_seqs", np.int64(8)), ("kvcache_block_size", np.int32(16)),
    ("gpu_memory_utilization", np.float32(.5)), ("enforce_eager", np.bool_(True)),
    ("num_kvcache_blocks", np.int64(-1)), ("max_model_len", np.int64(64))])
def test_settings_take_them(name, value):
    found = getattr(Config(**{name: value}), name)
    assert found == value.item() and type(found) in (int, float, bool)
