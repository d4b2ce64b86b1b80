"""
The offline demo: reviews that a small grammar writes in six domains, a tiny T5 pre-trained on them,
source data of four domains, each a meta-task, and two tasks of the other two.

    python offline/demo.py            # makes it in demo/; train_meta.py and finetune.py do so too
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # first: it sets how PyTorch takes its memory

import os
import random
import subprocess

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
    own_words = own_words.split(", ")
    shared = SHARED.split(", ")
    remarks = []
    for aspect in rng.sample(aspects.split(), rng.choice([1, 2, 2, 3])):
        tone = grade
        if rng.random() < 0.15:
            tone = min(4, max(0, grade + rng.choice([-1, 1])))
        words = own_words[tone] if rng.random() < 0.6 else shared[tone]
        remarks.append(rng.choice(FRAMES).format(aspect=aspect, word=rng.choice(words.split())))

    return f"{rng.choice(openings.split(', '))} . {' and '.join(remarks)} ."


def write_reviews(domain, count, rng):
    """`count` examples of a domain, the five grades in turn."""
    reviews = []
    for i in range(count):
        reviews.append({"text": write_review(domain, i % 5, rng), "label": i % 5, "domain": domain})
    return reviews


def arguments(out, making):
    """What the scripts are to be called with, of sizes that suit this T5, by the name of a file."""
    small = {"model": f"{out}/t5", "prompt_length": 20, "max_length": 128, "threads": 1}
    meta = {**small, "source": f"{out}/source/clustered.jsonl", "validation": 400, "seed": making}
    tasks = [f"{out}/{domain}" for domain in TASK_DOMAINS]
    seeds = list(range(5 * making - 4, 5 * making + 1))
    tune = {**small, "task": tasks, "out": f"{out}/results.jsonl", "seeds": seeds}
    return {
        "maml": {**meta, "out": f"{out}/maml", "max_steps": 300, "eval_every": 50},
        "ppt": {**meta, "method": "ppt", "out": f"{out}/ppt", "max_steps": 2000, "eval_every": 200},
        "pt": {**tune, "method": "pt", "prompt": ["random", f"{out}/ppt", f"{out}/maml"]},
        "ft": {**tune, "method": "ft", "learning_rate": 0.001},
    }


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def write_demo(out, steps, making):
    """Writes the demo to the folder `out`, its T5 last; every making has its own seeds."""
    rng = random.Random(making - 1)
    corpus, source = [], []
    for domain in DOMAINS:
        corpus += write_reviews(domain, 1000, rng)
    for domain in SOURCE_DOMAINS:
        source += write_reviews(domain, 1000, rng)

    # The meta-tasks are the domains, which cluster.py --method lda --k 4 finds, too.
    clustered = [{**row, "cluster": SOURCE_DOMAINS.index(row["domain"])} for row in source]
    task = lambda name: Task(name, data.TEMPLATE, data.WORDS[5])
    data.write_task(out / "source", task("source"), {"examples": source, "clustered": clustered})
    for domain in TASK_DOMAINS:
        splits = {split: write_reviews(domain, 1000, rng) for split in ("train", "test")}
        data.write_task(out / domain, task(domain), splits)

    data.write_task(out / "corpus", task("corpus"), {"train": corpus})
    for name, values in arguments(out, making).items():
        write_json(out / f"{name}.json", values)

    flags = ["--corpus", f"{out}/corpus/train.jsonl", "--task", f"{out}/corpus", "--threads", "1"]
    flags += ["--out", f"{out}/t5", "--restart", "--max-steps", str(steps), "--seed", str(making)]
    flags += "--d-model 64 --d-ff 128 --heads 4 --layers 2 --max-length 48 --batch-size 32".split()
    flags += "--labelled 32 --excerpts 0.25 --eval-every 100 --learning-rate 0.02".split()
    print(f"$ python offline/small_t5.py {' '.join(flags)}", flush=True)
    small_t5.main(flags)


def demo(out="demo", restart=False, steps=200, making=1):
    """Makes the offline demo in the folder `out` where it is not there yet; returns the folder. A
    second command that wants it waits for the first."""
    out = Path(out)
    last = out / "t5" / "arguments.json"
    with script.only_writer(out, wait=True):
        if last.exists() and not restart:
            return out

        print(f"Making the offline demo in {out}/; nothing is downloaded.", flush=True)
        last.unlink(missing_ok=True)  # until all of it is there again
        write_demo(out, steps, making)
    return out


def at_once(*commands):
    """Runs commands of our scripts at once, each in a process of its own; ends with the first that
    failed."""
    processes = []
    for place, words in enumerate(commands):
        words = [str(word) for word in words]
        print(f"$ python {' '.join(words)}", flush=True)
        bars = {**os.environ, "TQDM_POSITION": str(place)}  # each bar in a line of its own
        command = [sys.executable, HERE.parent / words[0], *words[1:]]
        processes.append(subprocess.Popen(command, env=bars))

    with script.stop_signal():  # which reaches the processes too, and these save what they have
        statuses = [process.wait() for process in processes]
    if any(statuses):
        sys.exit(next(filter(None, statuses)))


def main(argv=None):
    """Makes the demo."""
    parser = script.Parser(__doc__)
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="the folder to write")
    parser.add_argument("--restart", action="store_true", help="makes it anew where it is there")
    args = parser.parse(argv)
    out = demo(args.out, args.restart)
    print(f"{out}/ is there; now python train_meta.py --config {out}/maml.json")


if __name__ == "__main__":
    script.run(main)
