"""Which class runs a checkpoint, and which checkpoints are refused before a weight is read."""

from types import SimpleNamespace

import pytest
from fixtures import FAMILIES, make_hf_model

from nanovllm.models.registry import MODELS, get_model_class


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_class(family):
    config = make_hf_model(family, num_hidden_layers=1).config
    config.architectures = [FAMILIES[family] + "ForCausalLM"]
    assert get_model_class(config) is MODELS[config.architectures[0]]


def test_the_first_that_is_known():
    config = SimpleNamespace(architectures=["Nope", "LlamaForCausalLM"], hidden_act="silu")
    assert get_model_class(config) is MODELS["LlamaForCausalLM"]


@pytest.mark.parametrize("config, complaint", [
    (dict(architectures=["NopeForCausalLM"]), "NopeForCausalLM.*Qwen3ForCausalLM"),
    (dict(architectures=None, model_type="nope"), "'nope' is not supported"),
    (dict(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "fp8"}),
     "quantised .fp8.*use the original"),
    (dict(architectures=["LlamaForCausalLM"], hidden_act="gelu"), "hidden_act 'gelu'.*only 'silu'")
])
def test_refused(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        get_model_class(SimpleNamespace(**config))
