"""Between text and ids: half characters, stop strings, and what a checkpoint says of its ends."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import DEMO_MODEL

from nanovllm import LLM, SamplingParams
from nanovllm.engine.text import (
    Detokenizer, encode_prompt, find_eos_token_ids, load_tokenizer, read_generation_config,
    recommended_params,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


class Bytes:
    """A tokenizer whose tokens are bytes; from 256 on they are special."""
    bos_token = None

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def pieces(text, stop=(), tokenizer=Bytes()):
    """(certain text after each byte of `text`, the detokenizer)."""
    detokenizer = Detokenizer(tokenizer, stop)
    shown = []
    for byte in text.encode():
        detokenizer.append(byte)
        shown.append(detokenizer.certain_text())
    return shown, detokenizer


def test_half_a_character_is_held_back():
    shown, detokenizer = pieces("aé€b")
    assert shown == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]
    detokenizer.finish()
    assert detokenizer.text == "aé€b"


def test_what_never_becomes_a_character_is_shown_at_the_end():
    detokenizer = Detokenizer(Bytes())
    for byte in "a€".encode()[:-1]:
        detokenizer.append(byte)
        assert detokenizer.certain_text() == "a"
    detokenizer.finish()
    assert detokenizer.text == "a\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_bytes_without_end_that_are_no_text(seed, tokenizer):
    """Their text is the same, comes before the end, and is not decoded from its beginning."""
    rng, longest = random.Random(seed), 0
    halves = [i for i in range(1024) if tokenizer.decode([i]) == "\ufffd"]
    ids = rng.choices(halves[:60] if seed else halves[:1], k=400)
    if seed % 2:
        ids[100:100] = tokenizer.encode("né🙂€ and text")

    class Watched:
        def decode(self, ids, **kwargs):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, **kwargs)

    detokenizer = Detokenizer(Watched())
    for number, token in enumerate(ids):
        before = detokenizer.certain_text()
        detokenizer.append(token)
        assert detokenizer.certain_text().startswith(before)
        assert number < 30 or detokenizer.text
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids) and longest < 60


def test_special_tokens_between_halves_are_no_text():
    """However many: the rest of a character may still come."""
    detokenizer = Detokenizer(Bytes())
    for token in [0xf0, 0x9f] + [300] * 40 + [0x99, 0x82]:
        detokenizer.append(token)
        assert detokenizer.certain_text() in ("", "🙂")
    assert detokenizer.certain_text() == "🙂"


def test_special_tokens_are_no_text():
    detokenizer = Detokenizer(Bytes())
    for token in (97, 300, 98):
        detokenizer.append(token)
    assert detokenizer.certain_text() == "ab"


def test_a_stop_string_across_tokens():
    """Its beginning is held back, and given out when it goes on otherwise."""
    shown, detokenizer = pieces("ab<e<end>c", stop=("<end>",))
    assert shown == ["a", "ab", "ab", "ab", "ab<e", "ab<e", "ab<e", "ab<e", "ab<e", "ab<e"]
    assert detokenizer.stopped and detokenizer.text == "ab<e"


def test_the_first_of_several_stop_strings():
    _, detokenizer = pieces("one two", stop=("two", "e t"))
    assert detokenizer.stopped and detokenizer.text == "on"


@pytest.mark.parametrize("min_tokens, text", [(0, "a"), (1, "a"), (2, "aENDb"), (4, "aENDb"),
                                              (5, "aENDb"), (8, "aENDbEND")])
def test_no_stop_string_begins_before_min_tokens(min_tokens, text):
    detokenizer, shown = Detokenizer(Bytes(), ("END",), min_tokens=min_tokens), []
    for byte in b"aENDbENDENDc":
        if not detokenizer.stopped:
            detokenizer.append(byte)
            shown.append(detokenizer.certain_text())
    detokenizer.finish()
    assert detokenizer.text == text and all(text.startswith(piece) for piece in shown)


def test_a_stop_string_that_does_not_come():
    shown, detokenizer = pieces("ab<", stop=("<end>",))
    assert shown[-1] == "ab" and not detokenizer.stopped
    detokenizer.finish()
    assert detokenizer.text == "ab<"


@pytest.mark.parametrize("seed", range(30))
def test_what_is_certain_only_grows(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab€é🙂") for _ in range(30))
    stop = ("ab€", "🙂b")
    shown, detokenizer = pieces(text, stop)
    detokenizer.finish()
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    assert detokenizer.text == (text[:min(cuts)] if cuts else text)
    for before, after in zip(shown, [*shown[1:], detokenizer.text]):
        assert after.startswith(before)


def test_stop_without_a_tokenizer():
    with pytest.raises(ValueError, match="stop needs text"):
        Detokenizer(None, ("a",))
    detokenizer = Detokenizer(None)
    detokenizer.append(5)
    detokenizer.finish()
    assert detokenizer.text == detokenizer.certain_text() == ""


def test_token_by_token_like_all_at_once(tokenizer):
    """Spaces depend on the token before."""
    ids = tokenizer.encode("Paged attention: keys, values — and 🙂 blocks.")
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.append(token)
        detokenizer.certain_text()
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_prompts(tokenizer):
    assert encode_prompt("What is RoPE?", tokenizer, 9999) == tokenizer.encode("What is RoPE?")
    assert encode_prompt((1, np.int64(2)), None, 3) == [1, 2]
    for prompt, error in [([3], ValueError), ([-1], ValueError), ([1.0], TypeError),
                          (["1"], TypeError), (None, TypeError), ("text", ValueError)]:
        with pytest.raises(error, match="prompt"):
            encode_prompt(prompt, None, 3)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="prompt"):
        encode_prompt("\ud800", tokenizer, 9999)


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_generation_config(tmp_path):
    assert read_generation_config(tmp_path) is None
    file = tmp_path / "generation_config.json"
    file.write_text('{"top_k": 3}')
    assert read_generation_config(tmp_path) == {"top_k": 3}
    for content in ("[]", "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match="generation_config.json.*fetch it again"):
            read_generation_config(tmp_path)


def test_all_who_name_an_end_of_text_are_heard(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    config = SimpleNamespace(model=tmp_path, hf_config=SimpleNamespace(eos_token_id=2))
    assert find_eos_token_ids(config, SimpleNamespace(eos_token_id=5)) == {2, 3, 4, 5}
    nothing = SimpleNamespace(model=tmp_path / "none", hf_config=SimpleNamespace())
    assert find_eos_token_ids(nothing, None) == frozenset()


def test_the_beginning_of_sequence_comes_once(tmp_path):
    """A tokenizer that puts it in front, as Llama's, and a template that does, too."""
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    name, number = (tokenizer["added_tokens"][0][key] for key in ("content", "id"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": name}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    greedy = SamplingParams(temperature=0, max_tokens=10)
    with LLM(folder, num_kvcache_blocks=32) as llm:
        messages = [{"role": "user", "content": "What is RoPE?"}]
        outs = llm.chat(messages, greedy, use_tqdm=False)
        outs += llm.generate(["What is RoPE?", name + "What is RoPE?"], greedy, use_tqdm=False)
        body = llm.tokenizer.encode("What is RoPE?", add_special_tokens=False)
    assert [out["prompt_token_ids"] for out in outs] == [[number, *body]] * 3


def test_a_stop_string_ends_the_request(demo):
    """Also where max_tokens is reached by the same token."""
    greedy = SamplingParams(temperature=0, max_tokens=32)
    whole = demo.generate("What is RoPE?\n", greedy, use_tqdm=False)[0]
    stop = whole["text"][10:14]
    cut = demo.generate("What is RoPE?\n", SamplingParams(temperature=0, max_tokens=32, stop=stop),
                        use_tqdm=False)[0]
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][:whole["text"].find(stop)]
    last = SamplingParams(temperature=0, max_tokens=len(cut["token_ids"]), stop=stop)
    again = demo.generate("What is RoPE?\n", last, use_tqdm=False)[0]
    assert (again["text"], again["finish_reason"]) == (cut["text"], "stop")
    assert demo.block_manager.num_used_blocks == 0


# -----------------------------------------------------------------------------------------------
# Stop strings that are special tokens; spaces at the very beginning
# -----------------------------------------------------------------------------------------------

class Special(Bytes):
    """Bytes; token 256 is special and called <end>, 257 is added and ordinary text."""
    added_tokens_decoder = {256: SimpleNamespace(content="<end>", special=True),
                            257: SimpleNamespace(content="<text>", special=False)}


def test_a_stop_string_that_is_a_special_token():
    detokenizer = Detokenizer(Special(), ("x", "<end>"))
    for token in (*"aé".encode()[:-1], 256):
        assert not detokenizer.stopped
        detokenizer.append(token)
    assert detokenizer.stopped
    detokenizer.finish()
    assert detokenizer.text == "a\ufffd"                          # nothing is lost, nothing added


def test_the_same_written_in_ordinary_tokens():
    _, detokenizer = pieces("ab<end>c", ("<end>",), Special())
    assert detokenizer.stopped and detokenizer.text == "ab"


def test_a_stop_string_that_only_holds_a_special_token():
    with pytest.raises(ValueError, match="^stop '<end>.n' holds the special token '<end>'.*alone"):
        Detokenizer(Special(), ("<end>\n",))
    Detokenizer(Special(), ("<text>\n",))                         # that is text, and can be found


def test_a_special_token_of_a_checkpoint_ends_the_request(demo):
    name = "<|im_start|>"
    start = demo.tokenizer.convert_tokens_to_ids(name)
    step = demo.add_request("What is RoPE?", SamplingParams(temperature=0, stop=name))
    request = demo.requests[step]
    demo.step()
    request.detokenizer.append(start)
    assert request.detokenizer.stopped


class Words:
    """Like Llama 2's tokenizer: a word brings the space before it; decode strips the first one."""
    bos_token = None
    words = {0: "", 1: " Hello", 2: " world", 3: "!", 4: " again"}  # 0 is special

    def decode(self, ids, skip_special_tokens):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize("prompt, completion, text", [
    ([1], [2, 3], " world!"), ([1, 2, 3] * 5, [4, 2], " again world"), ([0], [1, 2], "Hello world"),
    ([1, 0], [2], " world"), ([], [1], "Hello"), ([1, 3], [3, 4], "! again")])
def test_the_first_space_of_a_completion(prompt, completion, text):
    """Prompt and completion together are what the tokenizer makes of all tokens."""
    for asked in (True, False):
        detokenizer = Detokenizer(Words(), prompt=prompt)
        for token in completion:
            detokenizer.append(token)
            if asked:
                detokenizer.certain_text()
        detokenizer.finish()
        assert detokenizer.text == text
        assert detokenizer.token_ids == completion


def test_half_a_character_in_the_prompt_takes_nothing_away():
    prompt, completion = list("a€".encode()[:-1]), [*"€".encode()[-1:], *b"bc"]
    detokenizer = Detokenizer(Bytes(), prompt=prompt)
    for token in completion:
        detokenizer.append(token)
    detokenizer.finish()
    assert detokenizer.text == "\ufffdbc"


def test_a_tokenizer_that_tidies_up_loses_no_characters(tmp_path):
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "clean_up_tokenization_spaces": True}))
    tokenizer, text = load_tokenizer(folder), "It is n't so . Or , is it ?"
    detokenizer = Detokenizer(tokenizer)
    for token in tokenizer.encode(text):
        detokenizer.append(token)
        detokenizer.certain_text()
    detokenizer.finish()
    assert detokenizer.text == text


@pytest.mark.parametrize("stop", ["a" * 10**5, "ab" * 10**5])
def test_a_long_stop_string_costs_little(stop):
    detokenizer = Detokenizer(Bytes(), (stop,))
    for byte in stop[:300].encode():
        detokenizer.append(byte)
    assert detokenizer.certain_text() == "" and not detokenizer.stopped
    detokenizer.append(ord("c"))
    assert detokenizer.certain_text() == stop[:300] + "c"


# -----------------------------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11422654\n"


@pytest.mark.parametrize("name, content, complaint", [
    ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs.*git lfs pull"),
    ("tokenizer_config.json", POINTER, "tokenizer_config.json is a pointer of git-lfs"),
    ("chat_template.jinja", POINTER, "chat_template.jinja is a pointer of git-lfs"),
    ("tokenizer.json", "{", "tokenizer.json is damaged"),
    ("tokenizer.json", "[]", "tokenizer.json"),
    ("tokenizer.json", "{}", "cannot read the tokenizer"), ("tokenizer.json", "", "tokenizer.json"),
    ("tokenizer_config.json", "[1]", "tokenizer_config.json holds no JSON object"),
    ("tokenizer_config.json", "[" * 10**5, "tokenizer_config.json is damaged"),
])
def test_damaged_tokenizer(name, content, complaint, tmp_path):
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(folder)


@pytest.mark.parametrize("ids", ["2", 2.0, True, [1, "2"], {"a": 1}, [[2]], [1, None, 1.5], -1,
                                 [2, -1]], ids=str)
def test_an_end_of_text_that_is_no_id(ids, tmp_path):
    """It would never come, and the text would not end."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    config = SimpleNamespace(model=tmp_path, hf_config=SimpleNamespace())
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
        find_eos_token_ids(config, None)


@pytest.mark.parametrize("given, found, ignored", [
    ({"stop_strings": ["a"], "do_sample": True}, {"stop": ("a",)}, []),
    ({"repetition_penalty": 1.1, "min_p": .1}, {"temperature": 0, "repetition_penalty": 1.1,
                                                "min_p": .1}, []),
    ({"encoder_repetition_penalty": 1.0, "num_beams": 1, "max_length": 20, "length_penalty": 1.0,
      "token_healing": False, "bad_words_ids": None, "forced_eos_token_id": []},
     {"temperature": 0}, []),
    ({"use_cache": True, "transformers_version": "5", "_from_model_config": True,
      "pad_token_id": 3, "cache_implementation": "static", "output_scores": True},
     {"temperature": 0}, []),
    *[({name: value}, {"temperature": 0}, [name]) for name, value in [
        ("suppress_tokens", [5]), ("num_beams", 4),
        ("begin_suppress_tokens", [1]), ("bad_words_ids", [[3]]), ("sequence_bias", [[[1], 2.0]]),
        ("min_new_tokens", 5), ("max_length", 4096), ("penalty_alpha", .6), ("eta_cutoff", 1e-3),
        ("forced_bos_token_id", 3), ("guidance_scale", 2), ("what_comes_next_year", 1)]]], ids=str)
def test_every_wish_is_obeyed_or_named(given, found, ignored, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert recommended_params(tmp_path) == (found, ignored)


@pytest.mark.parametrize("name, value", [
    ("temperature", "hot"), ("temperature", -1), ("top_k", 2.5), ("top_k", "5"), ("top_p", 0),
    ("max_new_tokens", 0), ("max_new_tokens", True), ("stop_strings", [5]), ("do_sample", "no"),
    ("top_p", [0.9])])
def test_a_wish_that_cannot_be_meant(name, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"generation_config.json: {name}"):
        recommended_params(tmp_path)
