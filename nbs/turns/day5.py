"""The graders of day 5: samplers, text that grows, and one step of an engine."""

import codecs
import random

import torch
from scipy import stats

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import Sampler
from nanovllm.sampling_params import SamplingParams
from turns import Wrong, turn

PROBS = [.30, .22, .16, .12, .08, .06, .04, .02]      # the day's running example


def fewest(probs, p):
    """The definition: the smallest set of likeliest tokens with mass >= p, never empty."""
    order, mass, stay = sorted(range(len(probs)), key=lambda i: -probs[i]), 0.0, []
    for i in order:                                   # sorted() is stable: lower ids first
        if stay and mass >= p:
            break
        stay.append(i)
        mass += probs[i]
    return sorted(stay)


@turn
def nucleus(written):
    """The crossing token, a p that one token holds, p = 0, ties, ids in order, random rows."""
    cases = [([.1, .2, .3, .4], .6, "0.4 alone holds too little; the token that crosses p stays"),
             ([.1, .2, .3, .4], .3, "one token always stays, also if it holds more than p"),
             ([.1, .2, .3, .4], 0.0, "one token always stays, also for p = 0"),
             ([.2] * 5, .5, "of equal tokens the lower ids come first: is your sort stable?"),
             ([.4, .1, .5], .8, "the answer holds token ids: sort by probability, then by id"),
             ([.25] * 4, 1.0, "p = 1 leaves nothing out")]
    rng = random.Random(0)
    for _ in range(200):
        weights = [rng.choice((1, 2, 5, rng.random() * 9)) for _ in range(rng.randrange(1, 9))]
        probs = [w / sum(weights) for w in weights]
        cases.append((probs, rng.random() * .98 + .013, "compare with the definition, by hand"))
    for probs, p, hint in cases:
        got = written(list(probs), p)
        if not isinstance(got, (list, tuple)):
            raise Wrong(f"you returned {type(got).__name__}", "return a list of token ids")
        if list(got) != sorted(got):
            raise Wrong(f"you returned {list(got)}",
                        "the answer holds token ids, the smallest first, not ranks")
        if list(got) != fewest(probs, p):
            shown = [round(x, 3) for x in probs]
            raise Wrong(f"of {shown} with p = {p:.3g} the tokens {fewest(probs, p)} stay, "
                        f"you kept {list(got)}", hint)


def by_the_book(probs, params):
    """What a sampler must follow, one definition after another."""
    p = [x ** (1 / params.temperature) for x in probs]
    p = [x / sum(p) for x in p]
    if params.top_k:
        ranked = sorted(range(len(p)), key=lambda i: -p[i])[:params.top_k]
        p = [x if i in ranked else 0.0 for i, x in enumerate(p)]
        p = [x / sum(p) for x in p]
    stay = fewest(p, params.top_p) if params.top_p < 1 else range(len(p))
    p = [x if i in stay else 0.0 for i, x in enumerate(p)]
    return [x / sum(p) for x in p]


DRAWS = 1500
WISHES = [(dict(), "the largest of logit + noise, noise = -log(E) with E from exponential_()"),
          (dict(temperature=.5), "divide the logits by the temperature"),
          (dict(top_k=3), "top-k keeps the k likeliest"),
          (dict(top_p=.6), "top-p keeps the token that crosses the threshold"),
          (dict(top_k=3, top_p=.7), "top-p comes last: it acts on what top-k left, renormalised"),
          (dict(temperature=2., top_p=.7), "the temperature comes first, before the cuts"),
          (dict(temperature=.5, top_k=4, top_p=.75), "temperature, top-k, renormalise, top-p")]


@turn
def sample_token(written):
    """Greedy rows, forbidden tokens, shares by chi-square with fixed seeds, the generator."""
    generator = torch.Generator()
    for n in range(20):
        generator.manual_seed(n)
        logits = torch.randn(50, generator=generator)
        for wish in (dict(), dict(top_p=.1), dict(top_k=5)):
            got = written(logits.clone(), SamplingParams(temperature=0, **wish), generator)
            if got is None or int(got) != logits.argmax():
                raise Wrong(f"with temperature=0 you took token {got} of {len(logits)}, and the "
                            f"largest logit is number {int(logits.argmax())}",
                            "temperature 0 is the argmax, whatever the other parameters say")
    logits = torch.tensor(PROBS).log()
    for n, (wish, hint) in enumerate(WISHES):
        params, said = SamplingParams(**wish), f"with {wish or 'no cut and temperature 1'}"
        generator.manual_seed(n)
        drawn = [int(written(logits.clone(), params, generator)) for _ in range(DRAWS)]
        counts, exact = [drawn.count(i) for i in range(len(PROBS))], by_the_book(PROBS, params)
        for i, (count, p) in enumerate(zip(counts, exact)):
            if count and not p:
                raise Wrong(f"{said}, token {i} of {PROBS} was drawn, and it must not be", hint)
            if p > .05 and not count:
                raise Wrong(f"{said}, token {i} of {PROBS} never came in {DRAWS:,} draws", hint)
        some = [i for i, p in enumerate(exact) if p]
        if len(some) > 1 and stats.chisquare([counts[i] for i in some],
                                             [DRAWS * exact[i] for i in some]).pvalue < 1e-6:
            raise Wrong(f"{said}, the shares of {DRAWS:,} draws are "
                        f"{[round(c / DRAWS, 2) for c in counts]}, not "
                        f"{[round(p, 2) for p in exact]}", hint)
    again = []
    for _ in range(2):
        generator.manual_seed(7)
        again.append([int(written(logits.clone(), SamplingParams(), generator))
                      for _ in range(20)])
    if again[0] != again[1]:
        raise Wrong("the same generator with the same seed gave other tokens",
                    "take the noise from it: exponential_(generator=generator)")
    before = logits.clone()
    written(logits, SamplingParams(temperature=.5, top_k=2), generator)
    if not logits.equal(before):
        raise Wrong("your function changed the logits that it was given", "work on a copy")


@turn
def stream_utf8(written):
    """Characters cut anywhere, and a text that ends within one."""
    cases = [([b"\xc3", b"\xaf"], "half a character is held back until its last byte is there"),
             ([b"a\xc3", b"\xaf"], "show what is already whole at once; hold back only the rest"),
             ([b"\xf0", b"\x9f\x99", b"\x82b"], "a character may have four bytes; the first tells"),
             ([b"a\xf0\x9f"], "at the end nothing is held back: half a character is \ufffd"),
             ([], "the list always has one item more than the pieces: what is left at the end")]
    rng = random.Random(1)
    for _ in range(100):
        data = "".join(rng.choice("ab é漢🙂\n") for _ in range(rng.randrange(1, 12))).encode()
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(4))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
        cases.append((parts, "decode what is whole, keep the bytes of the character under way"))
    for pieces, hint in cases:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        want = [decoder.decode(piece) for piece in pieces] + [decoder.decode(b"", final=True)]
        if (got := written(list(pieces))) != want:
            raise Wrong(f"{pieces} gave {got} and not {want}", hint)


def certain(text, stop):
    """(what may be shown, whether a stop string was found), tried one place after another."""
    for at in range(len(text)):
        if any(text.startswith(s, at) for s in stop):
            return text[:at], True
    for at in range(len(text)):
        if any(s.startswith(text[at:]) for s in stop):
            return text[:at], False
    return text, False


@turn
def certain_part(written):
    """Found, not found, begun; several stop strings; the longest possible beginning."""
    cases = [("One two", ("STOP",), "nothing here begins a stop string: all of it is certain"),
             ("One STOP tw", ("STOP",), "the text ends before the stop string"),
             ("One S", ("STOP",), "a text that ends in S may still become STOP"),
             ("One STO", ("STOP",), "a text that ends in STO may still become STOP"),
             ("a STOP b END", ("END", "STOP"), "the earliest place counts, not the first string"),
             ("xABA", ("ABAB",), "hold back the longest end that begins a stop string"),
             ("ab", (), "without stop strings all text is certain")]
    rng = random.Random(2)
    for _ in range(300):
        word = lambda low, high: "".join(rng.choice("ab") for _ in range(rng.randrange(low, high)))
        cases.append((word(0, 9), tuple(word(1, 5) for _ in range(rng.randrange(3))),
                      "first look for whole stop strings, then for a beginning at the end"))
    for text, stop, hint in cases:
        if (got := written(text, stop)) != certain(text, stop):
            raise Wrong(f"certain_part({text!r}, {stop!r}) gave {got!r} and not "
                        f"{certain(text, stop)!r}", hint)


VOCAB = 64


def stand_in_logits(token_ids):
    """Logits [VOCAB] that depend on every token of a row, as a model's do."""
    seed = sum((i + 1) * (token + 7) for i, token in enumerate(token_ids))
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


class Runner:
    """Stands where the model runner stands, and counts its calls."""
    calls = 0

    def run(self, batch):
        if not batch:
            raise Wrong("the runner was asked to run a batch without rows",
                        "where the scheduler has nothing to do, return [] before the runner")
        self.calls += 1
        logits = [stand_in_logits(row.seq.token_ids) for row in batch if row.samples]
        return torch.stack(logits) if logits else torch.empty(0, VOCAB)


class Engine:
    """The three parts that a step uses."""

    def __init__(self, blocks=32, budget=64, eos=()):
        self.scheduler = Scheduler(BlockManager(blocks, 4), budget, eos_token_ids=eos)
        self.runner, self.sampler = Runner(), Sampler()

    def add(self, token_ids, **wish):
        seq = Sequence(token_ids, SamplingParams(**wish))
        self.scheduler.add_sequence(seq)
        return seq


def expected(prompt, eos, **wish):
    """(tokens, reason) of a request that is alone in the world."""
    params, tokens, reason = SamplingParams(**wish), list(prompt), None
    while reason is None:
        n = len(tokens) - len(prompt)
        tokens.append(Sampler()(stand_in_logits(tokens)[None], [params], [n]).item())
        reason = "stop" if tokens[-1] in eos else "length" if n + 1 == params.max_tokens else None
    return tokens[len(prompt):], reason


@turn
def engine_step(written):
    """One request, a chunk, nothing to do, then four seeded requests in a small pool."""
    def step(engine):
        """A step with its reports as a plain list of tuples."""
        calls, got = engine.runner.calls, written(engine)
        if got is None:
            raise Wrong("the step returned None", "return a list: one report a sampled token")
        if engine.runner.calls > calls + 1:
            raise Wrong(f"the model ran {engine.runner.calls - calls} times in one step",
                        "one step is one forward pass for all rows together")
        return [(report[0], int(report[1]), report[2]) for report in got]

    engine = Engine()
    seq = engine.add([5, 6, 7], temperature=0, max_tokens=1)
    token, got = int(stand_in_logits([5, 6, 7]).argmax()), step(engine)
    if not seq.num_completion_tokens:
        raise Wrong("one step of a prompt of 3 tokens, and the sequence has no new token",
                    "the scheduler books: scheduler.postprocess(batch, tokens)")
    if got != [(seq.seq_id, token, "length")]:
        raise Wrong(f"a request with max_tokens=1 is over after its step, so the report is "
                    f"[({seq.seq_id}, {token}, 'length')]; you gave {got}",
                    "book first and report then: a reason stands in seq.finish_reason afterwards")
    if step(engine):
        raise Wrong("a step with nothing to do reported something", "then return []")

    engine = Engine(budget=4)
    engine.add([1, 2, 3, 4, 5, 6], temperature=0, max_tokens=2)
    if got := step(engine):
        raise Wrong(f"a prompt of 6 tokens with a budget of 4: the first step computes a chunk, "
                    f"and no token comes out of it; you reported {got}",
                    "only rows with row.samples give a token")
    step(engine)

    rng, eos = random.Random(3), (9, 11)
    asked = [([rng.randrange(VOCAB) for _ in range(n)], dict(seed=n, max_tokens=12)) for n in
             (3, 9, 5, 7)]
    engine = Engine(blocks=11, budget=6, eos=eos)
    seqs = [engine.add(prompt, **wish) for prompt, wish in asked]
    tokens, reasons = {seq.seq_id: [] for seq in seqs}, {}
    for _ in range(200):
        for seq_id, token, reason in step(engine):
            tokens[seq_id].append(token)
            if reason:
                reasons[seq_id] = reason
        if engine.scheduler.is_finished():
            break
    for seq, (prompt, wish) in zip(seqs, asked):
        want, reason = expected(prompt, eos, **wish)
        if tokens[seq.seq_id] != want:
            raise Wrong(f"four requests at once: the one with {wish} gave {tokens[seq.seq_id]}, "
                        f"and alone it gives {want}",
                        "the sampler's last argument is how many tokens each row has drawn "
                        "before: seq.num_completion_tokens, before the step is booked")
        if reasons.get(seq.seq_id) != reason:
            raise Wrong(f"a request ended by {reason!r} was reported with "
                        f"{reasons.get(seq.seq_id)!r}", "read seq.finish_reason after the books")


@turn
def filter_min_p(written):
    """The running example, two rows with two limits, the ends 0 and 1, random rows."""
    def check(probs, min_p, hint):
        logits, limits = torch.tensor(probs).log() + 3, torch.tensor(min_p)
        before = logits.clone()
        got = written(logits, limits)
        if not logits.equal(before):
            raise Wrong("your function changed the logits that it was given", "masked_fill copies")
        for row, p, m, old in zip(got, probs, min_p, before):
            want = [i for i, x in enumerate(p) if x >= m * max(p) * (1 - 1e-5)]
            stay = row.isfinite().nonzero().flatten().tolist()
            if stay != want:
                raise Wrong(f"of {[round(x, 3) for x in p]} with min_p = {m:.3g} the tokens {want} "
                            f"stay, you kept {stay}", hint)
            if not row[[i for i in range(len(p)) if i not in stay]].isneginf().all():
                raise Wrong("what is cut must be -inf, and you left NaN or +inf there",
                            "masked_fill(…, -torch.inf)")
            if not torch.allclose(row[stay], old[stay]):
                raise Wrong("a token that stays has another logit than before",
                            "only set what is cut to -inf")

    check([PROBS], [.3], "the limit is min_p times the probability of the likeliest")
    check([PROBS, PROBS], [.3, .9], "each row has a limit of its own: min_p[:, None]")
    check([PROBS], [0.], "min_p = 0 cuts nothing")
    check([[.3, .4, .3]], [1.], "min_p = 1 leaves the likeliest, which is as likely as itself")
    generator = torch.Generator().manual_seed(4)
    probs = torch.randn(30, 6, generator=generator).softmax(-1).tolist()
    check(probs, torch.rand(30, generator=generator).tolist(), "compare with the definition")


class Recorder:
    """Stands where an LLM stands: writes down what generate() is asked."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = sampling_params if isinstance(sampling_params, (list, tuple)) else \
            [sampling_params] * len(prompts)
        self.calls.append((list(prompts), list(each)))
        return [{"text": f"{params.seed}", "token_ids": []} for params in each]


@turn
def generate_n(written):
    """How often generate is called, with which prompts, seeds and other wishes."""
    def asked(params, n=3):
        llm = Recorder()
        outputs = written(llm, "Hello", params, n)
        if len(llm.calls) != 1:
            raise Wrong(f"for n = {n} answers you called generate {len(llm.calls)} times",
                        "one call with a list: then the answers share their steps")
        prompts, each = llm.calls[0]
        if prompts != ["Hello"] * n or outputs is None or len(outputs) != n:
            raise Wrong(f"for n = {n} you asked for the prompts {prompts}",
                        f"the same prompt, {n} times, and return all outputs")
        return each

    params = SamplingParams(temperature=1.5, max_tokens=9, seed=7)
    each = asked(params)
    if len({p.seed for p in each}) != 3:
        raise Wrong(f"with seed=7 the three streams have the seeds {[p.seed for p in each]}: "
                    "equal seeds, equal answers", "make one seed for each from the request's own")
    for p in each:
        if {**vars(p), "seed": 0} != {**vars(params), "seed": 0}:
            raise Wrong(f"seed aside, the wishes must stay as they were; you asked for {p}",
                        "SamplingParams(**{**vars(params), 'seed': ...})")
    if [p.seed for p in asked(params)] != [p.seed for p in each]:
        raise Wrong("the same call a second time has other seeds",
                    "a request with a seed gives the same answers tomorrow")
    if {p.seed for p in asked(SamplingParams(seed=8))} & {p.seed for p in each}:
        raise Wrong("requests with seed=7 and seed=8 share a stream",
                    "seed * 1000 + i, and not seed + i")
    drawn = [[p.seed for p in asked(SamplingParams())] for _ in range(2)]
    if drawn[0] == drawn[1] and drawn[0] != [None] * 3:
        raise Wrong(f"for a request without a seed you asked for the seeds {drawn[0]}, twice",
                    "no seed means other answers at every call: leave seed=None")
