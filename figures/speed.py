"""
How fast the meta-gradient and prompt tuning are, beside the textbook loop and other libraries. The
T5 has random weights of a public T5's shape; nothing is downloaded.

    python figures/speed.py                                                    # a tiny T5
    python figures/speed.py --shape small --sst --rounds 3 --compare loop higher
    python figures/speed.py --only downstream                                  # beside peft
    python figures/speed.py --shape large --only step --tasks 1 --tasks-per-pass 1 --compare   # GiB
    bash figures/gpu.sh                                                        # all of it on a GPU

What is compared must agree first. Then it is timed in turn, round by round. Shown are the median
and the spread, least to most, of the rounds, and the peak of memory above what was in use before.

Beside the table in README.md, this was seen on 2 cores of an Intel Xeon (Sapphire Rapids):

All ways differ by 5e-5 at small and 5e-4 at base in float32, by 4e-16 in float64. In lower
precision the meta-gradient at small has this error against float64, and this cosine:
    float32                                        1.9e-4
    TF32, its rounding imitated on the CPU         1.1 %   0.9999
    bfloat16 weights, float32 prompt               3.7 %   0.9993
    autocast to bfloat16                           3.3 %   0.9995
"""

import copy
import ctypes
import itertools
import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from metapt import MASK, NEW_WORD, PromptedT5, Task, blame, meta_gradient, textbook_meta_gradient
from metapt import twice_differentiable
from train_meta import draw

# ------------------------------------------------------------------------- Equation 2 by others


def with_vmap(model, prompt, supports, queries, alpha):
    """torch.func, all tasks at once by vmap; for batches of one size without padding."""
    ones = supports[0]["attention_mask"]

    def stack(batches):
        names = ("input_ids", "labels")
        return {name: torch.stack([batch[name] for batch in batches]) for name in names}

    def loss(P, batch):
        return model.loss(P, {**batch, "attention_mask": ones})

    def query_loss(P, support, query):
        return loss(P - alpha * torch.func.grad(loss)(P, support), query)

    def meta_loss(P):
        tasks = stack(supports), stack(queries)
        return torch.func.vmap(query_loss, in_dims=(None, 0, 0))(P, *tasks).sum()

    with twice_differentiable(True):
        return torch.func.grad_and_value(meta_loss)(prompt)


def with_higher(model, prompt, supports, queries, alpha):
    """The higher library's differentiable optimizer."""
    with blame("--compare higher", "pip install higher", ImportError):
        import higher

    module = torch.nn.ParameterList([torch.nn.Parameter(prompt.clone())])
    optimizer, total = torch.optim.SGD(module.parameters(), alpha), 0
    for support, query in zip(supports, queries):
        inner = higher.innerloop_ctx(module, optimizer, copy_initial_weights=False)
        with inner as (adapted, differentiable):
            with twice_differentiable(True):
                differentiable.step(model.loss(adapted[0], support))
            total = total + model.loss(adapted[0], query)
    return torch.autograd.grad(total, module[0])[0], total.detach()


def plain(model):
    """A copy of the model with the T5 as transformers has it, cross-attention included."""
    model = copy.deepcopy(model)
    for block in model.t5.decoder.block:
        block.layer[1].EncDecAttention.__class__ = T5Attention
    return model


def with_peft(model, prompt):
    """The same model and prompt by the peft library: its parameter, and batch -> logits at <X>."""
    with blame("--only downstream", "pip install peft", ImportError):
        import peft

    form = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    config = peft.PromptTuningConfig(num_virtual_tokens=len(prompt), **form)
    theirs = peft.get_peft_model(plain(model).t5, config).eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    weight.data.copy_(prompt)

    def logits(batch):
        inputs = {name: batch[name].to(prompt.device) for name in ("input_ids", "attention_mask")}
        decoder_ids = model.decoder_ids.repeat(len(batch["input_ids"]), 1)
        return theirs(**inputs, decoder_input_ids=decoder_ids).logits[:, 1]

    return weight, logits


# ------------------------------------------------------------------------- Seconds, GiB, precision


def peak_memory(function, device):
    """Runs a function; the most memory that it had in use at once, in GiB above what was in use
    before: the GPU's, or under Linux the process's."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - start) / 2**30

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20

    ctypes.CDLL(None).malloc_trim(0)  # hands back what earlier calls have freed
    Path("/proc/self/clear_refs").write_text("5")  # a new peak begins here
    start = peak()
    function()
    return peak() - start


def relative_error(a, b):
    """The norm of a - b as a share of b's."""
    return ((a - b).norm() / b.norm()).item()


def layer_norm(self, x):
    """T5's layer norm, which transformers has square in float32 even where the model is float64."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


# --------------------------------------------------------------- The T5s and texts that are timed


def shape(d_model, d_ff, heads, layers, **more):
    """A public T5's shape, as T5Config takes it."""
    return {"d_model": d_model, "d_ff": d_ff, "num_heads": heads, "num_layers": layers, **more}


SHAPES = {
    "tiny": shape(16, 32, 2, 2, d_kv=8, vocab_size=1100),  # the tests' own
    "small": shape(512, 2048, 8, 6),
    "base": shape(768, 3072, 12, 12),
    "large": shape(1024, 4096, 16, 24),
    "xl": shape(2048, 5120, 32, 24, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
TASK = Task("speed", data.TEMPLATE, data.WORDS[5])
VOCABULARY = [f"w{i}" for i in range(1000)]
# Tokens of H(x) of the first 80 sentences of SST's dev split, by T5's own tokenizer.
SST = """
25 22 38 15 39 23 16 43 51 42 44 50 36 44 22 36 50 27 46 48 35 27 30 51 11 44 26
18 18 42 59 32 36 23 53 35 55 43 48 34 35 22 22 55 28 21 16 36 56 16 34 25 36 23
27 49 30 30 30 37 47 30 23 36 33 30 24 32 24 31 35 32 29 24 20 55 37 24 36 18
"""


def make_model(shape, device, dtype="float32"):
    """A T5 of random weights, with a tokenizer of T5's kind to which every word is one piece."""
    words = [*VOCABULARY, *TASK.words, "It", "was"]
    pieces = ["<pad>", "</s>", "<unk>", *(NEW_WORD + word for word in words)]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"extra_special_tokens": [MASK]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **SHAPES[shape]))
    t5 = t5.to(device, getattr(torch, dtype))
    return PromptedT5(t5, tokenizer, TASK, max_length=10_000)


def make_examples(count, length, sst=False):
    """Random examples whose H(x) has `length` tokens each, or as many as SST's sentences."""
    rng, lengths = random.Random(0), itertools.cycle(SST.split() if sst else [length])
    examples = []
    for tokens in itertools.islice(lengths, count):
        words = rng.choices(VOCABULARY, k=int(tokens) - 5)  # beside a stop, It, was, <X>, </s>
        examples.append({"text": " ".join(words), "label": rng.randrange(len(TASK.words))})
    return examples


# ---------------------------------------------------------------------------------------- The run


def print_times(title, contestants, args, **columns):
    """Times functions in turn, round by round. Prints of each the median and the spread of its
    seconds, the median as a multiple of the first one's, its peak of memory, and the columns,
    {heading: {name: number}}."""
    # The memory first, which warms up.
    memory = {name: peak_memory(function, args.device) for name, function in contestants.items()}
    seconds = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, function in contestants.items():
            began = time.perf_counter()
            function()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    headings = "".join(f"{heading:>10}" for heading in columns)
    print(f"\n{title:32}{'seconds':>9}{'(spread)':>20}{'of first':>10}{'peak GiB':>10}{headings}")
    for name, times in seconds.items():
        spread = f"({min(times):.4f} to {max(times):.4f})"
        more = "".join(f"{column[name]:10.4g}" for column in columns.values())
        row = f"{name:32}{medians[name]:9.4f}{spread:>20}{medians[name] / first:10.2f}"
        print(f"{row}{memory[name]:10.3f}{more}", flush=True)


def print_meta_steps(model, prompt, supports, queries, examples, args):
    """The same meta-gradient by us, by parts of ours and by others: checked, then timed, beside a
    whole step of train_meta.py, from its draw on."""
    theirs, step = plain(model), (prompt, supports, queries, 0.08)
    ways = {}
    if "loop" in args.compare:
        ways["loop, plain T5"] = partial(textbook_meta_gradient, theirs, *step)
        ways["loop, our cross-attention"] = partial(textbook_meta_gradient, model, *step)
        ways["passes of one length, plain T5"] = partial(meta_gradient, theirs, *step)
    for n in args.tasks_per_pass:
        ways[f"ours, {n} tasks a pass"] = partial(meta_gradient, model, *step, tasks_per_pass=n)
    if "vmap" in args.compare:
        ways["torch.func's vmap"] = partial(with_vmap, theirs, *step)
    if "higher" in args.compare:
        ways["higher"] = partial(with_higher, theirs, *step)

    if args.compare:
        expected, _ = textbook_meta_gradient(theirs, *step)
        for name, way in ways.items():
            error = relative_error(way()[0], expected)
            print(f"{name:32} differs from the textbook loop by {error:.1e}", flush=True)

    P = torch.nn.Parameter(prompt.clone())
    optimizer = torch.optim.AdamW([P])
    tasks = [examples[i :: args.tasks] for i in range(args.tasks)]

    def training_step():
        sides = [map(model.encode, side) for side in draw(tasks, args.m, seed=1, step=1)]
        how = {"tasks_per_pass": args.tasks_per_pass[-1]}
        P.grad, loss = meta_gradient(model, P, *map(list, sides), 0.08, **how)
        optimizer.step()
        return loss.item()

    forward = {"forward pass F of the supports": partial(model.evaluate, prompt, supports)}
    step = {"the last, drawn, encoded, AdamW": training_step}
    print_times("a meta-step", {**forward, **ways, **step}, args)


def print_downstream(model, prompt, examples, args):
    """Prompt tuning's step, PPT's and an evaluation, from the texts on, by us and through peft."""
    P = prompt.clone().requires_grad_()
    sides = {"ours": (P, partial(model, P)), "peft": with_peft(model, prompt)}

    def step(P, logits, some):
        batch = model.encode(some)
        words = model.word_ids[batch["labels"].to(model.device)]
        return torch.autograd.grad(F.cross_entropy(logits(batch), words), P)[0]

    @torch.no_grad()
    def evaluation(P, logits, some):
        batches = model.batches(some)
        return [logits(batch)[:, model.word_ids].argmax(-1).tolist() for batch in batches]

    ours, theirs = (step(*side, examples) for side in sides.values())
    print(f"\nthe gradient through peft differs by {relative_error(theirs, ours):.1e}")
    parts = [("prompt tuning's step", step, 32), ("PPT's step", step, 4)]
    for what, function, count in [*parts, ("evaluation", evaluation, len(examples))]:
        some = examples[:count]
        contestants = {who: partial(function, *side, some) for who, side in sides.items()}
        print_times(f"{what}, {count} texts", contestants, args)


def print_precision(model, prompt, supports, queries, args):
    """What lower precision costs and gains: the meta-gradient's error against float64, and its
    cosine."""

    def gradient(model, matmul="highest", autocast=False):
        start = prompt.to(torch.promote_types(model.t5.dtype, torch.float32))
        torch.set_float32_matmul_precision(matmul)
        with torch.autocast(prompt.device.type, torch.bfloat16, enabled=autocast):
            found, _ = meta_gradient(model, start, supports, queries, 0.08)
        torch.set_float32_matmul_precision("highest")
        return found.double()

    with mock.patch.object(T5LayerNorm, "forward", layer_norm):
        reference = copy.deepcopy(model).to("cpu", torch.float64)
        exact, _ = meta_gradient(reference, prompt.cpu().double(), supports, queries, 0.08)
    exact = exact.to(prompt.device)

    contestants = {
        "float32, --matmul highest": partial(gradient, model),
        "float32, --matmul high": partial(gradient, model, "high"),
        "float32, --matmul medium": partial(gradient, model, "medium"),
        "bfloat16 weights": partial(gradient, copy.deepcopy(model).bfloat16()),
        "bfloat16 autocast": partial(gradient, model, autocast=True),
    }
    errors, cosines = {}, {}
    for name, contestant in contestants.items():
        found = contestant()
        errors[name] = relative_error(found, exact)
        cosines[name] = F.cosine_similarity(found.flatten(), exact.flatten(), 0).item()
    print_times("a meta-step", contestants, args, error=errors, cosine=cosines)


def main(argv=None):
    """Prints the parts of the benchmark that the flags name."""
    parser, whole = data.Parser(__doc__), data.number(1)
    add = parser.add_argument
    parts = ["step", "precision", "downstream"]
    add("--only", nargs="+", choices=parts, default=parts, help="parts of the benchmark")
    add("--shape", choices=SHAPES, default="tiny", help="of the T5, with random weights")
    add("--tasks", type=whole, default=10, help="meta-tasks of a step")
    add("--m", type=whole, default=4, help="support examples of a task, and query examples")
    add("--length", type=data.number(5), default=40, help="tokens of an example")
    add("--sst", action="store_true", help="takes the lengths of SST's first sentences")
    add("--prompt-length", type=whole, default=100, help="vectors of the prompt")
    add("--texts", type=data.number(32), default=64, help="of the evaluation")
    add("--rounds", type=whole, default=5, help="timed rounds")
    add("--tasks-per-pass", nargs="+", type=whole, default=[4, 10], help="of our step")
    others = ["loop", "vmap", "higher"]
    add("--compare", nargs="*", choices=others, default=others[:2], help="with whose steps")
    data.add_precision(parser.add_machine())
    args = parser.parse(argv)
    data.set_machine(args)
    if args.sst:  # vmap takes examples of one length only
        args.compare = [name for name in args.compare if name != "vmap"]

    model = make_model(args.shape, args.device, args.dtype)
    prompt = model.init_prompt(args.prompt_length)
    count = 2 * args.tasks * args.m
    examples = make_examples(max(count, args.texts), args.length, args.sst)
    batches = list(model.batches(examples[:count], args.m))
    supports, queries = batches[::2], batches[1::2]
    print(
        f"T5 {args.shape}, {args.device}, {torch.get_num_threads()} threads, {args.tasks} tasks\n"
    )
    if "step" in args.only:
        print_meta_steps(model, prompt, supports, queries, examples[:count], args)
    if "precision" in args.only:
        print_precision(model, prompt, supports[:2], queries[:2], args)
    if "downstream" in args.only:
        print_downstream(model, prompt, examples[: args.texts], args)


if __name__ == "__main__":
    data.run(main)
