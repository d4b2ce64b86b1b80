"""
The sanity checks, on a tiny T5 made here; nothing is downloaded. In the paper's order:

    Section 3          the T5 that reads [P; H(x)], tasks and their words
    Equations 1 and 2  against finite differences, torch.func, a quadratic, the textbook loop
    Files              prompts, and PEFT's
    data.py            the few-shot split, readers, pseudo-labels
    cluster.py         meta-tasks
    train_meta.py      runs that are stopped, killed, continued, shared
    finetune.py        runs, searches, reports, figures
    Hostile input      bad files and flags: one line, and nothing left behind
    The README         every command and snippet in it
    The benchmark      python test_metapt.py

    python -m pytest -q
    python test_metapt.py --shape small         # seconds, multiples of a forward pass, peak memory
"""

import argparse
import copy
import ctypes
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

import cluster
import data
import finetune
import metapt
import train_meta
from metapt import InputError, PromptedT5, Task, adapt, load_prompt, meta_gradient, save_prompt
from metapt import textbook_meta_gradient

SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])


def shape(d_model, d_ff, heads, layers, d_kv=64, vocab_size=32128, **more):
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": heads, "num_layers": layers}
    return {**sizes, "d_kv": d_kv, "vocab_size": vocab_size, **more}


V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SHAPES = {  # of the public T5s, for the benchmark; `tiny` is the tests' own
    "tiny": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2},
    "small": shape(512, 2048, 8, 6),
    "base": shape(768, 3072, 12, 12),
    "large": shape(1024, 4096, 16, 24),
    "xl": shape(2048, 5120, 32, 24, **V1_1),
}


def make_tokenizer():
    texts = ["it was " + " ".join(data.WORDS[5]), "yes maybe no ? a b c"]
    for domain in data.DOMAINS:
        texts += [review["text"] for review in data.write_reviews(domain, 200, random.Random(0))]
    words = ["<pad>", "</s>", "<unk>", *sorted(set(" ".join(texts).lower().split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=data.SENTINELS[:20], **names
    )


def make_t5(tokenizer, shape="tiny", **changes):
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**ids, **SHAPES[shape], **changes}))


def make_examples(count, seed=0, domain="films"):
    return data.write_reviews(domain, count, random.Random(seed))


def make_tasks(model, sizes=((3, 4), (2, 2), (4, 1))):
    """Supports and queries of unequal sizes and lengths."""
    supports, queries = [], []
    for i, ((m, n), domain) in enumerate(zip(sizes, data.DOMAINS)):
        supports.append(model.encode(make_examples(m, i, domain)))
        queries.append(model.encode(make_examples(n, 9 + i, domain)))
    return supports, queries


def torchrun(rank, world):
    """The environment that torchrun gives to a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 1}
    return {**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "localhost"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def run(script, *positional, **flags):
    """Runs a script's main in this process: run(finetune, task=[...], seeds=[1], out=path)."""
    argv = [str(value) for value in positional]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not False:
            argv.append(f"--{name.replace('_', '-')}")
        if not isinstance(value, bool):
            argv += [str(one) for one in values]
    script.main(argv)


def command(script, **flags):
    """The same as a command line, for another process."""
    argv = [sys.executable, script.__file__]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The offline demo, its T5 hardly trained, and its clusters made in this process; and a tenth
    of its corpus, for what pre-trains."""

    def in_this_process(argv, check):
        assert check and argv[:2] == [sys.executable, Path(cluster.__file__)]
        cluster.main([str(word) for word in argv[2:]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.subprocess, "run", in_this_process)
        demo = data.demo(tmp_path_factory.mktemp("world") / "demo", steps=3)
    corpus = read_lines(demo / "corpus" / "train.jsonl")[::10]
    data.write_task(demo / "few", SENTIMENT, {"train": corpus})
    return demo


def layer_norm(self, x):
    """T5's layer norm, which transformers has square in float32 even where the model is float64."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def exact(monkeypatch):
    """Lets a float64 T5 compute in float64 throughout."""
    monkeypatch.setattr(T5LayerNorm, "forward", layer_norm)


@pytest.fixture(params=["T5", "T5 v1.1"])
def model(request, exact, tokenizer):
    t5 = make_t5(tokenizer, **(V1_1 if request.param == "T5 v1.1" else {})).double()
    with torch.no_grad():  # large enough weights that the second derivative is no small thing
        for parameter in t5.parameters():
            parameter.mul_(1.5)
    return PromptedT5(t5, tokenizer, SENTIMENT, max_length=32)


@pytest.fixture
def meta(model):
    """The arguments of meta_gradient."""
    return model, model.init_prompt(3).double(), *make_tasks(model), 0.5


def plain(model):
    """A copy of the model with the T5 as transformers has it, cross-attention included."""
    model = copy.deepcopy(model)
    for block in model.t5.decoder.block:
        block.layer[1].EncDecAttention.__class__ = T5Attention
    return model


# ------------------------------------------------------------- Section 3: the T5 that reads [P; H(x)]


@pytest.mark.parametrize("ids", [[5, 9, 4], []])  # without a prompt it is the T5 itself
def test_prompt_of_embedding_rows_is_text_in_front(model, ids):
    examples = make_examples(3)
    batch, ids = model.encode(examples), torch.tensor(ids, dtype=torch.long)
    prompt, t5 = model.t5.get_input_embeddings()(ids).detach(), plain(model).t5
    for row, example in enumerate(examples):
        text = torch.cat([ids, model.encode([example])["input_ids"][0]])[None]
        expected = t5(input_ids=text, decoder_input_ids=model.decoder_ids).logits[0, 1]
        torch.testing.assert_close(model(prompt, batch)[row], expected)


def test_a_wrapped_t5_still_generates_as_before(model):
    batch = model.encode(make_examples(3))
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    generated = [m.t5.generate(**ids, max_new_tokens=6) for m in (model, plain(model))]
    assert torch.equal(*generated)


@pytest.mark.parametrize("part", ["k", "v"])
def test_an_adapter_in_the_cross_attention_is_not_passed_by(tokenizer, part):
    class Adapted(torch.nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    t5 = make_t5(tokenizer)
    getattr(t5.decoder.block[0].layer[1].EncDecAttention, part).__class__ = Adapted
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(3), model.encode(make_examples(4))
    torch.testing.assert_close(model(prompt, batch), plain(model)(prompt, batch))


def test_full_tuning_has_the_dropout_of_a_plain_t5(tokenizer):
    model = PromptedT5(make_t5(tokenizer, dropout_rate=0.5), tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(0), model.encode(make_examples(4))
    logits = []
    for module in (model, plain(model)):
        for name, part in module.t5.named_modules():
            if name.endswith("EncDecAttention"):
                part.training = True
        torch.manual_seed(0)
        logits.append(module(prompt, batch))
    torch.testing.assert_close(*logits)
    assert not torch.equal(logits[0], model(prompt, batch))


def test_shapes_and_one_prompt_for_each_example(model):
    prompt, batch = model.init_prompt(6).double(), model.encode(make_examples(4))
    assert prompt.shape == (6, 16)
    assert model(prompt, batch).shape == (4, len(model.tokenizer))
    prompts = torch.stack([model.init_prompt(6, seed).double() for seed in range(4)])
    each = torch.cat([model(prompts[i], metapt.select(batch, [i])) for i in range(4)])
    torch.testing.assert_close(model(prompts, batch), each)
    assert not torch.equal(model.init_prompt(6, 1), model.init_prompt(6, 2))
    assert torch.equal(model.init_prompt(6, 1), model.init_prompt(6, 1))


def test_padding_changes_nothing(model):
    prompt, batch = model.init_prompt(4).double(), model.encode(make_examples(4))
    pad = torch.nn.functional.pad
    longer = {
        **batch,
        "input_ids": pad(batch["input_ids"], (0, 9), value=7),
        "attention_mask": pad(batch["attention_mask"], (0, 9)),
    }
    torch.testing.assert_close(model(prompt, longer), model(prompt, batch))


def test_loss_predict_and_evaluate_agree_with_their_definitions(model):
    prompt, batch = model.init_prompt(4).double(), model.encode(make_examples(7))
    logits = model(prompt, batch)
    words = model.tokenizer.convert_tokens_to_ids(SENTIMENT.words)
    chosen = [words[label] for label in batch["labels"]]
    expected = -logits.log_softmax(-1)[range(7), chosen]
    torch.testing.assert_close(model.loss(prompt, batch), expected.mean())

    labels = logits[:, words].argmax(-1).tolist()
    assert model.predict(prompt, batch).tolist() == labels
    halves = [metapt.select(batch, [0, 1, 2, 3]), metapt.select(batch, [4, 5, 6])]
    scores = model.evaluate(prompt, halves)
    assert scores["accuracy"] == np.mean(np.array(labels) == batch["labels"].numpy())
    assert scores["loss"] == pytest.approx(expected.mean().item())
    confusion = np.zeros((5, 5))
    for true, said in zip(batch["labels"], labels):
        confusion[true, said] += 1
    assert scores["confusion"] == confusion.tolist()
    answers = logits.argmax(-1).tolist()
    assert scores["in_words"] == pytest.approx(np.mean([answer in words for answer in answers]))


def test_truncation_cuts_the_text_and_never_the_template(tokenizer):
    t5, words = make_t5(tokenizer), tokenizer.convert_ids_to_tokens
    model = PromptedT5(t5, tokenizer, SENTIMENT, max_length=10)
    ids = model.encode([{"text": "gripping plot " * 50}])["input_ids"][0]
    assert words(ids) == ["gripping", "plot"] * 3 + ["it", "was", "<extra_id_0>", "</s>"]

    pair = PromptedT5(t5, tokenizer, Task("pair", "{a} ? {mask} {b}", ["yes", "no"]), 10)
    ids = pair.encode([{"a": "plot " * 9, "b": "music bad"}])["input_ids"][0]
    assert words(ids) == ["plot"] * 5 + ["?", "<extra_id_0>", "music", "bad", "</s>"]
    for text in ("plot", ""):
        with pytest.raises(InputError, match="template .* longer than 3"):
            PromptedT5(t5, tokenizer, SENTIMENT, max_length=3).encode([{"text": text}])


def test_a_text_of_ten_thousand_words_warns_of_nothing(tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 512
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    with caplog.at_level("WARNING"):
        assert model.encode([{"text": "plot " * 10_000}])["input_ids"].shape == (1, 256)
    assert not caplog.records


def make_unigram_tokenizer():
    """A tokenizer with marks of new words, as T5's own has."""
    pieces = "<pad> </s> <unk> ▁ ▁It ▁was ▁bad ▁good . ▁. ▁plot plot ish < a _".split()
    scored = [(piece, -1.0 - len(piece) / 100) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.decoder = decoders.Metaspace()
    more = ["<extra_id_0>", "<sep>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=more, **names)


def make_byte_level_tokenizer():
    """A tokenizer that reads the space before a word, as GPT-2's does."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "initial_alphabet": alphabet}
    texts = ["x bad", "x good", "the plot"] * 9
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**special, show_progress=False))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = ["<extra_id_0>", "<sep>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=more, **names)


TEMPLATES = [
    "{text} It was {mask}",
    "{text} It was {mask}.",
    "{text}It was{mask}",
    "{mask}: {text}",
]
TEMPLATES += ["({text}) [{mask}]", "{text}\nIt was\n{mask}\n!", "{text} <sep> {mask} <sep>"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_of_a_byte_level_tokenizer_spell_h_of_x(template):
    tokenizer = make_byte_level_tokenizer()
    model = PromptedT5(make_t5(tokenizer), tokenizer, Task("x", template, ["bad", "good"]))
    assert tokenizer.convert_ids_to_tokens(model.word_ids) == ["Ġbad", "Ġgood"]
    for text in ("the plot was dull .", " dull. Or not? ", "café's </s> <extra_id_0>"):
        (ids,) = model.encode([{"text": text}])["input_ids"]
        text = re.sub("</s>|<extra_id_0>", "", text.strip())  # in a text they are no tokens
        wanted = template.format(text=text, mask="<extra_id_0>").replace(" <extra", "<extra")
        assert tokenizer.decode(ids[:-1]) == wanted and ids[-1] == tokenizer.eos_token_id


UNIGRAM = (
    "{text} It was {mask}|{text}. It was {mask}.|{mask}. {text}|{text}.{mask}|{text} <sep> {mask}"
)


@pytest.mark.parametrize("template", UNIGRAM.split("|"))
def test_the_ids_of_a_unigram_tokenizer_spell_h_of_x(template):
    tokenizer = make_unigram_tokenizer()
    model = PromptedT5(make_t5(tokenizer), tokenizer, Task("x", template, ["bad", "good"]))
    (ids,) = model.encode([{"text": " plot\n</s> bad <extra_id_0> . "}])["input_ids"]
    wanted = template.format(text="plot bad .", mask="<extra_id_0>")
    wanted = wanted.replace(" <", "<")  # no piece stands for such a space
    assert tokenizer.decode(ids[:-1]) == wanted


def test_a_tokenizer_that_loses_a_templates_spaces_is_refused(tokenizer):
    with pytest.raises(InputError, match="reads .*it was<extra_id_0>.' as .*it was<extra_id_0> .'"):
        PromptedT5(
            make_t5(tokenizer), tokenizer, Task("x", "{text} It was {mask}.", ["bad", "good"])
        )


def test_template_pieces_with_a_sentencepiece_tokenizer():
    tokenizer = make_unigram_tokenizer()
    t5 = make_t5(tokenizer)
    model = PromptedT5(t5, tokenizer, Task("stop", "{text} It was {mask}.", ["bad", "good"]))
    ids = model.encode([{"text": "plot"}])["input_ids"][0]
    pieces = ["▁plot", "▁It", "▁was", "<extra_id_0>", ".", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    ids = model.encode([{"text": "plot <extra_id_0> </s>"}])["input_ids"][0]
    assert (ids == model.mask_id).sum() == 1 and (ids == 1).sum() == 1
    with pytest.raises(InputError, match="'badish' is not one piece"):
        PromptedT5(t5, tokenizer, Task("words", data.TEMPLATE, ["good", "badish"]))


def test_encode_refuses_a_label_without_a_word(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    with pytest.raises(InputError, match=r"labels \[0, 5\] are not all indices"):
        model.encode([{"text": "a", "label": 0}, {"text": "b", "label": 5}])
    labels = model.encode([{"text": "a", "label": True}, {"text": "b", "label": True}])["labels"]
    assert labels.tolist() == [1, 1] and labels.dtype == torch.long  # and no mask of rows


class Transfers(TorchDispatchMode):
    """Counts what crosses between the CPU and a device that is a stand-in for a GPU: "meta" tensors
    compute nothing, but an operation that mixes devices is seen, and so is one that waits."""

    def __init__(self):
        super().__init__()
        self.there = self.back = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = set()
        torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: devices.add(t.device.type), args)
        name = operation.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            target = kwargs.get("device") or args[0].device
            self.there += devices == {"cpu"} and target.type == "meta"
            self.back += "meta" in devices and target.type == "cpu"
            if "meta" in devices and target.type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        else:
            scalars = all(t.dim() == 0 for t in args if isinstance(t, torch.Tensor) and t.is_cpu)
            assert len(devices) < 2 or scalars, f"{name} mixes devices"
            assert not ("meta" in devices and "item" in name), f"{name} waits for the device"
        return operation(*args, **kwargs)


def test_what_crosses_to_the_device_in_a_step_and_an_evaluation(tokenizer):
    t5 = make_t5(tokenizer).to("meta")
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    prompt = torch.zeros(3, 16, device="meta", requires_grad=True)
    batch = model.encode(make_examples(8))
    with Transfers() as step:
        torch.autograd.grad(model.loss(prompt, batch), prompt)
    with Transfers() as evaluation:
        model.evaluate(prompt.detach(), [batch, batch])
    # Ids, mask and labels of a batch go there; the scores of all batches come back at once.
    assert (step.there, step.back) == (3, 0)
    assert (evaluation.there, evaluation.back) == (6, 1)


# ------------------------------------------------------------------------------ Equations 1 and 2


def functional(model, prompt, supports, queries, alpha):
    """Equations 1 and 2 by torch.func."""

    def meta_loss(P):
        total = 0
        for support, query in zip(supports, queries):
            gradient = torch.func.grad(model.loss)(P, support)
            total = total + model.loss(P - alpha * gradient, query)
        return total

    with metapt.twice_differentiable(True):
        return torch.func.grad_and_value(meta_loss)(prompt)


def test_meta_gradient_against_finite_differences(meta):
    model, prompt, supports, queries, alpha = meta

    def meta_loss(P):
        total = 0
        for support, query in zip(supports, queries):
            total += model.loss(adapt(model, P, support, alpha), query).item()
        return total

    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha)
    assert loss.item() == pytest.approx(meta_loss(prompt), rel=1e-12)
    torch.manual_seed(0)
    for _ in range(8):  # in random directions, where no wrong coordinate can hide
        change = 1e-6 * torch.randn_like(prompt)
        numeric = (meta_loss(prompt + change) - meta_loss(prompt - change)) / 2
        error = (gradient * change).sum() - numeric
        assert abs(error) < 1e-7 * gradient.norm() * change.norm()


@pytest.mark.parametrize("definition", [textbook_meta_gradient, functional])
@pytest.mark.parametrize("tasks_per_pass", [None, 1, 2])
def test_meta_gradient_against_its_definitions(meta, definition, tasks_per_pass):
    model, *rest = meta
    gradient, loss = meta_gradient(model, *rest, tasks_per_pass=tasks_per_pass)
    expected, expected_loss = definition(plain(model), *rest)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_of_attention_changes_nothing(meta, implementation):
    model, *rest = meta
    expected, _ = textbook_meta_gradient(plain(model), *rest)
    model.t5.set_attn_implementation(implementation)
    for ours in (meta_gradient, textbook_meta_gradient):
        assert relative_error(ours(model, *rest)[0], expected) < 1e-10


@pytest.mark.parametrize("size", [1, 1000])
def test_meta_gradient_in_passes_of_one_length(meta, monkeypatch, size):
    model, *rest = meta
    expected, expected_loss = textbook_meta_gradient(plain(model), *rest)
    monkeypatch.setattr(metapt, "CHUNK_SIZE", {"cpu": size})
    loss, padded = model.loss, []

    def seen(P, batch, **how):
        padded.append(not batch["attention_mask"].all())
        return loss(P, batch, **how)

    monkeypatch.setattr(model, "loss", seen)
    gradient, total = meta_gradient(model, *rest)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(total, expected_loss)
    assert len(padded) > 2 and any(padded) == (size > 1)


def test_first_order_drops_the_hessian_and_nothing_else(meta):
    model, prompt, supports, queries, alpha = meta
    exact, loss = meta_gradient(*meta)
    first, first_loss = meta_gradient(*meta, first_order=True)
    expected = torch.zeros_like(prompt)
    for support, query in zip(supports, queries):  # the query's gradient at P'_i, as if it were P
        adapted = adapt(model, prompt, support, alpha).detach().requires_grad_()
        expected += torch.autograd.grad(model.loss(adapted, query), adapted)[0]
    assert relative_error(first, expected) < 1e-10
    torch.testing.assert_close(loss, first_loss)
    assert relative_error(first, exact) > 1e-3


class Quadratic:
    """Stands in for the model: L(P) = ½ (p - c)ᵀ A (p - c), A and c chosen by an example's label."""

    class tokenizer:
        pad_token_id = 0

    def __init__(self, kinds, size):
        generator = torch.Generator().manual_seed(0)
        roots = torch.randn(kinds, size, size, generator=generator, dtype=torch.float64)
        self.A = roots @ roots.mT
        self.c = torch.randn(kinds, size, generator=generator, dtype=torch.float64)

    def loss(self, prompts, batch, reduction="mean"):
        p = prompts.expand(len(batch["labels"]), -1, -1).flatten(1)
        away = p - self.c[batch["labels"]]
        losses = 0.5 * torch.einsum("bi,bij,bj->b", away, self.A[batch["labels"]], away)
        return losses.mean() if reduction == "mean" else losses

    def gradient(self, p, labels):
        return torch.stack([self.A[k] @ (p - self.c[k]) for k in labels]).mean(0)


def test_meta_gradient_of_a_quadratic():
    model, alpha = Quadratic(kinds=5, size=6), 0.3

    def batch(*labels):
        ids = torch.zeros(len(labels), 1, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids + 1, "labels": torch.tensor(labels)}

    prompt = torch.randn(2, 3, dtype=torch.float64)
    supports, queries = [batch(0, 1, 2), batch(3)], [batch(4), batch(1, 0)]
    expected, p = torch.zeros(6, dtype=torch.float64), prompt.flatten()
    for support, query in zip(supports, queries):
        adapted = p - alpha * model.gradient(p, support["labels"])
        torch.testing.assert_close(adapt(model, prompt, support, alpha).flatten(), adapted)
        hessian = model.A[support["labels"]].mean(0)
        expected += (torch.eye(6) - alpha * hessian) @ model.gradient(adapted, query["labels"])
    for ours in (meta_gradient, textbook_meta_gradient):
        gradient, _ = ours(model, prompt, supports, queries, alpha)
        torch.testing.assert_close(gradient.flatten(), expected)


def test_adapt_all_equals_adapt_and_moves_no_input(meta):
    model, prompt, supports, _, alpha = meta
    before = prompt.clone()
    stacked = metapt.adapt_all(model, prompt.repeat(len(supports), 1, 1), supports, alpha)
    for i, support in enumerate(supports):
        torch.testing.assert_close(stacked[i], adapt(model, prompt, support, alpha))
    assert torch.equal(prompt, before) and not prompt.requires_grad
    # The share of a process more than there are tasks.
    gradient, loss = meta_gradient(model, prompt, [], [], alpha)
    assert gradient.shape == prompt.shape and not gradient.any() and loss.item() == 0
    with pytest.raises(InputError, match="3 supports and 1 queries"):
        meta_gradient(model, prompt, supports, supports[:1], alpha)


def test_reptile_goes_where_two_steps_go(meta):
    model, prompt, supports, queries, alpha = meta
    gradient = train_meta.reptile_gradient(*meta)
    expected = prompt.clone()
    for support, query in zip(supports, queries):
        once = adapt(model, prompt, support, alpha).detach()
        expected += adapt(model, once, query, alpha) - prompt
    torch.testing.assert_close(prompt - alpha * gradient, expected)


def test_ppt_gradient_is_that_of_the_mean_loss_and_can_be_shared(model, monkeypatch):
    prompt, examples = model.init_prompt(3).double(), make_examples(20)
    args = argparse.Namespace(method="ppt", batch_size=4, seed=1)
    P, batch = prompt.clone().requires_grad_(), train_meta.draw_batch(examples, 4, 1, step=0)
    (expected,) = torch.autograd.grad(model.loss(P, model.encode(batch)), P)
    total = 0
    for rank in range(5):  # the last gets no example
        for name, value in torchrun(rank, 5).items():
            monkeypatch.setenv(name, value)
        drawn = train_meta.draw_encoded(args, model, [examples], 0)
        total = total + train_meta.gradient_of(args, model, prompt, drawn)[0]
    torch.testing.assert_close(total, expected)


# ------------------------------------------------- Appendix A: the schedule, the best of validations


def test_linear_schedule():
    factors = [metapt.linear_schedule(step, 100) for step in range(100)]
    assert factors[0] == 1 / 20 and factors[19] == 1 and factors[60] == 0.5 and min(factors) > 0
    assert all(later < earlier for earlier, later in zip(factors[20:], factors[21:]))


@pytest.mark.parametrize(
    "scores, best",
    [
        ([(0.5, 1.0), (0.6, 2.0)], 1),  # accuracy first
        ([(0.6, 1.0), (0.6, 0.9), (0.6, 0.9)], 1),  # then the lower loss, then the earlier
        ([(0.375, 1.0), (0.37499999999999994, 0.9)], 1),  # a tie but for rounding
        ([(0.9, math.nan), (0.2, 1.0), (0.9, math.inf)], 1),  # what is not finite is never it
        ([(0.9, math.nan)], None),
        ([], None),
    ],
)
def test_best_of(scores, best):
    assert metapt.best_of([{"accuracy": a, "loss": loss} for a, loss in scores]) == best


# -------------------------------------------------------------------------------- Prompts as files


def test_prompt_round_trip_in_pefts_layout(tmp_path, tokenizer):
    prompt, folder = torch.randn(4, 16), tmp_path / "prompt"
    save_prompt(folder, prompt, make_t5(tokenizer), method="maml", step=7)
    loaded, facts = load_prompt(folder, width=16)
    assert torch.equal(loaded, prompt) and facts["step"] == 7
    names = ["adapter_config.json", "adapter_model.safetensors", "metapt.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with pytest.raises(InputError, match="width 16"):
        load_prompt(folder, width=32)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="prompt: .*give a folder that"):
        load_prompt(folder)
    with pytest.raises(InputError, match="nothing/adapter_config.json: No such file"):
        load_prompt(tmp_path / "nothing")


def test_peft_reads_our_prompt_with_the_same_logits(tmp_path, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(5), model.encode(make_examples(3))
    save_prompt(tmp_path / "prompt", prompt, model.t5)
    theirs = peft.PeftModel.from_pretrained(make_t5(tokenizer), tmp_path / "prompt").eval()
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids["decoder_input_ids"] = model.decoder_ids.repeat(3, 1)
    logits = theirs(**ids).logits[:, 1]
    torch.testing.assert_close(model(prompt, batch), logits, atol=1e-5, rtol=0)
    generated = theirs.generate(**ids, max_new_tokens=1)
    assert torch.equal(generated[:, 2], model(prompt, batch).argmax(-1))


def test_a_prompt_of_peft_is_read(world, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    t5, tokenizer = metapt.load_t5(world / "t5")
    form = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4}
    theirs = peft.get_peft_model(t5, peft.PromptTuningConfig(num_transformer_submodules=1, **form))
    theirs.save_pretrained(tmp_path / "theirs")
    prompt, _ = load_prompt(tmp_path / "theirs", width=64)
    assert torch.equal(prompt, theirs.prompt_encoder.default.embedding.weight)

    (tmp_path / "new.txt").write_text("the plot was gripping .\n", encoding="utf-8")
    ours = {"prompt": tmp_path / "theirs", "model": world / "t5", "task": world / "books"}
    run(finetune, predict=tmp_path / "new.txt", device="cpu", **ours)
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    label = model.predict(prompt, model.encode([{"text": "the plot was gripping ."}])).item()
    assert json.loads(capsys.readouterr().out)["label"] == label
    (row,) = tune(world, tmp_path / "results.jsonl", seeds=1, **ours)
    assert row["method"] == "PEFT"

    path = tmp_path / "theirs" / "adapter_config.json"
    config = {**json.loads(path.read_text()), "num_transformer_submodules": 2}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="it has a part for the decoder"):
        load_prompt(tmp_path / "theirs")


def test_a_model_that_is_no_t5_is_refused(tmp_path, monkeypatch):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no T5 but bert"):
        metapt.load_t5(tmp_path)
    with pytest.raises(InputError, match="nothing: .*give a T5"):
        metapt.load_t5(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(InputError, match="demo/t6: no such folder"):
        metapt.load_t5("demo/t6")  # without asking the hub


def test_weights_that_are_missing_or_left_over_are_not_made_up(tmp_path, tokenizer, labeller):
    t5, shared = make_t5(tokenizer), "shared.weight"
    tokenizer.save_pretrained(tmp_path / "t5")
    for name, expected in {
        "encoder": "missing weights: decoder.block.0.layer.0.SelfAttention.k.weight, 28 in all",
        "odd": "unexpected weights: odd.weight, 1 in all",
        "good": None,
    }.items():
        t5.save_pretrained(tmp_path / "t5")
        weights = load_file(tmp_path / "t5" / "model.safetensors")
        if name == "encoder":
            weights = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
        elif name == "odd":
            weights["odd.weight"] = torch.zeros(1)
        else:  # what older checkpoints of T5 hold twice, or do not need
            weights["encoder.embed_tokens.weight"] = weights[shared].clone()
        save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
        if expected:
            with pytest.raises(InputError, match=expected):
                metapt.load_t5(tmp_path / "t5")
    loaded, _ = metapt.load_t5(tmp_path / "t5")
    assert data.fingerprint(loaded) == data.fingerprint(t5)
    with torch.no_grad():
        loaded.decoder.block[1].layer[2].DenseReluDense.wo.weight[0, 0] += 1
    assert data.fingerprint(loaded) != data.fingerprint(t5)

    with pytest.raises(InputError, match="missing weights: classifier.dense.bias, 4 in all"):
        data.load_classifier(labeller.parent / "roberta", "cpu")
    data.load_classifier(labeller.parent / "roberta", "cpu", is_base=True, num_labels=3)
    shutil.copytree(labeller.parent / "roberta", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["roberta.encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="missing weights: roberta.encoder.layer.0.output.dense"):
        data.load_classifier(tmp_path / "base", "cpu", is_base=True, num_labels=3)


def test_a_prompt_of_another_length_than_it_says_is_refused(tmp_path, tokenizer):
    save_prompt(tmp_path, torch.zeros(16, 16), make_t5(tokenizer))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_virtual_tokens": 16', '"num_virtual_tokens": 8'))
    with pytest.raises(InputError, match="says 8 vectors, and 16 are there"):
        load_prompt(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="safe_serialization=True: no pickle is read"):
        load_prompt(tmp_path)


def test_a_t5_in_a_folder_is_found_from_any_other(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    t5, _ = metapt.load_t5("t5")
    save_prompt(tmp_path, torch.zeros(3, 64), t5)
    assert load_prompt(tmp_path)[1]["base_model"] == str(world / "t5")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    metapt.write_json(path, {"a": 1})

    def broken(beside):
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        InputError, match="file.json: cannot be written: No space left on device; mend"
    ):
        metapt.write_beside(path, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert metapt.read_json(path, "") == {"a": 1}


def test_an_error_of_our_own_stays_a_traceback():
    for error in (TypeError("ours"), AttributeError("ours")):
        with pytest.raises(type(error), match="ours"):
            with metapt.blame("file", "mend"):
                raise error


# -------------------------------------------------- data.py: the few-shot split, files of examples


def test_few_shot_splits_are_disjoint_and_reproducible():
    labels = [i % 5 for i in range(200)]
    training, validation = data.few_shot(labels, 40, seed=1)
    assert (training, validation) == data.few_shot(labels, 40, seed=1)
    assert len(set(training + validation)) == 80 and len(training) == 40
    assert data.few_shot(labels, 40, seed=2)[0] != training
    with pytest.raises(InputError, match="lower --shots"):
        data.few_shot(labels, 101, seed=1)


def test_a_balanced_split_draws_equally_from_unequal_classes():
    labels = np.array([0] * 12 + [1] * 90 + [2] * 8 + [3] * 30 + [4] * 60)
    for rows in data.few_shot(labels, 20, 1, balanced=True):
        assert sorted(labels[rows]) == sorted([0, 1, 2, 3, 4] * 4)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_examples_are_read_packed_or_not(tmp_path, suffix):
    line = '{"text": "schön", "label": 2, "more": 1}\n'
    path = pack(tmp_path / f"train.{suffix}", {"": line})
    expected = {"text": "schön", "label": 2, "more": 1}
    assert list(data.read_examples(path, SENTIMENT)) == [expected]


def test_the_memory_of_a_task_does_not_grow_with_its_training_split(world, tmp_path):
    """Of a training split only the labels and the examples drawn are held."""
    import tracemalloc

    peaks = []
    for count in (2_000, 20_000):
        folder = tmp_path / str(count)
        examples = [{"text": "the plot " * 40 + str(i), "label": i % 5} for i in range(count)]
        data.write_task(folder, SENTIMENT, {"train": examples, "test": examples[:5]})
        del examples
        parts = metapt.load_t5(world / "t5")
        args = argparse.Namespace(max_length=64, shots=[8], seeds=[1, 2], validation_shots=None)
        args.balanced, args.max_test, args.device, args.model = False, None, "cpu", "t5"
        tracemalloc.start()
        task = finetune.load_task(folder, *parts, args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [len(part) for part in task["splits"][8, 2]] == [8, 8]
    assert peaks[1] - peaks[0] < 18_000 * 60  # bytes; an example held takes 600 and more


# ---------------------------------------------------------- data.py: readers of the official files


def pack(path, files):
    """Writes {name: text} as a .zip or a .tgz, or one text as a plain, .gz or .xz file."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    elif path.suffix in (".tgz", ".tar"):
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
            for name, text in files.items():
                content = text if isinstance(text, bytes) else text.encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        opener = {".gz": data.gzip.open, ".xz": data.lzma.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(next(iter(files.values())))
    return path


def test_read_sst(tmp_path):
    path = tmp_path / "train.txt"
    trees = [
        "(3 (2 It) (4 (2 's) (4 (2 -LRB-) (4 (3 quite) (4 (4 good\\/great) (2 -RRB-))))))",
        "(2 (2 neutral) (2 .))",
        "",
        "(0 (1 1\xa01\\/2) (0 bad))",
    ]
    path.write_text("\n".join(trees), encoding="utf-8")
    texts = ["It 's ( quite good/great )", "neutral .", "1 1/2 bad"]
    assert list(data.read_sst(path, 5)) == list(zip(texts, [3, 2, 0]))
    assert list(data.read_sst(path, 2)) == list(zip(texts, [1, "neutral", 0]))


def test_read_sst2_of_glue(tmp_path):
    files = {
        "SST-2/train.tsv": 'sentence\tlabel\na "quote\t1\nfine \t0\n',
        "SST-2/dev.tsv": "sentence\tlabel\nx\t1\n",
        "SST-2/test.tsv": "index\tsentence\n0\ty\n",
    }
    path = pack(tmp_path / "SST-2.zip", files)
    splits = {"train": path / "SST-2/train.tsv", "test": path / "SST-2/dev.tsv"}
    unused = [path / "SST-2/test.tsv"]
    assert data.find_splits(path, data.read_sst2, data.GLUE) == (splits, unused)
    assert list(data.read_sst2(splits["train"])) == [('a "quote', 1), ("fine", 0)]
    with pytest.raises(InputError, match="test.tsv:1: not GLUE"):
        list(data.read_sst2(path / "SST-2/test.tsv"))


def test_a_labelled_test_file_is_the_test(tmp_path, capsys):
    lines = "sentence\tlabel\nfine\t1\n"
    for name in ("train", "dev", "test"):
        put(tmp_path / "glue" / f"{name}.tsv", lines.replace("fine", name).encode())
    run(data, "convert", "sst2", input=tmp_path / "glue", out=tmp_path / "task")
    for split, text in {"train": "train", "validation": "dev", "test": "test"}.items():
        assert read_lines(tmp_path / "task" / f"{split}.jsonl") == [{"text": text, "label": 1}]
    assert "not used" not in capsys.readouterr().out


def test_the_official_file_is_found_among_its_kin(tmp_path, capsys):
    some, none = SEMEVAL.format(encoding="UTF-8"), re.sub("<Opinion .*?/>", "", SEMEVAL)
    names = ["EN_REST_SB2_TEST.xml.gold", "DU_REST_SB1_TEST.xml.gold", "EN_REST_SB1_TEST.xml.gold"]
    names += ["ABSA16_Restaurants_Train_SB1_v2.xml", "ABSA16_Restaurants_Train_English_SB2.xml"]
    files = {**dict.fromkeys(names, some), "EN_REST_SB1_TEST.xml": none.format(encoding="UTF-8")}
    find = lambda path: data.find_splits(path, data.read_semeval, data.RESTAURANTS)
    path = pack(tmp_path / "semeval.zip", files)
    train, test = path / "ABSA16_Restaurants_Train_SB1_v2.xml", path / "EN_REST_SB1_TEST.xml.gold"
    assert find(path)[0] == {"train": train, "test": test} and len(find(path)[1]) == 4
    del files["EN_REST_SB1_TEST.xml.gold"], files["DU_REST_SB1_TEST.xml.gold"]
    del files["EN_REST_SB2_TEST.xml.gold"]
    for name in ("EN_REST_SB1_TEST_gold.xml", "ABSA16/Restaurants_Test_Gold.xml"):
        path = pack(tmp_path / "other.zip", {**files, name: some})
        assert find(path)[0]["test"] == path / name
    path = pack(tmp_path / "without.zip", files)
    run(data, "convert", "semeval_restaurant", input=path, out=tmp_path / "task")
    printed = capsys.readouterr().out
    assert "not used, by their names or for want of labels: ABSA16_Restaurants_Train_E" in printed
    assert "EN_REST_SB1_TEST.xml\n" in printed and "no test file was there" in printed

    names = ["._sentihood-train.json", "deep/sentihood-train.json"]  # as macOS packs it
    files = dict.fromkeys(names, "")
    splits = {"train": tmp_path / "hood" / "deep/sentihood-train.json"}
    (tmp_path / "hood" / "deep").mkdir(parents=True)
    for name in names:
        (tmp_path / "hood" / name).write_text("")
    found = data.find_splits(tmp_path / "hood", data.read_sentihood, data.SENTIHOOD)
    assert found == (splits, [])
    path = pack(tmp_path / "sentihood.tgz", files)
    found = data.find_splits(path, data.read_sentihood, data.SENTIHOOD)
    assert found == ({"train": path / "deep/sentihood-train.json"}, [])


def test_semeval_of_2014_and_a_file_without_opinions(tmp_path, capsys):
    terms = ["positive", "positive conflict", "negative", "positive neutral", ""]
    sentences = ""
    for i, polarities in enumerate(terms):
        aspects = "".join(f'<aspectTerm term="x" polarity="{p}"/>' for p in polarities.split())
        sentences += f"<sentence><text>{i}</text><aspectTerms>{aspects}</aspectTerms></sentence>"
    path = put(tmp_path / "Laptop_Train_v2.xml", f"<sentences>{sentences}</sentences>".encode())
    mixed = "mixed opinions"
    expected = [("0", 2), ("1", mixed), ("2", 0), ("3", mixed), ("4", "no opinion")]
    assert list(data.read_semeval(path)) == expected
    path.write_text("<Reviews><Review><sentence><text>a</text></sentence></Review></Reviews>")
    with pytest.raises(InputError, match="no labelled text for train here, but 1 .no opinion.;"):
        run(data, "convert", "semeval_laptop", input=tmp_path, out=tmp_path / "task")


ZHANG_TRAPS = [  # a line of the official CSV, and the text that was written
    ('"5","plain"', "plain"),
    ('"1","a, b\\nc\\n\\nd"', "a, b\nc\n\nd"),
    ('"2","he said \\""no\\""."', 'he said "no".'),
    ('"3","\\""all quoted\\"""', '"all quoted"'),
    ('"4","ends in a backslash \\"', "ends in a backslash \\"),
    ('"5","two ""quotes"""', 'two "quotes"'),
    ('"1","caf\u00e9 :\\\\nnext"', "caf\u00e9 :\\\nnext"),
    ('"2","Great","CD, \\""really\\"""', 'Great CD, "really"'),  # Amazon's have a title
    ('"1","","no title"', "no title"),
    ('"1","only",""', "only"),
    ("", None),
    ('"2"," "', ""),
]
YELP_FILES = ["yelp_review_full_csv.tgz", "yelp.zip", "train.csv", "train.csv.gz", "train.csv.xz"]


@pytest.mark.parametrize("name", YELP_FILES)
def test_convert_yelp_packed_or_not(tmp_path, name, capsys):
    train = "\n".join(line for line, _ in ZHANG_TRAPS) + "\n"
    files = {"yelp/train.csv": train, "yelp/readme.txt": "?", "yelp/test.csv": '"1","x"\n'}
    run(data, "convert", "yelp5", input=pack(tmp_path / name, files), out=tmp_path / "task")
    expected = [{"text": text, "label": int(line[1]) - 1} for line, text in ZHANG_TRAPS if text]
    assert read_lines(tmp_path / "task" / "train.jsonl") == expected
    printed, whole = capsys.readouterr().out, name.startswith("yelp")
    assert "for train kept 4 terrible, 2 bad" in printed and "1 (empty text)" in printed
    assert (tmp_path / "task" / "test.jsonl").exists() == whole
    assert ("--test-share" in printed) != whole  # what finetune.py would miss


def test_read_sentihood(tmp_path):
    def sentence(text, *sentiments):
        opinions = [{"sentiment": sentiment, "aspect": "safety"} for sentiment in sentiments]
        return {"id": 1, "text": text, "opinions": opinions}

    sentences = [
        sentence("  LOCATION1 is safe ", "Positive", "Positive"),
        sentence("rough", "Negative"),
        sentence("both", "Positive", "Negative"),
        sentence("nothing said"),
    ]
    path = tmp_path / "sentihood-train.json"
    path.write_text("\ufeff" + json.dumps(sentences), encoding="utf-8")
    texts = ["LOCATION1 is safe", "rough", "both", "nothing said"]
    labels = [1, 0, "mixed opinions", "no opinion"]
    assert list(data.read_sentihood(path)) == list(zip(texts, labels))


SEMEVAL = """<?xml version="1.0" encoding="{encoding}" standalone="yes"?>
<Reviews><Review rid="1"><sentences>
<sentence><text>Café &amp; bar: good.</text><Opinions><Opinion polarity="positive"/></Opinions>
</sentence>
<sentence OutOfScope="TRUE"><text>Ignored.</text></sentence>
<sentence><text>So so.</text><Opinions><Opinion polarity="neutral"/><Opinion polarity="neutral"/>
</Opinions></sentence>
<sentence><text>Good and bad.</text><Opinions><Opinion polarity="positive"/>
<Opinion polarity="negative"/></Opinions></sentence>
<sentence><text>We went.</text><Opinions/></sentence>
<sentence><text>Bad.</text><Opinions><Opinion polarity="negative"/></Opinions></sentence>
</sentences></Review></Reviews>
"""


@pytest.mark.parametrize("encoding", ["UTF-8", "ISO-8859-1"])
def test_read_semeval(tmp_path, encoding):
    path = tmp_path / "ABSA16_Restaurants_Train_SB1_v2.xml"
    text = SEMEVAL.replace("\n", "\r\n").format(encoding=encoding)
    path.write_bytes(text.encode(encoding))
    assert list(data.read_semeval(path)) == [
        ("Café & bar: good.", 2),
        ("Ignored.", "out of scope"),
        ("So so.", 1),
        ("Good and bad.", "mixed opinions"),
        ("We went.", "no opinion"),
        ("Bad.", 0),
    ]


def test_convert_counts_what_it_drops_and_can_make_a_test_split(tmp_path, capsys):
    path = tmp_path / "ABSA16_Restaurants_Train_SB1_v2.xml"
    path.write_text(SEMEVAL.format(encoding="UTF-8"), encoding="utf-8")
    (tmp_path / "ABSA16_Restaurants_Train_English_SB2.xml").write_text("<Reviews/>")
    out = tmp_path / "task"
    run(data, "convert", "semeval_restaurant", input=tmp_path, out=out, test_share=0.34)
    printed = capsys.readouterr().out
    assert "for train kept 1 bad, 1 okay, 1 good" in printed
    assert "1 (out of scope), 1 (mixed opinions), 1 (no opinion)" in printed
    train, test = (read_lines(out / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 2 and len(test) == 1 and test[0] not in train
    run(data, "convert", "semeval_restaurant", input=tmp_path, out=out)
    assert not (out / "test.jsonl").exists()  # its lines are in train.jsonl again


def test_convert_refuses_a_test_file_alone_and_says_which_class_is_missing(tmp_path, capsys):
    files = {"train.csv": '"1","x"\n"2","y"\n', "test.csv": '"1","z"\n'}
    for name, content in files.items():
        pack(tmp_path / name, {"": content})
    run(data, "convert", "amazon5", input=tmp_path, out=tmp_path / "task")
    warning = "warning: no training example is okay or good or great: is this the file of amazon5?"
    assert warning in capsys.readouterr().out
    before = read_lines(tmp_path / "task" / "train.jsonl")
    with pytest.raises(InputError, match="test.csv: no training file here; looked for train.csv"):
        run(data, "convert", "amazon5", input=tmp_path / "test.csv", out=tmp_path / "task")
    assert read_lines(tmp_path / "task" / "train.jsonl") == before


# ------------------------------------------------------------- data.py: pseudo-labels, Section 4.1


def make_openwebtext(path):
    """A tar of xz-compressed tars of .txt files, as OpenWebText is; one is no UTF-8, one no text."""
    first = {"0-a.txt": 'First one. "Second" two!\n\n', "0-b.txt": b"\xff\xfe"}
    second = {"1-a.txt": "Mr. A. B. Smith came.  He saw 3 things? Yes.\n", "x.md": "no"}
    subsets = {}
    for i, files in enumerate((first, second)):
        inner = pack(path.with_name(f"{i}.tar"), files)
        subsets[f"urlsf_subset0{i}_data.xz"] = data.lzma.compress(inner.read_bytes())
    return pack(path, subsets)


def test_read_corpus(tmp_path):
    path = make_openwebtext(tmp_path / "openwebtext.tar")
    one, two = 'First one. "Second" two!', "Mr. A. B. Smith came. He saw 3 things? Yes."
    assert list(data.read_corpus([path], "paragraph")) == [one, None, two, None]
    sentences = ["First one.", '"Second" two!', None]
    sentences += ["Mr. A. B. Smith came.", "He saw 3 things?", "Yes.", None]
    assert list(data.read_corpus([path], "sentence")) == sentences

    whole = pack(tmp_path / "x.tar", {f"{i}.txt": "a" for i in range(9)}).read_bytes()
    for cut in (100, 512, 700):  # within a header, behind it, within a text
        (tmp_path / "cut.tar").write_bytes(whole[: 1024 * 5 + cut])
        with pytest.raises(InputError, match="cut.tar: .*; give the whole file"):
            list(data.read_corpus([tmp_path / "cut.tar"], "sentence"))

    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "a\\nb"}\n{"text": "c"}\n', encoding="utf-8")
    assert list(data.read_corpus([more] * 2, "paragraph")) == ["a", "b", "c"] * 2
    bad = [
        b"{",
        b"[]",
        b'{"text": ""}',
        b'{"text": 3}',
        b'{"text": "a\\u0000"}',
        b"\xff",
        b"",
        b"3",
    ]
    put(tmp_path / "bad.jsonl", b'{"text": "a"}\n' + b"\n".join(bad) + b'\n{"text": "z"}\n')
    found = list(data.read_corpus([tmp_path / "bad.jsonl"], "paragraph"))
    assert found == ["a", *[None] * len(bad), "z"]  # counted, and passed over
    put(tmp_path / "bad.txt", b"a\n\xff\n \nb\0c\nz")
    assert list(data.read_corpus([tmp_path / "bad.txt"], "paragraph")) == [
        "a",
        None,
        None,
        None,
        "z",
    ]
    texts = {"0.txt": "a", "1.txt": "b\0c", "2.txt": " \n", "3.txt": "z"}
    bad = pack(tmp_path / "bad.tar", texts)
    assert list(data.read_corpus([bad], "paragraph")) == ["a", None, None, "z"]
    assert 3 < len(list(data.read_corpus([more] * 20, "paragraph", share=0.3))) < 40


@pytest.fixture(scope="session")
def labeller(tmp_path_factory, tokenizer):
    """A labeller of two classes that a bag of words tells apart, from a tiny RoBERTa."""
    folder = tmp_path_factory.mktemp("labeller")
    reviews = [review for review in make_examples(600) if review["label"] in (0, 4)]
    reviews = [{**review, "label": review["label"] // 4} for review in reviews]
    task = Task("films", data.TEMPLATE, data.WORDS[2])
    data.write_task(folder / "task", task, {"train": reviews})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "type_vocab_size": 1, "vocab_size": len(tokenizer)}
    RobertaForMaskedLM(RobertaConfig(pad_token_id=0, **sizes)).save_pretrained(folder / "roberta")
    tokenizer.save_pretrained(folder / "roberta")

    where = {"task": folder / "task", "model": folder / "roberta", "out": folder / "labeller"}
    rates = {"learning_rate": 0.005, "warmup": 5, "validation": 60}
    steps = {"max_steps": 100, "eval_every": 50}
    run(data, "labeller", **where, **rates, **steps, threads=1, device="cpu")
    return folder / "labeller"


def test_a_labeller_is_trained_in_float32_whatever_its_base(labeller, tmp_path):
    base = data.AutoModelForSequenceClassification.from_pretrained(labeller, dtype=torch.float16)
    base.save_pretrained(tmp_path / "half")
    data.AutoTokenizer.from_pretrained(labeller).save_pretrained(tmp_path / "half")
    where = {"task": labeller.parent / "task", "model": tmp_path / "half", "out": tmp_path / "out"}
    run(data, "labeller", **where, validation=60, max_steps=1, threads=1, device="cpu")
    weights = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {values.dtype for values in weights} == {torch.float32}


def pseudo_label(labeller, out, **flags):
    """Runs pseudo-label on a corpus of 600 paragraphs; returns the examples and the funnel."""
    corpus = out.parent / "corpus.txt"
    texts = [review["text"].replace(" .", " .\n", 1) + "\n" for review in make_examples(300, 5)]
    corpus.write_text("".join(texts))
    where = {"labeller": labeller, "corpus": corpus, "out": out}
    how = {"unit": "paragraph", "threads": 1, "batch_size": 2, "device": "cpu"}
    run(data, "pseudo-label", **where, **{**how, **flags})
    return read_lines(out / "examples.jsonl"), json.loads((out / "funnel.json").read_text())


def test_labeller_learns_and_keeps_its_best(labeller):
    log = read_lines(labeller / "log.jsonl")
    assert [line["step"] for line in log] == [50, 100]
    assert max(line["accuracy"] for line in log) > 0.8
    assert Task.load(labeller).words == ["bad", "good"]
    where = {"task": labeller.parent / "task", "model": labeller.parent / "roberta"}
    with pytest.raises(InputError, match="a labeller stands there already; give another --out"):
        run(data, "labeller", out=labeller, validation=60, **where)
    with pytest.raises(InputError, match="takes 512 tokens; lower --max-length 513"):
        run(data, "labeller", out=labeller, validation=60, max_length=513, restart=True, **where)
    assert read_lines(labeller / "log.jsonl") == log


def test_pseudo_labels_are_sure_balanced_and_without_duplicates(labeller, tmp_path):
    sure = {"confidence": [0.985, 0.9], "max_words": 14}
    examples, funnel = pseudo_label(labeller, tmp_path / "source", **sure)
    labels = [example["label"] for example in examples]
    assert labels.count(0) == labels.count(1) > 10
    assert Task.load(tmp_path / "source").words == ["bad", "good"]
    for example in examples:
        assert example["confidence"] >= (0.985, 0.9)[example["label"]]
        assert len(example["text"].split()) <= 14
    assert len({example["text"].lower() for example in examples}) == len(examples) == funnel["kept"]
    assert funnel["duplicate"] > 50 and funnel["too long"] > 10 and funnel["unsure"] > 0
    assert funnel["read"] == 600 == sum(funnel.values()) - funnel["read"]

    few, _ = pseudo_label(labeller, tmp_path / "source", per_class=7, **sure)
    assert len(few) == 14 and all(example in examples for example in few)
    with pytest.raises(InputError, match="--restart begins anew"):
        pseudo_label(labeller, tmp_path / "source", min_words=3)


def test_a_labellers_field_may_have_any_name_and_out_may_be_a_link(labeller, tmp_path):
    other, out, disk = tmp_path / "labeller", tmp_path / "source", tmp_path / "disk"
    shutil.copytree(labeller, other)
    Task("films", "{review} It was {mask}", data.WORDS[2]).save(other)
    disk.mkdir()
    out.symlink_to(disk)
    examples, _ = pseudo_label(other, out, confidence=0.5)
    assert set(examples[0]) == {"review", "label", "confidence"}
    assert (disk / "examples.jsonl").exists() and out.is_symlink()


def test_balancing_again_labels_nothing_again(labeller, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError) as error:
        pseudo_label(labeller, tmp_path / "source", confidence=1)
    assert "labelled so; lower --confidence: what was labelled is kept" in str(error.value)
    assert "bad: 166 labelled, sure of 0 different texts" in capsys.readouterr().out
    monkeypatch.setattr(data, "label_corpus", None)  # nor is the corpus read again
    again = pseudo_label(labeller, tmp_path / "source", confidence=0.9)
    monkeypatch.undo()
    assert again == pseudo_label(labeller, tmp_path / "whole", confidence=0.9)


def test_a_class_that_no_text_was_given_is_not_mended_by_confidence(labeller, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the plot was great {i}\n" for i in range(5)))
    where = {"labeller": labeller, "corpus": corpus, "out": tmp_path / "source"}
    with pytest.raises(InputError, match="of 0 labelled so; give more text"):
        run(data, "pseudo-label", confidence=0, device="cpu", **where)


def test_pseudo_labelling_continues_where_it_was_stopped(labeller, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)
    whole = pseudo_label(labeller, tmp_path / "whole")
    classify, calls = data.classify, []

    def interrupted(*args):
        calls.append(len(args[2]))
        if len(calls) == 2:
            os.kill(os.getpid(), data.signal.SIGINT)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return classify(*args)

    monkeypatch.setattr(data, "classify", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 128 texts"):
        pseudo_label(labeller, tmp_path / "parts")
    with pytest.raises(RuntimeError):
        pseudo_label(labeller, tmp_path / "parts")
    assert pseudo_label(labeller, tmp_path / "parts") == whole
    assert len(calls) == 2 + 2 + 600 // 64 + 1 - 3  # no finished block is labelled again


def test_processes_share_a_corpus_and_others_go_on_with_it(labeller, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)
    whole = pseudo_label(labeller, tmp_path / "whole")
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **kwargs: None)
    for name, value in torchrun(1, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FileNotFoundError):  # only the first process writes the output
        pseudo_label(labeller, tmp_path / "shared")
    blocks = tmp_path / "shared" / "blocks"
    assert [path.name[:6] for path in sorted(blocks.glob("0*"))] == [
        f"{number:06}" for number in range(1, 10, 2)
    ]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pseudo_label(labeller, tmp_path / "shared") == whole


def test_classify_gives_every_text_its_own_label(labeller):
    model, tokenizer = data.load_classifier(labeller, "cpu")
    tokenize = data.partial(tokenizer, padding=True, return_tensors="pt")
    texts = [review["text"] for review in make_examples(11, 3)]
    for text, label, confidence in zip(texts, *data.classify(model, tokenize, texts, 4)):
        p = model(**tokenize([text])).logits.softmax(-1)[0]
        assert label == p.argmax() and confidence == pytest.approx(p.max().item(), abs=1e-5)


def test_the_demo_holds_tasks_from_other_domains(world):
    source = read_lines(world / "source" / "clustered.jsonl")
    assert {example["domain"] for example in source} == set(data.SOURCE_DOMAINS)
    assert {example["cluster"] for example in source} == {0, 1, 2, 3}
    for domain in data.TASK_DOMAINS:
        test = read_lines(world / domain / "test.jsonl")
        assert {example["domain"] for example in test} == {domain}
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    texts = [SENTIMENT.template.format(mask=metapt.MASK, **example) for example in source]
    ids = model.tokenizer(texts).input_ids
    assert model.tokenizer.unk_token_id not in {i for row in ids for i in row}


# --------------------------------------------------------- data.py: a small T5 from nothing


def test_learn_tokenizer_keeps_words_whole():
    texts = ["an unforgettable film", "a forgettable plot", "the plot of a film"] * 3
    tokenizer = data.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    for word in ("unforgettable", "okay", " Okay"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    ids = tokenizer("The PLOT").input_ids
    assert ids == tokenizer("the plot").input_ids and ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the plot"


@pytest.mark.parametrize("length", [2, 3, 7, 64, 500, 3000])
def test_corrupted_spans_fit_back_into_the_text(length):
    rng = np.random.default_rng(length)
    sentinels = list(range(1000, 1100))
    ids = rng.integers(10, 900, length).tolist()
    source, target = data.corrupt(ids, sentinels, rng)
    assert source[-1] == target[-1] == 1 and source[-2] in sentinels or length == 2
    spans, at = {}, None
    for i in target[:-1]:
        if i in sentinels:
            at = i
            spans[at] = []
        else:
            spans[at].append(i)
    last = list(spans)[-1]
    assert spans.pop(last) == [] and list(spans) == sentinels[: len(spans)]
    filled = sum((spans[i] if i in spans else [i] for i in source[:-1]), [])
    assert filled == ids
    lost = sum(map(len, spans.values()))
    assert lost == max(1, round(0.15 * length))
    if length == 500:
        assert len(spans) == round(lost / 3)


def test_word_runs_see_through_the_forms_of_a_treebank():
    plain = data.word_runs("We don't think it's the best film (of the year) in any way.")
    treebank = data.word_runs("We do n't think it 's the best film -- of the year in any way .")
    assert plain == treebank and len(plain) == 6
    assert data.word_runs("Short one!") == {"short one"}


def pretrain(world, out, *switches, **flags):
    data.main(
        ["pretrain", "--corpus", f"{world}/few/train.jsonl", "--task", f"{world}/few"]
        + f"--out {out} --d-model 16 --d-ff 16 --heads 2 --layers 1 --pieces 300".split()
        + "--max-steps 6 --eval-every 4 --batch-size 4 --labelled 4 --dtype float32".split()
        + "--validation 40".split()
        + [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        + list(switches)
    )


def test_a_stopped_pretraining_continues_to_the_same_bytes(world, tmp_path, monkeypatch, capsys):
    pretrain(world, tmp_path / "whole")
    validate, rows = data.validate_t5, []

    def stop_then(*args):
        rows.append(1)
        if len(rows) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args)

    monkeypatch.setattr(data, "validate_t5", stop_then)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4 and saved"):
        pretrain(world, tmp_path / "parts")
    pretrain(world, tmp_path / "parts")
    for name in ("model.safetensors", "checkpoint.safetensors", "tokens.bin"):
        same = (tmp_path / "parts" / name).read_bytes()
        assert name.startswith("checkpoint") or same == (tmp_path / "whole" / name).read_bytes()
    assert "parts stands at step 4\n" in capsys.readouterr().out
    t5, tokenizer = metapt.load_t5(tmp_path / "parts")
    PromptedT5(t5, tokenizer, SENTIMENT)
    with pytest.raises(InputError, match="this run began with --max-steps 6, not 9"):
        pretrain(world, tmp_path / "parts", **{"max-steps": 9})


def test_pretraining_anew_takes_nothing_of_an_earlier_run(world, tmp_path, monkeypatch):
    pretrain(world, tmp_path / "t5")
    monkeypatch.setattr(data, "new_t5", None)
    with pytest.raises(TypeError):  # killed before its first checkpoint
        pretrain(world, tmp_path / "t5", "--restart", seed=2)
    monkeypatch.undo()
    pretrain(world, tmp_path / "t5", seed=2)
    pretrain(world, tmp_path / "other", seed=2)
    weights = [tmp_path / name / "model.safetensors" for name in ("t5", "other")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"pieces": 5}, "train.jsonl: .*; raise --pieces"),
        ({"max-length": 3}, "alone is longer than 3 tokens; raise --max-length"),
    ],
)
def test_a_pretraining_of_no_size_is_refused(world, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        pretrain(world, tmp_path / "t5", **flags)


def test_a_demo_that_is_made_anew_is_not_there_before_its_end(world, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    shutil.copytree(world, tmp_path / "demo")
    monkeypatch.setattr(data, "write_demo", interrupted)
    with pytest.raises(KeyboardInterrupt, match="makes the demo again from its beginning"):
        data.demo(tmp_path / "demo", restart=True)
    assert not data.demo_stands(tmp_path / "demo")


def test_a_pretraining_that_diverges_ends(world, tmp_path):
    with pytest.raises(metapt.Diverged, match="step 4: the loss is not finite; lower --learning"):
        pretrain(world, tmp_path / "t5", **{"learning-rate": 1e30})
    assert not (tmp_path / "t5" / "checkpoint.safetensors").exists()


def test_pretraining_learns_both_of_its_objectives(tokenizer):
    t5 = make_t5(tokenizer).requires_grad_(True)
    model = PromptedT5(t5, tokenizer, SENTIMENT, 48)
    t5.requires_grad_(True)
    examples = make_examples(200)
    texts = tokenizer([example["text"] for example in examples], add_special_tokens=False).input_ids
    stream, sentinels = np.array(sum(texts, [])), tokenizer.convert_tokens_to_ids(data.SENTINELS)
    by_class = data.classes_of(examples)

    def draw(step):
        rng = np.random.default_rng(step)
        labelled = model.encode(data.draw_labelled(by_class, ["text"], 16, 0.25, rng))
        return data.draw_windows(stream, 16, sentinels, 48, rng), model, labelled

    optimizer = data.Adafactor(t5.parameters(), 0.02, relative_step=False)
    steps = data.pretrain(t5, draw, optimizer, range(60), lambda step: 0.02, torch.float32)
    losses = np.array(list(steps))
    assert (losses[-5:, :2].mean(0) < 0.6 * losses[:5, :2].mean(0)).all()


def test_a_bad_corpus_leaves_nothing_behind(world, tmp_path, capsys):
    corpus = put(tmp_path / "corpus.jsonl", b'{"text": 3}\n')
    out = tmp_path / "t5"
    line = ends_in_one_line(lambda: pretrain(world, out, corpus=corpus), capsys)
    assert "corpus.jsonl: no line of it is text" in line and not list(out.glob("*"))
    put(corpus, b'{"text": "fine words here"}\n')
    line = ends_in_one_line(lambda: pretrain(world, out, corpus=corpus), capsys)
    assert "too little text" in line and not (out / "arguments.json").exists()


def test_what_shares_words_with_an_excluded_task_is_left_out(world, tmp_path, capsys):
    pretrain(world, tmp_path / "t5", exclude=world / "books")
    printed = capsys.readouterr().out
    left_out = int(re.search(r"train.jsonl: ([\d,]+) of 600 texts", printed)[1])
    assert 0 < left_out < 600
    with pytest.raises(InputError, match="few: --exclude leaves no example of it"):
        pretrain(world, tmp_path / "none", exclude=world / "few")


# ------------------------------------------- cluster.py: meta-tasks, Section 4.2 and Appendix B


@pytest.mark.parametrize("method", ["kmeans", "lda", "random", "label"])
def test_cluster(world, tmp_path, method, capsys):
    reviews = [r for domain in data.SOURCE_DOMAINS for r in make_examples(70, 0, domain)]
    data.write_task(tmp_path / "source", SENTIMENT, {"examples": reviews})
    out, figure = tmp_path / "clusters" / "made.jsonl", tmp_path / "figures" / "tsne.png"
    flags = {"encoder": world / "t5", "figure": figure} if method == "kmeans" else {}
    flags |= {"method": method, "k": 7, "min_size": 1, "vocabulary": 200, "device": "cpu"}
    run(cluster, source=tmp_path / "source" / "examples.jsonl", out=out, **flags)
    examples = read_lines(out)
    sizes = np.bincount([example["cluster"] for example in examples])
    assert len(sizes) == 5 if method == "label" else 5 < len(sizes) <= 7
    assert figure.exists() == (method == "kmeans")
    assert method in ("kmeans", "lda") or sizes.max() - sizes.min() <= 1
    if method == "label":
        assert all(example["cluster"] == example["label"] for example in examples)
    for example, review in zip(examples, reviews, strict=True):
        assert example == {**review, "cluster": example["cluster"]}
    assert Task.load(out.parent).words == SENTIMENT.words
    assert capsys.readouterr().out.count("cluster ") >= 5


def test_kmeans_finds_what_is_there_and_repeats_itself():
    rng = np.random.default_rng(0)
    centres, truth = 5 * rng.normal(size=(4, 8)), np.repeat(np.arange(4), 50)
    points = (centres[truth] + rng.normal(size=(200, 8))).astype(np.float32)
    clusters, distances = cluster.kmeans(points, 4, seed=1)
    assert len(set(zip(truth, clusters))) == 4
    assert np.array_equal(clusters, cluster.kmeans(points, 4, seed=1)[0])
    members = points[clusters == 0]
    expected = ((members - members.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(distances[clusters == 0], expected, rtol=1e-3)


def test_lda_and_telling_words_tell_topics_apart():
    rng = random.Random(0)
    topics = ["soup waiter dessert menu pasta", "keyboard battery screen fan processor"]
    texts = []
    for i in range(300):
        texts.append(" ".join(rng.choices(topics[i % 2].split() + ["nice"], k=9)))
    vectorizer = cluster.CountVectorizer()
    counts = vectorizer.fit_transform(texts)
    clusters, distances = cluster.lda(counts, 2, seed=1, size=100, updates=60)
    assert np.array_equal(clusters, (np.arange(300) % 2) ^ clusters[0])
    assert 0 <= distances.min() <= distances.max() < 0.5
    words = vectorizer.get_feature_names_out()
    telling = cluster.telling_words(counts, clusters, words)
    assert set(telling[clusters[1]][:5]) == set(topics[1].split())
    near = cluster.nearest(clusters, distances)[0]
    assert len(near) == 3 and distances[near[0]] == distances[clusters == 0].min()


def test_describe_prints_what_is_in_a_cluster(capsys):
    texts, labels = [example["text"] for example in make_examples(40)], np.arange(40) % 5
    facts = (texts, labels, labels % 2, np.arange(40)[::-1], {0: ["plot", "ending"], 1: ["music"]})
    cluster.describe(SENTIMENT, *facts)
    printed = capsys.readouterr().out
    assert "cluster 0: 24 examples: 8 terrible, 0 bad, 8 okay, 0 good, 8 great\n    wo" in printed
    assert f"\n    words: music\n    {texts[38][:110]}\n" in printed
    assert f"\n    {texts[39][:110]}\n" in printed


def test_small_clusters_are_an_error_or_dropped(world, tmp_path, monkeypatch):
    examples = make_examples(40) + [{"text": "alone", "label": 4}] * 9
    data.write_task(tmp_path, SENTIMENT, {"examples": examples})
    flags = {"source": tmp_path / "examples.jsonl", "method": "label", "min_size": 9}
    with pytest.raises(InputError, match="cluster 0 has 12 .* fewer than the 13"):
        cluster.check_sizes("x", np.arange(3600) % 300, None, False)  # as train_meta.py has it
    with pytest.raises(InputError, match="cluster 0 has 8 examples, fewer than the 9 .*--drop-sm"):
        run(cluster, **flags)
    assert not (tmp_path / "label.jsonl").exists()
    drawn, plot = [], cluster.plot
    monkeypatch.setattr(cluster, "plot", lambda *args: drawn.extend(args[1]) or plot(*args))
    figure = {"figure": tmp_path / "tsne.png", "encoder": world / "t5", "device": "cpu"}
    run(cluster, **flags, **figure, drop_small=True)
    assert drawn[0][0] == "label, 1 clusters" and set(drawn[0][2]) == {4}
    assert {example["cluster"] for example in read_lines(tmp_path / "label.jsonl")} == {4}


def test_embeddings_are_stored_and_continued(world, tmp_path, monkeypatch):
    texts, encoded = [review["text"] for review in make_examples(7)], []
    encode = cluster.SentenceTransformer.encode

    def counted(self, block, **kwargs):
        encoded.extend(block)
        if "stop" in encoded:
            raise KeyboardInterrupt
        return encode(self, block, **kwargs)

    def embed(texts, name="a.npy"):
        return cluster.embed(texts, tmp_path / name, str(world / "t5"), "cpu", size=3)

    monkeypatch.setattr(cluster.SentenceTransformer, "encode", counted)
    whole = np.array(embed(texts))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    assert np.array_equal(embed(texts), whole) and len(encoded) == 7
    with pytest.raises(KeyboardInterrupt):
        embed(texts[:6] + ["stop"], "b.npy")
    del encoded[:]
    with open(tmp_path / "b.rows", "ab") as file:
        file.write(b"half")  # as a killed process may leave a row
    np.testing.assert_allclose(embed(texts, "b.npy"), whole, atol=1e-6)
    assert encoded == texts[6:]


def test_an_encoder_that_gives_nan_leaves_nothing(world, tmp_path, monkeypatch):
    half = metapt.T5ForConditionalGeneration.from_pretrained(world / "t5", dtype=torch.float16)
    shutil.copytree(world / "t5", tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    where = str(tmp_path / "half"), "cpu"
    with monkeypatch.context() as patch:
        rows = np.array([[1.0, 0.0], [math.nan, 0.0]])
        patch.setattr(cluster.SentenceTransformer, "encode", lambda *args, **kwargs: rows)
        with pytest.raises(
            InputError, match="half: the embedding of 'dull' is not finite; give an"
        ):
            cluster.embed(["fine", "dull"], tmp_path / "a.npy", *where)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    seen, encode = [], cluster.SentenceTransformer.encode
    kept = lambda self, *args, **kwargs: seen.append(self.dtype) or encode(self, *args, **kwargs)
    monkeypatch.setattr(cluster.SentenceTransformer, "encode", kept)
    cluster.embed(["fine", "dull"], tmp_path / "a.npy", *where)
    assert seen == [torch.float32]


# ------------------------------------------------ train_meta.py: Section 4.3, A.2, A.3, and the run


def learn(world, out, method="maml", **flags):
    """A short run of train_meta.py on the demo; returns the prompt."""
    config = world / ("ppt.json" if method == "ppt" else "maml.json")
    short = {"prompt_length": 3, "validation": 40, "max_steps": 6, "eval_every": 2, "batch_size": 2}
    run(train_meta, config=config, out=out, method=method, **{**short, **flags})
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile", "ppt"])
def test_train_meta(world, tmp_path, method):
    prompt = learn(world, tmp_path / "prompt", method)
    log = read_lines(tmp_path / "prompt" / "log.jsonl")
    facts = json.loads((tmp_path / "prompt" / "metapt.json").read_text())
    assert prompt.shape == (3, 64) and [line["step"] for line in log] == [0, 2, 4, 6]
    best = max(log, key=lambda line: (round(line["accuracy"], 9), -line["loss"], -line["step"]))
    found = (facts["method"], facts["step"], facts["accuracy"])
    assert found == (method, best["step"], best["accuracy"])
    assert torch.equal(prompt, learn(world, tmp_path / "again", method))
    (tmp_path / "again" / "adapter_model.safetensors").unlink()  # as an earlier end may leave it
    assert torch.equal(prompt, learn(world, tmp_path / "again", method))


def test_support_query_and_held_out_examples_are_disjoint():
    examples = [{"text": str(i), "cluster": i % 3} for i in range(90)]
    tasks, held_out = train_meta.split_clusters(examples, validation=30, m=4, seed=1)
    for i, (task, held) in enumerate(zip(tasks, held_out)):
        assert {example["cluster"] for example in task + held} == {i}
        assert len({example["text"] for example in task + held}) == 30
        assert (len(task), len(held)) == (20, 10)

    first = set()
    for step in range(50):
        supports, queries = train_meta.draw(tasks, 4, seed=1, step=step)
        for task, support, query in zip(tasks, supports, queries, strict=True):
            assert len({example["text"] for example in support + query}) == 8
            assert all(example in task for example in support + query)
        first.add(supports[0][0]["text"])
    assert len(first) > 10
    assert train_meta.draw(tasks, 4, 1, 7) == train_meta.draw(tasks, 4, 1, 7)
    with pytest.raises(InputError, match="cluster 0 has 30 examples"):
        train_meta.split_clusters(examples, validation=75, m=4, seed=1)


def test_a_large_batch_of_ppt_leaves_its_validation_as_it_is(world, tmp_path, capsys):
    for size in (4, 32):
        learn(world, tmp_path / f"{size}", "ppt", batch_size=size, max_steps=0)
    start = [read_lines(tmp_path / name / "log.jsonl")[0] for name in ("4", "32")]
    assert start[0] == start[1]
    with pytest.raises(InputError, match="3960 examples to train on; lower --batch-size"):
        learn(world, tmp_path / "huge", "ppt", batch_size=5000)


def test_validate_adapts_to_each_cluster_and_scores_the_rest(model):
    prompt = model.init_prompt(3).double()
    held_out, expected = [], []
    for seed in (0, 1):
        support, rest = model.encode(make_examples(4, seed)), model.encode(make_examples(9, 5))
        held_out.append((support, [rest]))
        adapted = adapt(model, prompt, support, 0.5)
        expected.append(model.loss(adapted, rest).item())
    score = train_meta.validate(model, prompt, held_out, alpha=0.5)
    assert score["loss"] == pytest.approx(np.mean(expected))
    as_it_is = train_meta.validate(model, prompt, [(None, held_out[0][1])], alpha=0.5)
    assert as_it_is["loss"] == pytest.approx(model.loss(prompt, rest).item())


def test_every_weight_of_the_t5_stays_as_it_was(world, tokenizer, tmp_path):
    before = load_file(world / "t5" / "model.safetensors")
    learn(world, tmp_path / "prompt")
    t5 = make_t5(tokenizer)
    model, weights = PromptedT5(t5, tokenizer, SENTIMENT), copy.deepcopy(t5.state_dict())
    prompt, examples = model.init_prompt(3), make_examples(8)
    support = model.encode(examples)
    adapted = adapt(model, prompt, support, 0.1)
    meta_gradient(model, prompt, [support], [support], 0.1)
    tuned, _ = finetune.tune(model, adapted.detach(), examples, examples, 0.1, max_epochs=2)
    assert not torch.equal(prompt, adapted) and not torch.equal(adapted, tuned)
    assert all(torch.equal(value, weights[name]) for name, value in t5.state_dict().items())
    assert not any(weight.requires_grad for weight in t5.parameters()) and not t5.training
    after = load_file(world / "t5" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ppt_runs_five_epochs_at_most(world, tmp_path):
    long = {"max_steps": 500, "eval_every": 45, "patience": 99}
    learn(world, tmp_path / "run", "ppt", source_size=100, validation=20, batch_size=9, **long)
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert log[-1]["step"] == 5 * 9  # 80 examples are nine batches of 9


def test_a_stopped_run_continues_to_the_same_prompt(world, tmp_path, monkeypatch):
    whole = learn(world, tmp_path / "whole")
    draw, seen = train_meta.draw, []

    def interrupted(tasks, m, seed, step):
        seen.append(step)
        if len(seen) == 3:
            os.kill(os.getpid(), train_meta.signal.SIGINT)
        return draw(tasks, m, seed, step)

    monkeypatch.setattr(train_meta, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3 and saved"):
        learn(world, tmp_path / "parts")
    assert torch.equal(learn(world, tmp_path / "parts"), whole)
    assert seen == [0, 1, 2, 3, 4, 5]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1]


def test_a_stop_at_the_end_of_a_run_ends_the_search_too(world, tmp_path, monkeypatch):
    validate, seen = train_meta.validate, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 4:  # the last of a run
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args)

    monkeypatch.setattr(train_meta, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path / "out", search=True)
    (folder,) = (tmp_path / "out").glob("alpha*")
    assert len(read_lines(folder / "log.jsonl")) == 4 and load_prompt(folder)[1]["step"] <= 6


def test_a_killed_run_continues_to_the_same_bytes(world, tmp_path):
    """SIGKILL at random moments, three times in one run."""
    short = {"prompt_length": 3, "validation": 40, "max_steps": 60, "eval_every": 2}
    flags = {"config": world / "maml.json", "patience": 99, **short}
    run(train_meta, out=tmp_path / "whole", **flags)
    rng, log = random.Random(0), tmp_path / "parts" / "log.jsonl"
    lines = lambda: len(read_lines(log)) if log.exists() else 0
    for kill in range(3):
        process = subprocess.Popen(command(train_meta, out=tmp_path / "parts", **flags))
        before, began = lines(), time.time()
        while process.poll() is None and lines() <= before and time.time() - began < 60:
            time.sleep(0.01)
        time.sleep(rng.random() / 10)
        process.kill()
        assert process.wait() == -9, "the run ended before it was killed: give it more steps"
    run(train_meta, out=tmp_path / "parts", **flags)
    for name in ("adapter_model.safetensors", "log.jsonl"):
        parts, whole = (tmp_path / folder / name for folder in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()
    assert not [path for path in (tmp_path / "whole").iterdir() if path.name.startswith(".")]


def test_more_steps_and_more_patience_go_on_with_a_finished_run(world, tmp_path):
    whole = learn(world, tmp_path / "whole", max_steps=10)
    learn(world, tmp_path / "parts", max_steps=4)
    assert torch.equal(learn(world, tmp_path / "parts", max_steps=10, patience=9), whole)
    with pytest.raises(InputError, match="began with --max-steps 10, not 8"):
        learn(world, tmp_path / "parts", max_steps=8, patience=9)
    learn(world, tmp_path / "ppt", "ppt", max_steps=4)
    with pytest.raises(InputError, match="began with --max-steps 4, not 10"):
        learn(world, tmp_path / "ppt", "ppt", max_steps=10)


def test_a_run_goes_on_with_its_own_arguments_only(world, tmp_path):
    learn(world, tmp_path / "run", max_steps=0)
    for name, before, value in [("alpha", 0.08, 0.3), ("threads", 1, 2)]:
        with pytest.raises(InputError, match=f"began with --{name} {before}, not {value}"):
            learn(world, tmp_path / "run", max_steps=0, **{name: value})
    learn(world, tmp_path / "run", alpha=0.3, max_steps=0, restart=True)
    (tmp_path / "run" / "arguments.json").write_text("{}")
    with pytest.raises(InputError, match="began with --source None"):
        learn(world, tmp_path / "run", alpha=0.3, max_steps=0)


def test_a_run_goes_on_with_its_own_number_of_threads(world, tmp_path, monkeypatch):
    """The digits depend on it, so a continued run takes the number that it began with."""
    folder = tmp_path / "demo"
    shutil.copytree(world, folder)
    config = json.loads((folder / "maml.json").read_text())
    del config["threads"]
    (folder / "maml.json").write_text(json.dumps(config))
    torch.set_num_threads(1)
    learn(folder, tmp_path / "run", max_steps=2)
    torch.set_num_threads(2)
    learn(folder, tmp_path / "run", max_steps=4)
    assert torch.get_num_threads() == 1
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["threads"] == 1


def test_a_run_goes_on_with_its_own_data_only(world, tmp_path):
    shutil.copytree(world / "source", tmp_path / "source")
    source = tmp_path / "source" / "clustered.jsonl"
    learn(world, tmp_path / "run", source=source, max_steps=0)
    source.write_text("".join(source.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="clustered.jsonl: not the one that the run"):
        learn(world, tmp_path / "run", source=source, max_steps=0)
    shutil.copy(world / "source" / "clustered.jsonl", source)
    task = tmp_path / "source" / "task.json"
    task.write_text(task.read_text().replace("It was", "It is"))
    with pytest.raises(InputError, match="task.json: not the one that the run"):
        learn(world, tmp_path / "run", source=source, max_steps=0)


def test_a_t5_made_anew_in_its_folder_is_another(world, tmp_path, capsys):
    shutil.copytree(world / "t5", tmp_path / "t5")
    flags = {"model": tmp_path / "t5", "out": tmp_path / "r.jsonl", "task": world / "books"}
    learn(world, tmp_path / "run", model=tmp_path / "t5", max_steps=0)
    tune(world, kind="ft", seeds=1, **flags)
    t5, _ = metapt.load_t5(tmp_path / "t5")
    with torch.no_grad():
        t5.shared.weight += 1
    t5.save_pretrained(tmp_path / "t5")
    tune(world, tmp_path / "other.jsonl", prompt=tmp_path / "run", seeds=1, model=flags["model"])
    assert "used with another T5 that is there now" in capsys.readouterr().err
    shutil.copytree(tmp_path / "t5", tmp_path / "elsewhere")
    learn(world, tmp_path / "its", model=tmp_path / "t5", max_steps=0)
    here = {"prompt": tmp_path / "its", "model": tmp_path / "elsewhere", "seeds": 1}
    tune(world, tmp_path / "other.jsonl", **here)
    assert "learned with" not in capsys.readouterr().err  # the same one under another name
    tune(world, tmp_path / "other.jsonl", **{**here, "model": world / "t5"})
    assert f"and is used with {world / 't5'}" in capsys.readouterr().err
    assert len(tune(world, kind="ft", seeds=1, **flags)) == 2  # one of each T5
    assert len(finetune.newest(read_lines(tmp_path / "r.jsonl"))) == 1
    with pytest.raises(InputError, match="t5: not the one that the run"):
        learn(world, tmp_path / "run", model=tmp_path / "t5", max_steps=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_t5s_fingerprint_is_of_its_weights_alone(world, dtype):
    t5 = metapt.load_t5(world / "t5", dtype=dtype)[0]
    assert data.fingerprint(t5) == data.fingerprint(metapt.load_t5(world / "t5")[0])


def test_a_run_in_a_thread_goes_on_without_signals(world, tmp_path):
    failed = []

    def learned():
        try:
            learn(world, tmp_path / "run", max_steps=2)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=learned)
    thread.start()
    thread.join()
    assert not failed and load_prompt(tmp_path / "run")[1]["method"] == "maml"


def test_a_broken_checkpoint_names_restart(world, tmp_path):
    whole = learn(world, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    good = path.read_bytes()
    for broken in (good[:-5], good[:100], b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="checkpoint.safetensors: .*--restart begins anew"):
            learn(world, tmp_path / "run")
    assert torch.equal(learn(world, tmp_path / "run", restart=True), whole)


def test_a_restart_that_is_killed_at_once_leaves_nothing_to_go_on_with(
    world, tmp_path, monkeypatch
):
    learn(world, tmp_path / "run", max_steps=4)
    expected = learn(world, tmp_path / "other", alpha=0.3, max_steps=4)
    monkeypatch.setattr(train_meta, "validate", None)
    with pytest.raises(TypeError):  # in the first validation, before anything is saved
        learn(world, tmp_path / "run", alpha=0.3, max_steps=4, restart=True)
    monkeypatch.undo()
    assert torch.equal(learn(world, tmp_path / "run", alpha=0.3, max_steps=4), expected)


def test_a_config_is_read_from_any_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn(Path(os.path.relpath(world)), tmp_path / "run", max_steps=0)


def test_a_step_that_is_not_finite_names_its_examples(world, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, prompt, supports, queries, *rest, **kwargs):
        gradient, loss = meta_gradient(model, prompt, supports, queries, *rest, **kwargs)
        calls.append(len(supports))
        # The fourth step, and when its tasks are tried one by one, the third of them.
        return gradient * math.nan if len(calls) in (4, 7) else gradient, loss

    monkeypatch.setattr(train_meta, "meta_gradient", poisoned)
    message = "step 3: the loss or gradient of meta-task 2 is not finite on '.*it was"
    with pytest.raises(metapt.Diverged, match=message):
        learn(world, tmp_path / "run")
    assert calls == [4, 4, 4, 4, 1, 1, 1]
    assert load_prompt(tmp_path / "run")[0].isfinite().all()


@pytest.mark.parametrize("method", ["maml", "ppt"])
def test_torchrun_shares_a_step_and_changes_nothing(world, tmp_path, method):
    flags = {"config": world / f"{method}.json", "prompt_length": 3, "validation": 40}
    flags |= {"max_steps": 3, "eval_every": 3}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    python, *rest = command(train_meta, out=tmp_path / "two", **flags)
    done = subprocess.run([python, *torchrun, *rest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    run(train_meta, out=tmp_path / "one", **flags)
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one["prompt"], two["prompt"], atol=1e-6, rtol=0)
    logs = [read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [line["accuracy"] for line in logs[0]] == [line["accuracy"] for line in logs[1]]


def test_search_keeps_the_best_by_validation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_meta, "ALPHAS", [0.08])
    monkeypatch.setattr(train_meta, "BETAS", [0.3, 0.001])
    prompt = learn(world, tmp_path / "run", search=True)
    one = json.loads((tmp_path / "run" / "alpha0.08-beta0.3" / "arguments.json").read_text())
    assert one["search"] is False  # so that --config runs it alone
    runs = [load_prompt(tmp_path / "run" / f"alpha0.08-beta{beta}") for beta in (0.3, 0.001)]
    best = max(runs, key=lambda run: (round(run[1]["accuracy"], 9), -run[1]["loss"]))
    assert torch.equal(prompt, best[0])
    assert load_prompt(tmp_path / "run")[1] == best[1]


def test_search_leaves_out_rates_at_which_it_diverges(world, tmp_path, monkeypatch, capsys):
    train = train_meta.train

    def diverging(args):
        if args.learning_rate > 0.1:
            raise metapt.Diverged("step 3: the loss is not finite")
        return train(args)

    monkeypatch.setattr(train_meta, "train", diverging)
    monkeypatch.setattr(train_meta, "BETAS", [0.3])
    learn(world, tmp_path / "ppt", "ppt", search=True)  # PPT has no α to search, and A.2's own rate
    assert "alpha0.08-beta0.003, the best of 1 by" in capsys.readouterr().out
    monkeypatch.setitem(train_meta.PPT, "learning_rate", 0.3)
    with pytest.raises(InputError, match="it diverges with every pair of rates"):
        learn(world, tmp_path / "none", "ppt", search=True)


def test_source_size_and_the_facts_of_a_prompt(world, tmp_path):
    learn(world, tmp_path / "run", source_size=500, max_steps=0)
    shutil.copytree(world / "source", tmp_path / "source")
    packed = tmp_path / "source" / "clustered.jsonl.gz"
    packed.write_bytes(data.gzip.compress(packed.with_suffix("").read_bytes()))
    learn(world, tmp_path / "packed", source=packed, max_steps=0)
    assert load_prompt(tmp_path / "packed")[1]["clustering"] == "kmeans"
    facts, source = load_prompt(tmp_path / "run")[1], world / "source" / "clustered.jsonl"
    found = (facts["source_size"], facts["clusters"], facts["clustering"])
    assert found == (500, 4, "kmeans")
    digest = data.hashlib.sha256(source.read_bytes()).hexdigest()
    assert digest.startswith(facts["digests"][str(source)])
    assert facts["versions"]["torch"] == torch.__version__ and facts["threads"] == 1
    assert facts["arguments"]["matmul"] == "highest"


# -------------------------------------------------------- finetune.py: Section 5, A.1, A.4, the runs


def tune(world, out, kind="pt", **flags):
    """Short runs of finetune.py on the demo; returns the lines of results."""
    short = {"max_epochs": 2, "max_test": 50, "shots": 8, "prompt_length": 3}
    run(finetune, config=world / f"{kind}.json", out=out, **{**short, **flags})
    return read_lines(out)


def test_finetune_saves_and_predicts(world, tmp_path, capsys):
    learn(world, tmp_path / "meta")
    out, prompts = tmp_path / "results.jsonl", ["random", tmp_path / "meta"]
    saved = {"save": tmp_path / "tuned", "confusion": True}
    rows = tune(world, out, prompt=prompts, seeds=[1, 2], **saved)
    assert len(rows) == len({(row["task"], row["prompt"], row["seed"]) for row in rows}) == 8
    printed = capsys.readouterr().out.replace("**", "")
    books = [row for row in rows if row["task"] == "books" and row["method"] == "maml"]
    one, two = (100 * row["accuracy"] for row in books)
    deviation = abs(one - two) / math.sqrt(2)
    assert f"{(one + two) / 2:.2f} ± {deviation:.2f} (2)" in printed
    assert "8 new runs, 0 stood there already" in printed and "FT: full tuning" in printed
    assert f"| terrible | {rows[0]['confusion'][0][0]} " in " ".join(printed.split())
    again = tune(world, out, prompt=prompts, seeds=[1, 2, 3])
    assert again[:8] == rows  # only what is new is run
    assert "4 new runs, 8 stood there already" in capsys.readouterr().out

    other = {"prompt": prompts, "prompt_length": 4, "seeds": 1, "task": world / "books"}
    tune(world, tmp_path / "other.jsonl", **other)
    assert "meta has 3 vectors, random 4: --prompt-length 3 makes them" in capsys.readouterr().err

    tuned, texts = tmp_path / "tuned" / "books-meta-8-1", tmp_path / "new.txt"
    texts.write_text("The plot was gripping .\n\nDull hero .\n", encoding="utf-8")
    run(finetune, predict=texts, prompt=tuned, device="cpu")
    printed = capsys.readouterr()
    assert "blank lines, which get no label: 1" in printed.err
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["text"] for line in lines] == ["The plot was gripping .", "Dull hero ."]
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, max_length=128)
    batch = model.encode([{"text": line["text"]} for line in lines])
    expected = model.probabilities(load_prompt(tuned)[0], batch)
    for line, p in zip(lines, expected):
        assert line["word"] == SENTIMENT.words[line["label"]] == SENTIMENT.words[p.argmax()]
        assert list(line["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-4)
    texts.write_text("The plot was gripping and the hero was dull .\n")
    cut = []
    for flags in ({}, {"max_length": 12}):
        run(finetune, predict=texts, prompt=tuned, device="cpu", **flags)
        cut.append(json.loads(capsys.readouterr().out)["probabilities"])
    assert cut[0] != cut[1]  # a --max-length that is given wins over that of the prompt's run
    texts.write_text("\n")
    with pytest.raises(InputError, match="new.txt: no text to label"):
        run(finetune, predict=texts, prompt=tuned, device="cpu")
    with pytest.raises(InputError, match="meta: it does not say its task, .*name a --task"):
        run(finetune, predict=texts, prompt=tmp_path / "meta", device="cpu")


def test_predictions_of_labelled_texts_are_scored(world, tmp_path, capsys):
    save_prompt(tmp_path / "p", torch.zeros(3, 64), metapt.load_t5(world / "t5")[0])
    test, out = read_lines(world / "books" / "test.jsonl")[:40], tmp_path / "out.jsonl"
    data.write_examples(tmp_path / "test.jsonl", test)
    flags = {"prompt": tmp_path / "p", "task": world / "books", "device": "cpu"}
    run(finetune, predict=tmp_path / "test.jsonl", out=out, **flags)
    rows = read_lines(out)
    assert [row["gold"] for row in rows] == [example["label"] for example in test]
    share = np.mean([row["gold"] == row["label"] for row in rows])
    assert f"accuracy {share:.1%}, macro-F1 " in capsys.readouterr().out
    run(finetune, predict=tmp_path / "test.jsonl", **flags)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 40 and "of 40 labelled texts" in printed.err

    for name in ("REVIEWS.TXT", "reviews", "reviews.md"):  # a text a line wherever it is not JSON
        run(finetune, predict=put(tmp_path / name, b"5 stars\n{dull}\n"), **flags)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["text"] for line in lines] == ["5 stars", "{dull}"]
    data.write_examples(tmp_path / "test.jsonl", [test[0], {**test[1], "label": 7}])
    with pytest.raises(InputError, match="test.jsonl: text 2: label 7 is not one of 0 to 4"):
        run(finetune, predict=tmp_path / "test.jsonl", **flags)


def test_a_prompt_brings_its_own_t5_along(world, tmp_path, monkeypatch):
    learn(world, tmp_path / "run", max_steps=0)
    seen = []
    monkeypatch.setattr(finetune, "run_all", seen.append)
    for start in (tmp_path / "run", "random"):
        finetune.main(["--task", str(world / "books"), "--prompt", "random", str(start)])
    assert [args.model for args in seen] == [str(world / "t5"), data.MODEL]


def test_other_data_or_a_missing_folder_makes_a_run_new(world, tmp_path, capsys):
    shutil.copytree(world / "books", tmp_path / "books")
    out, flags = tmp_path / "results.jsonl", {"task": tmp_path / "books", "prompt": "random"}
    tune(world, out, seeds=1, **flags)
    tune(world, out, seeds=1, save=tmp_path / "tuned", **flags)
    assert load_prompt(tmp_path / "tuned" / "books-random-8-1")[1]["versions"]
    test = tmp_path / "books" / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:300]))
    assert len(tune(world, out, seeds=1, **flags)) == 2
    assert capsys.readouterr().out.count("1 new run, 0 stood there already") == 3
    with pytest.raises(InputError, match="books-random-8-1: it holds a prompt of another run"):
        tune(world, out, seeds=1, save=tmp_path / "tuned", **flags)
    tune(world, out, seeds=1, save=tmp_path / "tuned", restart=True, **flags)
    with pytest.raises(InputError, match="prompt: Not a directory; give another place"):
        tune(world, out, seeds=2, save=test, **flags)
    for name in ("a/x", "b/x"):
        save_prompt(tmp_path / name, torch.zeros(3, 64), metapt.load_t5(world / "t5")[0])
    with pytest.raises(InputError, match="two tasks have one name, of .'books', 'books'"):
        tune(world, out, task=[tmp_path / "books", world / "books"], prompt="random")
    flags["prompt"] = [tmp_path / "a/x", tmp_path / "b/x"]
    with pytest.raises(InputError, match="two of the prompts have one name"):
        tune(world, out, save="tuned", **flags)
    test.unlink()
    with pytest.raises(InputError, match="test.jsonl: no such file; .*--test-share"):
        tune(world, out, **flags)


def test_full_tuning_starts_every_run_from_the_same_weights(world, tmp_path):
    both = tune(world, tmp_path / "both.jsonl", "ft", seeds=[1, 2], task=world / "books")
    alone = tune(world, tmp_path / "alone.jsonl", "ft", seeds=2, task=world / "books")
    both = [row for row in both if row["seed"] == 2]
    assert [row["loss"] for row in both] == [row["loss"] for row in alone]
    assert all(row["method"] == "ft" and row["prompt"] == "none" for row in alone)


def test_full_tuning_that_diverges_is_no_result(world, tmp_path):
    out = tmp_path / "results.jsonl"
    message = "no validation loss is finite at learning rate 1e.20; lower it"
    with pytest.raises(InputError, match=message):
        tune(world, out, "ft", seeds=1, learning_rate=1e20)
    assert not out.exists()


def test_runs_go_on_after_one_that_diverges(world, tmp_path, monkeypatch):
    run_one = finetune.run_one

    def diverging(args, run):
        if run["seed"] == 1:
            raise metapt.Diverged("no epoch's validation loss is finite")
        return run_one(args, run)

    out, flags = tmp_path / "results.jsonl", {"task": world / "books", "prompt": "random"}
    monkeypatch.setattr(finetune, "run_one", diverging)
    with pytest.raises(InputError, match="1 of 2 runs have no result; books, pt .random., seed 1"):
        tune(world, out, seeds=[1, 2], **flags)
    assert [row["seed"] for row in read_lines(out)] == [2]


def test_what_makes_a_result_doubtful_brings_a_warning(world, tmp_path, capsys):
    same = [{"text": "the plot was fine", "label": 2}] * 40
    task = Task("same", data.TEMPLATE, data.WORDS[5])
    data.write_task(tmp_path / "same", task, {"train": same, "test": same[:9]})
    tune(world, tmp_path / "r.jsonl", task=tmp_path / "same", prompt="random", seeds=1)
    printed = capsys.readouterr()
    line = "warning: all 8 training examples of same, seed 1, are 'okay'; --balanced"
    assert line in printed.out and "same/test.jsonl holds 16 of the 16 examples" in printed.err
    tune(world, tmp_path / "r.jsonl", task=world / "books", prompt="random", seeds=1)
    assert "warning" not in "".join(capsys.readouterr())


def test_accumulated_passes_give_the_same_prompt(model):
    examples = (model.init_prompt(3).double(), make_examples(20), make_examples(8, 1))
    settings = {"learning_rate": 0.1, "batch_size": 8, "max_epochs": 2}
    once, thrice = (finetune.tune(model, *examples, accumulate=n, **settings) for n in (1, 3))
    torch.testing.assert_close(once[0], thrice[0])


def test_a_stopped_sweep_continues_and_processes_share_it(world, tmp_path, monkeypatch):
    out, run_one, ran = tmp_path / "new" / "results.jsonl", finetune.run_one, []
    sweep = {"method": ["pt", "ft"], "seeds": [1, 2], "shots": [4, 8], "max_epochs": 1}
    sweep |= {"prompt": "random", "threads": 1}

    def stopped(*args):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(args)
        return run_one(*args)

    monkeypatch.setattr(finetune, "run_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(world, out, **sweep)
    before = read_lines(out)
    sweep |= {"config": world / "pt.json", "prompt_length": 3, "max_test": 50, "out": out}
    processes = []
    for rank in "01":
        env = {**os.environ, **torchrun(rank, 2)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        processes.append(subprocess.Popen(command(finetune, **sweep), env=env, **pipes))
    printed = "".join(process.communicate()[0] for process in processes)
    rows = read_lines(out)
    assert len(before) == 3 and rows[:3] == before and "stood there already" in printed
    assert printed.count(" shots, seed ") == 13  # no process made another's run
    assert len(rows) == len({finetune.identity(row) for row in rows}) == 2 * 2 * 2 * 2


def test_a_state_of_a_task_that_is_back_is_the_newest_again(world, tmp_path):
    folder, out = tmp_path / "books", tmp_path / "results.jsonl"
    shutil.copytree(world / "books", folder)
    flags, texts = {"task": folder, "prompt": "random", "seeds": 1}, (folder / "task.json")
    first = texts.read_text()
    for text in (first, first.replace("It was", "It is"), first):
        texts.write_text(text)
        rows = tune(world, out, **flags)
    assert len(rows) == 2 and len(finetune.newest(rows)) == 1
    assert (
        finetune.newest(rows)[0]["data"] == tune(world, tmp_path / "anew.jsonl", **flags)[0]["data"]
    )


def test_variables_that_torchrun_did_not_set_do_not_count(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data.run(lambda: None)
    assert "is set, but not by torchrun: this is the only process" in capsys.readouterr().err
    assert data.rank_and_world() == (0, 1)
    for name, value in {**torchrun(1, 2), "RANK": "x"}.items():
        monkeypatch.setenv(name, value)
    assert "RANK and WORLD_SIZE must be numbers" in ends_in_one_line(data.rank_and_world, capsys)


def test_two_equal_commands_at_once_write_no_run_twice(world, tmp_path, monkeypatch):
    out, run_one, ran = tmp_path / "results.jsonl", finetune.run_one, []

    def beside(args, run):
        ran.append(run["seed"])
        row = run_one(args, run)
        if run["seed"] == 1:  # the other command is as far, and a run ahead
            finetune.add_result(out, row)
            after = json.loads(json.dumps({**row, "seed": 2}))
            monkeypatch.setattr(finetune, "run_one", run_one)
            other, _, _ = finetune.begin({**run, "seed": 2})
            finetune.add_result(out, {**after, **other})
        return row

    monkeypatch.setattr(finetune, "run_one", beside)
    rows = tune(world, out, task=world / "books", prompt="random", seeds=[1, 2])
    assert [row["seed"] for row in rows] == [1, 2] and ran == [1]


def test_search_chooses_by_validation_alone(tokenizer, monkeypatch):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    weights, seen = copy.deepcopy(model.t5.state_dict()), []
    found = [(0.9, math.nan), (0.7, 1.2), (0.7, 1.1), (0.7, 1.3), (0.5, 0.1)]

    def tune(model, start, training, validation, learning_rate, full):
        assert full
        assert all(torch.equal(w, weights[name]) for name, w in model.t5.state_dict().items())
        accuracy, loss = found[len(seen)]
        seen.append(learning_rate)
        with torch.no_grad():
            model.t5.shared.weight.fill_(learning_rate)
        if math.isnan(loss):
            raise finetune.Diverged("no epoch's validation loss is finite")
        return start, {"validation_accuracy": accuracy, "validation_loss": loss}

    monkeypatch.setattr(finetune, "tune", tune)
    monkeypatch.setattr(PromptedT5, "evaluate", None)  # so no test split is scored
    _, facts = finetune.search(model, None, [], [])
    assert seen == finetune.RATES and facts["learning_rate"] == 8e-5
    assert (model.t5.shared.weight == 8e-5).all()
    assert facts["tried"] == dict(zip(finetune.RATES, [None, 0.7, 0.7, 0.7, 0.5]))


def test_a_searched_run_says_what_was_tried(world, tmp_path):
    flags = {"search": True, "seeds": 1, "task": world / "books"}
    (row,) = tune(world, tmp_path / "searched.jsonl", "ft", **flags)
    rates = [float(rate) for rate in row["tried"]]
    assert row["settings"]["learning_rate"] == rates == finetune.RATES
    chosen = row["tried"][str(row["learning_rate"])]
    assert chosen == row["validation_accuracy"] == max(row["tried"].values())


def test_bfloat16_keeps_the_prompt_in_float32(world, tmp_path):
    flags = {"prompt": "random", "seeds": 1, "dtype": "bfloat16", "save": tmp_path / "tuned"}
    row, _ = tune(world, tmp_path / "results.jsonl", **flags)
    prompt, _ = load_prompt(tmp_path / "tuned" / "books-random-8-1")
    assert row["settings"]["dtype"] == "bfloat16" and np.isfinite(row["loss"])
    assert not torch.equal(prompt, prompt.bfloat16().float())  # its updates were not rounded


PAIR = Task("pair", "{premise} ? {mask} . {hypothesis}", ["yes", "maybe", "no"])
CHOICE = Task("choice", "{question} A {a} B {b} C {c} {mask}", ["A", "B", "C"])


def make_pair(rng):
    label, plot = rng.randrange(3), rng.choice(["plot", "music", "script", "camera"])
    said = ["fine", "nice", "poor"][label]
    return {"premise": f"the {plot} was fine", "hypothesis": f"{plot} {said}", "label": label}


def make_choice(rng):
    label, answers = rng.randrange(3), ["poor", "poor", "poor"]
    answers[label] = "great"
    return {"question": "the plot ?", **dict(zip("abc", answers)), "label": label}


@pytest.mark.parametrize("task, make, epochs", [(PAIR, make_pair, 8), (CHOICE, make_choice, 20)])
def test_pairs_and_choices_through_the_template_alone(tmp_path, tokenizer, task, make, epochs):
    rng = random.Random(0)
    splits = {split: [make(rng) for _ in range(120)] for split in ("train", "test")}
    data.write_task(tmp_path / task.name, task, splits)
    make_t5(tokenizer, dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    flags = {"task": tmp_path / task.name, "model": tmp_path / "t5"}
    flags |= {"shots": 60, "seeds": 1, "learning_rate": 0.01, "patience": 20, "device": "cpu"}
    flags |= {"prompt_length": 3, "out": tmp_path / "results.jsonl"}
    for method, most in (("ft", epochs), ("pt", 1)):
        run(finetune, method=method, max_epochs=most, **flags)
    full, prompt = read_lines(tmp_path / "results.jsonl")
    assert full["accuracy"] > 0.9 and full["macro_f1"] > 0.9 and np.sum(full["confusion"]) == 120
    assert prompt["method"] == "random" and prompt["words"] == task.words


def test_macro_f1_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, said = rng.integers(3, size=50), rng.integers(2, size=50)
    confusion = metrics.confusion_matrix(true, said, labels=range(4)).tolist()  # 3 occurs nowhere
    expected = metrics.f1_score(true, said, average="macro")
    assert finetune.macro_f1(confusion) == pytest.approx(expected)


# ---------------------------------------------------- finetune.py: the paper's tables and figures


def result(method, accuracy, seed, prompt=None, task="sst5", shots=40, **more):
    """A line of results."""
    settings = {"model": "google-t5/t5-base", "learning_rate": 0.003}
    settings |= {name: more.pop(name) for name in settings.keys() & more.keys()}
    facts = {"task": task, "method": method, "prompt": prompt or f"prompts/{method}"}
    facts |= {"shots": shots, "seed": seed, "digest": prompt or method, "data": "0"}
    return {**facts, "settings": settings, "accuracy": accuracy, **more}


def report(tmp_path, rows, **flags):
    data.write_examples(tmp_path / "results.jsonl", rows)
    run(finetune, report=tmp_path / "results.jsonl", **flags)


METAPT, PPT = [0.45, 0.46, 0.44, 0.47, 0.43], [0.41, 0.45, 0.42, 0.43, 0.44]


def test_report_beside_the_papers_tables(tmp_path, capsys):
    rows = [result("maml", a, i, clustering="kmeans", clusters=10) for i, a in enumerate(METAPT)]
    rows.append(result("ppt", 0.99, 0, digest="of an earlier prompt"))
    rows += [result("ppt", accuracy, seed) for seed, accuracy in enumerate(PPT)]
    rows += [
        result("maml", 0.43, 0, "prompts/label", clustering="label"),
        result(
            "maml", 0.1, 0, "prompts/own", clustering=None
        ),  # clusters that cluster.py did not make
        result("maml", 0.9, 0, task="mine"),
        result("maml", 0.42, 0, "prompts/mixed", source_task="yelp5", clustering="random"),
        result("maml", 0.5, 0, "prompts/y", source_task="yelp5", clustering="kmeans"),
        result("ft", 0.44, 0, "none"),
        result("ft", 0.3, 0, "none", learning_rate=0.1),
        result("ft", 0.99, 0, "none", shots=80),
        result("ft", 0.2, 0, "none", model="other"),
    ]
    report(tmp_path, rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    maml = "45.00 ± 1.58; paper 45.26±0.39, -0.26 | **90.00** (1) |"
    for line in [
        "| t5-base | 40 | MetaPT | prompts/own | 10.00 (1); paper 45.26±0.39, -35.26 | - |",
        "| t5-base | 40 | MetaPT, label | prompts/label | 43.00 (1) | - |",
        f"| t5-base | 40 | MetaPT | prompts/maml | {maml}",
        "| t5-base | 40 | PPT | prompts/ppt | 43.00 ± 1.58; paper 42.90±1.08, +0.10 | - |",
        "| t5-base | 40 | MetaPT(Y) | prompts/y | **50.00** (1); paper 46.24±0.42, +3.76 " "| - |",
        "| t5-base | 40 | FT | learning_rate 0.003 | 44.00 (1); paper 43.57±2.56, +0.43 " "| - |",
        "| t5-base | 80 | FT | learning_rate 0.003 | **99.00** (1) | - |",
        "| other | 40 | FT | learning_rate 0.003 | **20.00** (1) | - |",
        "| t5-base | 40 | MetaPT(Y), random | prompts/mixed | 42.00 (1); paper 42.95±1.05, -0.95 "
        "| - |",
    ]:
        assert line in lines, line
    stats = pytest.importorskip("scipy.stats")
    paired = stats.ttest_rel(np.multiply(100, PPT), np.multiply(100, METAPT))
    low, high = paired.confidence_interval()
    assert f"| t5-base | 40 | PPT | prompts/ppt | -2.00 [{low:+.2f}, {high:+.2f}] | - |" in lines


def test_only_runs_on_the_same_examples_are_compared(tmp_path, capsys):
    rows = [result("maml", 0.5, seed) for seed in range(3)]
    rows += [result("ppt", 0.3, seed) for seed in range(3)]
    for row in rows[3:]:
        row["settings"] = {**row["settings"], "max_test": 200}
    rows += [result("maml", 0.6, seed, task="sst2") for seed in range(3)]
    for row in rows[6:]:
        row["settings"] = {**row["settings"], "max_test": 100}
    rows += [{**row, "method": "ft", "prompt": "none", "accuracy": 0.7} for row in rows[6:]]
    report(tmp_path, rows, against="MetaPT")
    printed = " ".join(capsys.readouterr().out.split())
    assert "| t5-base | 40, max_test 200 | PPT | prompts/ppt | **30.00 ± 0.00** (3);" in printed
    assert "| t5-base | 40, max_test 200 | PPT | prompts/ppt | - | - |" in printed
    assert "| FT | - | - | **+10.00 [+10.00, +10.00]** |" in printed  # which sst5 has no line of


def test_a_training_of_fewer_draws_widens_no_interval(tmp_path, capsys):
    rows = [result("maml", a, seed, "maml-1", recipe="a") for seed, a in enumerate(METAPT)]
    rows += [result("ppt", accuracy, seed, "ppt-0") for seed, accuracy in enumerate(PPT)]
    report(tmp_path, rows, against="PPT")
    whole = " ".join(capsys.readouterr().out.split())
    rows.append(result("maml", METAPT[4], 4, "maml-2", recipe="a"))
    report(tmp_path, rows, against="ppt")
    gains = 100 * np.subtract(METAPT, PPT)
    half = pytest.importorskip("scipy.stats").t.ppf(0.975, 4) * gains.std(ddof=1) / 5**0.5
    for printed in (whole, " ".join(capsys.readouterr().out.split())):
        assert f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |" in printed


@pytest.mark.parametrize(
    "ours, theirs, shown",
    [
        (METAPT, [0.43, 0.439, 0.418, 0.447, 0.406], "+2.20 [+2.00, +2.40]"),
        ([0.5] * 5, [0.25] * 5, "+25.00 [+25.00, +25.00]"),  # an interval of no width
    ],
)
def test_a_gain_whose_interval_leaves_out_0_is_bold(tmp_path, capsys, ours, theirs, shown):
    rows = [result("maml", accuracy, seed) for seed, accuracy in enumerate(ours)]
    rows += [result("ppt", accuracy, seed) for seed, accuracy in enumerate(theirs)]
    report(tmp_path, rows, against="prompts/ppt")
    assert f"**{shown}**" in capsys.readouterr().out


def test_trainings_of_one_prompt_share_a_line_and_widen_its_interval(tmp_path, capsys):
    rows = []
    for training, shift in enumerate([-0.03, 0, 0.03]):
        for seed, accuracy in enumerate(METAPT):
            rows.append(result("maml", accuracy + shift, seed, f"maml-{training}", recipe="a"))
    rows += [
        result("ppt", accuracy, seed, "ppt-0", recipe="b") for seed, accuracy in enumerate(PPT)
    ]
    report(tmp_path, rows, against="maml-1")  # any of a line's prompts names it
    assert "Against maml-1" in capsys.readouterr().out
    report(tmp_path, rows, against="ppt-0")
    printed = " ".join(capsys.readouterr().out.split())
    deviation = np.std(100 * np.add.outer([-0.03, 0, 0.03], METAPT), ddof=1)
    name = "| t5-base | 40 | MetaPT | maml-0, maml-1, maml-2 |"
    assert f"{name} **45.00 ± {deviation:.2f}** (3 × 5)" in printed
    gains = 100 * np.subtract(METAPT, PPT)
    over_draws, over_trainings = gains.var(ddof=1) / 5, 9 / 3
    variance = over_draws + over_trainings
    freedom = variance**2 / (over_draws**2 / 4 + over_trainings**2 / 2)
    half = pytest.importorskip("scipy.stats").t.ppf(0.975, freedom) * variance**0.5
    assert f"{name} +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |" in printed


def test_a_table_holds_the_newest_of_a_task_and_no_two_lengths_in_a_line(tmp_path, capsys):
    rows = [result("ppt", 0.1, seed, data="of an earlier test.jsonl") for seed in (1, 2, 3)]
    rows += [result("ppt", 0.4, 1), result("ppt", 0.5, 1, model="other", data="as t5-base's not")]
    for length, seed in ((20, 1), (20, 2), (100, 1)):
        row = result("random", length / 100, seed, "random")
        rows.append({**row, "settings": {**row["settings"], "prompt_length": length}})
    report(tmp_path, rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: 3 results of a prompt, a task or a T5" in printed
    assert "| PPT | prompts/ppt | 40.00 (1)" in printed and "| **50.00** (1)" in printed
    assert "| random, prompt_length 20 | 20.00 ± 0.00 (2)" in printed
    assert "| random, prompt_length 100 | **100.00** (1)" in printed


def test_namesakes_are_told_apart_and_one_training_in_two_folders_is_one(tmp_path, capsys):
    rows = [result("ft", 0.3, 1, "none", model="a/t5"), result("ft", 0.9, 1, "none", model="b/t5")]
    for name, digest in (("metapt", "one"), ("k10", "one"), ("again", "two")):
        how = {"recipe": "a", "digest": digest}
        rows += [result("maml", a, seed, name, **how) for seed, a in enumerate(METAPT)]
    report(tmp_path, rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "| a/t5 | 40 | FT | - | **30.00** (1) |" in printed
    assert "| b/t5 | 40 | FT | - | **90.00** (1) |" in printed
    assert "| t5-base | 40 | MetaPT | metapt, k10, again | **45.00 ± 1.49** (2 × 5)" in printed
    report(tmp_path, rows[:-3])
    assert "(7)" in capsys.readouterr().out  # five draws with one training, two with the other


def test_a_recipe_is_a_prompts_arguments_without_its_seed():
    facts = {"arguments": {"seed": 1, "out": "a", "alpha": 0.08}, "digests": {"source": "0"}}
    again = {"arguments": {"seed": 2, "out": "b", "alpha": 0.08}, "digests": {"source": "0"}}
    assert finetune.recipe_of(facts) == finetune.recipe_of(again)
    again["arguments"]["threads"] = 2
    assert finetune.recipe_of(facts) == finetune.recipe_of(again)
    again["arguments"]["alpha"] = 0.3
    assert finetune.recipe_of(facts) != finetune.recipe_of(again)
    assert finetune.recipe_of({}) is None


def test_report_prints_confusion_matrices(tmp_path, capsys):
    facts = {"words": ["bad", "good"], "confusion": [[3, 1], [0, 4]]}
    rows = [result("maml", 0.9, seed, **facts) for seed in (1, 2)]
    rows += [result("ft", 0.9, 1, "none", model=model, **facts) for model in ("a/t5", "b/t5")]
    report(tmp_path, rows, confusion=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "sst5, t5-base, 40 shots, MetaPT, prompts/maml, all seeds" in printed
    assert "| bad | 6 | 2 | | good | 0 | 8 |" in printed
    assert "sst5, b/t5, 40 shots, FT, all seeds" in printed and "| 3 | 1 |" in printed
    with pytest.raises(InputError, match="'words' is missing; run them again for --confusion"):
        report(tmp_path, [result("maml", 0.9, 1)], confusion=True)
    with pytest.raises(InputError, match="run them again for --confusion"):
        report(tmp_path, [result("maml", 0.9, 1, words=3, confusion=[[1]])], confusion=True)


@pytest.mark.parametrize("count", [1, 200])  # less than a buffer holds, and more
def test_a_reader_that_has_enough_ends_a_report_quietly(tmp_path, monkeypatch, capfd, count):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    rows = [result("maml", 0.5, seed, f"prompts/{200 * 'x'}{seed}") for seed in range(count)]
    with pytest.raises(SystemExit, match="1"):
        data.run(lambda: report(tmp_path, rows))
    sys.stdout.close()  # as a process does at its end, and may not fail either
    assert not capfd.readouterr().err


@pytest.mark.parametrize("x", ["shots", "source_size", "clusters"])
def test_figure(tmp_path, x, monkeypatch):
    plotted, plot = [], finetune.plot
    monkeypatch.setattr(finetune, "plot", lambda *args: plotted.append(plot(*args)) or plotted[0])
    rows = []
    for at in (30, 10):
        for seed in (1, 2):
            for task in ("sst5", "sst2"):
                facts = {"shots": 40, "clusters": 10, "source_size": 1000, x: at}
                prompt = None if x == "shots" else f"prompts/{at}"
                accuracy = 0.4 + at / 1000 + seed / 100
                rows.append(result("maml", accuracy, seed, prompt, task, **facts))
    rows += [result("ft", 0.3, 1, "none", shots=shots) for shots in (10, 20)]
    figure = tmp_path / "figures" / "figure.png"
    report(tmp_path, rows, figure=figure, x=x)
    assert figure.read_bytes().startswith(b"\x89PNG")
    panels = plotted[0].axes
    assert [panel.get_title() for panel in panels] == ["sst5", "sst2"]
    assert panels[0].get_xscale() == ("linear" if x == "clusters" else "log")
    points = panels[1].lines[0].get_xydata().tolist()
    assert points == [[10, pytest.approx(42.5)], [30, pytest.approx(44.5)]]
    assert len(panels[0].lines) == (2 if x == "shots" else 1)


# ------------------------------------------------- Hostile input: one line, and nothing left behind

BAD_INPUTS = []  # (reader, the file's name, what the message must hold, content or a writer of it)


def bad_file(reader, name, *contents):
    """Files that are bad as a whole; the message names the file, or where that is the unit its
    folder."""
    BAD_INPUTS.extend((reader, name, name.split("/")[0], content) for content in contents)


def bad_line(reader, name, first, *lines):
    """Files whose second line is bad; the message names it."""
    BAD_INPUTS.extend((reader, name, f"{name}:2: ", first + line + b"\n") for line in lines)


def packed(name, content, cut=0):
    """Writes a packed file, and cuts off its end."""

    def write(path):
        pack(path, {name: content})
        path.write_bytes(path.read_bytes()[: -cut or None])

    return write


def tar_of(name, size=0, **facts):
    """Writes a tar of one member whose header says `facts`, and a size that is a lie."""

    def write(path):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            for fact, value in facts.items():
                setattr(member, fact, value)
            tar.addfile(member)
        member.size = size
        if size:
            path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))

    return write


def safetensors(header, tensors=b"", size=None):
    """A safetensors file: its header's size, which may be a lie, its header and its tensors."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + tensors


def one_tensor(dtype, shape, end, content):
    facts = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return safetensors({"prompt_embeddings": facts}, content)


def tensor_file(metadata=None, **tensors):
    def write(path):
        path.parent.mkdir(exist_ok=True)
        found = {name: torch.as_tensor(values) for name, values in tensors.items()}
        save_file(found, path, metadata)

    return write


def checkpoint(facts, **changes):
    """A whole checkpoint with these facts in its header, and some tensors changed."""
    tensors = {"prompt": torch.zeros(3, 16), "best": torch.zeros(3, 16), **changes}
    return tensor_file({"facts": facts}, **tensors)


def array_file(values):
    return lambda path: np.save(path, values, allow_pickle=True)


def entities(levels, times=10):
    """The billion laughs: every entity is ten of the one before."""
    grown = ""
    for i in range(1, levels):
        grown += f'<!ENTITY e{i} "{f"&e{i - 1};" * times}">'
    return f'<!DOCTYPE x [<!ENTITY e0 "{"ha" * 50}">{grown}]><x>&e{levels - 1};</x>'.encode()


# Readers of a file of which they need the place alone.


def read_prompt(path):
    """Reads a prompt of which only the file `path` is bad."""
    with tempfile.TemporaryDirectory() as other:
        good = Path(other) / path.parent.name
        save_prompt(good, torch.zeros(3, 16), make_t5(make_tokenizer()))
        shutil.copy(path, good)
        return load_prompt(good, 16)


def read_checkpoint(path):
    prompt = torch.nn.Parameter(torch.zeros(3, 16))
    tensors, optimizer = {"prompt": prompt, "best": torch.zeros(3, 16)}, torch.optim.AdamW([prompt])
    return data.load_state(path.parent, tensors, optimizer, {}, False)


def read_t5(path):
    """Reads a T5 of which only the file `path` is bad."""
    with tempfile.TemporaryDirectory() as other:
        good, tokenizer = Path(other) / path.parent.name, make_tokenizer()
        make_t5(tokenizer).save_pretrained(good)
        tokenizer.save_pretrained(good)
        if path.suffix == ".bin":
            (good / "model.safetensors").unlink()
        shutil.copy(path, good)
        return metapt.load_t5(good)


def read_clusters(path):
    args = argparse.Namespace(source=path, source_size=None, method="maml", validation=2)
    args.batch_size, args.seed, args.device = 1, 1, "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "provenance", lambda *args: {})
        return train_meta.read_source(args, SENTIMENT, 1)


def read_clustering(path):
    """Reads the arguments that cluster.py wrote beside a source."""
    examples = [{**review, "cluster": 0} for review in make_examples(20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_examples", lambda *args: examples)
        return read_clusters(path.with_suffix(".jsonl"))


def read_arguments(path):
    args = argparse.Namespace(restart=False, threads=None, method="maml")
    data.check_arguments(path, args)


def read_settings(path):
    names = ("labeller", "unit", "share", "min_words", "max_words", "max_length")
    args = argparse.Namespace(**dict.fromkeys(names, ""), corpus=[], restart=False)
    data.check_settings(path, args)


def read_block(path):
    return list(data.read_blocks([path], SENTIMENT))


def read_examples(path):
    return list(data.read_examples(path, SENTIMENT, labelled=".jsonl" in path.name))


def read_corpus(path):
    return list(data.read_corpus([path], "paragraph"))


def read_config(path):
    here = path.parent
    train_meta.main(["--config", str(path), "--source", str(path), "--out", str(here / "out")])


def read_report(path):
    finetune.main(["--report", str(path)])


def read_embeddings(path):
    return cluster.embed(["a"] * 3, path, "none", "cpu")


def read_labeller(path):
    return data.load_classifier(path.parent, "cpu")


def convert(name):
    """The reader of a dataset's official file."""

    def read(path):
        data.convert(name, path, path.parent / "task")

    read.__name__ = name
    return read


BAD_OBJECTS = [b"", b" ", b"{", b'{"a": 1', b"[]", b"null", b'"x"', b"3", b"\xff\xfe{\0}\0"]
BAD_OBJECTS += [b"\0" * 9, b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000, b'{"a": "\\ud800"}']
BAD_OBJECTS += [b'{"a": "\xe9"}', b"{'a': 1}", b'"' * 3]

task_json = lambda **change: json.dumps({**vars(SENTIMENT), **change}).encode()
bad_file(Task.load, "task.json", *BAD_OBJECTS, b"{}")
bad_file(Task.load, "task.json", task_json(name=3), task_json(name="../up"))
bad_file(Task.load, "task.json", task_json(template=None), task_json(template="{text}"))
bad_file(Task.load, "task.json", task_json(template="{mask"), task_json(words="bad"))
bad_file(Task.load, "task.json", task_json(words={"bad": 0, "good": 1}), task_json(words=[1, 2]))
bad_file(Task.load, "task.json", task_json(words=["bad"]), task_json(words=["good", "good"]))

for template in "{mask}|{text} {mask} {mask}|{} {mask}|{text:.9} {mask}|{text!r} {mask}".split("|"):
    bad_file(Task.load, "task.json", task_json(template=template))

bad_file(read_config, "c.json", *BAD_OBJECTS)
for flag, values in {
    "alpha": ["x", [1, 2], True, {}, 0],
    "seed": [1.5, -1, 10**30],
    "max_steps": [math.inf],
    "prompt_length": [math.nan, 0],
    "method": ["sgd", []],
    "dtype": ["int8"],
    "eval_every": [0],
    "batch_size": [-1],
    "patience": [0],
    "nothing": [1],
    "help": [True],
    "config": ["x"],
}.items():
    bad_file(read_config, "c.json", *[json.dumps({flag: value}).encode() for value in values])

bad_file(read_arguments, "arguments.json", *BAD_OBJECTS, b'{"threads": "x", "method": "maml"}')
bad_file(read_clustering, "kmeans4.json", *BAD_OBJECTS)
bad_file(read_settings, "settings.json", *BAD_OBJECTS, b"{}", b'{"labeller": {}}')

block = lambda text: lambda path: path.write_bytes(data.gzip.compress(text))
BLOCK = "000000.jsonl.gz"
bad_file(read_block, BLOCK, b"no gzip", b"\x1f\x8b", packed("", '{"text": "a"}' * 99, 9))
bad_file(read_block, BLOCK, *map(block, BAD_OBJECTS[2:]), block(b"{}"))
bad_file(read_block, BLOCK, block(b'{"text": "a"}'), block(b'{"text": "a", "label": 7}'))

BAD_TENSORS = [b"", b"\0", b"\0" * 8, b"\xff" * 100, safetensors({}, size=2**62)]
BAD_TENSORS += [safetensors({}, size=2**20), safetensors(b"{"), safetensors(b"[" * 10**5)]
BAD_TENSORS += [safetensors(b"\xff\xfe"), safetensors({"prompt_embeddings": 3}), safetensors({})]
BAD_TENSORS += [one_tensor("F32", [3, 16], 192, bytes(99)), one_tensor("F32", [3, 16], 4, bytes(4))]
BAD_TENSORS += [one_tensor("F32", [2**40, 2**40], 0, b""), one_tensor("X9", [1], 4, bytes(4))]
BAD_TENSORS += [b"PK\3\4" + bytes(200), b"\x80\x02}q\x00."]

bad_file(read_prompt, "prompt/adapter_config.json", *BAD_OBJECTS, b"{}", b'{"peft_type": "LORA"}')
bad_file(read_prompt, "prompt/adapter_config.json", b'{"peft_type": []}')
bad_file(read_prompt, "prompt/metapt.json", *BAD_OBJECTS, b'{"arguments": 3}', b'{"digests": 3}')
bad_file(read_prompt, "prompt/adapter_model.safetensors", *BAD_TENSORS, tensor_file(other=[[0.0]]))
zeros = [0.0] * 16
wrong = [zeros, [[zeros]], [zeros[1:]], [[math.nan] * 16], [[math.inf] * 16], [[1] * 16]]
for values in [*wrong, [[True] * 16], np.zeros((0, 16))]:
    writer = tensor_file(prompt_embeddings=values)
    bad_file(read_prompt, "prompt/adapter_model.safetensors", writer)

GOOD_LOG = '[{"step": 0, "accuracy": 0.5, "loss": 1.0}]'
GOOD_FACTS = f'{{"step": 1, "log": {GOOD_LOG}, "digests": {{}}}}'
bad_file(read_checkpoint, "run/checkpoint.safetensors", *BAD_TENSORS)
bad_file(read_checkpoint, "run/checkpoint.safetensors", tensor_file(prompt=np.zeros((3, 16))))
for facts in ("", "[]", "3", "[" * 10**5, "{}", '{"step": 1, "log": 2}', '{"step": 1, "log": []}'):
    bad_file(read_checkpoint, "run/checkpoint.safetensors", checkpoint(facts))
for facts in (f'{{"step": "1", "log": {GOOD_LOG}}}', '{"step": 1, "log": [{"loss": "x"}]}'):
    bad_file(read_checkpoint, "run/checkpoint.safetensors", checkpoint(facts))
for size in ((2, 16), (3, 17), (0,)):
    changed = checkpoint(GOOD_FACTS, prompt=torch.zeros(size))
    bad_file(read_checkpoint, "run/checkpoint.safetensors", changed)

bad_file(read_t5, "t5/config.json", *BAD_OBJECTS, b"{}", b'{"model_type": "none"}')
bad_file(read_t5, "t5/config.json", b'{"model_type": "bert"}', b'{"model_type": []}')
bad_file(read_t5, "t5/config.json", b'{"model_type": "t5", "d_model": "x"}')
bad_file(read_t5, "t5/config.json", b'{"model_type": "t5", "d_model": -1}')
shared = tensor_file({"format": "pt"}, **{"shared.weight": [[0.0]]})
bad_file(read_t5, "t5/model.safetensors", *BAD_TENSORS[:8], shared)
bad_file(read_t5, "t5/pytorch_model.bin", b"", b"\x80\x02}q\x00.")
bad_file(read_t5, "t5/tokenizer.json", b"", b"{}", b"[" * 10**5)
bad_file(read_labeller, "labeller/config.json", *BAD_OBJECTS[:8], b"{}")
bad_file(read_labeller, "labeller/config.json", b'{"model_type": "roberta"}')
bad_file(read_labeller, "labeller/config.json", b'{"model_type": "t5x"}')

FINE = b'{"text": "fine", "label": 2}\n'
BAD_LINES = [line for line in BAD_OBJECTS if line.strip()]
BAD_LINES += [b"[" + b"1," * 10**5, b'{"text": "a"}{}', b'{"text": "a\x01", "label": 0}']
BAD_LINES += [b'{"text": "\\udc80", "label": 0}', b'{"text": null, "label": 0}']
BAD_LINES += [b'{"text": "a", "label": 0, "more": "\\ud800"}', b'{"text": " ", "label": 0}']
bad_line(read_examples, "train.jsonl", FINE, *BAD_LINES, b'{"label": 0}', b'{"text": "a"}')
for label in "true 1.0 -1 5 null [1] NaN 1e999".split() + ['"1"', "1" * 4000, "1" * 9000]:
    bad_line(read_examples, "train.jsonl", FINE, b'{"text": "a", "label": %s}' % label.encode())
for confidence in ("NaN", "-1", '"high"', "true", "null"):
    line = f'{{"text": "a", "label": 0, "confidence": {confidence}}}'
    bad_line(read_examples, "train.jsonl", FINE, line.encode())
for number in ('"a"', "1.5", "[]", "NaN"):
    line = f'{{"text": "a", "label": 0, "cluster": {number}}}'
    bad_line(read_examples, "train.jsonl", FINE, line.encode())
bad_line(read_examples, "a.txt", b"fine\n", b"\xe9t\xe9", b"\xff\xfea\0", b"a\0b", b"\xed\xa0\x80")
bad_line(read_examples, "a.txt", b"fine\n", b"\xff" * 10**7)
bad_file(read_examples, "a.txt", "fine".encode("utf-16"), "fine".encode("utf-32"))
bad_file(read_examples, "a.jsonl.gz", b"\x1f\x8b", b"no gzip", packed("", "fine\n" * 999, 9))
bad_file(read_examples, "a.txt.xz", b"no xz", packed("", "fine\n" * 999, 9))
bad_file(read_examples, "nothing.jsonl", lambda path: None)
one_cluster = b'{"text": "a", "label": 0, "cluster": 0}\n'
none_here = b'{"text": "a", "label": 0}\n'
bad_file(read_clusters, "s.jsonl", b"", one_cluster * 9 + none_here, none_here * 9, one_cluster)

row = lambda **changes: json.dumps({**result("pt", 0.5, 1), **changes}).encode()
bad_line(read_report, "r.jsonl", row() + b"\n", *BAD_LINES, b"{}", row(accuracy="0.5"))
bad_line(read_report, "r.jsonl", row() + b"\n", row(accuracy=math.nan), row(accuracy=2.0))
bad_line(read_report, "r.jsonl", row() + b"\n", row(seed=[]), row(shots="40"), row(task=None))
bad_line(read_report, "r.jsonl", row() + b"\n", row(method=["pt"]), row(prompt={}))
bad_line(read_report, "r.jsonl", row() + b"\n", row(settings=[]), row(settings={}))
bad_line(read_report, "r.jsonl", row() + b"\n", row(settings={"model": 3}))
bad_file(read_report, "none.jsonl", b"", b"\n")

TREE, GLUE, CSV = b"(2 (2 fine) (2 .))\n", b"sentence\tlabel\n", b'"1","fine"\n'
sst5, sst2, amazon2 = convert("sst5"), convert("sst2"), convert("amazon2")
bad_line(sst5, "train.txt", TREE, b"(3 (2 It)", b"It", b"(7 (2 It) (2 is))", b"(3 )", b"\xff")
bad_line(sst5, "train.txt", TREE, b"(2 (2 a\0) (2 b))", b"(" * 10**6, b"(0 " * 10**6, b"x" * 10**7)
bad_file(sst2, "train.txt", b"", b"\n\n", b"(2 (2 only) (2 neutral))")
bad_line(sst2, "train.tsv", GLUE, b"a\t2", b"a", b"\t", b"a\xff\t1", b"a\0\t1", b"")
bad_file(sst2, "train.tsv", b"", GLUE, b"a\t1\n", GLUE.decode().encode("utf-16"))
bad_line(amazon2, "train.csv", CSV, b'"3","x"', b'"0","x"', b'"1"', b'"1","a" b', b'"1","open')
bad_line(amazon2, "train.csv", CSV, b'"1","a\0"', b'"1","\xff"', b'"1","a","b","c"', b"1" * 9000)
bad_line(amazon2, "train.csv", CSV, b'"1","' + b"x" * 10**7 + b'"')
bad_file(convert("yelp5"), "train.csv", b"", b'"1",""\n', b'"6","x"\n', b'"x","y"\n')
cut_off = packed("", '"5","fine"\n' * 9, 9)
bad_file(convert("yelp5"), "train.csv.gz", cut_off)
bad_file(convert("yelp5"), "train.csv.xz", cut_off)

hood = convert("sentihood")
bad_file(hood, "s-train.json", *BAD_OBJECTS, b"{}", b"[1]", b"[{}]", b'{"text": "no array"}')
bad_file(hood, "s-train.json", b'[{"text": 3, "opinions": []}]', b'[{"text": "a", "opinions": 3}]')
bad_file(hood, "s-train.json", b'[{"text": "a", "opinions": [3]}]', b'[{"text": "a"}]')
bad_file(hood, "s-train.json", b'[{"text": "a", "opinions": [{"sentiment": []}]}]')
bad_file(hood, "s-train.json", b'[{"text": "a", "opinions": []}]')
bad_file(hood, "s-train.json", b'[{"text": "\\ud800", "opinions": [{"sentiment": "Positive"}]}]')

laptop = convert("semeval_laptop")
bad_file(laptop, "x.xml", b"", b"\0", b"<", b"<a>", b"<a></b>", b"<a>\xff</a>", b"<a/>")
bad_file(laptop, "x.xml", b"<a>&no;</a>", b"<a>\0</a>", entities(9), entities(30), b"<a>" * 10**5)
bad_file(laptop, "x.xml", b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>')
bad_file(laptop, "x.xml", b'<?xml version="1.0" encoding="none"?><a/>')
bad_file(laptop, "x.xml", b'<?xml version="1.0" encoding="cp932"?><a/>')
bad_file(laptop, "x.xml", '<?xml version="1.0" encoding="utf-8"?><a/>'.encode("utf-16"))
bad_file(laptop, "x.xml", b"<a>" * 10**5 + b"</a>" * 10**5)
odd = b"<Opinions><Opinion polarity='odd'/></Opinions>"
bad_file(laptop, "x.xml", b"<x><sentence><text>a</text>" + odd + b"</sentence></x>")

amazon5, line = convert("amazon5"), '"1","x"\n'
bad_file(amazon5, "a.tar", b"", bytes(10240), packed("train.csv", line * 999, 9000))
bad_file(amazon5, "a.tar", packed("other.csv", "x"), packed("train.csv", '"9","x"\n'))
bad_file(amazon5, "a.tar", packed("/train.csv", line), packed("../train.csv", '"9","x"\n'))
bad_file(amazon5, "a.tar", tar_of("train.csv", type=tarfile.DIRTYPE))
bad_file(amazon5, "a.tar", tar_of("train.csv", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
bad_file(amazon5, "a.tar", tar_of("train.csv", type=tarfile.LNKTYPE, linkname="none"))
bad_file(amazon5, "a.tar", tar_of("train.csv", type=tarfile.FIFOTYPE))
bad_file(amazon5, "a.tar", tar_of("train.csv", size=2**60))
bad_file(amazon5, "a.tgz", b"\x1f\x8b", packed("train.csv", line * 10**5, 50))
bad_file(amazon5, "a.zip", b"PK\3\4", packed("train.csv", line, 9), packed("train.csv/", ""))
bad_file(amazon5, "a.zip", packed("a.csv", ""), packed("/train.csv", line))
bad_file(amazon5, "a.zip", packed("train.csv", '"9","x"\n'))

bad_file(read_corpus, "corpus.tar", packed("a.txt", "x" * 9999, 15000), packed("a.xz", "x"))
bad_file(read_corpus, "corpus.tar", packed("a.tar", bytes(99)), packed("a.gz", b"\x1f\x8b\x08"))
bad_file(read_corpus, "corpus.tar", packed("a.xz", data.lzma.compress(bytes(99))))
bad_file(read_corpus, "corpus.tar", tar_of("a.txt", size=2**60), tar_of("a.md", size=2**60))
bad_file(read_corpus, "corpus.txt.gz", b"x", b"\x1f\x8b\x08", packed("", "x\n" * 999, 9))
bad_file(read_corpus, "corpus.txt.xz", b"x", b"\xfd7zXZ\0", packed("", "x\n" * 999, 9))
bad_file(read_corpus, "corpus.jsonl", b"[]\n" * 2000, b"{", b'{"text": 3}', b"\xff", b"")
bad_file(read_corpus, "corpus.txt", b"", b"\0", b"\xff", b"\n" * 9)
bad_file(read_examples, "reviews.csv", b"5,fine\n")
bad_file(read_examples, "REVIEWS.TSV.gz", b"5,fine\n")

numpy = b"\x93NUMPY"
bad_file(
    read_embeddings, "e.npy", b"", numpy, numpy + b"\1\0v\0{'descr': '<f4'", b"\x80\x02}q\x00."
)
bad_file(read_embeddings, "e.npy", b"PK\3\4" + bytes(200), numpy + b"\1\0\xff\xff" + b"(" * 65535)
bad_file(read_embeddings, "e.npy", array_file(np.zeros((2, 4), np.float32)))
bad_file(
    read_embeddings, "e.npy", array_file(np.zeros((3, 4))), array_file(np.zeros((3, 4), object))
)
bad_file(read_embeddings, "e.npy", array_file(np.zeros(3, np.float32)))


def cut_array(path):
    np.save(path, np.zeros((3, 999), np.float32))
    path.write_bytes(path.read_bytes()[:-9])


bad_file(read_embeddings, "e.npy", cut_array)


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def ends_in_one_line(function, capsys):
    """The line on standard error in which a script ends, with status 2."""
    with pytest.raises(SystemExit) as stop:
        data.run(function)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and len(message) < 1100, message
    return message


NUMBERED = [f"{name}-{i}" for i, (_, name, _, _) in enumerate(BAD_INPUTS)]


@pytest.mark.parametrize("reader, name, expected, content", BAD_INPUTS, ids=NUMBERED)
def test_a_bad_file_ends_in_one_line(tmp_path, capsys, reader, name, expected, content):
    path = put(tmp_path / name, content)
    before = sorted(tmp_path.rglob("*"))
    assert expected in ends_in_one_line(lambda: reader(path), capsys)
    assert sorted(tmp_path.rglob("*")) == before


TASK_JSON = b'\xef\xbb\xbf{"name": "x", "template": "{text} {mask}", "words": ["bad", "good"]}'
GOOD_INPUTS = [
    (read_prompt, "prompt/metapt.json", b"\xef\xbb\xbf{}"),
    (read_prompt, "prompt/adapter_model.safetensors", one_tensor("F16", [3, 16], 96, bytes(96))),
    (read_clustering, "kmeans4.json", b'{"method": "lda"}'),
    (read_checkpoint, "run/checkpoint.safetensors", checkpoint(GOOD_FACTS)),
    (read_block, BLOCK, block(b'{"text": "a", "label": 1}')),
    (read_t5, "t5/generation_config.json", b"{}"),
    (read_clusters, "s.jsonl", one_cluster * 9),
    (read_examples, "s.jsonl", FINE),
    (sst5, "train.txt", b"\xef\xbb\xbf(3 (2 It) (4 works))\r\n"),
    (amazon2, "a.csv", b'\xef\xbb\xbf"1","x"\r\n'),
    (sst2, "train.tsv", b"\xef\xbb\xbfsentence\tlabel\nx\t1\n"),
    (Task.load, "task.json", TASK_JSON),
]


@pytest.mark.parametrize("reader, name, content", GOOD_INPUTS)
def test_the_same_readers_take_good_files(tmp_path, reader, name, content):
    reader(put(tmp_path / name, content))


def test_examples_may_begin_with_a_byte_order_mark_and_repeat_a_key(tmp_path):
    path = put(tmp_path / "a.txt", b"\xef\xbb\xbffine")
    assert read_examples(path) == [{"text": "fine"}]
    line = (
        b'\xef\xbb\xbf{"text": "\\ud83d\\ude00", "label": 0, "label": 1}\n' + b" " * 10**7 + b"\n"
    )
    path = put(tmp_path / "a.jsonl", line)
    assert read_examples(path) == [{"text": "😀", "label": 1}]  # the last counts


GOOD = "--source {demo}/source/clustered.jsonl --model {demo}/t5"
OUT = GOOD + " --out x"
BOOKS = "--task {demo}/books --model {demo}/t5"
BAD_FLAGS = [
    (train_meta, OUT + " --learning-rate -1", "--learning-rate: -1 is not a nu"),
    (train_meta, OUT + " --learning-rate 0", "--learning-rate: 0 is not a numb"),
    (train_meta, OUT + " --prompt-length -5", "--prompt-length: -5 is not a wh"),
    (train_meta, OUT + " --prompt-length 0", "--prompt-length: 0 is not a whol"),
    (train_meta, OUT + " --seed -1", "--seed: -1 is not a whole number of 0"),
    (train_meta, OUT + " --alpha nan", "--alpha: nan is not a number above 0"),
    (train_meta, OUT + " --alpha inf", "--alpha: inf is not a number above 0"),
    (train_meta, OUT + " --batch-size 0", "--batch-size: 0 is not a whole num"),
    (train_meta, OUT + " --threads 0", "--threads: 0 is not a whole number"),
    (train_meta, OUT + " --weight-decay -1", "--weight-decay: -1 is not a num"),
    (train_meta, OUT + " --device gpu", "--device: gpu is neither cpu nor cuda"),
    (train_meta, OUT + " --init vocabulary", "--init: vocabulary: no such fold"),
    (train_meta, GOOD + " --out {demo}/maml.json", "maml.json/checkpoint.safetensors: Not a d"),
    (train_meta, GOOD + " --out /proc/x", "/proc/x/checkpoint.safetensors: "),
    (train_meta, "--source none.jsonl --out x", "--source: none.jsonl: no such file"),
    (train_meta, "--source {demo} --out x", "is a folder; give a file"),
    (train_meta, "--source {demo}/source/examples.jsonl --out x", "no clusters, or not"),
    (train_meta, "--sources x", "the following arguments are required: --source"),
    (train_meta, "--config {demo}/ft.json --source x", "has no flag --task; remove it"),
    (finetune, "--task nothing", "--task: nothing: no such folder; data.py makes tasks"),
    (finetune, "--task {demo}/pt.json", "--task: .*pt.json is a file; give its folder"),
    (finetune, BOOKS + " --prompt nothing", "--prompt: nothing: no such folder"),
    (finetune, BOOKS + " --prompt {demo}/t5", "t5/adapter_config.json: No such file or direct"),
    (finetune, "--task {demo}/books --model {demo}", "demo: .*give a T5 by hub name"),
    (finetune, BOOKS + " --out {demo}", "demo: it is a folder; give a file"),
    (finetune, BOOKS + " --out {demo}/books/task.json/r.jsonl", "r.jsonl: Not a directory; gi"),
    (finetune, BOOKS + " --out /proc/x/r.jsonl", "/proc/x/r.jsonl: "),
    (finetune, BOOKS + " --method ft --save tuned", "--save keeps tuned prompts, and full"),
    (finetune, BOOKS + " --method ft --dtype bfloat16", "--dtype bfloat16 is for a frozen"),
    (finetune, BOOKS + " --figure x.png", "--against are about the results of --report"),
    (finetune, BOOKS + " --search", "--search is full tuning's; add --method ft"),
    (finetune, BOOKS + " --figure x.txt", "--figure: x.txt must end in .png, .pdf or .svg"),
    (finetune, BOOKS + " --shots 2000", "train.jsonl: 2000 . 2000 .*from 1000; lower --shots"),
    (finetune, "--predict {demo}/pt.json", "--predict needs --prompt FOLDER"),
    (finetune, "", "--task FOLDER is needed"),
    (cluster, "--source {demo}/source/examples.jsonl --k 1", "--k: 1 is not a whole nu"),
    (cluster, "--source {demo}/source --k 3", "source is a folder; give a file"),
    (cluster, "--source {demo}/pt.json --seed 2147483648", "or more and at most 21474"),
    (cluster, "--source {demo}/pt.json --k 3 4 --out x", "--out and --method label go with"),
    (cluster, "--source {demo}/pt.json --k 3 4 --method label", "--method label go with one --k"),
    (cluster, "--source {demo}/pt.json --out task.jsonl", "must end in .jsonl; its arg"),
    (cluster, "--source {demo}/pt.json --out k.json", "must end in .jsonl; its arg"),
    (data, "convert sst5 --input {demo} --out x", "no training file here"),
    (data, "convert sst5 --input x --out x", "--input: x: no such file"),
    (data, "convert sst5 --input {demo} --out {demo}/pt.json", "pt.json/task.json"),
    (data, "labeller --task {demo}/books --out x --validation 0", "0 is not a w"),
]


@pytest.mark.parametrize("script, flags, message", BAD_FLAGS)
def test_a_bad_flag_ends_in_one_line(world, tmp_path, capsys, monkeypatch, script, flags, message):
    monkeypatch.chdir(tmp_path)
    words = flags.format(demo=world).split()
    found = ends_in_one_line(lambda: script.main(words), capsys)
    assert re.search(message, found), found
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_taken_for_a_word_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    start = data.folder_or("random")
    assert start("random") == "random" and start("./random") == str(tmp_path / "random")


def test_a_missing_field_shows_the_form_that_the_template_takes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n')
    task = Task("x", "{review} It was {mask}", data.WORDS[2])
    with pytest.raises(InputError, match=r'a.jsonl:1: .*as {"review": "...", "label": 0}'):
        list(data.read_examples(tmp_path / "a.jsonl", task))


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(argparse.ArgumentTypeError, match="cuda: this PyTorch finds no such GPU"):
        data.device("cuda")


def test_a_stream_that_has_no_such_letter_loses_no_work(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    data.run(lambda: print("± \U0001f600"))
    assert narrow.buffer.getvalue().startswith(b"\xb1 ?")


def test_a_folder_beside_the_scripts_is_no_package(tmp_path):
    for script in data.SCRIPTS + ("metapt.py",):
        shutil.copy(HOUSE / script, tmp_path)
    (tmp_path / "nothing_of_that_name").mkdir()
    code = "import data, importlib.util as i; print(i.find_spec('nothing_of_that_name'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("script", data.SCRIPTS)
def test_a_script_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, script):
    words = ["convert", "sst5", "--input", str(tmp_path), "--out", str(tmp_path / "task")]
    argv = [script, *words] if script == "data.py" else [script, "--config", "none.json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HOUSE / script), run_name="__main__")
    found = capsys.readouterr().err
    assert found.startswith(f"{script}: ") and found.count("\n") == 1


def test_a_wrong_tokenizer_or_word_is_refused(tokenizer):
    def refused(message, words=("bad", "good"), tokenizer=tokenizer, size=len(tokenizer)):
        with pytest.raises(InputError, match=message):
            t5 = make_t5(tokenizer, vocab_size=size)
            PromptedT5(t5, tokenizer, Task("x", data.TEMPLATE, list(words)))

    refused("'' is not one piece", ["", "good"])
    refused("'Good' is the same piece as another word", ["Good", "good"])  # no capitals
    refused("'badish' is not one piece .*; 'goodish' is not one piece", ["badish", "goodish"])
    refused("more pieces than the model knows", size=99)
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    refused("no <pad>", tokenizer=plain)
    pieces = {"<unk>": 0, "<pad>": 1, "</s>": 2, "bad": 3, "good": 4}
    words = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    without = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    refused("has no <extra_id_0>", tokenizer=without)


def test_an_archive_cannot_name_files_outside_it(tmp_path):
    outside = put(tmp_path / "train.csv", b'"1","secret"\n')
    files = {"../up.txt": "a", "/abs.txt": "b", str(outside): "no text"}
    corpus = pack(tmp_path / "c.tar", files)
    before = sorted(tmp_path.rglob("*"))
    assert read_corpus(corpus) == ["a", "b", None] and sorted(tmp_path.rglob("*")) == before
    for name in ("tar", "zip"):
        files = {str(outside): '"1","x"\n', "../train.csv": '"2","inside"\n'}
        data.convert("amazon2", pack(tmp_path / f"a.{name}", files), tmp_path / name)
        (example,) = read_lines(tmp_path / name / "train.jsonl")
        assert example["text"] == "inside"


class Malicious:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def read_encoder(path):
    return cluster.embed(["a"], path.with_name("e.npy"), str(path.parent), "cpu")


PICKLES = [
    (read_t5, "t5/pytorch_model.bin"),
    (read_t5, "t5/model.safetensors"),
    (read_prompt, "prompt/adapter_model.safetensors"),
    (lambda path: load_prompt(path.parent), "prompt/adapter_model.bin"),
    (load_prompt, "prompt.pt"),
    (read_checkpoint, "run/checkpoint.safetensors"),
    (read_checkpoint, "run/checkpoint.pt"),
    (read_labeller, "labeller/pytorch_model.bin"),
    (read_encoder, "encoder/pytorch_model.bin"),
    (read_embeddings, "e.npy"),
]


@pytest.mark.parametrize("reader, name", PICKLES)
def test_no_pickle_is_ever_read(tmp_path, labeller, reader, name):
    path, created = tmp_path / name, tmp_path / "created"
    path.parent.mkdir(exist_ok=True)
    if path.parent.name in ("labeller", "encoder"):
        leave = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(labeller, path.parent, dirs_exist_ok=True, ignore=leave)
    if path.parent.name == "prompt":
        (path.parent / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    if path.suffix == ".npy":
        np.save(path, np.array([Malicious(created)], object), allow_pickle=True)
    else:
        torch.save({"prompt_embeddings": Malicious(created)}, path)

    if name == "run/checkpoint.pt":  # of another program: the run begins anew beside it
        reader(path)
    else:
        with pytest.raises(InputError, match=path.stem if "/" not in name else path.parent.name):
            reader(path)
    assert not created.exists()
    if path.suffix == ".npy":
        np.load(path, allow_pickle=True)
    else:
        torch.load(path.open("rb"), weights_only=False)
    assert created.exists()  # as it would have been


@pytest.mark.parametrize(
    "words", ["data.py pretrain", "cluster.py", "train_meta.py", "finetune.py"]
)
def test_help_waits_for_no_import_whatever_stands_beside_it(words):
    script, *more = words.split()
    script = Path(data.__file__).with_name(script)
    argv = [sys.executable, "-X", "importtime", script, *more, "--device", "cuda", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    assert not re.search(r"\| +(torch|transformers|metapt)$", done.stderr, re.M)


# ------------------------------------------------------------ The README: what it shows, runs

HOUSE = Path(__file__).parent
README = (HOUSE / "README.md").read_text(encoding="utf-8")
# How the README's table and pictures were made: commands of their own.
FIGURES = (HOUSE / "figures" / "README.md").read_text(encoding="utf-8")
SCRIPTS = {name: sys.modules[Path(name).stem] for name in data.SCRIPTS}
# What README's commands are run with behind their own flags, so that they take no time.
SMALL = {
    "data.py pretrain": "--d-model 16 --d-ff 16 --heads 2 --layers 1 --pieces 300 --max-steps 1 "
    "--batch-size 2 --labelled 2 --validation 4 --dtype float32",
    "data.py labeller": "--max-steps 1 --eval-every 1 --warmup 1 --validation 4 --max-length 48",
    "cluster.py": "--min-size 4 --drop-small --device cpu",
    "train_meta.py": "--max-steps 1 --eval-every 1 --batch-size 1 --validation 10 --prompt-length 2",
    "finetune.py": "--seeds 1 2 --max-steps 1 --max-test 8 --prompt-length 2",
    "test_metapt.py": "--shape tiny --tasks 1 --m 2 --rounds 1 --prompt-length 2 --only step",
}
EXCHANGED = {
    "for seed in 1 2 3": "for seed in 1",
    "-{1,2,3}": "-1",
    "--model t5 ": "--model demo/t5 ",
    "1000 10000 100000 1000000": "150 160",
    "10 20 40 80 160 320 640 1280 2560": "4 8",
    "--shots 10 40 160 640": "--shots 4 8",
    "3 6 10 15 20 30": "2 3",
    "3 6 10": "2 3",
    "NAME --input FILE --out tasks/NAME": "sst5 --input trainDevTestTrees_PTB.zip --out tasks/sst5",
    "google-t5/t5-large": "demo/t5",
    "books-maml-40-1": "books-maml-4-1",
}


def fenced(language):
    """The README's blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def shell_pieces():
    """Everything in both pages that is to be typed into a shell, from top to bottom."""
    commands = r"^```bash\n(.*?)^```|`((?:for |python |\w+\.py )[^`]* --[^`]*)`"
    for block, inline in re.findall(commands, README + FIGURES, re.M | re.S):
        text = block or re.sub(r"^(\w+\.py)", r"python \1", inline)
        for ours, small in EXCHANGED.items():
            text = text.replace(ours, small)
        yield text


def taken_apart(text, folder):
    """The commands of our scripts in a piece of shell, as bash expands it: lists of words."""
    stand_ins = """
        pip() { :; }
        torchrun() { shift 2; python "$@"; }
        python() { printf '%s\\n' "$@" END; }
    """
    shell = ["bash", "-euc", stand_ins + text]
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True)
    return [words.splitlines() for words in done.stdout.split("END\n")[:-1]]


def pack_real(folder):
    """Writes the four downloads that figures/real.py reads, each of the same 200 reviews."""
    rows = [(review["label"], review["text"]) for review in make_examples(200, 7)]
    films, products, domains, vader = {}, "", "", ""
    for i, (label, text) in enumerate(rows):
        films[f"aclImdb/train/{'pos' if label > 2 else 'neg'}/{i}_{2 * label + 1}.txt"] = text
        films[f"aclImdb/train/unsup/{i}_0.txt"] = f"{text}<br /><br />{text}"
        tagged = f"<rating>\n{label + 1}.0\n</rating>\n<review_text>\n{text}\n</review_text>"
        products += f"<review>\n{tagged}\n</review>\n"
        domains += f"{int(label > 2)}\t{text}\n"
        vader += f"{i}\t{label - 2}\t{text}\n"

    kinds = "train", "test", "unlabel"
    domains = {f"mtl-dataset/{name}.task.{k}": domains for name in ("MR", "toys") for k in kinds}
    kinds = "amazonReviewSnippets", "nytEditorialSnippets", "tweets"
    rated = {f"hutto_ICWSM_2014/{kind}_GroundTruth.txt": vader for kind in kinds}
    inner = pack(folder / "inner.tgz", rated).read_bytes()
    downloads = {
        "aclImdb_v1": films,
        "domain_sentiment_data": {"sorted_data_acl/books/positive.review": products},
        "fudan-mtl-dataset": domains,
        "vaderSentiment-3.3.2": {"additional_resources/hutto_ICWSM_2014.tar.gz": inner},
    }
    for name, files in downloads.items():
        pack(folder / f"{name}.tgz", files).rename(folder / f"{name}.tar.gz")


@pytest.fixture
def readers_folder(world, labeller, tmp_path, monkeypatch):
    """A folder as the README's reader has it, with the official files, and a hub that holds the
    tiny models."""
    shutil.copytree(world, tmp_path / "demo")
    learn(world, tmp_path / "demo" / "maml", max_steps=0)
    reviews = make_examples(240)
    lines = [f'"{review["label"] + 1}","{review["text"]}"\n' for review in reviews]
    files = {"train.csv": "".join(lines), "test.csv": "".join(lines[:20])}
    pack(tmp_path / "yelp_review_full_csv.tgz", files)
    trees = []
    for review in reviews[:60]:
        words = " ".join(f"(2 {word})" for word in review["text"].split())
        trees.append(f"({review['label']} {words})\n")
    files = {f"trees/{split}.txt": "".join(trees) for split in ("train", "dev", "test")}
    pack(tmp_path / "trainDevTestTrees_PTB.zip", files)
    web = [review["text"] for review in make_examples(6000)]
    texts = {f"{i}.txt": "\n".join(web[i::40]) for i in range(40)}
    pack(tmp_path / "openwebtext.tar", texts)
    for name in "yelp5 sst5 sst2 sentihood semeval_restaurant amazon5".split():
        shutil.copytree(world / "books", tmp_path / "tasks" / name)
        Task(name, SENTIMENT.template, SENTIMENT.words).save(tmp_path / "tasks" / name)
    data.write_task(tmp_path / "mine", SENTIMENT, {"examples": reviews})
    pack_real(tmp_path)
    packed = data.lzma.compress((tmp_path / "openwebtext.tar").read_bytes())
    (tmp_path / "openwebtext.tar.xz").write_bytes(packed)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "MODEL", "demo/t5")
    monkeypatch.setattr(train_meta, "ALPHAS", [0.08])
    monkeypatch.setitem(SMALL, "cluster.py", f"{SMALL['cluster.py']} --encoder demo/t5")
    roberta = f" --model {labeller.parent / 'roberta'}"
    monkeypatch.setitem(SMALL, "data.py labeller", SMALL["data.py labeller"] + roberta)

    def in_turn(model, tokenize, texts, batch_size):
        return [i % 5 for i in range(len(texts))], [1] * len(texts)

    monkeypatch.setattr(data, "classify", in_turn)
    even = lambda rows, k, seed: (cluster.random_clusters(len(rows), k, seed), np.zeros(len(rows)))
    monkeypatch.setattr(cluster, "kmeans", even)
    monkeypatch.setattr(cluster, "lda", data.partial(cluster.lda, updates=5))
    return tmp_path


def test_every_command_and_snippet_of_the_readme_runs(readers_folder, capsys):
    (snippet,) = fenced("python")
    exec(snippet.replace("range(100)", "range(2)"), {})
    shown = re.search(r"^print.*  # (.*)", snippet, re.M)[1]
    printed = capsys.readouterr().out
    assert re.sub(r"[\d.]+", "#", shown) in re.sub(r"[\d.]+", "#", printed)

    ran = []
    for piece in shell_pieces():
        for script, *words in taken_apart(piece, readers_folder):
            if script == "figures/real.py":
                runpy.run_path(str(HOUSE / script))["main"]()
            if script == "-m" or not words:
                continue
            kind = f"{script} {words[0]}" if f"{script} {words[0]}" in SMALL else script
            small = SMALL.get(kind, "") if "--report" not in words else ""
            if script == "finetune.py" and "--shots" not in words:
                small += " --shots 4"
            main = SCRIPTS[script].main if script in SCRIPTS else benchmark
            main([*words, *small.split()] if "--predict" not in words else words)
            ran.append(kind)

    assert set(SMALL) <= set(ran) and len(ran) > 30
    for name in ("shots.png", "size.png", "k.png", "tsne.png"):
        assert (readers_folder / name).exists()


def test_the_inputs_of_the_real_text_run_are_what_the_downloads_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(HOUSE / "figures" / "real.py"))["main"]
    with pytest.raises(InputError, match="aclImdb_v1.tar.gz: No such file .*; download it to the"):
        main()
    pack_real(tmp_path)
    main()
    reviews = make_examples(200, 7)
    of = lambda name: [(row["text"], row["label"]) for row in read_lines(Path("tasks", name))]
    rated = [(review["text"], review["label"]) for review in reviews]
    assert of("stars/train.jsonl") == of("snippets/train.jsonl") == 2 * rated
    two = [(text, int(label > 2)) for text, label in rated]
    assert of("amazon-two/train.jsonl") == 2 * two  # without the domain of films
    texts = [text for text, _ in rated]
    films = [f"{text} {text}" for text in texts]
    assert Path("imdb-unlabelled.txt").read_text().splitlines() == films
    assert [row["text"] for row in read_lines(Path("amazon-unlabelled.jsonl"))] == texts
    opened = [row["text"] for row in read_lines(Path("open.jsonl"))]
    assert opened[:200] == texts and sorted(opened[200:]) == sorted(texts)


def test_every_flag_and_name_in_the_readme_is_there(capsys):
    flags = set()
    commands = ("convert", "labeller", "pseudo-label", "pretrain", "demo")
    everything = [(data.main, [kind]) for kind in commands]
    everything += [(main, []) for main in (cluster.main, train_meta.main, finetune.main, benchmark)]
    for main, words in everything:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        flags |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    prose = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README + FIGURES))
    prose -= {"--nproc", "--no-deps", "--no-binary"}  # torchrun's, pip's
    assert prose <= flags, prose - flags

    the_map = README.split("## The map")[1].split("\n## ")[0]
    rows = [row.split("|")[2] for row in the_map.splitlines() if ".py: " in row]
    assert len(rows) > 15
    for row in rows:
        module = re.search(r"`(\w+)\.py: ", row)[1]
        names = re.findall(r"`([\w.*]+)`", row.replace(f"{module}.py: ", ""))
        for name in names:
            found = sys.modules[module]
            for part in name.removesuffix("*").split("."):
                matching = [known for known in dir(found) if known.startswith(part)]
                assert matching, f"{module}.py has no {name}"
                found = getattr(found, part, None)


# ---------------------------------------------------------------------------------- The benchmark


def with_vmap(model, prompt, supports, queries, alpha):
    """torch.func, all tasks at once by vmap; for batches of one size without padding."""

    def loss(P, ids, words):
        text = model.t5.get_input_embeddings()(ids)
        inputs = torch.cat([P.expand(len(ids), -1, -1), text], 1)
        decoder_ids = model.decoder_ids.expand(len(ids), -1)
        logits = model.t5(inputs_embeds=inputs, decoder_input_ids=decoder_ids, use_cache=False)
        return torch.nn.functional.cross_entropy(logits.logits[:, 1], words)

    def meta_loss(P):
        def task(support, support_words, query, query_words):
            gradient = torch.func.grad(loss)(P, support, support_words)
            return loss(P - alpha * gradient, query, query_words)

        sides = []
        for batches in (supports, queries):
            sides.append(torch.stack([batch["input_ids"] for batch in batches]).to(prompt.device))
            labels = torch.stack([batch["labels"] for batch in batches]).to(prompt.device)
            sides.append(model.word_ids[labels])
        return torch.func.vmap(task)(*sides).sum()

    with metapt.twice_differentiable(True):
        return torch.func.grad_and_value(meta_loss)(prompt)


def with_higher(model, prompt, supports, queries, alpha):
    """The `higher` library's differentiable optimizer."""
    import higher

    module = torch.nn.ParameterList([torch.nn.Parameter(prompt.clone())])
    optimizer, total = torch.optim.SGD(module.parameters(), alpha), 0
    for support, query in zip(supports, queries):
        inner = higher.innerloop_ctx(module, optimizer, copy_initial_weights=False)
        with inner as (adapted, differentiable):
            with metapt.twice_differentiable(True):
                differentiable.step(model.loss(adapted[0], support))
            total = total + model.loss(adapted[0], query)
    return torch.autograd.grad(total, module[0])[0], total.detach()


def with_learn2learn(model, prompt, supports, queries, alpha):
    """The learn2learn library's MAML."""
    import learn2learn

    module = torch.nn.ParameterList([torch.nn.Parameter(prompt.clone())])
    maml, total = learn2learn.algorithms.MAML(module, alpha), 0
    for support, query in zip(supports, queries):
        learner = maml.clone()
        with metapt.twice_differentiable(True):
            learner.adapt(model.loss(learner.module[0], support))
        total = total + model.loss(learner.module[0], query)
    return torch.autograd.grad(total, module[0])[0], total.detach()


OTHERS = {
    "torch.func, loop": functional,
    "torch.func, vmap": with_vmap,
    "higher": with_higher,
    "learn2learn": with_learn2learn,
}


def peak_memory(function, device):
    """Runs a function; the most memory that it had in use at once, in GiB above what was in use
    before: the GPU's, or the process's by sampling."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - start) / 2**30

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def sample():
        while not ended.wait(0.002):
            peaks.append(resident())

    ctypes.CDLL(None).malloc_trim(0)  # hands back what earlier calls have freed
    ended, peaks = threading.Event(), [resident()]
    thread = threading.Thread(target=sample)
    thread.start()
    function()
    ended.set()
    thread.join()
    return (max(peaks) - peaks[0]) / 2**30


def measure(contestants, rounds, device):
    """Median seconds and peak memory of each function. The memory is measured first, which warms
    up; then the rounds are timed in alternation."""
    memory = {name: peak_memory(function, device) for name, function in contestants.items()}
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            began = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}, memory


def print_meta_steps(model, prompt, supports, queries, args):
    """The same meta-gradient by us, by parts of ours and by others: checked, then timed."""
    theirs = plain(model)
    step = (prompt, supports, queries, 0.08)

    def all_plain():
        with metapt.twice_differentiable(True):  # the query's attention too
            return textbook_meta_gradient(theirs, *step)

    contestants = {}
    if args.compare:
        contestants = {
            "loop, plain T5, no fused attention": all_plain,
            "loop, plain T5": lambda: textbook_meta_gradient(theirs, *step),
            "loop, our cross-attention": lambda: textbook_meta_gradient(model, *step),
            "passes of one length, plain T5": lambda: meta_gradient(theirs, *step),
        }
    for n in args.tasks_per_pass:
        name = f"ours, {n} tasks a pass"
        contestants[name] = lambda n=n: meta_gradient(model, *step, tasks_per_pass=n)
    for name in [name for name in args.compare if name in OTHERS]:
        contestants[name] = lambda other=OTHERS[name]: other(theirs, *step)

    reference = textbook_meta_gradient(theirs, *step)[0] if args.compare else None
    for name in list(contestants) if args.compare else ():
        try:
            error = relative_error(contestants[name]()[0], reference)
            print(f"{name:36} differs from the textbook loop by {error:.1e}", flush=True)
        except ImportError as missing:
            print(f"{name:36} not measured: {missing}")
            del contestants[name]

    def forward():
        with torch.no_grad():
            for support in supports:
                model(prompt, support)

    timed = {"forward pass F": forward, **contestants}
    seconds, memory = measure(timed, args.rounds, args.device)
    best = min(seconds[name] for name in seconds if name.startswith("ours"))
    print(f"\n{'':36}{'seconds':>10}{'in F':>8}{'of our best':>13}{'peak GiB':>10}")
    for name, took in seconds.items():
        in_f = took / seconds["forward pass F"]
        print(f"{name:36}{took:10.3f}{in_f:8.2f}{took / best:13.2f}{memory[name]:10.2f}")


def through_peft(model, prompt):
    """The same model and prompt by the peft library: the module, and batch -> logits at the
    mask."""
    import peft

    form = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    config = peft.PromptTuningConfig(num_virtual_tokens=len(prompt), **form)
    theirs = peft.get_peft_model(plain(model).t5, config).eval()
    theirs.prompt_encoder.default.embedding.weight.data.copy_(prompt)

    def logits(batch):
        inputs = {name: batch[name].to(prompt.device) for name in ("input_ids", "attention_mask")}
        inputs["decoder_input_ids"] = model.decoder_ids.repeat(len(batch["labels"]), 1)
        return theirs(**inputs).logits[:, 1]

    return theirs, logits


def print_downstream(model, prompt, batch, args):
    """A step of prompt tuning and an evaluation of the same examples, by us and through peft."""
    try:
        theirs, logits = through_peft(model, prompt)
    except ImportError as missing:
        return print(f"\npeft not measured: {missing}")
    words = model.word_ids[batch["labels"].to(prompt.device)]
    weight, ours = theirs.prompt_encoder.default.embedding.weight, prompt.clone().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy
    with torch.no_grad():
        error = relative_error(logits(batch), model(prompt, batch))
    print(f"\nlogits through peft differ by {error:.1e}")
    contestants = {
        "step, ours": lambda: torch.autograd.grad(model.loss(ours, batch), ours),
        "step, peft": lambda: torch.autograd.grad(cross_entropy(logits(batch), words), weight),
        "evaluation, ours": lambda: model.predict(prompt, batch),
        "evaluation, peft": torch.no_grad()(lambda: logits(batch).argmax(-1)),
    }
    seconds, memory = measure(contestants, args.rounds, args.device)
    print(f"{'':36}{'examples/s':>10}{'peak GiB':>10}")
    for name, took in seconds.items():
        print(f"{name:36}{len(words) / took:10.1f}{memory[name]:10.2f}")


class TF32(TorchDispatchMode):
    """Rounds the operands of every product to the 10 bits of a TF32 mantissa, as a GPU does with
    --matmul high, and sums in float32."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            args = [self.round(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return operation(*args, **(kwargs or {}))

    def round(self, x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def print_precision(model, prompt, supports, queries, rounds):
    """What lower precision costs and gains: the meta-gradient's error against float64, its cosine,
    and the seconds."""

    def gradient(dtype=torch.float32, within=nullcontext(), matmul="highest"):
        copied = copy.deepcopy(model).to(dtype)
        start = prompt.to(torch.float64 if dtype == torch.float64 else torch.float32)
        times = []
        torch.set_float32_matmul_precision(matmul)
        for _ in range(rounds):
            began = time.perf_counter()
            with within:
                found = meta_gradient(copied, start, supports, queries, 0.08)[0].double()
            found.sum().item()
            times.append(time.perf_counter() - began)
        torch.set_float32_matmul_precision("highest")
        return found, statistics.median(times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5LayerNorm, "forward", layer_norm)
        exact, _ = gradient(torch.float64)
    kinds = {
        "float32, --matmul highest": {},
        "float32, --matmul medium": {"matmul": "medium"},
        "TF32's rounding (high on a GPU)": {"within": TF32()},
        "bfloat16 weights": {"dtype": torch.bfloat16},
        "bfloat16 autocast": {"within": torch.autocast(prompt.device.type, torch.bfloat16)},
    }
    if prompt.is_cuda:
        kinds["float32, --matmul high"] = {"matmul": "high"}
    print(f"\n{'against float64':36}{'error':>10}{'cosine':>10}{'seconds':>10}")
    for name, kind in kinds.items():
        found, took = gradient(**kind)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0)
        print(f"{name:36}{relative_error(found, exact):10.1e}{cosine:10.6f}{took:10.3f}")


# Tokens of H(x) of the first 80 sentences of SST's dev split, by T5's own tokenizer.
SST = """
25 22 38 15 39 23 16 43 51 42 44 50 36 44 22 36 50 27 46 48 35 27 30 51 11 44 26
18 18 42 59 32 36 23 53 35 55 43 48 34 35 22 22 55 28 21 16 36 56 16 34 25 36 23
27 49 30 30 30 37 47 30 23 36 33 30 24 32 24 31 35 32 29 24 20 55 37 24 36 18
"""


def random_batches(count, tokenizer, args):
    """`count` batches of m random examples, of the lengths that the arguments say."""
    generator, batches = torch.Generator().manual_seed(0), []
    for i in range(count):
        lengths = [args.length] * args.m
        if args.ragged:
            lengths = torch.randint(5, 2 * args.length - 4, (args.m,), generator=generator).tolist()
        if args.sst:
            known = [int(length) for length in SST.split()]
            lengths = [known[(i * args.m + j) % len(known)] for j in range(args.m)]
        rows = []
        for length in lengths:
            rows.append(torch.randint(3, len(tokenizer) - 20, (length,), generator=generator))
        batch = metapt.pad(rows, [torch.ones_like(row) for row in rows], 0)
        labels = torch.randint(5, (args.m,), generator=generator)
        batches.append({**batch, "labels": labels})
    return batches


def benchmark(argv=None):
    """Times the meta-gradient, prompt tuning, and what lower precision costs. Seen on 2 cores of an
    Intel Xeon (Sapphire Rapids), beside the table in README.md:

    With random weights in float32, the methods differ by 5e-5 at small and 5e-4 at base; in float64
    by 4e-16. The loop without fused attention in the query takes 9.78 s at small, so that changes
    nothing. learn2learn's package does not build on Python 3.11 and was not measured.

    --only downstream, tiny: through peft 1,923 examples a second in training and 3,939 in
    evaluation; ours 2,016 and 4,401.

    --only precision, small, against float64: error and cosine of the meta-gradient
        float32                                        1.9e-4
        TF32's rounding, --matmul high on a GPU        1.1 %   0.9999
        bfloat16 weights, float32 prompt               3.7 %   0.9993
        autocast to bfloat16                           3.3 %   0.9995
    --matmul medium gains little on this CPU: 1.84 s to 1.60 s for two tasks.

    Memory in GiB, of the weights and of a task of 4 + 4 examples with 100 vectors, at 40 and 256
    tokens (--shape large --tasks 1 --tasks-per-pass 1 --compare --only step --length 256):
        small 0.2; 0.4, 1.3    base 0.8; 1.1, 3.9    large 2.7; 2.6, 9.4
    computed from these: XL 10.4; 5, 19    XXL 41.0; 10, 38; --dtype bfloat16 halves all of it

    The data scripts, in one process on 2 cores of an AMD EPYC that did other work too: 715,000 lines
    of Yelp-5's length are read in 28 s, 3.96 million of Amazon-2's in 139 s, in the 0.37 GiB of the
    imports; K-means of a million embeddings of width 384, 10 clusters, five starts, 477 s and 1.9
    GiB. Labelling in batches of like length is 1.65 times as fast as in the corpus's order. A task
    of 3,000,000 examples takes finetune.py 0.44 GiB.
    """
    parser = data.Parser(__doc__)
    whole = data.whole
    parts = ["step", "downstream", "precision"]
    parser.add("--shape", "of the T5, with random weights", "tiny", choices=list(SHAPES))
    parser.add("--tasks", "meta-tasks of a step", 10, type=whole(1))
    parser.add("--m", "support examples of a task, and query examples", 4, type=whole(1))
    parser.add("--length", "tokens of an example", 40, type=whole(5))
    parser.add_switch("--ragged", "draws the lengths evenly from 5 to twice --length")
    parser.add_switch("--sst", "takes the lengths of SST's first sentences")
    parser.add("--prompt-length", "vectors of the prompt", 100, type=whole(1))
    parser.add("--rounds", "timed rounds; the median is reported", 5, type=whole(1))
    parser.add("--tasks-per-pass", "of our step", [4, 10], type=whole(1), nargs="+")
    others = ["loop", *OTHERS]
    parser.add("--compare", "with whose steps", others, choices=others, nargs="*")
    parser.add("--only", "parts of the benchmark", parts, choices=parts, nargs="+")
    parser.add_device_flag()
    parser.add("--threads", "CPU threads (default: as PyTorch chooses)", type=whole(1))
    args = parser.parse(argv)
    if args.ragged or args.sst:
        args.compare = [name for name in args.compare if name != "torch.func, vmap"]

    tokenizer = make_tokenizer()
    model = PromptedT5(make_t5(tokenizer, args.shape).to(args.device), tokenizer, SENTIMENT)
    prompt = model.init_prompt(args.prompt_length)
    batches = random_batches(2 * args.tasks, tokenizer, args)
    supports, queries = batches[::2], batches[1::2]
    print(
        f"T5 {args.shape}, {args.device}, {torch.get_num_threads()} threads: {args.tasks} tasks, "
        f"{args.m} + {args.m} examples, {args.prompt_length} prompt vectors\n",
        flush=True,
    )
    if "step" in args.only:
        print_meta_steps(model, prompt, supports, queries, args)
    if "downstream" in args.only:
        args.m = 32
        print_downstream(model, prompt, random_batches(1, tokenizer, args)[0], args)
    if "precision" in args.only:
        print_precision(model, prompt, supports[:2], queries[:2], args.rounds)


if __name__ == "__main__":
    data.run(benchmark)
