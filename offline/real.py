"""
The inputs of the README's results on real text. From four downloads in the current folder,

    aclImdb_v1.tar.gz               film reviews, with 1 to 10 stars or unrated
    domain_sentiment_data.tar.gz    Amazon reviews of four domains, with 1, 2, 4 or 5 stars
    fudan-mtl-dataset.tar.gz        Amazon reviews of 14 domains, good, bad or unlabelled
    vaderSentiment-3.3.2.tar.gz     product reviews and editorials by the sentence, tweets: rated

    python offline/real.py

writes what data.py takes:

    imdb-unlabelled.txt, amazon-unlabelled.jsonl     small_t5.py --corpus
    tasks/stars, tasks/amazon-two, tasks/snippets    small_t5.py --task
    open.jsonl                                       pseudo-label --corpus
"""

import itertools
import random
import re
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from metapt import InputError, Task, blame, write_beside

INNER = "hutto_ICWSM_2014.tar.gz"  # the tar in VADER's that holds its sentences


def download(name, pattern, file=None):
    """Yields (match, text) of every file in a download, or in the tar in it, whose name fits a
    pattern. Raises InputError."""
    mend = "download it to the current folder, whole"
    with blame(name, mend, TypeError, *data.BROKEN), tarfile.open(name, fileobj=file) as tar:
        for member in tar:
            fits = re.search(pattern, member.name)
            if member.name.endswith(INNER):
                yield from download(name, pattern, tar.extractfile(member))
            elif fits and member.isfile():
                yield fits, decoded(tar.extractfile(member).read())


def decoded(content):
    """Bytes as text: a file of FDU-MTL may be no UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def one_line(text):
    """A text without its line breaks, HTML's too."""
    return " ".join(text.replace("<br />", " ").split())


# The readers yield (text, label); the label of an unrated text means nothing.


def imdb(kind):
    """IMDB: a review a file, its stars in the name. The label is 0, 1, 3 or 4 of five classes."""
    for place, text in download("aclImdb_v1.tar.gz", rf"/train/(?:{kind})/\d+_(\d+)\.txt$"):
        yield one_line(text), (int(place[1]) - 1) // 2


def amazon_stars():
    """The multi-domain sentiment dataset: reviews between tags, in no XML that a parser takes."""
    review = r"<rating>\s*(\d)\.0\s*</rating>.*?<review_text>(.*?)</review_text>"
    for _, text in download("domain_sentiment_data.tar.gz", r"/(positive|negative)\.review$"):
        for part in text.split("<review>")[1:]:
            found = re.search(review, part, re.S)
            if found:
                yield one_line(found[2]), int(found[1]) - 1


def parsed(pattern, line, name):
    """The groups of a line's pattern. Raises InputError."""
    found = re.match(pattern, line)
    if not found:
        raise InputError(f"{name}: not a line of this dataset: {line[:60]!r}; download it again")
    return found.groups()


def amazon_domains(split, line_pattern=r"([01])\t(.+)"):
    """FDU-MTL: a label, 0 or 1, and a review on a line. Not of its domains MR and imdb, which hold
    sentences of SST."""
    files = rf"/(?!MR|imdb)\w+\.task\.(?:{split})$"
    for place, text in download("fudan-mtl-dataset.tar.gz", files):
        for line in filter(str.strip, text.split("\n")):
            label, said = parsed(line_pattern, line, place.string)
            yield one_line(said), int(label or 0)


def vader(kind):
    """VADER's sentences: a number, the mean rating from -4 to 4, the text. Our cuts make five
    classes of it, the middle one of what is neutral: no other text here is "okay"."""
    files = rf"^hutto_ICWSM_2014/(?:{kind})_GroundTruth\.txt$"
    for place, text in download("vaderSentiment-3.3.2.tar.gz", files):
        for line in filter(str.strip, text.split("\n")):
            rating, said = parsed(r"\w+\t(-?[\d.]+)\t(.+)", line, place.string)
            yield said.strip(), sum(float(rating) >= cut for cut in (-1.5, -0.5, 0.5, 1.75))


def write_task(name, classes, pairs):
    """Writes a task folder of training examples. Raises InputError where there are none."""
    examples = [{"text": text, "label": label} for text, label in pairs]
    if not examples:
        raise InputError(f"tasks/{name}: its downloads hold nothing of it; download them again")
    task = Task(name, data.TEMPLATE, data.WORDS[classes])
    data.write_task(Path("tasks", name), task, {"train": examples})
    print(f"wrote tasks/{name}: {len(examples):,} examples", flush=True)


def main():
    """Writes the six inputs."""
    write_task("stars", 5, itertools.chain(imdb("pos|neg"), amazon_stars()))
    write_task("amazon-two", 2, amazon_domains("train|test"))
    write_task("snippets", 5, vader("amazonReviewSnippets|nytEditorialSnippets"))

    reviews = [text for text, _ in imdb("unsup")]
    text = "\n".join(reviews) + "\n"
    write_beside("imdb-unlabelled.txt", lambda beside: beside.write_text(text, "utf-8"))
    print(f"wrote imdb-unlabelled.txt: {len(reviews):,} reviews", flush=True)

    # An unlabelled review may stand alone on its line.
    pairs = amazon_domains("unlabel", r"(?:([01])\t)?(.+)")
    unlabelled = [{"text": text} for text, _ in pairs]
    data.write_lines("amazon-unlabelled.jsonl", unlabelled)
    print(f"wrote amazon-unlabelled.jsonl: {len(unlabelled):,} reviews")

    drawn = random.Random(1).sample(unlabelled, min(6000, len(unlabelled)))
    tweets = [{"text": text} for text, _ in vader("tweets")]
    data.write_lines("open.jsonl", tweets + drawn)
    print(f"wrote open.jsonl: {len(tweets):,} tweets and {len(drawn):,} reviews")


if __name__ == "__main__":
    data.Parser(__doc__).parse_args()
    data.run(main)
