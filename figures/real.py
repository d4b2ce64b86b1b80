"""
The inputs of the README's results on real text. From four downloads in the current folder,

    aclImdb_v1.tar.gz               film reviews, with 1 to 10 stars or unrated
    domain_sentiment_data.tar.gz    Amazon reviews of four domains, with 1, 2, 4 or 5 stars
    fudan-mtl-dataset.tar.gz        Amazon reviews of 14 domains, good, bad or unlabelled
    vaderSentiment-3.3.2.tar.gz     product reviews and editorials by the sentence, tweets: rated

    python figures/real.py

writes what data.py takes:

    imdb-unlabelled.txt, amazon-unlabelled.jsonl     pretrain --corpus
    tasks/stars, tasks/amazon-two, tasks/snippets    pretrain --task
    open.jsonl                                       pseudo-label --corpus
"""

import io
import itertools
import random
import re
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from metapt import InputError, Task, blame, write_beside

FILMS = ("MR", "imdb")  # domains of FDU-MTL that hold sentences of SST


def members(file, name):
    """Yields (name, text) of every file in a tar, and of those in its tars. Raises InputError."""
    give = f"give the whole {name}, downloaded to the current folder"
    with blame(name, give, TypeError, *data.BROKEN), tarfile.open(fileobj=file) as tar:
        for member in tar:
            if member.name.endswith("hutto_ICWSM_2014.tar.gz"):
                yield from members(io.BytesIO(tar.extractfile(member).read()), name)
            elif member.isfile() and "/._" not in member.name:
                yield member.name, decoded(tar.extractfile(member).read())


def decoded(content):
    """Bytes as text: some of FDU-MTL's files are no UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def download(name):
    """Yields (name, text) of every file in a download. Raises InputError."""
    with blame(name, "download it to the current folder"):
        file = open(name, "rb")
    with file:
        yield from members(file, name)


def one_line(text):
    """A text without its line breaks, HTML's too."""
    return " ".join(text.replace("<br />", " ").split())


def imdb(kind):
    """IMDB: a review a file, its stars in the name. The label is 0, 1, 3 or 4 of five classes, and
    that of an unrated review (stars 0) means nothing."""
    for name, text in download("aclImdb_v1.tar.gz"):
        place = re.search(rf"/train/({kind})/\d+_(\d+)\.txt$", name)
        if place:
            yield {"text": one_line(text), "label": (int(place[2]) - 1) // 2}


def amazon_stars():
    """The multi-domain sentiment dataset: reviews between tags, in no XML that a parser takes."""
    review = r"<rating>\s*(\d)\.0\s*</rating>.*?<review_text>(.*?)</review_text>"
    for name, text in download("domain_sentiment_data.tar.gz"):
        if name.endswith(("positive.review", "negative.review")):
            for part in text.split("<review>")[1:]:
                found = re.search(review, part, re.S)
                if found:
                    yield {"text": one_line(found[2]), "label": int(found[1]) - 1}


def parsed(pattern, line, name):
    """The groups of a line's pattern. Raises InputError."""
    found = re.match(pattern, line)
    if not found:
        raise InputError(f"{name}: not a line of this dataset: {line[:60]!r}; download it again")
    return found.groups()


def amazon_domains(*splits):
    """FDU-MTL: a label, 0 or 1, and a review on a line; an unlabelled review may stand alone."""
    for name, text in download("fudan-mtl-dataset.tar.gz"):
        domain, _, split = Path(name).name.partition(".task.")
        if split not in splits or domain in FILMS:
            continue
        pattern = r"(?:([01])\t)?(.+)" if split == "unlabel" else r"([01])\t(.+)"
        for line in filter(str.strip, text.split("\n")):
            label, said = parsed(pattern, line, name)
            yield {"text": one_line(said), "label": int(label or 0)}


def vader(*kinds):
    """VADER's sentences: a number, the mean rating from -4 to 4, the text. Our cuts make five
    classes of it, the middle one of what is neutral: no other text here is "okay"."""
    for name, text in download("vaderSentiment-3.3.2.tar.gz"):
        if name not in [f"hutto_ICWSM_2014/{kind}_GroundTruth.txt" for kind in kinds]:
            continue
        for line in filter(str.strip, text.split("\n")):
            rating, said = parsed(r"\w+\t(-?[\d.]+)\t(.+)", line, name)
            label = sum(float(rating) >= cut for cut in (-1.5, -0.5, 0.5, 1.75))
            yield {"text": said.strip(), "label": label}


def write_task(name, classes, examples):
    """Writes a task folder of training examples. Raises InputError where there are none."""
    examples = list(examples)
    if not examples:
        raise InputError(f"tasks/{name}: its downloads hold nothing of it; download them again")
    task = Task(name, data.TEMPLATE, data.WORDS[classes])
    data.write_task(Path("tasks", name), task, {"train": examples})
    print(f"wrote tasks/{name}: {len(examples):,} examples", flush=True)


def main():
    """Writes the six inputs."""
    write_task("stars", 5, itertools.chain(imdb("pos|neg"), amazon_stars()))
    write_task("amazon-two", 2, amazon_domains("train", "test"))
    write_task("snippets", 5, vader("amazonReviewSnippets", "nytEditorialSnippets"))

    reviews = [example["text"] for example in imdb("unsup")]
    text = "\n".join(reviews) + "\n"
    write_beside("imdb-unlabelled.txt", lambda beside: beside.write_text(text, "utf-8"))
    print(f"wrote imdb-unlabelled.txt: {len(reviews):,} reviews", flush=True)

    unlabelled = [{"text": example["text"]} for example in amazon_domains("unlabel")]
    data.write_examples("amazon-unlabelled.jsonl", unlabelled)
    print(f"wrote amazon-unlabelled.jsonl: {len(unlabelled):,} reviews")

    drawn = random.Random(1).sample(unlabelled, min(6000, len(unlabelled)))
    tweets = [{"text": example["text"]} for example in vader("tweets")]
    data.write_examples("open.jsonl", tweets + drawn)
    print(f"wrote open.jsonl: {len(tweets):,} tweets and {len(drawn):,} reviews")


if __name__ == "__main__":
    data.run(main)
