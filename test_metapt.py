"""
The sanity checks, on a tiny T5 made here; nothing is downloaded. In the paper's order:

    Section 3          the T5 that reads [P; H(x)], tasks and their words
    Equations 1 and 2  against finite differences, torch.func, the textbook loop
    Files              prompts, and PEFT's
    data.py            the few-shot split, readers, pseudo-labels
    cluster.py         meta-tasks
    train_meta.py      runs that are stopped, killed, continued, shared
    finetune.py        runs, searches, predictions
    Hostile input      bad files and flags: one line, and nothing left behind
    The README         every command, snippet, flag and name in it

    python -m pytest -q
"""

import copy
import functools
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

HOUSE = Path(__file__).parent
sys.path.append(str(HOUSE / "offline"))

import cluster
import data
import demo
import finetune
import metapt
import train_meta
from metapt import InputError, PromptedT5, Task, adapt, load_prompt, meta_gradient, save_prompt
from metapt import textbook_meta_gradient
from small_t5 import SENTINELS

torch.set_num_threads(1)  # which is faster where all is tiny
SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])


TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def make_tokenizer():
    texts = ["it was " + " ".join(data.WORDS[5]), "yes maybe no ? a b c"]
    for domain in demo.DOMAINS:
        texts += [review["text"] for review in demo.write_reviews(domain, 200, random.Random(0))]
    words = ["<pad>", "</s>", "<unk>", *sorted(set(" ".join(texts).lower().split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=SENTINELS[:20], **names
    )


def make_t5(tokenizer, **changes):
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**ids, **TINY, **changes}))


def make_examples(count, seed=0, domain="films"):
    return demo.write_reviews(domain, count, random.Random(seed))


def make_tasks(model, sizes=((3, 4), (2, 2), (4, 1))):
    """Supports and queries of unequal sizes and lengths."""
    supports, queries = [], []
    for i, ((m, n), domain) in enumerate(zip(sizes, demo.DOMAINS)):
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


def put(path, content):
    """Writes a file of these bytes, or has `content` write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def learn(world, out, method="maml", **flags):
    """A short run of train_meta.py on the demo; returns the prompt."""
    config = world / ("ppt.json" if method == "ppt" else "maml.json")
    short = {"prompt_length": 3, "validation": 40, "max_steps": 6, "eval_every": 2, "batch_size": 2}
    run(train_meta, config=config, out=out, method=method, **{**short, **flags})
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


def tune(world, out, kind="pt", **flags):
    """Short runs of finetune.py on the demo; returns the lines of results."""
    short = {"max_epochs": 2, "max_test": 50, "shots": 8, "prompt_length": 3}
    run(finetune, config=world / f"{kind}.json", out=out, **{**short, **flags})
    return read_lines(out)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The offline demo, its T5 hardly trained."""
    return demo.demo(tmp_path_factory.mktemp("world") / "demo", steps=3)


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
    rates = {"learning_rate": 0.005, "warmup": 5, "validation": 60, "max_epochs": 16}
    run(data, "labeller", **where, **rates, eval_every=50, threads=1, device="cpu")
    return folder / "labeller"


@pytest.fixture
def at_call(monkeypatch):
    """at_call(module, name, n, act) has act() called before the n-th call of a function, as a
    Ctrl-C may come there; returns the list of its calls' arguments."""

    def arrange(module, name, n, act):
        original, calls = getattr(module, name), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == n:
                act()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        return calls

    return arrange


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


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


# ----------------------------------------------------------- Section 3: the T5 that reads [P; H(x)]


@pytest.mark.parametrize("ids", [[5, 9, 4], []])  # without a prompt it is the T5 itself
def test_prompt_of_embedding_rows_is_text_in_front(model, ids):
    examples = make_examples(3)
    batch, ids = model.encode(examples), torch.tensor(ids, dtype=torch.long)
    prompt, t5 = model.t5.get_input_embeddings()(ids).detach(), plain(model).t5
    for row, example in enumerate(examples):
        text = torch.cat([ids, model.encode([example])["input_ids"][0]])[None]
        expected = t5(input_ids=text, decoder_input_ids=model.decoder_ids).logits[0, 1]
        torch.testing.assert_close(model(prompt, batch)[row], expected)
    assert model.no_prompt().shape == (0, 16)


def test_the_t5_is_frozen_and_its_dropout_is_off(tokenizer):
    t5 = make_t5(tokenizer, dropout_rate=0.5).train()
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(3).requires_grad_(), model.encode(make_examples(4))
    assert torch.equal(model(prompt, batch), model(prompt, batch))
    model.loss(prompt, batch).backward()
    assert prompt.grad.any() and all(weights.grad is None for weights in t5.parameters())


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
    batch, logits = model.encode(make_examples(4)), []
    for module in (model, plain(model)):
        torch.manual_seed(0)
        logits.append(module.train()(model.no_prompt(), batch))
    torch.testing.assert_close(*logits)
    assert not torch.equal(logits[0], model(model.no_prompt(), batch))


def test_a_random_prompt_is_of_its_seed_and_of_the_embedding_table(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    table = model.t5.get_input_embeddings().weight
    first, again, second = (model.init_prompt(500, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)
    same = (first[:, None] == table).all(-1)
    assert same.any(1).all() and not same[:, tokenizer.all_special_ids].any()
    noise = model.init_prompt(500, init="normal")
    assert noise.std().item() == pytest.approx(table.std().item(), rel=0.05)


def test_padding_changes_nothing(model):
    prompt, batch = model.init_prompt(4).double(), model.encode(make_examples(4))
    longer = dict(batch)
    for name, value in {"input_ids": 7, "attention_mask": 0}.items():
        longer[name] = torch.nn.functional.pad(batch[name], (0, 9), value=value)
    torch.testing.assert_close(model(prompt, longer), model(prompt, batch))


def test_loss_predict_and_evaluate_agree_with_their_definitions(model):
    prompt, examples = model.init_prompt(4).double(), make_examples(7)
    batch = model.encode(examples)
    logits = model(prompt, batch)
    words = model.tokenizer.convert_tokens_to_ids(SENTIMENT.words)
    chosen = [words[label] for label in batch["labels"]]
    expected = -logits.log_softmax(-1)[range(7), chosen]
    torch.testing.assert_close(model.loss(prompt, batch), expected.mean())
    torch.testing.assert_close(model.loss(prompt, batch, reduction="none"), expected)

    labels = logits[:, words].argmax(-1).tolist()
    assert model.predict(prompt, batch).tolist() == labels
    shares = logits[:, words].softmax(-1)
    torch.testing.assert_close(model.probabilities(prompt, batch), shares)

    batches = list(model.batches(examples, 4))
    scores = model.evaluate(prompt, batches)
    assert [len(part["labels"]) for part in batches] == [4, 3]
    assert scores["accuracy"] == np.mean(np.array(labels) == batch["labels"].numpy())
    assert scores["loss"] == pytest.approx(expected.mean().item())
    confusion = np.zeros((5, 5))
    np.add.at(confusion, (batch["labels"], labels), 1)
    assert scores["confusion"] == confusion.tolist()
    answers = logits.argmax(-1).tolist()
    assert scores["in_words"] == pytest.approx(np.mean([answer in words for answer in answers]))


def test_encode_refuses_a_label_without_a_word(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    with pytest.raises(InputError, match=r"labels \[0, 5\] are not all indices"):
        model.encode([{"text": "a", "label": 0}, {"text": "b", "label": 5}])
    labels = model.encode([{"text": "a", "label": True}, {"text": "b", "label": True}])["labels"]
    assert labels.tolist() == [1, 1] and labels.dtype == torch.long  # and no mask of rows
    assert "labels" not in model.encode([{"text": "a", "label": 0}, {"text": "b"}])


# ---------------------------------------------------------------------- The words and ids of H(x)


def make_unigram_tokenizer():
    """A tokenizer with marks of new words, as T5's own has."""
    pieces = "<pad> </s> <unk> ▁ ▁It ▁was ▁bad ▁good . ▁. ▁plot plot ish < a _".split()
    scored = [(piece, -1.0 - len(piece) / 100) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace()
    return with_names(tokenizer, "<extra_id_0>", "<sep>")


def make_byte_level_tokenizer():
    """A tokenizer that reads the space before a word, as GPT-2's does."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "initial_alphabet": alphabet}
    texts = ["x bad", "x good", "the plot"] * 9
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**special, show_progress=False))
    return with_names(tokenizer, "<extra_id_0>", "<sep>")


def with_names(tokenizer, *more):
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    facts = {"tokenizer_object": tokenizer, "extra_special_tokens": list(more)}
    return PreTrainedTokenizerFast(**facts, **names)


def pieces_of(tokenizer, template, max_length=256, **fields):
    """The pieces of H(x), with a T5 of two classes."""
    task = Task("x", template, ["bad", "good"])
    model = PromptedT5(make_t5(tokenizer), tokenizer, task, max_length)
    (ids,) = model.encode([fields])["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids)


BYTE_LEVEL = ["{text} It was {mask}", "{text} It was {mask}.", "{text}It was{mask}"]
BYTE_LEVEL += ["{mask}: {text}", "({text}) [{mask}]", "{text}\nIt was\n{mask}\n!"]
BYTE_LEVEL += ["{text} <sep> {mask} <sep>", "un{text}s {mask}{text}"]


@pytest.mark.parametrize("template", BYTE_LEVEL)
def test_the_ids_of_a_byte_level_tokenizer_spell_h_of_x(template):
    tokenizer = make_byte_level_tokenizer()
    model = PromptedT5(make_t5(tokenizer), tokenizer, Task("x", template, ["bad", "good"]))
    assert tokenizer.convert_ids_to_tokens(model.word_ids) == ["Ġbad", "Ġgood"]
    for text in ("the plot was dull .", " dull. Or not? ", "café's </s> <extra_id_0>"):
        (ids,) = model.encode([{"text": text}])["input_ids"]
        text = re.sub("</s>|<extra_id_0>", "", text).strip()  # in a text they are no tokens
        wanted = template.format(text=text, mask="<extra_id_0>").replace(" <extra", "<extra")
        assert tokenizer.decode(ids[:-1]) == wanted and ids[-1] == tokenizer.eos_token_id


UNIGRAM = {  # templates, and the pieces of H(x) where the text is "plot"
    "{text}. It was {mask}.": "▁plot . ▁It ▁was <extra_id_0> .",
    "{text}. It was {mask} .": "▁plot . ▁It ▁was <extra_id_0> ▁.",
    "{text}ish .{mask}\n.": "▁plot ish ▁. <extra_id_0> ▁.",
    "{mask}. {text}": "<extra_id_0> . ▁plot",
    "{mask}{text}": "<extra_id_0> plot",
    "{mask}_{text}": "<extra_id_0> _ plot",
    "{mask}It was {text}": "<extra_id_0> ▁It ▁was ▁plot",  # there is no "It" without the mark
    "{text} <sep> {mask} <sep>": "▁plot <sep> <extra_id_0> <sep>",
}


@pytest.mark.parametrize("template", UNIGRAM)
@pytest.mark.parametrize("text", ["plot", " plot\n</s> <extra_id_0> ", "</</s>s>plot<sep<sep>>"])
def test_the_pieces_of_h_of_x_are_those_of_t5s_tokenizer(template, text):
    pieces = pieces_of(make_unigram_tokenizer(), template, text=text)
    assert pieces == [*UNIGRAM[template].split(), "</s>"]


def test_a_tokenizer_that_knows_no_spaces_reads_a_full_stop_behind_the_mask(tokenizer):
    pieces = pieces_of(tokenizer, "{text} It was {mask}.", text="plot")
    assert pieces == ["plot", "it", "was", "<extra_id_0>", ".", "</s>"]


def test_a_sentinel_of_several_tokens_is_refused():
    words = "<unk> <pad> </s> bad good < > extra_id_0 <extra_id_0>".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="has no <extra_id_0>"):
        pieces_of(with_names(tokenizer), "{text} {mask}", text="bad")


@pytest.mark.parametrize("text", ["I like this movie", "fine .", "so?", "no way!", " it is. "])
def test_h_of_x_is_the_papers_with_one_full_stop(text):
    filled, ((start, end),) = Task("x", data.TEMPLATE, ["bad", "good"]).fill({"text": text})
    stop = "" if text.strip()[-1] in ".!?" else "."
    assert filled == f"{text.strip()}{stop} It was{metapt.MASK}"
    assert filled[start:end] == text.strip()


def test_a_random_prompt_may_be_even_and_small(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    for init in ("vocab", "normal", "uniform"):
        prompt, small = (model.init_prompt(50, 1, init, scale) for scale in (1.0, 0.03))
        torch.testing.assert_close(0.03 * prompt, small)
    assert -0.5 <= prompt.min() < -0.45 and 0.45 < prompt.max() <= 0.5


def test_truncation_cuts_the_text_and_never_the_template(tokenizer):
    pieces = pieces_of(tokenizer, data.TEMPLATE, 10, text="gripping plot " * 50)
    assert pieces == "gripping plot gripping plot gripping . it was <extra_id_0> </s>".split()
    pieces = pieces_of(tokenizer, "{a} ? {mask} {b}", 10, a="plot " * 9, b="music bad")
    assert pieces == ["plot"] * 5 + ["?", "<extra_id_0>", "music", "bad", "</s>"]
    pieces = pieces_of(make_unigram_tokenizer(), "{text}. It was {mask}.", 8, text="plot " * 9)
    assert pieces == "▁plot ▁plot . ▁It ▁was <extra_id_0> . </s>".split()
    pieces = pieces_of(tokenizer, "It was {mask}{text}", 4, text="plot")
    assert pieces == ["it", "was", "<extra_id_0>", "</s>"]
    for text in ("plot", ""):
        with pytest.raises(InputError, match="template .* longer than 3"):
            pieces_of(tokenizer, data.TEMPLATE, 3, text=text)


# ------------------------------------------------------------------------------ Equations 1 and 2


def meta_loss(prompt, model, supports, queries, alpha):
    """Σ_Ti L_Ti(f_P'_i), by torch.func."""
    total = 0
    for support, query in zip(supports, queries):
        gradient = torch.func.grad(model.loss)(prompt, support)
        total = total + model.loss(prompt - alpha * gradient, query)
    return total


def functional(model, prompt, *rest):
    """Equation 2's gradient, by torch.func."""
    with metapt.twice_differentiable(True):
        return torch.func.grad_and_value(meta_loss)(prompt, model, *rest)


def test_meta_gradient_against_finite_differences(meta):
    model, prompt, *rest = meta
    gradient, loss = meta_gradient(*meta)
    value = lambda P: meta_loss(P, model, *rest).item()
    assert loss.item() == pytest.approx(value(prompt), rel=1e-12)
    torch.manual_seed(0)
    for _ in range(8):  # in random directions, where no wrong coordinate can hide
        change = 1e-6 * torch.randn_like(prompt)
        error = (gradient * change).sum() - (value(prompt + change) - value(prompt - change)) / 2
        assert abs(error) < 1e-7 * gradient.norm() * change.norm()


@pytest.mark.parametrize("definition", [textbook_meta_gradient, functional])
@pytest.mark.parametrize("tasks_per_pass, attention", [(1, "sdpa"), (2, "eager"), (4, "sdpa")])
def test_meta_gradient_against_its_definitions(meta, definition, tasks_per_pass, attention):
    model, *rest = meta
    expected, expected_loss = definition(plain(model), *rest)
    model.t5.set_attn_implementation(attention)
    gradient, loss = meta_gradient(model, *rest, tasks_per_pass=tasks_per_pass)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)


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


def test_adapt_all_equals_adapt_and_moves_no_input(meta):
    model, prompt, supports, _, alpha = meta
    before = prompt.clone()
    stacked = metapt.adapt_all(model, prompt.repeat(len(supports), 1, 1), supports, alpha)
    for i, support in enumerate(supports):
        torch.testing.assert_close(stacked[i], adapt(model, prompt, support, alpha))
    assert torch.equal(prompt, before) and not prompt.requires_grad


def test_supports_and_queries_are_as_many_and_may_be_none(meta):
    model, prompt, supports, _, alpha = meta
    gradient, loss = meta_gradient(model, prompt, [], [], alpha)  # as where processes are too many
    assert torch.equal(gradient, torch.zeros_like(prompt)) and loss == 0
    with pytest.raises(InputError, match="3 supports and 1 queries"):
        meta_gradient(model, prompt, supports, supports[:1], alpha)


def test_ppt_gradient_is_that_of_the_mean_loss(model):
    prompt, examples = model.init_prompt(3).double(), make_examples(5)
    P = prompt.clone().requires_grad_()
    mean = torch.stack([model.loss(P, batch) for batch in model.batches(examples, 1)]).mean()
    (expected,) = torch.autograd.grad(mean, P)
    gradient, loss = train_meta.ppt_gradient(model, prompt, model.encode(examples))
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, mean.detach())


# ------------------------------------------------ Appendix A: the schedule, the best of validations


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


@pytest.mark.parametrize(
    "accuracies, first, out",
    [
        ([0.5, 0.6, 0.4], 0, False),  # one has followed the best
        ([0.5, 0.6, 0.4, 0.3], 0, True),
        ([0.5, 0.6, 0.4, 0.6], 0, True),  # a tie is no better one
        ([0.5, 0.6, 0.4, 0.3], 2, False),  # PPT's patience counts from a later evaluation
        ([0.5, 0.6, 0.4, 0.3, 0.2], 2, True),
    ],
)
def test_out_of_a_patience_of_two(accuracies, first, out):
    scores = [{"accuracy": accuracy, "loss": 1.0} for accuracy in accuracies]
    assert metapt.out_of_patience(scores, 2, first) == out


# ------------------------------------------------------------------- Files: prompts, PEFT's, models


def test_prompt_round_trip_in_pefts_layout(tmp_path, tokenizer):
    prompt, folder = torch.randn(4, 16), tmp_path / "prompt"
    save_prompt(folder, prompt, make_t5(tokenizer), method="maml", step=7)
    loaded, facts = load_prompt(folder, width=16)
    assert torch.equal(loaded, prompt) and facts["step"] == 7
    names = ["adapter_config.json", "adapter_model.safetensors", "metapt.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_prompt_that_does_not_fit_is_refused(tmp_path, tokenizer):
    save_prompt(tmp_path, torch.zeros(4, 16), make_t5(tokenizer))
    with pytest.raises(InputError, match="width 16 .* needs 32"):
        load_prompt(tmp_path, width=32)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, message in {
        "num_virtual_tokens": "4 vectors, where its adapter_config.json says another number",
        "num_transformer_submodules": "it has a part for the decoder",
    }.items():
        path.write_text(json.dumps({**config, key: 2}))
        with pytest.raises(InputError, match=message):
            load_prompt(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="give a folder .*, as safetensors"):
        load_prompt(tmp_path)


def test_peft_reads_our_prompt_with_the_same_logits(tmp_path, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(5), model.encode(make_examples(3))
    save_prompt(tmp_path, prompt, model.t5)
    theirs = peft.PeftModel.from_pretrained(make_t5(tokenizer), tmp_path).eval()
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
    assert json.loads(capsys.readouterr().out)["predicted"] == label
    (row,) = tune(world, tmp_path / "results.jsonl", seeds=1, max_epochs=1, **ours)
    assert row["method"] == "PEFT"


def test_a_t5_in_a_folder_is_found_from_any_other(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    t5, _ = metapt.load_t5("t5")
    save_prompt(tmp_path, torch.zeros(3, 64), t5)
    assert load_prompt(tmp_path)[1]["base_model"] == str(world / "t5")


def test_a_model_that_is_no_t5_is_refused(tmp_path, monkeypatch):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no T5 but bert"):
        metapt.load_t5(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for name in ("./nothing", "demo/t6"):
        with pytest.raises(InputError, match=f"{name}: no such folder; give a T5"):
            metapt.load_t5(name)  # without asking the hub
    with pytest.raises(InputError, match="BertConfig is no T5ForConditionalGeneration"):
        PromptedT5(BertConfig(), None, SENTIMENT)


def without(weights, start):
    return {name: values for name, values in weights.items() if not name.startswith(start)}


def test_weights_that_are_missing_or_left_over_are_not_made_up(tmp_path, tokenizer):
    t5, path = make_t5(tokenizer), tmp_path / "t5" / "model.safetensors"
    data.save_model(tmp_path / "t5", t5, tokenizer)
    weights = load_file(path)
    for message, changed in {
        "missing weights: decoder.block.0.layer.0.*k.weight, 28": without(weights, "decoder."),
        "unexpected weights: odd.weight, 1 in all": {**weights, "odd.weight": torch.zeros(1)},
    }.items():
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(InputError, match=message):
            metapt.load_t5(tmp_path / "t5")

    # What older checkpoints of T5 hold twice is no weight too many.
    twice = {**weights, "encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    save_file(twice, path, {"format": "pt"})
    assert data.fingerprint(metapt.load_t5(tmp_path / "t5")[0]) == data.fingerprint(t5)


def test_a_classifier_lacks_its_head_only_where_it_is_to_be_trained(labeller, tmp_path):
    base = shutil.copytree(labeller.parent / "roberta", tmp_path / "base")
    with pytest.raises(InputError, match="missing weights: classifier.dense.bias, 4 in all"):
        data.load_classifier(base, "cpu")
    data.load_classifier(base, "cpu", is_base=True, num_labels=3)
    path, dense = base / "model.safetensors", "roberta.encoder.layer.0.output.dense"
    save_file(without(load_file(path), dense), path, {"format": "pt"})
    with pytest.raises(InputError, match=f"missing weights: {dense}"):
        data.load_classifier(base, "cpu", is_base=True, num_labels=3)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    metapt.write_json(path, {"a": 1})

    def broken(beside):
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="file.json: cannot be written: No space left .*; mend"):
        metapt.write_beside(path, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert metapt.read_json(path, "") == {"a": 1}


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


# ---------------------------------------------------------- data.py: readers of the official files


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
    """A tar of xz-compressed tars of .txt files, as OpenWebText is; one is no UTF-8."""
    first = {"0-a.txt": 'First one. "Second" two!\n\n', "0-b.txt": b"\xff\xfe"}
    second = {"1-a.txt": "Mr. A. B. Smith came.  He saw 3 things? Yes.\n", "x.md": "no"}
    subsets = {}
    for i, files in enumerate((first, second)):
        inner = pack(path.with_name(f"{i}.tar"), files)
        subsets[f"urlsf_subset0{i}_data.xz"] = data.lzma.compress(inner.read_bytes())
    return pack(path, subsets)


def test_read_corpus(tmp_path):
    path = make_openwebtext(tmp_path / "openwebtext.tar")
    sentences = ["First one.", '"Second" two!', None]
    sentences += ["Mr. A. B. Smith came.", "He saw 3 things?", "Yes.", None]
    assert list(data.read_corpus([path])) == sentences

    whole = pack(tmp_path / "x.tar", {f"{i}.txt": "a" for i in range(9)}).read_bytes()
    for cut in (512, 700):  # behind a header, within a text
        (tmp_path / "cut.tar").write_bytes(whole[: 1024 * 5 + cut])
        with pytest.raises(InputError, match="cut.tar: .*; give the whole file"):
            list(data.read_corpus([tmp_path / "cut.tar"]))

    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "a\\nb"}\n{"text": "c"}\n', encoding="utf-8")
    assert list(data.read_corpus([more] * 2)) == ["a", "b", "c"] * 2
    bad = [b"{", b"[]", b'{"text": ""}', b'{"text": 3}', b'{"text": "a\\u0000"}', b"\xff", b"3"]
    put(tmp_path / "bad.jsonl", b'{"text": "a"}\n' + b"\n".join(bad) + b'\n{"text": "z"}\n')
    found = list(data.read_corpus([tmp_path / "bad.jsonl"]))
    assert found == ["a", *[None] * len(bad), "z"]  # counted, and passed over
    put(tmp_path / "bad.txt", b"a\n\xff\n \nb\0c\nz")
    assert list(data.read_corpus([tmp_path / "bad.txt"])) == ["a", None, None, None, "z"]
    texts = {"0.txt": "a", "1.txt": "b\0c", "2.txt": " \n", "3.txt": "z"}
    bad = pack(tmp_path / "bad.tar", texts)
    assert list(data.read_corpus([bad])) == ["a", None, None, "z"]
    assert 3 < len(list(data.read_corpus([more] * 20, share=0.3))) < 40


def test_a_labeller_is_trained_in_float32_whatever_its_base(labeller, tmp_path):
    base = data.AutoModelForSequenceClassification.from_pretrained(labeller, dtype=torch.float16)
    base.save_pretrained(tmp_path / "half")
    data.AutoTokenizer.from_pretrained(labeller).save_pretrained(tmp_path / "half")
    where = {"task": labeller.parent / "task", "model": tmp_path / "half", "out": tmp_path / "out"}
    run(data, "labeller", **where, validation=60, max_epochs=1, threads=1, device="cpu")
    weights = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {values.dtype for values in weights} == {torch.float32}


def pseudo_label(labeller, out, **flags):
    """Runs pseudo-label on a corpus of 600 lines; returns the examples and the funnel."""
    corpus = out.parent / "corpus.txt"
    texts = [review["text"].replace(" .", " .\n", 1) + "\n" for review in make_examples(300, 5)]
    corpus.write_text("".join(texts))
    where = {"labeller": labeller, "corpus": corpus, "out": out}
    how = {"threads": 1, "batch_size": 2, "device": "cpu"}
    run(data, "pseudo-label", **where, **{**how, **flags})
    return read_lines(out / "examples.jsonl"), json.loads((out / "funnel.json").read_text())


def test_labeller_learns_and_keeps_its_best(labeller):
    log = read_lines(labeller / "log.jsonl")
    assert [line["step"] for line in log] == [50, 96]
    assert max(line["accuracy"] for line in log) > 0.8
    assert Task.load(labeller).words == ["bad", "good"]
    where = {"task": labeller.parent / "task", "model": labeller.parent / "roberta"}
    with pytest.raises(InputError, match="a labeller stands there already; give another --out"):
        run(data, "labeller", out=labeller, validation=60, **where)
    with pytest.raises(InputError, match="takes 512 tokens; lower --max-length 513"):
        run(data, "labeller", out=labeller, validation=60, max_length=513, restart=True, **where)
    assert read_lines(labeller / "log.jsonl") == log


def test_pseudo_labels_are_sure_balanced_and_without_duplicates(labeller, tmp_path):
    sure = {"confidence": [0.98, 0.9], "max_words": 14}
    examples, funnel = pseudo_label(labeller, tmp_path / "source", **sure)
    labels = [example["label"] for example in examples]
    assert labels.count(0) == labels.count(1) > 10
    assert Task.load(tmp_path / "source").words == ["bad", "good"]
    for example in examples:
        assert example["confidence"] >= (0.98, 0.9)[example["label"]]
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
    assert re.search("bad: [1-9][0-9]* labelled, sure of 0 diff", capsys.readouterr().out)
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


# ------------------------------------------- cluster.py: meta-tasks, Section 4.2 and Appendix B


@pytest.mark.parametrize("method", ["kmeans", "lda", "random", "label"])
def test_cluster(world, tmp_path, method, capsys):
    reviews = [r for domain in demo.SOURCE_DOMAINS for r in make_examples(70, 0, domain)]
    data.write_task(tmp_path / "source", SENTIMENT, {"examples": reviews})
    out, figure = tmp_path / "clusters" / "made.jsonl", tmp_path / "figures" / "tsne.png"
    flags = {"encoder": world / "t5", "figure": figure} if method == "kmeans" else {}
    flags |= {"method": method, "k": 7, "vocabulary": 200, "device": "cpu"}
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

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")  # processes that import PyTorch once for all
FORKS.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """A finished run of train_meta.py: to read, or to copy and to continue."""
    out = tmp_path_factory.mktemp("learned") / "meta"
    learn(world, out)
    return out


def check_same_bytes(one, other):
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("method", ["maml", "fomaml", "ppt"])
def test_train_meta(world, tmp_path, method):
    prompt = learn(world, tmp_path / "prompt", method)
    log = read_lines(tmp_path / "prompt" / "log.jsonl")
    facts = load_prompt(tmp_path / "prompt")[1]
    assert prompt.shape == (3, 64) and [line["step"] for line in log] == [0, 2, 4, 6]
    best = max(log, key=lambda line: (round(line["accuracy"], 9), -line["loss"], -line["step"]))
    found = (facts["method"], facts["step"], facts["accuracy"])
    assert found == (method, best["step"], best["accuracy"])
    learn(world, tmp_path / "again", method)
    check_same_bytes(tmp_path / "prompt", tmp_path / "again")


def test_without_an_inner_step_the_gradient_is_the_querys(world, meta, tmp_path):
    model, prompt, supports, queries, _ = meta
    P = prompt.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(model.loss(P, query) for query in queries), P)
    gradient, _ = meta_gradient(model, prompt, supports, queries, 0.0, first_order=True)
    torch.testing.assert_close(gradient, expected)
    learn(world, tmp_path / "run", alpha=0, max_steps=1)
    assert load_prompt(tmp_path / "run")[1]["method"] == "no inner step"


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


def test_a_large_batch_of_ppt_leaves_its_validation_as_it_is(world, tmp_path):
    for size in (4, 32):
        learn(world, tmp_path / f"{size}", "ppt", batch_size=size, max_steps=0)
    check_same_bytes(tmp_path / "4", tmp_path / "32")
    with pytest.raises(InputError, match="3960 examples to train on; lower --batch-size"):
        learn(world, tmp_path / "huge", "ppt", batch_size=5000)


def test_ppt_runs_five_epochs_at_most(world, tmp_path):
    flags = {"source_size": 100, "validation": 20, "max_steps": 99, "eval_every": 45}
    learn(world, tmp_path / "run", "ppt", batch_size=9, **flags)
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert log[-1]["step"] == 5 * 9  # 80 examples are nine batches of 9


def test_ppts_rate_rises_and_falls_and_metapts_stays(world, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    for method in ("ppt", "maml"):
        learn(world, tmp_path / method, method, learning_rate=0.5, max_steps=6)
    scheduled = [0.5 * metapt.linear_schedule(step, 6) for step in range(6)]
    assert rates == pytest.approx(scheduled + 6 * [0.5])


def test_the_prompt_of_the_best_validation_is_kept(world, tmp_path, monkeypatch):
    accuracies, prompts = iter([0.2, 0.9, 0.5, 0.4]), []

    def validate(model, prompt, *others):
        prompts.append(prompt.clone())
        return {"accuracy": next(accuracies), "loss": 1.0, "in_words": 1.0}

    monkeypatch.setattr(train_meta, "validate", validate)
    assert torch.equal(learn(world, tmp_path / "run"), prompts[1])
    assert len(prompts) == 4 and not torch.equal(prompts[0], prompts[1])


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
    as_it_is = train_meta.validate(model, prompt, [(None, [rest])], alpha=0.5)
    assert as_it_is["loss"] == pytest.approx(model.loss(prompt, rest).item())


def test_every_weight_of_the_t5_stays_as_it_was(tokenizer):
    model, examples = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT), make_examples(8)
    weights = copy.deepcopy(model.t5.state_dict())
    prompt, support = model.init_prompt(3), model.encode(examples)
    meta_gradient(model, prompt, [support], [support], 0.1)
    tuned, _ = finetune.tune(model, prompt, examples, examples, 0.1, max_epochs=2)
    assert not torch.equal(prompt, tuned) and not model.t5.training
    assert all(torch.equal(value, weights[name]) for name, value in model.t5.state_dict().items())
    assert not any(weight.requires_grad for weight in model.t5.parameters())


STOPS = [("validate", 1, signal.SIGINT), ("draw", 3, signal.SIGTERM)]


@pytest.mark.parametrize("function, call, number", [*STOPS, ("save_run", 2, signal.SIGINT)])
def test_a_stopped_run_continues_to_the_same_bytes(
    world, learned, tmp_path, at_call, function, call, number
):
    drawn = at_call(train_meta, "draw", 0, None)
    at_call(train_meta, function, call, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d and saved"):
        learn(world, tmp_path / "parts")
    learn(world, tmp_path / "parts")
    check_same_bytes(tmp_path / "parts", learned)
    assert [step for *_, step in drawn] == [0, 1, 2, 3, 4, 5]  # none of them twice


def test_a_stop_at_the_end_of_a_run_ends_the_search_too(world, tmp_path, at_call):
    at_call(train_meta, "validate", 4, ctrl_c)  # the last of a run
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path / "out", search=True)
    (folder,) = (tmp_path / "out").glob("alpha*")
    assert len(read_lines(folder / "log.jsonl")) == 4 and load_prompt(folder)[1]["step"] <= 6


def test_a_killed_run_continues_to_the_same_bytes(world, tmp_path):
    """SIGKILL a few hundredths of a second after an evaluation, three times in one run."""
    short = {"prompt_length": 3, "validation": 20, "max_steps": 40, "eval_every": 2}
    flags = {"config": world / "maml.json", "patience": 99, "batch_size": 1, **short}
    run(train_meta, out=tmp_path / "whole", **flags)
    log = tmp_path / "parts" / "log.jsonl"
    argv = command(train_meta, out=tmp_path / "parts", **flags)[2:]
    for kill in range(3):
        before = log.read_text() if log.exists() else None
        process = FORKS.Process(target=train_meta.main, args=(argv,))
        process.start()
        while process.is_alive() and (not log.exists() or log.read_text() == before):
            time.sleep(0.01)
        time.sleep(kill / 60)
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run ended before it was killed: give it more steps"
    train_meta.main(argv)
    check_same_bytes(tmp_path / "parts", tmp_path / "whole")


def test_more_steps_and_more_patience_go_on_with_a_run(world, learned, tmp_path):
    learn(world, tmp_path / "parts", max_steps=4)
    learn(world, tmp_path / "parts", patience=9)
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()  # as an earlier end may leave it
    learn(world, tmp_path / "parts", patience=9)
    check_same_bytes(tmp_path / "parts", learned)
    learn(world, tmp_path / "ppt", "ppt", max_steps=2)  # whose schedule knows its end
    with pytest.raises(InputError, match="began with --max-steps 2, not 4"):
        learn(world, tmp_path / "ppt", "ppt", max_steps=4)


OTHERS = {"alpha": (0.08, 0.3), "method": ("maml", "fomaml"), "threads": (1, 2), "seed": (1, 2)}
OTHERS |= {"max-steps": (6, 4), "patience": (6, 5)}  # which may grow, but not shrink


@pytest.mark.parametrize("flag", OTHERS)
def test_a_run_goes_on_with_its_own_arguments_only(world, learned, flag):
    before, now = OTHERS[flag]
    message = f"meta: this run began with --{flag} {before}, not {now}; .*--restart begins anew"
    with pytest.raises(InputError, match=message):
        learn(world, learned, **{flag.replace("-", "_"): now})


def test_a_run_goes_on_with_its_own_number_of_threads(world, tmp_path):
    """The digits depend on it, so a continued run takes the number that it began with."""
    flags = {"source": world / "source" / "clustered.jsonl", "model": world / "t5"}
    for count in (1, 2):
        torch.set_num_threads(count)
        run(train_meta, out=tmp_path / "run", validation=40, max_steps=count, **flags)
    assert torch.get_num_threads() == load_prompt(tmp_path / "run")[1]["threads"] == 1


def make_anew(path):
    """Changes a text, or one of a T5's weights, in its place."""
    if path.is_dir():
        weights = load_file(path / "model.safetensors")
        weights["shared.weight"][0, 0] += 1
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes().replace(b"was", b"is"))


@pytest.mark.parametrize("place", ["source/clustered.jsonl", "source/task.json", "t5"])
def test_a_run_goes_on_with_its_own_data_and_t5_only(world, tmp_path, place):
    demo = shutil.copytree(world, tmp_path / "demo")
    learn(demo, tmp_path / "run", max_steps=0)
    make_anew(demo / place)
    with pytest.raises(InputError, match=f"began with {demo / place} [0-9a-f]{{16}}, not "):
        learn(demo, tmp_path / "run", max_steps=0)


def test_a_broken_checkpoint_names_restart(world, learned, tmp_path):
    out = shutil.copytree(learned, tmp_path / "run")
    good = (out / "checkpoint.safetensors").read_bytes()
    for broken in (good[:-5], good[:100], b""):
        (out / "checkpoint.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match="checkpoint.safetensors: .*--restart begins anew"):
            learn(world, out)
    learn(world, out, restart=True)
    check_same_bytes(out, learned)


def test_a_restart_that_fails_at_once_leaves_nothing_to_go_on_with(world, learned, tmp_path):
    out = shutil.copytree(learned, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(train_meta, "validate", None)  # before anything is saved
        learn(world, out, seed=2, restart=True)
    learn(world, out, seed=2)
    learn(world, tmp_path / "other", seed=2)
    check_same_bytes(out, tmp_path / "other")


def test_a_run_in_a_thread_goes_on_without_signals(world, tmp_path):
    thread = threading.Thread(target=learn, args=(world, tmp_path / "run"))
    thread.start()
    thread.join()
    assert load_prompt(tmp_path / "run")[1]["method"] == "maml"


def test_a_config_is_read_from_any_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn(Path(os.path.relpath(world)), tmp_path / "run", max_steps=0)


def test_a_gradient_that_is_not_finite_ends_a_run(world, tmp_path, monkeypatch):
    nan = lambda model, prompt, *rest, **how: (prompt * math.nan, torch.zeros(()))
    monkeypatch.setattr(train_meta, "meta_gradient", nan)
    with pytest.raises(metapt.Diverged, match="step 0: a loss or a gradient is not finite; .*run"):
        learn(world, tmp_path / "run")
    assert load_prompt(tmp_path / "run")[0].isfinite().all()


def work_under_torchrun(rank, port, argv):
    os.environ.update({**torchrun(rank, 2), "MASTER_PORT": str(port)})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torchrun's own, here the test's
    train_meta.main(argv)
    assert torch.distributed.is_initialized()


def test_torchrun_shares_a_step_and_changes_nothing(world, learned, tmp_path):
    shutil.copy(learned / "arguments.json", tmp_path)
    argv = ["--config", str(tmp_path / "arguments.json"), "--out", str(tmp_path / "two")]
    store = torch.distributed.TCPStore("localhost", 0, 2, True, wait_for_workers=False)
    works = {"target": work_under_torchrun, "daemon": True}
    workers = [FORKS.Process(args=(rank, store.port, argv), **works) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    one, two = (
        load_file(folder / "checkpoint.safetensors") for folder in (learned, tmp_path / "two")
    )
    torch.testing.assert_close(one["prompt"], two["prompt"], atol=1e-6, rtol=0)
    one, two = (read_lines(folder / "log.jsonl") for folder in (learned, tmp_path / "two"))
    assert [line["accuracy"] for line in one] == [line["accuracy"] for line in two]


def test_variables_that_torchrun_did_not_set_do_not_count(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    data.run(lambda: None)
    assert "is set, but not by torchrun: this is the only process" in capsys.readouterr().err
    assert data.rank_and_world() == (0, 1)


def test_search_keeps_the_best_of_the_rates_at_which_it_converges(world, tmp_path, monkeypatch):
    train, betas = train_meta.train, [0.3, 0.1, 0.001]

    def diverging(args):
        if args.learning_rate > 0.2:
            raise metapt.Diverged("step 3: the loss is not finite")
        return train(args)

    monkeypatch.setattr(train_meta, "train", diverging)
    monkeypatch.setattr(train_meta, "ALPHAS", [0.08])
    monkeypatch.setattr(train_meta, "BETAS", betas)
    prompt = learn(world, tmp_path / "run", search=True, max_steps=2)
    runs = [load_prompt(tmp_path / "run" / f"alpha0.08-beta{beta}") for beta in betas[1:]]
    assert not any(facts["arguments"]["search"] for _, facts in runs)  # as --config may run one
    best = max(runs, key=lambda run: (round(run[1]["accuracy"], 9), -run[1]["loss"]))
    assert torch.equal(prompt, best[0]) and load_prompt(tmp_path / "run")[1] == best[1]

    del betas[1:]
    learn(world, tmp_path / "ppt", "ppt", search=True, max_steps=0)  # at A.2's rate, without an α
    assert load_prompt(tmp_path / "ppt")[1]["arguments"]["learning_rate"] == 0.003
    with pytest.raises(InputError, match="it diverges with every pair of rates"):
        learn(world, tmp_path / "none", search=True)


@pytest.mark.parametrize("packed", [False, True])
def test_source_size_and_the_facts_of_a_prompt(world, tmp_path, packed):
    source = shutil.copytree(world / "source", tmp_path / "source") / "clustered.jsonl"
    if packed:
        source = pack(tmp_path / "source" / "clustered.jsonl.gz", {"": source.read_text()})
    learn(world, tmp_path / "run", source=source, source_size=500, max_steps=0)
    facts = load_prompt(tmp_path / "run")[1]
    found = [facts[name] for name in ("source_size", "clusters", "clustering", "threads")]
    assert found == [500, 4, "kmeans", 1] and facts["versions"]["torch"] == torch.__version__
    assert facts["digests"][str(source)] == data.digest(source)
    assert facts["arguments"]["matmul"] == "highest"


@pytest.mark.parametrize("flag, value", [("seed", 2), ("threads", 2), ("alpha", 0.3)])
def test_a_recipe_is_a_prompts_arguments_without_its_seed(
    world, learned, tmp_path, flag, value, monkeypatch
):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # two would be slower here
    learn(world, tmp_path / "run", **{flag: value})
    one, other = (load_prompt(folder)[1]["recipe"] for folder in (learned, tmp_path / "run"))
    assert (one == other) == (flag != "alpha")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_t5s_fingerprint_is_of_its_weights_alone(world, dtype):
    t5 = metapt.load_t5(world / "t5", dtype=dtype)[0]
    assert data.fingerprint(t5) == data.fingerprint(metapt.load_t5(world / "t5")[0])


# ------------------------------------------------------- finetune.py: Section 5, A.1, A.4, the runs


@pytest.fixture(scope="module")
def sweep(world, learned, tmp_path_factory):
    """A folder of results.jsonl and tuned prompts."""
    folder = tmp_path_factory.mktemp("sweep")
    flags = {"prompt": ["random", learned], "seeds": [1, 2], "save": folder / "tuned"}
    tune(world, folder / "results.jsonl", **flags)
    return folder


def few(world, out, kind="pt", **flags):
    """One epoch on one task from a random prompt, or with other flags."""
    few = {"task": world / "books", "prompt": "random", "max_epochs": 1, "seeds": 1}
    return tune(world, out, kind, **{**few, **flags})


def test_a_sweep_runs_only_what_is_new(world, learned, sweep, tmp_path, capsys):
    rows = read_lines(sweep / "results.jsonl")
    assert len(rows) == len({(row["task"], row["prompt"], row["seed"]) for row in rows}) == 8
    out = shutil.copytree(sweep, tmp_path / "sweep") / "results.jsonl"
    again = tune(world, out, prompt=["random", learned], seeds=[1, 2, 3])
    assert again[:8] == rows and len(again) == 12
    assert "4 new runs, 8 stood there already" in capsys.readouterr().out


def test_the_short_table_holds_means_and_deviations(capsys):
    runs = [("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.4)]
    same = {"method": "maml", "prompt": "meta", "shots": 8}
    rows = [{"task": task, "seed": seed, "accuracy": share, **same} for task, seed, share in runs]
    rows.append({**rows[0], "method": "ft", "prompt": "none"})
    finetune.print_table("Title", finetune.score_table(rows))
    printed = capsys.readouterr().out
    assert "| 8     | MetaPT | meta   | 60.00 ± 14.14 | 40.00 |" in printed
    assert "| 8     | FT     | none   | 50.00         | -     |" in printed


def test_a_tuned_prompt_labels_new_text(world, learned, sweep, tmp_path, capsys):
    texts = put(tmp_path / "reviews", b"The plot was gripping .\n\n{dull}\n")  # it is not JSON
    tuned, out = sweep / "tuned" / "books-meta-8-1", tmp_path / "out.jsonl"
    run(finetune, predict=texts, prompt=tuned, out=out, device="cpu")
    lines = read_lines(out)
    assert [line["text"] for line in lines] == ["The plot was gripping .", "{dull}"]
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, max_length=128)
    expected = model.probabilities(load_prompt(tuned)[0], model.encode(lines))
    for line, p in zip(lines, expected, strict=True):
        assert line["word"] == SENTIMENT.words[line["predicted"]] == SENTIMENT.words[p.argmax()]
        assert list(line["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-4)

    # A --max-length that is given wins over that of the prompt's run.
    run(finetune, predict=texts, prompt=tuned, out=out, device="cpu", max_length=10)
    assert read_lines(out)[0]["probabilities"] != lines[0]["probabilities"]
    with pytest.raises(InputError, match="meta: it does not say its task, .*name a --task"):
        run(finetune, predict=texts, prompt=learned, device="cpu")
    with pytest.raises(InputError, match="reviews: no text to label"):
        run(finetune, predict=put(texts, b"\n"), prompt=tuned, device="cpu")


def test_predictions_of_labelled_texts_are_scored(world, learned, tmp_path, capsys):
    test, texts = read_lines(world / "books" / "test.jsonl")[:40], tmp_path / "test.jsonl"
    flags = {"prompt": learned, "task": world / "books", "device": "cpu"}
    data.write_lines(texts, test)
    run(finetune, predict=texts, **flags)
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["label"] for row in rows] == [example["label"] for example in test]
    share = np.mean([row["label"] == row["predicted"] for row in rows])
    assert f"accuracy {share:.1%}, macro-F1 " in printed.err and "of 40 labelled" in printed.err
    data.write_lines(texts, [*test, {"text": "who knows ?"}])
    run(finetune, predict=texts, **flags)
    assert f"accuracy {share:.1%}" in capsys.readouterr().err  # those that have a label count
    data.write_lines(texts, [test[0], {**test[1], "label": 7}])
    with pytest.raises(InputError, match="test.jsonl: text 2: label 7 is not one of 0 to 4"):
        run(finetune, predict=texts, **flags)


def test_a_prompt_brings_its_own_t5_along(world, learned, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune, "run_all", seen.append)
    for start in (learned, "random"):
        run(finetune, task=world / "books", prompt=["random", start])
    assert [args.model for args in seen] == [str(world / "t5"), data.MODEL]


def test_a_prompt_used_with_another_t5_says_so(world, learned, tmp_path, capsys):
    t5 = shutil.copytree(world / "t5", tmp_path / "t5")
    few(world, tmp_path / "r.jsonl", prompt=learned, model=t5)
    assert "learned with" not in capsys.readouterr().err  # the same one under another name
    make_anew(t5)
    few(world, tmp_path / "r.jsonl", prompt=learned, model=t5)
    printed = capsys.readouterr().err
    assert f"was learned with {world / 't5'}, and is used with {t5}" in printed
    finetune.notice_another_t5("p", {"base_model": "t5", "fingerprint": "0"}, "t5", "1")
    assert "is used with another T5 that is there now" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["books/test.jsonl", "books/task.json", "t5"])
def test_other_data_or_another_t5_makes_a_run_new(world, tmp_path, place):
    demo = shutil.copytree(world, tmp_path / "demo")
    few(demo, tmp_path / "r.jsonl")
    make_anew(demo / place)
    for again in range(2):
        assert len(few(demo, tmp_path / "r.jsonl")) == 2


def test_a_run_is_made_again_for_a_prompt_that_save_lacks(world, tmp_path, capsys):
    out, save = tmp_path / "r.jsonl", tmp_path / "tuned"
    few(world, out)
    for count in (1, 0):
        assert len(few(world, out, save=save)) == 1
        assert f"{count} new run" in capsys.readouterr().out
    assert load_prompt(save / "books-random-8-1")[1]["shots"] == 8


def test_namesakes_and_missing_files_are_refused_before_any_run(world, learned, tmp_path):
    books = shutil.copytree(world / "books", tmp_path / "books")
    shutil.copytree(learned, tmp_path / "meta")
    (books / "test.jsonl").unlink()
    for message, flags in {
        "two tasks have one name, of .'books', 'books'": {"task": [books, world / "books"]},
        "two of the prompts have one name": {"prompt": [tmp_path / "meta", learned], "save": "x"},
        "test.jsonl: no such file; .*--test-share": {"task": books},
    }.items():
        with pytest.raises(InputError, match=message):
            few(world, tmp_path / "r.jsonl", **flags)
    assert not (tmp_path / "r.jsonl").exists()


def test_full_tuning_starts_every_run_from_the_same_weights(world, tmp_path):
    both = few(world, tmp_path / "both.jsonl", "ft", seeds=[1, 2])
    alone = few(world, tmp_path / "alone.jsonl", "ft", seeds=2)
    assert both[1]["loss"] == alone[0]["loss"]
    assert all(row["method"] == "ft" and row["prompt"] == "none" for row in both)


def test_runs_go_on_after_one_that_diverges(world, tmp_path, at_call):
    def diverge():
        raise metapt.Diverged("no epoch's validation loss is finite")

    at_call(finetune, "one_run", 1, diverge)
    with pytest.raises(
        InputError, match="1 of 2 runs have no result; books, PT .random., .*seed 1"
    ):
        few(world, tmp_path / "r.jsonl", seeds=[1, 2])
    with pytest.raises(
        InputError, match="no validation loss is finite at learning rate 1e.20; lower"
    ):
        few(world, tmp_path / "r.jsonl", "ft", learning_rate=1e20)
    assert [row["seed"] for row in read_lines(tmp_path / "r.jsonl")] == [2]


def test_accumulated_passes_give_the_same_prompt(model):
    examples = (model.init_prompt(3).double(), make_examples(20), make_examples(8, 1))
    settings = {"learning_rate": 0.1, "batch_size": 8, "max_epochs": 2}
    once, thrice = (finetune.tune(model, *examples, accumulate=n, **settings) for n in (1, 3))
    torch.testing.assert_close(once[0], thrice[0])


def test_a_stopped_sweep_continues(world, tmp_path, at_call):
    out, flags = tmp_path / "new" / "r.jsonl", {"method": ["pt", "ft"], "shots": [4, 8]}
    runs = at_call(finetune, "one_run", 3, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        few(world, out, **flags)
    before = read_lines(out)
    rows = few(world, out, **flags)
    assert len(before) == 2 and rows[:2] == before and len(runs) == 3 + 2
    assert len(rows) == len({finetune.identity(row) for row in rows}) == 4


def test_two_equal_commands_at_once_write_no_run_twice(world, tmp_path, at_call):
    others = []  # the rows of a command that begins and ends within the first run of this one
    other = lambda: others.extend(few(world, tmp_path / "r.jsonl", seeds=[1, 2]))
    runs = at_call(finetune, "one_run", 1, other)
    assert few(world, tmp_path / "r.jsonl", seeds=[1, 2]) == others
    assert [run["row"]["seed"] for _, run in runs] == [1, 1, 2]


def test_no_result_is_lost_between_processes(sweep, tmp_path):
    row, out = read_lines(sweep / "results.jsonl")[0], tmp_path / "r.jsonl"

    def add_ten(first):
        for seed in range(first, first + 10):
            finetune.add_result(out, {**row, "seed": seed})

    threads = [threading.Thread(target=add_ten, args=(first,)) for first in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["seed"] for row in read_lines(out)) == list(range(30))


def test_search_chooses_by_validation_alone(tokenizer, monkeypatch):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    weights, seen = copy.deepcopy(model.t5.state_dict()), []
    found = [(0.9, math.nan), (0.7, 1.2), (0.7, 1.1), (0.7, 1.3), (0.5, 0.1)]

    def tune(model, prompt, training, validation, learning_rate):
        assert prompt is None
        assert all(torch.equal(w, weights[name]) for name, w in model.t5.state_dict().items())
        accuracy, loss = found[len(seen)]
        seen.append(learning_rate)
        with torch.no_grad():
            model.t5.shared.weight.fill_(learning_rate)
        if math.isnan(loss):
            raise finetune.Diverged("no epoch's validation loss is finite")
        return prompt, {"validation_accuracy": accuracy, "validation_loss": loss}

    monkeypatch.setattr(finetune, "tune", tune)
    monkeypatch.setattr(PromptedT5, "evaluate", None)  # so no test split is scored
    facts = finetune.search(model, [], [])
    assert seen == finetune.RATES and facts["learning_rate"] == 8e-5
    assert (model.t5.shared.weight == 8e-5).all()
    assert facts["tried"] == dict(zip(finetune.RATES, [None, 0.7, 0.7, 0.7, 0.5]))


def test_a_searched_run_says_what_was_tried(world, tmp_path):
    (row,) = few(world, tmp_path / "r.jsonl", "ft", search=True)
    rates = [float(rate) for rate in row["tried"]]
    assert row["settings"]["learning_rate"] == rates == finetune.RATES
    chosen = row["tried"][str(row["learning_rate"])]
    assert chosen == row["validation_accuracy"] == max(row["tried"].values())


def test_bfloat16_keeps_the_prompt_in_float32(world, tmp_path):
    (row,) = few(world, tmp_path / "r.jsonl", dtype="bfloat16", save=tmp_path / "tuned")
    prompt, _ = load_prompt(tmp_path / "tuned" / "books-random-8-1")
    assert row["settings"]["dtype"] == "bfloat16" and np.isfinite(row["loss"])
    assert not torch.equal(prompt, prompt.bfloat16().float())  # its updates were not rounded


PAIR = Task("pair", "{premise} ? {mask} . {hypothesis}", ["yes", "maybe", "no"])
CHOICE = Task("choice", "{question} A {a} B {b} C {c} {mask}", ["A", "B", "C"])
SAID = ["fine", "nice", "poor"]
PAIRS = [{"premise": "plot fine", "hypothesis": SAID[i], "label": i} for i in range(3)]
CHOICES = [{**dict.fromkeys("abc", "poor"), "question": "the plot ?", "label": i} for i in range(3)]
for choice in CHOICES:
    choice["abc"[choice["label"]]] = "great"


@pytest.mark.parametrize("task, examples", [(PAIR, PAIRS), (CHOICE, CHOICES)])
def test_pairs_and_choices_through_the_template_alone(tmp_path, tokenizer, task, examples):
    data.write_task(tmp_path / "task", task, {"train": examples * 40, "test": examples * 40})
    make_t5(tokenizer, dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    flags = {"task": tmp_path / "task", "model": tmp_path / "t5", "out": tmp_path / "r.jsonl"}
    flags |= {"shots": 60, "seeds": 1, "learning_rate": 0.01, "patience": 20, "device": "cpu"}
    for method, most in (("ft", 20), ("pt", 1)):
        run(finetune, method=method, max_epochs=most, prompt_length=3, **flags)
    full, prompt = read_lines(tmp_path / "r.jsonl")
    assert full["accuracy"] > 0.9 and full["macro_f1"] > 0.9 and np.sum(full["confusion"]) == 120
    assert prompt["method"] == "random" and prompt["words"] == task.words


def test_dropout_is_for_full_tuning_alone(tokenizer, monkeypatch):
    model, examples, seen = (
        PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT),
        make_examples(8),
        [],
    )
    loss = model.loss
    seeing = lambda *args: seen.append(model.t5.training) or loss(*args)
    monkeypatch.setattr(model, "loss", seeing)
    for start in (model.init_prompt(3), None):
        finetune.tune(model, start, examples, examples, max_epochs=1)
    assert seen == [False, True]


def test_no_shots_test_the_start_as_it_is(world, learned, tmp_path):
    flags = {"shots": 0, "seeds": 1, "task": world / "books", "max_test": 30}
    tune(world, tmp_path / "r.jsonl", prompt=["random", learned], **flags)
    rows = tune(world, tmp_path / "r.jsonl", kind="ft", **flags)
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, 128)
    test = read_lines(world / "books" / "test.jsonl")
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:30]]
    starts = [model.init_prompt(3, 1), load_prompt(learned)[0], model.no_prompt()]
    for row, start in zip(rows, starts, strict=True):
        score = model.evaluate(start, list(model.batches(test)))
        assert row["accuracy"] == pytest.approx(score["accuracy"]) and row["epochs"] == 0


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    assert finetune.macro_f1([[3, 1, 0], [1, 0, 0], [0, 0, 0]]) == pytest.approx(0.75 / 2)


# ------------------------------------------------- Hostile input: one line, and nothing left behind


def packed(name, text):
    """Writes a packed file of one text."""
    return lambda path: pack(path, {name: text})


def tensor_file(metadata=None, **tensors):
    tensors = {name: torch.as_tensor(values) for name, values in tensors.items()}
    return lambda path: save_file(tensors, path, metadata)


def checkpoint(*lacking, rows=3, **facts):
    """Writes a checkpoint of a prompt of 3 rows, with other facts or without some tensors."""
    line = {"step": 0, "accuracy": 0.5, "loss": 1.0}
    facts = {"run": {"--threads": 1}, "step": 0, "log": [line], **facts}
    names = {"prompt", "best", *train_meta.MOMENTS} - set(lacking)
    tensors = {name: torch.zeros(rows, 16) for name in names}
    return tensor_file({"facts": json.dumps(facts)}, **tensors)


# Readers of a file; what they need beside it stands there, whole.
read_corpus = lambda path: list(data.read_corpus([path]))
read_dataset = lambda path: data.convert(path.name.split(".")[0], path, path.with_name("task"))
read_prompt = lambda path: load_prompt(path.parent, 16)
read_t5 = lambda path: metapt.load_t5(path.parent)
read_labeller = lambda path: data.load_classifier(path.parent, "cpu")
read_encoder = lambda path: cluster.embed(["a"], Path("e.npy"), str(path.parent), "cpu")
read_examples = lambda path: list(data.read_examples(path, SENTIMENT, ".jsonl" in path.name))
read_embeddings = lambda path: cluster.embed(["a"] * 3, path, "none", "cpu")


def read_flags(path):
    where = ["--source", "clusters.jsonl", "--out", "x"]
    return train_meta.make_parser().parse(["--config", str(path), *where])


def read_source(path):
    train_meta.read_source(read_flags(path.with_name("flags.json")), SENTIMENT, 1)


def read_checkpoint(path):
    prompt = torch.nn.Parameter(torch.zeros(3, 16))
    begun, optimizer = train_meta.read_checkpoint(path), torch.optim.AdamW([prompt])
    train_meta.load_state(path.parent, begun, prompt, torch.zeros(3, 16), optimizer)


def read_blocks(path):
    where = {"labeller": "labeller", "corpus": "corpus.txt", "out": "source"}
    run(data, "pseudo-label", **where, confidence=0, device="cpu")


FINE = b'{"text": "fine", "label": 2}\n'
CLUSTERED = b'{"text": "a", "label": 0, "cluster": 0}\n'
RESULT = b'{"task": "x", "method": "pt", "prompt": "p", "digest": "d", "data": "d", "shots": 4, '
RESULT += b'"seed": 1, "settings": {"model": "t5"}, "accuracy": 0.5}\n'
TREE, CSV, ARRAY = b"(3 (2 It) (4 works))\n", b'"1","fine"\n', np.zeros((3, 99), np.float32)
OPINION = b'[{"text": "fine", "opinions": [{"sentiment": "Positive"}]}]'
SENTENCE = b"<s><sentence><text>fine</text><Opinion polarity='%s'/></sentence></s>"
SENTENCE = b"<?xml version='1.0' encoding='utf-8'?>" + SENTENCE
GOOD = {  # file: its reader, and its content; None where another writer writes it
    "task.json": (Task.load, json.dumps(vars(SENTIMENT)).encode()),
    "flags.json": (
        read_flags,
        b'{"validation": 2, "batch_size": 1, "device": "cpu", "init": null}',
    ),
    "clusters.json": (read_source, b'{"method": "lda"}'),
    "source/blocks/settings.json": (read_blocks, None),
    "source/blocks/complete.json": (read_blocks, None),
    "source/blocks/000000.jsonl.gz": (read_blocks, None),
    "prompt/adapter_config.json": (read_prompt, None),
    "prompt/metapt.json": (read_prompt, None),
    "prompt/adapter_model.safetensors": (read_prompt, None),
    "run/checkpoint.safetensors": (read_checkpoint, checkpoint()),
    "t5/config.json": (read_t5, None),
    "t5/tokenizer.json": (read_t5, None),
    "t5/model.safetensors": (read_t5, None),
    "labeller/config.json": (read_labeller, None),
    "encoder/model.safetensors": (read_encoder, None),
    "embeddings.npy": (read_embeddings, lambda path: np.save(path, ARRAY)),
    "train.jsonl": (read_examples, FINE * 3),
    "clusters.jsonl": (read_source, CLUSTERED * 9),
    "results.jsonl": (finetune.read_results, RESULT * 3),
    "plain.txt": (read_examples, b"fine\n" * 3),
    "packed.jsonl.gz": (read_examples, packed("", FINE.decode() * 999)),
    "packed.txt.xz": (read_examples, packed("", "fine\n" * 999)),
    "sst5.txt": (read_dataset, TREE * 3),
    "sst2.txt": (read_dataset, TREE * 3),
    "sst2.tsv": (read_dataset, b"sentence\tlabel\n" + b"fine\t1\n" * 2),
    "amazon2.csv": (read_dataset, CSV * 3),
    "yelp5.csv.gz": (read_dataset, packed("", CSV.decode() * 999)),
    "amazon5.tar": (read_dataset, packed("train.csv", CSV.decode() * 999)),
    "amazon5.zip": (read_dataset, packed("train.csv", CSV.decode() * 999)),
    "sentihood.json": (read_dataset, OPINION),
    "semeval_laptop.xml": (read_dataset, SENTENCE % b"positive"),
    "corpus.txt": (read_corpus, b"".join(b"a fine film, number %d\n" % i for i in range(99))),
    "corpus.jsonl": (read_corpus, FINE * 3),
    "corpus.tar": (read_corpus, packed("a.txt", "fine\n" * 9999)),
}
OBJECTS = [name for name in GOOD if name.endswith(".json") and name != "t5/tokenizer.json"]
TEXTS = "train.jsonl results.jsonl plain.txt sst5.txt sst2.tsv amazon2.csv semeval_laptop.xml"
TEXTS = [*OBJECTS, *TEXTS.split(), "corpus.txt", "corpus.jsonl"]


@pytest.fixture(scope="module")
def good(tmp_path_factory, labeller, tokenizer):
    """A folder of every file that GOOD names, each as it should be."""
    folder, t5 = tmp_path_factory.mktemp("good"), make_t5(tokenizer)
    for name, (_, content) in GOOD.items():
        if content:
            put(folder / name, content)

    shutil.copytree(labeller, folder / "labeller")
    shutil.copytree(labeller, folder / "encoder")
    data.save_model(folder / "t5", t5, tokenizer)
    save_prompt(folder / "prompt", torch.zeros(3, 16), t5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "classify", lambda *args: ([i % 2 for i in range(99)], [1.0] * 99))
        read_blocks(None)

    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy of that folder for one test."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_taken(place, name):
    GOOD[name][0](place / name)


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith(("t5", "label"))])
def test_a_byte_order_mark_and_windows_line_ends_are_taken(place, name):
    content = (place / name).read_bytes()
    (place / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    GOOD[name][0](place / name)


class Malicious:
    """A pickle that creates a file when it is read."""

    def __reduce__(self):
        return open, ("created", "w")


def pickled(path):
    with open(path, "wb") as file:
        torch.save({"prompt_embeddings": Malicious()}, file)


def pickled_beside(path):
    """What stands in for a file of safetensors by transformers' and PEFT's names."""
    path.unlink()
    start = "adapter" if path.name.startswith("adapter") else "pytorch"
    pickled(path.with_name(f"{start}_model.bin"))


def mutated(mutate):
    return lambda path: path.write_bytes(mutate(path.read_bytes()))


def changed(change):
    """Changes some values of the object in a file, or of its last line."""

    def other(content):
        start = content.rfind(b"\n{") + 1
        known = json.loads(content[start:])
        return content[:start] + json.dumps({**known, **json.loads(change)}).encode()

    return mutated(other)


MUTATIONS = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: b"\xff" * len(content),
    "NUL": lambda content: b"fi\0ne %s" % content,
    "Latin-1": lambda content: b"%s caf\xe9" % content,
    "UTF-16": lambda content: content.decode().encode("utf-16"),
}
OF_TEXT = ("NUL", "Latin-1", "UTF-16")
HARMLESS = dict.fromkeys(OF_TEXT[:2], "corpus.txt corpus.jsonl")
HARMLESS["cut"] = "plain.txt corpus.txt corpus.jsonl"
HARMLESS["empty"] = "train.jsonl plain.txt results.jsonl packed.jsonl.gz 000000.jsonl.gz"
NO_OBJECT = [b"{", b"[]", b"null", b'"x"', b"3", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 9000]
NO_OBJECT += [b'{"a": "\\ud800"}', b"{'a': 1}", b'{"a": 1}{}', b'{"a": "\x01"}', b'"' * 3]
CHANGES = {  # of a good object's values
    "task.json": """{"name": 3} | {"name": "../up"} | {"template": null} | {"template": "{text}"} |
        {"template": "{mask"} | {"template": "{mask}"} | {"template": "{text} {mask} {mask}"} |
        {"template": "{} {mask}"} | {"template": "{text:.9} {mask}"} | {"words": "bad"} |
        {"template": "{text!r} {mask}"} | {"words": {"bad": 0, "good": 1}} | {"words": [1, 2]} |
        {"words": ["bad"]} | {"words": ["good", "good"]}""",
    "flags.json": """{"alpha": "x"} | {"alpha": [1, 2]} | {"alpha": true} | {"alpha": {}} |
        {"alpha": -1} | {"alpha": NaN} | {"alpha": Infinity} | {"seed": 1.5} | {"seed": -1} |
        {"seed": 1000000000000000000000000000000} | {"max_steps": Infinity} | {"method": "sgd"} |
        {"method": []} | {"dtype": "int8"} | {"nothing": 1} | {"init": "vocabulary"}""",
    "source/blocks/settings.json": '{"labeller": {}} | {"corpus": 3}',
    "prompt/adapter_config.json": '{"peft_type": "LORA"} | {"peft_type": []}',
    "t5/config.json": """{"model_type": []} | {"model_type": "none"} | {"model_type": "bert"} |
        {"d_model": "x"} | {"d_model": -1}""",
    "labeller/config.json": '{"model_type": "t5x"} | {"num_hidden_layers": 2}',
    "train.jsonl": """{"text": null} | {"text": " "} | {"text": "\\udc80"} | {"more": "\\ud800"} |
        {"label": true} | {"label": 1.0} | {"label": -1} | {"label": 5} | {"label": null} |
        {"label": [1]} | {"label": NaN} | {"label": 1e999} | {"label": "1"} | {"confidence": NaN} |
        {"confidence": -1} | {"confidence": "high"} | {"confidence": true} | {"cluster": "a"} |
        {"confidence": null} | {"cluster": 1.5} | {"cluster": []} | {"cluster": NaN}""",
    "results.jsonl": """{"accuracy": "0.5"} | {"accuracy": NaN} | {"accuracy": 2.0} | {"seed": []} |
        {"shots": "4"} | {"task": null} | {"method": ["pt"]} | {"prompt": {}} | {"settings": []} |
        {"settings": {}} | {"settings": {"model": 3}}""",
}
SECOND_LINES = {
    "train.jsonl": [],
    "results.jsonl": [],
    "sst5.txt": [b"(3 (2 It)", b"(7 (2 It) (2 is))", b"(3 )", b"(" * 10**6],
    "sst2.tsv": [b"a\t2", b"\t", b"", b"x" * 10**7],
    "amazon2.csv": [b'"1","open', b'"1","a" b', b'"3","x"', b'"1","a","b","c"', b"x" * 10**7],
}
WRONG_PROMPTS = [[0.0] * 16, [[[0.0] * 16]], [[0.0] * 15], [[math.nan] * 16], [[1] * 16]]
ITEMS = b'1 | {} | {"text": "a"} | {"text": 3, "opinions": []} | {"text": "a", "opinions": 3} | '
ITEMS += b'{"text": "a", "opinions": [3]} | {"text": "a", "opinions": [{"sentiment": []}]}'
MARKUP = [b"<a></b>", b"<a/>", b"<a>&no;</a>", b"<?xml version='1.0' encoding='cp932'?><a/>"]
WRONG = {
    "prompt/adapter_model.safetensors": [tensor_file(prompt_embeddings=p) for p in WRONG_PROMPTS]
    + [tensor_file(other=[[0.0]]), bytes(7) + b"\x40{}"],
    "run/checkpoint.safetensors": [checkpoint("prompt"), checkpoint(rows=2), checkpoint(run=[])]
    + [checkpoint(log=log) for log in (2, [], [3], [{"step": 0, "accuracy": "x"}])]
    + [checkpoint(step=step) for step in ("1", -1, None)],
    "t5/model.safetensors": [tensor_file({"format": "pt"}, **{"shared.weight": [[0.0]]})],
    "source/blocks/000000.jsonl.gz": [packed("", text) for text in ("{}", FINE.decode())],
    "clusters.jsonl": [CLUSTERED, CLUSTERED * 9 + FINE, FINE * 9],
    "sst2.txt": [b"(2 (2 only) (2 neutral))", lambda path: path.unlink()],
    "sst2.tsv": [b"sentence\tlabel\n", b"fine\t1\n"],
    "amazon2.csv": [b'"1",""\n', b'"6","x"\n'],
    "amazon5.tar": [packed(name, '"9","x"\n') for name in ("train.csv", "../train.csv", "a.csv")]
    + [packed("/train.csv", CSV.decode())],
    "amazon5.zip": [packed(name, CSV.decode()) for name in ("train.csv/", "a.csv", "/train.csv")],
    "sentihood.json": [b"[%s]" % item for item in ITEMS.split(b" | ")],
    "semeval_laptop.xml": [SENTENCE % b"odd", b"<a>" * 10**5 + b"</a>" * 10**5, *MARKUP],
    "corpus.tar": [packed("a.xz", text) for text in ("x", data.lzma.compress(bytes(99)))]
    + [packed("a.tar", bytes(99))],
    "corpus.jsonl": [b"[]\n" * 2000, b'{"text": 3}'],
    "embeddings.npy": [
        data.partial(np.save, arr=rows) for rows in (ARRAY[0], ARRAY[:2], ARRAY.astype(object))
    ],
}

BAD = []  # (file, what writes it anew, and where a line is to be named that)
for kind, mutate in MUTATIONS.items():
    names = TEXTS if kind in ("NUL", "Latin-1", "UTF-16") else GOOD
    harmless = HARMLESS.get(kind, "").split()
    BAD += [(name, mutated(mutate), "") for name in names if Path(name).name not in harmless]
for name in OBJECTS:
    BAD += [(name, content, "") for content in NO_OBJECT]
for name, lines in SECOND_LINES.items():
    first = GOOD[name][1].splitlines()[0]
    BAD += [(name, first + b"\n" + line + b"\n", ":2: ") for line in [*NO_OBJECT, *lines]]
for name in CHANGES:
    line = ":3: " if name in SECOND_LINES else ""
    BAD += [(name, changed(change), line) for change in CHANGES[name].split(" |")]
for name in GOOD:
    writers = {".safetensors": [pickled, pickled_beside], ".npy": [pickled]}
    BAD += [(name, write, "") for write in writers.get(Path(name).suffix, [])]
for name in WRONG:
    BAD += [(name, content, "") for content in WRONG[name]]


@pytest.mark.parametrize("name, content, line", BAD, ids=range(len(BAD)))
def test_a_bad_file_ends_in_one_line(place, capsys, name, content, line):
    path = put(place / name, content)
    before = sorted(place.rglob("*"))
    message = ends_in_one_line(lambda: GOOD[name][0](path), capsys)
    assert name + line in message or f"{Path(name).parent}:" in message
    assert sorted(place.rglob("*")) == before


OUT = "--source {demo}/source/clustered.jsonl --model {demo}/t5 --out "
BOOKS = "--task {demo}/books --model {demo}/t5 "
KS = "--source {demo}/pt.json --k 3 4 "
BAD_FLAGS = [
    (train_meta, OUT + "x --device gpu", "--device gpu: .*; give cpu or cuda"),
    (train_meta, OUT + "{demo}/maml.json", "maml.json: File exists; check the path"),
    (train_meta, OUT + "/proc/x", "/proc/x: No such file or directory; check the path"),
    (train_meta, "--source {demo} --out x", "is a folder; give a file"),
    (train_meta, "--source {demo}/source/examples.jsonl --out x", "no clusters, or not"),
    (train_meta, "--sources x", "the following arguments are required: --source"),
    (finetune, "--task nothing", "--task: nothing: no such folder; data.py makes tasks"),
    (finetune, "--task {demo}/pt.json", "--task: .*pt.json is a file; give its folder"),
    (finetune, BOOKS + "--prompt {demo}/t5", "t5/adapter_config.json: No such file or dir"),
    (finetune, "--task {demo}/books --model {demo}", "demo: .*give a T5 by hub name"),
    (
        finetune,
        BOOKS + "--out {demo}/books/task.json/r.jsonl",
        "task.json: File exists; check the path",
    ),
    (finetune, BOOKS + "--method ft --save tuned", "--save keeps tuned prompts, and full"),
    (finetune, BOOKS + "--method ft --dtype bfloat16", "--dtype bfloat16 is for a frozen"),
    (finetune, BOOKS + "--search", "--search is full tuning's; add --method ft"),
    (finetune, BOOKS + "--shots 2000", "train.jsonl: 2000 . 2000 .*from 1000; lower --shots"),
    (finetune, "--predict {demo}/pt.json", "--predict needs --prompt FOLDER"),
    (finetune, "", "--task FOLDER is needed"),
    (cluster, KS + "--seed 2147483648", "is not a whole number from 0 to 2147483647"),
    (cluster, KS + "--out x.jsonl", "--out and --method label go with one --k"),
    (cluster, "--source {demo}/pt.json --out task.jsonl", "must end in .jsonl; its arg"),
    (cluster, "--source {demo}/pt.json --figure x.txt", "x.txt must end in .png, .pdf or"),
    (data, "convert sst5 --input {demo} --out x", "no training file here"),
]


@pytest.mark.parametrize("script, flags, message", BAD_FLAGS)
def test_a_bad_flag_ends_in_one_line(world, tmp_path, capsys, monkeypatch, script, flags, message):
    monkeypatch.chdir(tmp_path)
    words = flags.format(demo=world).split()
    assert re.search(message, ends_in_one_line(lambda: script.main(words), capsys))
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_taken_for_a_word_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    start = data.existing("folder", "random")
    assert start("random") == "random" and start("./random") == str(tmp_path / "random")


def test_a_missing_field_shows_the_form_that_the_template_takes(tmp_path):
    put(tmp_path / "a.jsonl", FINE)
    task = Task("x", "{review} It was {mask}", data.WORDS[2])
    with pytest.raises(InputError, match=r'a.jsonl:1: .*as {"review": "...", "label": 0}'):
        list(data.read_examples(tmp_path / "a.jsonl", task))


WRONG_PIECES = [
    ("'' is not one piece", {"words": ["", "good"]}),
    ("'Good' is the same piece as another word", {"words": ["Good", "good"]}),  # no capitals
    ("'badish' is not one piece .*; 'goodish' is not", {"words": ["badish", "goodish"]}),
    ("more pieces than the model knows", {"size": 99}),
    ("has no <extra_id_0>", {"sentinels": []}),
    ("no <pad>", {"pad": None}),
]


@pytest.mark.parametrize("message, change", WRONG_PIECES)
def test_a_wrong_tokenizer_or_word_is_refused(monkeypatch, message, change):
    right = {"words": ["bad", "good"], "size": 300, "sentinels": SENTINELS, "pad": "<pad>"}
    wrong = {**right, **change}
    monkeypatch.setitem(globals(), "SENTINELS", wrong["sentinels"])
    tokenizer = make_tokenizer()
    tokenizer.pad_token = wrong["pad"]
    t5 = make_t5(tokenizer, vocab_size=wrong["size"])
    with pytest.raises(InputError, match=message):
        PromptedT5(t5, tokenizer, Task("x", data.TEMPLATE, wrong["words"]))


def test_an_archive_cannot_name_files_outside_it(tmp_path):
    outside = put(tmp_path / "train.csv", b'"1","secret"\n')
    corpus = pack(tmp_path / "c.tar", {"../up.txt": "a", "/abs.txt": "b", str(outside): "no text"})
    before = sorted(tmp_path.rglob("*"))
    assert read_corpus(corpus) == ["a", "b", None] and sorted(tmp_path.rglob("*")) == before
    for name in ("tar", "zip"):
        files = {str(outside): '"1","x"\n', "../train.csv": '"2","inside"\n'}
        data.convert("amazon2", pack(tmp_path / f"a.{name}", files), tmp_path / name)
        (example,) = read_lines(tmp_path / name / "train.jsonl")
        assert example["text"] == "inside"


def test_a_stream_that_has_no_such_letter_loses_no_work(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    data.run(lambda: print("± \U0001f600"))
    assert narrow.buffer.getvalue().startswith(b"\xb1 ?")


SCRIPTS = ["data.py", "cluster.py", "train_meta.py", "finetune.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_waits_for_no_import(script):
    before = os.times()
    argv = [sys.executable, "-X", "importtime", HOUSE / script, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    spent = os.times().children_user - before.children_user
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and spent < 1
    assert not re.search(r"\| +(torch|transformers|metapt)$", done.stderr, re.M)


def beside_a_folder(place, code):
    """What bash gives for a program beside our data.py and a folder without Python files."""
    for script in ("data.py", "metapt.py"):
        shutil.copy(HOUSE / script, place)
    (place / "nothing_of_that_name").mkdir()
    put(place / "finetune.py", code.encode())
    pipe = f"{sys.executable} finetune.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], cwd=place, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.split()


def test_another_program_may_import_our_data(tmp_path):
    """Its --help has PyTorch, a folder beside it is a package; who reads it may have enough."""
    code = "HELP = 'usage'\nimport data, nothing_of_that_name\n"
    code += "data.run(lambda: print(data.torch.__name__, 'more\\n' * 10**6))"
    assert beside_a_folder(tmp_path, code) == ["torch", "more", "1"]


def test_a_folder_beside_our_scripts_stands_in_for_no_library(tmp_path):
    code = "HELP = True\nimport importlib.util, data\n"
    code += "print(importlib.util.find_spec('nothing_of_that_name'))"
    assert beside_a_folder(tmp_path, code) == ["None", "0"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, script):
    words = ["convert", "sst5", "--input", str(tmp_path), "--out", str(tmp_path / "task")]
    words = words if script == "data.py" else ["--config", "none.json"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HOUSE / script), run_name="__main__")
    found = capsys.readouterr().err
    assert found.startswith(f"{script}: ") and found.count("\n") == 1


# ------------------------------------------------------------ The README: what it shows, runs

README = (HOUSE / "README.md").read_text(encoding="utf-8")
PAGES = [HOUSE / name / "README.md" for name in (".", "figures", "offline")]
PAGES = {page: page.read_text(encoding="utf-8") for page in PAGES if page.exists()}
SMALL = {  # flags behind the pages' own, so that the commands take no time
    "data.py convert": "",
    "data.py labeller": "--max-epochs 1 --batch-size 99 --warmup 1 --validation 4 --max-length 48",
    "data.py pseudo-label": "",
    "cluster.py": "--device cpu --encoder demo/t5",
    "train_meta.py": "--max-steps 1 --eval-every 1 --batch-size 1 --validation 10 --prompt-length 2",
    "finetune.py": "--seeds 1 --max-epochs 1 --max-test 8 --prompt-length 2",
}
EXCHANGED = {  # patterns in the pages' commands
    r"for seed in [\d ]+": "for seed in 1",
    r"for n in [\d ]+": "for n in 150 160",
    r"--method \$m --out": "--method $m --k 2 --out",
    r"(for k in|--k)( \d+){2,}": r"\1 2 3",
    r"(--shots)( \d+)+": r"\1 4",
    r"\{sst5,sst2,\S+\}": "sst5",
    r"-\{1,2(,3)?\}": "-1",
    r"--model (t5|google-t5/t5-large) ": "--model demo/t5 ",
    r"NAME --input FILE --out tasks/NAME": "sst5 --input trainDevTestTrees_PTB.zip --out tasks/sst5",
}


def shell_pieces():
    """Everything in the pages that is to be typed into a shell, from top to bottom."""
    commands = r"^```bash\n(.*?)^```|`((?:for |python |torchrun |[\w/]+\.py )[^`]* --[^`]*)`"
    for block, inline in re.findall(commands, "".join(PAGES.values()), re.M | re.S):
        text = block or re.sub(r"^([\w/]+\.py)", r"python \1", inline)
        for pattern, ours in EXCHANGED.items():
            text = re.sub(pattern, ours, text)
        yield text


def taken_apart(text):
    """The commands of our scripts in a piece of shell, as bash expands it: lists of words."""
    stand_ins = """
        pip() { :; }
        torchrun() { shift 2; python "$@"; }
        python() { printf '%s\\n' "$@" END; }
    """
    shell = ["bash", "-euc", stand_ins + text]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    return [words.splitlines() for words in done.stdout.split("END\n")[:-1]]


def help_of(script, *words):
    """What a script, or one of its commands, prints for --help."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(sys, "argv", [script, *words, "--help"])
        patch.setattr(sys, "stdout", shown)
        runpy.run_path(str(HOUSE / script), run_name="__main__")
    return shown.getvalue()


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.fixture
def readers_folder(world, labeller, tmp_path, monkeypatch):
    """A folder as the README's reader has it, with the official files, and a hub that holds the
    tiny models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world, tmp_path / "demo")
    learn(world, tmp_path / "demo" / "maml", max_steps=0)
    reviews = make_examples(100)
    lines = "".join(f'"{review["label"] + 1}","{review["text"]}"\n' for review in reviews)
    pack(Path("yelp_review_full_csv.tgz"), {"train.csv": lines, "test.csv": lines})
    trees = "".join(f"({review['label']} (2 {review['text']}))\n" for review in reviews)
    trees = {f"trees/{split}.txt": trees for split in ("train", "dev", "test")}
    pack(Path("trainDevTestTrees_PTB.zip"), trees)
    web = [review["text"] for review in make_examples(3000, 1)]
    files = {f"{i}.txt": "\n".join(web[i::40]) for i in range(40)}
    packed = data.lzma.compress(pack(Path("web.tar"), files).read_bytes())
    Path("openwebtext.tar.xz").write_bytes(packed)
    data.write_lines("open.jsonl", make_examples(300))
    for name in "yelp5 sst5 sst2 sentihood semeval_restaurant amazon5".split():
        task = Task(name, SENTIMENT.template, SENTIMENT.words)
        data.write_task(Path("tasks", name), task, {"train": reviews, "test": reviews[:20]})
    data.write_task(Path("mine"), SENTIMENT, {"train": reviews})

    def in_turn(model, tokenize, texts, batch_size):
        return [i % 5 for i in range(len(texts))], [1] * len(texts)

    even = lambda rows, k, seed: (cluster.random_clusters(len(rows), k, seed), np.zeros(len(rows)))
    monkeypatch.setattr(data, "classify", in_turn)
    monkeypatch.setattr(cluster, "kmeans", even)
    monkeypatch.setattr(cluster, "lda", data.partial(cluster.lda, updates=5))
    monkeypatch.setattr(data, "MODEL", "demo/t5")
    monkeypatch.setattr(train_meta, "ALPHAS", [0.08])
    monkeypatch.setattr(train_meta, "BETAS", [0.025])
    roberta = f" --model {labeller.parent / 'roberta'}"
    monkeypatch.setitem(SMALL, "data.py labeller", SMALL["data.py labeller"] + roberta)


def test_every_command_of_the_pages_runs(readers_folder):
    ran = []
    for piece in shell_pieces():
        for script, *words in taken_apart(piece):
            kind = f"data.py {words[0]}" if script == "data.py" else script
            if script in SCRIPTS and words:
                small = "" if "--predict" in words else SMALL[kind]
                sys.modules[Path(script).stem].main([*words, *small.split()])
                ran.append(kind)
            elif script not in ("-m", *SCRIPTS):  # run by the tests of its folder
                assert flags_in(" ".join(words)) <= flags_in(help_of(script)), script

    assert set(SMALL) == set(ran) and len(ran) > 20


def test_the_snippets_of_the_readme_run(readers_folder, capsys):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(snippet.replace("max_epochs=100", "max_epochs=2"), {})
    shown = re.search(r"^print.*  # (.*)", snippet, re.M)[1]
    assert re.sub(r"[\d.]+", "#", shown) in re.sub(r"[\d.]+", "#", capsys.readouterr().out)
    (tasks,) = re.findall(r"^```json\n(.*?)^```", README, re.M | re.S)
    assert all(Task(**json.loads(line)).fields for line in tasks.splitlines())


def test_every_flag_and_name_in_the_pages_is_there():
    known = set()
    for page in PAGES:
        for name in set(re.findall(r"[\w/]+\.py", PAGES[page])) - {"metapt.py"}:
            beside = [place for place in (HOUSE, page.parent) if (place / name).exists()]
            known |= flags_in(help_of((beside[0] / name).relative_to(HOUSE)))
    for kind in ("convert", "labeller", "pseudo-label"):
        known |= flags_in(help_of("data.py", kind))
    known |= {"--nproc", "--no-deps", "--no-binary"}  # torchrun's, pip's
    assert not flags_in("".join(PAGES.values())) - known


def test_the_map_names_functions_that_name_the_paper():
    rows = README.split("## The map")[1].split("\n## ")[0].split("\n|")[3:]
    checked = 0
    for row in rows:
        paper, code = row.split("|")[:2]
        for short, long in {"§": "Section ", "Eq.": "Equation", "App.": "Appendix"}.items():
            paper = paper.replace(short, long)
        places = re.findall(r"(?:Section|Equation|Table|Figure|Appendix) [\w.]+|[ABC]\.\d", paper)
        for script, name in re.findall(r"`(?:([\w/]+\.py): )?([\w.]+)`", code):
            if script:
                module = runpy.run_path(str(HOUSE / script))
            first, *parts = name.split(".")
            value = functools.reduce(getattr, parts, module[first])
            if callable(value) and places:
                assert any(place in value.__doc__ for place in places), name
                checked += 1
    assert checked > 30
