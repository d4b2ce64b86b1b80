"""
Source data and downstream tasks (Sections 4.1 and 5.1, Appendix C): official files in, JSON lines out.

    python data.py convert yelp5 --input yelp_review_full_csv.tgz --out tasks/yelp5    # or any other dataset
    python data.py labeller --task tasks/yelp5 --out labeller                          # RoBERTa, for pseudo-labels
    python data.py pseudo-label --labeller labeller --corpus openwebtext.tar.xz --out source
    python data.py demo                                                                # the offline demo, in demo/

A task is a folder: task.json (the template and the words), train.jsonl, test.jsonl and, where the dataset has one,
validation.jsonl. A line is an example, {"text": "...", "label": 0}, the label an index into the words.
"""

import argparse
import array
import collections
import contextlib
import csv
import datetime
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, T5Config,
                          T5ForConditionalGeneration)
from transformers.utils import logging as transformers_logging

from metapt import InputError, Task, first_line, parse_json, read_json, write_beside, write_json

transformers_logging.disable_progress_bar()  # the scripts have their own

MODEL = "google-t5/t5-base"  # Section 5.1
TEMPLATE = "{text} It was {mask}"  # the paper's, Section 3
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile,
          KeyError, RuntimeError)  # the last two of zipfile, for a name that is not there or a password
WORDS = {5: ["terrible", "bad", "okay", "good", "great"], 3: ["bad", "okay", "good"], 2: ["bad", "good"]}

# ------------------------------------------------------------------------------------------- examples as JSON lines


def open_packed(path):
    """A file for reading bytes; .gz and .xz are unpacked as they are read. A path may lead into a .zip or a tar, packed
    or not, as SST-2.zip/SST-2/train.tsv does."""
    path = Path(path)
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is None:
        file = open(path, "rb")
    elif zipfile.is_zipfile(archive):
        file = zipfile.ZipFile(archive).open(path.relative_to(archive).as_posix())
    else:
        tar = tarfile.open(archive, "r|*")  # read once from front to back
        file = next(tar.extractfile(member) for member in tar if member.isfile() and archive / member.name == path)
    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    return io.BufferedReader(unpack(file, "rb") if unpack else file, 2**20)


def numbered_lines(path):
    """Yields (number, line) of a UTF-8 text file as open_packed reads it. Raises InputError with file and line."""
    number = 0
    try:
        with open_packed(path) as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise ValueError("it holds a NUL byte")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except ValueError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text: {error}; save it as UTF-8")
    except BROKEN as error:
        raise InputError(f"{path}:{number + 1}: broken or cut off here: {error}")


def read_examples(path, task, labelled=True):
    """Yields the examples of a .jsonl file, or of a .txt file with a text on each line; .gz and .xz too.
    Every field of the task's template must be there and, where `labelled`, a label that is an index into its words.
    Raises InputError with the file and the line."""
    plain = unpacked_name(path).endswith(".txt")
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            example = {"text": line.strip()} if plain else parse_json(line)
        except ValueError as error:
            raise InputError(f'{path}:{number}: not a JSON object, as {{"text": "...", "label": 0}}: {error}')
        if problem := example_problem(example, task, labelled):
            raise InputError(f"{path}:{number}: {problem}")
        yield example


def unpacked_name(path):
    return re.sub(r"\.(gz|xz)$", "", Path(path).name)


def example_problem(example, task, labelled):
    """What keeps a value from being an example of `task`, or None."""
    if not isinstance(example, dict):
        return 'not a JSON object, as {"text": "...", "label": 0}'
    for field in task.fields:
        if not isinstance(example.get(field), str) or not example[field].strip():
            return f"the template of task {task.name} needs {field!r} to be a text here"
    label = example.get("label")
    if labelled and (type(label) is not int or not 0 <= label < len(task.words)):
        return f"label {label!r} is not one of 0 to {len(task.words) - 1}, the indices of {task.words}"
    confidence, cluster = example.get("confidence", 1), example.get("cluster", 0)
    if type(confidence) not in (int, float) or not 0 <= confidence <= 1 or type(cluster) is not int:
        return f"confidence {confidence!r} is not a number from 0 to 1, or cluster {cluster!r} not a whole one"


def write_examples(path, examples):
    """Writes JSON lines, beside `path` first and then renamed."""
    def write(beside):
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    write_beside(path, write)


def write_task(folder, task, splits):
    """Writes task.json and a .jsonl file for each split."""
    with folder_beside(folder) as beside:
        for split, examples in splits.items():
            write_examples(beside / f"{split}.jsonl", examples)
        task.save(beside)


@contextlib.contextmanager
def folder_beside(folder):
    """A new folder to fill, whose files move to `folder` at the end: all of them, or on an error none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        yield Path(beside)
        folder.mkdir(exist_ok=True)
        for file in Path(beside).iterdir():
            os.replace(file, folder / file.name)


def few_shot(examples, shots, seed, validation_shots=None, balanced=False):
    """Section 5.1's split: `shots` examples to train on and validation_shots others (default: as many) to validate
    on, drawn at random with `seed`; `balanced` draws equally from every class. Raises InputError."""
    validation_shots = shots if validation_shots is None else validation_shots
    if shots + validation_shots > len(examples):
        raise InputError(f"{shots} + {validation_shots} examples cannot be drawn from the {len(examples)} of "
                         "train.jsonl; lower --shots")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    if balanced:  # every class's first example, then every class's second, ...
        seen = collections.Counter()
        rank = {}
        for index in order:
            rank[index] = seen[examples[index]["label"]]
            seen[examples[index]["label"]] += 1
        order.sort(key=rank.get)
    drawn = [examples[index] for index in order[:shots + validation_shots]]
    return drawn[:shots], drawn[shots:]


# ------------------------------------------------------- readers: official files in, (text, label or why dropped) out


def read_sst(path, classes):
    """Stanford Sentiment Treebank, one bracketed tree a line; the root's digit is the grade. With 2 classes the
    neutral sentences are dropped."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        tokens = re.findall(r"\([0-4] ([^()]+)\)", line)
        if not re.match(r"\s*\([0-4] ", line) or not tokens or line.count("(") != line.count(")"):
            raise InputError(f"{path}:{number}: not a tree, as (3 (2 It) (4 works)); give the official trees")
        text = " ".join(tokens).replace("\xa0", " ").replace("-LRB-", "(").replace("-RRB-", ")")
        grade = int(line.lstrip()[1])
        label = grade if classes == 5 else {0: 0, 1: 0, 3: 1, 4: 1}.get(grade, "neutral")
        yield re.sub(r"\\([/*])", r"\1", text), label


def read_sst2(path):
    """SST-2 from the trees, or from GLUE's .tsv with its header, where quotes are text like any other."""
    if not unpacked_name(path).endswith(".tsv"):
        yield from read_sst(path, 2)
        return
    for number, line in numbered_lines(path):
        text, _, label = line.rstrip("\r\n").rpartition("\t")
        if (text, label) != ("sentence", "label") if number == 1 else label not in ("0", "1"):
            raise InputError(f"{path}:{number}: not GLUE's sentence, tab, label; give its train.tsv and dev.tsv")
        if number > 1:
            yield text.strip(), int(label)


def read_zhang(path, classes):
    """Yelp and Amazon reviews of Zhang et al. (2015): the class from 1, then the text, or a title and the text. Quotes
    are doubled, as in any CSV, and have a backslash before them too; a backslash and an n are a new line."""
    rows = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    labels = {str(label + 1): label for label in range(classes)}
    try:
        for row in filter(None, rows):
            if len(row) not in (2, 3) or row[0] not in labels:
                raise InputError(f"{path}:{rows.line_num}: not a class from 1 to {classes} and one or two texts; "
                                 "give the official file")
            texts = [text.replace('\\"', '"').replace("\\n", "\n").strip() for text in row[1:]]
            yield " ".join(filter(None, texts)), labels[row[0]]
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not the CSV of the official files: {error}")


def read_sentihood(path):
    """SentiHood: a JSON array of sentences with opinions on aspects. A sentence is kept where they all agree."""
    try:
        sentences = parse_json(open_packed(path).read().decode("utf-8-sig"))
        for item in sentences:
            yield item["text"].strip(), agreed([opinion["sentiment"] for opinion in item["opinions"]],
                                               {"Negative": 0, "Positive": 1})
    except (ValueError, KeyError, TypeError, AttributeError, *BROKEN) as error:
        raise InputError(f"{path}: not the array of SentiHood, [{{text, opinions: [{{sentiment}}]}}]: {error!r}")


def read_semeval(path):
    """SemEval-2016 task 5, subtask 1: XML with opinions in each sentence. A sentence is kept where they all agree."""
    try:
        root = ElementTree.fromstring(open_packed(path).read())  # bytes, so that the XML names its own encoding
    except (ElementTree.ParseError, ValueError, LookupError, *BROKEN) as error:
        raise InputError(f"{path}: not the XML of SemEval-2016 task 5: {error}")
    for sentence in root.iter("sentence"):
        text = (sentence.findtext("text") or "").strip()
        polarities = [opinion.get("polarity") for opinion in sentence.iter("Opinion")]
        if sentence.get("OutOfScope", "").lower() == "true":
            yield text, "out of scope"
        else:
            yield text, agreed(polarities, {"negative": 0, "neutral": 1, "positive": 2})


def agreed(opinions, labels):
    """The label of a sentence whose opinions are all the same; otherwise why it is dropped."""
    if not opinions:
        return "no opinion"
    if unknown := [opinion for opinion in opinions if opinion not in labels]:
        return f"unknown opinion {unknown[0]!r}"
    return labels[opinions[0]] if len(set(opinions)) == 1 else "mixed opinions"


# Appendix C: task -> classes, reader, and how the official file of each split may be called
TREES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
ZHANG = {"train": "train.csv", "test": "test.csv"}
DATASETS = {
    "sst5": (5, lambda path: read_sst(path, 5), TREES),
    "sst2": (2, read_sst2, {"train": "train.txt train.tsv", "validation": "dev.txt", "test": "test.txt dev.tsv"}),
    "yelp5": (5, lambda path: read_zhang(path, 5), ZHANG),
    "amazon5": (5, lambda path: read_zhang(path, 5), ZHANG),
    "amazon2": (2, lambda path: read_zhang(path, 2), ZHANG),
    "sentihood": (2, read_sentihood, {"train": "*train*.json", "validation": "*dev*.json", "test": "*test*.json"}),
    "semeval_restaurant": (3, read_semeval, {"train": "*Rest*Train*.xml", "test": "*REST*TEST*.gold"}),
    "semeval_laptop": (3, read_semeval, {"train": "*Lap*Train*.xml", "test": "*LAPT*TEST*.gold"}),
}


def convert(name, source, out, test_share):
    """Writes the task folder `out` from a dataset's official file, the folder of them or the archive of them, and
    prints what of each split was kept and what was dropped, and why."""
    classes, reader, patterns = DATASETS[name]
    files = find_splits(Path(source), patterns)
    counts = {split: collections.Counter() for split in files}  # of labels, and of reasons to drop

    def examples(split):
        counts[split].clear()
        for text, label in tqdm(reader(files[split]), f"{name} {split}", unit=" lines", disable=None):
            label = "empty text" if not text and type(label) is int else label
            counts[split][label] += 1
            if type(label) is int:
                yield {"text": text, "label": label}
        if not any(type(label) is int for label in counts[split]):
            raise InputError(f"{files[split]}: no labelled text for {split} here; give the official file of {name}")

    splits = {split: examples(split) for split in files}
    if test_share and "test" not in splits:  # a random share, always the same, drawn once their number is known
        count = sum(1 for _ in examples("train"))
        test = np.random.default_rng(0).permutation(count) < round(test_share * count)
        splits["train"] = itertools.compress(examples("train"), ~test)
        splits["test"] = itertools.compress(examples("train"), test)
        print(f"no test file: {test.sum():,} of the training examples are drawn to be the test split")
    write_task(Path(out), Task(name, TEMPLATE, WORDS[classes]), splits)
    for split, path in files.items():
        kept = {word: counts[split].pop(label, 0) for label, word in enumerate(WORDS[classes])}
        print(f"{path}: kept {sum(kept.values()):,} for {split}: "
              + ", ".join(f"{count:,} {word}" for word, count in kept.items()) + "; dropped "
              + (", ".join(f"{count:,} ({why})" for why, count in counts[split].items()) or "none"))
    print(f"wrote {out}: task.json and {', '.join(f'{split}.jsonl' for split in splits)}")


def find_splits(source, patterns):
    """The official file of each split in a folder, a .zip or a tar; a file of another name is the training split."""
    try:
        if source.is_dir():
            files = sorted(source.iterdir())
        elif zipfile.is_zipfile(source):
            files = [source / name for name in zipfile.ZipFile(source).namelist() if not name.endswith("/")]
        elif tarfile.is_tarfile(source):
            files = [source / member.name for member in tarfile.open(source) if member.isfile()]
        else:
            files = [source]
        files = [file for file in files if source in (file, *file.parents)]  # an absolute name would leave the archive
    except (OSError, *BROKEN) as error:
        raise InputError(f"{source}: broken, cut off or not there: {error}")
    found = {split: file for split, names in patterns.items() for name in names.split() for file in reversed(files)
             if fnmatch.fnmatchcase(unpacked_name(file), name)}
    if not found and files != [source]:
        raise InputError(f"{source}: no file of this dataset here; looked for {', '.join(patterns.values())}")
    return found or {"train": source}


# ------------------------------------------------------------ pseudo-labels (Section 4.1): a labeller, then a corpus


def load_classifier(name, device, **arguments):
    """A sequence classifier by hub name or folder, and its tokenizer. Reads safetensors only. Raises InputError."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, **arguments)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises all kinds
        raise InputError(f"{name}: cannot be loaded as a sequence classifier: {first_line(error)}")


@torch.no_grad()
def classify(model, tokenize, texts, batch_size):
    """Each text's label and its confidence, the label's probability: two lists. Texts of like length share a batch, so
    that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = (tokenize([texts[i] for i in order[j:j + batch_size]]) for j in range(0, len(texts), batch_size))
    logits = torch.cat([model(**batch.to(model.device)).logits for batch in batches])
    confidences, labels = logits.float().softmax(-1)[np.argsort(order)].max(-1)
    return labels.tolist(), confidences.tolist()


def train_labeller(args):
    """The labeller of Section 5.1: fine-tunes a sequence classifier on a task folder and writes the best by accuracy on
    validation.jsonl, or else on args.validation training examples, with its tokenizer and the task, to args.out."""
    out, folder, task = Path(args.out), Path(args.task), Task.load(args.task)
    splits = [[(" ".join(example[field] for field in task.fields), example["label"])
               for example in read_examples(folder / name, task)]
              for name in ("train.jsonl", "validation.jsonl") if name == "train.jsonl" or (folder / name).exists()]
    if len(splits) == 1:
        np.random.default_rng(args.seed).shuffle(splits[0])
        splits = splits[0][args.validation:], splits[0][:args.validation]
    if not all(splits):
        raise InputError(f"{folder}: no examples to train on or none to validate on; change --validation")
    training, (texts, truths) = splits[0], zip(*splits[1])
    torch.manual_seed(args.seed)  # of the classifier's new layer too
    kind = {"num_labels": len(task.words), "ignore_mismatched_sizes": True}
    model, tokenizer = load_classifier(args.model, args.device, **kind)
    tokenize = partial(tokenizer, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    total = args.max_steps or args.max_epochs * -(-len(training) // args.batch_size)
    best, log = {"step": 0, "accuracy": -1.0}, []
    batches = (rows for _ in itertools.count() for rows in torch.randperm(len(training)).split(args.batch_size))
    with StopSignal() as stop, tqdm(total=total, desc="labeller", disable=None) as bar:
        for step, rows in enumerate(itertools.islice(batches, total), 1):
            inputs, labels = zip(*(training[i] for i in rows))
            optimizer.param_groups[0]["lr"] = args.learning_rate * linear_schedule(step - 1, total, args.warmup)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                logits = model.train()(**tokenize(inputs).to(args.device)).logits
            torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels).to(args.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if stop or step % args.eval_every == 0 or step == total:
                accuracy = np.mean(np.array(classify(model.eval(), tokenize, texts, 2 * args.batch_size)[0]) == truths)
                log.append({"step": step, "accuracy": float(accuracy)})
                if accuracy > best["accuracy"]:
                    best = log[-1]
                    with folder_beside(out) as beside:
                        model.save_pretrained(beside)
                        tokenizer.save_pretrained(beside)
                        task.save(beside)
                write_examples(out / "log.jsonl", log)
                save_arguments(out / "arguments.json", args)
                bar.set_postfix(accuracy=f"{accuracy:.3f}", best=f"{best['accuracy']:.3f}")
            if stop:
                raise KeyboardInterrupt(f"stopped at step {step:,}; {out} holds the best so far; --model {out} goes on")
            if step - best["step"] >= args.patience * args.eval_every:
                break
    largest = max(truths.count(label) for label in truths) / len(truths)
    print(f"wrote {out}: the labeller of step {best['step']:,} of {step:,}, validation accuracy "
          f"{100 * best['accuracy']:.1f} % on {len(truths):,} examples (the largest class: {100 * largest:.1f} %)")


# The ends of a corpus's units: a paragraph is a line, a sentence ends before a capital, but not in "Mr. A. Smith".
UNITS = {"paragraph": r"\n", "sentence": r"""\n|(?:(?<=[.!?])|(?<=[.!?]["”')]))(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr)\.)"""
                                         r"""(?<!\bMrs\.)\s+(?=["“'(]?[A-Z0-9])"""}


def read_corpus(paths, unit, share=1.0):
    """Yields the paragraphs or sentences of a random `share` of the documents in corpora: .txt and .jsonl files, or
    tars of .txt files, in further tars or not, as OpenWebText is. None stands for no text. Raises InputError."""
    rng = random.Random(0)
    for document in itertools.chain.from_iterable(map(read_documents, paths)):
        if rng.random() < share:
            for text in [None] if document is None else re.split(UNITS[unit], document):
                if text is None or text.strip():
                    yield text and " ".join(text.split())


def read_documents(path):
    try:
        if tarfile.is_tarfile(path):
            with open(path, "rb") as file:
                yield from read_tar(file)
        else:
            yield from (example["text"] for example in read_examples(path, Task("corpus", TEMPLATE, WORDS[2]), False))
    except (TypeError, *BROKEN) as error:  # of tarfile, where a gzip header is cut off
        raise InputError(f"{path}: broken or cut off: {error}")


def read_tar(file):
    """Yields the documents of a tar, and of the tars in it, from front to back; nothing is unpacked to disk."""
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            tar.members.clear()  # where every header would be kept
            if member.size > 2**33:  # a lie, which skipping to its end would take forever to find out
                raise tarfile.ReadError(f"its member {member.name} would have {member.size:,} bytes")
            if not member.isfile() or member.issparse():
                continue
            if member.name.endswith((".xz", ".gz", ".tar", ".tgz")):
                yield from read_tar(tar.extractfile(member))
            else:
                try:
                    yield tar.extractfile(member).read().decode("utf-8") if member.name.endswith(".txt") else None
                except UnicodeDecodeError:
                    yield None


def pseudo_label(args):
    """Section 4.1: labels a corpus, keeps what the labeller is sure of, and draws equally from every class. Each
    process under torchrun labels its share; the first writes the one output. Raises InputError."""
    rank, world = rank_and_world()
    out, task = Path(args.out), Task.load(args.labeller)
    if len(task.fields) != 1 or len(args.confidence) not in (1, len(task.words)):
        raise InputError(f"{args.labeller}: --confidence takes 1 or {len(task.words)} values; a template, one field")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model, tokenizer = load_classifier(args.labeller, args.device, dtype=dtype)
    if model.config.num_labels != len(task.words):
        raise InputError(f"{args.labeller}: its classifier has {model.config.num_labels} labels, its task "
                         f"{len(task.words)} words; train it again with data.py labeller")
    tokenize = partial(tokenizer, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    out.mkdir(parents=True, exist_ok=True)
    parts = [out / f"unbalanced-{i}-of-{world}.jsonl" for i in range(world)]
    label_share(args, task, parts[rank], lambda texts: classify(model, tokenize, texts, args.batch_size))
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    kept, counts = balance(parts, task, args.per_class, args.seed)
    states = [read_json(part.with_suffix(".json"), "--restart begins anew") for part in parts]
    funnel = dict(sum((collections.Counter(state["funnel"]) for state in states), collections.Counter())) | counts
    examples = itertools.chain.from_iterable(read_examples(part, task) for part in parts)
    write_task(out, Task("source", task.template, task.words), {"examples": itertools.compress(examples, kept)})
    save_arguments(out / "arguments.json", args)
    write_json(out / "funnel.json", funnel)
    print("\n".join(f"{count:14,} {step}" for step, count in funnel.items()))
    print(f"wrote {out}: task.json and examples.jsonl, equally many of each of {len(task.words)} classes; "
          f"{parts[0].name} {'and others hold' if world > 1 else 'holds'} those before balancing")


def label_share(args, task, part, classify):
    """Labels this process's texts of the corpus and appends those that it is sure of to the file `part`. A file beside
    it says how far that went, so that the same command continues there."""
    rank, world = rank_and_world()
    settings = {name: getattr(args, name) for name in ("labeller", "unit", "share", "min_words", "max_words",
                                                       "max_length", "confidence")}
    settings["corpus"] = [[path, os.stat(path).st_size] for path in args.corpus]
    progress = part.with_suffix(".json")
    if args.restart or not progress.exists():
        write_json(progress, {"settings": settings, "bytes": 0, "done": False, "funnel": {"read": 0}})
    state = read_json(progress, "--restart begins anew")
    kinds = [type(state.get(key)) for key in ("bytes", "done", "funnel")]
    if state.get("settings") != settings or kinds != [int, bool, dict] or state["bytes"] < 0:
        raise InputError(f"{progress}: broken, or from another corpus or other flags; --restart begins anew")
    funnel = collections.Counter(state["funnel"])
    confidence = args.confidence * (len(task.words) if len(args.confidence) == 1 else 1)
    texts = read_corpus(args.corpus, args.unit, args.share)
    texts = itertools.islice(texts, rank + world * funnel["read"], None, world)
    with StopSignal() as stop, open(part, "ab") as file, tqdm(
            desc="pseudo-label", unit=" texts", initial=funnel["read"], disable=None) as bar:
        file.truncate(state["bytes"])
        file.seek(0, os.SEEK_END)
        while not state["done"]:
            block = list(itertools.islice(texts, 32 * args.batch_size))
            words = [-1 if text is None else text.count(" ") + 1 for text in block]
            fit = [text for text, n in zip(block, words) if args.min_words <= n <= args.max_words]
            for text, label, p in zip(fit, *(classify(fit) if fit else ())):
                example = {task.fields[0]: text, "label": label, "confidence": round(p, 4)}
                if p >= confidence[label]:
                    file.write((json.dumps(example, ensure_ascii=False) + "\n").encode())
                funnel["unsure"] += p < confidence[label]
            file.flush()
            funnel.update({"read": len(block), "not text": words.count(-1), "too short": sum(
                0 < n < args.min_words for n in words), "too long": sum(n > args.max_words for n in words)})
            state.update(bytes=file.tell(), done=not block, funnel=funnel)
            write_json(progress, state)
            bar.update(len(block))
            if stop and block:
                raise KeyboardInterrupt(f"stopped after {funnel['read']:,} texts and saved; the same command continues")


def balance(parts, task, per_class, seed):
    """Which lines of the files `parts` to keep, [N] bool: no duplicates, and as many of every class, drawn at random,
    as the smallest has or per_class says; and what became of all. Holds about 9 bytes a line. Raises InputError."""
    hashes, labels = array.array("Q"), array.array("B")
    for part in parts:
        for example in read_examples(part, task):
            text = example[task.fields[0]].lower().encode()
            hashes.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"))
            labels.append(example["label"])
    labels = np.array(labels)
    first = np.unique(np.array(hashes), return_index=True)[1]
    sizes = np.bincount(labels[first], minlength=len(task.words))
    if 0 in sizes:
        raise InputError(f"{parts[0]}: none of class {task.words[sizes.argmin()]!r}; --restart with lower --confidence")
    print("sure of: " + ", ".join(f"{size:,} {word}" for size, word in zip(sizes, task.words)))
    kept = np.zeros(len(labels), dtype=bool)
    for label in range(len(sizes)):
        count = min(sizes.min(), per_class or sizes.min())
        kept[np.random.default_rng(seed).permutation(np.sort(first[labels[first] == label]))[:count]] = True
    return kept, {"duplicate": len(labels) - len(first), "dropped by balancing": len(first) - int(kept.sum()),
                  "kept": int(kept.sum())}


# -------------------------------------------------------------------- the offline demo: reviews written by a grammar

# Words for each grade, from terrible to great. SHARED ones are used of everything.
SHARED = ["awful horrible dreadful pathetic", "poor weak disappointing mediocre", "fine average ordinary acceptable",
          "nice pleasant solid enjoyable", "excellent wonderful superb fantastic"]
DOMAINS = {  # domain: how its reviews may open, its aspects, and its own words for each grade
    "films": (["we watched it last night .", "my sister took me to the cinema ."],
              "plot acting ending script music camera",
              ["unwatchable incoherent", "dull clumsy", "predictable watchable", "funny moving", "gripping masterful"]),
    "restaurants": (["we had dinner there on sunday .", "the table was booked for two ."],
                    "soup waiter dessert menu pasta kitchen",
                    ["inedible rancid", "bland greasy", "edible filling", "tasty fresh", "delicious exquisite"]),
    "laptops": (["i bought this computer for work .", "it came with windows installed ."],
                "keyboard battery screen fan processor trackpad",
                ["unusable defective", "sluggish noisy", "standard usable", "quick sturdy", "blazing flawless"]),
    "hotels": (["we stayed for three nights .", "the place is near the beach ."],
               "room bed pool lobby shower breakfast",
               ["filthy infested", "cramped shabby", "basic functional", "comfortable clean", "luxurious immaculate"]),
    "books": (["i read it in one week .", "this novel was a present ."],
              "prose chapter hero dialogue cover style",
              ["unreadable illiterate", "tedious shallow", "readable conventional", "clever warm",
               "brilliant timeless"]),
    "games": (["i played it for ten hours .", "my son has it on his console ."],
              "level combat puzzle graphics quest controls",
              ["unplayable broken", "repetitive buggy", "playable simple", "fun challenging", "addictive stunning"]),
}
SOURCE_DOMAINS, TASK_DOMAINS = ["films", "restaurants", "laptops", "hotels"], ["books", "games"]
FRAMES = ["the {aspect} was {word}", "i found the {aspect} {word}", "we thought the {aspect} was really {word}",
          "{word} {aspect}", "the {aspect} seemed {word} to me", "my friend called the {aspect} {word}"]


def write_review(domain, grade, rng):
    """A review of one to three remarks, whose words mostly agree with its grade."""
    openings, aspects, own_words = DOMAINS[domain]
    remarks = []
    for aspect in rng.sample(aspects.split(), rng.choice([1, 2, 2, 3])):
        said = min(4, max(0, grade + rng.choice([-1, 1]))) if rng.random() < 0.15 else grade
        words = own_words[said] if rng.random() < 0.6 else SHARED[said]
        remarks.append(rng.choice(FRAMES).format(aspect=aspect, word=rng.choice(words.split())))
    return f"{rng.choice(openings)} {' and '.join(remarks)} ."


def write_reviews(domain, count, rng):
    return [{"text": write_review(domain, grade := i % 5, rng), "label": grade, "domain": domain}
            for i in range(count)]


def demo_tokenizer(texts):
    """A tokenizer with a piece for every word of the texts, </s> at the end and T5's sentinels."""
    sentinels = [f"<extra_id_{i}>" for i in range(20)]
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *words, *sentinels])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", extra_special_tokens=sentinels)


def corrupt(ids, sentinels, rng, closing):
    """T5's span corruption of one text: (input ids, target ids). Spans of about 15 % of the text are replaced by
    sentinels; a text whose `closing` is set loses only its last word, the one that sums the review up."""
    if closing:
        return ids[:-1] + [sentinels[0], 1], [sentinels[0], ids[-1], sentinels[1], 1]
    source, target, i, used = [], [], 0, 0
    while i < len(ids):
        if rng.random() < 0.1 and used < len(sentinels) - 1:
            length = rng.choice([1, 1, 2, 3])
            source.append(sentinels[used])
            target += [sentinels[used], *ids[i:i + length]]
            used, i = used + 1, i + length
        else:
            source.append(ids[i])
            i += 1
    return source + [1], target + [sentinels[used], 1]


def pretrain_demo_t5(texts, tokenizer, steps, rng, batch_size=64):
    """A tiny T5 trained from nothing by span corruption on texts of which many end in "it was good"."""
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2, num_decoder_layers=1,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    closed = [bool(re.search(r"it was \w+$", text)) for text in texts]
    optimizer = torch.optim.AdamW(t5.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)

    def padded(rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    for _ in tqdm(range(steps), "pre-training the demo's T5", disable=None):
        chosen = rng.sample(range(len(texts)), batch_size)
        pairs = [corrupt(encoded[i], sentinels, rng, closed[i] and rng.random() < 0.5) for i in chosen]
        sources = padded([source for source, _ in pairs], 0)
        loss = t5(input_ids=sources, attention_mask=(sources != 0).long(),
                  labels=padded([target for _, target in pairs], -100), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"pre-trained a T5 of {sum(p.numel() for p in t5.parameters()) / 1e6:.2f} million parameters; "
          f"last loss {loss.item():.2f}")
    return t5.eval()


def write_demo(out, steps):
    """The demo in the folder `out`: reviews, a tokenizer, a tiny T5, source data in clusters, two tasks of domains
    that the source data has not, and for every script the arguments that suit this size."""
    rng = random.Random(0)
    corpus = [review for domain in DOMAINS for review in write_reviews(domain, 1000, rng)]
    texts = [review["text"] + f" it was {WORDS[5][review['label']]}" * (rng.random() < 0.5) for review in corpus]
    tokenizer = demo_tokenizer(texts)
    t5 = pretrain_demo_t5(texts, tokenizer, steps, rng)
    t5.save_pretrained(out / "t5")
    tokenizer.save_pretrained(out / "t5")

    source = [review for domain in SOURCE_DOMAINS for review in write_reviews(domain, 1000, rng)]
    write_task(out / "source", Task("source", TEMPLATE, WORDS[5]), {"examples": source})
    for domain in TASK_DOMAINS:
        splits = {"train": write_reviews(domain, 1000, rng), "test": write_reviews(domain, 1000, rng)}
        write_task(out / domain, Task(domain, TEMPLATE, WORDS[5]), splits)
    for name, arguments in demo_arguments(out).items():
        write_json(out / f"{name}.json", arguments)
    print(f"$ python cluster.py --config {out / 'cluster.json'}", flush=True)
    script = Path(__file__).with_name("cluster.py")
    subprocess.run([sys.executable, script, "--config", out / "cluster.json"], check=True)


def demo_arguments(out):
    """The arguments that suit a T5 of this size, for each script."""
    t5, clustered = str(out / "t5"), str(out / "source" / "clustered.jsonl")
    common = {"model": t5, "prompt_length": 20, "max_length": 64, "threads": 1}
    meta = {**common, "source": clustered, "validation": 400}
    tune = {**common, "task": [str(out / domain) for domain in TASK_DOMAINS], "out": str(out / "results.jsonl")}
    return {
        "cluster": {"source": str(out / "source" / "examples.jsonl"), "out": clustered, "encoder": t5, "k": 4},
        "maml": {**meta, "method": "maml", "out": str(out / "maml"), "max_steps": 1000, "eval_every": 50,
                 "tasks_per_pass": 4},
        "ppt": {**meta, "method": "ppt", "out": str(out / "ppt"), "max_steps": 4000, "eval_every": 200},
        "pt": {**tune, "method": "pt", "prompt": ["random", str(out / "ppt"), str(out / "maml")]},
        "ft": {**tune, "method": "ft", "learning_rate": 0.001},
    }


def demo(out="demo", steps=1500, restart=False):
    """Makes the offline demo in the folder `out` where it is not there yet, and returns the folder."""
    out = Path(out)
    if restart or not (out / "source" / "clustered.jsonl").exists():  # what is written last
        print(f"Making the offline demo in {out}/: reviews written by a small grammar in {len(DOMAINS)} domains and a "
              "tiny T5 pre-trained on them. Nothing is downloaded; it takes about a minute.", flush=True)
        write_demo(out, steps)
    return out


# ----------------------------------------------------------------------------------- what the scripts have in common


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults shown, defaults from a JSON file, and errors of one line."""

    def __init__(self, description=None, **kwargs):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add(self, flag, help, default=None, **kwargs):
        """Adds a flag whose help ends in its default."""
        if default not in (None, False):
            help += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        self.add_argument(flag, help=help.replace("%", "%%"), default=default, **kwargs)

    def add_config_flag(self):
        self.add("--config", "a JSON file of flags, as arguments.json of an earlier run; flags given beside it win",
                 metavar="FILE")

    def add_setting(self, flag, help, settings, **kwargs):
        """Adds a flag whose default depends on the method: settings[method][flag]."""
        name = flag.lstrip("-").replace("-", "_")
        help += f" (default: {', '.join(f'{method} {values[name]}' for method, values in settings.items())})"
        self.add_argument(flag, help=help, **kwargs)

    def add_model_flags(self):
        """The flags of the scripts that train a prompt."""
        self.add("--prompt-length", "vectors of a prompt that starts at random", 100, type=int)
        self.add("--max-length", "tokens of H(x) at most; longer texts are cut", 256, type=int)
        self.add("--dtype", "of the T5's weights; the prompt is float32 always", "float32",
                 choices=["float32", "bfloat16", "float64"])
        self.add("--device", "cpu or cuda", "cuda" if torch.cuda.is_available() else "cpu")
        self.add("--threads", "CPU threads; 0 takes the cores that are free", 0, type=int)
        self.add("--weight-decay", "of AdamW; the paper names none", 0.0, type=float)
        self.add("--restart", "begins anew where an earlier run could be continued", False, action="store_true")

    def parse(self, argv=None):
        """The arguments: those of the file --config come first, so that others win. Raises InputError."""
        argv = sys.argv[1:] if argv is None else argv
        if config := getattr(super().parse_known_args(argv)[0], "config", None):
            settings = read_json(config, "give a file of flags")
            known = {action.dest for action in self._actions} - {"help", "config"}
            if unknown := set(settings) - known:
                raise InputError(f"{config}: {self.prog} has no flag --{sorted(unknown)[0].replace('_', '-')}")
            self.prog += f" --config {config}"
            for name, value in settings.items():
                flag = f"--{name.replace('_', '-')}"
                if isinstance(value, list):
                    argv = [flag, *map(str, value), *argv]
                elif value is not None and value is not False:
                    argv = [flag if value is True else f"{flag}={value}", *argv]
        args = self.parse_args(argv)
        for name in ("batch_size", "eval_every", "max_length", "max_epochs", "patience", "accumulate", "shots", "k"):
            if np.min(value if (value := getattr(args, name, None)) is not None else 1) < 1:
                self.error(f"--{name.replace('_', '-')} {value} must be at least 1")
        if "threads" in args:
            torch.set_num_threads(args.threads or max(1, free_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if "cuda" in str(getattr(args, "device", None)) and not torch.cuda.is_available():
            self.error(f"--device {args.device}: this PyTorch finds no GPU; give --device cpu")
        if getattr(args, "device", None) == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def rank_and_world():
    """This process's number and how many processes torchrun started; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fill(args, settings):
    """The arguments, those that were not given taken from `settings`."""
    return argparse.Namespace(**{name: settings.get(name) if value is None else value
                                 for name, value in vars(args).items()})


def save_arguments(path, args):
    """Writes the arguments that a script ran with as JSON: a file for --config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: value for name, value in vars(args).items() if name not in ("config", "restart")})


def check_arguments(path, args):
    """Raises InputError where the run that wrote its arguments at `path`, and would be continued, had others."""
    if not path.exists() or args.restart:
        return
    before = read_json(path, "--restart begins anew")
    changed = [f"--{name.replace('_', '-')} {before.get(name)}, not {value}" for name, value in vars(args).items()
               if name not in ("config", "restart", "device", "threads", "tasks_per_pass", "search")
               and before.get(name) != value]
    if changed:
        raise InputError(f"{path}: this run began with {', '.join(changed)}; give it again, another --out or --restart")


def provenance(device, *files):
    """What a result can be traced by: versions, device, git commit (None without one) and the files' digests."""
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine() + " CPU"
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "device": name, "commit": commit and commit.stdout.strip() or None,
            "digests": {str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files}}


class StopSignal:
    """Within `with StopSignal() as stop`, Ctrl-C and SIGTERM only make `stop` true: the loop ends its step first."""

    def __enter__(self):
        self.stopped = False
        self.handlers = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        self.stopped = True

    def __bool__(self):
        return self.stopped

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def free_cores(interval=0.1):
    """How many of the cores that this process may use are idle, at least 1. A thread pool that is larger waits at
    every operation for its slowest thread, which can slow a tiny model a hundredfold."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count()
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}

    def idle_ticks():
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        return sum(int(row[4]) for row in rows if row[0] in mine)

    before = idle_ticks()
    time.sleep(interval)
    return max(1, min(len(mine), round((idle_ticks() - before) / (interval * os.sysconf("SC_CLK_TCK")))))


def linear_schedule(step, total, warmup=20):
    """The learning rate's factor at a step of Appendix A's linear scheduler: up over `warmup` steps, down to 0."""
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup))


def run(main):
    """Runs a script's main; bad input ends in one line on standard error and exit status 2."""
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(report(f"{Path(sys.argv[0]).name}: {error.filename or error}: no such file; check the path", 2))
    except (InputError, OSError, SafetensorError) as error:
        sys.exit(report(f"{Path(sys.argv[0]).name}: {error}", 2))
    except KeyboardInterrupt as stop:
        sys.exit(report(str(stop) or "stopped; the same command continues", 130))


def report(message, status):
    print(" ".join(message.split())[:1000], file=sys.stderr)
    return status


def add_machine_flags(command):
    command.add("--max-length", "tokens of a text at most; longer ones are cut", 256, type=int)
    command.add("--seed", "of every draw", 1, type=int)
    command.add("--device", "cpu or cuda", "cuda" if torch.cuda.is_available() else "cpu")
    command.add("--threads", "CPU threads; 0 takes the cores that are free", 0, type=int)


def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="a dataset's official files as a task folder")
    command.add_argument("dataset", choices=DATASETS)
    command.add("--input", "the official file, or the folder of them", required=True)
    command.add("--out", "the task folder to write", required=True, metavar="FOLDER")
    command.add("--test-share", "where there is no test file: the share of the training split to test on", 0.0,
                type=float)
    command = commands.add_parser("labeller", help="fine-tunes a sequence classifier on a task")
    command.add("--task", "the task folder to train on", required=True, metavar="FOLDER")
    command.add("--model", "a sequence classifier's base by hub name or folder", "FacebookAI/roberta-base")
    command.add("--out", "the folder to write", required=True, metavar="FOLDER")
    command.add("--learning-rate", "AdamW's", 2e-5, type=float)
    command.add("--warmup", "steps until the learning rate is reached; then it falls to 0", 500, type=int)
    command.add("--batch-size", "examples of a step", 32, type=int)
    command.add("--max-epochs", "epochs at most", 3, type=int)
    command.add("--max-steps", "steps at most (default: as --max-epochs says)", type=int)
    command.add("--eval-every", "steps between validations", 1000, type=int)
    command.add("--patience", "validations without a better one until it stops", 5, type=int)
    command.add("--validation", "training examples to validate on where there is no validation.jsonl", 5000, type=int)
    add_machine_flags(command)
    command = commands.add_parser("pseudo-label", help="labels a corpus: source data")
    command.add("--labeller", "the folder that `labeller` wrote", required=True, metavar="FOLDER")
    command.add("--corpus", "OpenWebText's tar, other tars of .txt files, .txt or .jsonl files; packed or not",
                required=True, nargs="+", metavar="FILE")
    command.add("--out", "the source folder to write", required=True, metavar="FOLDER")
    command.add("--unit", "what becomes an example", "paragraph", choices=["paragraph", "sentence"])
    command.add("--share", "the share of the documents to read, drawn at random", 1.0, type=float)
    command.add("--min-words", "shorter texts are dropped", 5, type=int)
    command.add("--max-words", "longer texts are dropped", 200, type=int)
    command.add("--confidence", "the least probability to keep a text: one value, or one for each class", [0.9],
                type=float, nargs="+")
    command.add("--per-class", "examples of each class at most (default: as many as the smallest class has)", type=int)
    command.add("--batch-size", "texts of a forward pass", 64, type=int)
    command.add("--restart", "begins anew where an earlier run could be continued", False, action="store_true")
    add_machine_flags(command)
    command = commands.add_parser("demo", help="makes the offline demo")
    command.add("--out", "the folder to write", "demo", metavar="FOLDER")
    command.add("--max-steps", "steps of pre-training its T5", 1500, type=int)
    command.add("--restart", "makes it anew", False, action="store_true")
    args = parser.parse(argv)
    if args.command == "convert":
        convert(args.dataset, args.input, args.out, args.test_share)
    elif args.command == "labeller":
        train_labeller(args)
    elif args.command == "pseudo-label":
        pseudo_label(args)
    else:
        print(f"wrote {demo(args.out, args.max_steps, args.restart)}/: now python train_meta.py, python finetune.py")


if __name__ == "__main__":
    run(main)
