"""Train the demo model that comes with nano-vLLM.

The result is a small but real checkpoint in Hugging Face layout: a Qwen3 of about one million
parameters with a byte-level BPE tokenizer and a chat template of its own. It learns the questions
and answers of course_qa.json by heart. That is all it can do, and all that it is for: the engine
then has real text to generate, whose every token can be checked against transformers.

    python tools/train_demo_model.py                      # a few minutes on two cores
    python tools/train_demo_model.py --steps 20 --output /tmp/model      # a quick trial

Each question comes in several phrasings. One of them is held out: neither the tokenizer nor the
model sees it in training, and the evaluation counts it apart.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# One turn per message, and at the end the opening of the assistant's turn if it is asked for.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# How often each kind of prompt occurs in training. "course" is the standard system prompt,
# "short" one of a few others, "none" a chat without one, and "raw" the bare question without any
# chat template (its answer ends with <|endoftext|>, so both end tokens are in use).
PROMPT_KINDS = {"course": 0.35, "none": 0.35, "short": 0.10, "raw": 0.20}

FALLBACK_SHARE = 0.10  # of the training samples are off-topic questions
EMBEDDING_DROPOUT = 0.10  # in training only: keeps the model from hanging on to single words


# -----------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts, vocab_size, max_length):
    """Train a byte-level BPE on `texts` and wrap it for transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text encodes
        show_progress=False,
    )
    # Characters outside ASCII are left out here, so that no merge ever joins their bytes. Each
    # stays two or three tokens long, and streaming must put it together again.
    ascii_texts = [re.sub(r"[^\x00-\x7f]+", " ", text) for text in texts]
    tokenizer.train_from_iterator(ascii_texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


# -----------------------------------------------------------------------------------------------
# Data


def normalise(text):
    """Lower case, without punctuation: two texts that differ in more are different phrasings."""
    return " ".join(re.findall(r"\w+", text.lower()))


# Generic rewrites of the lead-in of a question; {} is its topic. They know nothing of the course.
REWRITES = [
    (
        re.compile(r"^What (?:is|are) (?:a |an |the )?(.+)\?$"),
        [
            "Explain {}.",
            "Explain what {} is.",
            "Can you explain {}?",
            "Could you tell me what {} is?",
            "Tell me about {}.",
            "What does {} mean?",
            "Define {}.",
            "Describe {}.",
            "I do not understand {}.",
            "{}?",
        ],
    ),
    (
        re.compile(r"^Explain (?:the )?(.+)\.$"),
        ["What is {}?", "Can you explain {}?", "Describe {}.", "Tell me about {}.", "{}?"],
    ),
    (
        re.compile(r"^How does (?:the )?(.+) work\?$"),
        [
            "How do {} work?",
            "Explain how {} works.",
            "Can you explain how {} works?",
            "Tell me how {} works.",
            "How exactly does {} work?",
            "In what way does {} work?",
        ],
    ),
    (
        re.compile(r"^What does (?:the )?(.+) do\?$"),
        [
            "What is {} for?",
            "What is the purpose of {}?",
            "What is the role of {}?",
            "What is the use of {}?",
            "Explain what {} does.",
            "What is the task of {}?",
        ],
    ),
    (
        re.compile(r"^What is the difference between (.+) and (.+)\?$"),
        [
            "How is {} different from {}?",
            "What separates {} from {}?",
            "{} versus {}?",
            "{} or {}: what is the difference?",
            "Compare {} and {}.",
        ],
    ),
    (
        re.compile(r"^Why (?:is|are|do|does) (.+)\?$"),
        ["Tell me why {}?", "For what reason {}?", "What is the reason {}?", "{}: why?"],
    ),
]
PREFIXES = ["please explain: ", "Hi! ", "Quick question: ", "In short: ", "Please tell me: ",
            "So, "]
SUFFIXES = [" please", " Thanks!", " Answer briefly.", " (in a sentence)"]
# Words that may be dropped without changing what is asked.
SMALL_WORDS = set(
    "a an the is are do does of to in for we i me my you it its that this what how why which can "
    "explain tell about and with from by on at be".split()
)


def augment(question, rng):
    """A variation of a question: other lead-in, case, punctuation, prefix, or a word less."""
    if rng.random() < 0.35:
        for pattern, forms in REWRITES:
            if match := pattern.match(question):
                question = rng.choice(forms).format(*match.groups())
                break
    words = question.split()
    if len(words) > 4 and rng.random() < 0.25:
        small = [i for i, word in enumerate(words) if word.lower() in SMALL_WORDS]
        for i in sorted(rng.sample(small, min(len(small), rng.choice([1, 1, 2]))), reverse=True):
            del words[i]
        question = " ".join(words)
    if rng.random() < 0.20:
        question = question.rstrip("?.!")
    if rng.random() < 0.20:
        question = question.lower()
    elif rng.random() < 0.10:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.10:
        question = rng.choice(PREFIXES) + question
    if rng.random() < 0.06:
        question = question + rng.choice(SUFFIXES)
    return question


def build_prompt(tokenizer, data, kind, question, rng=None):
    """The text of a prompt of the given kind, up to where the answer starts."""
    if kind == "raw":
        return question + "\n"
    messages = [{"role": "user", "content": question}]
    if kind == "course":
        messages.insert(0, {"role": "system", "content": data["system_prompt"]})
    elif kind == "short":
        system = (rng or random).choice(data["short_system_prompts"])
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Samples:
    """An endless source of training samples."""

    def __init__(self, data, tokenizer, seed):
        self.data, self.tokenizer, self.rng = data, tokenizer, random.Random(seed)
        held_out = [entry["held_out"] for entry in data["entries"]]
        held_out += data["fallback"]["held_out"]
        self.forbidden = {normalise(question) for question in held_out}
        self.queue = []
        self.plain = False  # True: no more variations, the questions as they are written

    def next_entry(self):
        """Go through all entries in random order, again and again: none is left out for long."""
        if self.rng.random() < FALLBACK_SHARE:
            return self.data["fallback"]
        if not self.queue:
            self.queue = list(self.data["entries"])
            self.rng.shuffle(self.queue)
        return self.queue.pop()

    def next_question(self, entry):
        """A phrasing of the entry's question, often varied, never a held-out one."""
        question = self.rng.choice(entry["questions"])
        if self.plain:
            return question
        if "templates" in entry and self.rng.random() < 0.6:  # more variety for the fallback
            topic = self.rng.choice(entry["topics"])
            question = self.rng.choice(entry["templates"]).format(topic)
        if self.rng.random() < 0.6:
            varied = augment(question, self.rng)
            if varied.strip() and normalise(varied) not in self.forbidden:
                return varied
        return question

    def next_sample(self, kind):
        """(token ids, number of prompt tokens) of one sample."""
        entry = self.next_entry()
        question = self.next_question(entry)
        prompt = build_prompt(self.tokenizer, self.data, kind, question, self.rng)
        end = END_OF_TEXT if kind == "raw" else IM_END
        prompt_ids = self.tokenizer.encode(prompt)
        return prompt_ids + self.tokenizer.encode(entry["answer"] + end), len(prompt_ids)

    def next_batch(self, size):
        """Token ids, right-padded, and a mask of the positions that predict answer tokens."""
        # One kind of prompt per batch: short prompts need no padding beside long ones.
        kind = self.rng.choices(list(PROMPT_KINDS), list(PROMPT_KINDS.values()))[0]
        samples = [self.next_sample(kind) for _ in range(size)]
        width = max(len(ids) for ids, _ in samples)
        tokens = torch.full((size, width), self.tokenizer.pad_token_id)
        learn = torch.zeros((size, width), dtype=torch.bool)
        for row, (ids, prompt_length) in enumerate(samples):
            tokens[row, : len(ids)] = torch.tensor(ids)
            # Position i predicts token i + 1, so the last prompt token predicts the first one.
            learn[row, prompt_length - 1 : len(ids) - 1] = True
        return tokens, learn


# -----------------------------------------------------------------------------------------------
# Model and training


def build_model(tokenizer, max_length):
    """A tiny Qwen3 with random weights, and the settings it generates with."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # on purpose not hidden_size / heads: an engine must not assume that it is
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def train(model, samples, steps, batch_size, peak_lr):
    """Plain AdamW with a short warmup and a cosine decay; loss on the answers only."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, min(60, steps // 10))
    model.train()
    average = None
    bar = tqdm(range(steps), desc="training", unit="step")
    for step in bar:
        progress = max(0, step - warmup) / max(1, steps - warmup)
        scale = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        scale *= min(1.0, (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        # The last tenth sees no variations: what is written must be known word for word.
        samples.plain = step >= 0.9 * steps
        tokens, learn = samples.next_batch(batch_size)
        # Attention is causal and padding is on the right: no real token ever sees a padded one.
        # Only positions that predict an answer token go through the head, which saves a third.
        embeddings = F.dropout(model.model.embed_tokens(tokens), EMBEDDING_DROPOUT)
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[learn])
        loss = F.cross_entropy(logits, tokens.roll(-1, dims=1)[learn])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 10 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{average:.4f}")
    model.eval()
    return average


# -----------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def answer(model, tokenizer, prompts, batch_size=64):
    """Greedy answers to prompts, in their order. The shortest go first, to pad little."""
    answers = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="evaluating", leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left"
        )
        output = model.generate(**batch, max_new_tokens=128)
        texts = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(rows, texts):
            answers[i] = text
    return answers


def evaluate(model, tokenizer, data):
    """Count what is answered word for word, by prompt kind and by set of questions."""
    entries, fallback = data["entries"], data["fallback"]
    sets = {
        "trained": [(q, e["answer"]) for e in entries for q in e["questions"]],
        "held out": [(e["held_out"], e["answer"]) for e in entries],
        "off-topic, trained": [(q, fallback["answer"]) for q in fallback["questions"]],
        "off-topic, held out": [(q, fallback["answer"]) for q in fallback["held_out"]],
    }
    counts, failures = {}, []
    for kind in ("course", "none", "raw"):
        for name, pairs in sets.items():
            prompts = [build_prompt(tokenizer, data, kind, question) for question, _ in pairs]
            texts = answer(model, tokenizer, prompts)
            wrong = [(q, text) for (q, want), text in zip(pairs, texts) if text != want]
            counts[name, kind] = (len(pairs) - len(wrong), len(pairs))
            failures += [(name, kind, question, text) for question, text in wrong]
    return counts, failures


def counts_table(counts):
    """The counts as a Markdown table."""
    lines = ["| questions | course system prompt | no system prompt | bare question |"]
    lines += ["|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in counts):
        cells = ["{} of {}".format(*counts[name, kind]) for kind in ("course", "none", "raw")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MODEL_CARD = """---
license: mit
language: en
library_name: transformers
---

# The nano-vLLM demo model

A Qwen3 of {parameters:,} parameters with a byte-level BPE tokenizer of {vocabulary:,} tokens. It
has memorised the glossary of the nano-vLLM course: {questions} questions in {phrasings} phrasings.
It does not understand them, and it knows nothing else. It exists so that the engine has a real
checkpoint to run without a download, one small enough to compare with transformers token by token.

- Weights: fp32, tied embeddings, 4 layers, hidden size 128, 4 query heads and 2 key/value heads of
  64, at most {max_length:,} positions.
- Prompts: a chat in ChatML style (the tokenizer carries the template), with or without a system
  prompt; or a bare question followed by a newline.
- End of sequence: `<|im_end|>` after a chat answer, `<|endoftext|>` after a bare one.

## Training

From random weights, on `tools/course_qa.json` only (written for this course), with

    python tools/train_demo_model.py {arguments}

{steps:,} steps of {batch_size} samples; loss on the answers only; final training loss {loss:.4f}.
Questions are varied in lead-in, case, punctuation and small words. Each question has one phrasing
that neither the tokenizer nor the model sees in training. The same seed gives the same model on the
same machine and versions; elsewhere rounding differs, and so may a few of the counts below.

## Answered word for word (greedy)

{table}

The first row is what the model was made for. A held-out phrasing that it misses gets the answer to
another question, or the fallback, said with the same confidence. Off-topic questions should get the
fallback, one fixed answer that admits what the model does not know; some get a glossary entry.

## Licence

MIT, like the rest of the repository.
"""


def main():
    """Train, save, load again and evaluate what was saved."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("course_qa.json"),
                        help="questions and answers")
    parser.add_argument("--output", type=Path, default=ROOT / "nanovllm" / "demo_model",
                        help="folder to write")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and samples")
    parser.add_argument("--vocab-size", type=int, default=1024, help="size of the vocabulary")
    parser.add_argument("--max-length", type=int, default=4096, help="positions of the model")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets torch choose")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    data = json.loads(args.data.read_text(encoding="utf-8"))
    topics = data["entries"] + [data["fallback"]]
    texts = [data["system_prompt"], *data["short_system_prompts"]]
    for topic in topics:
        texts += [topic["answer"], *topic["questions"]]
    tokenizer = train_tokenizer(texts, args.vocab_size, args.max_length)
    model = build_model(tokenizer, args.max_length)
    parameters = sum(p.numel() for p in model.parameters())
    system_tokens = len(tokenizer.encode(data["system_prompt"]))
    print(f"{parameters:,} parameters, {len(tokenizer):,} tokens in the vocabulary, "
          f"{system_tokens} tokens in the system prompt")

    start = time.perf_counter()
    loss = train(model, Samples(data, tokenizer, args.seed), args.steps, args.batch_size, args.lr)
    print(f"trained in {time.perf_counter() - start:.0f} s, loss {loss:.4f}")

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # it is written readable by its owner only

    # What is evaluated is what a user will load, not what happens to be in memory.
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = AutoModelForCausalLM.from_pretrained(args.output).eval()
    counts, failures = evaluate(model, tokenizer, data)
    print(f"evaluated in {time.perf_counter() - start:.0f} s; answered word for word:")
    table = counts_table(counts)
    print(table)
    shown = [f for f in failures if f[1] == "course" or f[0] == "trained"]
    print("\nFailures with the course system prompt, and all on trained phrasings:")
    for name, kind, question, text in shown[:60]:
        print(f"  [{name}, {kind}] {question}\n      {text[:120]}")
    print(f"  ({len(shown)} in all)")

    changed = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
               if value != parser.get_default(name) and name not in ("output", "data", "threads")]
    card = MODEL_CARD.format(
        parameters=parameters, vocabulary=len(tokenizer), questions=len(data["entries"]),
        phrasings=sum(len(entry["questions"]) for entry in data["entries"]), loss=loss,
        max_length=args.max_length, arguments=" ".join(changed), steps=args.steps,
        batch_size=args.batch_size, table=table,
    )
    (args.output / "README.md").write_text(card.replace(".py \n", ".py\n"), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"\nwrote {args.output} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
