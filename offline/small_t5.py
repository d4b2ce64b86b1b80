"""
A small T5 from nothing, where T5-base cannot be had: a tokenizer and a model learned from a corpus
by T5's span corruption, and from labelled tasks by the objective of Section 3.

    python offline/small_t5.py --corpus reviews.jsonl --task tasks/imdb --out t5

It takes minutes, and is made anew where it was stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import script  # first: it sets how PyTorch takes its memory

import itertools
import json
import re
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

import data
from metapt import NEW_WORD, InputError, PromptedT5, Task, input_errors, linear_schedule
from script import number

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]


def learn_tokenizer(texts, words, size):
    """A tokenizer of T5's kind, with about `size` lower-cased pieces (Unigram) learned from texts,
    </s> at the end and a hundred sentinels. Each of `words` is one piece of it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    # The trainer adds in another order each time: its last digits and the order of ties go.
    state = json.loads(tokenizer.to_str())
    pieces = [(piece, round(score, 6)) for piece, score in state["model"]["vocab"]]
    special, learned = pieces[:3], pieces[3:]
    scores = dict(special + sorted(learned, key=lambda pair: (-pair[1], pair[0])))
    # A word that was cut becomes a piece, more probable than any cut of it.
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
    lengths_left = split_at_random(len(ids) - lost, spans, rng)
    lengths_lost = split_at_random(lost, spans, rng)

    source, target = [], []
    start = 0
    for sentinel, keep, lose in zip(sentinels, lengths_left, lengths_lost):
        source += [*ids[start : start + keep], sentinel]
        target += [sentinel, *ids[start + keep : start + keep + lose]]
        start += keep + lose

    return source + [end], target + [sentinels[spans], end]


def split_at_random(total, parts, rng):
    """`parts` lengths of at least one that make up `total`."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()


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
    mask = (inputs != tokenizer.pad_token_id).long()
    labels = pad_sequence(targets, True, -100)  # which T5's loss leaves out
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


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
    step's two losses."""
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
        yield span_loss.item(), label_loss.item()


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def make_t5(args):
    """Pre-trains a small T5 on a corpus and on labelled tasks, and writes it to args.out in the
    form in which any T5 is loaded. Raises InputError."""
    out = Path(args.out)
    if (out / "config.json").exists() and not args.restart:
        raise InputError(f"{out}: a T5 stands there already; give another --out, or --restart")

    tasks = [Task.load(folder) for folder in args.task]
    by_class, held_out = [], []
    for folder, task in zip(args.task, tasks):
        examples, validation = data.read_splits(Path(folder), task, args.validation, args.seed)
        by_class.append(classes_of(examples))
        held_out.append(validation)

    words = [word for task in tasks for word in task.words]
    tokenizer, stream, held_out_stream = read_tokens(args, words)
    t5 = new_t5(args, len(tokenizer)).to(args.device)
    prompted = [PromptedT5(t5, tokenizer, task, args.max_length) for task in tasks]
    t5.requires_grad_(True)  # which PromptedT5 has frozen
    batches = [list(model.batches(examples)) for model, examples in zip(prompted, held_out)]
    windows = partial(draw_windows, tokenizer=tokenizer, longest=args.max_length)
    rng = np.random.default_rng(args.seed)
    held_out_windows = [windows(held_out_stream, 64, rng=rng) for _ in range(8)]

    def draw(step):
        rng = np.random.default_rng([args.seed, step])
        i = step % len(tasks)
        examples = draw_labelled(by_class[i], tasks[i].fields, args.labelled, args.excerpts, rng)
        labelled = prompted[i].encode(examples)
        return windows(stream, args.batch_size, rng=rng), prompted[i], labelled

    optimizer = Adafactor(t5.parameters(), args.learning_rate, beta1=0.9, relative_step=False)
    rate = lambda step: args.learning_rate * linear_schedule(step, args.max_steps, warmup=100)
    dtype = getattr(torch, args.dtype)
    steps = pretrain(t5, draw, optimizer, range(args.max_steps), rate, dtype)
    log = []
    bar = tqdm(steps, "pretrain", args.max_steps, unit=" steps", disable=None)
    for step, _ in enumerate(bar, 1):
        if step % args.eval_every == 0 or step == args.max_steps:
            score = validate(t5, prompted, held_out_windows, batches, dtype)
            log.append({"step": step, **score})
            tqdm.write(" ".join(f"{name} {value:.4g}" for name, value in log[-1].items()))

    data.save_model(out, t5, tokenizer)
    data.write_lines(out / "log.jsonl", log)
    script.save_arguments(out / "arguments.json", args)
    print(f"wrote {out}: held out, its accuracy at the mask is {log[-1]['accuracy']:.1%}")


def read_tokens(args, words):
    """A tokenizer learned from the corpus, the corpus as one stream of its token ids, and one in a
    hundred documents as another stream. Raises InputError."""
    beginnings = [itertools.islice(data.read_documents(path), 20_000) for path in args.corpus]
    texts = (text[:2000] for text in itertools.chain(*beginnings) if text)
    with input_errors(args.corpus[0], "raise --pieces"):
        tokenizer = learn_tokenizer(texts, words, args.pieces)

    documents = itertools.chain.from_iterable(map(data.read_documents, args.corpus))
    documents = tqdm(filter(None, documents), "reading", unit=" documents", disable=None)
    stream, held_out = [], []
    for i, text in enumerate(documents):
        ids = np.array(tokenizer(text, verbose=False).input_ids, dtype=np.uint32)
        (held_out if i % 100 == 0 else stream).append(ids)

    if min(sum(map(len, stream)), sum(map(len, held_out))) <= args.max_length:
        raise InputError(f"{args.corpus[0]}: too little text to pre-train on; give more --corpus")
    return tokenizer, np.concatenate(stream), np.concatenate(held_out)


def new_t5(args, pieces):
    """A T5 with random weights, of the shape that the arguments give."""
    torch.manual_seed(args.seed)
    config = T5Config(
        vocab_size=pieces,
        d_model=args.d_model,
        d_ff=args.d_ff,
        d_kv=max(1, args.d_model // args.heads),
        num_heads=args.heads,
        num_layers=args.layers,
        num_decoder_layers=1,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config)
    # Words of a tenth of T5's own size: else the first thousands of steps hardly move them.
    t5.shared.weight.data *= 0.1
    return t5


def classes_of(examples):
    """The examples of each class that has any."""
    by_class = {}
    for example in examples:
        by_class.setdefault(example["label"], []).append(example)
    return [by_class[label] for label in sorted(by_class)]


def validate(t5, prompted, windows, batches, dtype):
    """The mean loss of held-out windows, and the mean accuracy and loss at the mask of the tasks'
    held-out examples, without a prompt."""
    losses, scores = [], []
    with torch.no_grad(), torch.autocast(t5.device.type, dtype, enabled=dtype != torch.float32):
        for window in windows:
            inputs = {name: rows.to(t5.device) for name, rows in window.items()}
            losses.append(t5(**inputs, use_cache=False).loss.item())
        for model, of_task in zip(prompted, batches):
            scores.append(model.evaluate(model.no_prompt(), of_task))

    mean = lambda name: float(np.mean([score[name] for score in scores]))
    loss = float(np.mean(losses))
    return {"loss": loss, "label_loss": mean("loss"), "accuracy": mean("accuracy")}


def make_parser():
    """The flags of this script."""
    parser = script.Parser(__doc__)
    add = parser.add_argument_group("where").add_argument
    add("--corpus", required=True, nargs="+", metavar="FILE", help="texts, as .jsonl or .txt")
    add("--task", required=True, nargs="+", metavar="FOLDER", help="labelled tasks, learned too")
    add("--out", required=True, metavar="FOLDER", help="the folder to write")
    add("--restart", action="store_true", help="replaces the T5 that stands in --out")

    add = parser.add_argument_group("its shape").add_argument
    add("--pieces", type=number(1), default=8000, help="pieces of the tokenizer")
    add("--d-model", type=number(1), default=192, help="width of the T5")
    add("--d-ff", type=number(1), default=512, help="width of its feed-forward layers")
    add("--heads", type=number(1), default=3, help="its attention heads")
    add("--layers", type=number(1), default=3, help="layers of its encoder; the decoder has one")

    add = parser.add_argument_group("its training").add_argument
    add("--max-steps", type=number(1), default=4000, help="steps")
    add("--eval-every", type=number(1), default=250, help="steps from a validation to the next")
    add("--batch-size", type=number(1), default=16, help="windows of the corpus in a step")
    add("--labelled", type=number(1), default=64, help="labelled examples in a step")
    excerpts = "share of the labelled examples that is cut to 1 to 3 sentences"
    add("--excerpts", type=number(0.0, 1.0), default=0.5, help=excerpts)
    rate = "Adafactor's: it rises for 100 steps, then falls to 0"
    add("--learning-rate", type=number(1e-12), default=0.01, help=rate)
    held_out = "examples of a task to validate on, where it has no validation.jsonl"
    add("--validation", type=number(1), default=500, help=held_out)
    add("--max-length", type=number(1), default=64, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="of the weights and of every draw")

    add = parser.add_machine().add_argument
    precision = "precision of the products; bfloat16 is faster where the device knows it"
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help=precision)
    return parser


def main(argv=None):
    """Reads the flags and makes the T5."""
    args = make_parser().parse(argv)
    script.set_machine(args)
    with script.only_writer(args.out):
        make_t5(args)


if __name__ == "__main__":
    script.run(main)
