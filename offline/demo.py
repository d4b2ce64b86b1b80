"""
The offline demo: reviews that a small grammar writes in six domains, a tiny T5 pre-trained on them,
source data of four domains in clusters, and two tasks of the other two.

    python offline/demo.py            # makes it in demo/; train_meta.py and finetune.py do so too
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import data
import small_t5
from metapt import Task, write_json

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


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - the arguments that suit a T5 of this size

# {here} is the folder that the arguments lie in.
SMALL = {"model": "{here}/t5", "prompt_length": 20, "max_length": 128, "threads": 1}
META = {**SMALL, "source": "{here}/source/clustered.jsonl", "validation": 400}
TUNE = {
    **SMALL,
    "task": [f"{{here}}/{domain}" for domain in TASK_DOMAINS],
    "out": "{here}/results.jsonl",
}
ARGUMENTS = {
    "cluster": {
        "source": "{here}/source/examples.jsonl",
        "out": "{here}/source/clustered.jsonl",
        "encoder": "{here}/t5",
        "k": 4,
    },
    "maml": {**META, "method": "maml", "out": "{here}/maml", "max_steps": 300, "eval_every": 50},
    "ppt": {**META, "method": "ppt", "out": "{here}/ppt", "max_steps": 2000, "eval_every": 200},
    "pt": {**TUNE, "method": "pt", "prompt": ["random", "{here}/ppt", "{here}/maml"]},
    "ft": {**TUNE, "method": "ft", "learning_rate": 0.001},
}


def write_demo(out, steps, making):
    """Writes the demo to the folder `out`; every making has its own seeds."""
    rng = random.Random(making - 1)
    corpus, source = [], []
    for domain in DOMAINS:
        corpus += write_reviews(domain, 1000, rng)
    for domain in SOURCE_DOMAINS:
        source += write_reviews(domain, 1000, rng)

    task = lambda name: Task(name, data.TEMPLATE, data.WORDS[5])
    data.write_task(out / "source", task("source"), {"examples": source})
    for domain in TASK_DOMAINS:
        splits = {split: write_reviews(domain, 1000, rng) for split in ("train", "test")}
        data.write_task(out / domain, task(domain), splits)

    data.write_task(out / "corpus", task("corpus"), {"train": corpus})
    for name, arguments in ARGUMENTS.items():
        if name in ("maml", "ppt"):
            arguments = {**arguments, "seed": making}
        elif name in ("pt", "ft"):
            arguments = {**arguments, "seeds": list(range(5 * making - 4, 5 * making + 1))}
        write_json(out / f"{name}.json", arguments)

    where = ["--corpus", f"{out}/corpus/train.jsonl", "--task", f"{out}/corpus"]
    where += ["--out", f"{out}/t5", "--restart"]
    shape = "--d-model 64 --d-ff 128 --heads 4 --layers 2 --max-length 48"
    how = f"--batch-size 32 --labelled 32 --excerpts 0.25 --max-steps {steps} --eval-every 100"
    machine = f"--learning-rate 0.02 --dtype float32 --threads 1 --seed {making}"
    flags = where + f"{shape} {how} {machine}".split()
    print(f"$ python offline/small_t5.py {shlex.join(flags)}", flush=True)
    small_t5.main(flags)

    import cluster  # which takes seconds

    flags = ["--config", f"{out}/cluster.json"]
    print(f"$ python cluster.py {shlex.join(flags)}", flush=True)
    cluster.main(flags)


def at_once(*commands):
    """Runs commands of our scripts at once, each in a process of its own; ends with the first that
    failed."""
    processes = []
    for place, words in enumerate(commands):
        print(f"$ python {' '.join(map(str, words))}", flush=True)
        words = [sys.executable, Path(__file__).parents[1] / words[0], *map(str, words[1:])]
        bars = {**os.environ, "TQDM_POSITION": str(place)}  # each bar in a line of its own
        processes.append(subprocess.Popen(words, env=bars))

    with data.stop_signal():  # which reaches the processes too, and these save what they have
        statuses = [process.wait() for process in processes]
    for status in filter(None, statuses):
        sys.exit(status)


def stands(out):
    """Whether the demo is in a folder, whole: what is written last is there."""
    return Path(out, "source", "clustered.json").exists()


def demo(out="demo", restart=False, steps=200, making=1):
    """Makes the offline demo in the folder `out` where it is not there yet; returns the folder."""
    out = Path(out)
    if not restart and stands(out):
        return out

    print(
        f"Making the offline demo in {out}/: reviews written by a small grammar in {len(DOMAINS)} "
        "domains and a tiny T5 pre-trained on them.\nNothing is downloaded.",
        flush=True,
    )
    (out / "source" / "clustered.json").unlink(missing_ok=True)  # until it is whole again
    try:
        write_demo(out, steps, making)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command makes the demo again from its beginning")

    return out


def main(argv=None):
    """Makes the demo."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--out", default="demo", metavar="FOLDER", help="the folder to write")
    add("--max-steps", type=data.number(1), default=200, help="steps of pre-training its T5")
    add("--restart", action="store_true", help="makes it anew")
    args = parser.parse(argv)
    stood = stands(args.out) and not args.restart
    made = demo(args.out, args.restart, args.max_steps)
    fate = "stands there already; --restart makes it anew" if stood else "is written"
    scripts = f"train_meta.py --config {made}/maml.json, finetune.py --config {made}/pt.json"
    print(f"{made}/ {fate}. Now python {scripts}")


if __name__ == "__main__":
    data.run(main)
