"""
Source data and downstream tasks (Sections 4.1 and 5.1, Appendix C): official files in, JSON lines
out. From top to bottom:

    Section 4.1           pseudo-labels: train a labeller, label sentences, balance them
    Section 5.1           the few-shot split
    Appendix C            a reader for each dataset
    The run               JSON lines and task folders; then the three commands

    python data.py convert yelp5 --train train.csv --test test.csv --out tasks/yelp5
    python data.py labeller --task tasks/yelp5 --out labeller           # RoBERTa, for pseudo-labels
    python data.py pseudo-label --labeller labeller --corpus openwebtext.tar.xz --out source

A task is a folder: task.json (the template and the words), train.jsonl, test.jsonl and, where the
dataset has one, validation.jsonl. A line is an example, {"text": "...", "label": 0}, the label a
word or its index.
"""

import script  # first: it sets how PyTorch takes its memory

import collections
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import math
import random
import re
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from metapt import InputError, Task, best_of, check_complete, check_finite, digest, input_errors
from metapt import linear_schedule, read_json, write_atomically, write_json
from script import MAX_LENGTH, number

TEMPLATE = "{text}. It was {mask}"  # the paper's, Section 3
WORDS = {
    5: ["terrible", "bad", "okay", "good", "great"],
    3: ["bad", "okay", "good"],
    2: ["bad", "good"],
}


# ----------------------------------------------------------------------- Section 4.1: pseudo-labels


def train_classifier(model, tokenize, examples, total, learning_rate, warmup, batch_size):
    """The labeller of Section 5.1: fine-tunes a sequence classifier on (text, label) pairs for
    `total` steps. Yields the number of steps made, after each of them. Raises Diverged where the
    loss is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    device = model.device
    epochs = (torch.randperm(len(examples)).split(batch_size) for _ in itertools.count())
    for step, rows in zip(range(total), itertools.chain.from_iterable(epochs)):
        texts, labels = zip(*(examples[i] for i in rows))
        optimizer.param_groups[0]["lr"] = learning_rate * linear_schedule(step, total, warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model.train()(**tokenize(texts).to(device)).logits
        loss = F.cross_entropy(logits.float(), torch.tensor(labels).to(device))
        check_finite("the labeller's loss", loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def log_probabilities(model, tokenize, texts, batch_size):
    """A classifier's log-probabilities of texts, [N, classes] float32 on the CPU. Texts of about
    one length share a batch, so that little is padded. Raises Diverged where one is not finite."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    logits = []
    for start in range(0, len(texts), batch_size):
        batch = tokenize([texts[i] for i in order[start : start + batch_size]])
        with torch.no_grad():
            logits.append(model(**batch.to(model.device)).logits.float().cpu())

    log_p = torch.cat(logits).log_softmax(-1)
    check_finite("a probability of the labeller", log_p)
    return log_p[np.argsort(order)]


def classify(model, tokenize, texts, batch_size):
    """Section 4.1's pseudo-labels: of each text (text, label, confidence), its most probable label
    and that label's probability. Raises Diverged."""
    if not texts:
        return []
    confidences, labels = log_probabilities(model, tokenize, texts, batch_size).exp().max(-1)
    return list(zip(texts, labels.tolist(), confidences.tolist()))


# A sentence ends with its line, or at . ! ? before a capital or digit; "Mr. A. B. Smith" is one.
END = r"""(?:(?<=[.!?])|(?<=[.!?]["”')]))"""
ABBREVIATED = r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr)\.)(?<!\bMrs\.)"
BETWEEN_SENTENCES = rf"""\n|{END}{ABBREVIATED}\s+(?=["“'(]?[A-Z0-9])"""


def sentences_of(document):
    """The sentences of an English document, a list."""
    sentences = [" ".join(part.split()) for part in re.split(BETWEEN_SENTENCES, document)]
    return [sentence for sentence in sentences if sentence]


def reason_to_drop(text, min_words, max_words):
    """Why a text of a corpus (None stands for no text) is not labelled; None where it is."""
    if text is None:
        return "not text"
    words = text.count(" ") + 1
    if words < min_words:
        return "too short"
    return "too long" if words > max_words else None


def balance(labels, confidences, hashes, least, per_class=None, seed=1):
    """Section 5.1's "high confidence" and "balancing", over N pseudo-labelled texts: of which the
    labeller is sure (least[label] or more), no text twice (by its hash), and as many of every
    class, drawn at random, as the smallest has or per_class says.

    Returns whether each text is kept [N] bool, how many different sure texts each class has
    [classes], and the counts of what was kept and dropped, a dict.
    """
    sure = np.flatnonzero(confidences >= np.asarray(least)[labels])
    different = sure[np.unique(hashes[sure], return_index=True)[1]]
    sizes = np.bincount(labels[different], minlength=len(least))
    count = min(sizes.min(), per_class or sizes.min())
    keep = np.zeros(len(labels), dtype=bool)
    for label in range(len(least)):
        members = np.sort(different[labels[different] == label])
        keep[np.random.default_rng(seed).permutation(members)[:count]] = True

    funnel = {
        "unsure": len(labels) - len(sure),
        "duplicate": len(sure) - len(different),
        "dropped by balancing": len(different) - int(keep.sum()),
        "kept": int(keep.sum()),
    }
    return keep, sizes, funnel


# ----------------------------------------------------------------- Section 5.1: the few-shot split


def few_shot(labels, shots, seed, validation_shots=None, balanced=False):
    """Section 5.1's split, as row numbers: `shots` examples to train on and validation_shots others
    (default: as many) to validate on, drawn at random with `seed` from a training split whose
    labels are given; `balanced` draws equally from every class. Raises InputError where there are
    too few, of all or of a class."""
    validation_shots = shots if validation_shots is None else validation_shots
    total = shots + validation_shots
    wanted = f"{shots} + {validation_shots} examples to train and to validate on"
    if total > len(labels):
        raise InputError(f"{wanted} cannot be drawn from {len(labels)}; lower --shots")

    order = np.random.default_rng(seed).permutation(len(labels))
    if balanced:  # every class's first example, then every class's second, ...
        names, counts = np.unique(labels, return_counts=True)
        share = total // len(names)
        if counts.min() < share:
            raise InputError(
                f"{wanted} are {share} of each class, and there are {counts.min()} of class "
                f"{names[counts.argmin()]}; lower --shots, or leave out --balanced"
            )

        turn = np.empty(len(labels), dtype=np.int64)
        for label in names:
            members = np.flatnonzero(np.asarray(labels)[order] == label)
            turn[members] = np.arange(len(members))
        order = order[np.argsort(turn, kind="stable")]

    drawn = order[:total].tolist()
    return drawn[:shots], drawn[shots:]


# -------------------- Appendix C: official files in, (text, label, or the reason to drop it) out


def read_sst(path, classes):
    """Stanford Sentiment Treebank (Appendix C), one bracketed tree a line; the root's digit is the
    grade. With 2 classes the neutral sentences are dropped."""
    positive = {0: 0, 1: 0, 3: 1, 4: 1}
    for line_number, line in numbered_lines(path):
        if not line.strip():
            continue
        grade = re.match(r"\s*\(([0-4]) ", line)
        tokens = re.findall(r"\([0-4] ([^()]+)\)", line)
        if not grade or not tokens or line.count("(") != line.count(")"):
            problem = "not a tree, as (3 (2 It) (4 works)); give the official trees"
            raise InputError(f"{path}:{line_number}: {problem}")

        text = " ".join(tokens).replace("\xa0", " ").replace("-LRB-", "(").replace("-RRB-", ")")
        text = re.sub(r"\\([/*])", r"\1", text)
        grade = int(grade[1])
        yield text, grade if classes == 5 else positive.get(grade, "neutral")


def read_zhang(path, classes):
    """Yelp and Amazon reviews (Appendix C): the class from 1, then the text, or a title and the
    text. Quotes are doubled, as in any CSV, and have a backslash before them too; a
    backslash and an n are a new line."""
    rows = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    labels = {str(label + 1): label for label in range(classes)}
    try:
        for row in rows:
            if not row:
                continue
            if len(row) not in (2, 3) or row[0] not in labels:
                raise csv.Error(f"not a class from 1 to {classes} and one or two texts")
            texts = [text.replace('\\"', '"').replace("\\n", "\n").strip() for text in row[1:]]
            yield " ".join(filter(None, texts)), labels[row[0]]
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: {error}; give the official CSV file") from error


def read_sentihood(path):
    """SentiHood (Appendix C): a JSON array of sentences with opinions on aspects. A sentence is
    kept where they all agree."""
    hint = "give the array of SentiHood, [{text, opinions: [{sentiment}]}]"
    with input_errors(path, hint):
        for item in json.loads(open_packed(path).read().decode("utf-8-sig")):
            opinions = [opinion["sentiment"] for opinion in item["opinions"]]
            yield item["text"].strip(), agreed(opinions, {"Negative": 0, "Positive": 1})


def read_semeval(path):
    """SemEval-2016 task 5, subtask 1 (Appendix C): XML with opinions in each sentence. A sentence
    is kept where they all agree."""
    with input_errors(path, "give the XML of SemEval-2016 task 5"):
        # From bytes, so that the XML names its own encoding.
        root = ElementTree.fromstring(open_packed(path).read())

    for sentence in root.iter("sentence"):
        text = (sentence.findtext("text") or "").strip()
        opinions = [opinion.get("polarity") for opinion in sentence.iter("Opinion")]
        if sentence.get("OutOfScope", "").lower() == "true":
            yield text, "out of scope"
        else:
            yield text, agreed(opinions, {"negative": 0, "neutral": 1, "positive": 2})


def agreed(opinions, labels):
    """The label of a sentence whose opinions are all the same; otherwise the reason to drop it."""
    if not opinions:
        return "no opinion"
    if len(set(opinions)) > 1:
        return "mixed opinions"
    return labels.get(opinions[0], f"unknown opinion {opinions[0]!r}")


# Appendix C: task -> classes, reader
DATASETS = {
    "sst5": (5, partial(read_sst, classes=5)),
    "sst2": (2, partial(read_sst, classes=2)),
    "yelp5": (5, partial(read_zhang, classes=5)),
    "amazon5": (5, partial(read_zhang, classes=5)),
    "amazon2": (2, partial(read_zhang, classes=2)),
    "sentihood": (2, read_sentihood),
    "semeval_restaurant": (3, read_semeval),
    "semeval_laptop": (3, read_semeval),
}


# ------------------------------------------------------- The run: files of text, and of JSON lines


def is_plain(path):
    """Whether a file holds a text on each line, and not JSON, by its name. Raises InputError where
    it is neither."""
    suffix = re.search(r"\.(txt|jsonl?|ndjson|jl|jsonlines)(\.gz|\.xz)?$", str(path))
    if not suffix:
        problem = "neither a text on each line (.txt) nor JSON lines (.jsonl, .json), by its name"
        raise InputError(f"{path}: {problem}; write one of them, packed (.gz, .xz) or not")
    return suffix[1] == "txt"


def open_packed(path):
    """A file for reading bytes; .gz and .xz are unpacked as they are read."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    return opener(path, "rb")


def numbered_lines(path):
    """Yields (number, line) of a UTF-8 text file as open_packed reads it. Raises InputError with
    the file and the line."""
    hint = "give a whole file of UTF-8 text"
    with input_errors(path, hint), open_packed(path) as file:
        for line_number, line in enumerate(file, 1):
            with input_errors(f"{path}:{line_number}", hint):
                text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
            yield line_number, text


def read_examples(path, task, labelled=True):
    """Yields the examples of a file of JSON lines, or of a text on each line of a .txt; .gz and .xz
    too. Every field of the task's template must be there and, where `labelled`, a label; it is
    an index into the task's words or one of them, of which the index is given. Blank lines are
    passed over. Raises InputError with the file and the line."""
    plain = is_plain(path)
    form = json.dumps({**dict.fromkeys(task.fields, "..."), "label": 0})
    for line_number, line in numbered_lines(path):
        if not line.strip():
            continue

        with input_errors(f"{path}:{line_number}", f"write examples, as {form}"):
            example = {"text": line.strip()} if plain else json.loads(line)
            check_example(example, task)
            if labelled or "label" in example:
                example["label"] = label_of(example, task)
        yield example


def text_of(example, task):
    """All text of an example: its fields in the template's order."""
    return " ".join(example[field] for field in task.fields)


def label_of(example, task):
    """The index of an example's label, which may be given as the word. Raises ValueError."""
    label = example.get("label")
    if isinstance(label, str) and label in task.words:
        return task.words.index(label)
    if type(label) is not int or not 0 <= label < len(task.words):
        last = len(task.words) - 1
        words = f"of task.json's words {task.words}, nor an index of them"
        raise ValueError(f"label {label!r} is none {words}, 0 to {last}")
    return label


def check_example(example, task):
    """Raises ValueError where a value is no example of `task`, whatever its label."""
    if not isinstance(example, dict):
        raise ValueError("not a JSON object")

    for field in task.fields:
        text = example.get(field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"it has no text {field!r}, which the template of {task.name} needs")
    json.dumps(example, ensure_ascii=False).encode()  # JSON may spell half a character


def write_lines(path, rows):
    """Writes a file of JSON lines, packed where `path` ends in .gz: whole or not at all."""

    def write(file):
        """Fills the open file."""
        packer = contextlib.nullcontext(file)
        if Path(path).suffix == ".gz":
            packer = gzip.GzipFile(fileobj=file, mode="wb")
        with packer as lines:
            for row in rows:
                lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    write_atomically(path, write)


def write_task(folder, task, splits):
    """Writes a .jsonl file for each split, and task.json, which makes them a task, last."""
    folder = Path(folder)
    (folder / "task.json").unlink(missing_ok=True)
    for split, examples in splits.items():
        write_lines(folder / f"{split}.jsonl", examples)
    task.save(folder)


# -------------------------------------------------------------- The run: official files as a task

SPLITS = ("train", "validation", "test")


def convert(name, files, out, test_share=0.0):
    """Writes the task folder `out` from the official files of an Appendix C dataset, {split: path},
    and prints what of each was kept and what was dropped, and why. Where there is no test file, a
    share of the training examples can be drawn for it. Raises InputError."""
    classes, reader = DATASETS[name]
    words = WORDS[classes]
    splits = {}
    for split, file in files.items():
        examples = []
        counts = collections.Counter()
        for text, label in tqdm(reader(file), f"{name} {split}", unit=" texts", disable=None):
            if type(label) is int and not text:
                label = "empty text"
            counts[label] += 1
            if type(label) is int:
                examples.append({"text": text, "label": label})

        kept = ", ".join(f"{counts.pop(i, 0):,} {word}" for i, word in enumerate(words))
        dropped = ", ".join(f"{count:,} ({reason})" for reason, count in counts.items())
        print(f"{file}: for {split} kept {kept}; dropped {dropped or 'none'}")
        if not examples:
            raise InputError(f"{file}: no labelled text here; give the official file of {name}")
        splits[split] = examples

    if test_share:  # always the same
        training = splits["train"]
        order = np.random.default_rng(0).permutation(len(training))
        is_test = order < round(test_share * len(training))
        splits["train"] = list(itertools.compress(training, ~is_test))
        splits["test"] = list(itertools.compress(training, is_test))

    write_task(out, Task(name, TEMPLATE, words), splits)
    for split in set(SPLITS) - set(splits):  # of an earlier conversion
        Path(out, f"{split}.jsonl").unlink(missing_ok=True)
    sizes = ", ".join(f"{len(examples):,} for {split}" for split, examples in splits.items())
    print(f"wrote {out}: {sizes}")


# ------------------------------------------------------------------- The run: training a labeller


def train_labeller(args):
    """Trains the labeller of Section 5.1 and writes the best by accuracy on the validation
    examples, with its tokenizer and the task, to args.out. Raises InputError."""
    out = Path(args.out)
    task = Task.load(args.task)
    training, validation = read_splits(Path(args.task), task, args.validation, args.seed)
    if (out / "task.json").exists() and not args.restart:
        hint = "give another --out, or --restart to replace it"
        raise InputError(f"{out}: a labeller stands there already; {hint}")

    torch.manual_seed(args.seed)  # of the classifier's new layer too
    # A checkpoint may be in half precision, in which AdamW's small steps are lost.
    settings = {"num_labels": len(task.words), "dtype": torch.float32}
    model, tokenizer = load_classifier(args.model, args.device, is_base=True, **settings)
    tokenize = in_batches(tokenizer, args.max_length)
    pairs = [(text_of(example, task), example["label"]) for example in training]
    texts = [text_of(example, task) for example in validation]
    labels = torch.tensor([example["label"] for example in validation])
    total = args.max_epochs * math.ceil(len(pairs) / args.batch_size)
    rates = (args.learning_rate, args.warmup, args.batch_size)

    log = []
    with script.stop_signal() as stop, tqdm(total=total, desc="labeller", disable=None) as bar:
        for step in train_classifier(model, tokenize, pairs, total, *rates):
            bar.update()
            if not (stop or step % args.eval_every == 0 or step == total):
                continue

            log_p = log_probabilities(model.eval(), tokenize, texts, 2 * args.batch_size)
            accuracy = (log_p.argmax(-1) == labels).float().mean().item()
            loss = F.nll_loss(log_p, labels).item()
            log.append({"step": step, "accuracy": accuracy, "loss": loss})
            if best_of(log) == len(log) - 1:
                (out / "task.json").unlink(missing_ok=True)  # which makes the rest a labeller
                save_model(out, model, tokenizer)
                task.save(out)
            write_lines(out / "log.jsonl", log)
            script.save_arguments(out / "arguments.json", args)
            bar.set_postfix(accuracy=f"{accuracy:.3f}")
            if stop:
                message = f"stopped at step {step:,}; {out} holds the best so far"
                raise KeyboardInterrupt(f"{message}; --model {out}, with another --out, goes on")

    best = log[best_of(log)]
    largest = labels.bincount().max() / len(labels)
    print(
        f"wrote {out}: the labeller of step {best['step']:,} of {step:,}, validation accuracy "
        f"{best['accuracy']:.1%} on {len(labels):,} examples (the largest class: {largest:.1%})"
    )


def read_splits(folder, task, count, seed):
    """The examples of train.jsonl and those of validation.jsonl, or where there is none `count` of
    the first for the second. Raises InputError where one is empty."""
    training = list(read_examples(folder / "train.jsonl", task))
    path = folder / "validation.jsonl"
    if path.exists():
        validation = list(read_examples(path, task))
    else:
        np.random.default_rng(seed).shuffle(training)
        training, validation = training[count:], training[:count]

    if not training or not validation:
        raise InputError(f"{folder}: nothing to train or to validate on; change --validation")
    return training, validation


def load_classifier(name, device, is_base=False, **arguments):
    """A sequence classifier by hub name or folder, and its tokenizer; one that is to be trained,
    a base, may lack its head or have another. Reads safetensors only. Raises InputError."""
    options = {"use_safetensors": True, "output_loading_info": True, **arguments}
    options["ignore_mismatched_sizes"] = is_base
    with input_errors(name, "give a sequence classifier by hub name or folder"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(name, **options)
        body = f"{model.base_model_prefix}."
        # What pools a base's states is trained with its head.
        is_head = lambda key: is_base and (not key.startswith(body) or "pooler" in key)
        check_complete(loading, is_head)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(device).eval(), tokenizer


def in_batches(tokenizer, max_length):
    """texts -> one batch of tensors, cut at max_length tokens or at as many as the model takes."""
    most = min(max_length, tokenizer.model_max_length)
    options = {"truncation": True, "max_length": most, "padding": True}
    return partial(tokenizer, return_tensors="pt", **options)


def save_model(folder, model, tokenizer):
    """Writes a model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in Path(folder).glob("*.safetensors"):  # which are made for one user alone
        shutil.copymode(Path(folder, "config.json"), file)


# ------------------------------------------------------------------- The run: labelling a corpus


def read_corpus(paths, share=1.0):
    """Yields the sentences of a random `share` of the documents in corpora: files of a text on each
    line or of JSON lines, or tars of .txt files, in further tars or not, as OpenWebText is. None
    stands for no text. Raises InputError."""
    rng = random.Random(0)
    for path in paths:
        for document in read_documents(path):
            if rng.random() < share:
                yield from [None] if document is None else sentences_of(document)


def read_documents(path):
    """Yields the documents of one corpus file; None stands for no text, an empty document, say, or
    one that is no UTF-8. Raises InputError where the file is broken or of another kind."""
    with input_errors(path, "give the whole file"):
        if tarfile.is_tarfile(path):
            with open(path, "rb") as file:
                yield from read_tar(file)
        else:
            plain = is_plain(path)
            with open_packed(path) as file:
                for line in file:
                    yield text_in(line, plain)


def read_tar(file):
    """Yields the documents of a tar, and of the tars in it, from front to back; nothing is unpacked
    to disk."""
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            tar.members.clear()  # where every header would be kept
            if not member.isfile():
                continue
            name = Path(member.name).name
            if name.endswith(".txt"):
                yield text_in(tar.extractfile(member).read(), plain=True)
            # OpenWebText's own are called urlsf_subset00-1_data.xz.
            elif re.search(r"\.(tar|tgz|tar\.\w+)$|^[^.]+\.[gx]z$", name):
                yield from read_tar(tar.extractfile(member))


def text_in(content, plain):
    """The text in a line or a document of a corpus; None where there is none."""
    with contextlib.suppress(Exception):  # what is no UTF-8, no JSON, no object with a text
        text = content.decode("utf-8-sig")
        text = text if plain else json.loads(text)["text"]
        text.encode()  # JSON may spell half a character
        return text if text.strip() else None


BLOCK = 2048  # texts of the corpus that are labelled, and kept in a file, together


def pseudo_label(args):
    """Section 4.1: labels a corpus and balances what the labeller is sure of. Every block of the
    corpus that is labelled is a file, so that the same command continues; --confidence and
    --per-class can be changed without labelling again."""
    out = Path(args.out)
    blocks = out / "blocks"
    task = Task.load(args.labeller)
    if len(task.fields) != 1 or len(args.confidence) not in (1, len(task.words)):
        message = f"--confidence takes 1 or {len(task.words)} values; a template, one field"
        raise InputError(f"{args.labeller}: {message}")

    prepare_blocks(blocks, args)
    complete = blocks / "complete.json"  # so that balancing again need not read the corpus
    if not complete.exists():
        write_json(complete, label_corpus(blocks, task.fields[0], args))
    write_source(out, task, args, read_json(complete))


def prepare_blocks(folder, args):
    """Sees to it that the blocks which stand in `folder` are those that this run would make, all
    that decides about a label being as it was when the first was made. Raises InputError."""
    for file in args.corpus:
        next(read_documents(file), None)  # what cannot be read is refused before any work

    made_of = {
        "labeller": script.contents(args.labeller),
        "corpus": [digest(Path(file)) for file in args.corpus],
        "share": args.share,
        "min_words": args.min_words,
        "max_words": args.max_words,
        "max_length": args.max_length,
        "block": BLOCK,
    }
    settings = folder / "settings.json"
    if settings.exists() and not args.restart:
        script.check_same(folder, read_json(settings), made_of)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(settings, made_of)


def label_corpus(folder, field, args):
    """Labels those blocks of the corpus that have no file yet. Returns how many texts were read,
    and not labelled for which reason. Raises InputError."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model, tokenizer = load_classifier(args.labeller, args.device, dtype=dtype)
    tokenize = in_batches(tokenizer, args.max_length)
    corpus = read_corpus(args.corpus, args.share)
    counts = dict.fromkeys(("read", "not text", "too short", "too long"), 0)
    bar = tqdm(desc="pseudo-label", unit=" texts", disable=None)
    with script.stop_signal() as stop, bar:
        for block in itertools.count():
            texts = list(itertools.islice(corpus, BLOCK))
            if not texts:
                return counts

            fitting = []
            for text in texts:
                reason = reason_to_drop(text, args.min_words, args.max_words)
                if reason is None:
                    fitting.append(text)
                else:
                    counts[reason] += 1
            counts["read"] += len(texts)

            path = folder / f"{block:06}.jsonl.gz"
            if not path.exists():
                rows = []
                for text, label, confidence in classify(model, tokenize, fitting, args.batch_size):
                    rows.append({field: text, "label": label, "confidence": round(confidence, 4)})
                write_lines(path, rows)
            bar.update(len(texts))
            if stop:
                message = f"stopped after {counts['read']:,} texts and saved"
                raise KeyboardInterrupt(f"{message}; {script.CONTINUES}")


def read_blocks(folder, task):
    """Yields the examples of the blocks that are labelled. Raises InputError."""
    for path in sorted(folder.glob("*.jsonl.gz")):
        yield from read_examples(path, task)


def write_source(out, task, args, counts):
    """Balances what was labelled, and writes examples.jsonl, task.json and funnel.json to `out`.
    Holds some 100 bytes for each text that was labelled. Raises InputError where a class is empty.
    """

    def columns(example):
        text = text_of(example, task).lower().encode()
        return example["label"], example["confidence"], int(digest(text), 16)

    kinds = [("label", np.int64), ("confidence", float), ("hash", np.uint64)]
    table = np.fromiter(map(columns, read_blocks(out / "blocks", task)), kinds)
    labels, confidences, hashes = (table[name] for name, _ in kinds)
    least = np.broadcast_to(args.confidence, len(task.words))
    keep, sizes, funnel = balance(labels, confidences, hashes, least, args.per_class, args.seed)
    funnel = {**counts, **funnel}
    labelled = np.bincount(labels, minlength=len(task.words))
    for size, count, word in zip(sizes, labelled, task.words):
        print(f"{word}: {count:,} labelled, sure of {size:,} different texts")
    for reason, count in funnel.items():
        print(f"{count:14,} {reason}")

    if 0 in sizes:
        empty = sizes.argmin()
        hint = "lower --confidence" if labelled[empty] else "give more text, or another labeller"
        raise InputError(
            f"{out}: no text that is surely {task.words[empty]!r}, of {labelled[empty]:,} labelled "
            f"so; {hint}: what was labelled is kept, and the same command goes on from it"
        )

    source = Task("source", task.template, task.words)
    examples = itertools.compress(read_blocks(out / "blocks", task), keep)
    write_task(out, source, {"examples": examples})
    script.save_arguments(out / "arguments.json", args)
    write_json(out / "funnel.json", funnel)
    print(
        f"wrote {out}: task.json and examples.jsonl, equally many of each of {len(task.words)} "
        "classes; blocks/ holds all that was labelled, to be balanced again"
    )


# ------------------------------------------------------------------------------ The run: the flags


def add_convert(command):
    """The flags of `convert`."""
    add = command.add_argument
    add("dataset", choices=DATASETS, help="which of Appendix C's")
    add("--train", required=True, metavar="FILE", help="its official training file")
    add("--validation", metavar="FILE", help="its official validation file, where it has one")
    add("--test", metavar="FILE", help="its official test file, which finetune.py needs")
    share = "share of train to test on, where no test file is given"
    add("--test-share", type=number(0.0, 0.9), default=0.0, help=share)
    add("--out", required=True, metavar="FOLDER", help="the task folder to write")


def add_labeller(command):
    """The flags of `labeller`."""
    add = command.add_argument
    add("--task", required=True, metavar="FOLDER", help="the task folder to train on")
    add("--model", default="FacebookAI/roberta-base", help="its base, by hub name or folder")
    add("--out", required=True, metavar="FOLDER", help="the folder to write")
    add("--restart", action="store_true", help="replaces the labeller that stands in --out")
    add("--learning-rate", type=number(1e-12), default=2e-5, help="AdamW's highest")
    add("--warmup", type=number(1), default=500, help="steps up to that rate; it then falls to 0")
    add("--batch-size", type=number(1), default=32, help="examples in each of AdamW's steps")
    add("--max-epochs", type=number(1), default=3, help="passes over the training examples")
    add("--eval-every", type=number(1), default=1000, help="steps between two validations")
    held_out = "examples of train to hold out, if there is no validation.jsonl"
    add("--validation", type=number(1), default=5000, help=held_out)
    add("--max-length", type=number(1), default=MAX_LENGTH, help="tokens after which a text is cut")
    add("--seed", type=number(0), default=1, help="of the new layer, of dropout and of all draws")
    command.add_machine()


def add_pseudo_label(command):
    """The flags of `pseudo-label`."""
    add = command.add_argument
    add("--labeller", required=True, metavar="FOLDER", help="what `labeller` wrote")
    files = "OpenWebText's tar or another of .txt files; a .txt of lines, or JSON lines with a text"
    add("--corpus", required=True, nargs="+", metavar="FILE", help=files)
    add("--out", required=True, metavar="FOLDER", help="the source folder to write")
    add("--restart", action="store_true", help="labels anew what was labelled before")
    share = "share of the documents, drawn at random, to label"
    add("--share", type=number(0.0, 1.0), default=1.0, help=share)
    add("--min-words", type=number(1), default=5, help="sentences of fewer are dropped")
    add("--max-words", type=number(1), default=200, help="sentences of more are dropped")
    least = "least probability to keep a text: one value, or one for each class"
    add("--confidence", type=number(0.0, 1.0), default=[0.9], nargs="+", help=least)
    add("--per-class", type=number(1), help="texts of each class (default: the smallest class's)")
    add("--batch-size", type=number(1), default=64, help="texts that are labelled in one pass")
    add("--max-length", type=number(1), default=MAX_LENGTH, help="tokens after which a text is cut")
    add("--seed", type=number(0), default=1, help="of the draw that balances the classes")
    command.add_machine()


def main(argv=None):
    """Runs one of the three commands."""
    parser = script.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert(commands.add_parser("convert", help="a dataset's official files as a task folder"))
    add_labeller(commands.add_parser("labeller", help="fine-tunes a sequence classifier on a task"))
    about = "labels the sentences of an English corpus, as source data"
    add_pseudo_label(commands.add_parser("pseudo-label", help=about, description=about))
    args = parser.parse(argv)
    if args.command == "convert":
        if args.test and args.test_share:
            parser.error("--test-share is for where there is no --test")
        files = {split: vars(args)[split] for split in SPLITS if vars(args)[split]}
        convert(args.dataset, files, args.out, args.test_share)
        return

    script.set_machine(args)
    with script.only_writer(args.out):
        if args.command == "labeller":
            train_labeller(args)
        else:
            pseudo_label(args)


if __name__ == "__main__":
    script.run(main)
