"""Tests of nanovllm/gpu. Those in interpreted/ need Triton's interpreter, chosen before any import
of Triton: `test_interpreted.py` runs them, each file in a process of its own."""

import importlib.util
import os

if importlib.util.find_spec("nanovllm.gpu") is None:
    collect_ignore_glob = ["*"]
elif os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["interpreted/*"]
