"""
The inputs of the README's results on real text. From four downloads in the current folder,

    aclImdb_v1.tar.gz               film reviews, with 1 to 10 stars or unrated
    domain_sentiment_data.tar.gz    Amazon reviews of four domains, with 1, 2, 4 or 5 stars
    fudan-mtl-dataset.tar.gz        Amazon reviews of 14 domains, good, bad or unlabelled
    vaderSentiment-3.3.2.tar.gz     product reviews and editorials by the sentence, tweets: rated

    python offline/real.py --apart tasks/sst2 tasks/sentihood

writes what the scripts take, in the order of the README's commands:

    source/examples.jsonl, tasks/apparel and five more    eight domains to learn from, six targets
    imdb-unlabelled.txt, amazon-unlabelled.jsonl          small_t5.py --corpus
    tasks/stars, tasks/amazon-two, tasks/snippets         small_t5.py --task
    open.jsonl                                            pseudo-label --corpus

What a T5 or a prompt learns from shares no eight words in a row with a target or with a task that
--apart names.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import script  # first: it sets how PyTorch takes its memory

import itertools
import random
import re
import tarfile

import data
from metapt import InputError, Task, input_errors, write_atomically

INNER = "hutto_ICWSM_2014.tar.gz"  # the tar in VADER's that holds its sentences
TARGETS = ["apparel", "baby", "books", "camera_photo", "music", "software"]
SOURCE = ["dvd", "electronics", "health_personal_care", "kitchen_housewares", "magazines"]
SOURCE += ["sports_outdoors", "toys_games", "video"]
TRAINING = 900  # examples of a target to draw from; the rest is its test


# The readers yield (text, label); the label of an unrated text means nothing.


def download(name, pattern, file=None):
    """Yields (match, text) of every file in a download, or in the tar in it, whose name fits a
    pattern. Raises InputError."""
    hint = "download it to the current folder, whole"
    with input_errors(name, hint), tarfile.open(name, fileobj=file) as tar:
        for member in tar:
            match = re.search(pattern, member.name)
            if member.name.endswith(INNER):
                yield from download(name, pattern, tar.extractfile(member))
            elif match and member.isfile():
                content = tar.extractfile(member).read()
                try:
                    yield match, content.decode()
                except UnicodeDecodeError:  # some of FDU-MTL's are no UTF-8
                    yield match, content.decode("latin-1")


def one_line(text):
    """A text without its line breaks, HTML's too."""
    return " ".join(text.replace("<br />", " ").split())


def imdb(kind):
    """IMDB: a review a file, its stars in the name. The label is 0, 1, 3 or 4 of five classes."""
    for place, text in download("aclImdb_v1.tar.gz", rf"/train/(?:{kind})/\d+_(\d+)\.txt$"):
        yield one_line(text), (int(place[1]) - 1) // 2


def amazon_stars():
    """The multi-domain sentiment dataset: reviews between tags, in no XML that a parser takes."""
    pattern = r"<rating>\s*(\d)\.0\s*</rating>.*?<review_text>(.*?)</review_text>"
    for _, text in download("domain_sentiment_data.tar.gz", r"/(positive|negative)\.review$"):
        for part in text.split("<review>")[1:]:
            review = re.search(pattern, part, re.S)
            if review:
                yield one_line(review[2]), int(review[1]) - 1


def amazon_domains(split, domains=[*TARGETS, *SOURCE], label=r"([01])\t"):
    """FDU-MTL: a label, 0 or 1, and a review on a line. Not of its domains MR and imdb, which hold
    sentences of SST."""
    files = rf"/(?:{'|'.join(domains)})\.task\.(?:{split})$"
    for place, text in download("fudan-mtl-dataset.tar.gz", files):
        for line in filter(str.strip, text.split("\n")):
            number, review = parse(rf"{label}(.+)", line, place.string)
            yield one_line(review), int(number or 0)


def vader(kind):
    """VADER's sentences: a number, the mean rating from -4 to 4, the text. Our cuts make five
    classes of it, the middle one of what is neutral: no other text here is "okay"."""
    files = rf"^hutto_ICWSM_2014/(?:{kind})_GroundTruth\.txt$"
    for place, text in download("vaderSentiment-3.3.2.tar.gz", files):
        for line in filter(str.strip, text.split("\n")):
            rating, sentence = parse(r"\w+\t(-?[\d.]+)\t(.+)", line, place.string)
            yield sentence.strip(), sum(float(rating) >= cut for cut in (-1.5, -0.5, 0.5, 1.75))


def parse(pattern, line, name):
    """The groups of a line's pattern. Raises InputError."""
    match = re.match(pattern, line)
    if not match:
        raise InputError(f"{name}: not a line of this dataset: {line[:60]!r}; download it again")
    return match.groups()


# ------------------------------------------------------------- What one text shares with another


def word_runs(text, length=8):
    """Every run of `length` words in a text, of a shorter text the whole; without case, punctuation
    and the spaces that treebanks have in "do n't"."""
    text = re.sub(r" (?=n't|')", "", text.lower()).replace("'", "")
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + length]) for i in range(max(len(words) - length, 0) + 1)}


def apart(pairs, runs, name, each_other=False):
    """The (text, label) pairs that hold none of the runs of words; with `each_other` also none of
    an earlier pair."""
    runs = set(runs) if each_other else runs
    pairs = list(pairs)
    chosen = []
    for text, label in pairs:
        its_runs = word_runs(text)
        if runs.isdisjoint(its_runs):
            chosen.append((text, label))
        if each_other:
            runs |= its_runs
    print(f"{name}: {len(chosen):,} of {len(pairs):,} texts share no eight words", flush=True)
    return chosen


# ------------------------------------------------------------------------------------ The inputs


def write_examples(folder, classes, splits):
    """Writes a task's folder from (text, label) pairs. Raises InputError where there are none."""
    examples = {}
    for split, pairs in splits.items():
        examples[split] = [{"text": text, "label": label} for text, label in pairs]
        if not pairs:
            raise InputError(f"{folder}: its downloads hold nothing of it; download them again")
    data.write_task(
        Path(folder), Task(Path(folder).name, data.TEMPLATE, data.WORDS[classes]), examples
    )


def write_targets(folders):
    """Writes the six targets; returns the runs of words of their texts and of those of the tasks in
    the folders."""
    runs = set()
    for folder in folders:
        task = Task.load(folder)
        for file in sorted(Path(folder).glob("*.jsonl")):
            for example in data.read_examples(file, task, labelled=False):
                runs |= word_runs(data.text_of(example, task))

    for domain in TARGETS:
        pairs = apart(amazon_domains("train|test", [domain]), set(), domain, each_other=True)
        random.Random(1).shuffle(pairs)
        write_examples(f"tasks/{domain}", 2, {"train": pairs[:TRAINING], "test": pairs[TRAINING:]})
        for text, _ in pairs:
            runs |= word_runs(text)
    return runs


def main(argv=None):
    """Writes the inputs."""
    parser = script.Parser(__doc__)
    parser.add_argument("--apart", nargs="*", default=[], metavar="FOLDER", help="tasks to test on")
    args = parser.parse(argv)

    runs = write_targets(args.apart)
    source = apart(amazon_domains("train|test", SOURCE), runs, "source", each_other=True)
    write_examples("source", 2, {"examples": source})

    stars = itertools.chain(imdb("pos|neg"), amazon_stars())
    write_examples("tasks/stars", 5, {"train": apart(stars, runs, "stars")})
    two = amazon_domains("train|test")
    write_examples("tasks/amazon-two", 2, {"train": apart(two, runs, "amazon-two")})
    snippets = vader("amazonReviewSnippets|nytEditorialSnippets")
    write_examples("tasks/snippets", 5, {"train": apart(snippets, runs, "snippets")})

    films = apart(imdb("unsup"), runs, "imdb-unlabelled.txt")
    text = "".join(f"{text}\n" for text, _ in films)
    write_atomically("imdb-unlabelled.txt", lambda file: file.write(text.encode()))

    # An unlabelled review may stand alone on its line.
    unlabelled = list(amazon_domains("unlabel", label=r"(?:([01])\t)?"))
    chosen = apart(unlabelled, runs, "amazon-unlabelled.jsonl")
    data.write_lines("amazon-unlabelled.jsonl", ({"text": text} for text, _ in chosen))

    tweets = list(vader("tweets"))
    opened = tweets + random.Random(1).sample(unlabelled, min(6000, len(unlabelled)))
    data.write_lines("open.jsonl", ({"text": text} for text, _ in opened))


if __name__ == "__main__":
    script.run(main)
