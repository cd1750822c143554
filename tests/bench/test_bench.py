"""bench.py and bench/: workloads, figures, a small run, a cut run, a soak, and what is refused."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
from bench.machine import PeakMemory
from bench.models import gguf_model
from bench.options import engine_list
from bench.soak import Soak, settled
from bench.to_gguf import write_gguf
from nanovllm.config import DEMO_MODEL
from nanovllm.utils.metrics import percentile

ROOT = Path(__file__).resolve().parents[2]
LATENCIES = ("ttft", "tpot", "itl")
main = runpy.run_path(str(ROOT / "bench.py"))["main"]  # `import bench` is the folder


def run(tmp_path, *args):
    """Exit status and JSON of a run in this process (its engines have their own)."""
    file = tmp_path / "report.json"
    status = main([*args, "--quiet", "--json", str(file)])
    return status, json.loads(file.read_text()) if file.exists() else None


def test_the_name_bench_is_the_folder():
    assert Path(bench.__file__) == ROOT / "bench" / "__init__.py"


# -----------------------------------------------------------------------------------------------
# Workloads and figures
# -----------------------------------------------------------------------------------------------

def test_full_size_is_the_workload_of_nano_vllm():
    requests = bench.make_workload("nano-vllm")
    assert len(requests) == 256
    assert sum(r["max_tokens"] for r in requests) == 133_966  # as its README has it
    assert sum(len(r["prompt"]) for r in requests) == 142_827


@pytest.mark.parametrize("name", bench.WORKLOADS)
def test_runs_have_equal_lengths_and_new_tokens(name):
    first, again, other = (bench.make_workload(name, 0.1, run=run) for run in (0, 0, 1))
    assert first == again

    def lengths(requests):
        return [(len(r["prompt"]), r["max_tokens"], r.get("at"), r.get("after"))
                for r in requests]

    assert lengths(first) == lengths(other)
    assert all(a["prompt"] != b["prompt"] for a, b in zip(first, other))


def test_shared_prefix_is_shared_and_arrivals_have_their_rate():
    prompts = [r["prompt"] for r in bench.make_workload("shared-prefix", 1.0)]
    assert len({tuple(p[:1024]) for p in prompts}) == 1 and len({tuple(p) for p in prompts}) > 100
    due = [r["at"] for r in bench.make_workload("poisson", requests=4000, rate=5.0, scale=0.01)]
    assert due == sorted(due) and len(due) / due[-1] == pytest.approx(5.0, rel=0.1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values, q):
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9)


def test_figures_of_a_run_counted_by_hand():
    requests = [dict(prompt=[1] * 10, max_tokens=3, at=0.0), dict(prompt=[1] * 30, max_tokens=2,
                                                                 at=1.0)]
    result = dict(arrived=[0.0, 1.0], times=[[0.5, 0.6, 0.9], [3.0, 3.4]], seconds=4.0,
                  was_cut=False, cached_tokens=10, preemptions=2)
    got = bench.figures(requests, result)
    assert got["output_throughput"] == 5 / 4 and got["total_throughput"] == 45 / 4
    assert got["ttft"]["mean"] == pytest.approx((0.5 + 2.0) / 2)
    assert got["tpot"]["mean"] == pytest.approx((0.2 + 0.4) / 2)
    assert got["itl"]["p50"] == pytest.approx(0.3) and got["itl"]["max"] == pytest.approx(0.4)
    assert got["prefix_hit_rate"] == 10 / 40 and got["preemptions"] == 2
    assert got["finished_requests"] == 2


def test_ceiling_counted_by_hand():
    requests = [dict(prompt=[1] * 10, max_tokens=3, at=0.0)]
    limits = dict(weight_bytes=100, kv_bytes_per_token=2, bandwidth=10.0)
    # three passes; the keys and values of 10, 11 and 12 tokens
    assert bench.decode_floor(requests, limits) == (3 * 100 + 33 * 2) / 10
    assert bench.decode_floor([dict(requests[0], at=1.0)], limits) is None


def test_recorder_hands_out_what_is_due_and_counts_no_token_twice():
    requests = [dict(prompt=[1], max_tokens=2, at=0.0), dict(prompt=[1], max_tokens=1, after=2),
                dict(prompt=[1], max_tokens=1, at=0.01)]
    recorder = bench.Recorder(requests, limit=60)
    assert recorder.take(most=1) == [0]
    recorder.add(0, [5])
    assert 1 in recorder.pending
    recorder.add(0, [6, 7, 8])                   # two more than it asked for
    assert recorder.tokens[0] == [5, 6] and recorder.count == 2
    assert 1 in recorder.take()                  # two tokens are there
    recorder.take(is_idle=True)                  # waits for the last one
    assert recorder.now() >= 0.01 and not recorder.pending


# -----------------------------------------------------------------------------------------------
# Runs
# -----------------------------------------------------------------------------------------------

@pytest.mark.processes
@pytest.mark.slow
def test_small_run_has_every_figure_and_a_failing_engine_harms_nobody(tmp_path, capsys):
    status, report = run(tmp_path, "--scale", "0.02", "--runs", "2", "--workload", "nano-vllm",
                         "shared-prefix", "--config", "broken:num_kvcache_blocks=1")
    printed = capsys.readouterr()
    assert status == 1 and "broken: failed: ValueError: prompt needs" in printed.err
    assert [r["workload"] for r in report["records"]] == ["nano-vllm", "shared-prefix"]
    for record in report["records"]:
        limits = record["limits"]
        assert limits["weight_bytes"] > 4e6 and limits["bandwidth"] > 1e8
        for name in ("nanovllm", "hf"):
            entry = record["engines"][name]
            assert len(entry["runs"]) == 2 and entry["error"] is None
            for got in entry["runs"]:
                assert got["output_tokens"] == record["output_tokens"]
                assert got["finished_requests"] == record["requests"]
                assert got["output_throughput"] < got["total_throughput"]
                assert all(got[name]["p50"] <= got[name]["p95"] <= got[name]["p99"]
                           for name in LATENCIES)
                assert got["peak_memory_bytes"] > 1e8 and got["preemptions"] == 0
                assert got["prefix_hit_rate"] is not None
            summary = entry["summary"]
            assert summary["same_tokens"]["share"] == 1.0           # fp32: token for token
            assert 0 < summary["share_of_ceiling"] < 1
            rate = summary["output_throughput"]
            assert rate["min"] <= rate["median"] <= rate["max"]
    ours = report["records"][1]["engines"]["nanovllm"]["runs"][0]
    assert ours["prefix_hit_rate"] > 0.5 and ours["steps"] > 0 and ours["computed_tokens"] > 0


@pytest.mark.processes
@pytest.mark.slow
def test_a_cut_run_says_so(tmp_path, capsys):
    status, report = run(tmp_path, "--engines", "nanovllm", "--runs", "1", "--scale", "0.5",
                         "--requests", "40", "--limit", "0.5", "--workload", "nano-vllm")
    got, = report["records"][0]["engines"]["nanovllm"]["runs"]
    assert status == 0 and got["was_cut"] and 0 < got["output_tokens"] < 40 * 280
    assert got["seconds"] < 5 and "was cut at its time limit" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.slow
def test_several_numbers_of_requests_are_measured_one_after_another(tmp_path):
    status, report = run(tmp_path, "--engines", "nanovllm", "--runs", "1", "--scale", "0.02",
                         "--workload", "decode", "--requests", "1", "3")
    assert status == 0 and [r["requests"] for r in report["records"]] == [1, 3]


@pytest.mark.skipif("LLAMA_PYTHON" not in os.environ, reason="LLAMA_PYTHON names no environment "
                    "with llama-cpp-python")
def test_llama_cpp_gives_the_tokens_of_hugging_face(tmp_path):
    status, report = run(tmp_path, "--engines", "hf", "llama-cpp", "--runs", "2", "--scale", "0.05",
                         "--workload", "nano-vllm", "long-prompt", "--llama-python",
                         os.environ["LLAMA_PYTHON"])
    assert status == 0
    for record in report["records"]:
        got = record["engines"]["llama-cpp"]["summary"]
        assert got["same_tokens"] == {"as": "hf", "share": 1.0}


FAKE_NANO_VLLM = """
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature > 0 and ignore_eos
        self.max_tokens = max_tokens
class Sequence:
    def __init__(self, params):
        self.completion_token_ids, self.most, self.is_finished = [], params.max_tokens, False
class LLM:
    def __init__(self, model, max_model_len):
        self.scheduler, self.waiting = self, []
    def add_request(self, prompt, params):
        self.waiting.append(Sequence(params))
    def is_finished(self):
        return not self.waiting
    def step(self):
        for seq in list(self.waiting):
            seq.completion_token_ids.append(7)
            if len(seq.completion_token_ids) == seq.most:
                seq.is_finished = True
                self.waiting.remove(seq)
"""


@pytest.mark.processes
@pytest.mark.slow
def test_nano_vllm_comes_from_its_own_folder(tmp_path, capsys):
    options = ["--engines", "nano-vllm", "--runs", "1", "--scale", "0.02", "--workload",
               "nano-vllm", "--nano-vllm"]
    assert run(tmp_path, *options, str(tmp_path))[0] == 1
    assert "holds no package nanovllm" in capsys.readouterr().err
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm" / "__init__.py").write_text(FAKE_NANO_VLLM)
    status, report = run(tmp_path, *options, str(tmp_path))
    got, = report["records"][0]["engines"]["nano-vllm"]["runs"]
    assert status == 0 and got["output_tokens"] == report["records"][0]["output_tokens"]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("minutes", [0.1, 1, pytest.param(10, marks=pytest.mark.long)])
def test_soak(minutes, tmp_path, capsys):
    """Ten minutes are the gate; the short one is for every day."""
    status, report = run(tmp_path, "--soak", str(minutes))
    got = report["soak"]
    assert status == 0 and got["free_blocks"] == got["num_blocks"]
    assert got["requests"] == got["finished"] + got["aborted"] + got["failed"]
    assert got["hostile"] >= got["failed"] and got["tokens"] > 500 and got["preemptions"] > 0
    for name in ("finished", "refused", "signals", "known"):
        assert got[name] > (5 if minutes < 1 else 20), name     # a busy machine does little
    if minutes >= 1:
        assert got["worker_deaths"] == minutes
    if minutes > 1:
        assert bench.drift(got, "rss") < 0.05
    assert len(got["samples"]) > 5 and all(s["rss"] > 1e7 for s in got["samples"])
    assert "free at the end" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fault, complaint", [
    ("block", "the books are wrong"), ("tokens", "is right"), ("request", "were lost")])
def test_a_soak_finds_what_is_wrong(fault, complaint, monkeypatch):
    from nanovllm.engine.block_manager import BlockManager
    before, free = signal.getsignal(signal.SIGALRM), BlockManager.free
    soak = Soak(str(DEMO_MODEL), "cpu", "auto", False, 1, {})
    if fault == "block":
        monkeypatch.setattr(BlockManager, "free", lambda self, seq: (
            None if len(seq) > 40 else free(self, seq)))
    elif fault == "tokens":
        soak.known = [(prompt, params, [1]) for prompt, params, _ in soak.known]
    else:
        monkeypatch.setattr(soak, "_end", lambda output: None)
    with pytest.raises(RuntimeError, match=complaint):
        soak.run(5.0, lambda progress: None)
    signal.signal(signal.SIGALRM, before)


def test_drift_is_the_farthest_stray_after_settling():
    samples = [dict(seconds=t, rss=r) for t, r in [(0, 50), (10, 100), (20, 103), (30, 99)]]
    result = dict(samples=samples, settle=10)
    assert settled(result) == samples[1:]
    assert bench.drift(result, "rss") == pytest.approx(0.03)


def test_peak_memory_counts_children_and_starts_anew():
    child = "b = bytearray(60_000_000); print('here', flush=True); input()"
    program = f"""
import subprocess, sys
b = bytearray(80_000_000)
del b
print("gone", flush=True)
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE)
sys.stdin.readline()
child.communicate(b"end")
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "gone\n"
        memory = PeakMemory(process.pid)
        before = memory.peak()
        memory.restart()
        after = memory.peak()
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "here\n"
        assert before > 80e6 and after < 60e6 < memory.peak()
        print(file=process.stdin, flush=True)


def test_measured_records_can_be_drawn(tmp_path):
    report = json.loads((ROOT / "nbs" / "measured" / "h100_bench.json").read_text())
    figure = bench.draw(report["records"])
    assert [row[0].get_title(loc="left") for row in np.split(np.array(figure.axes), 2)] == [
        f"{record['model']} · {record['workload']}" for record in report["records"]]
    figure.savefig(tmp_path / "plot.png")


# -----------------------------------------------------------------------------------------------
# GGUF, for llama.cpp
# -----------------------------------------------------------------------------------------------

def read_gguf(file):
    """Metadata and tensors of a GGUF file, as the package gguf reads them."""
    from gguf import GGUFReader
    reader = GGUFReader(file)
    tensors = {}
    for found in reader.tensors:
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[found.tensor_type.name]
        raw = torch.from_numpy(np.array(found.data)).contiguous().view(dtype)
        tensors[found.name] = raw.view(*reversed(found.shape.tolist()))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def quantised(file, kind="Q4_0"):
    """The demo model as a GGUF file with matrices of few bits, as llama.cpp's own tool makes it."""
    import gguf
    plain = file.with_name("plain.gguf")
    write_gguf(ROOT / "nanovllm" / "demo_model", plain, "float32")
    reader, kind = gguf.GGUFReader(plain), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "qwen3")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        small = gguf.quants.quantize(data, kind) if data.ndim > 1 else data
        writer.add_tensor(tensor.name, small, raw_dtype=kind if data.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.slow
def test_limits_of_a_gguf_file(tmp_path):
    from bench.machine import probe
    demo = str(ROOT / "nanovllm" / "demo_model")
    want = probe(demo, "cpu", "auto")
    few = gguf_model(str(quantised(tmp_path / "few.gguf")), None, tmp_path, "auto")
    got = probe(few.folder, "cpu", "auto")
    assert (got["dtype"], few.title) == ("q4_0", "few.gguf")
    for name in ("vocab", "max_model_len"):
        assert got[name] == want[name]
    assert got["kv_bytes_per_token"] * 2 == want["kv_bytes_per_token"]      # fp16 for fp32
    assert want["weight_bytes"] / 8 < got["weight_bytes"] < want["weight_bytes"] / 6


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"])
def test_limits_of_a_gguf_file_of_any_quantisation(tmp_path, kind):
    import gguf

    from bench.to_gguf import gguf_limits
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    writer = gguf.GGUFWriter(tmp_path / "few.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_head_count(4)
    for name, rows in (("token_embd.weight", 512), ("blk.0.ffn_up.weight", 256)):
        writer.add_tensor(name, np.zeros((rows, 256 // block * size), np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_limits(str(tmp_path / "few.gguf")) == {
        "dtype": kind.lower(), "vocab": 512, "max_model_len": 2048, "kv_bytes_per_token": 1024,
        "weight_bytes": 768 * 256 // block * size + 1024}


@pytest.mark.slow
def test_a_gguf_file_of_ones_own_is_taken_as_it_is(tmp_path):
    file, demo = quantised(tmp_path / "few.gguf"), str(ROOT / "nanovllm" / "demo_model")
    both = gguf_model(str(file), demo, tmp_path, "auto")
    assert both.title == "demo_model beside few.gguf"
    assert (Path(both.folder) / "config.json").read_text() == Path(demo, "config.json").read_text()
    write_gguf(both.folder, str(tmp_path / "model.gguf"), "float32")
    assert (tmp_path / "model.gguf").read_bytes() == file.read_bytes()


@pytest.mark.skipif("LLAMA_PYTHON" not in os.environ, reason="LLAMA_PYTHON names no environment "
                    "with llama-cpp-python")
def test_four_bits_beside_this_engine(tmp_path):
    (tmp_path / "out").mkdir()
    status, report = run(tmp_path / "out", "--gguf", str(quantised(tmp_path / "few.gguf")),
                         "--model", str(ROOT / "nanovllm" / "demo_model"), "--runs", "1", "--scale",
                         "0.05", "--llama-python", os.environ["LLAMA_PYTHON"])
    engines = report["records"][0]["engines"]
    assert status == 0 and list(engines) == ["nanovllm", "llama-cpp"]
    assert all(entry["runs"] for entry in engines.values())


GGUF_NAMES = {  # Hugging Face's names within a layer -> GGUF's
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_holds_the_checkpoint(tmp_path, dtype):
    from safetensors.torch import load_file
    folder = ROOT / "nanovllm" / "demo_model"
    write_gguf(folder, tmp_path / "model.gguf", dtype)
    pairs, tensors = read_gguf(tmp_path / "model.gguf")
    config, want = json.loads((folder / "config.json").read_text()), {}
    for file in folder.glob("*.safetensors"):
        want.update(load_file(file))
    numbers = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
               "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
               "attention.head_count": "num_attention_heads", "vocab_size": "vocab_size",
               "attention.head_count_kv": "num_key_value_heads",
               "attention.key_length": "head_dim", "attention.value_length": "head_dim",
               "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
    assert pairs["general.architecture"] == "qwen3"
    assert pairs["tokenizer.ggml.model"] == "no_vocab"
    for key, name in numbers.items():
        assert pairs[f"qwen3.{key}"] == pytest.approx(config[name], rel=1e-6), key
    rope = config.get("rope_parameters") or config
    assert pairs["qwen3.rope.freq_base"] == rope["rope_theta"]
    sources = {"token_embd.weight": "model.embed_tokens.weight",
               "output_norm.weight": "model.norm.weight"}
    for i in range(config["num_hidden_layers"]):
        sources |= {f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
                    for theirs, ours in GGUF_NAMES.items()}
    assert set(tensors) == set(sources) and set(sources.values()) == set(want)
    for name, source in sources.items():
        kept = torch.float32 if want[source].dim() == 1 else getattr(torch, dtype)
        assert torch.equal(tensors[name], want[source].to(kept)), name  # torch rounds as it should


def test_gguf_with_random_weights_needs_no_weights_and_other_models_are_refused(tmp_path):
    folder = bench.make_model_folder("qwen3-0.6b", tmp_path, layers=1)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf(folder, tmp_path / "model.gguf", "bfloat16", is_random=True)
    tensors = read_gguf(tmp_path / "model.gguf")[1]
    assert "output.weight" not in tensors                              # tied
    assert tensors["blk.0.ffn_up.weight"].float().std() == pytest.approx(0.02, rel=0.01)
    assert (tensors["output_norm.weight"] == 1).all()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40960}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    with pytest.raises(ValueError, match="RoPE of type 'yarn'"):
        write_gguf(folder, tmp_path / "none.gguf", "bfloat16", is_random=True)
    llama = bench.make_model_folder("llama-3.2-1b", tmp_path)
    with pytest.raises(ValueError, match="only Qwen3ForCausalLM"):
        write_gguf(llama, tmp_path / "none.gguf", "bfloat16", is_random=True)
    assert not (tmp_path / "none.gguf").exists()


# -----------------------------------------------------------------------------------------------
# The command line
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, complaint", [
    (["--set", "enforce_eger=True"], "enforce_eger: no such setting"),
    (["--set", "nothing"], "'nothing' is not KEY=VALUE"),
    (["--config", "enforce_eager=True"], "is not NAME:KEY=VALUE"),
    (["--config", "hf:enforce_eager=True"], "two engines called 'hf'"),
    (["--engines", "llama"], "invalid choice: 'llama'"),
    (["--engines", "nano-vllm"], "--nano-vllm"),
    (["--engines", "llama-cpp"], "--llama-python"),
    (["--vllm-config", "eager"], "is not NAME:KEY=VALUE"),
    (["--vllm-config", "eager:enforce_eager=True"], "--vllm-python"),
    (["--scale", "0"], "--scale must be more than 0"),
    (["--soak", "-1"], "--soak must be more than 0"),
    (["--soak", "1", "--strikes", "2"], "--strikes must lie in"),
    (["--soak", "1", "--deaths", "-1"], "--deaths must be at least 0"),
    (["--model", "no-such-folder"], "no-such-folder holds no config.json"),
    (["--model", ".", "--shape", "qwen3-4b"], "not both"),
    (["--requests", "1"], "--requests must be at least 2"),
    (["--requests", "8", "1"], "--requests must be at least 2"),
    (["--gguf", "README.md"], "README.md is no GGUF file"),
    (["--model", "GGUF"], "a GGUF file is given by --gguf, and only llama-cpp reads it"),
    (["--gguf", "GGUF", "--engines", "nanovllm", "llama-cpp"], "the file, not nanovllm; give"),
    (["--gguf", "GGUF", "--engines", "hf", "llama-cpp"], "only llama-cpp reads the file, not hf"),
    (["--gguf", "GGUF", "--shape", "qwen3-4b"], "--gguf goes neither with --shape"),
    (["--gguf", "GGUF"], "--llama-python"),
])
def test_a_bad_option_is_refused_before_anything_runs(args, complaint, capsys, tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"GGUF and more")
    args = [str(tmp_path / "some.gguf") if arg == "GGUF" else arg for arg in args]
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_settings_and_configurations_are_read():
    args = bench.parse_args(["--set", "max_num_seqs=4", "--engines", "nanovllm", "--config",
                             "small:num_kvcache_blocks=9,attention_backend=sdpa"])
    assert engine_list(args) == {
        "nanovllm": ("nanovllm", {"max_num_seqs": 4}),
        "small": ("nanovllm", {"max_num_seqs": 4, "num_kvcache_blocks": 9,
                               "attention_backend": "sdpa"})}


def test_help_names_the_options():
    shown = subprocess.run([sys.executable, str(ROOT / "bench.py"), "--help"], text=True,
                           capture_output=True, check=True).stdout
    for option in ("--engines", "--workload", "--shape", "--ablate", "--soak", "--json", "--plot",
                   "--config", "--vllm-python", "--vllm-config", "--llama-python"):
        assert option in shown
