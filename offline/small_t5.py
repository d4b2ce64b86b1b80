"""
A small T5 from nothing, where T5-base cannot be had: a tokenizer and a model learned from a corpus
by T5's span corruption, and from labelled tasks by the objective of Section 3.

    python offline/small_t5.py --corpus reviews.jsonl --task tasks/imdb --out t5

It takes minutes, and is made anew where it was stopped.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import collections
import itertools
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from metapt import NEW_WORD, Diverged, InputError, PromptedT5, Task, blame, linear_schedule

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]


def learn_tokenizer(texts, words, size):
    """A tokenizer of T5's kind, with about `size` lower-cased pieces (Unigram) learned from texts,
    </s> at the end and a hundred sentinels. Each of `words` is one piece of it."""
    tokenizer = Tokenizer(models.Unigram())
    lower = [normalizers.NFKC(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(lower)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    how = {"vocab_size": size, "special_tokens": special, "unk_token": "<unk>"}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(**how, show_progress=False))

    # A word that was cut becomes a piece, more probable than any cut of it.
    state = json.loads(tokenizer.to_str())
    scores = dict(map(tuple, state["model"]["vocab"]))
    for word in words:
        piece = NEW_WORD + word.lower()
        scores[piece] = max(scores.get(piece, -6.0), -6.0)

    state["model"]["vocab"] = list(scores.items())
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Metaspace()
    end = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SENTINELS,
    )


def corrupt(ids, sentinels, end, rng, density=0.15, mean_length=3):
    """T5's span corruption of two token ids or more: (input ids, target ids). Spans of three tokens
    on average, 15 % of all, are lost; a sentinel stands for each, and the target spells them out.
    The id `end` closes both."""
    lost = min(max(round(density * len(ids)), 1), len(ids) - 1)
    spans = min(max(round(lost / mean_length), 1), len(ids) - lost, len(sentinels) - 1)
    source, target, at = [], [], 0
    lengths = zip(
        sentinels, split_at_random(len(ids) - lost, spans, rng), split_at_random(lost, spans, rng)
    )
    for sentinel, keep, lose in lengths:
        source += [*ids[at : at + keep], sentinel]
        target += [sentinel, *ids[at + keep : at + keep + lose]]
        at += keep + lose

    return source + [end], target + [sentinels[spans], end]


def split_at_random(total, parts, rng):
    """`parts` lengths of at least one that make up `total`."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()


def word_runs(text, length=8):
    """Every run of `length` words in a text, of a shorter text the whole; without case, punctuation
    and the spaces that treebanks have in "do n't"."""
    text = re.sub(r" (?=n't|')", "", text.lower()).replace("'", "")
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + length]) for i in range(max(len(words) - length, 0) + 1)}


def draw_windows(stream, count, tokenizer, longest, rng):
    """`count` windows cut out of a stream of token ids at random, of all lengths up to `longest`,
    as a batch for T5: input_ids, attention_mask and labels."""
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    sources, targets = [], []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        start = int(rng.integers(len(stream) - length + 1))
        window = stream[start : start + length].tolist()
        source, target = corrupt(window, sentinels, tokenizer.eos_token_id, rng)
        sources.append(torch.tensor(source))
        targets.append(torch.tensor(target))

    inputs = pad_sequence(sources, True, tokenizer.pad_token_id)
    seen = (inputs != tokenizer.pad_token_id).long()
    labels = pad_sequence(targets, True, -100)  # which T5's loss leaves out
    return {"input_ids": inputs, "attention_mask": seen, "labels": labels}


def draw_labelled(by_class, fields, count, excerpts, rng):
    """`count` examples, every class as likely as another. The share `excerpts` of them keeps only
    one to three sentences of each field: downstream texts are short."""
    drawn = []
    for _ in range(count):
        members = by_class[rng.integers(len(by_class))]
        example = members[rng.integers(len(members))]
        if rng.random() < excerpts:
            parts = {field: excerpt(example[field], rng) for field in fields}
            example = {**example, **parts}
        drawn.append(example)

    return drawn


def excerpt(text, rng):
    """One to three sentences of a text."""
    sentences = [part for part in re.split(data.BETWEEN_SENTENCES, text) if part.strip()]
    count = int(rng.integers(1, 4))
    start = int(rng.integers(max(len(sentences) - count, 0) + 1))
    return " ".join(sentences[start : start + count])


def pretrain(t5, draw, optimizer, steps, rate, dtype):
    """Trains a T5 by span corruption and, as T5's own pre-training did, by tasks too: by the
    objective of Section 3, without a prompt. draw(step) gives a batch of windows, a PromptedT5
    around this T5, and a batch of its task's examples; rate(step) the learning rate. Yields each
    step's two losses and its number of tokens."""
    for step in steps:
        windows, model, labelled = draw(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        with torch.autocast(t5.device.type, dtype, enabled=dtype != torch.float32):
            batch = {name: rows.to(t5.device) for name, rows in windows.items()}
            span_loss = t5(**batch, use_cache=False).loss
            label_loss = model.loss(model.no_prompt(), labelled)
        (span_loss + label_loss).backward()
        torch.nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = windows["input_ids"].numel() + labelled["input_ids"].numel()
        yield span_loss.item(), label_loss.item(), tokens


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def make_t5(args):
    """Pre-trains a small T5 on a corpus and on labelled tasks, and writes it to args.out in the
    form in which any T5 is loaded. Raises InputError."""
    out, tasks = Path(args.out), [Task.load(folder) for folder in args.task]
    if (out / "config.json").exists() and not args.restart:
        mend = "give another --out, or --restart to replace it"
        raise InputError(f"{out}: a model stands there already; {mend}")

    excluded = runs_of_tasks(args.exclude or [])
    splits = []
    for folder, task in zip(args.task, tasks):
        splits.append(labelled_splits(args, Path(folder), task, excluded))
    words = [word for task in tasks for word in task.words]
    tokenizer, stream, held_out = read_tokens(args, words, excluded)
    t5 = new_t5(args, len(tokenizer)).to(args.device)
    models = [PromptedT5(t5, tokenizer, task, args.max_length) for task in tasks]
    t5.requires_grad_(True)  # which PromptedT5 has frozen
    optimizer = Adafactor(t5.parameters(), args.learning_rate, beta1=0.9, relative_step=False)

    by_class = [classes_of(training) for training, _ in splits]
    windows = partial(draw_windows, tokenizer=tokenizer, longest=args.max_length)

    def draw(step):
        rng, i = np.random.default_rng([args.seed, step]), step % len(tasks)
        examples = draw_labelled(by_class[i], tasks[i].fields, args.labelled, args.excerpts, rng)
        return windows(stream, args.batch_size, rng=rng), models[i], models[i].encode(examples)

    validations = [list(model.batches(rows)) for model, (_, rows) in zip(models, splits)]
    rng = np.random.default_rng(args.seed)
    held_out = [windows(held_out, 64, rng=rng) for _ in range(8)]
    dtype = getattr(torch, args.dtype or fast_dtype(args.device))
    rate = lambda step: args.learning_rate * linear_schedule(step, args.max_steps, args.warmup)
    steps = pretrain(t5, draw, optimizer, range(args.max_steps), rate, dtype)
    log = make_steps(args, steps, partial(validate, t5, models, held_out, validations, dtype))

    data.save_model(out, t5, tokenizer)
    data.write_lines(out / "log.jsonl", log)
    data.save_arguments(out / "arguments.json", args)
    size = sum(values.numel() for values in t5.parameters()) / 1e6
    print(
        f"wrote {out}: a T5 of {size:.2f} million parameters after {args.max_steps:,} steps; held "
        f"out: loss {log[-1]['loss']:.2f}, accuracy at the mask {log[-1]['accuracy']:.1%}"
    )


def make_steps(args, steps, validate):
    """Makes the steps; returns the validations, of each its step, scores and speed. Raises Diverged
    where a loss is not finite."""
    log, began, seen = [], time.time(), 0
    bar = tqdm(steps, "pretrain", args.max_steps, unit=" steps", disable=None)
    for step, (_, _, tokens) in enumerate(bar, 1):
        seen += tokens
        if step % args.eval_every and step < args.max_steps:
            continue

        log.append({"step": step, **validate()})
        if not math.isfinite(log[-1]["loss"] + log[-1]["label_loss"]):
            mend = "the loss is not finite; lower --learning-rate"
            raise Diverged(f"{args.out}: step {step:,}: {mend}")
        log[-1]["tokens_per_second"] = round(seen / (time.time() - began))
        tqdm.write(" ".join(f"{name} {value:.4g}" for name, value in log[-1].items()))

    return log


def labelled_splits(args, folder, task, excluded):
    """A task's training and held-out examples that are apart from the excluded tasks. Raises
    InputError where none is left."""
    text = partial(data.text_of, task=task)
    splits = data.read_splits(folder, task, args.validation, args.seed)
    splits = [list(apart(examples, text, excluded, folder)) for examples in splits]
    if not all(splits):
        raise InputError(f"{folder}: --exclude leaves no example of it; give another --task")
    return splits


def fast_dtype(device):
    """The faster of the precisions in which a device can multiply."""
    fast = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return "bfloat16" if fast else "float32"


def runs_of_tasks(folders):
    """The runs of words in all texts of tasks, those to train on and those to test on."""
    runs = set()
    for folder in map(Path, folders):
        task = Task.load(folder)
        for path in folder.glob("*.jsonl"):
            for example in data.read_examples(path, task, labelled=False):
                for field in task.fields:
                    runs |= word_runs(example[field])
    return runs


def apart(items, text_of, runs, name):
    """Yields the items whose text has none of the runs of words, then prints the others' count."""
    total = shared = 0
    for item in filter(None, items):
        total += 1
        if not runs or runs.isdisjoint(word_runs(text_of(item))):
            yield item
        else:
            shared += 1
    if runs:
        message = "share eight words in a row with a task that --exclude names, and are left out"
        print(f"{name}: {shared:,} of {total:,} texts {message}", flush=True)


def read_tokens(args, words, excluded):
    """A tokenizer learned from the corpus, the corpus as one stream of its token ids, and one in a
    hundred documents as another stream. Raises InputError."""
    learn_from = [itertools.islice(data.read_documents(path), 20_000) for path in args.corpus]
    texts = (text[:2000] for text in itertools.chain(*learn_from) if text)
    with blame(args.corpus[0], "raise --pieces", Exception):  # tokenizers raises no other kind
        tokenizer = learn_tokenizer(texts, words, args.pieces)

    documents = (apart(data.read_documents(path), str, excluded, path) for path in args.corpus)
    documents = itertools.chain.from_iterable(documents)
    most, few = [], []
    for number, text in enumerate(tqdm(documents, "reading", unit=" documents", disable=None)):
        ids = np.array(tokenizer(text, verbose=False).input_ids, dtype=np.uint32)
        (few if number % 100 == 0 else most).append(ids)

    streams = [np.concatenate([np.zeros(0, np.uint32), *part]) for part in (most, few)]
    if min(map(len, streams)) <= args.max_length:
        raise InputError(f"{args.corpus[0]}: too little text to pre-train on; give more --corpus")
    return tokenizer, *streams


def new_t5(args, pieces):
    """A T5 with random weights, of the shape that the arguments give."""
    torch.manual_seed(args.seed)
    width = max(1, args.d_model // args.heads)
    shape = {"d_model": args.d_model, "d_ff": args.d_ff, "d_kv": width}
    layers = {"num_layers": args.layers, "num_decoder_layers": args.decoder_layers}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    heads = {"num_heads": args.heads, "dropout_rate": 0.0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=pieces, **shape, **layers, **heads, **ids))
    # Words of a tenth of T5's own size: else the first thousands of steps hardly move them.
    t5.shared.weight.data *= 0.1
    return t5


def classes_of(examples):
    """The examples of each class that has any."""
    by_class = collections.defaultdict(list)
    for example in examples:
        by_class[example["label"]].append(example)
    return [by_class[label] for label in sorted(by_class)]


def validate(t5, models, windows, validations, dtype):
    """The mean loss of held-out windows, and the mean accuracy and loss at the mask of the tasks'
    held-out examples, without a prompt."""
    precision = torch.autocast(t5.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), precision:
        losses = []
        for batch in windows:
            batch = {name: rows.to(t5.device) for name, rows in batch.items()}
            losses.append(t5(**batch, use_cache=False).loss.item())
        scores = []
        for model, rows in zip(models, validations):
            scores.append(model.evaluate(model.no_prompt(), rows))

    mean = lambda name: float(np.mean([score[name] for score in scores]))
    loss = float(np.mean(losses))
    return {"loss": loss, "label_loss": mean("loss"), "accuracy": mean("accuracy")}


def main(argv=None):
    """Reads the flags and makes the T5."""
    parser, number, folder = data.Parser(__doc__), data.number, data.existing("folder")
    add = parser.add_argument_group("where").add_argument
    add(
        "--corpus",
        required=True,
        nargs="+",
        type=data.existing("file"),
        metavar="FILE",
        help="text to pre-train on, in the form that data.py pseudo-label takes",
    )
    add(
        "--task",
        required=True,
        nargs="+",
        type=folder,
        metavar="FOLDER",
        help="tasks whose examples are a part of it, as text",
    )
    add("--out", required=True, metavar="FOLDER", help="the folder to write")
    add("--restart", action="store_true", help="replaces the model that stands in --out")
    add(
        "--exclude",
        nargs="+",
        type=folder,
        metavar="FOLDER",
        help="tasks to keep out of it: texts that share eight words in a row with theirs are "
        "dropped; it takes some 10 KB of memory for each of their texts",
    )

    add = parser.add_argument_group("its shape").add_argument
    add("--pieces", type=number(1), default=8000, help="of the tokenizer")
    add("--d-model", type=number(1), default=192, help="width of the T5")
    add("--d-ff", type=number(1), default=512, help="width of its feed-forward layers")
    add("--heads", type=number(1), default=3, help="its attention heads")
    add("--layers", type=number(1), default=3, help="of the encoder")
    add("--decoder-layers", type=number(1), default=1, help="of the decoder")

    add = parser.add_argument_group("how it learns").add_argument
    add("--max-steps", type=number(1), default=4000, help="steps")
    add("--eval-every", type=number(1), default=250, help="steps between validations")
    add("--batch-size", type=number(1), default=16, help="windows of the corpus in a step")
    add("--labelled", type=number(1), default=64, help="labelled examples in a step")
    add("--excerpts", type=number(0.0, 1.0), default=0.5, help="share cut to 1 to 3 sentences")
    add("--learning-rate", type=number(1e-12), default=0.01, help="Adafactor's")
    add("--warmup", type=number(1), default=100, help="steps up to it; it then falls")
    add(
        "--validation",
        type=number(1),
        default=500,
        help="examples of a task to validate on where there is no validation.jsonl",
    )
    add("--max-length", type=number(1), default=64, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="of the weights and of every draw")

    machine = parser.add_machine()
    dtypes = ["float32", "bfloat16"]
    machine.add_argument("--dtype", choices=dtypes, help="(default: the faster one here)")
    args = parser.parse(argv)
    data.set_machine(args)
    make_t5(args)


if __name__ == "__main__":
    data.run(main)
