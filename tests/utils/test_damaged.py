"""A thousand damaged checkpoints: each is an error that names the file, or a model that answers.

Each has a number, its seed: `spoil(folder, number)` makes it again.
"""

import json
import random
import shutil
import struct
import time

import pytest
from fixtures import DEMO_MODEL, make_checkpoint

from nanovllm import LLM, SamplingParams
from tests.engine.test_text import POINTER

SMALL = dict(device="cpu", num_kvcache_blocks=16, kvcache_block_size=4, max_model_len=40,
             kernels="plain")
PARAMS = SamplingParams(temperature=0, max_tokens=3)
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -2.0, 1e-30, 1e30, float("nan"), float("inf"),
          10**6, 10**12, 10**40, "", "x", "2", [], [1], [None], ["x"], {}, {"a": 1}]


def spoil_text(text, rng):
    """Cut, change or replace a text."""
    kind, at = rng.randrange(6), rng.randrange(len(text) + 1)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + rng.choice('{}[]",:0x\x00\ufffd') + text[at + 1:]
    if kind == 2:
        return text[:at] + text[at + rng.randrange(1, 30):]
    return rng.choice([POINTER, "", "null", "[]", "5", text + text, "[" * 10**5, '{"a":' * 10**4])


def spoil_fields(text, rng):
    """Other values for one or two fields of a JSON object, also one level down."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        inside = [value for value in content.values() if isinstance(value, dict) and value]
        place = rng.choice([content, content, *inside])
        name = rng.choice([*place, "rope_scaling", "sliding_window", "layer_types", "dtype"])
        if rng.random() < .2:
            place.pop(name, None)
        else:
            place[name] = rng.choice(VALUES)
    return json.dumps(content)


def spoil_header(data, rng):
    """A safetensors file whose header says something else."""
    size, = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        header[name]["dtype"] = rng.choice(["I8", "F64", "BOOL", "F16", "BF16", "F8_E4M3", "X", 5])
    elif kind == 1:
        header[name]["shape"] = rng.choice([[], [0], [-1], [2**40, 2**40], [1, 1, 1], "x", None])
    elif kind == 2:
        header[name]["data_offsets"] = rng.choice([[0, 0], [-4, 4], [0, 2**60], [8, 4], [], None])
    elif kind == 3:
        header[rng.choice(["odd", "model.norm.weight", name + "x"])] = header.pop(name)
    elif kind == 4:
        del header[name]
    else:
        header[name] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def spoil_bytes(data, rng):
    """Cut, change or lengthen a file of bytes."""
    kind = rng.randrange(5)
    if kind == 0:
        return data[:rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data))])]
    if kind == 1:
        return data + bytes(rng.randrange(1, 100))
    if kind == 2:
        return struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, len(data)])) + data[8:]
    changed, end = bytearray(data), rng.choice([200, 2000, len(data)])
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def spoil(folder, number):
    """Damage one file of a checkpoint; its name."""
    rng = random.Random(number)
    name = rng.choice(["config.json"] * 4 + ["model.safetensors"] * 4 + [
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors.index.json"])
    file = folder / name
    if name == "model.safetensors":
        file.write_bytes(rng.choice([spoil_header, spoil_bytes])(file.read_bytes(), rng))
    else:
        text = file.read_text(encoding="utf-8")
        how = spoil_fields if name != "tokenizer.json" and rng.random() < .7 else spoil_text
        file.write_bytes(how(text, rng).encode(errors="replace"))
    return name


def check(folder, name, number):
    """It is refused with a ValueError about the model, or answers with tokens of its own."""
    start = time.perf_counter()
    try:
        with LLM(folder, **SMALL) as llm:
            out, = llm.generate([[1, 2, 3]], PARAMS, use_tqdm=False)
            assert all(0 <= i < llm.config.hf_config.vocab_size for i in out["token_ids"])
            if llm.tokenizer is not None:
                llm.generate("What is RoPE?", PARAMS, use_tqdm=False)
            llm.default_sampling_params()
            said = ""
    except ValueError as error:
        said = str(error)
    except BaseException as error:
        raise AssertionError(f"damage {number} of {name}") from error
    # a number that cannot be is named, and so is what it makes impossible
    assert said == "" or said.startswith(
        ("model: ", "dtype", "rope_type", "max_model_len", "prompt")), (number, name, said)
    assert time.perf_counter() - start < 20, (number, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small checkpoint with every file that one may have."""
    folder, _ = make_checkpoint(folder=tmp_path_factory.mktemp("whole"), vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}')
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}')
    return folder


@pytest.mark.parametrize("batch", [0, pytest.param(1, marks=pytest.mark.slow), *(
    pytest.param(n, marks=[pytest.mark.slow, pytest.mark.long]) for n in range(2, 20))])
@pytest.mark.filterwarnings("ignore")
def test_damaged(batch, whole, tmp_path):
    for number in range(50 * batch, 50 * batch + 50):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        check(folder, spoil(folder, number), number)
        shutil.rmtree(folder)
