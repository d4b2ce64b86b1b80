"""
The study of held-out domains: is it the inner step that makes MetaPT's prompt, and is it K-means'
clusters? From the inputs that real.py has written to the current folder,

    python offline/study.py --pilot    # learning rates, by validation on one T5 and one seed
    python offline/study.py --jobs 2   # the study, two commands at a time
    python offline/study_numbers.py    # its numbers, of what is there

runs the scripts for three T5s, five arms of 40,000 examples each, four seeds, eight targets and
five draws. A block of one T5 and one seed is whole before the next begins. A sixth arm, added when
five blocks had been seen, comes after them. After Ctrl-C the same command continues: what is
finished stands in done.txt.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import script  # first: it sets how PyTorch takes its memory

import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor

from metapt import read_json

DOMAINS = "apparel baby books camera_photo music software sst2 sentihood"
TARGETS = " ".join(f"tasks/{name}" for name in DOMAINS.split())
SMALL = "--max-length 64 --threads 1"
KMEANS = "--source source/kmeans8.jsonl"
ARMS = {  # flags, and the examples of a step
    "kmeans": (KMEANS, 8 * (4 + 4)),
    "random": ("--source source/random8.jsonl", 8 * (4 + 4)),
    "plain": (f"{KMEANS} --alpha 0 --batch-size 10", 8 * 10),  # no inner step: queries alone
    "fomaml": (f"{KMEANS} --method fomaml", 8 * (4 + 4)),
    "ppt": (f"{KMEANS} --method ppt", 4),
}
ADDED = {"matched": (f"{KMEANS} --alpha 0", 8 * (4 + 4))}  # MetaPT's own draws, steps and rate
PAPER = {"kmeans": 0.025, "random": 0.025, "plain": 0.025, "fomaml": 0.025, "ppt": 0.003}
# What the pilot chose, of the paper's rate, a third of it and three times it.
RATES = {"kmeans": 0.025, "random": 0.025, "plain": 0.0083, "fomaml": 0.025, "ppt": 0.009}
RATES["matched"] = RATES["kmeans"]


def train(arm, t5, seed, out, rate, examples):
    """The command that trains a prompt of an arm: of all its steps, the best of five validations."""
    flags, batch = (ARMS | ADDED)[arm]
    steps = examples // batch
    return (
        f"train_meta.py {flags} --model t5-{t5} --seed {seed} --out {out} --learning-rate {rate} "
        f"--max-steps {steps} --eval-every {steps // 5} --patience 5 --prompt-length 20 {SMALL} "
        "--tasks-per-pass 8"
    )


def tune(t5, flags):
    """The command that tunes on every target: 40 examples, five draws, unless flags say other."""
    return f"finetune.py --task {TARGETS} --model t5-{t5} {SMALL} --max-test 1000 {flags}"


def prepare(t5):
    """The commands before a T5's first block: itself, the clusters, and the gate: untuned it must
    be above the largest class, and 5 points or more below full tuning on 640 examples."""
    corpus = "--corpus imdb-unlabelled.txt amazon-unlabelled.jsonl --task tasks/snippets"
    pretrain = f"offline/small_t5.py {corpus} --dtype bfloat16 --threads 1"
    cluster = "cluster.py --source source/examples.jsonl --k 8 --threads 1"
    gate = "--method ft --shots 640 --validation-shots 160 --seeds 1 --learning-rate 3e-4"
    yield [f"{pretrain} --seed {t5} --out t5-{t5}"]
    yield [cluster, f"{cluster} --method random"]
    yield [tune(t5, "--method ft --shots 0"), tune(t5, gate)]


def pilot():
    """The commands of the pilot, a quarter of the examples, and the folders of its prompts by arm
    and rate. Random clusters take the rate of K-means."""
    prompts = {}
    for arm in ("kmeans", "plain", "fomaml", "ppt"):
        for factor in (1 / 3, 1, 3):
            rate = round(PAPER[arm] * factor, 4)
            prompts[arm, rate] = f"pilot/{arm}-{rate}"
    commands = [train(arm, 1, 5, out, rate, 10_000) for (arm, rate), out in prompts.items()]
    return [*prepare(1), commands], prompts


def prompt_folder(arm, t5, seed):
    """Where the prompt of a training is."""
    return f"prompts/{t5}-{arm}-{seed}"


def block(arms, t5, seed):
    """The commands of one T5 and one seed in stages."""
    outs = {arm: prompt_folder(arm, t5, seed) for arm in arms}
    yield [train(arm, t5, seed, out, RATES[arm], 40_000) for arm, out in outs.items()]
    yield [tune(t5, f"--prompt {out} --shots 0 40") for out in outs.values()]
    measure = f"offline/inner_step.py {KMEANS} --model t5-{t5} {SMALL} --seed {seed}"
    measure += f" --task {TARGETS} --out inner_step.jsonl --prompt"
    yield [f"{measure} {out}" for out in outs.values()]


def study():
    """The commands of the study in stages: those of one do not wait for each other."""
    pairs = list(itertools.product((1, 2, 3, 4), (1, 2, 3)))
    for seed, t5 in pairs:
        if seed == 1:
            yield from prepare(t5)
        yield from block(ARMS, t5, seed)
        if seed == 1:  # what the T5 does without source data
            yield [tune(t5, "--prompt random --prompt-length 20")]
            yield [tune(t5, "--method ft --learning-rate 3e-4")]

    for seed, t5 in pairs:
        yield from block(ADDED, t5, seed)


def run(stages, jobs):
    """Runs the commands of each stage, `jobs` of them at a time, but for those in done.txt. Ends
    where one has failed."""
    done = Path("done.txt")
    done.touch()
    with script.stop_signal() as stop, ThreadPoolExecutor(jobs) as pool:

        def call(command):
            if stop or command in done.read_text().splitlines():
                return 0
            print(f"$ python {command}", flush=True)
            name, *flags = command.split()
            status = subprocess.run([sys.executable, ROOT / name, *flags]).returncode
            if status == 0:
                with open(done, "a") as file:
                    file.write(f"{command}\n")
            return status

        for stage in stages:
            statuses = list(pool.map(call, stage))
            if any(statuses):
                sys.exit(max(statuses))


def main(argv=None):
    """Runs the study or its pilot."""
    parser = script.Parser(__doc__)
    add = parser.add_argument
    add("--pilot", action="store_true", help="the pilot alone")
    add("--jobs", type=script.number(1), default=1, help="commands at a time, a thread each")
    args = parser.parse(argv)
    if not args.pilot:
        return run(study(), args.jobs)

    stages, prompts = pilot()
    run(stages, args.jobs)
    for (arm, rate), out in prompts.items():
        facts = read_json(Path(out) / "metapt.json")
        print(f"{arm}, rate {rate}: {facts['accuracy']:.1%} held out, at step {facts['step']}")


if __name__ == "__main__":
    script.run(main)
