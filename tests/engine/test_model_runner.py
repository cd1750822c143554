"""From rows to logits: the packed step, and what comes out, compared with transformers."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, resolve_device, resolve_dtype
from nanovllm.engine.scheduler import ScheduledRow, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import SDPABackend
from nanovllm.models.qwen3 import Qwen3DecoderLayer
from tests.parity import NEW, SHAPES, lengths_for, tight


def test_device_and_dtype():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'meta' is unknown"):
        resolve_device("meta")
    with pytest.raises(ValueError, match="device 'cuda:99'.*this machine has"):
        resolve_device("cuda:99")
    checkpoint = SimpleNamespace(dtype=torch.bfloat16)
    assert resolve_dtype("auto", checkpoint) is resolve_dtype("bfloat16", None) is torch.bfloat16
    assert resolve_dtype("auto", SimpleNamespace()) is torch.float32
    with pytest.raises(ValueError, match="dtype 'fp32' is not supported.*float32"):
        resolve_dtype("fp32", checkpoint)


@pytest.fixture
def runner(good):
    return ModelRunner(Config(str(good[0]), device="cpu", kvcache_block_size=4,
                              num_kvcache_blocks=16))


def row(tokens, table, computed, new):
    """A row of a step: `new` tokens of a sequence after `computed` ones."""
    seq = Sequence(tokens)
    seq.block_table, seq.num_computed_tokens = table, computed
    return ScheduledRow(seq, new, samples=computed + new == len(seq))


def test_the_packed_step(runner):
    """A decode row, a whole prompt, and a chunk in the middle of one."""
    step = runner.prepare_input([row([11, 12, 13, 14, 15], [7, 3], 4, 1),
                                 row([21, 22, 23], [9], 0, 3), row(range(31, 41), [1, 0, 5], 3, 3)])
    assert step.input_ids.tolist() == [15, 21, 22, 23, 34, 35, 36]
    assert step.positions.tolist() == [4, 0, 1, 2, 3, 4, 5]
    assert step.slot_mapping.tolist() == [12, 36, 37, 38, 7, 0, 1]
    assert step.cu_seqlens_q.tolist() == [0, 1, 4, 7] and step.context_lens.tolist() == [5, 3, 6]
    assert step.block_tables.tolist() == [[7, 3, 0], [9, 0, 0], [1, 0, 5]]
    assert (step.num_decode_rows, step.max_seqlen_q, step.max_context_len) == (1, 3, 6)
    assert step.samples == [0, 3]


def test_the_step_after_this_one(runner):
    """Its tokens are not known yet."""
    step = runner.prepare_input([row([11, 12, 13, 14], [7, 3], 3, 1)], ahead=True)
    assert step.input_ids.tolist() == [0] and step.positions.tolist() == [4]
    assert step.slot_mapping.tolist() == [12] and step.context_lens.tolist() == [5]


def test_tokens_that_only_the_device_knows(runner):
    """The same logits as with tokens that the host knows; `logits_at` answers for the last step."""
    prompt = list(range(3, 9))
    first = runner.run([row(prompt, [4, 6], 0, 6)])
    known = runner.run([row([*prompt, 5], [4, 6], 6, 1)])
    runner.run([row(prompt, [4, 6], 0, 6)])
    ahead = runner.run_ahead([row(prompt, [4, 6], 5, 1)], torch.tensor([5]))
    torch.testing.assert_close(ahead, known)
    torch.testing.assert_close(runner.logits_at([5]), first)


def test_each_layer_has_its_part_of_the_cache(runner):
    layers = runner.attention_layers()
    assert len(layers) == 3 and runner.kv_cache.shape == (2, 3, 16, 4, 2, 16)
    for i, layer in enumerate(layers):
        assert layer.k_cache.data_ptr() == runner.kv_cache[0, i].data_ptr()
        assert layer.v_cache.data_ptr() == runner.kv_cache[1, i].data_ptr()


def test_plain_kernels_are_the_layers_as_they_are_written(good):
    runner = ModelRunner(Config(str(good[0]), device="cpu", num_kvcache_blocks=4, kernels="plain"))
    assert type(runner.backend) is SDPABackend
    assert type(runner.model.model.layers[0]) is Qwen3DecoderLayer
    linear = runner.model.model.layers[0].mlp.down_proj
    assert type(linear) is torch.nn.Linear


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("chunk", [5, 16384])
@pytest.mark.parametrize("name", SHAPES)
def test_logits(name, chunk, kernels, reference):
    """Tokens do not catch a wrong eps: compare what they are chosen from, preempted or not."""
    ref, bs = reference(name), 4
    config = Config(str(ref.folder), kvcache_block_size=bs, num_kvcache_blocks=tight(bs) + 1,
                    kernels=kernels)
    runner = ModelRunner(config)
    manager = BlockManager(runner.num_blocks, bs)
    scheduler = Scheduler(manager, max_num_batched_tokens=chunk)
    seqs = [Sequence(ref.prompts[n], SamplingParams(temperature=0, max_tokens=NEW))
            for n in lengths_for(bs)]
    logits = {seq.seq_id: [] for seq in seqs}
    for seq in seqs:
        scheduler.add_sequence(seq)
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        rows = runner.run(batch)
        for row, values in zip([row for row in batch if row.samples], rows):
            logits[row.seq.seq_id].append(values)
        scheduler.postprocess(batch, rows.argmax(-1).tolist())
    for seq in seqs:
        with torch.inference_mode():
            right = ref.model(torch.tensor([seq.token_ids])).logits[0]
        mine = torch.stack(logits[seq.seq_id])
        torch.testing.assert_close(mine, right[seq.num_prompt_tokens - 1:-1], atol=1e-4, rtol=0)
