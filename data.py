"""
Source data and downstream tasks (Sections 4.1 and 5.1, Appendix C): official files in, JSON lines
out. From top to bottom:

    Examples              JSON lines, task folders, the few-shot split of Section 5.1
    Readers               one for each dataset of Appendix C
    Pseudo-labels         Section 4.1: a labeller, a corpus, what is kept of it
    A small T5            where T5-base cannot be had: pre-trained from nothing
    The offline demo      reviews written by a grammar, and a tiny T5 pre-trained on them
    The command line      the same for every script; then this one's own

    python data.py convert yelp5 --input yelp_review_full_csv.tgz --out tasks/yelp5   # or another
    python data.py labeller --task tasks/yelp5 --out labeller           # RoBERTa, for pseudo-labels
    python data.py pseudo-label --labeller labeller --corpus openwebtext.tar.xz --out source
    python data.py pretrain --corpus reviews.jsonl --task tasks/imdb --out t5     # a small T5
    python data.py demo                                                 # the offline demo, in demo/

A task is a folder: task.json (the template and the words), train.jsonl, test.jsonl and, where the
dataset has one, validation.jsonl. A line is an example, {"text": "...", "label": 0}, the label an
index into the words.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

# PyTorch and transformers take seconds to import. --help needs neither; who waits is told so.
SCRIPTS = ("data.py", "cluster.py", "train_meta.py", "finetune.py")
SCRIPT = Path(sys.argv[0]).name in SCRIPTS
HELP = SCRIPT and not {"-h", "--help"}.isdisjoint(sys.argv)
if SCRIPT and not HELP and sys.stderr.isatty():
    print("loading PyTorch and transformers ...", file=sys.stderr, flush=True)

# A folder beside the scripts, as --out peft/mine makes one, is an empty package to Python, and
# would be taken for the library of its name where that is not installed.
for beside in Path(__file__).parent.iterdir():
    if beside.is_dir() and beside.name.isidentifier():
        found = importlib.util.find_spec(beside.name)
        if found and found.origin is None:
            sys.modules[beside.name] = None

if not HELP:
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import trainers
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
    from transformers.optimization import Adafactor
    from transformers.utils import logging as transformers_logging

    from metapt import NEW_WORD, Diverged, InputError, PromptedT5, Task, best_of, blame
    from metapt import first_line, linear_schedule, out_of_patience, parse_json, read_json
    from metapt import check_complete, write_beside, write_json

MODEL = "google-t5/t5-base"  # Section 5.1
MAX_LENGTH = 256  # tokens of H(x); the paper names none
TEMPLATE = "{text} It was {mask}"  # the paper's, Section 3
WORDS = {
    5: ["terrible", "bad", "okay", "good", "great"],
    3: ["bad", "okay", "good"],
    2: ["bad", "good"],
}
CONTINUES = "the same command, without --restart, continues"
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
        file = tar.extractfile(next(members))

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
            raise ValueError(f"the template of task {task.name} needs {field!r} to be a text here")
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


def write_examples(path, examples):
    """Writes JSON lines, packed where `path` ends in .gz, beside it first and then renamed."""
    opener = gzip.open if Path(path).suffix == ".gz" else open

    def write(beside):
        with opener(beside, "wt", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(example, ensure_ascii=False) + "\n")

    write_beside(path, write)


def write_task(folder, task, splits):
    """Writes task.json and a .jsonl file for each split: all of them, or on an error none."""
    with folder_beside(folder) as beside:
        for split, examples in splits.items():
            write_examples(beside / f"{split}.jsonl", examples)
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


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run: its files


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
    """Writes the task folder `out` from a dataset's official file, the folder of them or the
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


def classify(model, tokenize, texts, batch_size):
    """Each text's label and its confidence, the label's probability: two lists. Texts of about one
    length share a batch, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    logits = []
    for start in range(0, len(texts), batch_size):
        batch = tokenize([texts[i] for i in order[start : start + batch_size]])
        with torch.no_grad():
            logits.append(model(**batch.to(model.device)).logits)
    probabilities = torch.cat(logits).float().softmax(-1)[np.argsort(order)]
    confidences, labels = probabilities.max(-1)
    return labels.tolist(), confidences.tolist()


def fate(text, min_words, max_words):
    """Why a text of a corpus (None stands for no text) is not labelled; None where it is."""
    if text is None:
        return "not text"
    words = text.count(" ") + 1
    if words < min_words:
        return "too short"
    return "too long" if words > max_words else None


def pseudo_labelled(texts, field, label):
    """Yields texts as pseudo-labelled examples; `label` gives their labels and confidences."""
    labels, confidences = label(texts) if texts else ([], [])
    for text, said, p in zip(texts, labels, confidences):
        yield {field: text, "label": said, "confidence": round(p, 4)}


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


# A paragraph ends with its line. A sentence ends before a capital, but not in "Mr. A. B. Smith".
END = r"""(?:(?<=[.!?])|(?<=[.!?]["”')]))"""
ABBREVIATED = r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr)\.)(?<!\bMrs\.)"
UNITS = {"paragraph": r"\n", "sentence": rf"""\n|{END}{ABBREVIATED}\s+(?=["“'(]?[A-Z0-9])"""}


def read_corpus(paths, unit, share=1.0):
    """Yields the sentences or paragraphs of a random `share` of the documents in corpora: .txt and
    .jsonl files, or tars of .txt files, in further tars or not, as OpenWebText is. None stands for
    no text. Raises InputError."""
    rng = random.Random(0)
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        if rng.random() >= share:
            continue
        if document is None:
            yield None
            continue
        for text in re.split(UNITS[unit], document):
            if text.strip():
                yield " ".join(text.split())


def read_documents(path):
    """Yields the documents of one corpus file; None stands for no text, an empty document, say, or
    one that is no UTF-8. Raises InputError where the file is broken or has no text at all."""
    # A TypeError comes from tarfile, where a gzip header is cut off.
    with blame(path, "give the whole file", TypeError, *BROKEN):
        if tarfile.is_tarfile(path):
            with open(path, "rb") as file:
                yield from read_tar(file)
        else:
            found = count = 0
            with open_packed(path) as file:
                for line in file:
                    document = text_in(line, is_plain(path))
                    count += 1
                    found += document is not None
                    if not found and count == 1000:
                        break
                    yield document

            if not found:
                raise ValueError("no line of it is text, or an object with one as its 'text'")


def text_in(content, plain):
    """The text in a line or a document of a corpus; None where there is none."""
    with contextlib.suppress(ValueError):
        value = content.decode("utf-8-sig")
        if not plain:
            value = parse_json(value)
            value = value.get("text") if isinstance(value, dict) else None
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value


class Header(tarfile.TarInfo):
    """A header of a tar, where one that is broken or cut off is an error, and not the tar's end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,} of it")


def read_tar(file):
    """Yields the documents of a tar, and of the tars in it, from front to back; nothing is unpacked
    to disk."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as tar:
        for member in tar:
            tar.members.clear()  # where every header would be kept
            if member.size > 2**33:  # a lie, which skipping to its end would take forever to show
                raise tarfile.ReadError(f"{member.name} in it would have {member.size:,} bytes")
            if not member.isfile() or member.issparse():
                continue
            if member.name.endswith((".xz", ".gz", ".tar", ".tgz")):
                yield from read_tar(tar.extractfile(member))
            elif not member.name.endswith(".txt"):
                yield None
            else:
                yield text_in(tar.extractfile(member).read(), plain=True)


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run: files, continuing, processes

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


def in_pairs(examples, task):
    """[(text, label)] of examples."""
    texts = [text_of(example, task) for example in examples]
    return [(text, example["label"]) for text, example in zip(texts, examples)]


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
    try_place(out / "log.jsonl")
    if (out / "log.jsonl").exists() and not args.restart:
        mend = "give another --out, or --restart to replace it"
        raise InputError(f"{out}: a labeller stands there already; {mend}")

    torch.manual_seed(args.seed)  # of the classifier's new layer too
    # A checkpoint may be in half precision, in which AdamW's small steps are lost.
    how = {"num_labels": len(task.words), "dtype": torch.float32}
    model, tokenizer = load_classifier(args.model, args.device, is_base=True, **how)
    tokenize = in_batches(model, tokenizer, args.max_length)
    training = in_pairs(training, task)
    texts, truths = zip(*in_pairs(validation, task))
    total = args.max_steps or args.max_epochs * math.ceil(len(training) / args.batch_size)
    rates = {"learning_rate": args.learning_rate, "warmup": args.warmup}
    steps = train_classifier(model, tokenize, training, total, batch_size=args.batch_size, **rates)

    log = []
    with stop_signal() as stop, tqdm(total=total, desc="labeller", disable=None) as bar:
        for step in steps:
            bar.update()
            if not (stop or step % args.eval_every == 0 or step == total):
                continue

            labels, _ = classify(model.eval(), tokenize, texts, 2 * args.batch_size)
            accuracy = float(np.mean(np.array(labels) == truths))
            log.append({"step": step, "accuracy": accuracy, "loss": 1 - accuracy})
            best = log[best_of(log)]
            if best is log[-1]:
                save_model(out, model, tokenizer, task)

            write_examples(out / "log.jsonl", log)
            save_arguments(out / "arguments.json", args)
            bar.set_postfix(accuracy=f"{accuracy:.3f}", best=f"{best['accuracy']:.3f}")
            if stop:
                message = f"stopped at step {step:,}; {out} holds the best so far"
                raise KeyboardInterrupt(f"{message}; --model {out}, with another --out, goes on")

            if out_of_patience(log, args.patience):
                break

    largest = max(collections.Counter(truths).values()) / len(truths)
    print(
        f"wrote {out}: the labeller of step {best['step']:,} of {step:,}, validation accuracy "
        f"{best['accuracy']:.1%} on {len(truths):,} examples (the largest class: {largest:.1%})"
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

    corpus = read_corpus(args.corpus, args.unit, args.share)
    try_place(out / "examples.jsonl")
    if rank == 0:
        check_settings(out / "blocks" / "settings.json", args)

    wait_for_all(world)
    complete = out / "blocks" / "complete.json"
    known = read_json(complete, "remove it") if complete.exists() else {}
    counts = known.get("counts")
    counted = isinstance(counts, dict) and all(type(count) is int for count in counts.values())
    if known.get("blocks") != len(blocks_in(out)) or not counted:
        counts = label_corpus(corpus, out / "blocks", task, args)

    wait_for_all(world)
    if rank == 0:
        # So that balancing again need not read the corpus again.
        write_json(complete, {"blocks": len(blocks_in(out)), "counts": counts})
        write_source(out, task, args, counts)


def blocks_in(out):
    """The files of the blocks that are labelled, in their order."""
    return sorted((out / "blocks").glob("*.jsonl.gz"))


def wait_for_all(world):
    """Returns once every process has come to this line."""
    if world == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    torch.distributed.barrier()


def check_settings(path, args):
    """Raises InputError where the blocks in a folder were labelled with other arguments; writes
    those that decide about a label where there are none."""
    names = ("labeller", "unit", "share", "min_words", "max_words", "max_length")
    settings = {name: getattr(args, name) for name in names}
    settings["corpus"] = [[file, os.stat(file).st_size] for file in args.corpus]
    weights = sorted(Path(args.labeller).glob("*.safetensors"))
    settings |= {"weights": [digest(file) for file in weights], "block": BLOCK}
    if args.restart:
        shutil.rmtree(path.parent, ignore_errors=True)
    if path.exists():
        if read_json(path, "--restart begins anew") != settings:
            message = "labelled from another corpus or with other flags; --restart begins anew"
            raise InputError(f"{path}: {message}")
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def label_corpus(corpus, folder, task, args):
    """Labels those blocks of the corpus that have no file yet; each process those of its number.
    Returns how many texts were read, and not labelled for which reason."""
    rank, world = rank_and_world()
    folder.mkdir(parents=True, exist_ok=True)
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
                write_examples(path, pseudo_labelled(fitting, task.fields[0], label))
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


def read_blocks(paths, task):
    """Yields the examples of blocks. Raises InputError."""
    for path in paths:
        try:
            yield from read_examples(path, task)
        except InputError as error:
            raise InputError(f"{error}; or remove it and give the same command again")


def write_source(out, task, args, counts):
    """Balances what was labelled, and writes examples.jsonl, task.json and funnel.json to `out`.
    Holds some 100 bytes for each text that was labelled. Raises InputError where a class is empty.
    """
    field, paths = task.fields[0], blocks_in(out)
    labels, confidences, hashes = array.array("B"), array.array("d"), array.array("Q")
    for example in read_blocks(paths, task):
        labels.append(example["label"])
        confidences.append(example.get("confidence", 1))
        hashed = hashlib.blake2b(example[field].lower().encode(), digest_size=8).digest()
        hashes.append(int.from_bytes(hashed, "big"))

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
    write_task(out, source, {"examples": itertools.compress(read_blocks(paths, task), kept)})
    save_arguments(out / "arguments.json", args)
    funnel = {**counts, **funnel}
    write_json(out / "funnel.json", funnel)
    for what, count in funnel.items():
        print(f"{count:14,} {what}")

    print(
        f"wrote {out}: task.json and examples.jsonl, equally many of each of {len(task.words)} "
        "classes; blocks/ holds all that was labelled, to be balanced again"
    )


# ---------------------------------- A small T5 from nothing, where none of the paper's size can run

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


def corrupt(ids, sentinels, rng, density=0.15, mean_length=3):
    """T5's span corruption of two token ids or more: (input ids, target ids). Spans of three tokens
    on average, 15 % of all, are lost; a sentinel stands for each, and the target spells them out.
    """
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

    return source + [1], target + [sentinels[spans], 1]


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


def draw_windows(stream, count, sentinels, longest, rng):
    """`count` windows cut out of a stream of token ids at random, of all lengths up to `longest`,
    as a batch for T5: input_ids, attention_mask and labels."""
    pairs = []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        start = int(rng.integers(len(stream) - length + 1))
        pairs.append(corrupt(stream[start : start + length].tolist(), sentinels, rng))

    inputs, targets = ([torch.tensor(row) for row in rows] for rows in zip(*pairs))
    inputs, targets = pad_sequence(inputs, True, 0), pad_sequence(targets, True, -100)
    return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": targets}


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
    sentences = [part for part in re.split(UNITS["sentence"], text) if part.strip()]
    count = int(rng.integers(1, 4))
    start = int(rng.integers(max(len(sentences) - count, 0) + 1))
    return " ".join(sentences[start : start + count])


def pretrain(t5, draw, optimizer, steps, rate, dtype):
    """Trains a T5 by span corruption and, as T5's own pre-training did, by tasks too: by the
    objective of Section 3, without a prompt. draw(step) gives a batch of windows, a PromptedT5
    around this T5, and a batch of its task's examples; rate(step) the learning rate. Yields each
    step's two losses and its number of tokens."""
    nothing = torch.zeros(0, t5.config.d_model, device=t5.device)
    for step in steps:
        windows, model, labelled = draw(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        with torch.autocast(t5.device.type, dtype, enabled=dtype != torch.float32):
            batch = {name: rows.to(t5.device) for name, rows in windows.items()}
            span_loss = t5(**batch, use_cache=False).loss
            label_loss = model.loss(nothing, labelled)
        (span_loss + label_loss).backward()
        torch.nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = windows["input_ids"].numel() + labelled["input_ids"].numel()
        yield span_loss.item(), label_loss.item(), tokens


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run: its files, continuing


def pretrain_t5(args):
    """Pre-trains a small T5 on a corpus and on labelled tasks, and writes it to args.out in the form
    in which any T5 is loaded. A step's draws depend on the seed and the step's number alone, so that
    a continued run does what an uninterrupted one would have done. Raises InputError."""
    out, tasks = Path(args.out), [Task.load(folder) for folder in args.task]
    try_place(out / "config.json")
    check_arguments(out / "arguments.json", args)
    excluded = runs_of_tasks(args.exclude or [])
    splits = [
        labelled_splits(args, folder, task, excluded) for folder, task in zip(args.task, tasks)
    ]
    words = [word for task in tasks for word in task.words]
    tokenizer, stream, held_out = tokens_of(args, out, words, excluded)
    save_arguments(out / "arguments.json", args)
    t5 = new_t5(args, len(tokenizer)).to(args.device)
    models = [PromptedT5(t5, tokenizer, task, args.max_length) for task in tasks]
    t5.requires_grad_(True)  # which PromptedT5 has frozen
    optimizer = Adafactor(t5.parameters(), args.learning_rate, beta1=0.9, relative_step=False)
    files = [Path(folder) / "train.jsonl" for folder in args.task]
    digests = {str(file): digest(file) for file in files}
    weights = {f"weights.{name}": values for name, values in t5.named_parameters()}
    step, log = load_state(out, weights, optimizer, digests, args.restart)

    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    by_class = [classes_of(training) for training, _ in splits]
    windows = partial(draw_windows, sentinels=sentinels, longest=args.max_length)

    def draw(step):
        rng, i = np.random.default_rng([args.seed, step]), step % len(tasks)
        examples = draw_labelled(by_class[i], tasks[i].fields, args.labelled, args.excerpts, rng)
        return windows(stream, args.batch_size, rng=rng), models[i], models[i].encode(examples)

    validations = [list(encoded(model, examples)) for model, (_, examples) in zip(models, splits)]
    rng = np.random.default_rng(args.seed)
    held_out = [windows(held_out, 64, rng=rng) for _ in range(8)]
    dtype = getattr(torch, args.dtype)
    rate = lambda step: args.learning_rate * linear_schedule(step, args.max_steps, args.warmup)
    steps = pretrain(t5, draw, optimizer, range(step, args.max_steps), rate, dtype)
    validate = partial(validate_t5, t5, models, held_out, validations, dtype)
    save = partial(save_pretraining, out, t5, tokenizer, weights, optimizer, digests)
    run_pretraining(args, steps, step, log, validate, save)

    size = sum(values.numel() for values in weights.values()) / 1e6
    print(
        f"wrote {out}: a T5 of {size:.2f} million parameters after {log[-1]['step']:,} steps; held "
        f"out: loss {log[-1]['loss']:.2f}, accuracy at the mask {log[-1]['accuracy']:.1%}"
    )


def run_pretraining(args, steps, step, log, validate, save):
    """Makes the steps, and at every validation a line of the log and a checkpoint."""
    began, seen = time.time(), 0
    bar = tqdm(total=args.max_steps, initial=step, desc="pretrain", unit=" steps", disable=None)
    with stop_signal() as stop, bar:
        for span_loss, label_loss, tokens in steps:
            step, seen = step + 1, seen + tokens
            speed = seen / (time.time() - began)
            shown = {"loss": f"{span_loss:.2f}", "label": f"{label_loss:.2f}"}
            bar.set_postfix(**shown, tokens=f"{speed:,.0f}/s", refresh=False)
            bar.update()
            if not (stop or step % args.eval_every == 0 or step == args.max_steps):
                continue

            log.append({"step": step, **validate(), "tokens_per_second": round(speed)})
            if not math.isfinite(log[-1]["loss"] + log[-1]["label_loss"]):
                mend = "lower --learning-rate and give --restart"
                raise Diverged(f"{args.out}: step {step:,}: the loss is not finite; {mend}")

            save(step, log)
            bar.write(" ".join(f"{name} {value:.4g}" for name, value in log[-1].items()))
            if stop:
                raise KeyboardInterrupt(f"stopped at step {step:,} and saved; {CONTINUES}")


def labelled_splits(args, folder, task, excluded):
    """A task's training and held-out examples that are apart from the excluded tasks. Raises
    InputError where none is left."""
    text = partial(text_of, task=task)
    splits = read_splits(Path(folder), task, args.validation, args.seed)
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
            for example in read_examples(path, task, labelled=False):
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


def tokens_of(args, out, words, excluded):
    """The tokenizer, the corpus as one stream of its token ids, and one in a hundred documents as
    another stream: from `out`, or made and kept there."""
    stream, held_out = out / "tokens.bin", out / "held_out.bin"
    if args.restart:  # nothing of the earlier run may be taken for this one's
        for name in ("arguments.json", "checkpoint.safetensors"):
            (out / name).unlink(missing_ok=True)

    if not (out / "arguments.json").exists():
        learn_from = [itertools.islice(read_documents(path), 20_000) for path in args.corpus]
        out.mkdir(parents=True, exist_ok=True)
        texts = (text[:2000] for text in itertools.chain(*learn_from) if text)
        with blame(args.corpus[0], "raise --pieces", Exception):  # tokenizers raises no other kind
            tokenizer = learn_tokenizer(texts, words, args.pieces)
        documents = (apart(read_documents(path), str, excluded, path) for path in args.corpus)
        documents = itertools.chain.from_iterable(documents)
        write_beside(held_out, lambda beside: write_tokens(beside, stream, documents, tokenizer))
        tokenizer.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(out)
    if min(path.stat().st_size for path in (stream, held_out)) <= 4 * args.max_length:
        raise InputError(f"{args.corpus[0]}: too little text to pre-train on; give more --corpus")
    return tokenizer, *(np.memmap(path, np.uint32, "r") for path in (stream, held_out))


def write_tokens(held_out, stream, documents, tokenizer):
    """Writes the token ids of documents, </s> behind each, to two files."""

    def write(beside):
        with open(beside, "wb") as most, open(held_out, "wb") as few:
            bar = tqdm(documents, "reading the corpus", unit=" documents", disable=None)
            for number, text in enumerate(bar):
                ids = tokenizer(text, verbose=False).input_ids
                file = few if number % 100 == 0 else most
                file.write(np.array(ids, dtype=np.uint32).tobytes())

    write_beside(stream, write)


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


def encoded(model, examples, size=64):
    """Examples as encoded batches."""
    for start in range(0, len(examples), size):
        yield model.encode(examples[start : start + size])


def validate_t5(t5, models, windows, validations, dtype):
    """The mean loss of held-out windows, and the mean accuracy and loss at the mask of the tasks'
    held-out examples, without a prompt."""
    nothing = torch.zeros(0, t5.config.d_model, device=t5.device)
    precision = torch.autocast(t5.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), precision:
        losses = []
        for batch in windows:
            batch = {name: rows.to(t5.device) for name, rows in batch.items()}
            losses.append(t5(**batch, use_cache=False).loss.item())
        scores = [model.evaluate(nothing, rows) for model, rows in zip(models, validations)]

    mean = lambda name: float(np.mean([score[name] for score in scores]))
    return {"loss": np.mean(losses), "label_loss": mean("loss"), "accuracy": mean("accuracy")}


def save_pretraining(out, t5, tokenizer, weights, optimizer, digests, step, log):
    """Writes what a continued run needs, and the T5 so far."""
    save_state(out, weights, optimizer, step, log, digests)
    save_model(out, t5, tokenizer)


# ------------------------------------------------ The offline demo: reviews written by a grammar

# Words for each grade, from terrible to great. SHARED ones are used of everything.
SHARED = (
    "awful horrible dreadful pathetic, poor weak disappointing mediocre, fine average ordinary "
    "acceptable, nice pleasant solid enjoyable, excellent wonderful superb fantastic"
)
DOMAINS = {  # domain: how its reviews may open, its aspects, and its own words for each grade
    "films": (
        "we watched it last night, my sister took me to the cinema",
        "plot acting ending script music camera",
        "unwatchable incoherent, dull clumsy, predictable watchable, funny moving, "
        "gripping masterful",
    ),
    "restaurants": (
        "we had dinner there on sunday, the table was booked for two",
        "soup waiter dessert menu pasta kitchen",
        "inedible rancid, bland greasy, edible filling, tasty fresh, delicious exquisite",
    ),
    "laptops": (
        "i bought this computer for work, it came with windows installed",
        "keyboard battery screen fan processor trackpad",
        "unusable defective, sluggish noisy, standard usable, quick sturdy, blazing flawless",
    ),
    "hotels": (
        "we stayed for three nights, the place is near the beach",
        "room bed pool lobby shower breakfast",
        "filthy infested, cramped shabby, basic functional, comfortable clean, "
        "luxurious immaculate",
    ),
    "books": (
        "i read it in one week, this novel was a present",
        "prose chapter hero dialogue cover style",
        "unreadable illiterate, tedious shallow, readable conventional, clever warm, "
        "brilliant timeless",
    ),
    "games": (
        "i played it for ten hours, my son has it on his console",
        "level combat puzzle graphics quest controls",
        "unplayable broken, repetitive buggy, playable simple, fun challenging, "
        "addictive stunning",
    ),
}
SOURCE_DOMAINS = ["films", "restaurants", "laptops", "hotels"]
TASK_DOMAINS = ["books", "games"]
FRAMES = [
    "the {aspect} was {word}",
    "i found the {aspect} {word}",
    "we thought the {aspect} was really {word}",
    "{word} {aspect}",
    "the {aspect} seemed {word} to me",
    "my friend called the {aspect} {word}",
]


def write_review(domain, grade, rng):
    """A review of one to three remarks, whose words mostly agree with its grade."""
    openings, aspects, own_words = DOMAINS[domain]
    own_words, shared = own_words.split(", "), SHARED.split(", ")
    remarks = []
    for aspect in rng.sample(aspects.split(), rng.choice([1, 2, 2, 3])):
        said = grade
        if rng.random() < 0.15:
            said = min(4, max(0, grade + rng.choice([-1, 1])))
        words = own_words[said] if rng.random() < 0.6 else shared[said]
        remarks.append(rng.choice(FRAMES).format(aspect=aspect, word=rng.choice(words.split())))

    return f"{rng.choice(openings.split(', '))} . {' and '.join(remarks)} ."


def write_reviews(domain, count, rng):
    """`count` examples of a domain, the five grades in turn."""
    reviews = []
    for i in range(count):
        text = write_review(domain, i % 5, rng)
        reviews.append({"text": text, "label": i % 5, "domain": domain})
    return reviews


def write_demo(out, steps):
    """The demo in the folder `out`: reviews, a tokenizer, a tiny T5, source data in clusters, two
    tasks of domains that the source data has not, and for every script the arguments that suit
    this size."""
    rng = random.Random(0)
    corpus, source = [], []
    for domain in DOMAINS:
        corpus += write_reviews(domain, 1000, rng)
    for domain in SOURCE_DOMAINS:
        source += write_reviews(domain, 1000, rng)

    write_task(out / "source", Task("source", TEMPLATE, WORDS[5]), {"examples": source})
    for domain in TASK_DOMAINS:
        splits = {split: write_reviews(domain, 1000, rng) for split in ("train", "test")}
        write_task(out / domain, Task(domain, TEMPLATE, WORDS[5]), splits)

    write_task(out / "corpus", Task("corpus", TEMPLATE, WORDS[5]), {"train": corpus})
    for name, arguments in DEMO.items():
        write_json(out / f"{name}.json", arguments)

    shape = "--d-model 64 --d-ff 128 --heads 4 --layers 2 --max-length 48"
    how = f"--batch-size 32 --labelled 32 --excerpts 0.25 --max-steps {steps} --eval-every {steps}"
    machine = "--learning-rate 0.02 --dtype float32 --threads 1 --restart"
    corpus = ["--corpus", f"{out}/corpus/train.jsonl", "--task", f"{out}/corpus"]
    words = ["pretrain", *corpus, "--out", f"{out}/t5"]
    words += f"{shape} {how} {machine}".split()
    print(f"$ python data.py {' '.join(words)}", flush=True)
    main(words)

    config = out / "cluster.json"
    print(f"$ python cluster.py --config {config}", flush=True)
    script = Path(__file__).with_name("cluster.py")
    subprocess.run([sys.executable, script, "--config", config], check=True)


# The arguments that suit a T5 of this size, for each script; {here} is the folder they lie in.
SMALL = {"model": "{here}/t5", "prompt_length": 20, "max_length": 128, "threads": 1}
META = {**SMALL, "source": "{here}/source/clustered.jsonl", "validation": 400}
TUNE = {
    **SMALL,
    "task": [f"{{here}}/{domain}" for domain in TASK_DOMAINS],
    "out": "{here}/results.jsonl",
}
DEMO = {
    "cluster": {
        "source": "{here}/source/examples.jsonl",
        "out": "{here}/source/clustered.jsonl",
        "encoder": "{here}/t5",
        "k": 4,
    },
    "maml": {
        **META,
        "method": "maml",
        "out": "{here}/maml",
        "max_steps": 1000,
        "eval_every": 50,
        "tasks_per_pass": 4,
    },
    "ppt": {**META, "method": "ppt", "out": "{here}/ppt", "max_steps": 4000, "eval_every": 200},
    "pt": {**TUNE, "method": "pt", "prompt": ["random", "{here}/ppt", "{here}/maml"]},
    "ft": {**TUNE, "method": "ft", "learning_rate": 0.001},
}


def demo_stands(out):
    """Whether the demo is in a folder, whole: what is written last is there."""
    return Path(out, "source", "clustered.jsonl").exists()


def demo(out="demo", steps=1500, restart=False):
    """Makes the offline demo in the folder `out` where it is not there yet; returns the folder."""
    out = Path(out)
    if not restart and demo_stands(out):
        return out

    print(
        f"Making the offline demo in {out}/: reviews written by a small grammar in {len(DOMAINS)} "
        "domains and a tiny T5 pre-trained on them.\nNothing is downloaded; it takes about a "
        "minute.",
        flush=True,
    )
    try_place(out / "t5" / "config.json")
    (out / "source" / "clustered.jsonl").unlink(missing_ok=True)  # until it is whole again
    try:
        write_demo(out, steps)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command makes the demo again from its beginning")

    return out


# -------------------------------------------------- The command line, the same for every script


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults shown, defaults from a JSON file, and errors of
    one line."""

    def __init__(self, description=None, **kwargs):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=form, **kwargs
        )

    def add(self, flag, help, default=None, **kwargs):
        """Adds a flag whose help ends in its default."""
        if default not in (None, False):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help += f" (default: {shown})"
        self.add_argument(flag, help=help.replace("%", "%%"), default=default, **kwargs)

    def add_switch(self, flag, help):
        """Adds a flag without a value."""
        self.add(flag, help, False, action="store_true")

    def add_setting(self, flag, help, settings, **kwargs):
        """Adds a flag whose default depends on the method: settings[method][flag]."""
        name = flag.lstrip("-").replace("-", "_")
        defaults = [f"{method} {values[name]}" for method, values in settings.items()]
        self.add(flag, f"{help} (default: {', '.join(defaults)})", **kwargs)

    def add_config_flag(self):
        """The flag that parse() reads first."""
        self.add(
            "--config",
            "a JSON file of flags, as arguments.json of an earlier run; flags given beside it win, "
            "and {here} in it is its folder",
            metavar="FILE",
        )

    def add_device_flag(self):
        """The flag whose default parse() finds, since it takes PyTorch."""
        self.add("--device", "cpu or cuda (default: cuda where there is a GPU)", type=device)

    def add_machine_flags(self, max_length=MAX_LENGTH):
        """The flags that say where and how a script computes."""
        self.add_device_flag()
        self.add("--threads", "CPU threads (default: as PyTorch chooses)", type=whole(1))
        self.add(
            "--max-length", "tokens of a text at most; the rest is cut", max_length, type=whole(1)
        )

    def add_prompt_flags(self):
        """The flags of the scripts that train a prompt."""
        self.add_machine_flags()
        self.add("--prompt-length", "vectors of a random prompt", 100, type=whole(1))
        dtypes = ["float32", "bfloat16", "float64"]
        self.add(
            "--dtype", "of T5's weights; the prompt is float32 always", "float32", choices=dtypes
        )
        precision = "PyTorch's precision of float32 products; high is TF32 on a GPU"
        self.add("--matmul", precision, "highest", choices=["highest", "high", "medium"])
        self.add("--weight-decay", "of AdamW; the paper names none", 0.0, type=real(0))
        self.add_switch("--restart", "begins anew where an earlier run could be continued")

    def parse(self, argv=None):
        """The arguments: those of the file --config first, so that others win. Raises InputError
        for that file."""
        argv = sys.argv[1:] if argv is None else argv
        if "--config" in self._option_string_actions and not HELP:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--config")
            config = first.parse_known_args(argv)[0].config
            if config:
                self.prog += f" --config {config}"
                argv = self.flags_of(config, argv) + argv

        args = self.parse_args(argv)
        if "device" in args:
            args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        if "matmul" in args:
            torch.set_float32_matmul_precision(args.matmul)
        if getattr(args, "device", None) == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

        return args

    def flags_of(self, config, argv):
        """The flags that a JSON file of them stands for, without those that argv has too."""
        settings = read_json(config, "give a file of flags")
        known = {action.dest for action in self._actions} - {"help", "config"}
        folder, flags = str(Path(config).parent), []
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            if name not in known:
                raise InputError(f"{config}: {self.prog} has no flag {flag}; remove it")

            given = any(arg == flag or arg.startswith(f"{flag}=") for arg in argv)
            if given or value is None or value is False:
                continue

            values = value if isinstance(value, list) else [value]
            values = [str(one).replace("{here}", folder) for one in values]
            if value is True:
                flags.append(flag)
            elif isinstance(value, list):
                flags += [flag, *values]
            else:
                flags.append(f"{flag}={values[0]}")

        return flags

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


# What a flag takes, for `type=`: the range of a number stands where the flag is declared.


def whole(least, most=2**63 - 1):
    """A whole number from `least` to `most`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        limit = "" if most == 2**63 - 1 else f" and at most {most}"
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of {least} or more{limit}")

    return parse


def real(least, most=math.inf):
    """A finite number from `least` to `most`; without `most`, `least` itself may be given too."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most and math.isfinite(float(text)):
                return float(text)
        limit = "" if most == math.inf else f" and at most {most}"
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}{limit}")

    return parse


def positive(text):
    """A finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def device(text):
    """cpu, cuda, or cuda:1 and so on, where this PyTorch finds it."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    if text != "cpu" and not HELP and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this PyTorch finds no such GPU; give cpu")
    return text


def file(text):
    """A file that is there."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file")
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return text


def folder(text):
    """A folder that is there."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; give its folder")
    if not Path(text).is_dir():
        makers = "data.py makes tasks, train_meta.py prompts"
        raise argparse.ArgumentTypeError(f"{text}: no such folder; {makers}")
    return str(Path(text))  # without a slash at its end: results know a folder by its name


def folder_or(*words):
    """A folder that is there, or one of `words`, which a folder in reach is not taken for."""

    def parse(text):
        if text in words:
            return text
        found = folder(text)
        return str(Path(found).absolute()) if found in words else found

    return parse


def file_or_folder(text):
    """A file or a folder that is there."""
    return text if Path(text).is_dir() else file(text)


def picture(text):
    """A picture to write."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return text


def save_figure(path, figure):
    """Writes one of matplotlib's figures, beside its place first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"format": path.suffix[1:], "dpi": 100, "bbox_inches": "tight"}
    write_beside(path, lambda beside: figure.savefig(beside, **how))
    print(f"wrote {path}")


def try_place(path):
    """Raises InputError where the file `path` could not be written: before the work, not after."""
    path = Path(path).absolute()
    if path.is_dir():
        raise InputError(f"{path}: it is a folder; give a file")
    place = path.parent
    while not place.exists():
        place = place.parent
    with blame(path, "give another place"), tempfile.TemporaryFile(dir=place):
        pass


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_and_world():
    """This process's number and how many processes torchrun started; 0 and 1 without it. Clusters
    set some of its variables too: only all of them count. Raises InputError."""
    if any(name not in os.environ for name in TORCHRUN):
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise InputError(
            "RANK and WORLD_SIZE must be numbers; start it with torchrun, or unset them"
        )


def fill(args, settings):
    """The arguments, those that were not given taken from `settings`."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **settings, **given})


def save_arguments(path, args):
    """Writes the arguments that a script ran with as JSON, which scripts with --config read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in vars(args).items() if name not in ("config", "restart")}
    write_json(path, kept)


def check_arguments(path, args, more=()):
    """Sets the number of threads: that of the run that would be continued, whose digits depend on
    it. Raises InputError where that run had other arguments; those named in `more` may be larger
    than they were."""
    begun = path.exists() and not args.restart
    before = read_json(path, "--restart begins anew") if begun else {}
    args.threads = args.threads or before.get("threads") or torch.get_num_threads()
    free = {"config", "restart", "device", "tasks_per_pass", "search"}
    for name, value in vars(args).items():
        known = before.get(name) if begun else value
        longer = name in more and isinstance(known, int) and value >= known
        if name not in free and value != known and not longer:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{path}: this run began with {flag} {before.get(name)}, not {value}; give that "
                "again to continue it, or another --out, or --restart to begin anew"
            )

    with blame(path, "--restart begins anew", TypeError, RuntimeError):
        torch.set_num_threads(args.threads)


def save_state(out, tensors, optimizer, step, log, digests):
    """Writes what a continued run needs, tensors and the optimizer's state, in one safetensors file
    with numbers in its header; and the log, for a reader."""
    tensors = dict(tensors)
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value)

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {"facts": json.dumps({"step": step, "log": log, "digests": digests})}
    path = out / "checkpoint.safetensors"
    write_beside(path, lambda beside: save_file(tensors, beside, header))
    write_examples(out / "log.jsonl", log)


def load_state(out, tensors, optimizer, digests, restart):
    """Puts tensors and optimizer back as save_state found them; returns the step and the log, or a
    run's beginning where there is none. Raises InputError where it is broken, or was made from other
    files or another T5."""
    path = out / "checkpoint.safetensors"
    if restart or not path.exists():
        return 0, []

    with blame(path, "--restart begins anew", TypeError, RuntimeError, AttributeError):
        with safe_open(path, "pt") as file:
            facts = parse_json(file.metadata()["facts"])
            found = {name: file.get_tensor(name) for name in file.keys()}

        step, log = facts["step"], facts["log"]
        for line in log:
            if type(step) is not int or line["step"] > step or not 0 <= line["accuracy"] <= 1:
                raise ValueError("its log does not fit its step")

        if not log or any(found[name].shape != tensor.shape for name, tensor in tensors.items()):
            raise ValueError("it holds no evaluation, or tensors of another shape")

        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(found[name])

        state = collections.defaultdict(dict)
        for name in found:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state[int(i)][key] = found[name]

        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})

    check_digests(out, facts.get("digests", {}), digests)
    if rank_and_world()[0] == 0:
        print(f"{out} stands at step {step:,}", flush=True)

    return step, log


def check_digests(out, before, now):
    """Raises InputError where files or T5 of a run that is continued are not those it began with."""
    for file, found in now.items():
        if before.get(file) != found:
            message = f"not the one that the run in {out} began with"
            raise InputError(f"{file}: {message}; give another --out or --restart")


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
        "digests": {str(file): digest(file) for file in files},
    }


def digest(path):
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(t5):
    """The first 16 digits of the SHA-256 of a T5's weights, which tells it from another T5 that was
    in the same folder. Of any --dtype the same."""
    hashed = hashlib.sha256()
    for _, weights in sorted(t5.named_parameters()):
        weights = weights.detach().to("cpu", torch.bfloat16).contiguous()
        hashed.update(weights.view(torch.int16).numpy())
    return hashed.hexdigest()[:16]


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
    if not HELP:  # the scripts have their own bars, and errors of one line
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    try:
        if rank_and_world() == (0, 1) and not {"RANK", "WORLD_SIZE"}.isdisjoint(os.environ):
            message = "RANK or WORLD_SIZE is set, but not by torchrun: this is the only process"
            print(message, file=sys.stderr)
        main()
        sys.stdout.flush()
    except SystemExit:  # after --help, for one, where InputError is not imported
        raise
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
    command.add_argument("dataset", choices=DATASETS)
    source = "the official file, or the folder of them"
    command.add("--input", source, required=True, type=file_or_folder)
    command.add("--out", "the task folder to write", required=True, metavar="FOLDER")
    share = "where there is no test file: the share of the training split to test on"
    command.add("--test-share", share, 0.0, type=real(0, 0.9))


def add_labeller(command):
    """The flags of `labeller`."""
    base = "a sequence classifier's base by hub name or folder"
    validation = "training examples to validate on where there is no validation.jsonl"
    command.add("--task", "the task to train on", required=True, type=folder, metavar="FOLDER")
    command.add("--model", base, "FacebookAI/roberta-base")
    command.add("--out", "the folder to write", required=True, metavar="FOLDER")
    command.add("--learning-rate", "AdamW's", 2e-5, type=positive)
    command.add("--warmup", "steps up to the learning rate; it then falls", 500, type=whole(1))
    command.add("--batch-size", "examples of a step", 32, type=whole(1))
    command.add("--max-epochs", "epochs at most", 3, type=whole(1))
    command.add("--max-steps", "steps at most (default: as --max-epochs says)", type=whole(1))
    command.add("--eval-every", "steps between validations", 1000, type=whole(1))
    command.add("--patience", "validations without a better one until it stops", 5, type=whole(1))
    command.add("--validation", validation, 5000, type=whole(1))
    command.add_switch("--restart", "replaces the labeller that stands in --out")
    command.add("--seed", "of every draw", 1, type=whole(0))
    command.add_machine_flags()


def add_pseudo_label(command):
    """The flags of `pseudo-label`."""
    corpus = "OpenWebText's tar, other tars of .txt files, .txt or .jsonl files; packed or not"
    sure = "the least probability to keep a text: one value, or one for each class"
    many = "examples of each class at most (default: as many as the smallest class has)"
    labeller = "the folder that `labeller` wrote"
    command.add("--labeller", labeller, required=True, type=folder, metavar="FOLDER")
    command.add("--corpus", corpus, required=True, nargs="+", type=file, metavar="FILE")
    command.add("--out", "the source folder to write", required=True, metavar="FOLDER")
    command.add("--unit", "what becomes an example", "sentence", choices=list(UNITS))
    command.add("--share", "the share of the documents to read", 1.0, type=real(0, 1))
    command.add("--min-words", "shorter texts are dropped", 5, type=whole(1))
    command.add("--max-words", "longer texts are dropped", 200, type=whole(1))
    command.add("--confidence", sure, [0.9], type=real(0, 1), nargs="+")
    command.add("--per-class", many, type=whole(1))
    command.add("--batch-size", "texts of a forward pass", 64, type=whole(1))
    command.add_switch("--restart", "begins anew where an earlier run could be continued")
    command.add("--seed", "of the draw that balances", 1, type=whole(0))
    command.add_machine_flags()


def add_pretrain(command):
    """The flags of `pretrain`."""
    corpus = "text to pre-train on, in the form that pseudo-label takes"
    task = "tasks whose examples are a part of it, as text"
    held_out = "examples of a task to validate on where there is no validation.jsonl"
    command.add("--corpus", corpus, required=True, nargs="+", type=file, metavar="FILE")
    command.add("--task", task, required=True, nargs="+", type=folder, metavar="FOLDER")
    command.add("--out", "the folder to write", required=True, metavar="FOLDER")
    apart = (
        "tasks to keep out of it: texts that share eight words in a row with theirs are dropped; "
        "it takes some 10 KB of memory for each of their texts"
    )
    command.add("--exclude", apart, nargs="+", type=folder, metavar="FOLDER")
    command.add("--pieces", "of the tokenizer", 8000, type=whole(1))
    command.add("--d-model", "width of the T5", 192, type=whole(1))
    command.add("--d-ff", "width of its feed-forward layers", 512, type=whole(1))
    command.add("--heads", "its attention heads", 3, type=whole(1))
    command.add("--layers", "of the encoder", 3, type=whole(1))
    command.add("--decoder-layers", "of the decoder", 1, type=whole(1))
    command.add("--max-steps", "steps", 4000, type=whole(1))
    command.add("--batch-size", "windows of the corpus in a step", 16, type=whole(1))
    command.add("--labelled", "labelled examples in a step", 64, type=whole(1))
    command.add("--excerpts", "share of them cut to 1 to 3 sentences", 0.5, type=real(0, 1))
    command.add("--learning-rate", "Adafactor's", 0.01, type=positive)
    command.add("--warmup", "steps up to the learning rate; it then falls", 100, type=whole(1))
    command.add("--eval-every", "steps between validations", 250, type=whole(1))
    command.add("--validation", held_out, 500, type=whole(1))
    dtypes = ["float32", "bfloat16"]
    command.add("--dtype", "of the products (default: the faster one here)", choices=dtypes)
    command.add_switch("--restart", "begins anew where an earlier run could be continued")
    command.add("--seed", "of the weights and of every draw", 1, type=whole(0))
    command.add_machine_flags(64)


def add_demo(command):
    """The flags of `demo`."""
    command.add("--out", "the folder to write", "demo", metavar="FOLDER")
    command.add("--max-steps", "steps of pre-training its T5", 1500, type=whole(1))
    command.add_switch("--restart", "makes it anew")


def main(argv=None):
    """Runs one of the five commands."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert(commands.add_parser("convert", help="a dataset's official files as a task folder"))
    add_labeller(commands.add_parser("labeller", help="fine-tunes a sequence classifier on a task"))
    add_pseudo_label(commands.add_parser("pseudo-label", help="labels a corpus: source data"))
    add_pretrain(commands.add_parser("pretrain", help="a small T5 from nothing"))
    add_demo(commands.add_parser("demo", help="makes the offline demo"))
    args = parser.parse(argv)
    if args.command == "convert":
        try_place(Path(args.out) / "task.json")
        convert(args.dataset, args.input, args.out, args.test_share)
    elif args.command == "labeller":
        train_labeller(args)
    elif args.command == "pseudo-label":
        pseudo_label(args)
    elif args.command == "pretrain":
        args.dtype = args.dtype or fast_dtype(args.device)
        pretrain_t5(args)
    else:
        stood = demo_stands(args.out) and not args.restart
        made = demo(args.out, args.max_steps, args.restart)
        fate = "stands there already; --restart makes it anew" if stood else "is written"
        scripts = f"train_meta.py --config {made}/maml.json, finetune.py --config {made}/pt.json"
        print(f"{made}/ {fate}. Now python {scripts}")


if __name__ == "__main__":
    run(main)
