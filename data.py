"""
Source data and downstream tasks (Sections 4.1 and 5.1, Appendix C): official files in, JSON lines
out. From top to bottom:

    Examples              JSON lines, task folders, the few-shot split of Section 5.1
    Readers               one for each dataset of Appendix C
    Pseudo-labels         Section 4.1: a labeller, a corpus, what is kept of it
    The command line      what every script shares; then this one's own

    python data.py convert yelp5 --input yelp_review_full_csv.tgz --out tasks/yelp5   # or another
    python data.py labeller --task tasks/yelp5 --out labeller           # RoBERTa, for pseudo-labels
    python data.py pseudo-label --labeller labeller --corpus openwebtext.tar.xz --out source

A task is a folder: task.json (the template and the words), train.jsonl, test.jsonl and, where the
dataset has one, validation.jsonl. A line is an example, {"text": "...", "label": 0}, the label an
index into the words.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    HELP = not {"-h", "--help"}.isdisjoint(sys.argv)

import argparse
import array
import collections
import contextlib
import csv
import datetime
import fnmatch
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Our scripts say at their top whether they are asked for --help, which needs no PyTorch: its import
# takes seconds. Another program that imports this file says nothing.
HELP = getattr(sys.modules["__main__"], "HELP", None)
if isinstance(HELP, bool):
    # Large pages, which PyTorch asks for where this is set, take a twentieth off a step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A folder beside the scripts, as --out peft/mine makes one, is an empty package to Python, and
    # would be taken for the library of its name where that is not installed.
    for beside in Path(__file__).parent.iterdir():
        spec = importlib.util.find_spec(beside.name) if beside.name.isidentifier() else None
        if spec and spec.origin is None:
            sys.modules[beside.name] = None

HELP = HELP is True
if not HELP:
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from metapt import InputError, Task, best_of, blame, check_complete, first_line
    from metapt import linear_schedule, parse_json, read_json, write_beside, write_json

MODEL = "google-t5/t5-base"  # Section 5.1
MAX_LENGTH = 256  # tokens of H(x); the paper names none
TEMPLATE = "{text}. It was {mask}"  # the paper's, Section 3
WORDS = {
    5: ["terrible", "bad", "okay", "good", "great"],
    3: ["bad", "okay", "good"],
    2: ["bad", "good"],
}
# What the packers of the standard library raise beside OSError, EOFError and ValueError.
BROKEN = (zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError)


# -------------------------------------------------------------------------- Examples as JSON lines


def open_packed(path):
    """A file for reading bytes; .gz and .xz are unpacked as they are read. A path may lead into a
    .zip or a tar, packed or not, as SST-2.zip/SST-2/train.tsv does."""
    path = Path(path)
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is None:
        file = open(path, "rb")
    elif zipfile.is_zipfile(archive):
        file = zipfile.ZipFile(archive).open(path.relative_to(archive).as_posix())
    else:
        tar = tarfile.open(archive, "r|*")  # read once, from front to back
        members = (member for member in tar if member.isfile() and archive / member.name == path)
        member = next(members, None)
        if member is None:
            raise FileNotFoundError(f"{archive} holds no file of that name")
        file = tar.extractfile(member)

    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    return io.BufferedReader(unpack(file, "rb") if unpack else file, 2**20)


def numbered_lines(path):
    """Yields (number, line) of a UTF-8 text file as open_packed reads it. Raises InputError with
    the file and the line."""
    number = 0
    with blame(path, "check the path", *BROKEN):
        file = open_packed(path)

    with file, blame(lambda: f"{path}:{number}", "give a whole file of UTF-8 text", *BROKEN):
        lines = iter(file)
        while True:
            number += 1
            line = next(lines, None)
            if line is None:
                return
            if b"\0" in line:
                raise ValueError("it holds a NUL byte")
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def read_examples(path, task, labelled=True):
    """Yields the examples of a .jsonl file, or of any other with a text on each line; .gz and .xz
    too. Every field of the task's template must be there and, where `labelled`, a label that is an
    index into its words. Raises InputError with the file and the line."""
    plain = is_plain(path)
    form = json.dumps({**dict.fromkeys(task.fields, "..."), "label": 0})
    number = 0
    with blame(lambda: f"{path}:{number}", f"write examples, as {form}"):
        for number, line in numbered_lines(path):
            if not line.strip():
                continue
            example = {"text": line.strip()} if plain else parse_json(line)
            check_example(example, task, labelled)
            yield example


def is_plain(path):
    """Whether a file holds a text on each line, and not JSON. Raises InputError for a table."""
    kind = Path(unpacked_name(path)).suffix.lower()
    if kind in (".csv", ".tsv"):
        mend = "write JSON lines, or a text on each line of a .txt"
        raise InputError(f"{path}: it is a table, whose columns we do not know; {mend}")
    return kind not in (".jsonl", ".json")


def unpacked_name(path):
    """A file's name without .gz or .xz."""
    return re.sub(r"\.(gz|xz)$", "", Path(path).name)


def text_of(example, task):
    """All text of an example: its fields in the template's order."""
    return " ".join(example[field] for field in task.fields)


def check_example(example, task, labelled=True):
    """Raises ValueError where a value is no example of `task`."""
    if not isinstance(example, dict):
        raise ValueError("not a JSON object")

    for field in task.fields:
        if not isinstance(example.get(field), str):
            raise ValueError(f"it has no text {field!r}, which the template of {task.name} needs")
        if not example[field].strip():
            raise ValueError(f"{field!r} is empty")

    label = example.get("label")
    if labelled and (type(label) is not int or not 0 <= label < len(task.words)):
        last = len(task.words) - 1
        words = f"the indices of task.json's words {task.words}"
        raise ValueError(f"label {label!r} is not one of 0 to {last}, {words}")

    confidence = example.get("confidence", 1)
    if type(confidence) not in (int, float) or not 0 <= confidence <= 1:
        raise ValueError(f"confidence {confidence!r} is not a number from 0 to 1")
    if type(example.get("cluster", 0)) is not int:
        raise ValueError(f"cluster {example['cluster']!r} is not a whole number")


def write_lines(path, rows):
    """Writes JSON lines, packed where `path` ends in .gz, beside it first and then renamed."""
    opener = gzip.open if Path(path).suffix == ".gz" else open

    def write(beside):
        with opener(beside, "wt", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    write_beside(path, write)


def write_task(folder, task, splits):
    """Writes task.json and a .jsonl file for each split: all of them, or on an error none."""
    with folder_beside(folder) as beside:
        for split, examples in splits.items():
            write_lines(beside / f"{split}.jsonl", examples)
        task.save(beside)


@contextlib.contextmanager
def folder_beside(folder):
    """A new folder to fill, whose files move to `folder` at the end; on an error before that none
    does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.is_dir() else folder.parent  # it may be a link to another disk
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as beside:
        yield Path(beside)
        folder.mkdir(exist_ok=True)
        for file in Path(beside).iterdir():
            os.replace(file, folder / file.name)


def few_shot(labels, shots, seed, validation_shots=None, balanced=False):
    """Section 5.1's split, as row numbers: `shots` examples to train on and validation_shots others
    (default: as many) to validate on, drawn at random with `seed` from a training split whose
    labels are given; `balanced` draws equally from every class. Raises InputError."""
    validation_shots = shots if validation_shots is None else validation_shots
    if shots + validation_shots > len(labels):
        raise InputError(
            f"{shots} + {validation_shots} examples to train and to validate on cannot be drawn from "
            f"{len(labels)}; lower --shots"
        )

    order = np.random.default_rng(seed).permutation(len(labels))
    if balanced:  # every class's first example, then every class's second, ...
        turn = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            members = np.flatnonzero(np.asarray(labels)[order] == label)
            turn[members] = np.arange(len(members))
        order = order[np.argsort(turn, kind="stable")]

    drawn = order[: shots + validation_shots].tolist()
    return drawn[:shots], drawn[shots:]


# ------------------------------------- Readers: official files in, (text, label or why dropped) out


def read_sst(path, classes):
    """Stanford Sentiment Treebank, one bracketed tree a line; the root's digit is the grade. With
    2 classes the neutral sentences are dropped."""
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
        right = (text, label) == ("sentence", "label") if number == 1 else label in ("0", "1")
        if not right:
            problem = "not GLUE's sentence, tab, label; give its train.tsv and dev.tsv"
            raise InputError(f"{path}:{number}: {problem}")
        if number > 1:
            yield text.strip(), int(label)


def read_zhang(path, classes):
    """Yelp and Amazon reviews of Zhang et al. (2015): the class from 1, then the text, or a title
    and the text. Quotes are doubled, as in any CSV, and have a backslash before them too; a
    backslash and an n are a new line."""
    rows = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    labels = {str(label + 1): label for label in range(classes)}
    with blame(lambda: f"{path}:{rows.line_num}", "give the official CSV file", csv.Error):
        for row in rows:
            if not row:
                continue
            if len(row) not in (2, 3) or row[0] not in labels:
                raise ValueError(f"not a class from 1 to {classes} and one or two texts")
            texts = [text.replace('\\"', '"').replace("\\n", "\n").strip() for text in row[1:]]
            yield " ".join(filter(None, texts)), labels[row[0]]


def read_sentihood(path):
    """SentiHood: a JSON array of sentences with opinions on aspects. A sentence is kept where they
    all agree."""
    form = "[{text, opinions: [{sentiment}]}]"
    with blame(path, f"give the array of SentiHood, {form}", TypeError, AttributeError, *BROKEN):
        for item in parse_json(open_packed(path).read().decode("utf-8-sig")):
            opinions = [opinion["sentiment"] for opinion in item["opinions"]]
            yield item["text"].strip(), agreed(opinions, {"Negative": 0, "Positive": 1})


def read_semeval(path):
    """SemEval-2016 task 5, subtask 1: XML with opinions in each sentence. 2015's has that form too,
    2014's has them as aspect terms. A sentence is kept where they all agree."""
    with blame(path, "give the XML of SemEval-2016 task 5", ElementTree.ParseError, *BROKEN):
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
    """The label of a sentence whose opinions are all the same; otherwise why it is dropped."""
    if not opinions:
        return "no opinion"
    if len(set(opinions)) > 1 or "conflict" in opinions:  # as 2014 calls mixed ones
        return "mixed opinions"
    return labels.get(opinions[0], f"unknown opinion {opinions[0]!r}")


# Appendix C: task -> classes, reader, and how the file of each split may be called, whatever its
# case: the best first, and of several that fit the first that has labels. Some tests are published
# without. Of SemEval's files SB1 has a sentence's opinions, SB2 a whole review's, and there are
# other languages than English.
TREES = {"train": ["train.txt"], "validation": ["dev.txt"], "test": ["test.txt"]}
GLUE = {
    "train": ["train.txt", "train.tsv"],
    "test": ["test.txt", "test.tsv", "dev.tsv"],
    "validation": ["dev.txt", "dev.tsv"],
}
ZHANG = {"train": ["train.csv"], "test": ["test.csv"]}
SENTIHOOD = {"train": ["*train*.json"], "validation": ["*dev*.json"], "test": ["*test*.json"]}
RESTAURANTS = {
    "train": ["*rest*train*sb1*", "*rest*train*.xml"],
    "test": ["en_rest_sb1*test*", "*rest*sb1*test*", "*rest*test*"],
}
LAPTOPS = {
    "train": ["*lap*train*sb1*", "*lap*train*.xml"],
    "test": ["en_lap*sb1*test*", "*lap*sb1*test*", "*lap*test*"],
}
DATASETS = {
    "sst5": (5, partial(read_sst, classes=5), TREES),
    "sst2": (2, read_sst2, GLUE),
    "yelp5": (5, partial(read_zhang, classes=5), ZHANG),
    "amazon5": (5, partial(read_zhang, classes=5), ZHANG),
    "amazon2": (2, partial(read_zhang, classes=2), ZHANG),
    "sentihood": (2, read_sentihood, SENTIHOOD),
    "semeval_restaurant": (3, read_semeval, RESTAURANTS),
    "semeval_laptop": (3, read_semeval, LAPTOPS),
}


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run: its files


def find_splits(source, reader, patterns):
    """The file of each split in a folder, a .zip or a tar, and the files that are none; a file of
    another name is the training split. Raises InputError."""
    with blame(source, "give the official file again", *BROKEN):
        if source.is_dir():
            files = [file for file in source.rglob("*") if file.is_file()]
        elif zipfile.is_zipfile(source):
            names = zipfile.ZipFile(source).namelist()
            files = [source / name for name in names if not name.endswith("/")]
        elif tarfile.is_tarfile(source):
            files = [source / member.name for member in tarfile.open(source) if member.isfile()]
        else:
            files = [source]

    # An absolute name in an archive would lead out of it; "._" begins what macOS adds to one.
    files = [file for file in sorted(files) if source in (file, *file.parents)]
    files = [file for file in files if not file.name.startswith("._")]

    found = {}
    for split, names in patterns.items():
        fitting = {}
        for name in names:
            like = lambda file: fnmatch.fnmatchcase(unpacked_name(file).lower(), name)
            fitting |= dict.fromkeys(filter(like, files))
        fitting = [file for file in fitting if file not in found.values()]
        labelled = [file for file in fitting if len(files) == 1 or has_labels(reader, file)]
        if labelled or fitting and split == "train":  # whose reader says what is wrong with it
            found[split] = [*labelled, *fitting][0]

    if not found and files == [source]:
        return {"train": source}, []
    if "train" not in found:
        looked_for = " or ".join(patterns["train"])
        raise InputError(f"{source}: no training file here; looked for {looked_for}")
    return found, [file for file in files if file not in found.values()]


def has_labels(reader, path):
    """Whether a dataset's file, as far as its reader understands it, has a labelled text."""
    with contextlib.suppress(InputError):
        return any(type(label) is int for _, label in reader(path))
    return False


def convert(name, source, out, test_share=0.0):
    """Writes the task folder `out` from an official file of Appendix C, the folder of them or the
    archive of them, and prints what of each split was kept and what was dropped, and why. Where
    there is no test file, a share of the training examples can be drawn for it."""
    classes, reader, patterns = DATASETS[name]
    source, out = Path(source), Path(out)
    files, unused = find_splits(source, reader, patterns)
    counts = {split: collections.Counter() for split in files}  # of labels, of reasons to drop

    def examples(split):
        counts[split].clear()
        lines = tqdm(reader(files[split]), f"{name} {split}", unit=" lines", disable=None)
        for text, label in lines:
            kept = type(label) is int
            if kept and not text:
                kept, label = False, "empty text"
            counts[split][label] += 1
            if kept:
                yield {"text": text, "label": label}

        if not any(type(label) is int for label in counts[split]):
            raise InputError(
                f"{files[split]}: no labelled text for {split} here, but {dropped(counts[split])}; "
                f"give the official {name}"
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

    print_counts(name, files, counts, WORDS[classes])
    if unused:
        names = ", ".join(str(file.relative_to(source)) for file in unused)
        print(f"not used, by their names or for want of labels: {names}")
    print(f"wrote {out}: task.json and {', '.join(f'{split}.jsonl' for split in splits)}")
    if "test" not in splits:
        print(
            "no test file was there, and finetune.py needs one: give the folder of all files, or "
            "--test-share 0.3 to draw three in ten training examples for it"
        )


def print_counts(name, files, counts, words):
    """Prints what of each split was kept of which class, what was dropped and why."""
    empty = [word for i, word in enumerate(words) if not counts["train"][i]]
    if empty:
        print(f"warning: no training example is {' or '.join(empty)}: is this the file of {name}?")

    for split, path in files.items():
        kept = [f"{counts[split].pop(i, 0):,} {word}" for i, word in enumerate(words)]
        print(f"{path}: for {split} kept {', '.join(kept)}; dropped {dropped(counts[split])}")


def dropped(counts):
    """The counts of what was dropped and why, as text."""
    return ", ".join(f"{count:,} ({why})" for why, count in counts.items()) or "none"


# ------------------------------------------- Pseudo-labels (Section 4.1): a labeller, then a corpus


def train_classifier(model, tokenize, examples, total, learning_rate, warmup, batch_size):
    """The labeller of Section 5.1: fine-tunes a sequence classifier on (text, label) pairs for
    `total` steps. Yields the number of steps made, after each of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    device, order = model.device, iter(())
    for step in range(total):
        rows = next(order, None)
        if rows is None:  # a new epoch
            order = iter(torch.randperm(len(examples)).split(batch_size))
            rows = next(order)
        texts, labels = zip(*(examples[i] for i in rows))
        optimizer.param_groups[0]["lr"] = learning_rate * linear_schedule(step, total, warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model.train()(**tokenize(texts).to(device)).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def log_probabilities(model, tokenize, texts, batch_size):
    """A classifier's log-probabilities of texts, [N, classes] float32 on the CPU. Texts of about
    one length share a batch, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    logits = []
    for start in range(0, len(texts), batch_size):
        batch = tokenize([texts[i] for i in order[start : start + batch_size]])
        with torch.no_grad():
            logits.append(model(**batch.to(model.device)).logits.float().cpu())
    return torch.cat(logits).log_softmax(-1)[np.argsort(order)]


def classify(model, tokenize, texts, batch_size):
    """Section 4.1's pseudo-labels: each text's most probable label and its confidence, that
    label's probability: two lists."""
    confidences, labels = log_probabilities(model, tokenize, texts, batch_size).exp().max(-1)
    return labels.tolist(), confidences.tolist()


def fate(text, min_words, max_words):
    """Why a text of a corpus (None stands for no text) is not labelled; None where it is."""
    if text is None:
        return "not text"
    words = text.count(" ") + 1
    if words < min_words:
        return "too short"
    return "too long" if words > max_words else None


def balance(labels, confidences, hashes, least, per_class=None, seed=1):
    """Section 5.1's "high confidence" and "balancing", over N pseudo-labelled texts: which are kept
    [N] bool, and what became of the others. Kept is what the labeller is sure of (least[label]
    or more), no text twice (by its hash), and as many of every class, drawn at random, as the
    smallest has or per_class says."""
    sure = np.flatnonzero(confidences >= np.asarray(least)[labels])
    first = sure[np.unique(hashes[sure], return_index=True)[1]]
    sizes = np.bincount(labels[first], minlength=len(least))
    count = min(sizes.min(), per_class or sizes.min())
    kept = np.zeros(len(labels), dtype=bool)
    for label in range(len(least)):
        members = np.sort(first[labels[first] == label])
        kept[np.random.default_rng(seed).permutation(members)[:count]] = True

    funnel = {
        "unsure": len(labels) - len(sure),
        "duplicate": len(sure) - len(first),
        "dropped by balancing": len(first) - int(kept.sum()),
        "kept": int(kept.sum()),
    }
    return kept, sizes, funnel


# A sentence ends with its line, or before a capital, but not in "Mr. A. B. Smith".
END = r"""(?:(?<=[.!?])|(?<=[.!?]["”')]))"""
ABBREVIATED = r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr)\.)(?<!\bMrs\.)"
BETWEEN_SENTENCES = rf"""\n|{END}{ABBREVIATED}\s+(?=["“'(]?[A-Z0-9])"""


def read_corpus(paths, share=1.0):
    """Yields the sentences of a random `share` of the documents in corpora: .txt and .jsonl files,
    or tars of .txt files, in further tars or not, as OpenWebText is. None stands for no text.
    Raises InputError."""
    rng = random.Random(0)
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        if rng.random() >= share:
            continue
        if document is None:
            yield None
            continue
        for text in re.split(BETWEEN_SENTENCES, document):
            if text.strip():
                yield " ".join(text.split())


def read_documents(path):
    """Yields the documents of one corpus file; None stands for no text, an empty document, say, or
    one that is no UTF-8. Raises InputError where the file is broken or has no text at all."""
    # A TypeError comes from tarfile, where a gzip header is cut off.
    with blame(path, "give the whole file", TypeError, *BROKEN):
        some = False
        if tarfile.is_tarfile(path):
            with open(path, "rb") as file:
                for document in read_tar(file):
                    some = some or document is not None
                    yield document
        else:
            plain = is_plain(path)
            with open_packed(path) as file:
                for line in file:
                    document = text_in(line, plain)
                    some = some or document is not None
                    yield document

        if not some:
            raise ValueError("nothing in it is text, or an object with one as its 'text'")


def text_in(content, plain):
    """The text in a line or a document of a corpus; None where there is none."""
    with contextlib.suppress(ValueError):
        value = content.decode("utf-8-sig")
        if not plain:
            value = parse_json(value)
            value = value.get("text") if isinstance(value, dict) else None
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value


def read_tar(file):
    """Yields the documents of a tar, and of the tars in it, from front to back; nothing is unpacked
    to disk."""
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            tar.members.clear()  # where every header would be kept
            if not member.isfile() or member.issparse():
                continue
            if member.name.endswith((".xz", ".gz", ".tar", ".tgz")):
                yield from read_tar(tar.extractfile(member))
            elif not member.name.endswith(".txt"):
                yield None
            else:
                yield text_in(tar.extractfile(member).read(), plain=True)


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run: files, continuing, processes

BLOCK = 2048  # texts of the corpus that are labelled, and kept in a file, together


def load_classifier(name, device, is_base=False, **arguments):
    """A sequence classifier by hub name or folder, and its tokenizer; one that is to be trained,
    a base, may lack its head. Reads safetensors only. Raises InputError."""
    with blame(name, "give a sequence classifier by hub name or folder", Exception):
        arguments |= {"use_safetensors": True, "output_loading_info": True}
        arguments["ignore_mismatched_sizes"] = is_base
        model, found = AutoModelForSequenceClassification.from_pretrained(name, **arguments)
        body = f"{model.base_model_prefix}."
        # What pools a base's states is trained with its head.
        is_head = lambda key: is_base and (not key.startswith(body) or "pooler" in key)
        check_complete(found, is_head)
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


def read_splits(folder, task, count, seed):
    """The examples of train.jsonl and those of validation.jsonl, or where there is none `count` of
    the first for the second. Raises InputError where one is empty."""
    training, path = list(read_examples(folder / "train.jsonl", task)), folder / "validation.jsonl"
    if path.exists():
        validation = list(read_examples(path, task))
    else:
        np.random.default_rng(seed).shuffle(training)
        training, validation = training[count:], training[:count]

    if not training or not validation:
        raise InputError(f"{folder}: nothing to train or to validate on; change --validation")
    return training, validation


def save_model(out, model, tokenizer, task=None):
    """Writes a model, its tokenizer and, where one is given, its task: all of it or nothing."""
    with folder_beside(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if task:
            task.save(beside)


def train_labeller(args):
    """Trains the labeller and writes the best by accuracy on the validation examples, with its
    tokenizer and the task, to args.out."""
    out, task = Path(args.out), Task.load(args.task)
    training, validation = read_splits(Path(args.task), task, args.validation, args.seed)
    if (out / "log.jsonl").exists() and not args.restart:
        mend = "give another --out, or --restart to replace it"
        raise InputError(f"{out}: a labeller stands there already; {mend}")
    out.mkdir(parents=True, exist_ok=True)  # an error here comes before the work

    torch.manual_seed(args.seed)  # of the classifier's new layer too
    # A checkpoint may be in half precision, in which AdamW's small steps are lost.
    how = {"num_labels": len(task.words), "dtype": torch.float32}
    model, tokenizer = load_classifier(args.model, args.device, is_base=True, **how)
    tokenize = in_batches(model, tokenizer, args.max_length)
    pairs = [(text_of(example, task), example["label"]) for example in training]
    texts = [text_of(example, task) for example in validation]
    labels = torch.tensor([example["label"] for example in validation])
    total = args.max_epochs * math.ceil(len(pairs) / args.batch_size)
    how = args.learning_rate, args.warmup, args.batch_size

    log = []
    with stop_signal() as stop, tqdm(total=total, desc="labeller", disable=None) as bar:
        for step in train_classifier(model, tokenize, pairs, total, *how):
            bar.update()
            if not (stop or step % args.eval_every == 0 or step == total):
                continue

            found = log_probabilities(model.eval(), tokenize, texts, 2 * args.batch_size)
            accuracy = (found.argmax(-1) == labels).float().mean().item()
            loss = torch.nn.functional.nll_loss(found, labels).item()
            log.append({"step": step, "accuracy": accuracy, "loss": loss})
            if best_of(log) == len(log) - 1:
                save_model(out, model, tokenizer, task)

            write_lines(out / "log.jsonl", log)
            save_arguments(out / "arguments.json", args)
            bar.set_postfix(accuracy=f"{accuracy:.3f}")
            if stop:
                message = f"stopped at step {step:,}; {out} holds the best so far"
                raise KeyboardInterrupt(f"{message}; --model {out}, with another --out, goes on")

    best, largest = log[best_of(log)], labels.bincount().max() / len(labels)
    print(
        f"wrote {out}: the labeller of step {best['step']:,} of {step:,}, validation accuracy "
        f"{best['accuracy']:.1%} on {len(labels):,} examples (the largest class: {largest:.1%})"
    )


def pseudo_label(args):
    """Section 4.1: labels a corpus and balances what the labeller is sure of. Every block of the
    corpus that is labelled is a file, so that the same command continues, with other processes
    too; --confidence and --per-class can be changed without labelling again."""
    rank, world = rank_and_world()
    out, task = Path(args.out), Task.load(args.labeller)
    if len(task.fields) != 1 or len(args.confidence) not in (1, len(task.words)):
        message = f"--confidence takes 1 or {len(task.words)} values; a template, one field"
        raise InputError(f"{args.labeller}: {message}")

    blocks = out / "blocks"
    if args.restart and rank == 0:
        shutil.rmtree(blocks, ignore_errors=True)

    # What decides about a label, and so has to be as it was when the first block was labelled.
    names = ("labeller", "share", "min_words", "max_words", "max_length")
    facts = {name: getattr(args, name) for name in names} | {"block": BLOCK}
    facts["corpus"] = [[file, os.stat(file).st_size] for file in args.corpus]
    facts["weights"] = digest(*sorted(Path(args.labeller).glob("*.safetensors")))
    if (blocks / "settings.json").exists():
        check_same(blocks, read_json(blocks / "settings.json", BEGIN_ANEW), facts)
    blocks.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(blocks / "settings.json", facts)

    wait_for_all(world)
    complete = blocks / "complete.json"  # so that balancing again need not read the corpus again
    counts = read_json(complete, "remove it") if complete.exists() else {}
    if not counts or any(type(count) is not int for count in counts.values()):
        counts = label_corpus(blocks, task, args)

    wait_for_all(world)
    if rank == 0:
        write_json(complete, counts)
        write_source(out, task, args, counts)


def wait_for_all(world):
    """Returns once every process has come to this line."""
    if world == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    torch.distributed.barrier()


def label_corpus(folder, task, args):
    """Labels those blocks of the corpus that have no file yet; each process those of its number.
    Returns how many texts were read, and not labelled for which reason."""
    (rank, world), corpus = rank_and_world(), read_corpus(args.corpus, args.share)
    label = None  # the labeller is loaded once there is something to label
    counts = dict.fromkeys(("read", "not text", "too short", "too long"), 0)
    with stop_signal() as stop, tqdm(desc="pseudo-label", unit=" texts", disable=None) as bar:
        for number in itertools.count():
            texts = list(itertools.islice(corpus, BLOCK))
            if not texts:
                return counts
            fates = [fate(text, args.min_words, args.max_words) for text in texts]
            counts["read"] += len(texts)
            for why in filter(None, fates):
                counts[why] += 1

            path = folder / f"{number:06}.jsonl.gz"
            if number % world == rank and not path.exists():
                label = label or load_labeller(args, task)
                fitting = [text for text, why in zip(texts, fates) if why is None]
                labelled = zip(fitting, *label(fitting)) if fitting else ()
                keys = (task.fields[0], "label", "confidence")
                rows = ((text, said, round(p, 4)) for text, said, p in labelled)
                write_lines(path, (dict(zip(keys, row)) for row in rows))
            bar.update(len(texts))
            if stop:
                message = f"stopped after {counts['read']:,} texts and saved"
                raise KeyboardInterrupt(f"{message}; {CONTINUES}")


def load_labeller(args, task):
    """texts -> labels and confidences, by the labeller in a folder. Raises InputError."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model, tokenizer = load_classifier(args.labeller, args.device, dtype=dtype)
    if model.config.num_labels != len(task.words):
        raise InputError(
            f"{args.labeller}: its classifier has {model.config.num_labels} labels, its task "
            f"{len(task.words)} words; train it again with data.py labeller"
        )
    tokenize = in_batches(model, tokenizer, args.max_length)
    return lambda texts: classify(model, tokenize, texts, args.batch_size)


def read_blocks(folder, task):
    """Yields the examples of the blocks that are labelled. Raises InputError."""
    for path in sorted(folder.glob("*.jsonl.gz")):
        try:
            yield from read_examples(path, task)
        except InputError as error:
            raise InputError(
                f"{error}; or remove it and complete.json, and give the same command again"
            )


def write_source(out, task, args, counts):
    """Balances what was labelled, and writes examples.jsonl, task.json and funnel.json to `out`.
    Holds some 100 bytes for each text that was labelled. Raises InputError where a class is empty.
    """
    labels, confidences, hashes = array.array("B"), array.array("d"), array.array("Q")
    for example in read_blocks(out / "blocks", task):
        labels.append(example["label"])
        confidences.append(example.get("confidence", 1))
        hashes.append(int(digest(text_of(example, task).lower()), 16))

    labels, least = np.array(labels, dtype=np.int64), args.confidence
    least = least * len(task.words) if len(least) == 1 else least
    columns = labels, np.array(confidences), np.array(hashes)
    kept, sizes, funnel = balance(*columns, least, args.per_class, args.seed)
    labelled = np.bincount(labels, minlength=len(task.words))
    for size, count, word in zip(sizes, labelled, task.words):
        print(f"{word}: {count:,} labelled, sure of {size:,} different texts")

    if 0 in sizes:
        empty = sizes.argmin()
        mend = "lower --confidence" if labelled[empty] else "give more text, or another labeller"
        raise InputError(
            f"{out}: no text that is surely {task.words[empty]!r}, of {labelled[empty]:,} labelled "
            f"so; {mend}: what was labelled is kept, and the same command goes on from it"
        )

    source = Task("source", task.template, task.words)
    examples = itertools.compress(read_blocks(out / "blocks", task), kept)
    write_task(out, source, {"examples": examples})
    save_arguments(out / "arguments.json", args)
    funnel = {**counts, **funnel}
    write_json(out / "funnel.json", funnel)
    for what, count in funnel.items():
        print(f"{count:14,} {what}")

    print(
        f"wrote {out}: task.json and examples.jsonl, equally many of each of {len(task.words)} "
        "classes; blocks/ holds all that was labelled, to be balanced again"
    )


# -------------------------------------------------- The command line, the same for every script

CONTINUES = "the same command, without --restart, continues"
BEGIN_ANEW = "--restart begins anew"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help texts that end in their defaults, where there are any."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults shown, defaults from a JSON file, and errors of
    one line."""

    def __init__(self, description=None, **kwargs):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=Help, **kwargs
        )

    def add_config(self):
        """The flag that parse() reads first."""
        wins = "flags beside it win; {here} in it is its folder"
        self.add_argument("--config", metavar="FILE", help=f"a JSON file of flags; {wins}")

    def add_machine(self):
        """The flags that say where a script computes."""
        machine = self.add_argument_group("the machine")
        add, threads = machine.add_argument, "CPU threads (default: as PyTorch chooses)"
        add("--device", help="cpu or cuda (default: cuda where there is a GPU)")
        add("--threads", type=number(1), help=threads)
        return machine

    def parse(self, argv=None):
        """The arguments: those of the file --config first, so that others win. Raises InputError
        for that file."""
        argv = sys.argv[1:] if argv is None else argv
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        config = first.parse_known_args(argv)[0].config
        if config and not HELP:
            self.prog += f" --config {config}"
            argv = flags_in(config, argv) + list(argv)
        return self.parse_args(argv)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def flags_in(config, argv):
    """The flags that a JSON file of them stands for, without those that argv has too: the folders
    that it names may be gone. Raises InputError."""
    folder, flags = str(Path(config).parent), []
    for name, value in read_json(config, "give a file of flags").items():
        flag = f"--{name.replace('_', '-')}"
        given = any(arg == flag or arg.startswith(f"{flag}=") for arg in argv)
        if given or value is None or value is False:
            continue
        if value is True:
            flags.append(flag)
            continue

        values = value if isinstance(value, list) else [value]
        values = [str(one).replace("{here}", folder) for one in values]
        flags += [flag, *values] if isinstance(value, list) else [f"{flag}={values[0]}"]

    return flags


def number(least, most=math.inf):
    """What a flag takes: a number from `least` to `most`, a whole one where `least` is."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = type(least)(text)
            known = type(least) is float or value < 2**63  # as large as PyTorch and NumPy take
            if least <= value <= most and value < math.inf and known:
                return value
        kind = "a whole number" if type(least) is int else "a number"
        limit = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"{text} is not {kind} {limit}")

    return parse


def existing(kind, *words):
    """What a flag takes: a "file" or "folder" that is there, or one of `words`, which a folder in
    reach is not taken for."""

    def parse(text):
        path = Path(text)
        if text in words:
            return text
        if not path.exists():
            makers = "" if kind == "file" else "; data.py makes tasks, train_meta.py prompts"
            raise argparse.ArgumentTypeError(f"{text}: no such {kind}{makers}")
        if kind != "either" and path.is_dir() != (kind == "folder"):
            other = "a folder; give a file" if path.is_dir() else "a file; give its folder"
            raise argparse.ArgumentTypeError(f"{text} is {other}")
        # Without a slash at its end: results know a folder by its name.
        return str(path.absolute() if str(path) in words else path)

    return parse


def picture(text):
    """What a flag takes: a picture to write."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return text


def add_precision(machine):
    """The flags that say in which precision a prompt's script computes."""
    dtypes = ["float32", "bfloat16", "float64"]
    kinds = ["highest", "high", "medium"]
    add = machine.add_argument
    add("--dtype", default="float32", choices=dtypes, help="of T5's weights; the prompt is float32")
    add("--matmul", default="highest", choices=kinds, help="of float32 products; high is TF32")


def add_start(group):
    """The flags that say how a random prompt is drawn."""
    add = group.add_argument
    add("--prompt-length", type=number(1), default=100, help="vectors of a random prompt")
    add("--init-scale", type=number(1e-12), default=1.0, help="what a random prompt is times")


def set_machine(args):
    """Sets the threads, the device and the precision that the arguments name. Raises InputError."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with blame(f"--device {args.device}", "give cpu or cuda", Exception):
        torch.empty(0, device=args.device)
    if args.device == "cuda" and rank_and_world()[1] > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(getattr(args, "matmul", "highest"))


def fill(args, settings):
    """The arguments, those that were not given taken from `settings`."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **settings, **given})


def save_arguments(path, args):
    """Writes the arguments that a script ran with as JSON, which scripts with --config read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in vars(args).items() if name not in ("config", "restart")}
    write_json(path, kept)


def check_same(place, before, now, longer=()):
    """Raises InputError where facts that an earlier run left in `place` are not today's, and names
    the first that differs; those named in `longer` may be larger than they were."""
    for name, value in now.items():
        known = before.get(name)
        grown = name in longer and isinstance(known, int) and value >= known
        if value != known and not grown:
            raise InputError(
                f"{place}: this run began with {name} {known}, not {value}; give that again to "
                f"continue it, or another --out; {BEGIN_ANEW}"
            )


def save_figure(path, figure):
    """Writes one of matplotlib's figures, beside its place first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"format": path.suffix[1:], "dpi": 100, "bbox_inches": "tight"}
    write_beside(path, lambda beside: figure.savefig(beside, **how))
    print(f"wrote {path}")


def rank_and_world():
    """This process's number and how many processes torchrun started; 0 and 1 without it. Clusters
    set some of its variables too: only all of them count."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    started = all(name in os.environ for name in names)
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if started else (0, 1)


def provenance(device, *files):
    """What a result can be traced by: versions, device, threads, git commit (None without one) and
    the files' digests."""
    commit = None
    if shutil.which("git"):
        show = ["git", "rev-parse", "HEAD"]
        shown = subprocess.run(show, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = shown.stdout.strip() or None

    gpu = torch.device(device).type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "versions": {**versions, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "commit": commit,
        "digests": {str(file): digest(Path(file)) for file in files},
    }


def digest(*parts):
    """The first 16 digits of the SHA-256 of files (each a Path), texts and bytes."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                part = hashlib.file_digest(file, "sha256").digest()
        hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()[:16]


def fingerprint(t5):
    """The digest of a T5's weights, which tells it from another T5 that was in the same folder. Of
    any --dtype the same."""
    weights = []
    for _, values in sorted(t5.named_parameters()):
        values = values.detach().to("cpu", torch.bfloat16).contiguous()
        weights.append(values.view(torch.int16).numpy())
    return digest(*weights)


@contextlib.contextmanager
def stop_signal():
    """Within `with stop_signal() as stop`, Ctrl-C and SIGTERM only make `stop` true: the loop ends
    its step first. Where it did not act on one, that comes through at the end."""
    stop, numbers = [], (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()  # as in a notebook or a server, where signals are not ours to handle
    handle = lambda number, frame: stop.append(number)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    if stop:  # it came too late for any step, but not for what would follow
        signal.raise_signal(stop[-1])


def run(main):
    """Runs a script's main; bad input ends in one line on standard error and exit status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no work is lost to a console that has no such letter
            stream.reconfigure(errors="replace")
    if HELP:
        return main()

    transformers.utils.logging.disable_progress_bar()  # the scripts have their own
    transformers.utils.logging.set_verbosity_error()
    try:
        if rank_and_world() == (0, 1) and not {"RANK", "WORLD_SIZE"}.isdisjoint(os.environ):
            message = "RANK or WORLD_SIZE is set, but not by torchrun: this is the only process"
            print(message, file=sys.stderr)
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except InputError as error:
        end(error, 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        end(f"{place}{first_line(error)}; check the path", 2)
    except KeyboardInterrupt as stop:
        end(str(stop) or "stopped; give the same command again", 130)


def end(message, status):
    """Ends the script with one line."""
    line = " ".join(f"{Path(sys.argv[0]).name}: {message}".split())[:1000]
    print(line, file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------- This script's own flags


def add_convert(command):
    """The flags of `convert`."""
    add, either = command.add_argument, existing("either")
    add("dataset", choices=DATASETS)
    add("--input", required=True, type=either, help="the official file, or the folder of them")
    add("--out", required=True, metavar="FOLDER", help="the task folder to write")
    share = number(0.0, 0.9)
    add("--test-share", type=share, default=0.0, help="of train, to test on where no test file is")


def add_labeller(command):
    """The flags of `labeller`."""
    add = command.add_argument
    add("--task", required=True, type=existing("folder"), metavar="FOLDER", help="to train on")
    add("--model", default="FacebookAI/roberta-base", help="its base, by hub name or folder")
    add("--out", required=True, metavar="FOLDER", help="the folder to write")
    add("--restart", action="store_true", help="replaces the labeller that stands in --out")
    add("--learning-rate", type=number(1e-12), default=2e-5, help="AdamW's")
    add("--warmup", type=number(1), default=500, help="steps up to it; it then falls")
    add("--batch-size", type=number(1), default=32, help="examples of a step")
    add("--max-epochs", type=number(1), default=3, help="epochs")
    add("--eval-every", type=number(1), default=1000, help="steps between validations")
    add("--validation", type=number(1), default=5000, help="of train, where no validation file is")
    add("--max-length", type=number(1), default=MAX_LENGTH, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="of every draw")
    command.add_machine()


def add_pseudo_label(command):
    """The flags of `pseudo-label`."""
    add, file, folder = command.add_argument, existing("file"), existing("folder")
    corpus = "OpenWebText's tar, other tars of .txt files, .txt or .jsonl files; packed or not"
    sure = "the least probability to keep a text: one value, or one for each class"
    add("--labeller", required=True, type=folder, metavar="FOLDER", help="what `labeller` wrote")
    add("--corpus", required=True, nargs="+", type=file, metavar="FILE", help=corpus)
    add("--out", required=True, metavar="FOLDER", help="the source folder to write")
    add("--restart", action="store_true", help="labels anew")
    add("--share", type=number(0.0, 1.0), default=1.0, help="of the documents, to read")
    add("--min-words", type=number(1), default=5, help="shorter texts are dropped")
    add("--max-words", type=number(1), default=200, help="longer texts are dropped")
    add("--confidence", type=number(0.0, 1.0), default=[0.9], nargs="+", help=sure)
    add("--per-class", type=number(1), help="examples of each (default: as the smallest class has)")
    add("--batch-size", type=number(1), default=64, help="texts of a forward pass")
    add("--max-length", type=number(1), default=MAX_LENGTH, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="of the draw that balances")
    command.add_machine()


def main(argv=None):
    """Runs one of the three commands."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert(commands.add_parser("convert", help="a dataset's official files as a task folder"))
    add_labeller(commands.add_parser("labeller", help="fine-tunes a sequence classifier on a task"))
    add_pseudo_label(commands.add_parser("pseudo-label", help="labels a corpus: source data"))
    args = parser.parse(argv)
    if args.command == "convert":
        return convert(args.dataset, args.input, args.out, args.test_share)
    set_machine(args)
    train_labeller(args) if args.command == "labeller" else pseudo_label(args)


if __name__ == "__main__":
    run(main)
