"""
The sanity checks, on a tiny T5 made here; nothing is downloaded. In the paper's order:

    Section 3          the task as text, the T5 that reads [P; H(x)], the words and ids of H(x)
    Equations 1 and 2  against finite differences, torch.func, the textbook loop
    Appendix A         the best of validations, patience
    Files              prompts, PEFT's, models, what a stored thing was made of
    data.py            the few-shot split, readers, pseudo-labels
    cluster.py         embeddings, meta-tasks
    train_meta.py      a step by hand; runs that are stopped, killed, continued, shared
    finetune.py        a tuning by hand; results, predictions
    Bad input          files and flags: one line, and nothing left behind
    The README         every snippet, flag and name in it

    python -m pytest -q
"""

import copy
import functools
import gzip
import io
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

HOUSE = Path(__file__).parent
sys.path.append(str(HOUSE / "offline"))

import cluster
import data
import demo
import finetune
import metapt
import script
import train_meta
from metapt import NEW_WORD, Diverged, InputError, PromptedT5, Task, adapt, load_prompt
from metapt import meta_gradient, save_prompt, textbook_meta_gradient

torch.set_num_threads(1)  # which is faster where all is tiny

SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])
TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# ------------------------------------------------------------ A tiny T5, its tokenizer, its examples


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of T5's kind, to which every word of the demo is one piece, and others are not:
    "plotish" has two, and " ." is another piece than the "." that touches a word."""
    texts = [" ".join(data.WORDS[5]), "It was yes maybe no a b c"]
    for domain in demo.DOMAINS:
        texts += [review["text"] for review in demo.write_reviews(domain, 200, random.Random(0))]
    words = sorted(set(" ".join(texts).split()) | {"."})
    pieces = ["<pad>", "</s>", "<unk>", NEW_WORD, *(NEW_WORD + word for word in words)]
    pieces += [".", "?", "!", ",", "<", "_", "ish", "plot", "a"]

    # Fewer pieces are more probable than many.
    scored = [(piece, -1 - len(piece) / 100) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(20)] + ["<sep>"],
    )


def make_t5(tokenizer, **changes):
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**ids, **TINY, **changes}))


def make_examples(count, seed=0, domain="films"):
    return demo.write_reviews(domain, count, random.Random(seed))


def plain(model):
    """The model over a copy of its T5, as transformers has it, cross-attention included."""
    t5 = type(model.t5)(model.t5.config).to(model.t5.dtype)
    t5.load_state_dict(model.t5.state_dict())
    return PromptedT5(t5, model.tokenizer, model.task, model.max_length, faster=False)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def layer_norm(self, x):
    """T5's layer norm, which transformers has square in float32 even where the model is float64."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(params=["T5", "T5 v1.1"])
def model(request, monkeypatch, tokenizer):
    monkeypatch.setattr(T5LayerNorm, "forward", layer_norm)  # float64 throughout
    t5 = make_t5(tokenizer, **(V1_1 if request.param == "T5 v1.1" else {})).double()
    with torch.no_grad():  # large enough weights that the second derivative is no small thing
        for parameter in t5.parameters():
            parameter.mul_(1.5)
    return PromptedT5(t5, tokenizer, SENTIMENT, max_length=32)


@pytest.fixture
def meta(model):
    """The arguments of meta_gradient: supports and queries are of unequal sizes and lengths."""
    supports, queries = [], []
    for i, (m, n, domain) in enumerate(zip((3, 2, 4), (4, 2, 1), demo.DOMAINS)):
        supports.append(model.encode(make_examples(m, i, domain)))
        queries.append(model.encode(make_examples(n, 9 + i, domain)))
    return model, model.init_prompt(3).double(), supports, queries, 0.5


# ------------------------------------------------------------------------- The scripts, and files


def run(script, *positional, **flags):
    """Runs a script's main in this process: run(finetune, task=[...], seeds=[1], out=path)."""
    script.main(words_of(*positional, **flags))


def words_of(*positional, **flags):
    """The words of a command line."""
    return [*map(str, positional), *script.flags_of(flags)]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(path, content):
    """Writes a file of this text or of these bytes, packed where it ends in .gz or .xz."""
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(content.encode() if isinstance(content, str) else content))
    return path


def put_tar(path, files):
    """Writes {name: text or bytes} as a tar."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def learn(world, out, method="maml", **flags):
    """A short run of train_meta.py on the demo; returns the prompt."""
    config = world / ("ppt.json" if method == "ppt" else "maml.json")
    short = {"prompt_length": 3, "validation": 40, "max_steps": 6, "eval_every": 2, "batch_size": 2}
    run(train_meta, config=config, out=out, method=method, **{**short, **flags})
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


def few(world, folder, kind="pt", **flags):
    """Runs finetune.py for an epoch on one task from a random prompt, or with other flags; returns
    the lines of results."""
    short = {"max_epochs": 1, "max_test": 50, "shots": 8, "prompt_length": 3}
    short |= {"task": world / "books", "prompt": "random", "seeds": 1}
    out = folder / "r.jsonl"
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
    config = RobertaConfig(pad_token_id=0, **sizes)
    RobertaForMaskedLM(config).save_pretrained(folder / "roberta")
    tokenizer.save_pretrained(folder / "roberta")

    places = {"task": folder / "task", "model": folder / "roberta", "out": folder / "labeller"}
    rates = {"learning_rate": 0.005, "warmup": 5, "validation": 60, "max_epochs": 16}
    run(data, "labeller", **places, **rates, eval_every=50, threads=1, device="cpu")
    return folder / "labeller"


@pytest.fixture
def at_call(monkeypatch):
    """at_call(module, name, n, act) has act() called before the n-th call of a function, as a
    Ctrl-C may come there; returns the list of its calls' arguments."""

    def arrange(module, name, n, act):
        original = getattr(module, name)
        calls = []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == n:
                act()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        return calls

    return arrange


# ----------------------------------------------------------- Section 3: the T5 that reads [P; H(x)]


@pytest.mark.parametrize("ids", [[5, 9, 4], []])  # without a prompt it is the T5 itself
def test_prompt_of_embedding_rows_is_text_in_front(model, ids):
    examples = make_examples(3)  # of unequal lengths, so that padding shows
    batch = model.encode(examples)
    ids = torch.tensor(ids, dtype=torch.long)
    prompt = model.t5.get_input_embeddings()(ids).detach()
    t5 = plain(model).t5
    for row, example in enumerate(examples):
        text = torch.cat([ids, model.encode([example])["input_ids"][0]])[None]
        expected = t5(input_ids=text, decoder_input_ids=model.decoder_ids).logits[0, 1]
        torch.testing.assert_close(model(prompt, batch)[row], expected)


def test_the_t5_is_frozen_and_every_weight_stays_as_it_was(tokenizer):
    model = PromptedT5(make_t5(tokenizer).train(), tokenizer, SENTIMENT)
    before = copy.deepcopy(model.t5.state_dict())
    prompt = model.init_prompt(3)
    examples = make_examples(8)
    support = model.encode(examples)
    meta_gradient(model, prompt, [support], [support], 0.1)
    tuned, _ = finetune.tune(model, prompt, examples, examples, 0.1, 4, max_epochs=2, patience=6)
    model.loss(tuned.requires_grad_(), support).backward()
    assert not torch.equal(prompt, tuned) and tuned.grad.any()
    assert all(torch.equal(value, before[name]) for name, value in model.t5.state_dict().items())
    assert all(weight.grad is None for weight in model.t5.parameters())


def test_dropout_is_off_and_in_full_tuning_that_of_a_plain_t5(tokenizer):
    model = PromptedT5(make_t5(tokenizer, dropout_rate=0.5).train(), tokenizer, SENTIMENT)
    batch = model.encode(make_examples(4))
    still = model(model.no_prompt(), batch)
    assert torch.equal(still, model(model.no_prompt(), batch))
    logits = []
    for module in (model, plain(model)):
        torch.manual_seed(0)
        logits.append(module.train()(model.no_prompt(), batch))
    torch.testing.assert_close(*logits)
    assert not torch.equal(logits[0], still)


def test_a_t5_is_changed_only_to_be_faster_and_generates_as_before(model, tokenizer):
    attention = lambda model: type(model.t5.decoder.block[0].layer[1].EncDecAttention)
    slow = plain(model)
    assert attention(model) is metapt.CrossAttention and attention(slow) is T5Attention
    batch = model.encode(make_examples(3))
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(*(m.t5.generate(**ids, max_new_tokens=6) for m in (model, slow)))

    t5 = make_t5(tokenizer)  # an adapter in it is not passed by
    t5.decoder.block[0].layer[1].EncDecAttention.v = type("LoRA", (torch.nn.Linear,), {})(16, 16)
    assert attention(PromptedT5(t5, tokenizer, SENTIMENT)) is T5Attention


def test_a_random_prompt_is_of_its_seed_and_of_the_embedding_table(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    table = model.t5.get_input_embeddings().weight
    first, again, second = (model.init_prompt(500, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)
    same = (first[:, None] == table).all(-1)
    assert same.any(1).all() and not same[:, tokenizer.all_special_ids].any()


def test_loss_predict_and_evaluate_agree_with_their_definitions(model):
    prompt = model.init_prompt(4).double()
    examples = make_examples(7)
    batch = model.encode(examples)
    logits = model(prompt, batch)
    words = model.tokenizer.convert_tokens_to_ids([NEW_WORD + word for word in SENTIMENT.words])
    chosen = [words[label] for label in batch["labels"]]
    losses = -logits.log_softmax(-1)[range(7), chosen]  # over the whole vocabulary
    torch.testing.assert_close(model.loss(prompt, batch), losses.mean())
    torch.testing.assert_close(model.loss(prompt, batch, reduction="none"), losses)

    shares = logits[:, words].softmax(-1)  # among the task's words
    torch.testing.assert_close(model.probabilities(prompt, batch), shares)
    predicted = shares.argmax(-1).tolist()
    assert model.predict(prompt, batch).tolist() == predicted

    confusion = np.zeros((5, 5), dtype=int)
    np.add.at(confusion, (batch["labels"], predicted), 1)
    assert model.evaluate(prompt, model.batches(examples, 4)) == {
        "accuracy": confusion.trace() / 7,
        "loss": pytest.approx(losses.mean().item()),
        "in_words": pytest.approx(np.isin(logits.argmax(-1), words).mean()),
        "confusion": confusion.tolist(),
    }


def test_labels_that_are_none(tokenizer):
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    good = {"text": "a", "label": 0}
    with pytest.raises(InputError, match=r"labels \[0, 5\] are not all indices"):
        model.encode([good, {"text": "b", "label": 5}])
    with pytest.raises(InputError, match="has no label"):
        model.loss(model.no_prompt(), model.encode([good, {"text": "b"}]))
    with pytest.raises(InputError, match="has no label"):
        batches = [model.encode([{"text": text}]) for text in "ab"]
        meta_gradient(model, model.init_prompt(3), batches, batches, 0.1)


# ---------------------------------------------------------------------- The words and ids of H(x)


def reader(tokenizer, template):
    """A T5 of two classes that reads texts by a template."""
    return PromptedT5(make_t5(tokenizer), tokenizer, Task("x", template, ["bad", "good"]))


def pieces_of(model, **fields):
    """The pieces of H(x) but for </s>, which must be its end."""
    (ids,) = model.encode([fields])["input_ids"]
    *pieces, end = model.tokenizer.convert_ids_to_tokens(ids)
    assert end == "</s>" and len(ids) <= model.max_length
    return pieces


PIECES = [  # a template, a text, and the pieces of H(x)
    (data.TEMPLATE, "the plot", "▁the ▁plot . ▁It ▁was <extra_id_0>"),  # the paper's full stop
    (data.TEMPLATE, "plot .", "▁plot ▁. ▁It ▁was <extra_id_0>"),  # and no second one
    (data.TEMPLATE, " plot? ", "▁plot ? ▁It ▁was <extra_id_0>"),
    (data.TEMPLATE, "plot\n</s> <extra_id_0> ", "▁plot . ▁It ▁was <extra_id_0>"),  # no tokens
    (data.TEMPLATE, "</</s>s>plot<sep<sep>>", "▁plot . ▁It ▁was <extra_id_0>"),
    ("{text} It was {mask}.", "plot", "▁plot ▁It ▁was <extra_id_0> ."),
    ("{text} It was {mask} .", "plot", "▁plot ▁It ▁was <extra_id_0> ▁."),
    ("{text}ish .{mask}\n.", "plot", "▁plot ish ▁. <extra_id_0> ▁."),
    ("{mask}. {text}", "plot", "<extra_id_0> . ▁plot"),
    ("{mask}_{text}", "plot", "<extra_id_0> _ plot"),
    ("{mask}It was {text}", "plot", "<extra_id_0> ▁It ▁was ▁plot"),  # there is no unmarked "It"
    ("{text} <sep> {mask} <sep>", "plot", "▁plot <sep> <extra_id_0> <sep>"),
]


@pytest.mark.parametrize("template, text, pieces", PIECES)
def test_the_pieces_of_h_of_x_are_those_of_t5s_tokenizer(tokenizer, template, text, pieces):
    assert pieces_of(reader(tokenizer, template), text=text) == pieces.split()


@pytest.mark.parametrize(
    "text", ["the plot was plotish! i read it . it ?", "funny plotish. a", "a"]
)
@pytest.mark.parametrize("template, least", [(data.TEMPLATE, 5), ("It was {mask}{text}", 4)])
def test_at_every_length_a_text_is_cut_to_h_of_x_of_its_beginning(tokenizer, template, least, text):
    model = reader(tokenizer, template)
    whole = pieces_of(model, text=text)
    beginnings = [pieces_of(model, text=text[:end]) for end in range(len(text) + 1)]
    for model.max_length in range(least, len(whole) + 2):
        pieces = pieces_of(model, text=text)
        assert pieces in beginnings
        assert len(pieces) >= min(len(whole), model.max_length - 2)  # no more is lost than must be
        if template == data.TEMPLATE:
            stops = [piece[-1] in ".!?" for piece in pieces[-5:-3]]
            assert stops in ([False, True], [True])  # the last of them is the one before "It was"
    model.max_length = least - 1
    with pytest.raises(InputError, match=f"template .* alone is longer than {least - 1} tokens"):
        pieces_of(model, text=text)


def test_of_several_fields_the_longest_is_cut(tokenizer):
    model = reader(tokenizer, "{a}? {mask}. {b}")
    assert pieces_of(model, a="a b", b="b c") == "▁a ▁b ? <extra_id_0> . ▁b ▁c".split()
    model.max_length = 9
    pieces = pieces_of(model, a="plot " * 9, b="music bad")
    assert pieces == "▁plot ▁plot ▁plot ? <extra_id_0> . ▁music ▁bad".split()


def test_words_and_tokenizers_that_do_not_fit_are_refused(tokenizer):
    for words, pieces in {
        ("plotish", "good"): "'▁plot', 'ish'",
        ("good", " good"): "'▁good'",
    }.items():
        task = Task("x", "{text} {mask}", list(words))
        message = rf"task x: '{words[0]}' is not one piece of its own .*\[{pieces}\]"
        with pytest.raises(InputError, match=message):
            PromptedT5(make_t5(tokenizer), tokenizer, task)
    other = copy.deepcopy(tokenizer)
    words = {piece.lstrip(NEW_WORD): i for piece, i in tokenizer.get_vocab().items()}
    other.backend_tokenizer.model = models.WordLevel(words, unk_token="<unk>")
    for vocab_size, wrong in {len(tokenizer): other, len(tokenizer) - 1: tokenizer}.items():
        with pytest.raises(
            InputError, match="no sentencepiece Unigram .* or larger than the model"
        ):
            PromptedT5(make_t5(tokenizer, vocab_size=vocab_size), wrong, SENTIMENT)


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
    for _ in range(4):  # in random directions, where no wrong coordinate can hide
        change = 1e-6 * torch.randn_like(prompt)
        error = (gradient * change).sum() - (value(prompt + change) - value(prompt - change)) / 2
        assert abs(error) < 1e-7 * gradient.norm() * change.norm()


@pytest.mark.parametrize("definition", [textbook_meta_gradient, functional])
@pytest.mark.parametrize("tasks_per_pass, attention", [(1, "sdpa"), (2, "eager"), (4, "sdpa")])
@pytest.mark.parametrize("chunk_size", [1, 2**19])  # one example in a forward pass, and all
def test_meta_gradient_against_its_definitions(
    meta, definition, tasks_per_pass, attention, chunk_size, monkeypatch
):
    model, *rest = meta
    expected, expected_loss = definition(plain(model), *rest)
    model.t5.set_attn_implementation(attention)
    monkeypatch.setattr(metapt, "CHUNK_SIZE", {"cpu": chunk_size})
    gradient, loss = meta_gradient(model, *rest, tasks_per_pass=tasks_per_pass)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)


def test_first_order_drops_the_hessian_and_nothing_else(meta):
    model, prompt, supports, queries, alpha = meta
    second, loss = meta_gradient(*meta)
    first, first_loss = meta_gradient(*meta, first_order=True)
    expected = torch.zeros_like(prompt)
    for support, query in zip(supports, queries):  # the query's gradient at P'_i, as if it were P
        adapted = adapt(model, prompt, support, alpha).detach()
        expected += torch.func.grad(model.loss)(adapted, query)
    assert relative_error(first, expected) < 1e-10
    torch.testing.assert_close(loss, first_loss)
    assert relative_error(first, second) > 1e-3


def test_no_inner_step_and_no_tasks(meta):
    model, prompt, supports, queries, _ = meta
    for first_order in (False, True):
        gradient, _ = meta_gradient(model, prompt, supports, queries, 0.0, first_order)
        expected = sum(torch.func.grad(model.loss)(prompt, query) for query in queries)
        torch.testing.assert_close(gradient, expected)
    gradient, _ = meta_gradient(model, prompt, [], [], 0.5)  # as where processes are too many
    assert torch.equal(gradient, torch.zeros_like(prompt))


# --------------------------------------------------- Appendix A: the best of validations, patience


def test_the_best_validation_is_of_accuracy_then_of_loss_then_the_earlier():
    for best, pairs in [
        (0, [(0.6, 1.0), (0.5, 0.1)]),
        (1, [(0.6, 1.0), (0.6, 0.9), (0.6, 0.9)]),
        (1, [(0.375, 1.0), (0.37499999999999994, 0.9)]),  # a tie but for rounding
    ]:
        assert metapt.best_of([{"accuracy": a, "loss": loss} for a, loss in pairs]) == best


def test_patience_counts_from_the_best_validation_or_a_later_one():
    scores = [{"accuracy": a, "loss": 1.0} for a in (0.5, 0.6, 0.4, 0.6, 0.3)]
    assert [metapt.out_of_patience(scores[:n], 2) for n in (3, 4)] == [False, True]
    assert [metapt.out_of_patience(scores[:n], 2, first=2) for n in (4, 5)] == [False, True]


# ------------------------------------------------------------------- Files: prompts, PEFT's, models


def test_a_prompt_comes_back_and_only_with_its_own_facts(tmp_path, tokenizer):
    prompts = {"one": torch.zeros(4, 16), "other": torch.randn(4, 16)}
    for name, prompt in prompts.items():
        save_prompt(tmp_path / name, prompt, make_t5(tokenizer), method=name)
        loaded, facts = load_prompt(tmp_path / name, width=16)
        assert torch.equal(loaded, prompt) and facts["method"] == name
    with pytest.raises(InputError, match="width 16 .* needs 32"):
        load_prompt(tmp_path / "one", width=32)

    weights = "adapter_model.safetensors"
    shutil.copy(tmp_path / "other" / weights, tmp_path / "one" / weights)
    with pytest.raises(
        InputError, match="one: its metapt.json is of other weights.* remove metapt"
    ):
        load_prompt(tmp_path / "one")
    (tmp_path / "one" / "metapt.json").unlink()  # as PEFT leaves it out
    loaded, facts = load_prompt(tmp_path / "one")
    assert torch.equal(loaded, prompts["other"]) and "method" not in facts


def test_peft_reads_our_prompt_with_the_same_logits_and_we_its(tmp_path, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    prompt = model.init_prompt(5)
    batch = model.encode(make_examples(3))
    save_prompt(tmp_path / "ours", prompt, model.t5)
    theirs = peft.PeftModel.from_pretrained(make_t5(tokenizer), tmp_path / "ours").eval()
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids["decoder_input_ids"] = model.decoder_ids.repeat(3, 1)
    logits = theirs(**ids).logits[:, 1]
    torch.testing.assert_close(model(prompt, batch), logits, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_prompt(tmp_path / "theirs", width=16)[0], prompt)


def test_a_file_is_written_whole_or_not_at_all_and_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "file.json"
    link.symlink_to(tmp_path / "disk" / "shared.json")
    metapt.write_json(link, {"a": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="file.json: cannot be written: No space left on device"):
        metapt.write_atomically(link, fail)
    (file,) = (tmp_path / "disk").iterdir()
    assert link.is_symlink() and metapt.read_json(file) == {"a": 1}


def test_a_models_contents_are_its_files_without_our_notes(tmp_path):
    weights = put(tmp_path / "t5" / "1" / "more.bin", b"1")
    before = script.contents(tmp_path / "t5")
    for note in ("log.jsonl", "arguments.json", ".cache"):
        put(tmp_path / "t5" / note, b"a note beside it")
    assert script.contents(tmp_path / "t5") == before
    times = weights.stat()
    put(weights, b"2")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an archive would
    assert script.contents(tmp_path / "t5") != before


# ------------------------------------------------------- data.py: the few-shot split, and examples


def test_few_shot_splits_are_disjoint_of_their_seed_and_may_be_balanced():
    labels = np.array([0] * 12 + [1] * 90 + [2] * 8 + [3] * 30 + [4] * 60)
    training, validation = data.few_shot(labels, 20, seed=1)
    assert (training, validation) == data.few_shot(labels, 20, seed=1)
    assert len(set(training + validation)) == 40 and len(training) == 20
    assert data.few_shot(labels, 20, seed=2)[0] != training
    for rows in data.few_shot(labels, 20, 1, balanced=True):
        assert sorted(labels[rows]) == sorted([0, 1, 2, 3, 4] * 4)
    with pytest.raises(InputError, match="cannot be drawn from 200; lower --shots"):
        data.few_shot(labels, 101, seed=1)
    with pytest.raises(InputError, match="9 of each class, and there are 8 of class 2; lower"):
        data.few_shot(labels, 30, 1, validation_shots=15, balanced=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.xz"])
def test_json_lines_are_taken_by_their_usual_names(tmp_path, name):
    lines = '{"text": "schön", "label": 2, "more": 1}\n\n{"text": "b", "label": "great"}\n'
    path = put(tmp_path / name, "\ufeff" + lines.replace("\n", "\r\n"))
    first, second = data.read_examples(path, SENTIMENT)
    assert first == {"text": "schön", "label": 2, "more": 1}
    assert second == {"text": "b", "label": 4}  # of a word its index
    for read in (lambda path: data.read_examples(path, SENTIMENT), data.read_documents):
        with pytest.raises(InputError, match="neither a text on each line .* nor JSON lines"):
            next(read(shutil.copy(path, tmp_path / "a.csv")))


# ---------------------------------------------------------- data.py: readers of the official files


def test_read_sst(tmp_path):
    trees = "(3 (2 It) (4 (2 's) (4 (2 -LRB-) (4 (4 good\\/great) (2 -RRB-)))))\n"
    trees += "(2 (2 neutral) (2 .))\n\n(0 (1 1\xa01\\/2) (0 bad))\n"
    path = put(tmp_path / "train.txt", trees)
    texts = ["It 's ( good/great )", "neutral .", "1 1/2 bad"]
    assert list(data.read_sst(path, 5)) == list(zip(texts, [3, 2, 0]))
    assert list(data.read_sst(path, 2)) == list(zip(texts, [1, "neutral", 0]))


def converted(name, out, **flags):
    """Runs data.py convert; returns the lines of each split that it wrote."""
    run(data, "convert", name, out=out, **flags)
    return {path.stem: read_lines(path) for path in out.glob("*.jsonl")}


ZHANG_TRAPS = {  # a line of the official CSV, and the text that was written
    '"5","plain"': "plain",
    '"1","a, b\\nc\\n\\nd"': "a, b\nc\n\nd",
    '"2","he said \\""no\\""."': 'he said "no".',
    '"3","\\""all quoted\\"""': '"all quoted"',
    '"4","ends in a backslash \\"': "ends in a backslash \\",
    '"5","two ""quotes"""': 'two "quotes"',
    '"1","caf\u00e9 :\\\\nnext"': "caf\u00e9 :\\\nnext",
    '"2","Great","CD, \\""really\\"""': 'Great CD, "really"',  # Amazon's have a title
    '"1","","no title"': "no title",
    "": None,
    '"2"," "': None,
}


def test_convert_yelp(tmp_path, capsys):
    train = put(tmp_path / "train.csv.gz", "\n".join(ZHANG_TRAPS))
    test = put(tmp_path / "test.csv", '"1","x"\n')
    splits = converted("yelp5", tmp_path / "task", train=train, test=test)
    traps = ZHANG_TRAPS.items()
    assert splits["train"] == [{"text": b, "label": int(a[1]) - 1} for a, b in traps if b]
    assert splits["test"] == [{"text": "x", "label": 0}]
    assert Task.load(tmp_path / "task") == Task("yelp5", "{text}. It was {mask}", data.WORDS[5])
    printed = capsys.readouterr().out
    assert "for train kept 3 terrible, 2 bad, 1 okay, 1 good, 2 great; dropped 1 (empty" in printed


def test_convert_can_draw_a_test_split_and_keeps_none_of_another_file(tmp_path):
    train = put(tmp_path / "a.csv", "".join(f'"{1 + i % 2}","text {i}"\n' for i in range(10)))
    splits = converted("amazon5", tmp_path / "task", train=train, test_share=0.3)
    assert {split: len(lines) for split, lines in splits.items()} == {"train": 7, "test": 3}
    assert len({line["text"] for line in splits["train"] + splits["test"]}) == 10
    assert "test" not in converted("amazon5", tmp_path / "task", train=train)


def test_read_sentihood(tmp_path):
    sentences = []
    for text, said in [(" LOCATION1 is safe ", "++"), ("rough", "-"), ("both", "+-"), ("no", "")]:
        opinions = [{"sentiment": {"+": "Positive", "-": "Negative"}[sign]} for sign in said]
        sentences.append({"id": 1, "text": text, "opinions": opinions})
    path = put(tmp_path / "sentihood-train.json", "\ufeff" + json.dumps(sentences))
    texts = ["LOCATION1 is safe", "rough", "both", "no"]
    labels = [1, 0, "mixed opinions", "no opinion"]
    assert list(data.read_sentihood(path)) == list(zip(texts, labels))


@pytest.mark.parametrize("encoding", ["UTF-8", "ISO-8859-1"])
def test_read_semeval(tmp_path, encoding):
    xml = f'<?xml version="1.0" encoding="{encoding}"?>\r\n<sentences>\r\n'
    xml += '<sentence OutOfScope="TRUE"><text>Café &amp; bar.</text></sentence>'
    said = ["positive positive", "neutral", "positive negative", "", "negative"]
    for polarities in said:
        opinions = "".join(f'<Opinion polarity="{word}"/>' for word in polarities.split())
        xml += f"<sentence><text>x</text>{opinions}</sentence>\r\n"
    path = put(tmp_path / "a.xml", (xml + "</sentences>").encode(encoding))
    labels = [2, 1, "mixed opinions", "no opinion", 0]
    expected = [("Café & bar.", "out of scope"), *(("x", label) for label in labels)]
    assert list(data.read_semeval(path)) == expected


# ------------------------------------------------------------- data.py: pseudo-labels, Section 4.1


def test_read_corpus(tmp_path):
    first = put_tar(tmp_path / "0.tar", {"a.txt": 'First one. "Second" two!\n', "b.txt": b"\xff"})
    more = "Mr. A. B. Smith came.  He saw 3 things? Yes.\n"
    second = put_tar(tmp_path / "1.tar", {"a.txt": more, "image.png": "no", "empty.txt": " \n"})
    inner = {f"subset{path.stem}_data.xz": path.read_bytes() for path in (first, second)}
    inner = {name: lzma.compress(content) for name, content in inner.items()}
    path = put_tar(tmp_path / "openwebtext.tar", inner)
    sentences = ["First one.", '"Second" two!', None]
    sentences += ["Mr. A. B. Smith came.", "He saw 3 things?", "Yes.", None]
    assert list(data.read_corpus([path])) == sentences

    lines = put(tmp_path / "a.jsonl.gz", '{"text": "a\\nb"}\n{"text": "c"}\n')
    assert list(data.read_corpus([lines] * 2)) == ["a", "b", "c"] * 2
    assert 3 < len(list(data.read_corpus([lines] * 20, share=0.3))) < 40
    bad = [b"{", b"[]", b'{"text": 3}', b'{"text": "\\ud800"}', b"\xff", b""]
    path = put(tmp_path / "bad.jsonl", b"\n".join(bad) + b'\n{"text": "z"}\n')
    assert list(data.read_corpus([path])) == [None] * len(bad) + ["z"]


def test_a_labeller_learns_and_one_that_diverges_leaves_nothing(labeller, tmp_path):
    log = read_lines(labeller / "log.jsonl")
    assert [line["step"] for line in log] == [50, 96]
    assert max(line["accuracy"] for line in log) > 0.8
    flags = {"task": labeller.parent / "task", "model": labeller.parent / "roberta"}
    flags |= {"validation": 60, "device": "cpu"}
    with pytest.raises(InputError, match="a labeller stands there already; give another --out"):
        run(data, "labeller", out=labeller, **flags)
    with pytest.raises(Diverged, match="the labeller's loss is not finite; lower the"):
        run(data, "labeller", out=tmp_path / "new", learning_rate=1e15, warmup=1, **flags)
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_labeller_begins_at_one_of_other_classes_and_a_half_written_one_is_none(
    labeller, tmp_path, at_call
):
    words = data.WORDS[3]
    examples = [{"text": f"the plot was {word} .", "label": i} for i, word in enumerate(words)]
    data.write_task(tmp_path / "task", Task("films", data.TEMPLATE, words), {"train": examples * 9})
    flags = {"task": tmp_path / "task", "model": labeller, "out": tmp_path / "labeller"}
    flags |= {"validation": 9, "device": "cpu", "threads": 1, "max_epochs": 1}
    run(data, "labeller", **flags)
    at_call(Task, "save", 1, raises(SystemError))
    with pytest.raises(SystemError):
        run(data, "labeller", restart=True, **flags)
    run(data, "labeller", **flags)
    assert data.load_classifier(tmp_path / "labeller", "cpu")[0].num_labels == 3


def test_classify_gives_every_text_its_own_label_and_none_for_nan(labeller):
    model, tokenizer = data.load_classifier(labeller, "cpu")
    tokenize = data.in_batches(tokenizer, 64)
    texts = [review["text"] for review in make_examples(11, 3)]  # of all lengths
    rows = data.classify(model, tokenize, texts, 4)
    assert [text for text, *_ in rows] == texts and not data.classify(model, tokenize, [], 4)
    for text, label, confidence in rows:
        p = model(**tokenize([text])).logits.softmax(-1)[0]
        assert label == p.argmax() and confidence == pytest.approx(p.max().item(), abs=1e-5)
    model.classifier.out_proj.bias.data[:] = math.nan
    with pytest.raises(Diverged, match="a probability of the labeller is not finite"):
        data.classify(model, tokenize, texts, 4)
    tokenizer.model_max_length = 9  # which the model takes
    lengths = [data.in_batches(tokenizer, n)("plot " * 99).input_ids.shape[1] for n in (4, 64)]
    assert lengths == [4, 9]


def pseudo_label(labeller, out, **flags):
    """Runs pseudo-label on a corpus of 600 lines; returns the examples and the funnel."""
    lines = [review["text"].replace(" .", " .\n", 1) + "\n" for review in make_examples(300, 5)]
    corpus = put(out.parent / "corpus.txt", "".join(lines))
    flags = {"corpus": corpus, "threads": 1, "batch_size": 2, "device": "cpu", **flags}
    run(data, "pseudo-label", labeller=labeller, out=out, **flags)
    return read_lines(out / "examples.jsonl"), metapt.read_json(out / "funnel.json")


def test_pseudo_labels_are_sure_balanced_and_without_duplicates(labeller, tmp_path):
    sure = {"confidence": [0.98, 0.9], "max_words": 14}
    examples, funnel = pseudo_label(labeller, tmp_path / "source", **sure)
    labels = [example["label"] for example in examples]
    assert labels.count(0) == labels.count(1) > 10
    for example in examples:
        assert example["confidence"] >= (0.98, 0.9)[example["label"]]
        assert len(example["text"].split()) <= 14
    assert len({example["text"].lower() for example in examples}) == len(examples) == funnel["kept"]
    assert funnel["duplicate"] > 50 and funnel["too long"] > 10 and funnel["unsure"] > 0
    assert funnel["read"] == 600 == sum(funnel.values()) - funnel["read"]
    few, _ = pseudo_label(labeller, tmp_path / "source", per_class=7, **sure)
    assert len(few) == 14 and all(example in examples for example in few)


def test_balancing_again_labels_nothing_again(labeller, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="labelled so; lower --confidence: what was labelled is"):
        pseudo_label(labeller, tmp_path / "source", confidence=1)
    assert "600 read\n" in capsys.readouterr().out  # what was dropped is said before the error
    with monkeypatch.context() as patch:
        patch.setattr(data, "label_corpus", None)
        again = pseudo_label(labeller, tmp_path / "source", confidence=0.9)
    assert again == pseudo_label(labeller, tmp_path / "other", confidence=0.9)


def test_what_another_labeller_or_corpus_gave_is_not_gone_on_with(labeller, tmp_path):
    same = {"labeller": labeller, "out": tmp_path / "source"}
    pseudo_label(**same)
    other = shutil.copytree(labeller, tmp_path / "labeller")
    make_anew(other / "config.json")
    corpus = put(tmp_path / "new.txt", "another line\n")
    for name, value in {"labeller": other, "corpus": corpus}.items():
        with pytest.raises(InputError, match=f"this run began with {name} .*--restart begins anew"):
            pseudo_label(**{**same, name: value})
    examples, _ = pseudo_label(**same, max_words=9, restart=True)
    assert max(len(example["text"].split()) for example in examples) == 9


def test_a_stopped_labelling_continues(labeller, tmp_path, monkeypatch, at_call):
    monkeypatch.setattr(data, "BLOCK", 64)
    whole = pseudo_label(labeller, tmp_path / "whole")
    calls = at_call(data, "classify", 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped after 128 texts"):
        pseudo_label(labeller, tmp_path / "parts")
    assert pseudo_label(labeller, tmp_path / "parts") == whole
    assert len(calls) == 2 + 8  # of ten blocks none is labelled again


# ------------------------------------------- cluster.py: meta-tasks, Section 4.2 and Appendix B


@pytest.mark.parametrize("method", ["kmeans", "lda", "random", "label"])
def test_cluster(world, tmp_path, method, capsys):
    reviews = [review for name in demo.SOURCE_DOMAINS for review in make_examples(70, 0, name)]
    data.write_task(tmp_path / "source", SENTIMENT, {"examples": reviews})
    out = tmp_path / "clusters" / "7.jsonl"
    flags = {"encoder": world / "t5", "figure": tmp_path / "tsne.png"} if method == "kmeans" else {}
    source = tmp_path / "source" / "examples.jsonl"
    run(cluster, source=source, out=out, method=method, k=7, device="cpu", **flags)
    names = [example["cluster"] for example in read_lines(out)]
    assert read_lines(out) == [{**review, "cluster": i} for review, i in zip(reviews, names)]
    sizes = np.bincount(names)
    assert {"label": [56] * 5, "random": [40] * 7}.get(method, list(sizes)) == list(sizes)
    assert method != "label" or names == [review["label"] for review in reviews]
    assert len(sizes) >= 5 and (tmp_path / "tsne.png").exists() == (method == "kmeans")
    assert Task.load(out.parent) == SENTIMENT
    assert metapt.read_json(out.with_suffix(".json"))["clusters"] == metapt.digest(out)
    line = rf"cluster 0: {sizes[0]} examples: \d+ terrible, .* great\n    words: \w+"
    assert re.search(line, capsys.readouterr().out)


def test_kmeans_finds_what_is_there_and_repeats_itself():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 50)
    points = 5 * rng.normal(size=(4, 8))[truth] + rng.normal(size=(200, 8))
    clusters, distances = cluster.kmeans(points.astype(np.float32), 4, seed=1)
    assert len(set(zip(truth, clusters))) == 4
    assert np.array_equal(clusters, cluster.kmeans(points.astype(np.float32), 4, seed=1)[0])
    members = points[clusters == 0]
    squares = ((members - members.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(distances[clusters == 0], squares, rtol=1e-3)


def test_lda_finds_the_demos_domains_and_their_words():
    reviews = [review for name in demo.SOURCE_DOMAINS for review in make_examples(70, 0, name)]
    counts, words = cluster.count_words([review["text"] for review in reviews], 100)
    clusters, distances = cluster.lda(counts, 4, seed=1, size=100, updates=60)
    assert len(set(zip(clusters, np.repeat(np.arange(4), 70)))) == 4
    assert 0 <= distances.min() <= distances.max() < 0.5
    telling = cluster.telling_words(counts, clusters, words)
    assert "plot" in telling[clusters[0]] and "soup" in telling[clusters[70]]


def test_embeddings_are_stored_for_todays_encoder_and_finite(world, tmp_path, monkeypatch):
    encoder = str(shutil.copytree(world / "t5", tmp_path / "t5"))
    embed = lambda: cluster.embed(["fine", "the plot"], tmp_path, encoder, "cpu")
    first = np.array(embed())
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), 1, rtol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "SentenceTransformer", None)
        assert np.array_equal(embed(), first)

    path = tmp_path / "t5" / "model.safetensors"
    weights = {name: w * math.nan for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="t5: the embedding of 'fine' is not finite; give another"):
        embed()
    assert len(list(tmp_path.glob("*.npy"))) == 1


# ------------------------------------------------ Appendix A, its defaults and its methods, by hand


META = vars(train_meta.make_parser().parse(["--source", "x", "--out", "x"]))
DOWN = vars(finetune.make_parser().parse([]))
FT = {"learning_rate": 0.00003, "batch_size": 4, "max_epochs": 200, "patience": 5}
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}
PT = {"learning_rate": 0.003, "batch_size": 4 * 8, "max_epochs": 200, "patience": 6}
APPENDIX_A = {  # the place in the paper: its numbers by our names, and where the code has them
    "5.1, few-shot": ({"shots": [40], "validation_shots": None, "seeds": [1, 2, 3, 4, 5]}, DOWN),
    "5.1, a prompt's vectors": ({"prompt_length": 100}, META),
    "A.1, FT": (FT, finetune.SETTINGS["ft"]),
    "A.2, PPT": (PPT, train_meta.SETTINGS["ppt"]),
    "A.2, epochs": ({"EPOCHS": 5}, vars(train_meta)),
    "A.3, outer loop": (MAML, train_meta.SETTINGS["maml"]),
    "A.3, inner loop": ({"alpha": 0.08, "batch_size": 4}, META),
    "A.4, PT": (PT, finetune.SETTINGS["pt"]),
}


@pytest.mark.parametrize("place", APPENDIX_A)
def test_the_defaults_are_appendix_as(place):
    paper, code = APPENDIX_A[place]
    assert {name: code[name] for name in paper} == paper


def adamw_by_hand(P, gradient_at, rate_at, steps):
    """P after so many steps of AdamW, written out, without weight decay."""
    m, v = torch.zeros_like(P), torch.zeros_like(P)
    for t in range(steps):
        gradient = gradient_at(P, t)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        m_hat = m / (1 - 0.9 ** (t + 1))
        v_hat = v / (1 - 0.999 ** (t + 1))
        P = P - rate_at(t) * m_hat / (v_hat.sqrt() + 1e-8)
    return P


@pytest.mark.parametrize("method", ["maml", "fomaml", "ppt"])
def test_steps_of_train_meta_by_hand(world, tmp_path, method):
    steps = 24 if method == "ppt" else 2
    flags = {"max_steps": steps, "eval_every": steps, "dtype": "float64", "alpha": 0.5}
    learn(world, tmp_path, method, **flags)
    t5 = metapt.load_t5(world / "t5", dtype="float64")
    model = PromptedT5(*t5, SENTIMENT, 128, faster=False)
    examples = read_lines(world / "source" / "clustered.jsonl")
    tasks, _ = train_meta.split_clusters(examples, 40, 4 if method == "ppt" else 2, seed=1)

    def gradient_at(P, step):
        if method == "ppt":
            batch = model.encode(train_meta.draw_batch(sum(tasks, []), 2, 1, step))
            return torch.func.grad(model.loss)(P, batch)

        drawn = train_meta.draw(tasks, 2, 1, step)
        supports, queries = ([model.encode(part) for part in parts] for parts in drawn)
        if method == "maml":
            return textbook_meta_gradient(model, P, supports, queries, 0.5)[0]
        total = 0
        for support, query in zip(supports, queries):
            adapted = P - 0.5 * torch.func.grad(model.loss)(P, support)
            total = total + torch.func.grad(model.loss)(adapted, query)
        return total

    start = model.init_prompt(3, seed=1)
    scheduled = lambda t: 0.003 * min((t + 1) / 20, (24 - t) / 4)  # up and down
    rate_at = scheduled if method == "ppt" else lambda t: 0.025  # β is constant
    expected = adamw_by_hand(start, gradient_at, rate_at, steps)
    prompt = load_file(tmp_path / "checkpoint.safetensors")["prompt"]
    assert relative_error(prompt - start, expected - start) < 1e-3


def test_tune_by_hand(model, monkeypatch):
    """The schedule up and down, the patience, and the return to the best epoch."""
    accuracies = iter([0.1, 0.2, 0.3, 0.4, 0.9, 0.5, 0.9])
    score = lambda prompt, batches: {"accuracy": next(accuracies), "loss": 1.0}
    monkeypatch.setattr(model, "evaluate", score)
    start, examples = model.init_prompt(3).double(), make_examples(5)
    settings = {"batch_size": 1, "max_epochs": 9, "patience": 2, "seed": 3}
    prompt, outcome = finetune.tune(model, start, examples, examples, 0.1, **settings)
    assert (outcome["epochs"], outcome["best_epoch"]) == (7, 5)

    torch.manual_seed(3)
    order = torch.cat([torch.randperm(5) for epoch in range(5)])
    batch = lambda t: model.encode([examples[order[t]]])
    gradient_at = lambda P, t: torch.func.grad(model.loss)(P, batch(t))
    rate_at = lambda t: 0.1 * min((t + 1) / 20, (45 - t) / 25)
    torch.testing.assert_close(prompt, adamw_by_hand(start, gradient_at, rate_at, 25))


def test_full_tuning_returns_to_its_best_epoch_and_alone_has_dropout(tokenizer, monkeypatch):
    model, states, modes = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT), [], []
    examples, loss = make_examples(4), model.loss

    def evaluate(prompt, batches):
        states.append(copy.deepcopy(model.t5.state_dict()))
        return {"accuracy": [0.2, 0.9, 0.5, 0.5][len(states) - 1], "loss": 1.0}

    monkeypatch.setattr(model, "evaluate", evaluate)
    monkeypatch.setattr(model, "loss", lambda *args: modes.append(model.t5.training) or loss(*args))
    finetune.tune(model, None, examples, examples, 0.1, 4, max_epochs=3, patience=5)
    tuned = model.t5.state_dict()
    same = [all(torch.equal(tuned[name], state[name]) for name in state) for state in states]
    assert same == [False, True, False]
    finetune.tune(model, model.init_prompt(3), examples, examples, 0.1, 4, 1, 5)
    assert modes == [True, True, True, False]


# ------------------------------------------------------------- train_meta.py: Section 4.3, A.2, A.3

FORKS = multiprocessing.get_context("forkserver")  # processes that import PyTorch once for all
FORKS.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """A finished run of train_meta.py: to read, or to copy and to continue."""
    forkserver.ensure_running()  # beside the tests to come
    out = tmp_path_factory.mktemp("learned") / "meta"
    learn(world, out)
    return out


def same_bytes(one, other):
    names = ("adapter_model.safetensors", "log.jsonl")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def facts_of(folder):
    return load_prompt(folder)[1]


def steps_of(folder):
    return [line["step"] for line in read_lines(folder / "log.jsonl")]


def raises(error):
    """A function that raises it."""

    def act(*args, **kwargs):
        raise error

    return act


def ends_in_one_line(function, capsys):
    """The line on standard error in which a script ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.run(function)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and len(message) < 1100, message
    return message


def make_anew(path):
    """Changes a file in its place: a weight, an entry of a config, a text."""
    if path.suffix == ".safetensors":
        weights = load_file(path)
        next(iter(weights.values()))[0, 0] += 1
        save_file(weights, path, {"format": "pt"})
    elif path.name == "config.json":
        entry("layer_norm_epsilon", 0.1)(path)
    else:
        put(path, path.read_text().replace("was", "is") + "\n")


def test_support_query_and_held_out_examples_are_disjoint():
    examples = [{"text": str(i), "cluster": i % 3} for i in range(90)]
    tasks, held_out = train_meta.split_clusters(examples, validation=30, m=4, seed=1)
    for i, (task, held) in enumerate(zip(tasks, held_out, strict=True)):
        assert {example["cluster"] for example in task + held} == {i}
        texts = {example["text"] for example in task + held}
        assert (len(task), len(held), len(texts)) == (20, 10, 30)

    first = set()
    for step in range(50):
        for task, support, query in zip(tasks, *train_meta.draw(tasks, 4, 1, step), strict=True):
            texts = {example["text"] for example in support + query}
            assert len(texts) == 8 and texts <= {example["text"] for example in task}
        first.add(support[0]["text"])
    assert len(first) > 10 and train_meta.draw(tasks, 4, 1, 7) == train_meta.draw(tasks, 4, 1, 7)


def test_validation_adapts_to_each_cluster_and_scores_the_rest(model):
    prompt = model.init_prompt(3).double()
    held_out, expected = [], []
    for seed in (0, 1):
        support, rest = model.encode(make_examples(4, seed)), model.encode(make_examples(9, 5))
        held_out.append((support, [rest]))
        expected.append(model.loss(adapt(model, prompt, support, 0.5), rest).item())
    score = train_meta.validate(model, prompt, held_out, alpha=0.5)
    assert score["loss"] == pytest.approx(np.mean(expected))
    as_it_is = train_meta.validate(model, prompt, [(None, [rest])], alpha=0.5)
    assert as_it_is["loss"] == pytest.approx(model.loss(prompt, rest).item())


def score_as(patch, *accuracies):
    """Has train_meta.py's validations give these; returns their prompts."""
    left = iter(accuracies)
    prompts = []

    def validate(model, prompt, *others):
        prompts.append(prompt.clone())
        return {"accuracy": next(left), "loss": 1.0, "in_words": 1.0}

    patch.setattr(train_meta, "validate", validate)
    return prompts


def test_the_prompt_of_the_best_validation_is_kept(world, tmp_path, monkeypatch):
    prompts = score_as(monkeypatch, 0.2, 0.9, 0.5, 0.4)
    assert torch.equal(learn(world, tmp_path), prompts[1])
    facts = facts_of(tmp_path)
    assert (facts["step"], facts["accuracy"], facts["is_start"]) == (2, 0.9, False)


def test_a_prompt_that_is_its_own_start_says_so(world, tmp_path, monkeypatch, capsys):
    score_as(monkeypatch, 0.9, 0.5)
    prompt = learn(world, tmp_path / "start", max_steps=2)
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    assert torch.equal(prompt, model.init_prompt(3)) and facts_of(tmp_path / "start")["is_start"]
    assert "it is the start itself: no step was better" in capsys.readouterr().out
    (row,) = few(world, tmp_path, prompt=tmp_path / "start")
    assert row["is_start"] and finetune.method_name(row) == "MetaPT, which is its start"


def test_ppt_has_five_epochs_and_patience_from_the_first_on(world, tmp_path, monkeypatch):
    flags = {"source_size": 100, "validation": 20, "batch_size": 9, "max_steps": 99}
    score_as(monkeypatch, 0.5, 0.4)
    learn(world, tmp_path / "five", "ppt", eval_every=45, **flags)
    assert steps_of(tmp_path / "five") == [0, 5 * 9]  # 80 examples are nine batches
    score_as(monkeypatch, *[0.5] * 9)
    learn(world, tmp_path / "patience", "ppt", eval_every=3, patience=2, **flags)
    assert steps_of(tmp_path / "patience")[-1] == 9 + 2 * 3


def test_a_run_whose_end_was_off_its_evaluations_loses_no_patience(world, tmp_path, monkeypatch):
    score_as(monkeypatch, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1)
    for max_steps in (5, 12):
        learn(world, tmp_path, max_steps=max_steps, patience=3)
    assert steps_of(tmp_path) == [0, 2, 4, 5, 6]


def test_the_facts_of_a_prompt(world, tmp_path):
    source = shutil.copytree(world / "source", tmp_path / "source") / "clustered.jsonl.gz"
    put(source, (world / "source" / "clustered.jsonl").read_text())
    notes = {"method": "lda", "clusters": metapt.digest(source)}
    put(source.with_name("clustered.json"), json.dumps(notes))
    learn(world, tmp_path / "run", source=source, source_size=500, alpha=0, max_steps=0)
    facts = facts_of(tmp_path / "run")
    names = ("method", "source_size", "clusters", "clustering", "threads", "source_task")
    assert [facts[name] for name in names] == ["no inner step", 500, 4, "lda", 1, "source"]
    put(source.with_name("clustered.json"), json.dumps({**notes, "clusters": "of others"}))
    assert train_meta.clustering_of(source) is None


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - runs that are stopped and continued

STOPS = {
    "the first validation, Ctrl-C": ("maml", "validate", 1, signal.SIGINT),
    "a draw, SIGTERM": ("maml", "draw", 3, signal.SIGTERM),
    "a gradient, SIGHUP": ("maml", "meta_gradient", 5, signal.SIGHUP),
    "a save, Ctrl-C": ("maml", "save_run", 2, signal.SIGINT),
    "a gradient of PPT, Ctrl-C": ("ppt", "ppt_gradient", 4, signal.SIGINT),
}


@pytest.mark.parametrize("phase", STOPS)
def test_a_stopped_run_continues_to_the_same_bytes(world, learned, tmp_path, at_call, phase):
    method, function, call, number = STOPS[phase]
    if method == "ppt":
        learned = tmp_path / "whole"
        learn(world, learned, method)
    drawn = at_call(train_meta, "draw" if method == "maml" else "draw_batch", 0, None)
    at_call(train_meta, function, call, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d and saved"):
        learn(world, tmp_path / "parts", method)
    learn(world, tmp_path / "parts", method)
    assert same_bytes(tmp_path / "parts", learned)
    assert [step for *_, step in drawn] == [0, 1, 2, 3, 4, 5]  # none of them twice


def test_a_killed_run_continues_to_the_same_bytes(world, tmp_path):
    """SIGKILL a few hundredths of a second after an evaluation, three times in one run."""
    short = {"prompt_length": 3, "validation": 20, "max_steps": 30, "eval_every": 2}
    flags = {"config": world / "maml.json", "patience": 99, "batch_size": 1, **short}
    run(train_meta, out=tmp_path / "whole", **flags)
    log = tmp_path / "parts" / "log.jsonl"
    argv = words_of(out=tmp_path / "parts", **flags)
    for kill in range(3):
        before = log.read_text() if log.exists() else None
        process = FORKS.Process(target=train_meta.main, args=(argv,))
        process.start()
        while process.is_alive() and (not log.exists() or log.read_text() == before):
            time.sleep(0.01)
        time.sleep(kill / 60)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before: give it more steps"
    train_meta.main(argv)
    assert same_bytes(tmp_path / "parts", tmp_path / "whole")


def test_new_weights_beside_old_facts_are_refused_and_healed(world, tmp_path, monkeypatch, at_call):
    """Killed between two renames."""
    score_as(monkeypatch, 0.1, 0.2, 0.3, 0.4)
    at_call(metapt, "write_json", 6, raises(RuntimeError("killed")))  # the third metapt.json
    with pytest.raises(RuntimeError, match="killed"):
        learn(world, tmp_path / "run")
    with pytest.raises(InputError, match="run: its metapt.json is of other weights"):
        few(world, tmp_path, prompt=tmp_path / "run")
    learn(world, tmp_path / "run")
    assert facts_of(tmp_path / "run")["step"] == 6


def test_a_second_command_with_one_out_ends_in_one_line(world, learned, tmp_path, at_call, capsys):
    second = lambda: lines.append(ends_in_one_line(lambda: learn(world, out, seed=2), capsys))
    lines, out = [], tmp_path / "run"
    at_call(train_meta, "validate", 2, second)
    learn(world, out)
    assert f"{out}: another command is at work on it" in lines[0]
    assert same_bytes(out, learned)


CHANGES = {  # what is another one where a run is to go on, a flag or a file: what is refused
    "alpha": (0.3, "--alpha 0.08, not 0.3"),
    "seed": (2, "--seed 1, not 2"),
    "max_steps": (0, "--max-steps 1, not 0"),  # which may grow, as may the patience
    "patience": (5, "--patience 6, not 5"),
    "source/clustered.jsonl": (None, "--source [0-9a-f]{16}, not "),
    "source/task.json": (None, "task.json [0-9a-f]{16}, not "),
    "start/adapter_model.safetensors": (None, "--init [0-9a-f]{16}, not "),
    "t5/model.safetensors": (None, "--model [0-9a-f]{16}, not "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_what_it_was_made_of_only(world, tmp_path, tokenizer, change):
    files, out = shutil.copytree(world, tmp_path / "demo"), tmp_path / "run"
    save_prompt(files / "start", torch.zeros(3, 64), make_t5(tokenizer))
    flags = {"source": files / "source" / "clustered.jsonl", "model": files / "t5"}
    flags |= {"init": files / "start", "max_steps": 1}
    learn(files, out, **flags)
    recipe = facts_of(out)["recipe"]
    value, refused = CHANGES[change]
    if value is None:
        (files / "start" / "metapt.json").unlink()
        make_anew(files / change)
    else:
        flags[change] = value
    with pytest.raises(InputError, match=f"run: .*began with {refused}.*--restart begins anew"):
        learn(files, out, **flags)
    learn(files, out, restart=True, **flags)
    # Trainings of one recipe differ in the seed alone.
    assert (facts_of(out)["recipe"] == recipe) == (change == "seed")
    assert facts_of(out)["prompt_seed"] == flags.get("seed", 1)


def work_under_torchrun(rank, port, argv):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "1"}
    names["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torchrun's own, here the test's
    os.environ.update({name: str(value) for name, value in names.items()})
    train_meta.main(argv)
    assert torch.distributed.is_initialized()


def test_torchrun_shares_a_step_and_changes_nothing(world, learned, tmp_path):
    argv = words_of(config=learned / "arguments.json", out=tmp_path / "two")
    store = torch.distributed.TCPStore("localhost", 0, 2, True, wait_for_workers=False)
    works = {"target": work_under_torchrun, "daemon": True}
    workers = [FORKS.Process(args=(rank, store.port, argv), **works) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    one, two = (load_file(out / "checkpoint.safetensors") for out in (learned, tmp_path / "two"))
    torch.testing.assert_close(one["prompt"], two["prompt"], atol=1e-6, rtol=0)
    one, two = (read_lines(out / "log.jsonl") for out in (learned, tmp_path / "two"))
    assert [line["accuracy"] for line in one] == [line["accuracy"] for line in two]


# ------------------------------------------------------------------ finetune.py: Section 5, A.1, A.4


@pytest.fixture(scope="module")
def sweep(world, learned, tmp_path_factory):
    """A folder of r.jsonl and tuned prompts."""
    folder = tmp_path_factory.mktemp("sweep")
    few(world, folder, prompt=["random", learned], seeds=[1, 2], save=folder / "tuned")
    return folder


def test_a_stopped_sweep_continues(world, tmp_path, at_call):
    flags = {"method": ["pt", "ft"], "shots": [4, 8]}
    runs = at_call(finetune, "one_run", 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        few(world, tmp_path / "new", **flags)
    before = read_lines(tmp_path / "new" / "r.jsonl")
    rows = few(world, tmp_path / "new", **flags)
    assert len(before) == 2 and rows[:2] == before and len(runs) == 3 + 2
    assert len({row["identity"] for row in rows}) == len(rows) == 4


BOOKS_FILES = ["books/train.jsonl", "books/test.jsonl", "books/task.json"]


@pytest.mark.parametrize("place", [*BOOKS_FILES, "t5/tokenizer.json"])
def test_a_result_is_shown_for_what_it_was_made_of_only(world, tmp_path, capsys, place):
    """Data or T5 A, then B, then A again: the line of A, without a run."""
    files = shutil.copytree(world, tmp_path / "demo")
    flags = {"task": files / "books", "model": files / "t5"}
    first = few(world, tmp_path, **flags)[0]
    before = (files / place).read_bytes()
    make_anew(files / place)
    assert len(few(world, tmp_path, **flags)) == 2
    (files / place).write_bytes(before)
    capsys.readouterr()
    few(world, tmp_path, **flags)
    shown = f"{100 * first['accuracy']:.2f} |\n\nwrote {tmp_path}/r.jsonl: 0 of 1 results are new"
    assert shown in capsys.readouterr().out


def test_a_saved_prompt_is_that_of_its_own_run(world, tmp_path):
    few(world, tmp_path)
    saved = tmp_path / "books-random-8-1"
    for rate in (0.1, 0.9, 0.1):
        rows = few(world, tmp_path, save=tmp_path, learning_rate=rate)
        (row,) = (row for row in rows if row["settings"]["learning_rate"] == rate)
        assert facts_of(saved)["identity"] == row["identity"]
    assert len(rows) == 3


def test_a_tuned_prompt_used_as_a_start_is_called_so(world, sweep, tmp_path):
    (row,) = few(world, tmp_path, prompt=sweep / "tuned" / "books-meta-8-1")
    assert finetune.method_name(row) == "MetaPT, tuned on books" and not row["is_start"]
    one, two = (facts_of(sweep / "tuned" / f"books-meta-8-{seed}") for seed in (1, 2))
    assert one["recipe"] == two["recipe"] and (one["prompt_seed"], two["prompt_seed"]) == (1, 2)


def test_a_random_prompt_is_of_the_length_and_the_t5_of_the_learned_one(world, learned, tmp_path):
    flags = {"task": world / "books", "shots": 0, "max_test": 9, "seeds": 1}
    run(finetune, prompt=["random", learned], out=tmp_path / "r.jsonl", **flags)
    run(finetune, model=world / "t5", out=tmp_path / "r.jsonl", **flags)
    rows = read_lines(tmp_path / "r.jsonl")
    assert [row["settings"]["prompt_length"] for row in rows] == [3, 3, 100]
    assert {row["model"] for row in rows} == {str(world / "t5")}


def test_what_is_named_twice_and_what_no_draw_enters_count_once(world, learned, tmp_path, capsys):
    rows = few(world, tmp_path, prompt=[learned, learned], seeds=[1, 2, 1], shots=[8, 0])
    assert [(row["shots"], row["seed"]) for row in rows] == [(8, 1), (8, 2), (0, None)]
    (cell,) = re.findall(r"\| 0 +\| MetaPT \|.*\| ([^|]*) \|", capsys.readouterr().out)
    assert cell.strip() == f"{100 * rows[2]['accuracy']:.2f}"  # and no deviation


def test_no_shots_test_the_start_as_it_is(world, learned, tmp_path):
    few(world, tmp_path, prompt=["random", learned], shots=0, max_test=30)
    rows = few(world, tmp_path, "ft", shots=0, max_test=30)
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, 128)
    test = read_lines(world / "books" / "test.jsonl")
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:30]]
    starts = [model.init_prompt(3, 1), load_prompt(learned)[0], model.no_prompt()]
    for row, start in zip(rows, starts, strict=True):
        score = model.evaluate(start, model.batches(test))
        assert row["accuracy"] == pytest.approx(score["accuracy"]) and row["epochs"] == 0


def test_full_tuning_leaves_the_t5_to_the_other_runs(world, tmp_path):
    _, after = few(world, tmp_path / "both", method=["ft", "pt"])
    (alone,) = few(world, tmp_path / "alone")
    assert after["loss"] == alone["loss"]


def test_accumulate_is_part_of_full_tunings_identity_alone(world, tmp_path):
    for parts in (1, 2):
        rows = few(world, tmp_path, method=["pt", "ft"], accumulate=parts)
    assert [row["tuning"] for row in rows] == ["pt", "ft", "ft"]


def test_a_test_split_that_repeats_the_training_split_is_said(world, tmp_path, capsys):
    books = shutil.copytree(world / "books", tmp_path / "books")
    known = read_lines(books / "train.jsonl")[:1]
    for test in ([], known):
        data.write_lines(books / "test.jsonl", [{"text": "new", "label": 0}, *test])
        few(world, tmp_path, task=books)
        said = "test.jsonl: 1 texts of train.jsonl are in it too" in capsys.readouterr().err
        assert said == bool(test)


def test_runs_go_on_after_one_that_diverges(world, tmp_path, at_call):
    at_call(finetune, "one_run", 1, raises(Diverged("a validation or test loss is not finite")))
    with pytest.raises(Diverged, match="1 of 2 runs have no result; books, PT .random., .*seed 1"):
        few(world, tmp_path, seeds=[1, 2])
    with pytest.raises(Diverged, match="loss is not finite; lower the learning rate"):
        few(world, tmp_path, "ft", learning_rate=1e15)
    assert [row["seed"] for row in read_lines(tmp_path / "r.jsonl")] == [2]


def test_no_result_is_lost_between_processes(sweep, tmp_path):
    row, out = read_lines(sweep / "r.jsonl")[0], tmp_path / "r.jsonl"
    add = lambda name: finetune.write_results(out, {name: {**row, "identity": name}})
    names = [f"{i:02}" for i in range(30)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, names))
    assert sorted(row["identity"] for row in read_lines(out)) == names


def test_a_prompt_used_with_another_t5_says_so(world, learned, tmp_path, capsys):
    other = shutil.copytree(world / "t5", tmp_path / "t5")
    few(world, tmp_path, prompt=learned, model=other)  # the same under another name
    assert "was learned with" not in capsys.readouterr().err
    make_anew(other / "model.safetensors")
    few(world, tmp_path, prompt=learned, model=other)
    assert f"{learned} was learned with {world / 't5'}, not {other}" in capsys.readouterr().err
    save_prompt(tmp_path / "narrow", torch.zeros(3, 16), metapt.load_t5(other)[0])
    with pytest.raises(InputError, match="narrow: of width 16; .*t5 needs 64"):
        few(world, tmp_path, prompt=tmp_path / "narrow")


def test_predictions_of_texts_with_and_without_labels(world, sweep, tmp_path, capsys):
    texts = [
        {"text": "the plot was gripping and the music was dull .", "label": "great"},
        {"text": "{dull}", "label": 3, "word": "its own"},
    ]
    lines = [json.dumps(text) for text in texts] + ["", '{"text": "who knows ?"}']
    prompt = sweep / "tuned" / "books-meta-8-1"
    flags = {"prompt": prompt, "predict": put(tmp_path / "a.jsonl", "\n".join(lines))}
    run(finetune, out=tmp_path / "new" / "out.jsonl", **flags)
    rows = read_lines(tmp_path / "new" / "out.jsonl")
    assert [row.get("label") for row in rows] == [4, 3, None] and rows[1]["word"] == "its own"
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, max_length=128)
    for row in rows:
        prediction = row["prediction"]
        (p,) = model.probabilities(load_prompt(prompt)[0], model.encode([row]))
        assert prediction["label"] == p.argmax()
        assert prediction["word"] == SENTIMENT.words[p.argmax()]
        assert list(prediction["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-4)
    hits = sum(row["label"] == row["prediction"]["label"] for row in rows[:2])
    assert f"accuracy {hits / 2:.1%}, of 2 labelled texts" in capsys.readouterr().err

    flags["predict"] = put(tmp_path / "a.txt", "\n\n".join(row["text"] for row in rows))
    run(finetune, task=world / "games", max_length=12, **flags)  # which win over the run's own
    shorter = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in shorter] == [row["text"] for row in rows]
    assert shorter[0]["prediction"] != rows[0]["prediction"]


def test_a_t5_that_gives_nan_ends_in_one_line_and_leaves_nothing(world, tmp_path, capsys):
    t5 = shutil.copytree(world / "t5", tmp_path / "t5")
    weights = {name: w * math.nan for name, w in load_file(t5 / "model.safetensors").items()}
    save_file(weights, t5 / "model.safetensors", {"format": "pt"})
    save_prompt(tmp_path / "p", torch.zeros(3, 64), metapt.load_t5(t5)[0])
    books = tmp_path / "books"  # of which no test text is a training text
    data.write_task(
        books, SENTIMENT, {"train": make_examples(20), "test": [{"text": "a", "label": 0}]}
    )
    out, texts = tmp_path / "out.jsonl", put(tmp_path / "a.txt", "fine\n")
    for command in (
        lambda: learn(world, tmp_path / "run", model=t5),
        lambda: few(world, tmp_path, task=books, model=t5, save=tmp_path / "tuned"),
        lambda: run(finetune, predict=texts, prompt=tmp_path / "p", task=books, out=out),
    ):
        message = "(loss|probability) is not finite; lower the learning rate, or give another model"
        assert re.search(message, ends_in_one_line(command, capsys))
    assert not list(tmp_path.glob("*/adapter_model.safetensors"))[1:] and not out.exists()
    assert not read_lines(tmp_path / "r.jsonl")


# ------------------------------------------------------------------- script.py: flags, ends, signals


def test_flags_beside_a_config_win_and_arguments_come_back(learned):
    file = learned / "arguments.json"
    args = train_meta.make_parser().parse(["--config", file, "--alpha", "0.3", "--restart"])
    changes = {"alpha": 0.3, "config": str(file), "restart": True}
    assert vars(args) == {**json.loads(file.read_text()), **changes}


ENDS = {
    "bad input": (InputError("x: bad\nmore"), "x: bad more\n", 2),
    "a file that is not there": (FileNotFoundError(2, "None", "x"), "x: None; check the path\n", 2),
    "the GPU's memory": (torch.OutOfMemoryError("CUDA\n"), "lower --tasks-per-pass, --batch-", 2),
    "Ctrl-C": (KeyboardInterrupt(), "stopped; give the same command again\n", 130),
}


@pytest.mark.parametrize("kind", ENDS)
def test_an_end_is_one_line_and_a_status(kind, capsys):
    error, line, status = ENDS[kind]
    with pytest.raises(SystemExit) as stop:
        script.run(raises(error))
    printed = capsys.readouterr().err
    assert stop.value.code == status and line in printed and printed.count("\n") == 1


OUT = "--source {demo}/source/clustered.jsonl --model {demo}/t5 --out "
BOOKS = "--task {demo}/books --model {demo}/t5 "
SOURCE = "--source {demo}/source/examples.jsonl --method random "
BAD_FLAGS = [
    (data, "convert sst5 --train a --test b --test-share 0.5 --out x", "where there is no --test"),
    (cluster, SOURCE + "--k 9999", "examples cannot make .9999. clusters"),
    (cluster, SOURCE + "--out {demo}/source/examples.jsonl", "its clusters would be written over"),
    (cluster, SOURCE + "--out x.json", "--out must end in .jsonl"),
    (train_meta, OUT + "x --device gpu", "--device gpu: .*; give cpu or cuda"),
    (train_meta, OUT + "{demo}/maml.json", "maml.json.*: cannot be written: File exists"),
    (train_meta, OUT + "x --init nothing", "nothing/adapter_config.json: No such file"),
    (train_meta, "--sources x", "the following arguments are required: --source"),
    (train_meta, "--config none.json", "none.json: No such file or directory"),
    (finetune, "--task nothing --model {demo}/t5", "nothing.*: No such file or directory"),
    (finetune, "--task {demo}/books --model ./t6", "./t6: no such folder; give a T5 by hub"),
    (
        finetune,
        "--task {demo}/books {demo}/../demo/books --model {demo}/t5",
        "two tasks have one name",
    ),
    (finetune, BOOKS + "--prompt {demo}/t5", "t5/adapter_config.json: No such file or dir"),
    (finetune, BOOKS + "--save x --prompt {demo}/t5 x/t5", "two of the prompts have one name"),
    (finetune, BOOKS + "--out {demo}", "demo: Is a directory"),
    (finetune, BOOKS + "--method ft --save tuned", "--save keeps tuned prompts, and full"),
    (finetune, BOOKS + "--method ft --dtype bfloat16", "--dtype bfloat16 is for a frozen"),
    (finetune, "--predict {demo}/pt.json", "--predict needs one --prompt FOLDER"),
    (finetune, "", "--task FOLDER is needed"),
]


@pytest.mark.parametrize("script, flags, message", BAD_FLAGS)
def test_a_bad_flag_ends_in_one_line(world, tmp_path, capsys, monkeypatch, script, flags, message):
    monkeypatch.chdir(tmp_path)
    words = flags.format(demo=world).split()
    assert re.search(message, ends_in_one_line(lambda: script.main(words), capsys))
    assert not [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")]


# ------------------------------------------------------ Bad input: one line, and nothing left behind


def read_flags(path):
    words = ["--config", path, "--source", "clusters.jsonl", "--out", "x"]
    return train_meta.make_parser().parse(words)


def predict(path):
    run(finetune, predict=path, prompt="prompt", task=".", device="cpu")


def convert(path):
    data.convert(path.name.split(".")[0], {"train": path}, path.with_name("task"))


FINE = '{"text": "fine", "label": 2}\n'
CLUSTERED = '{"text": "a", "label": 0, "cluster": 0}\n'
RESULT = '{"identity": "1", "settings": {}, "accuracy": 0.5}\n'
XML = "<s><sentence><text>fine</text><Opinion polarity='%s'/></sentence></s>"
GOOD = {  # a file and the text in it, or what the fixture `place` makes; its reader
    "task.json": (json.dumps(vars(SENTIMENT)), Task.load),
    "flags.json": ('{"validation": 2, "batch_size": 1}', read_flags),
    "train.jsonl": (FINE * 3, lambda path: list(data.read_examples(path, SENTIMENT))),
    "texts.jsonl": (FINE * 3, predict),
    "clusters.jsonl": (
        CLUSTERED * 9,
        lambda path: train_meta.read_source(read_flags("flags.json"), SENTIMENT),
    ),
    "results.jsonl": (RESULT * 3, finetune.read_results),
    "prompt": (None, lambda folder: load_prompt(folder, 16)),
    "run": (None, train_meta.read_checkpoint),
    "t5": (None, metapt.load_t5),
    "labeller": (None, lambda folder: data.load_classifier(folder, "cpu")),
    "sst5.txt": ("(3 (2 It) (4 works))\n" * 3, convert),
    "amazon2.csv": ('"1","fine"\n' * 3, convert),
    "sentihood.json": ('[{"text": "fine", "opinions": [{"sentiment": "Positive"}]}]', convert),
    "semeval_laptop.xml": (XML % "positive", convert),
    "corpus.tar": (None, lambda path: list(data.read_corpus([path]))),
}


@pytest.fixture
def place(learned, labeller, tokenizer, tmp_path, monkeypatch):
    """A folder of all that GOOD names, each as it should be."""
    monkeypatch.chdir(tmp_path)
    for name, (content, _) in GOOD.items():
        if content:
            put(tmp_path / name, content)
    put_tar(tmp_path / "corpus.tar", {"a.txt": "fine\n" * 9999})
    shutil.copytree(labeller, tmp_path / "labeller")
    shutil.copytree(learned, tmp_path / "run")
    data.save_model(tmp_path / "t5", make_t5(tokenizer), tokenizer)
    save_prompt(tmp_path / "prompt", torch.zeros(3, 16), metapt.load_t5(tmp_path / "t5")[0])
    return tmp_path


def test_good_files_are_taken_with_the_line_ends_of_windows_too(place):
    for name, (content, read) in GOOD.items():
        read(place / name)
        if content:
            read(put(place / name, "\ufeff" + content.replace("\n", "\r\n")))


class Malicious:
    """A pickle that creates a file when it is read."""

    def __reduce__(self):
        return open, ("created", "w")


def pickled(path):
    with open(path, "wb") as file:
        torch.save({"prompt_embeddings": Malicious()}, file)


def pickled_beside(path):
    path.unlink()
    pickled(path.with_name("pytorch_model.bin"))


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tensors(values):
    return lambda path: save_file({"prompt_embeddings": torch.tensor(values)}, path)


def entry(name, value):
    """Changes a value of the JSON object in a file."""
    return lambda path: put(path, json.dumps({**json.loads(path.read_text()), name: value}))


TASK, FLAGS, TRAIN, TEXTS = "task.json", "flags.json", "train.jsonl", "texts.jsonl"
CLUSTERS, RESULTS = "clusters.jsonl", "results.jsonl"
PROMPT, CONFIG = "prompt/adapter_model.safetensors", "prompt/adapter_config.json"
T5, RUN = "t5/model.safetensors", "run/checkpoint.safetensors"
SENTIHOOD, SEMEVAL = "sentihood.json", "semeval_laptop.xml"
MASKED = "a template that holds {mask} once"
BAD = {  # what is wrong: the file, what stands in it, and a part of the line
    "a task that is a list": (TASK, "[]", "not a JSON object but a list"),
    "brackets without end": (TASK, "[" * 10**5, "give a whole file of JSON"),
    "a task without words": (TASK, '{"name": "a", "template": "{text} {mask}"}', "'words' is miss"),
    "a template without a mask": (TASK, entry("template", "{text}"), MASKED),
    "a template with an open brace": (TASK, entry("template", "{text} {mask"), MASKED),
    "a word twice": (TASK, entry("words", ["good", "good"]), "two or more words, all different"),
    "a name that leads elsewhere": (TASK, entry("name", "../up"), "a name without a slash"),
    "a name that is a number": (TASK, entry("name", 5), "a name without a slash"),
    "a flag that is none": (FLAGS, entry("nothing", 1), "unrecognized arguments: --nothing"),
    "a seed and a half": (FLAGS, entry("seed", 1.5), "1.5 is not a whole number"),
    "a seed without end": (FLAGS, entry("seed", 10**20), "is not a whole number of 0 or more"),
    "half a line": (TRAIN, FINE + '{"text": "fi', "jsonl:2: .*write examples, as"),
    "a line in Latin-1": (TRAIN, f"{FINE}caf\xe9".encode("latin-1"), "jsonl:2: .* UTF-8 text"),
    "no text": (TRAIN, FINE + '{"label": 0}', "jsonl:2: it has no text 'text'"),
    "a label beyond the words": (TRAIN, FINE.replace("2", "5"), "jsonl:1: label 5 is none of"),
    "half a character": (TRAIN, FINE.replace("fine", "\\ud800"), "jsonl:1: .*surrogates"),
    "half a character beside": (TRAIN, '{"id": "\\ud800", "text": "a", "label": 0}', "surrogates"),
    "a wrong label to predict": (TEXTS, FINE.replace("2", "7"), "jsonl:1: label 7 is none of"),
    "a line without a cluster": (CLUSTERS, CLUSTERED * 9 + FINE, "no clusters, or not for every"),
    "a cluster that is too small": (CLUSTERS, CLUSTERED, "cluster 0 has 1 examples; 2 to train"),
    "an accuracy of 2": (RESULTS, RESULT.replace("0.5", "2"), "jsonl:1: the accuracy is no share"),
    "a result without identity": (RESULTS, '{"accuracy": 0, "settings": {}}', "'identity' is miss"),
    "a pickle as a prompt": (PROMPT, pickled, "as safetensors"),
    "a prompt of NaN": (PROMPT, tensors([[math.nan] * 16]), "its numbers are not finite"),
    "a prompt that is a LoRA": (CONFIG, entry("peft_type", "LORA"), "not a soft prompt"),
    "half a checkpoint": (RUN, half, "--restart begins anew"),
    "a pickle as a T5": (T5, pickled_beside, "give a T5 by hub name or folder"),
    "half a T5": (T5, half, "give a T5 by hub name or folder"),
    "a T5 that is a BERT": ("t5/config.json", entry("model_type", "bert"), "it is no T5 but bert"),
    "a tree that does not close": ("sst5.txt", "(3 (2 It)", "txt:1: not a tree"),
    "a class that Amazon has not": ("amazon2.csv", '"1","a"\n"3","x"\n', "csv:2: not a class from"),
    "a quote that stays open": ("amazon2.csv", '"1","a"\n"1","open', "csv:2: .*official CSV"),
    "an opinion of no kind": (SENTIHOOD, '[{"text": "a", "opinions": [3]}]', "give the array"),
    "XML that does not close": (SEMEVAL, "<a></b>", "give the XML of SemEval"),
    "an opinion that is odd": (SEMEVAL, XML % "odd", "no labelled text here"),
    "half a corpus": ("corpus.tar", half, "give the whole file"),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_ends_in_one_line(place, capsys, problem):
    name, content, part = BAD[problem]
    content(place / name) if callable(content) else put(place / name, content)
    before = sorted(place.rglob("*"))
    first = name.split("/")[0]
    line = ends_in_one_line(lambda: GOOD[first][1](place / first), capsys)
    assert first in line and re.search(part, line)
    assert sorted(place.rglob("*")) == before


# ---------------------------------------------------------------- The README: what it shows, is there

PAGES = [HOUSE / name / "README.md" for name in (".", "figures", "offline")]
PAGES = {page: page.read_text(encoding="utf-8") for page in PAGES if page.exists()}
README = PAGES[HOUSE / "README.md"]


@functools.cache
def help_of(file, *words):
    """What a script, or one of its commands, prints for --help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(sys, "argv", [str(file), *words, "--help"])
        patch.setattr(sys, "stdout", printed)
        runpy.run_path(str(file), run_name="__main__")
    return printed.getvalue()


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_the_snippets_of_the_readme_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "mine.csv", "review,verdict\n" + "fine,good\n" * 102)
    load_t5 = metapt.load_t5
    monkeypatch.setattr(metapt, "load_t5", lambda name: load_t5(world / "t5"))  # for a hub's too
    for snippet in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        exec(snippet, {})
    examples = list(data.read_examples(Path("mine", "train.jsonl"), Task.load("mine")))
    assert examples == [{"text": "fine", "label": 1}] * 2


def test_every_flag_and_file_in_the_pages_is_there():
    known = {"--nproc", "--no-deps", "--no-binary", "--index-url"}  # torchrun's, pip's
    for kind in ("convert", "labeller", "pseudo-label"):
        known |= flags_in(help_of(HOUSE / "data.py", kind))
    for page, text in PAGES.items():
        for name in set(re.findall(r"[\w/]+\.py\b", text)):
            places = [place / name for place in (HOUSE, page.parent) if (place / name).exists()]
            assert places, f"{page} names {name}"
            if name not in ("metapt.py", "script.py"):
                known |= flags_in(help_of(places[0]))
    assert not flags_in("".join(PAGES.values())) - known


def test_the_map_names_functions_that_name_the_papers_place():
    rows = README.split("## The map")[1].split("\n## ")[0].split("\n|")[3:]
    checked = 0
    for row in rows:
        paper, code = row.split("|")[:2]
        for short, long in {"§": "Section ", "Eq.": "Equation", "App.": "Appendix"}.items():
            paper = paper.replace(short, long)
        places = re.findall(r"(?:Section|Equation|Table|Figure|Appendix) [\w.]+|[ABC]\.\d", paper)
        for file, name in re.findall(r"`(?:([\w/]+\.py): )?([\w.]+)`", code):
            if file:
                module = runpy.run_path(str(HOUSE / file))
            first, *parts = name.split(".")
            value = functools.reduce(getattr, parts, module[first])
            if callable(value) and places:
                assert any(place in value.__doc__ for place in places), name
                checked += 1
    assert checked > 30
