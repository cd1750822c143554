"""What one request may ask for."""

import copy
import dataclasses
import pickle
import re

import numpy as np
import pytest

from nanovllm import SamplingParams


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5),
    ("top_k", -2), ("max_tokens", 0), ("stop", ""), ("stop", ("a", "")), ("stop", 5),
    ("seed", "x"), ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 1.5),
    ("max_tokens", True), ("min_tokens", -1), ("n", 0), ("n", 16385), ("min_p", 1.1),
    ("min_p", -.1),
    ("presence_penalty", 2.1), ("frequency_penalty", -3), ("repetition_penalty", 0),
    ("stop_token_ids", [-1]), ("stop_token_ids", "a"), ("logit_bias", {3: 101}),
    ("logit_bias", {"3": 1}), ("logit_bias", [3]), ("logits_processors", 5),
    ("skip_special_tokens", 1), ("min_tokens", 65)])
def test_bad_sampling_parameter(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bad", [dict(top_k=2**63), dict(temperature=10**400),
                                 dict(seed=10**5000), dict(temperature=1e31)])
def test_numbers_that_no_tensor_holds(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_one_stop_string_or_several():
    assert SamplingParams(stop="a").stop == ("a",) and SamplingParams(stop=["a", "b"]).stop == (
        "a", "b")
    assert SamplingParams().stop == ()


@pytest.mark.parametrize("name, value", [
    ("ignore_eos", "no"), ("ignore_eos", 1), ("seed", True), ("top_k", True), ("temperature", True),
    ("top_k", 10**4000), ("max_tokens", float("nan"))])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        SamplingParams(**{name: value})


def test_a_large_whole_temperature_is_a_float():
    """As an int64 it would fit into no tensor, in the middle of everybody's step."""
    assert type(SamplingParams(temperature=10**20).temperature) is float


@pytest.mark.parametrize("name, says", [
    ("temprature", "did you mean 'temperature'?"),
    ("max_new_tokens", "did you mean 'max_tokens'?"),
    ("frequence_penalty", "did you mean 'frequency_penalty'?"),
    ("xyz", "There are: temperature, ")])
def test_an_unknown_name_is_answered_with_the_one_meant(name, says):
    begin = f"^'{name}' is not a sampling parameter"
    with pytest.raises(TypeError, match=f"{begin}.*{re.escape(says)}"):
        SamplingParams(**{name: 1})
    with pytest.raises(TypeError, match=f"^'{name}' is not a sampling parameter"):
        dataclasses.replace(SamplingParams(), **{name: 1})


def test_what_vllm_writes_otherwise():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(stop_token_ids=[5, np.int64(7)]).stop_token_ids == (5, 7)
    assert SamplingParams(logits_processors=print).logits_processors == (print,)
    assert SamplingParams(max_tokens=None, min_tokens=999).max_tokens is None


def test_it_can_be_copied_sent_and_kept():
    given = {5: np.float32(1.5)}
    params = SamplingParams(logit_bias=given, stop=["a"], min_p=.5)
    given[7] = 3
    assert params.logit_bias == {5: 1.5} and type(params.logit_bias[5]) is float
    for same in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)),
                 dataclasses.replace(params)):
        assert same == params and hash(same) == hash(params)
