"""What one request may ask for."""

import pytest

from nanovllm import SamplingParams


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5),
    ("top_k", -2), ("max_tokens", 0), ("stop", ""), ("stop", ("a", "")), ("stop", 5),
    ("seed", "x"), ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", 1.5),
    ("max_tokens", True)])
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
