"""The graders of day 1."""

import random
from types import SimpleNamespace

import torch

from nanovllm.config import Config
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.context import Context
from turns import Wrong, turn


def near(got: float, want: float) -> bool:
    """Whether two seconds are the same but for rounding."""
    return isinstance(got, (int, float)) and abs(got - want) < 1e-9


def whole(case: str, got) -> None:
    """Refuse a float where a count is asked for: range() and list indices take none."""
    if isinstance(got, float):
        raise Wrong(f"{case}: got {got!r}, a float",
                    "count in whole numbers: // in place of /, or int()")


@turn
def positions_computed(written):
    """Both counts, for P = 3 and G = 2, then for random prompts."""
    rng = random.Random(0)
    cases = [(3, 2), (3, 1), *((rng.randint(1, 50), rng.randint(1, 50)) for _ in range(50))]
    for prompt, generated in cases:
        naive = sum(prompt + i for i in range(generated))
        kept = prompt + generated - 1
        got = written(prompt, generated)
        case = f"a prompt of {prompt} tokens, {generated} generated"
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong(f"{case}: got {got!r}, expected a pair of numbers",
                        "return the two counts: `return naive, kept`")
        for number in got:
            whole(case, number)
        if got[0] != naive:
            raise Wrong(f"{case}: without a cache {got[0]} positions, expected {naive}",
                        "step i runs over the prompt and the i tokens before it: "
                        "add P + i for i from 0 to G - 1")
        if got[1] != kept:
            raise Wrong(f"{case}: with keys and values kept {got[1]} positions, expected {kept}",
                        "does the last token ever go through the model?")


@turn
def attend_with_cache(written):
    """One new token beside two kept ones, then random ones, against attention over all."""
    def ask(what, q, k, v, keys, values):
        before = keys.clone(), values.clone()
        got = written(q, k, v, keys, values)
        if not (isinstance(got, tuple) and len(got) == 3):
            raise Wrong(f"{what}: expected three tensors", "return output, keys, values")
        output, new_keys, new_values = got
        all_keys = torch.cat([before[0], k[None]])
        all_values = torch.cat([before[1], v[None]])
        for name, new, want in (("keys", new_keys, all_keys), ("values", new_values, all_values)):
            if new.shape != want.shape:
                raise Wrong(f"{what}: the {name} that come back have the shape "
                            f"{list(new.shape)}, expected {list(want.shape)}",
                            f"the new token's row stands behind the kept {name}")
            if not torch.equal(new, want):
                raise Wrong(f"{what}: the {name} that come back are {new.tolist()}, "
                            f"expected {want.tolist()}", "the new row comes last")
        want = (all_keys @ q).softmax(-1) @ all_values
        if output.shape != want.shape:
            raise Wrong(f"{what}: the output has the shape {list(output.shape)}, "
                        f"expected {list(want.shape)}", "one vector, for the one new token")
        if not torch.allclose(output, want, atol=1e-5):
            raise Wrong(f"{what}: output {[round(x, 3) for x in output.flatten().tolist()]}, "
                        f"expected {[round(x, 3) for x in want.tolist()]}",
                        "a score for each key, the new one too, not divided by anything; "
                        "softmax over the scores; then the values, weighted")

    ask("two kept tokens and one new one", torch.tensor([2., 0]), torch.tensor([0., 1]),
        torch.tensor([0., 4]), torch.tensor([[1., 0], [0, 0]]), torch.tensor([[2., 0], [0, 0]]))
    random_numbers = torch.Generator().manual_seed(0)
    for n, d in ((1, 2), (5, 4), (30, 8)):
        def numbers(*shape):
            return torch.randn(shape, generator=random_numbers)
        ask(f"{n} kept tokens, d = {d}", numbers(d), numbers(d), numbers(d), numbers(n, d),
            numbers(n, d))
    ask("nothing kept yet", torch.ones(2), torch.ones(2), torch.ones(2), torch.zeros(0, 2),
        torch.zeros(0, 2))


@turn
def request_times(written):
    """The example of the page, a request of one token, then random ones."""
    rng = random.Random(1)
    cases = [(0.0, [0.5, 0.6, 0.7, 1.0]), (2.0, [2.5, 2.75]), (1.0, [1.25])]
    for _ in range(30):
        times = [rng.uniform(0, 5)]
        for _ in range(rng.randint(0, 9)):
            times.append(times[-1] + rng.uniform(0.01, 1))
        cases.append((times[0] - rng.uniform(0, 2), times))
    for arrival, times in cases:
        short = [round(t, 2) for t in times]
        case = f"arrived at {arrival:.2f}, tokens at {short}"
        got = written(arrival, list(times))
        if not isinstance(got, tuple) or len(got) != 3:
            raise Wrong(f"{case}: got {got!r}, expected (ttft, tpot, itls)",
                        "return the three, in this order")
        ttft, tpot, itls = got
        if not near(ttft, times[0] - arrival):
            raise Wrong(f"{case}: TTFT {ttft}, expected {times[0] - arrival:.3f}",
                        "from the arrival to the first token, the time in the queue too")
        gaps = [b - a for a, b in zip(times, times[1:])]
        if not isinstance(itls, (list, tuple)):
            raise Wrong(f"{case}: the ITLs are a {type(itls).__name__}", "return a list of them")
        if len(itls) != len(gaps) or not all(map(near, itls, gaps)):
            got, want = ([round(gap, 3) for gap in several] for several in (itls, gaps))
            raise Wrong(f"{case}: ITLs {got}, expected {want}",
                        "one gap between each token and the next: one less than tokens")
        if len(times) == 1:
            if tpot is not None:
                raise Wrong(f"{case}: TPOT {tpot}, expected None",
                            "a single token has no gap behind it, so there is no pace")
        elif tpot is None or not near(tpot, sum(gaps) / len(gaps)):
            raise Wrong(f"{case}: TPOT {tpot}, expected {sum(gaps) / len(gaps):.3f}",
                        "the time from the first token to the last, divided by the tokens "
                        "after the first")


@turn
def kv_bytes_of(written):
    """Small configs, with the fields that may be missing, then the demo model's own."""
    tiny = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                hidden_size=64)
    configs = [
        ("1 layer, 2 KV heads of 8", tiny, 2, 64,
         "a key and a value: 2 x layers x KV heads x head dim x bytes"),
        ("3 layers, 2 KV heads of 8", dict(tiny, num_hidden_layers=3), 4, 384,
         "each layer keeps its own keys and values"),
        ("no head_dim in the config", {k: v for k, v in tiny.items() if k != "head_dim"}, 2, 128,
         "without head_dim it is hidden_size // num_attention_heads"),
        ("no num_key_value_heads in the config",
         {k: v for k, v in tiny.items() if k != "num_key_value_heads"}, 2, 128,
         "without num_key_value_heads each query head has its own: num_attention_heads")]
    demo = Config().hf_config
    wanted = 2 * demo.num_hidden_layers * demo.num_key_value_heads * demo.head_dim * 4
    cases = [(name, SimpleNamespace(**fields), *rest) for name, fields, *rest in configs]
    for name, config, size, want, hint in [*cases, ("the demo model", demo, 4, wanted, "")]:
        got = written(config, size)
        whole(f"{name}, {size} bytes a number", got)
        if got != want:
            raise Wrong(f"{name}, {size} bytes a number: got {got!r} bytes, expected {want}", hint)


def advanced(seq: Sequence, computed: int, token_id: int, eos: set[int]) -> None:
    """What a step does to a request, as the scheduler of day 4 does it."""
    seq.num_computed_tokens += computed
    if seq.num_uncomputed_tokens:
        return
    seq.append_token(token_id)
    if token_id in eos and not seq.sampling_params.ignore_eos:
        seq.finish("stop")
    elif seq.num_completion_tokens >= seq.sampling_params.max_tokens:
        seq.finish("length")


@turn
def advance(written):
    """A chunk of a prompt, an ordinary token, the ends of a request, then random lives."""
    def state(seq):
        return (seq.token_ids, seq.num_computed_tokens, seq.status.name, seq.finish_reason)

    def ask(what, hint, make, *arguments):
        mine, oracle = make(), make()
        written(mine, *arguments)
        advanced(oracle, *arguments)
        if state(mine) != state(oracle):
            raise Wrong(f"{what}: (tokens, computed, status, reason) became {state(mine)}, "
                        f"expected {state(oracle)}", hint)

    def running(tokens=4, completion=0, computed=0, **params):
        seq = Sequence(list(range(10, 10 + tokens)), SamplingParams(**params))
        for i in range(completion):
            seq.append_token(50 + i)
        seq.status, seq.num_computed_tokens = SequenceStatus.RUNNING, computed
        return seq

    ask("3 of 4 prompt tokens are computed", "a token is sampled only when nothing is left to "
        "compute", lambda: running(), 3, 77, {0})
    ask("all 4 prompt tokens are computed", "nothing is left to compute: append the token",
        lambda: running(), 4, 77, {0})
    ask("max_tokens is 1, the prompt has 4", "max_tokens counts the completion, not the prompt",
        lambda: running(max_tokens=1), 4, 77, {0})
    ask("max_tokens is 5, the prompt has 4", "max_tokens counts the completion, not the prompt",
        lambda: running(max_tokens=5), 4, 77, {0})
    ask("the token ends the text (it is in eos)", 'the reason is "stop"',
        lambda: running(computed=2), 2, 0, {0, 2})
    ask("ignore_eos is set", "with ignore_eos the request goes on after such a token",
        lambda: running(ignore_eos=True), 4, 0, {0})
    ask("an end of sequence at the very last token", 'both hold; the model ended it: "stop"',
        lambda: running(max_tokens=1), 4, 0, {0})
    rng = random.Random(2)
    for _ in range(200):
        shape = dict(tokens=rng.randint(1, 6), completion=rng.randint(0, 4),
                     max_tokens=rng.randint(5, 7), ignore_eos=rng.random() < 0.3)
        total = shape["tokens"] + shape["completion"]
        shape["computed"] = rng.randint(0, total - 1)
        arguments = rng.randint(1, total - shape["computed"]), rng.randint(0, 5), {0, 2}
        ask(f"{shape}, arguments {arguments}", "compare with the rules one by one",
            lambda: running(**shape), *arguments)


@turn
def blocks_due(written):
    """The border of a block, a prompt, blocks in hand; then each small case."""
    def ask(tokens, held, size, hint):
        want = 0
        while (held + want) * size < tokens:
            want += 1
        got = written(tokens, held, size)
        whole(f"{tokens} tokens in blocks of {size}, already holding {held}", got)
        if got != want:
            raise Wrong(f"{tokens} tokens in blocks of {size}, already holding {held}: "
                        f"got {got!r}, expected {want}", hint)

    ask(4, 1, 4, "four tokens fill the block exactly; the fifth is not there yet")
    ask(5, 1, 4, "the fifth token is written in this step and has no slot")
    ask(9, 0, 4, "a prompt may need several blocks at once")
    ask(3, 2, 4, "more blocks than needed: none is due, and never a negative number")
    for size in (1, 3, 4, 16):
        for tokens in range(1, 40):
            for held in range(5):
                ask(tokens, held, size, "round up: the last block may be filled in part")


@turn
def pack_rows(written):
    """The two rows of the page, then random steps, field by field against Context.pack."""
    def ask(rows, size):
        tokens, positions, slots, starts, lens = [], [], [], [0], []
        for token_ids, computed, table in rows:
            new = range(computed, len(token_ids))
            tokens += token_ids[computed:]
            positions += new
            slots += [table[p // size] * size + p % size for p in new]
            starts.append(len(tokens))
            lens.append(len(token_ids))
        step = Context.pack(tokens, positions, slots, starts, lens, [row[2] for row in rows])
        got = written(rows, size)
        hints = {
            "input_ids": "only the tokens from num_computed on are new",
            "positions": "a token's place in its own sequence, not in the step",
            "slot_mapping": "block_table[p // block_size] * block_size + p % block_size",
            "cu_seqlens_q": "begin with 0; behind each row the number of tokens so far",
            "context_lens": "after the step a row sees all its tokens, old and new"}
        for name, hint in hints.items():
            want = getattr(step, name).tolist()
            if not isinstance(got, dict) or name not in got:
                raise Wrong(f"{name} is missing", "return a dictionary with the five lists")
            if not isinstance(got[name], list):
                raise Wrong(f"{name} is a {type(got[name]).__name__}", "return lists of numbers")
            if got[name] != want:
                raise Wrong(f"{name} of the rows {rows} in blocks of {size}: got "
                            f"{got[name]}, expected {want}", hint)

    ask([([21, 22, 23, 24, 25, 26], 5, [5, 2]), ([31, 32, 33], 0, [7])], 4)
    rng = random.Random(3)
    for _ in range(50):
        size, rows, free = rng.choice([1, 4, 16]), [], list(range(200))
        rng.shuffle(free)
        for _ in range(rng.randint(1, 4)):
            length = rng.randint(1, 20)
            table = [free.pop() for _ in range(-(-length // size))]
            rows.append(([rng.randint(0, 99) for _ in range(length)], rng.randint(0, length - 1),
                         table))
        rows.sort(key=lambda row: len(row[0]) - row[1] > 1)      # decode rows lead
        ask(rows, size)


LEGAL = {("WAITING", "RUNNING"), ("RUNNING", "WAITING"), ("RUNNING", "FINISHED"),
         ("WAITING", "FINISHED")}


@turn
def checked_move(written):
    """All nine pairs of states."""
    for begin in SequenceStatus:
        for end in SequenceStatus:
            seq = Sequence([1])
            seq.status = begin
            legal = (begin.name, end.name) in LEGAL
            try:
                written(seq, end)
            except ValueError as error:
                if legal:
                    raise Wrong(f"{begin.name} to {end.name} was refused",
                                "the picture has this arrow") from None
                if not all(state.name in str(error).upper() for state in (begin, end)):
                    raise Wrong(f"the error says {str(error)!r}",
                                "name both states in the message") from None
                if seq.status is not begin:
                    raise Wrong(f"{begin.name} to {end.name} was refused, and yet the status is "
                                f"{seq.status.name}", "check before you change it") from None
                continue
            if not legal:
                raise Wrong(f"{begin.name} to {end.name} was allowed",
                            "the picture has no such arrow: raise ValueError")
            if seq.status is not end:
                raise Wrong(f"{begin.name} to {end.name}: the status is {seq.status.name}",
                            "set seq.status")
