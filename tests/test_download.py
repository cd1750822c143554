"""What is asked of the Hub, and what a user reads when it does not answer."""

from pathlib import Path
from unittest import mock

import pytest

from nanovllm.config import DEMO_MODEL, resolve_model

HUB = "huggingface_hub.snapshot_download"


def test_weights_and_text_are_fetched_and_no_code():
    with mock.patch(HUB, return_value="cache/qwen") as hub:
        assert resolve_model("Qwen/Qwen3-0.6B") == Path("cache/qwen")
    asked = hub.call_args.kwargs["allow_patterns"]
    assert "*.safetensors" in asked and not [p for p in asked if p.endswith((".bin", ".pt", ".py"))]
    assert hub.call_args.args == ("Qwen/Qwen3-0.6B",) and hub.call_args.kwargs["revision"] is None


def test_a_revision_belongs_to_a_hub_id():
    with mock.patch(HUB, return_value="cache/qwen") as hub:
        resolve_model("Qwen/Qwen3-0.6B", "v1.0")
    assert hub.call_args.kwargs["revision"] == "v1.0"
    with pytest.raises(ValueError, match="belongs to a Hub id"):
        resolve_model(DEMO_MODEL, "v1.0")


def test_a_failed_download_names_what_was_asked():
    with mock.patch(HUB, side_effect=OSError("no route to host")):
        with pytest.raises(ValueError, match="'a/b@v2'.*no route to host.*give its folder"):
            resolve_model("a/b", "v2")


@pytest.mark.parametrize("path", ["./Qwen3-0.6B", "~/models/no-such", "models/qwen/0.6B", "qwen3",
                                  "/no/such/folder"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(path):
    with mock.patch(HUB, side_effect=AssertionError("asked the Hub")):
        with pytest.raises(ValueError, match="there is no folder"):
            resolve_model(path)
