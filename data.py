"""
Source data and downstream tasks (Sections 4.1 and 5.1, Appendix C): official files in, JSON lines
out. From top to bottom:

    Section 4.1           pseudo-labels: train a labeller, label sentences, balance them
    Section 5.1           the few-shot split
    Appendix C            a reader for each dataset
    The run               JSON lines and task folders; then the three commands

    python data.py convert yelp5 --input yelp_review_full_csv.tgz --out tasks/yelp5   # or another
    python data.py labeller --task tasks/yelp5 --out labeller           # RoBERTa, for pseudo-labels
    python data.py pseudo-label --labeller labeller --corpus openwebtext.tar.xz --out source

A task is a folder: task.json (the template and the words), train.jsonl, test.jsonl and, where the
dataset has one, validation.jsonl. A line is an example, {"text": "...", "label": 0}, the label a
word or its index.
"""

import script  # first: it sets how PyTorch takes its memory

import array
import collections
import contextlib
import csv
import datetime
import fnmatch
import gzip
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
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
    order = iter(())
    for step in range(total):
        rows = next(order, None)
        if rows is None:  # a new epoch
            order = iter(torch.randperm(len(examples)).split(batch_size))
            rows = next(order)

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
    """Section 4.1's pseudo-labels: each text's most probable label and its confidence, that
    label's probability: two lists. Raises Diverged."""
    confidences, labels = log_probabilities(model, tokenize, texts, batch_size).exp().max(-1)
    return labels.tolist(), confidences.tolist()


# A sentence ends with its line, or before a capital, but not in "Mr. A. B. Smith".
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
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        tokens = re.findall(r"\([0-4] ([^()]+)\)", line)
        closed = line.count("(") == line.count(")")
        if not re.match(r"\s*\([0-4] ", line) or not tokens or not closed:
            problem = "not a tree, as (3 (2 It) (4 works)); give the official trees"
            raise InputError(f"{path}:{number}: {problem}")

        text = " ".join(tokens).replace("\xa0", " ").replace("-LRB-", "(").replace("-RRB-", ")")
        text = re.sub(r"\\([/*])", r"\1", text)
        grade = int(line.lstrip()[1])
        yield text, grade if classes == 5 else positive.get(grade, "neutral")


def read_sst2(path):
    """SST-2 from the trees, or from GLUE's .tsv with its header, where quotes are text."""
    if not unpacked_name(path).endswith(".tsv"):
        yield from read_sst(path, 2)
        return

    for number, line in numbered_lines(path):
        text, _, label = line.rstrip("\r\n").rpartition("\t")
        fits = (text, label) == ("sentence", "label") if number == 1 else label in ("0", "1")
        if not fits:
            problem = "not GLUE's sentence, tab, label; give its train.tsv and dev.tsv"
            raise InputError(f"{path}:{number}: {problem}")
        if number > 1:
            yield text.strip(), int(label)


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
    """SemEval-2016 task 5, subtask 1 (Appendix C): XML with opinions in each sentence. 2015's has
    that form too, 2014's has them as aspect terms. A sentence is kept where they all agree."""
    with input_errors(path, "give the XML of SemEval-2016 task 5"):
        # From bytes, so that the XML names its own encoding.
        root = ElementTree.fromstring(open_packed(path).read())

    for sentence in root.iter("sentence"):
        text = (sentence.findtext("text") or "").strip()
        opinions = [*sentence.iter("Opinion"), *sentence.iter("aspectTerm")]
        opinions = [opinion.get("polarity") for opinion in opinions]
        if sentence.get("OutOfScope", "").lower() == "true":
            yield text, "out of scope"
        else:
            yield text, agreed(opinions, {"negative": 0, "neutral": 1, "positive": 2})


def agreed(opinions, labels):
    """The label of a sentence whose opinions are all the same; otherwise the reason to drop it."""
    if not opinions:
        return "no opinion"
    if len(set(opinions)) > 1 or "conflict" in opinions:  # as 2014 calls mixed ones
        return "mixed opinions"
    return labels.get(opinions[0], f"unknown opinion {opinions[0]!r}")


# What the official file of each split is called, in small letters; the first that is there counts.
TREES = {"train": ["train.txt"], "validation": ["dev.txt"], "test": ["test.txt"]}
# GLUE's test has no labels, so that its dev is the test.
SST2 = {
    "train": ["train.txt", "train.tsv"],
    "validation": ["dev.txt"],
    "test": ["test.txt", "dev.tsv"],
}
ZHANG = {"train": ["train.csv"], "test": ["test.csv"]}
SENTIHOOD = {"train": ["*train*.json"], "validation": ["*dev*.json"], "test": ["*test*.json"]}
# SB1 has a sentence's opinions, SB2 a whole review's; a test without "gold" has none.
RESTAURANTS = {"train": ["*rest*train*sb1*"], "test": ["en_rest*sb1*test*gold*"]}
LAPTOPS = {"train": ["*lap*train*sb1*"], "test": ["en_lap*sb1*test*gold*"]}

# Appendix C: task -> classes, reader, and the names of its files.
DATASETS = {
    "sst5": (5, partial(read_sst, classes=5), TREES),
    "sst2": (2, read_sst2, SST2),
    "yelp5": (5, partial(read_zhang, classes=5), ZHANG),
    "amazon5": (5, partial(read_zhang, classes=5), ZHANG),
    "amazon2": (2, partial(read_zhang, classes=2), ZHANG),
    "sentihood": (2, read_sentihood, SENTIHOOD),
    "semeval_restaurant": (3, read_semeval, RESTAURANTS),
    "semeval_laptop": (3, read_semeval, LAPTOPS),
}


# ------------------------------------------------------- The run: files of text, and of JSON lines

JSON_LINES = (".jsonl", ".json", ".ndjson", ".jl", ".jsonlines")


def unpacked_name(path):
    """A file's name without .gz or .xz."""
    return re.sub(r"\.(gz|xz)$", "", Path(path).name)


def is_plain(path):
    """Whether a file holds a text on each line, and not JSON, by its name. Raises InputError where
    it is neither."""
    suffix = Path(unpacked_name(path)).suffix.lower()
    if suffix != ".txt" and suffix not in JSON_LINES:
        raise InputError(
            f"{path}: neither JSON lines ({', '.join(JSON_LINES)}) nor a text on each line (.txt), "
            "by its name; write one of them, packed (.gz, .xz) or not"
        )
    return suffix == ".txt"


def open_packed(path):
    """A file for reading bytes; .gz and .xz are unpacked as they are read."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    return io.BufferedReader(opener(path, "rb"), 2**20)


def numbered_lines(path):
    """Yields (number, line) of a UTF-8 text file as open_packed reads it. Raises InputError with
    the file and the line."""
    number = 0
    place = lambda: f"{path}:{number}" if number else str(path)
    with input_errors(place, "give a whole file of UTF-8 text"):
        with open_packed(path) as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise ValueError("it holds a NUL byte")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def read_examples(path, task, labelled=True, blanks=False):
    """Yields the examples of a file of JSON lines, or of a text on each line of a .txt; .gz and .xz
    too. Every field of the task's template must be there and, where `labelled`, a label, an index
    into the task's words or one of them, of which the index is given. A blank line is passed over,
    or with `blanks` is None. Raises InputError with the file and the line."""
    plain = is_plain(path)
    form = json.dumps({**dict.fromkeys(task.fields, "..."), "label": 0})
    for number, line in numbered_lines(path):
        if not line.strip():
            if blanks:
                yield None
            continue

        with input_errors(f"{path}:{number}", f"write examples, as {form}"):
            example = {"text": line.strip()} if plain else json.loads(line)
            check_example(example, task)
            if labelled:
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
        if not isinstance(example.get(field), str):
            raise ValueError(f"it has no text {field!r}, which the template of {task.name} needs")
        if not example[field].strip():
            raise ValueError(f"{field!r} is empty")

    json.dumps(example, ensure_ascii=False).encode()  # it may spell half a character
    if type(example.get("cluster", 0)) is not int:
        raise ValueError(f"cluster {example['cluster']!r} is not a whole number")


def write_rows(file, rows):
    """Writes JSON lines to an open binary file."""
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def write_lines(path, rows):
    """Writes a file of JSON lines, packed where `path` ends in .gz: whole or not at all."""

    def write(file):
        if Path(path).suffix != ".gz":
            write_rows(file, rows)
            return
        with gzip.GzipFile(fileobj=file, mode="wb") as packed:
            write_rows(packed, rows)

    write_atomically(path, write)


@contextlib.contextmanager
def folder_beside(folder, last):
    """A new folder to fill, whose files move to `folder` at the end; on an error before that none
    does. The file `last` makes the others valid: it is not there while they move."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.is_dir() else folder.parent  # it may be a link to another disk
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as beside:
        yield Path(beside)
        folder.mkdir(exist_ok=True)
        (folder / last).unlink(missing_ok=True)
        for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == last):
            shutil.copymode(Path(beside, last), file)  # safetensors makes its own for one user
            os.replace(file, folder / file.name)


def write_task(folder, task, splits):
    """Writes task.json and a .jsonl file for each split: all of them, or on an error none."""
    with folder_beside(folder, last="task.json") as beside:
        for split, examples in splits.items():
            with open(beside / f"{split}.jsonl", "wb") as file:
                write_rows(file, examples)
        task.save(beside)


# ------------------------------------------------------------ The run: an official file as a task


def convert(name, source, out, test_share=0.0, **names):
    """Writes the task folder `out` from an official file of Appendix C, the folder of them or the
    archive of them, and prints what of each split was kept and what was dropped, and why. Where
    there is no test file, a share of the training examples can be drawn for it. train, validation
    and test name files that are not called as the official ones. Raises InputError."""
    source, out = Path(source), Path(out)
    with tempfile.TemporaryDirectory() as temporary:
        with input_errors(source, f"give the official file of {name}"):
            place = unpack(source, Path(temporary))
        try:
            files = find_files(place, DATASETS[name][2], names)
            splits, counts = write_converted(name, files, out, test_share)
        except InputError as error:  # a file of an archive has a name of its own
            raise InputError(str(error).replace(str(place), str(source))) from error

    words = WORDS[DATASETS[name][0]]
    empty = [word for i, word in enumerate(words) if not counts["train"][i]]
    if empty:
        print(f"warning: no training example is {' or '.join(empty)}: is this the file of {name}?")
    for split, file in files.items():
        labelled = [f"{counts[split].pop(i, 0):,} {word}" for i, word in enumerate(words)]
        file = str(file).replace(str(place), str(source))
        print(f"{file}: for {split} kept {', '.join(labelled)}; dropped {dropped(counts[split])}")

    print(f"wrote {out}: task.json and {', '.join(f'{split}.jsonl' for split in splits)}")
    if "test" not in splits:
        print(
            "no test file was there, and finetune.py needs one: give the folder of all files, name "
            "it with --test, or draw three in ten training examples for it with --test-share 0.3"
        )


def unpack(source, folder):
    """Unpacks an archive to `folder`, which is returned; any other source stays what it is."""
    if source.is_dir():
        return source
    if zipfile.is_zipfile(source):
        shutil.unpack_archive(source, folder, "zip")
    elif tarfile.is_tarfile(source):
        shutil.unpack_archive(source, folder, "tar", filter="data")
    else:
        return source
    return folder


def find_files(source, official, names):
    """The file of each split in a folder: the one that `names` says, else the first that is called
    as the official one. A single file of another name is the training split. Raises InputError
    where there is no training file."""
    folder = source if source.is_dir() else source.parent
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    # macOS adds files to an archive that begin with "._".
    files = [file for file in files if file.is_file() and not file.name.startswith("._")]

    split_files = {}
    for split in ("train", "validation", "test"):
        if names.get(split):
            split_files[split] = folder / names[split]
            continue
        for pattern in official.get(split, []):
            for file in files:
                if fnmatch.fnmatchcase(unpacked_name(file).lower(), pattern):
                    split_files.setdefault(split, file)

    if not split_files and files == [source]:
        split_files["train"] = source
    if "train" not in split_files:
        raise InputError(
            f"{source}: no training file here; looked for {' or '.join(official['train'])}; give "
            "the official file or folder, or name its training file with --train"
        )
    return split_files


def write_converted(name, files, out, test_share):
    """Writes the task from each split's official file; returns the names of the splits, and of each
    file the counts of labels and of reasons to drop a text. Raises InputError, and then has written
    nothing."""
    classes, reader, _ = DATASETS[name]
    counts = {split: collections.Counter() for split in files}

    def examples(split):
        counts[split].clear()
        lines = tqdm(reader(files[split]), f"{name} {split}", unit=" lines", disable=None)
        for text, label in lines:
            if type(label) is int and not text:
                label = "empty text"
            counts[split][label] += 1
            if type(label) is int:
                yield {"text": text, "label": label}

        if not any(type(label) is int for label in counts[split]):
            raise InputError(
                f"{files[split]}: no labelled text for {split} here, but {dropped(counts[split])}; "
                f"give the official file of {name}"
            )

    splits = {split: examples(split) for split in files}
    if test_share and "test" not in splits:
        # Always the same share, drawn once the number of examples is known.
        count = sum(1 for _ in examples("train"))
        test = np.random.default_rng(0).permutation(count) < round(test_share * count)
        splits["train"] = itertools.compress(examples("train"), ~test)
        splits["test"] = itertools.compress(examples("train"), test)
        print(f"no test file: {test.sum():,} of the training examples are drawn for a test split")

    write_task(out, Task(name, TEMPLATE, WORDS[classes]), splits)
    for split in {"train", "validation", "test"} - set(splits):  # of an earlier conversion
        (out / f"{split}.jsonl").unlink(missing_ok=True)
    return list(splits), counts


def dropped(counts):
    """The counts of what was dropped and why, as text."""
    return ", ".join(f"{count:,} ({reason})" for reason, count in counts.items()) or "none"


# ------------------------------------------------------------------- The run: training a labeller


def train_labeller(args):
    """Trains the labeller of Section 5.1 and writes the best by accuracy on the validation
    examples, with its tokenizer and the task, to args.out. Raises InputError."""
    out = Path(args.out)
    task = Task.load(args.task)
    training, validation = read_splits(Path(args.task), task, args.validation, args.seed)
    if (out / "config.json").exists() and not args.restart:
        hint = "give another --out, or --restart to replace it"
        raise InputError(f"{out}: a labeller stands there already; {hint}")

    torch.manual_seed(args.seed)  # of the classifier's new layer too
    # A checkpoint may be in half precision, in which AdamW's small steps are lost.
    settings = {"num_labels": len(task.words), "dtype": torch.float32}
    model, tokenizer = load_classifier(args.model, args.device, is_base=True, **settings)
    tokenize = in_batches(model, tokenizer, args.max_length)
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
                save_model(out, model, tokenizer, task, log)
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
    a base, may lack its head. Reads safetensors only. Raises InputError."""
    with input_errors(name, "give a sequence classifier by hub name or folder"):
        arguments |= {"use_safetensors": True, "output_loading_info": True}
        arguments["ignore_mismatched_sizes"] = is_base
        model, loading = AutoModelForSequenceClassification.from_pretrained(name, **arguments)
        body = f"{model.base_model_prefix}."
        # What pools a base's states is trained with its head.
        is_head = lambda key: is_base and (not key.startswith(body) or "pooler" in key)
        check_complete(loading, is_head)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(device).eval(), tokenizer


def in_batches(model, tokenizer, max_length):
    """texts -> one batch of tensors, cut at max_length tokens. Raises InputError where the
    classifier takes fewer."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    most = min(tokenizer.model_max_length, positions)
    if max_length > most:
        takes = f"{tokenizer.name_or_path} takes {most} tokens"
        raise InputError(f"{takes}; lower --max-length {max_length}")
    cut = {"truncation": True, "max_length": max_length, "padding": True}
    return partial(tokenizer, return_tensors="pt", **cut)


def save_model(out, model, tokenizer, task=None, log=()):
    """Writes a model, its tokenizer, its log and, where one is given, its task: all or nothing."""
    with folder_beside(out, last="config.json") as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if log:
            write_lines(beside / "log.jsonl", log)
        if task:
            task.save(beside)


# ------------------------------------------------------------------- The run: labelling a corpus


def read_corpus(paths, share=1.0):
    """Yields the sentences of a random `share` of the documents in corpora: files of a text on each
    line or of JSON lines, or tars of .txt files, in further tars or not, as OpenWebText is. None
    stands for no text. Raises InputError."""
    rng = random.Random(0)
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        if rng.random() >= share:
            continue
        if document is None:
            yield None
        else:
            yield from sentences_of(document)


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
            if not member.isfile() or member.issparse():
                continue
            name = Path(member.name).name
            if name.endswith(".txt"):
                yield text_in(tar.extractfile(member).read(), plain=True)
            # OpenWebText's own are called urlsf_subset00-1_data.xz.
            elif re.search(r"\.(tar|tgz|tar\.\w+)$|^[^.]+\.[gx]z$", name):
                yield from read_tar(tar.extractfile(member))
            else:
                yield None


def text_in(content, plain):
    """The text in a line or a document of a corpus; None where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = content.decode("utf-8-sig")
        if not plain:
            value = json.loads(value)
            value = value.get("text") if isinstance(value, dict) else None
        if isinstance(value, str) and value.strip() and "\0" not in value:
            value.encode()  # JSON may spell half a character
            return value


BLOCK = 2048  # texts of the corpus that are labelled, and kept in a file, together


def pseudo_label(args):
    """Section 4.1: labels a corpus and balances what the labeller is sure of. Every block of the
    corpus that is labelled is a file, so that the same command continues, with other processes
    too; --confidence and --per-class can be changed without labelling again."""
    rank, world = script.rank_and_world()
    out = Path(args.out)
    blocks = out / "blocks"
    task = Task.load(args.labeller)
    if len(task.fields) != 1 or len(args.confidence) not in (1, len(task.words)):
        message = f"--confidence takes 1 or {len(task.words)} values; a template, one field"
        raise InputError(f"{args.labeller}: {message}")

    with script.only_writer(out) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            prepare_blocks(blocks, args)
        wait_for_all(world)

        complete = blocks / "complete.json"  # so that balancing again need not read the corpus
        if complete.exists():
            counts = read_json(complete)
        else:
            counts = label_corpus(blocks, task.fields[0], args)
        wait_for_all(world)
        if rank == 0:
            write_json(complete, counts)
            write_source(out, task, args, counts)


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
    begun = settings.exists() and any(folder.glob("*.jsonl.gz"))
    if begun and not args.restart:
        script.check_same(folder, read_json(settings), made_of)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(settings, made_of)


def wait_for_all(world):
    """Returns once every process has come to this line."""
    if world == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    torch.distributed.barrier()


def label_corpus(folder, field, args):
    """Labels those blocks of the corpus that have no file yet; each process those of its number.
    Returns how many texts were read, and not labelled for which reason."""
    rank, world = script.rank_and_world()
    corpus = read_corpus(args.corpus, args.share)
    labeller = None  # it is loaded once there is something to label
    counts = dict.fromkeys(("read", "not text", "too short", "too long"), 0)
    bar = tqdm(desc="pseudo-label", unit=" texts", disable=None)
    with script.stop_signal() as stop, bar:
        for number in itertools.count():
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

            path = folder / f"{number:06}.jsonl.gz"
            if number % world == rank and not path.exists():
                labeller = labeller or load_labeller(args)
                rows = []
                for text, label, confidence in zip(fitting, *labeller(fitting)) if fitting else ():
                    rows.append({field: text, "label": label, "confidence": round(confidence, 4)})
                write_lines(path, rows)
            bar.update(len(texts))
            if stop:
                message = f"stopped after {counts['read']:,} texts and saved"
                raise KeyboardInterrupt(f"{message}; {script.CONTINUES}")


def load_labeller(args):
    """texts -> labels and confidences, by the labeller in a folder. Raises InputError."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model, tokenizer = load_classifier(args.labeller, args.device, dtype=dtype)
    tokenize = in_batches(model, tokenizer, args.max_length)
    return lambda texts: classify(model, tokenize, texts, args.batch_size)


def read_blocks(folder, task):
    """Yields the examples of the blocks that are labelled. Raises InputError."""
    for path in sorted(folder.glob("*.jsonl.gz")):
        yield from read_examples(path, task)


def write_source(out, task, args, counts):
    """Balances what was labelled, and writes examples.jsonl, task.json and funnel.json to `out`.
    Holds some 100 bytes for each text that was labelled. Raises InputError where a class is empty.
    """
    labels, confidences, hashes = array.array("B"), array.array("d"), array.array("Q")
    for example in read_blocks(out / "blocks", task):
        labels.append(example["label"])
        confidences.append(example["confidence"])
        hashes.append(int(digest(text_of(example, task).lower().encode()), 16))

    labels = np.array(labels, dtype=np.int64)
    least = args.confidence if len(args.confidence) > 1 else args.confidence * len(task.words)
    columns = (labels, np.array(confidences), np.array(hashes))
    keep, sizes, funnel = balance(*columns, least, args.per_class, args.seed)
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
    add("--input", required=True, help="its official file, or all files as a folder or an archive")
    add("--out", required=True, metavar="FOLDER", help="the task folder to write")
    for split in ("train", "validation", "test"):
        add(f"--{split}", metavar="FILE", help="its file in --input, where that has another name")
    share = "share of train to test on, if no test file is there"
    add("--test-share", type=number(0.0, 0.9), default=0.0, help=share)


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
    about = "Labels the sentences of a corpus, which English rules tell apart, and balances them."
    command = commands.add_parser("pseudo-label", help="a corpus as source data", description=about)
    add_pseudo_label(command)
    args = parser.parse(argv)
    if args.command == "convert":
        names = {"train": args.train, "validation": args.validation, "test": args.test}
        convert(args.dataset, args.input, args.out, args.test_share, **names)
        return

    script.set_machine(args)
    if args.command == "labeller":
        with script.only_writer(args.out):
            train_labeller(args)
    else:
        pseudo_label(args)


if __name__ == "__main__":
    script.run(main)
