"""
What the inner step of Equation 1 does at a prompt, and what is left of it in Equation 2:

    python offline/inner_step.py --source source/kmeans10.jsonl --prompt random prompts/metapt

Over meta-steps of examples that train_meta.py holds out: how far Equation 1 moves the prompt,
α|∇L|/|P|; a query's loss before and after it; and the cosine between Equation 2's gradient and that
of the queries without an inner step. Where it is 1, MetaPT is prompt tuning on the source.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from finetune import print_table
from metapt import PromptedT5, Task, adapt_all, load_prompt, load_t5, meta_gradient, summed_loss
from train_meta import ALPHA, M, draw, split_clusters


def inner_step(model, prompt, supports, queries, alpha):
    """The three at one meta-step: the length of Equation 1's step as a share of the prompt's, the
    queries' mean loss before and after it, and the cosine of the two gradients."""
    P = prompt.expand(len(supports), -1, -1)
    adapted = adapt_all(model, P, supports, alpha).detach()
    with torch.no_grad():
        before, after = (summed_loss(model, some, queries).item() for some in (P, adapted))

    second_order, _ = meta_gradient(model, prompt, supports, queries, alpha)
    plain, _ = meta_gradient(model, prompt, supports, queries, alpha=0.0)
    moved = ((adapted - prompt).flatten(1).norm(dim=1) / prompt.norm()).mean().item()
    cosine = F.cosine_similarity(second_order.flatten(), plain.flatten(), dim=0).item()
    return moved, before / len(queries), after / len(queries), cosine


def main(argv=None):
    """Prints a line for each prompt."""
    parser, number = data.Parser(__doc__), data.number
    add, start = parser.add_argument, data.existing("folder", "random")
    add("--source", required=True, type=data.existing("file"), help="what cluster.py wrote")
    add("--prompt", nargs="+", type=start, default=["random"], help="random, or prompts' folders")
    add("--model", default=data.MODEL, help="a T5 by hub name or folder")
    add("--alpha", type=number(1e-12), default=ALPHA, help="the inner loop's rate α")
    add("--steps", type=number(1), default=20, help="meta-steps to average over")
    add("--validation", type=number(1), default=640, help="examples held out, as in training")
    add("--max-length", type=number(1), default=data.MAX_LENGTH, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="the prompts' own, of the split and every draw")
    data.add_start(parser)
    data.add_precision(parser.add_machine())
    args = parser.parse(argv)
    data.set_machine(args)

    task = Task.load(Path(args.source).parent)
    model = PromptedT5(*load_t5(args.model, args.device, args.dtype), task, args.max_length)
    examples = list(data.read_examples(args.source, task))
    _, held_out = split_clusters(examples, args.validation, M, seed=args.seed)

    table = [["prompt", "α|∇L|/|P|", "query loss", "after Eq. 1", "cosine"]]
    for name in args.prompt:
        if name == "random":
            prompt = model.init_prompt(args.prompt_length, args.seed, scale=args.init_scale)
        else:
            prompt = load_prompt(name, model.t5.config.d_model)[0].to(model.device)
        found = []
        for step in range(args.steps):
            drawn = draw(held_out, M, args.seed, step)
            supports, queries = ([model.encode(some) for some in side] for side in drawn)
            found.append(inner_step(model, prompt, supports, queries, args.alpha))
        moved, before, after, cosine = np.mean(found, axis=0)
        table.append([name, f"{moved:.2%}", f"{before:.3f}", f"{after:.3f}", f"{cosine:.3f}"])

    print_table(f"Means over {args.steps} meta-steps", table)


if __name__ == "__main__":
    data.run(main)
