"""Typical wrong answers to the turns of day 5: (turn, function, a word of the verdict)."""

import torch

from nanovllm.sampling_params import SamplingParams
from turns.answers import day5 as right


def drops_the_crossing_token(probs, p):
    order, mass, stay = sorted(range(len(probs)), key=lambda i: -probs[i]), 0.0, []
    for i in order:
        mass += probs[i]
        if mass <= p:
            stay.append(i)
    return sorted(stay)


def higher_ids_first(probs, p):
    order, mass, stay = sorted(range(len(probs)), key=lambda i: (-probs[i], -i)), 0.0, []
    for i in order:
        if stay and mass >= p:
            break
        stay.append(i)
        mass += probs[i]
    return sorted(stay)


def may_be_empty(probs, p):
    order, mass, stay = sorted(range(len(probs)), key=lambda i: -probs[i]), 0.0, []
    for i in order:
        if mass < p:
            stay.append(i)
        mass += probs[i]
    return sorted(stay)


def by_rank(probs, p):
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    return order[:len(right.nucleus(probs, p))]


def always_draws(logits, params, generator):
    params = SamplingParams(**{**vars(params), "temperature": params.temperature or 1.0})
    return right.sample_token(logits, params, generator)


def top_p_first(logits, params, generator):
    if params.temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / params.temperature).sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    ordered[probs.cumsum(-1) - probs >= params.top_p] = -torch.inf
    if params.top_k:
        ordered[params.top_k:] = -torch.inf
    noise = -torch.empty(len(logits)).exponential_(generator=generator).log()
    return int(ids[(ordered + noise).argmax()])


def uniform_noise(logits, params, generator):
    if params.temperature == 0:
        return int(logits.argmax())
    noise = torch.rand(len(logits), generator=generator)
    return int((logits / params.temperature + noise).argmax())


def divides_in_place(logits, params, generator):
    if params.temperature:
        logits /= params.temperature
    wishes = {**vars(params), "temperature": float(params.temperature > 0)}
    return right.sample_token(logits, SamplingParams(**wishes), generator)


def noise_of_its_own(logits, params, generator):
    return right.sample_token(logits, params, None)


def temperature_last(logits, params, generator):
    if params.temperature == 0:
        return int(logits.argmax())
    ordered, ids = logits.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k:] = -torch.inf
    probs = ordered.softmax(-1)
    if params.top_p < 1:
        ordered[probs.cumsum(-1) - probs >= params.top_p] = -torch.inf
    noise = -torch.empty(len(logits)).exponential_(generator=generator).log()
    return int(ids[(ordered / params.temperature + noise).argmax()])


def each_piece_alone(pieces):
    return [piece.decode(errors="replace") for piece in pieces] + [""]


def drops_bytes(pieces):
    return [piece.decode(errors="ignore") for piece in pieces] + [""]


def holds_whole_pieces(pieces):
    shown, rest = [], b""
    for piece in pieces:
        rest += piece
        try:
            shown.append(rest.decode())
            rest = b""
        except UnicodeDecodeError:
            shown.append("")
    return [*shown, rest.decode(errors="replace")]


def forgets_the_end(pieces):
    return [*right.stream_utf8(pieces)[:-1], ""]


def only_looks_for_it(text, stop):
    places = [text.find(s) for s in stop if s in text]
    return (text[:min(places)], True) if places else (text, False)


def always_holds_back(text, stop):
    places = [text.find(s) for s in stop if s in text]
    if places:
        return text[:min(places)], True
    return text[:len(text) - max((len(s) - 1 for s in stop), default=0)], False


def first_string_wins(text, stop):
    for s in stop:
        if s in text:
            return text[:text.find(s)], True
    return right.certain_part(text, stop)


def shortest_beginning(text, stop):
    shown, found = right.certain_part(text, stop)
    if found:
        return shown, found
    held = min((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - held], False


def all_rows_sample(engine):
    batch = engine.scheduler.schedule()
    if not batch:
        return []
    logits, seqs = engine.runner.run(batch), [row.seq for row in batch]
    tokens = [0] * len(seqs)
    for i, row in enumerate(logits):
        tokens[i] = row.argmax().item()
    engine.scheduler.postprocess(batch, tokens)
    return [(seq.seq_id, token, seq.finish_reason) for seq, token in zip(seqs, tokens)]


def no_books(engine):
    batch = engine.scheduler.schedule()
    logits = engine.runner.run(batch)
    seqs = [row.seq for row in batch if row.samples]
    return [(seq.seq_id, token, None) for seq, token in zip(seqs, logits.argmax(-1).tolist())]


def reports_too_early(engine):
    batch = engine.scheduler.schedule()
    if not batch:
        return []
    logits, seqs = engine.runner.run(batch), [row.seq for row in batch if row.samples]
    tokens = engine.sampler(logits, [seq.sampling_params for seq in seqs],
                            [seq.num_completion_tokens for seq in seqs]).tolist()
    reports = [(seq.seq_id, token, seq.finish_reason) for seq, token in zip(seqs, tokens)]
    engine.scheduler.postprocess(batch, tokens)
    return reports


def every_draw_is_the_first(engine):
    batch = engine.scheduler.schedule()
    if not batch:
        return []
    logits, seqs = engine.runner.run(batch), [row.seq for row in batch if row.samples]
    tokens = engine.sampler(logits, [seq.sampling_params for seq in seqs], [0] * len(seqs)).tolist()
    engine.scheduler.postprocess(batch, tokens)
    return [(seq.seq_id, token, seq.finish_reason) for seq, token in zip(seqs, tokens)]


def absolute(logits, min_p):
    return logits.masked_fill(logits.softmax(-1) < min_p[:, None], -torch.inf)


def one_limit_for_all(logits, min_p):
    limit = logits.amax(-1, keepdim=True) + min_p[0].log()
    return logits.masked_fill(logits < limit - 1e-6, -torch.inf)


def in_place(logits, min_p):
    limit = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
    return logits.masked_fill_(logits < limit - 1e-6, -torch.inf)


def cut_to_plus_inf(logits, min_p):
    kept = right.filter_min_p(logits, min_p)
    return kept.masked_fill(kept.isinf(), torch.inf)


def one_seed_for_all(llm, prompt, params, n):
    return llm.generate([prompt] * n, params, use_tqdm=False)


def one_after_another(llm, prompt, params, n):
    return [llm.generate([prompt], SamplingParams(**{**vars(params), "seed": i}))[0]
            for i in range(n)]


def forgets_the_wishes(llm, prompt, params, n):
    return llm.generate([prompt] * n, [SamplingParams(seed=i) for i in range(n)])


def neighbours_share(llm, prompt, params, n):
    wishes = [SamplingParams(**{**vars(params), "seed": (params.seed or 0) + i}) for i in range(n)]
    return llm.generate([prompt] * n, wishes)


def seeds_without_a_seed(llm, prompt, params, n):
    return right.generate_n(llm, prompt, SamplingParams(**{**vars(params),
                                                           "seed": params.seed or 0}), n)


WRONG = [
    ("nucleus", drops_the_crossing_token, "crosses"),
    ("nucleus", higher_ids_first, "stable"),
    ("nucleus", may_be_empty, "always stays"),
    ("nucleus", by_rank, "smallest first"),
    ("sample_token", always_draws, "temperature 0 is the argmax"),
    ("sample_token", top_p_first, "top-k left"),
    ("sample_token", uniform_noise, "-log(E)"),
    ("sample_token", divides_in_place, "changed the logits"),
    ("sample_token", noise_of_its_own, "same generator"),
    ("sample_token", temperature_last, "comes first"),
    ("stream_utf8", each_piece_alone, "half a character"),
    ("stream_utf8", drops_bytes, "held back"),
    ("stream_utf8", holds_whole_pieces, "already whole"),
    ("stream_utf8", forgets_the_end, "at the end"),
    ("certain_part", only_looks_for_it, "may still become"),
    ("certain_part", always_holds_back, "nothing here"),
    ("certain_part", first_string_wins, "earliest"),
    ("certain_part", shortest_beginning, "longest end"),
    ("engine_step", all_rows_sample, "row.samples"),
    ("engine_step", no_books, "postprocess"),
    ("engine_step", reports_too_early, "report then"),
    ("engine_step", every_draw_is_the_first, "num_completion_tokens"),
    ("filter_min_p", absolute, "times the probability"),
    ("filter_min_p", one_limit_for_all, "min_p[:, None]"),
    ("filter_min_p", in_place, "masked_fill copies"),
    ("filter_min_p", cut_to_plus_inf, "must be -inf"),
    ("generate_n", one_seed_for_all, "equal seeds"),
    ("generate_n", one_after_another, "one call"),
    ("generate_n", forgets_the_wishes, "wishes"),
    ("generate_n", neighbours_share, "share a stream"),
    ("generate_n", seeds_without_a_seed, "without a seed"),
]
