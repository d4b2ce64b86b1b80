"""
What the inner step of Equation 1 does at a prompt, what is left of it in Equation 2, and how fast
the prompt adapts to a task:

    python offline/inner_step.py --source source/kmeans10.jsonl --prompt prompts/metapt --task ...

Over meta-steps of examples that train_meta.py holds out: how far Equation 1 moves the prompt,
α|∇L|/|P|; a query's loss before and after it; and the cosine between Equation 2's gradient and that
of the queries without an inner step. Where it is 1, MetaPT is prompt tuning on the source. Of each
task: the accuracy after 0, 2, 4, 8, 16 and 32 updates on 40 examples, at a constant rate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import script  # first: it sets how PyTorch takes its memory

import json

import numpy as np
import torch
import torch.nn.functional as F

import data
from finetune import print_table
from metapt import PromptedT5, Task, adapt_all, load_prompt, load_t5, meta_gradient, summed_loss
from script import number
from train_meta import ALPHA, M, draw, split_clusters

UPDATES = (0, 2, 4, 8, 16, 32)


def inner_step(model, prompt, supports, queries, alpha):
    """The four at one meta-step: the length of Equation 1's step as a share of the prompt's, the
    queries' mean loss before and after it, and the cosine of the two gradients."""
    P = prompt.expand(len(supports), -1, -1)
    adapted = adapt_all(model, P, supports, alpha).detach()
    with torch.no_grad():
        before = summed_loss(model, P, queries).item() / len(queries)
        after = summed_loss(model, adapted, queries).item() / len(queries)

    second_order, _ = meta_gradient(model, prompt, supports, queries, alpha)
    plain, _ = meta_gradient(model, prompt, supports, queries, alpha=0.0)
    moved = ((adapted - prompt).flatten(1).norm(dim=1) / prompt.norm()).mean().item()
    cosine = F.cosine_similarity(second_order.flatten(), plain.flatten(), dim=0).item()
    return moved, before, after, cosine


def accuracies(model, prompt, training, test, learning_rate=3e-3, updates=UPDATES):
    """The accuracy on encoded test batches after each number of AdamW updates, every one on all
    training examples, at a constant rate: A.4's without its schedule and its choice of an epoch."""
    prompt = torch.nn.Parameter(prompt.clone())
    optimizer = torch.optim.AdamW([prompt], lr=learning_rate, weight_decay=0.0)
    batch = model.encode(training)
    scores = []
    for update in range(max(updates) + 1):
        if update in updates:
            scores.append(model.evaluate(prompt.detach(), test)["accuracy"])
        optimizer.zero_grad()
        model.loss(prompt, batch).backward()
        optimizer.step()

    return scores


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def read_draw(folder, seed, max_test):
    """A task, 40 of its training examples drawn with the seed, as finetune.py draws them, and
    max_test of its test examples."""
    task = Task.load(folder)
    examples = list(data.read_examples(Path(folder) / "train.jsonl", task))
    rows, _ = data.few_shot([example["label"] for example in examples], 40, seed)
    test = list(data.read_examples(Path(folder) / "test.jsonl", task))
    chosen = np.random.default_rng(0).permutation(len(test))[:max_test]
    return task, [examples[row] for row in rows], [test[row] for row in chosen]


def measure(model, prompt, held_out, args):
    """The means of inner_step's four over args.steps meta-steps of held-out examples."""
    measures = []
    for step in range(args.steps):
        supports, queries = draw(held_out, M, args.seed, step)
        supports = [model.encode(examples) for examples in supports]
        queries = [model.encode(examples) for examples in queries]
        measures.append(inner_step(model, prompt, supports, queries, args.alpha))
    return np.mean(measures, axis=0).tolist()


def main(argv=None):
    """Prints a line for each prompt, and adds it to --out."""
    parser = script.Parser(__doc__)
    add = parser.add_argument
    add("--source", required=True, metavar="FILE", help="what cluster.py wrote")
    add("--prompt", nargs="+", default=["random"], help="random, or prompts' folders")
    add("--task", nargs="*", default=[], metavar="FOLDER", help="tasks to adapt to")
    add("--out", metavar="FILE", help="a .jsonl that a line for each prompt is added to")
    add("--model", default=script.MODEL, help="a T5 by hub name or folder")
    add("--alpha", type=number(1e-12), default=ALPHA, help="the inner loop's rate α")
    add("--steps", type=number(1), default=20, help="meta-steps to average over")
    add("--validation", type=number(1), default=640, help="examples held out, as in training")
    add("--prompt-length", type=number(1), default=100, help="vectors of a random prompt")
    add("--max-test", type=number(1), default=400, help="test examples of a task")
    add("--max-length", type=number(1), default=script.MAX_LENGTH, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="the prompts' own, of the split and every draw")
    script.add_precision(parser.add_machine())
    args = parser.parse(argv)
    script.set_machine(args)
    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    source_task = Task.load(Path(args.source).parent)
    model = PromptedT5(t5, tokenizer, source_task, args.max_length)
    examples = list(data.read_examples(args.source, source_task))
    _, held_out = split_clusters(examples, args.validation, M, seed=args.seed)
    draws = [read_draw(folder, args.seed, args.max_test) for folder in args.task]

    table = [["prompt", "α|∇L|/|P|", "query loss", "after Eq. 1", "cosine"]]
    for name in args.prompt:
        if name == "random":
            prompt = model.init_prompt(args.prompt_length, args.seed)
        else:
            prompt = load_prompt(name, t5.config.d_model)[0].to(model.device)

        means = measure(model, prompt, held_out, args)
        table.append([name, f"{means[0]:.2%}", *(f"{mean:.3f}" for mean in means[1:])])
        row = {"prompt": name, "model": args.model, "seed": args.seed}
        row |= {**dict(zip(("moved", "before", "after", "cosine"), means)), "updates": {}}
        for task, training, test in draws:
            of_task = PromptedT5(t5, tokenizer, task, args.max_length)
            scores = accuracies(of_task, prompt, training, list(of_task.batches(test)))
            row["updates"][task.name] = scores
        if args.out:
            with script.only_writer(args.out, wait=True), open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    print_table(f"Means over {args.steps} meta-steps", table)


if __name__ == "__main__":
    script.run(main)
