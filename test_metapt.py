"""
The sanity checks, on a tiny T5 made here; nothing is downloaded. Run as a script it is the benchmark.

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
import shutil
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BertConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM, T5Config,
                          T5ForConditionalGeneration)
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

import cluster
import data
import finetune
import metapt
import train_meta
from metapt import InputError, PromptedT5, Task, adapt, load_prompt, meta_gradient, save_prompt

SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])
SHAPES = {  # of the public T5s, for the benchmark; `tiny` is the tests' own
    "tiny": dict(d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2),
    "small": dict(d_model=512, d_kv=64, d_ff=2048, num_heads=8, num_layers=6, vocab_size=32128),
    "base": dict(d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12, vocab_size=32128),
    "large": dict(d_model=1024, d_kv=64, d_ff=4096, num_heads=16, num_layers=24, vocab_size=32128),
    "xl": dict(d_model=2048, d_kv=64, d_ff=5120, num_heads=32, num_layers=24, vocab_size=32128,
               feed_forward_proj="gated-gelu", tie_word_embeddings=False),  # T5 v1.1
}


def make_tokenizer():
    reviews = [review["text"] for domain in data.DOMAINS for review in data.write_reviews(domain, 200, random.Random(0))]
    return data.demo_tokenizer([*reviews, "it was " + " ".join(data.WORDS[5]), "yes maybe no ? a b c"])


def make_t5(tokenizer, shape="tiny", **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, "pad_token_id": 0, **SHAPES[shape], **changes}
    return T5ForConditionalGeneration(T5Config(**shape))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def layer_norm(self, x):
    """T5's layer norm, which transformers has square in float32 even where the model is float64."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def exact(monkeypatch):
    """Lets a float64 T5 compute in float64 throughout."""
    monkeypatch.setattr(T5LayerNorm, "forward", layer_norm)


@pytest.fixture(params=["relu, tied", "gated-gelu, untied"])  # T5, and T5 v1.1
def model(request, exact, tokenizer):
    kind, tied = request.param.split(", ")
    t5 = make_t5(tokenizer, feed_forward_proj=kind, tie_word_embeddings=tied == "tied").double()
    with torch.no_grad():  # large enough weights that the second derivative is no small thing
        for parameter in t5.parameters():
            parameter.mul_(1.5)
    return PromptedT5(t5, tokenizer, SENTIMENT, max_length=32)


def plain(model):
    """A copy of the model with the T5 as transformers has it: cross-attention included, and no fused attention."""
    model = copy.deepcopy(model)
    for block in model.t5.decoder.block:
        block.layer[1].EncDecAttention.__class__ = T5Attention
    model.t5.set_attn_implementation("eager")
    return model


def make_examples(count, seed=0, domain="films"):
    return data.write_reviews(domain, count, random.Random(seed))


def make_tasks(model, sizes=((3, 4), (2, 2), (4, 1))):
    """Supports and queries of unequal sizes and lengths."""
    supports = [model.encode(make_examples(m, i, domain)) for i, ((m, _), domain) in enumerate(zip(sizes, data.DOMAINS))]
    queries = [model.encode(make_examples(m, 9 + i, d)) for i, ((_, m), d) in enumerate(zip(sizes, data.DOMAINS))]
    return supports, queries


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------ Section 3: [P; H(x)] and the T5


def test_prompt_of_embedding_rows_is_text_in_front(model):
    examples = make_examples(3)
    batch = model.encode(examples)
    ids = torch.tensor([[5, 9, 4]])
    prompt, t5 = model.t5.get_input_embeddings()(ids)[0].detach(), plain(model).t5
    for row, example in enumerate(examples):
        text = torch.cat([ids[0], model.encode([example])["input_ids"][0]])[None]
        expected = t5(input_ids=text, decoder_input_ids=model.decoder_ids).logits[0, 1]
        torch.testing.assert_close(model(prompt, batch)[row], expected)


def test_no_prompt_is_the_t5_itself(model):
    batch = model.encode(make_examples(1))
    expected = plain(model).t5(input_ids=batch["input_ids"], decoder_input_ids=model.decoder_ids).logits[:, 1]
    torch.testing.assert_close(model(model.init_prompt(0), batch), expected)


def test_a_wrapped_t5_still_generates_as_before(model):
    batch = model.encode(make_examples(3))
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 6}
    assert torch.equal(model.t5.generate(**ids), plain(model).t5.generate(**ids))


def test_full_tuning_has_the_dropout_of_a_plain_t5(tokenizer):
    model = PromptedT5(make_t5(tokenizer, dropout_rate=0.5), tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(0), model.encode(make_examples(4))
    reference = plain(model)
    logits = []
    for module in (model, reference):
        for name, part in module.t5.named_modules():
            part.training = "EncDecAttention" in name and not list(part.children()) or name.endswith("EncDecAttention")
        torch.manual_seed(0)
        logits.append(module(prompt, batch))
    torch.testing.assert_close(*logits)
    assert not torch.equal(logits[0], model(prompt, batch))


def test_shapes_and_one_prompt_for_each_example(model):
    prompt, batch = model.init_prompt(6).double(), model.encode(make_examples(4))
    assert prompt.shape == (6, 16) and model(prompt, batch).shape == (4, len(model.tokenizer))
    prompts = torch.stack([model.init_prompt(6, seed).double() for seed in range(4)])
    each = torch.cat([model(prompts[i], metapt.select(batch, [i])) for i in range(4)])
    torch.testing.assert_close(model(prompts, batch), each)
    assert not torch.equal(model.init_prompt(6, 1), model.init_prompt(6, 2))
    assert torch.equal(model.init_prompt(6, 1), model.init_prompt(6, 1))


def test_padding_changes_nothing(model):
    prompt, batch = model.init_prompt(4).double(), model.encode(make_examples(4))
    longer = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=7),
              "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 9))}
    torch.testing.assert_close(model(prompt, longer), model(prompt, batch))


def test_loss_predict_and_evaluate_agree_with_their_definitions(model):
    prompt, batch = model.init_prompt(4).double(), model.encode(make_examples(7))
    logits = model(prompt, batch)
    words = model.tokenizer.convert_tokens_to_ids(SENTIMENT.words)
    chosen = [words[label] for label in batch["labels"]]
    expected = -logits.log_softmax(-1)[range(7), chosen]
    torch.testing.assert_close(model.loss(prompt, batch), expected.mean())
    labels = [max(range(5), key=lambda c: row[words[c]].item()) for row in logits]
    assert model.predict(prompt, batch).tolist() == labels
    scores = model.evaluate(prompt, [metapt.select(batch, [0, 1, 2, 3]), metapt.select(batch, [4, 5, 6])])
    assert scores["accuracy"] == pytest.approx(np.mean(np.array(labels) == batch["labels"].numpy()))
    assert scores["loss"] == pytest.approx(expected.mean().item())
    pairs = list(zip(batch["labels"].tolist(), labels))
    assert scores["confusion"] == [[pairs.count((true, said)) for said in range(5)] for true in range(5)]
    assert scores["in_words"] == pytest.approx(np.mean([row.argmax().item() in words for row in logits]))


def test_truncation_cuts_the_text_and_never_the_template(tokenizer):
    t5 = make_t5(tokenizer)
    words = tokenizer.convert_ids_to_tokens
    model = PromptedT5(t5, tokenizer, SENTIMENT, max_length=10)
    ids = model.encode([{"text": "gripping plot " * 50}])["input_ids"][0]
    assert words(ids) == ["gripping", "plot"] * 3 + ["it", "was", "<extra_id_0>", "</s>"]
    pair = Task("pair", "{premise} ? {mask} {hypothesis}", ["yes", "no"])
    ids = PromptedT5(t5, tokenizer, pair, 10).encode([{"premise": "plot " * 9, "hypothesis": "music bad"}])["input_ids"]
    assert words(ids[0]) == ["plot"] * 5 + ["?", "<extra_id_0>", "music", "bad", "</s>"]
    with pytest.raises(InputError, match="template .* longer than 3"):
        PromptedT5(t5, tokenizer, SENTIMENT, max_length=3).encode([{"text": "plot"}])


def test_encode_refuses_a_label_without_a_word(tokenizer):
    with pytest.raises(InputError, match=r"labels \[0, 5\] are not all indices"):
        PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT).encode([{"text": "a", "label": 0}, {"text": "b", "label": 5}])


def make_unigram_tokenizer():
    """A tokenizer with marks of new words, as T5's own has."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁It", "▁was", "▁bad", "▁good", ".", "▁.", "▁plot", "plot", "ish", "<", "a", "_"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - len(piece) / 100) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens=["<extra_id_0>"])


def test_template_pieces_with_a_sentencepiece_tokenizer():
    tokenizer = make_unigram_tokenizer()
    t5 = make_t5(tokenizer)
    task = Task("full stop", "{text} It was {mask}.", ["bad", "good"])
    ids = PromptedT5(t5, tokenizer, task).encode([{"text": "plot"}])["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁plot", "▁It", "▁was", "<extra_id_0>", ".", "</s>"]
    ids = PromptedT5(t5, tokenizer, task).encode([{"text": "plot <extra_id_0> </s>"}])["input_ids"][0]
    assert (ids == tokenizer.convert_tokens_to_ids("<extra_id_0>")).sum() == 1 and (ids == 1).sum() == 1
    with pytest.raises(InputError, match="'badish' is not one piece"):
        PromptedT5(t5, tokenizer, Task("words", data.TEMPLATE, ["good", "badish"]))


@pytest.mark.parametrize("template, words", [
    ("{text} It was", ["bad", "good"]), ("{mask}", ["bad", "good"]), ("{text} {mask} {mask}", ["bad", "good"]),
    ("{text {mask}", ["bad", "good"]), ("{} {mask}", ["bad", "good"]), (data.TEMPLATE, ["bad"]),
    (data.TEMPLATE, ["bad", "bad"])])
def test_bad_tasks_are_refused(template, words):
    with pytest.raises(InputError, match="task wrong: "):
        Task("wrong", template, words)


# ------------------------------------------------------------------------------------------------- Equations 1 and 2


def textbook_loop(model, prompt, supports, queries, alpha):
    """Equations 1 and 2 as they are written: task after task, one prompt, one graph."""
    P = prompt.detach().clone().requires_grad_()
    total = 0
    for support, query in zip(supports, queries):
        gradient, = torch.autograd.grad(model.loss(P, support), P, create_graph=True)
        total = total + model.loss(P - alpha * gradient, query)
    return torch.autograd.grad(total, P)[0], total.detach()


def functional(model, prompt, supports, queries, alpha):
    """The same by torch.func."""
    def meta_loss(P):
        return sum(model.loss(P - alpha * torch.func.grad(model.loss)(P, support), query)
                   for support, query in zip(supports, queries))
    gradient, total = torch.func.grad_and_value(meta_loss)(prompt)
    return gradient, total


@pytest.fixture
def meta(model):
    return model, model.init_prompt(3).double(), *make_tasks(model), 0.5


def test_meta_gradient_against_finite_differences(meta):
    model, prompt, supports, queries, alpha = meta

    def meta_loss(P):
        return sum(model.loss(adapt(model, P, support, alpha), query).item()
                   for support, query in zip(supports, queries))

    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha)
    assert loss.item() == pytest.approx(meta_loss(prompt), rel=1e-12)
    numeric = torch.zeros_like(prompt)
    step = 1e-6
    for index in np.ndindex(*prompt.shape):
        change = torch.zeros_like(prompt)
        change[index] = step
        numeric[index] = (meta_loss(prompt + change) - meta_loss(prompt - change)) / (2 * step)
    assert relative_error(gradient, numeric) < 1e-6


@pytest.mark.parametrize("tasks_per_pass", [None, 1, 2])
def test_meta_gradient_against_the_textbook_loop(meta, tasks_per_pass):
    model, prompt, supports, queries, alpha = meta
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha, tasks_per_pass=tasks_per_pass)
    expected, expected_loss = textbook_loop(plain(model), prompt, supports, queries, alpha)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)


def test_meta_gradient_against_torch_func(meta):
    model, prompt, supports, queries, alpha = meta
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha)
    expected, expected_loss = functional(plain(model), prompt, supports, queries, alpha)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("size", [1, 1000])
def test_meta_gradient_in_passes_of_one_length(meta, monkeypatch, size):
    model, prompt, supports, queries, alpha = meta
    expected, expected_loss = textbook_loop(plain(model), prompt, supports, queries, alpha)
    monkeypatch.setattr(metapt, "PASS_SIZE", {"cpu": size})
    seen = []
    loss = model.loss
    monkeypatch.setattr(model, "loss", lambda P, batch, **kw: seen.append(batch["attention_mask"]) or loss(P, batch, **kw))
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha)
    assert relative_error(gradient, expected) < 1e-10
    torch.testing.assert_close(loss, expected_loss)
    assert len(seen) > 2 and all(mask.all() for mask in seen) == (size == 1)


def test_first_order_drops_the_hessian_and_nothing_else(meta):
    model, prompt, supports, queries, alpha = meta
    exact, loss = meta_gradient(model, prompt, supports, queries, alpha)
    first, first_loss = meta_gradient(model, prompt, supports, queries, alpha, first_order=True)
    expected = torch.zeros_like(prompt)
    for support, query in zip(supports, queries):  # the query loss's gradient at P'_i, as if P'_i were P
        adapted = adapt(model, prompt, support, alpha).detach().requires_grad_()
        expected += torch.autograd.grad(model.loss(adapted, query), adapted)[0]
    assert relative_error(first, expected) < 1e-10
    torch.testing.assert_close(loss, first_loss)
    assert relative_error(first, exact) > 1e-3


class Quadratic:
    """Stands in for the model: L(P) = ½ (p - c)ᵀ A (p - c), with A and c chosen by an example's label."""

    class tokenizer:
        pad_token_id = 0

    def __init__(self, kinds, size):
        generator = torch.Generator().manual_seed(0)
        roots = torch.randn(kinds, size, size, generator=generator, dtype=torch.float64)
        self.A, self.c = roots @ roots.mT, torch.randn(kinds, size, generator=generator, dtype=torch.float64)

    def loss(self, prompts, batch, reduction):
        away = prompts.flatten(1) - self.c[batch["labels"]]
        return 0.5 * torch.einsum("bi,bij,bj->b", away, self.A[batch["labels"]], away)

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
    gradient, _ = meta_gradient(model, prompt, supports, queries, alpha)
    torch.testing.assert_close(gradient.flatten(), expected)


def test_stacked_adapt_equals_the_loop_and_moves_no_input(meta):
    model, prompt, supports, _, alpha = meta
    before = prompt.clone()
    stacked = adapt(model, prompt.repeat(len(supports), 1, 1), supports, alpha)
    for i, support in enumerate(supports):
        torch.testing.assert_close(stacked[i], adapt(model, prompt, support, alpha))
    assert torch.equal(prompt, before) and not prompt.requires_grad
    gradient, loss = meta_gradient(model, prompt, [], [], alpha)  # the share of a process more than there are tasks
    assert gradient.shape == prompt.shape and not gradient.any() and loss.item() == 0
    with pytest.raises(InputError, match="3 supports and 1 queries"):
        meta_gradient(model, prompt, supports, supports[:1], alpha)


# ---------------------------------------------------------------------------------------------------- prompts as files


def test_prompt_round_trip_in_pefts_layout(tmp_path, tokenizer):
    t5 = make_t5(tokenizer)
    prompt = torch.randn(4, 16)
    save_prompt(tmp_path / "prompt", prompt, t5, method="maml", step=7)
    loaded, facts = load_prompt(tmp_path / "prompt", width=16)
    assert torch.equal(loaded, prompt) and facts["step"] == 7
    assert sorted(p.name for p in (tmp_path / "prompt").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metapt.json"]
    with pytest.raises(InputError, match="width 16"):
        load_prompt(tmp_path / "prompt", width=32)
    weights = tmp_path / "prompt" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a prompt"):
        load_prompt(tmp_path / "prompt")
    with pytest.raises(InputError, match="not a JSON object"):
        load_prompt(tmp_path / "nothing")


def test_peft_reads_our_prompt_with_the_same_logits(tmp_path, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT)
    prompt, batch = model.init_prompt(5), model.encode(make_examples(3))
    save_prompt(tmp_path / "prompt", prompt, model.t5)
    theirs = peft.PeftModel.from_pretrained(make_t5(tokenizer), tmp_path / "prompt").eval()
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = theirs(**ids, decoder_input_ids=model.decoder_ids.repeat(3, 1)).logits[:, 1]
    torch.testing.assert_close(model(prompt, batch), logits, atol=1e-5, rtol=0)
    generated = theirs.generate(**ids, decoder_input_ids=model.decoder_ids.repeat(3, 1), max_new_tokens=1)
    assert torch.equal(generated[:, 2], model(prompt, batch).argmax(-1))


def test_a_prompt_of_peft_is_read(world, tmp_path, tokenizer, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    t5, tokenizer = metapt.load_t5(world / "t5")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1)
    theirs = peft.get_peft_model(t5, config)
    theirs.save_pretrained(tmp_path / "theirs")
    prompt, _ = load_prompt(tmp_path / "theirs", width=64)
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_transformer_submodules": 1', '"num_transformer_submodules": 2'))
    with pytest.raises(InputError, match="it has a part for the decoder"):
        load_prompt(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(prompt, theirs.prompt_encoder.default.embedding.weight)
    (tmp_path / "new.txt").write_text("the plot was gripping .\n", encoding="utf-8")
    finetune.main(["--predict", str(tmp_path / "new.txt"), "--prompt", str(tmp_path / "theirs"), "--model",
                   str(world / "t5"), "--task", str(world / "books"), "--device", "cpu"])
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    [label] = model.predict(prompt, model.encode([{"text": "the plot was gripping ."}])).tolist()
    assert json.loads(capsys.readouterr().out)["label"] == label
    row, = finetune_main(world, tmp_path / "results.jsonl", "--task", str(world / "books"), "--prompt",
                         str(tmp_path / "theirs"), "--seeds", "1")
    assert row["method"] == "PEFT"


def test_a_model_that_is_no_t5_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no T5 but bert"):
        metapt.load_t5(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        metapt.load_t5(tmp_path / "nothing")


# ----------------------------------------------------------------------------------------- data: splits and readers


def test_few_shot_splits_are_disjoint_and_reproducible():
    examples = [{"text": str(i), "label": i % 5} for i in range(200)]
    training, validation = data.few_shot(examples, 40, seed=1)
    again = data.few_shot(examples, 40, seed=1)
    texts = {example["text"] for example in training + validation}
    assert (training, validation) == again and len(texts) == 80 and len(training) == 40
    assert data.few_shot(examples, 40, seed=2)[0] != training
    balanced, others = data.few_shot(examples[:3] + examples[3::5] + examples[4::5] + examples[:60], 20, 1, 20, True)
    for part in (balanced, others):
        assert sorted(example["label"] for example in part) == sorted([0, 1, 2, 3, 4] * 4)
    with pytest.raises(InputError, match="lower --shots"):
        data.few_shot(examples, 101, seed=1)


def test_read_sst(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("(3 (2 It) (4 (2 's) (4 (2 -LRB-) (4 (3 quite) (4 (4 good\\/great) (2 -RRB-))))))\n"
                    "(2 (2 neutral) (2 .))\n\n(0 (1 1\xa01\\/2) (0 bad))\n", encoding="utf-8")
    assert list(data.read_sst(path, 5)) == [("It 's ( quite good/great )", 3), ("neutral .", 2), ("1 1/2 bad", 0)]
    assert [label for _, label in data.read_sst(path, 2)] == [1, "neutral", 0]
    for wrong in ("(3 (2 It) (4 works)", "It works", "(7 (2 It) (2 works))"):
        path.write_text("(2 (2 fine) (2 .))\n" + wrong + "\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"train.txt:2: not a tree"):
            list(data.read_sst(path, 5))


ZHANG_TRAPS = [  # a line of the official CSV, and the text that was written
    ('"5","plain"', "plain"), ('"1","a, b\\nc\\n\\nd"', "a, b\nc\n\nd"), ('"2","he said \\""no\\""."', 'he said "no".'),
    ('"3","\\""all quoted\\"""', '"all quoted"'), ('"4","ends in a backslash \\"', "ends in a backslash \\"),
    ('"5","two ""quotes"""', 'two "quotes"'), ('"1","caf\u00e9 :\\\\nnext"', "caf\u00e9 :\\\nnext"), ('"2"," "', "")]


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


@pytest.mark.parametrize("name", ["yelp_review_full_csv.tgz", "yelp.zip", "train.csv", "train.csv.gz", "train.csv.xz"])
def test_convert_yelp_packed_or_not(tmp_path, name, capsys):
    train = "\n".join(line for line, _ in ZHANG_TRAPS) + "\n"
    source = pack(tmp_path / name, {"yelp/train.csv": train, "yelp/readme.txt": "?", "yelp/test.csv": '"1","x"\n'})
    data.main(["convert", "yelp5", "--input", str(source), "--out", str(tmp_path / "task")])
    assert read_lines(tmp_path / "task" / "train.jsonl") == [
        {"text": text, "label": int(line[1]) - 1} for line, text in ZHANG_TRAPS[:-1]]
    assert (tmp_path / "task" / "test.jsonl").exists() == name.startswith("yelp")
    assert "kept 7 for train: 2 terrible, 1 bad" in (out := capsys.readouterr().out) and "1 (empty text)" in out


def test_read_amazon_joins_title_and_text(tmp_path):
    path = pack(tmp_path / "train.csv", {"": '"2","Great","CD, \\""really\\"""\n"1","","no title"\n\n"1","only",""\n'})
    assert list(data.read_zhang(path, 2)) == [('Great CD, "really"', 1), ("no title", 0), ("only", 0)]


@pytest.mark.parametrize("line", ['"6","x"', '"5"', '"x","y"', '"1","a","b","c"', '"1","a" b', '"1","no end', "\xff"])
def test_a_broken_csv_is_named_by_line_and_leaves_nothing(tmp_path, line):
    (tmp_path / "train.csv").write_bytes(b'"5","fine"\n' + line.encode("latin1") + b"\n")
    with pytest.raises(InputError, match=r"train.csv:2: not "):
        data.convert("yelp5", tmp_path, tmp_path / "task", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_a_cut_off_download_is_an_error(tmp_path):
    for name in ("train.csv.gz", "train.csv.xz"):
        path = pack(tmp_path / name, {"": '"5","fine"\n' * 9})
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match="broken or cut off"):
            list(data.read_zhang(path, 5))


def test_read_sst2_of_glue(tmp_path):
    path = pack(tmp_path / "SST-2.zip", {"SST-2/train.tsv": 'sentence\tlabel\na "quote\t1\nfine \t0\n', "SST-2/dev.tsv":
                                         "sentence\tlabel\nx\t1\n", "SST-2/test.tsv": "index\tsentence\n0\ty\n"})
    assert data.find_splits(path, data.DATASETS["sst2"][2]) == {
        "train": path / "SST-2/train.tsv", "test": path / "SST-2/dev.tsv"}
    assert list(data.read_sst2(path / "SST-2/train.tsv")) == [('a "quote', 1), ("fine", 0)]
    with pytest.raises(InputError, match="test.tsv:1: not GLUE"):
        list(data.read_sst2(path / "SST-2/test.tsv"))


def test_read_sentihood(tmp_path):
    def sentence(text, *sentiments):
        return {"id": 1, "text": text, "opinions": [{"sentiment": s, "aspect": "safety", "target_entity": "LOCATION1"}
                                                    for s in sentiments]}
    path = tmp_path / "sentihood-train.json"
    path.write_text("\ufeff" + json.dumps([sentence("  LOCATION1 is safe ", "Positive", "Positive"),
                                           sentence("rough", "Negative"), sentence("both", "Positive", "Negative"),
                                           sentence("nothing said")]), encoding="utf-8")
    assert list(data.read_sentihood(path)) == [("LOCATION1 is safe", 1), ("rough", 0), ("both", "mixed opinions"),
                                               ("nothing said", "no opinion")]
    path.write_text('{"text": "no array"}', encoding="utf-8")
    with pytest.raises(InputError, match="not the array of SentiHood"):
        list(data.read_sentihood(path))


SEMEVAL = """<?xml version="1.0" encoding="{encoding}" standalone="yes"?>
<Reviews><Review rid="1"><sentences>
<sentence id="1:0"><text>Café &amp; bar: good.</text><Opinions><Opinion polarity="positive" target="NULL"/></Opinions></sentence>
<sentence id="1:1" OutOfScope="TRUE"><text>Ignored.</text></sentence>
<sentence id="1:2"><text>So so.</text><Opinions><Opinion polarity="neutral"/><Opinion polarity="neutral"/></Opinions></sentence>
<sentence id="1:3"><text>Good and bad.</text><Opinions><Opinion polarity="positive"/><Opinion polarity="negative"/></Opinions></sentence>
<sentence id="1:4"><text>We went.</text><Opinions/></sentence>
<sentence id="1:5"><text>Bad.</text><Opinions><Opinion polarity="negative"/></Opinions></sentence>
</sentences></Review></Reviews>
"""


@pytest.mark.parametrize("encoding", ["UTF-8", "ISO-8859-1"])
def test_read_semeval(tmp_path, encoding):
    path = tmp_path / "ABSA16_Restaurants_Train_SB1_v2.xml"
    path.write_bytes(SEMEVAL.replace("\n", "\r\n").format(encoding=encoding).encode(encoding))
    assert list(data.read_semeval(path)) == [
        ("Café & bar: good.", 2), ("Ignored.", "out of scope"), ("So so.", 1), ("Good and bad.", "mixed opinions"),
        ("We went.", "no opinion"), ("Bad.", 0)]


def test_convert_counts_what_it_drops_and_can_make_a_test_split(tmp_path, capsys):
    path = tmp_path / "ABSA16_Restaurants_Train_SB1_v2.xml"
    path.write_text(SEMEVAL.format(encoding="UTF-8"), encoding="utf-8")
    data.main(["convert", "semeval_restaurant", "--input", str(tmp_path), "--out", str(tmp_path / "task"),
               "--test-share", "0.34"])
    printed = capsys.readouterr().out
    assert "kept 3 for train: 1 bad, 1 okay, 1 good" in printed
    assert "1 (out of scope), 1 (mixed opinions), 1 (no opinion)" in printed
    task = Task.load(tmp_path / "task")
    train, test = (list(data.read_examples(tmp_path / "task" / f"{s}.jsonl", task)) for s in ("train", "test"))
    assert len(train) == 2 and len(test) == 1 and not any(example in train for example in test)


@pytest.mark.parametrize("line, problem", [
    ("{", "not a JSON object"), ("[]", "not a JSON object"), ('{"label": 1}', "needs 'text'"),
    ('{"text": " ", "label": 1}', "needs 'text'"), ('{"text": "x", "label": 5}', "label 5 is not one of 0 to 4"),
    ('{"text": "x", "label": "1"}', "label '1'"), ('{"text": "x", "label": true}', "label True"),
    ('{"text": "x"}', "label None")])
def test_bad_examples_are_named_by_file_and_line(tmp_path, line, problem):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine", "label": 2}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"train.jsonl:3: .*{problem}"):
        list(data.read_examples(path, SENTIMENT))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_examples_are_read_packed_or_not(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    opener = {"gz": data.gzip.open, "xz": data.lzma.open}.get(suffix[-2:], open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write('{"text": "schön", "label": 2, "more": 1}\n')
    assert list(data.read_examples(path, SENTIMENT)) == [{"text": "schön", "label": 2, "more": 1}]


def make_openwebtext(path):
    """A tar of xz-compressed tars of .txt files, as OpenWebText is; one file is no UTF-8 text and one no text."""
    inner = [pack(path.with_name("a.tar"), {"0-a.txt": "First one. \"Second\" two!\n\n", "0-b.txt": b"\xff\xfe"}),
             pack(path.with_name("b.tar"), {"1-a.txt": "Mr. A. B. Smith came.  He saw 3 things? Yes.\n", "x.md": "no"})]
    subsets = {f"openwebtext/urlsf_subset0{i}_data.xz": data.lzma.compress(tar.read_bytes()) for i, tar in enumerate(inner)}
    return pack(path, subsets)


def test_read_corpus(tmp_path):
    path = make_openwebtext(tmp_path / "openwebtext.tar")
    assert list(data.read_corpus([path], "paragraph")) == [
        'First one. "Second" two!', None, "Mr. A. B. Smith came. He saw 3 things? Yes.", None]
    assert list(data.read_corpus([path], "sentence")) == [
        "First one.", '"Second" two!', None, "Mr. A. B. Smith came.", "He saw 3 things?", "Yes.", None]
    (tmp_path / "more.jsonl").write_text('{"text": "a\\nb"}\n{"text": "c"}\n', encoding="utf-8")
    assert list(data.read_corpus([tmp_path / "more.jsonl"] * 2, "paragraph")) == ["a", "b", "c"] * 2
    assert 3 < len(list(data.read_corpus([tmp_path / "more.jsonl"] * 20, "paragraph", 0.3))) < 40
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="broken or cut off"):
        list(data.read_corpus([path], "paragraph"))


@pytest.fixture(scope="session")
def labeller(tmp_path_factory, tokenizer):
    """A task of two classes that a bag of words tells apart, and the labeller trained on it from a tiny RoBERTa."""
    folder = tmp_path_factory.mktemp("labeller")
    reviews = [review for review in make_examples(600) if review["label"] in (0, 4)]
    data.write_task(folder / "task", Task("films", data.TEMPLATE, data.WORDS[2]),
                    {"train": [{**review, "label": review["label"] // 4} for review in reviews]})
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, type_vocab_size=1)).save_pretrained(folder / "roberta")
    tokenizer.save_pretrained(folder / "roberta")
    data.main(["labeller", "--task", str(folder / "task"), "--model", str(folder / "roberta"), "--out",
               str(folder / "labeller"), "--learning-rate", "0.005", "--warmup", "5", "--max-steps", "100", "--eval-every",
               "50", "--validation", "60", "--threads", "1", "--device", "cpu"])
    return folder / "labeller"


def pseudo_label(labeller, out, *flags):
    corpus = out.parent / "corpus.txt"
    corpus.write_text("".join(review["text"].replace(" .", " .\n", 1) + "\n" for review in make_examples(300, 5)))
    data.main(["pseudo-label", "--labeller", str(labeller), "--corpus", str(corpus), "--out", str(out), "--threads", "1",
               "--batch-size", "2", "--device", "cpu", *flags])
    return read_lines(out / "examples.jsonl"), json.loads((out / "funnel.json").read_text())


def test_labeller_learns_and_keeps_its_best(labeller):
    log = read_lines(labeller / "log.jsonl")
    assert [line["step"] for line in log] == [50, 100] and max(line["accuracy"] for line in log) > 0.8
    assert Task.load(labeller).words == ["bad", "good"]


def test_pseudo_labels_are_sure_balanced_and_without_duplicates(labeller, tmp_path):
    examples, funnel = pseudo_label(labeller, tmp_path / "source", "--confidence", "0.985", "0.9", "--max-words", "14")
    labels = [example["label"] for example in examples]
    assert labels.count(0) == labels.count(1) > 10 and Task.load(tmp_path / "source").words == ["bad", "good"]
    assert all(0.9 <= example["confidence"] and len(example["text"].split()) <= 14 for example in examples)
    assert min(example["confidence"] for example in examples if example["label"] == 0) >= 0.985
    assert len({example["text"].lower() for example in examples}) == len(examples) == funnel["kept"]
    assert funnel["duplicate"] > 50 and funnel["too long"] > 10 and funnel["unsure"] > 0
    assert funnel["read"] == 600 == sum(count for step, count in funnel.items() if step != "read")
    few, funnel = pseudo_label(labeller, tmp_path / "source", "--confidence", "0.985", "0.9", "--max-words", "14",
                               "--per-class", "7")
    assert len(few) == 14 and all(example in examples for example in few)
    with pytest.raises(InputError, match="--restart begins anew"):
        pseudo_label(labeller, tmp_path / "source", "--min-words", "3")


def test_pseudo_labelling_continues_where_it_was_stopped(labeller, tmp_path, monkeypatch):
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
    with open(tmp_path / "parts" / "unbalanced-0-of-1.jsonl", "a") as file:
        file.write('{"text": "half a li')
    assert pseudo_label(labeller, tmp_path / "parts") == whole


def test_processes_share_a_corpus(labeller, tmp_path, monkeypatch):
    whole, funnel = pseudo_label(labeller, tmp_path / "whole", "--confidence", "0.9")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):  # only the first process writes the output
        pseudo_label(labeller, tmp_path / "shared", "--confidence", "0.9")
    monkeypatch.setenv("RANK", "0")
    assert pseudo_label(labeller, tmp_path / "shared", "--confidence", "0.9")[1] == funnel
    lines = [sorted(line for part in (tmp_path / name).glob("unbalanced*.jsonl") for line in part.open())
             for name in ("whole", "shared")]
    assert [json.loads(line)["text"] for line in lines[0]] == [json.loads(line)["text"] for line in lines[1]]


def test_classify_gives_every_text_its_own_label(labeller):
    model, tokenizer = data.load_classifier(labeller, "cpu")
    tokenize = data.partial(tokenizer, padding=True, return_tensors="pt")
    texts = [review["text"] for review in make_examples(11, 3)]
    labels, confidences = data.classify(model, tokenize, texts, 4)
    for text, label, confidence in zip(texts, labels, confidences):
        p = model(**tokenize([text])).logits.softmax(-1)[0]
        assert label == p.argmax() and confidence == pytest.approx(p.max().item(), abs=1e-5)


def test_linear_schedule():
    factors = [data.linear_schedule(step, 100) for step in range(100)]
    assert factors[0] == 1 / 20 and factors[19] == 1 and factors[60] == 0.5 and min(factors) > 0
    assert all(b < a for a, b in zip(factors[20:], factors[21:]))


# --------------------------------------------------------------------------------- the scripts, on a demo hardly trained


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return data.demo(tmp_path_factory.mktemp("world") / "demo", steps=3)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def meta_train(world, out, *flags, method="maml"):
    train_meta.main(["--config", f"{world / method}.json", "--out", str(out), "--prompt-length", "3",
                     "--validation", "40", "--max-steps", "6", "--eval-every", "2", *flags])
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


def test_demo_holds_tasks_from_other_domains(world):
    source = read_lines(world / "source" / "clustered.jsonl")
    assert {example["domain"] for example in source} == set(data.SOURCE_DOMAINS)
    assert {example["cluster"] for example in source} == {0, 1, 2, 3}
    for domain in data.TASK_DOMAINS:
        assert {example["domain"] for example in read_lines(world / domain / "test.jsonl")} == {domain}
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    for example in source:
        assert model.tokenizer.unk_token_id not in model.encode([example])["input_ids"]


@pytest.mark.parametrize("method", ["kmeans", "lda", "random", "label"])
def test_cluster(world, tmp_path, method, capsys):
    out, figure = tmp_path / "clusters" / "made.jsonl", tmp_path / "tsne.png"
    flags = ["--encoder", str(world / "t5"), "--figure", str(figure)] if method == "kmeans" else []
    reviews = [review for domain in data.SOURCE_DOMAINS for review in make_examples(70, 0, domain)]
    data.write_task(tmp_path / "source", SENTIMENT, {"examples": reviews})
    cluster.main(["--source", str(tmp_path / "source" / "examples.jsonl"), "--method", method, "--k", "7",
                  "--out", str(out), "--min-size", "1", "--vocabulary", "200", "--device", "cpu", *flags])
    examples = read_lines(out)
    sizes = np.bincount([example["cluster"] for example in examples])
    assert len(sizes) == 5 if method == "label" else 5 < len(sizes) <= 7
    assert figure.exists() == bool(flags)
    assert method in ("kmeans", "lda") or sizes.max() - sizes.min() <= 1
    if method == "label":
        assert all(example["cluster"] == example["label"] for example in examples)
    assert [{**e, "cluster": 0} for e in examples] == [
        {**e, "cluster": 0} for e in reviews]
    assert Task.load(out.parent).words == SENTIMENT.words and capsys.readouterr().out.count("cluster ") >= 5


def test_lda_and_the_report_tell_topics_apart(capsys):
    rng = random.Random(0)
    topics = ["soup waiter dessert menu pasta", "keyboard battery screen fan processor"]
    texts = [" ".join(rng.choices(topics[i % 2].split() + ["nice"], k=9)) for i in range(300)]
    vectorizer = cluster.CountVectorizer(vocabulary=" ".join(topics).split() + ["nice"])
    clusters, distances = cluster.lda(lambda: iter(texts), 300, vectorizer, 2, seed=1, size=100, updates=60)
    assert np.array_equal(clusters, (np.arange(300) % 2) ^ clusters[0]) and 0 <= distances.min() <= distances.max() < 0.5
    telling = cluster.describe(texts, clusters, distances, np.arange(300) % 3, data.WORDS[3], vectorizer)
    assert set(telling[clusters[1]][:5]) == set(topics[1].split())
    printed = capsys.readouterr().out
    assert "cluster 0: 150 examples: 50 bad, 50 okay, 50 good\n    words: " in printed
    nearest = np.flatnonzero(clusters == 0)[distances[clusters == 0].argmin()]
    assert f"\n    {texts[nearest]}\n" in printed


def test_small_clusters_are_an_error_or_dropped(world, tmp_path, capsys):
    data.write_task(tmp_path, SENTIMENT, {"examples": make_examples(40) + [{"text": "alone", "label": 4}] * 9})
    flags = ["--source", str(tmp_path / "examples.jsonl"), "--method", "label", "--min-size", "9"]
    with pytest.raises(InputError, match="cluster 0 has 8 examples, fewer than the 9 .*--drop-small"):
        cluster.main(flags)
    assert not (tmp_path / "label.jsonl").exists()
    cluster.main([*flags, "--drop-small"])
    assert {example["cluster"] for example in read_lines(tmp_path / "label.jsonl")} == {4}


def test_embeddings_are_stored_continued_and_noticed_when_old(world, tmp_path, monkeypatch):
    texts, encode, encoded = [review["text"] for review in make_examples(7)], cluster.SentenceTransformer.encode, []

    def counted(self, block, **kwargs):
        encoded.extend(block)
        if "stop" in encoded:
            raise KeyboardInterrupt
        return encode(self, block, **kwargs)

    def embed(texts, name="a.npy"):
        return cluster.embed(iter(texts), 7, tmp_path / name, str(world / "t5"), "cpu", size=3)

    monkeypatch.setattr(cluster.SentenceTransformer, "encode", counted)
    whole = np.array(embed(texts))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    assert np.array_equal(embed(texts), whole) and len(encoded) == 7
    with pytest.raises(KeyboardInterrupt):
        embed(texts[:6] + ["stop"], "b.npy")
    del encoded[:]
    np.testing.assert_allclose(embed(texts, "b.npy"), whole, atol=1e-6)
    assert encoded == texts[6:]


def test_kmeans_finds_what_is_there_and_repeats_itself():
    rng = np.random.default_rng(0)
    centres, truth = 5 * rng.normal(size=(4, 8)), np.repeat(np.arange(4), 50)
    points = (centres[truth] + rng.normal(size=(200, 8))).astype(np.float32)
    clusters, distances = cluster.kmeans(points, 4, seed=1)
    assert len({(a, b) for a, b in zip(truth, clusters)}) == 4
    assert np.array_equal(clusters, cluster.kmeans(points, 4, seed=1)[0])
    mean = points[clusters == 0].mean(0)
    np.testing.assert_allclose(distances[clusters == 0], ((points[clusters == 0] - mean) ** 2).sum(1), rtol=1e-3)


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile", "ppt"])
def test_train_meta(world, tmp_path, method):
    flags = ["--method", method] if method in ("fomaml", "reptile") else []
    prompt = meta_train(world, tmp_path / "prompt", *flags, method="ppt" if method == "ppt" else "maml")
    log = read_lines(tmp_path / "prompt" / "log.jsonl")
    facts = json.loads((tmp_path / "prompt" / "metapt.json").read_text())
    assert prompt.shape == (3, 64) and [line["step"] for line in log] == [0, 2, 4, 6]
    best = max(log, key=lambda line: (line["accuracy"], -line["loss"], -line["step"]))
    assert (facts["method"], facts["step"], facts["accuracy"]) == (method, best["step"], best["accuracy"])
    assert torch.equal(prompt, meta_train(world, tmp_path / "again", *flags, method="ppt" if method == "ppt" else "maml"))


def test_a_stopped_run_continues_to_the_same_prompt(world, tmp_path, monkeypatch):
    whole = meta_train(world, tmp_path / "whole")
    update, seen = train_meta.update, []

    def interrupted(*args):
        seen.append(args[5])
        if len(seen) == 3:
            os.kill(os.getpid(), train_meta.data.signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(train_meta, "update", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        meta_train(world, tmp_path / "parts")
    assert torch.equal(meta_train(world, tmp_path / "parts"), whole)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_killed_run_continues_to_the_same_bytes(world, tmp_path):
    """SIGKILL at random moments, three times in one run."""
    flags = ["--prompt-length", "3", "--validation", "40", "--max-steps", "60", "--eval-every", "2", "--patience", "99"]
    command = [sys.executable, Path(train_meta.__file__), "--config", world / "maml.json", *flags, "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    rng, log = random.Random(0), tmp_path / "parts" / "log.jsonl"
    for kill in range(3):
        run = subprocess.Popen([*command, tmp_path / "parts"], stdout=subprocess.DEVNULL)
        before, began = len(read_lines(log)) if log.exists() else 0, time.time()
        while run.poll() is None and (not log.exists() or len(read_lines(log)) <= before) and time.time() - began < 60:
            time.sleep(0.01)
        time.sleep(rng.random() / 10)
        run.kill()
        assert run.wait() == -9, "the run ended before it was killed: give it more steps"
    subprocess.run([*command, tmp_path / "parts"], check=True, capture_output=True)
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path for path in (tmp_path / "whole").iterdir() if path.name.startswith(".")]


def test_a_broken_checkpoint_is_seen_and_the_one_before_it_used(world, tmp_path, capsys):
    whole = meta_train(world, tmp_path / "run")
    path, previous = (tmp_path / "run" / f"checkpoint{name}.safetensors" for name in ("", ".previous"))
    good = path.read_bytes()
    middle = bytes(byte ^ 1 for byte in good[-40:-30])
    for broken in (good[:-5], good[:100], b"", good[:-40] + middle + good[-30:]):
        path.write_bytes(broken)
        assert torch.equal(meta_train(world, tmp_path / "run"), whole)
        printed = capsys.readouterr().out
        assert f"{path} is broken" in printed and "the one before it is used" in printed and "from step" in printed
    path.write_bytes(good[:-5])
    previous.write_bytes(good[:50])
    with pytest.raises(InputError, match="no whole checkpoint; --restart"):
        meta_train(world, tmp_path / "run")
    assert torch.equal(meta_train(world, tmp_path / "run", "--restart"), whole)


def test_a_run_goes_on_with_its_own_arguments_only(world, tmp_path):
    meta_train(world, tmp_path / "run")
    with pytest.raises(InputError, match="began with --alpha 0.08, not 0.3"):
        meta_train(world, tmp_path / "run", "--alpha", "0.3")
    meta_train(world, tmp_path / "run", "--alpha", "0.3", "--restart")


def test_a_run_goes_on_with_its_own_data_only(world, tmp_path):
    shutil.copytree(world / "source", tmp_path / "source")
    source = tmp_path / "source" / "clustered.jsonl"
    meta_train(world, tmp_path / "run", "--source", str(source))
    source.write_text("".join(source.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="clustered.jsonl: not the data that the run"):
        meta_train(world, tmp_path / "run", "--source", str(source))


def test_a_step_that_is_not_finite_names_its_examples_and_keeps_the_best(world, tmp_path, monkeypatch):
    def poisoned(model, prompt, supports, queries, *rest, **kwargs):
        gradient, loss = meta_gradient(model, prompt, supports, queries, *rest, **kwargs)
        calls.append(len(supports))
        return gradient * math.nan if len(calls) in (4, 7) else gradient, loss  # the fourth step, and its third task

    calls = []
    monkeypatch.setattr(train_meta, "meta_gradient", poisoned)
    with pytest.raises(InputError, match="step 3: the loss or gradient of meta-task 2 is not finite on '.*it was"):
        meta_train(world, tmp_path / "run")
    assert calls == [4, 4, 4, 4, 1, 1, 1] and load_prompt(tmp_path / "run")[0].isfinite().all()


def test_torchrun_shares_a_step_and_changes_nothing(world, tmp_path):
    flags = ["--config", world / "maml.json", "--prompt-length", "3", "--validation", "40", "--max-steps", "3",
             "--eval-every", "3", "--out"]
    train_meta.main([str(flag) for flag in [*flags, tmp_path / "one"]])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    Path(train_meta.__file__), *flags, tmp_path / "two"], check=True, capture_output=True)
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors")["prompt"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    logs = [read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [line["accuracy"] for line in logs[0]] == [line["accuracy"] for line in logs[1]]


def test_reptile_goes_where_two_steps_go(meta):
    model, prompt, supports, queries, alpha = meta
    args = argparse.Namespace(method="reptile", alpha=alpha)
    gradient, _ = train_meta.gradient_of(model, prompt, supports, queries, args)
    ends = [adapt(model, adapt(model, prompt, s, alpha).detach(), q, alpha) for s, q in zip(supports, queries)]
    torch.testing.assert_close(prompt - alpha * gradient, prompt + sum(end - prompt for end in ends))


def test_search_keeps_the_best_by_validation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_meta, "SEARCH", {"alpha": [0.08], "learning_rate": [0.3, 0.001]})
    prompt = meta_train(world, tmp_path / "run", "--search", "--tasks-per-pass", "auto")
    runs = [load_prompt(tmp_path / "run" / f"alpha0.08-beta{beta}") for beta in (0.3, 0.001)]
    best = max(runs, key=lambda run: run[1]["accuracy"])
    assert torch.equal(prompt, best[0]) and load_prompt(tmp_path / "run")[1] == best[1]


def test_source_size_and_the_facts_of_a_prompt(world, tmp_path):
    meta_train(world, tmp_path / "run", "--source-size", "500")
    facts = load_prompt(tmp_path / "run")[1]
    assert (facts["source_size"], facts["clusters"], facts["clustering"]) == (500, 4, "kmeans")
    source = world / "source" / "clustered.jsonl"
    digest = data.hashlib.sha256(source.read_bytes()).hexdigest()
    assert digest.startswith(facts["digests"][str(source)]) and facts["versions"]["torch"] == torch.__version__


def test_support_query_and_held_out_examples_are_disjoint(tokenizer, monkeypatch):
    examples = [{"text": str(i), "label": 0, "cluster": i % 3} for i in range(90)]
    args = argparse.Namespace(validation=30, batch_size=4, seed=1, method="maml", source="source.jsonl")
    tasks, held_out = train_meta.split_clusters(examples, args)
    for i, (task, held) in enumerate(zip(tasks, held_out)):
        assert {example["cluster"] for example in task + held} == {i}
        assert len({example["text"] for example in task + held}) == 30 and (len(task), len(held)) == (20, 10)

    class Model:
        encode = staticmethod(lambda examples: examples)

    draws = set()
    for step in range(50):
        supports, queries = train_meta.draw(Model, tasks, step, args)
        for task, support, query in zip(tasks, supports, queries):
            assert len({example["text"] for example in support + query}) == 8 and all(e in task for e in support + query)
        draws.add(supports[0][0]["text"])
        monkeypatch.setenv("WORLD_SIZE", "2")  # the processes of torchrun share the meta-tasks
        shares = []
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            shares.append(train_meta.draw(Model, tasks, step, args)[0])
        assert shares == [supports[::2], supports[1::2]]
        monkeypatch.undo()
    assert len(draws) > 10 and train_meta.draw(Model, tasks, 7, args) == train_meta.draw(Model, tasks, 7, args)
    with pytest.raises(InputError, match="cluster 0 has 30 examples"):
        train_meta.split_clusters(examples, argparse.Namespace(**{**vars(args), "validation": 75}))


def test_every_weight_of_the_t5_stays_as_it_was(tokenizer):
    t5 = make_t5(tokenizer)
    before = copy.deepcopy(t5.state_dict())
    model = PromptedT5(t5, tokenizer, SENTIMENT)
    args = argparse.Namespace(method="maml", alpha=0.1, batch_size=2, learning_rate=0.1, seed=1, tasks_per_pass=None)
    prompt = torch.nn.Parameter(model.init_prompt(3))
    start, optimizer = prompt.detach().clone(), torch.optim.AdamW([prompt], lr=0.1)
    tasks = [make_examples(20), make_examples(20, 1)]
    drawn = train_meta.draw(model, tasks, 0, args)
    for step in range(2):
        stopping, drawn = train_meta.update(model, prompt, optimizer, tasks, drawn, step, False, args)
    args = argparse.Namespace(method="pt", learning_rate=0.1, weight_decay=0.0, batch_size=4, accumulate=1,
                              max_epochs=2, max_steps=None, patience=5)
    tuned, _ = finetune.tune(model, prompt.detach(), make_examples(8), make_examples(8, 1), args, 1)
    assert not torch.equal(start, prompt) and not torch.equal(prompt, tuned)
    assert all(torch.equal(value, before[name]) for name, value in t5.state_dict().items())
    assert not any(parameter.requires_grad for parameter in t5.parameters()) and not t5.training


def test_accumulated_passes_give_the_same_prompt(model):
    tuned = []
    for accumulate in (1, 3):
        args = argparse.Namespace(method="pt", learning_rate=0.1, weight_decay=0.0, batch_size=8, accumulate=accumulate,
                                  max_epochs=2, max_steps=None, patience=5)
        tuned.append(finetune.tune(model, model.init_prompt(3).double(), make_examples(20), make_examples(8, 1), args, 1))
    torch.testing.assert_close(tuned[0][0], tuned[1][0])


def finetune_main(world, out, *flags, method="pt"):
    finetune.main(["--config", f"{world / method}.json", "--out", str(out), "--max-epochs", "2", "--max-test", "50",
                   "--shots", "8", "--prompt-length", "3", *flags])
    return read_lines(out)


def test_finetune_saves_and_predicts(world, tmp_path, capsys):
    meta_train(world, tmp_path / "meta")
    out, prompts = tmp_path / "results.jsonl", ["--prompt", "random", str(tmp_path / "meta")]
    rows = finetune_main(world, out, *prompts, "--seeds", "1", "2", "--confusion", "--save", str(tmp_path / "tuned"))
    assert len(rows) == 2 * 2 * 2 and len({(r["task"], r["prompt"], r["seed"]) for r in rows}) == 8
    printed = capsys.readouterr().out.replace("**", "")
    books = [100 * row["accuracy"] for row in rows if row["task"] == "books" and row["method"] == "maml"]
    assert f"{np.mean(books):.2f} ± {abs(books[0] - books[1]) / math.sqrt(2):.2f} (2)" in printed
    assert "8 new runs, 0 stood there already" in printed
    assert f"| terrible | {rows[0]['confusion'][0][0]} " in " ".join(printed.split())
    assert finetune_main(world, out, *prompts, "--seeds", "1", "2", "3")[:8] == rows  # only what is new is run
    assert "4 new runs, 8 stood there already" in capsys.readouterr().out

    tuned = tmp_path / "tuned" / "books-meta-8-1"
    (tmp_path / "new.txt").write_text("The plot was gripping .\n\nDull hero .\n", encoding="utf-8")
    finetune.main(["--predict", str(tmp_path / "new.txt"), "--prompt", str(tuned), "--device", "cpu"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["The plot was gripping .", "Dull hero ."]
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT, max_length=64)
    expected = model.probabilities(load_prompt(tuned)[0], model.encode([{"text": line["text"]} for line in lines]))
    for line, p in zip(lines, expected.tolist()):
        assert line["word"] == SENTIMENT.words[line["label"]] == max(line["probabilities"], key=line["probabilities"].get)
        assert list(line["probabilities"].values()) == pytest.approx(p, abs=1e-4)


def test_other_data_or_a_missing_folder_makes_a_run_new(world, tmp_path, capsys):
    shutil.copytree(world / "books", tmp_path / "books")
    flags = ["--task", str(tmp_path / "books"), "--prompt", "random", "--seeds", "1"]
    finetune_main(world, tmp_path / "results.jsonl", *flags)
    finetune_main(world, tmp_path / "results.jsonl", *flags, "--save", str(tmp_path / "tuned"))
    assert load_prompt(tmp_path / "tuned" / "books-random-8-1")[1]["versions"]
    test = tmp_path / "books" / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:300]))
    assert len(finetune_main(world, tmp_path / "results.jsonl", *flags)) == 2
    assert capsys.readouterr().out.count("1 new runs, 0 stood there already") == 3
    with pytest.raises(InputError, match="two of the prompts have one name"):
        finetune_main(world, tmp_path / "results.jsonl", *flags, "--prompt", "a/x", "b/x", "--save", "tuned")


def test_full_tuning_starts_every_run_from_the_same_weights(world, tmp_path):
    both = finetune_main(world, tmp_path / "both.jsonl", "--seeds", "1", "2", method="ft")
    alone = finetune_main(world, tmp_path / "alone.jsonl", "--seeds", "2", method="ft")
    both = [row for row in both if row["seed"] == 2]
    assert [(row["task"], row["loss"]) for row in both] == [(row["task"], row["loss"]) for row in alone]
    assert all(row["method"] == "ft" and row["prompt"] == "none" for row in alone)


def test_a_stopped_sweep_continues_and_processes_share_it(world, tmp_path, monkeypatch):
    out, run_one, ran = tmp_path / "new" / "results.jsonl", finetune.run_one, []
    sweep = ["--method", "pt", "ft", "--seeds", "1", "2", "--shots", "4", "8", "--max-epochs", "1", "--threads", "1"]

    def stopped(*args):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(args[2:5])
        return run_one(*args)

    monkeypatch.setattr(finetune, "run_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune_main(world, out, "--prompt", "random", *sweep)
    before = read_lines(out)
    command = [sys.executable, Path(finetune.__file__), "--config", world / "pt.json", "--out", out,
               "--prompt", "random", "--prompt-length", "3", "--max-test", "50", *sweep]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"}) for rank in "01"]
    printed = "".join(process.communicate()[0] for process in processes)
    rows = read_lines(out)
    assert len(before) == 3 and rows[:3] == before and "stood there already" in printed
    assert len(rows) == len({finetune.identity(row) for row in rows}) == 2 * 2 * 2 * 2


def test_search_chooses_by_validation_alone(world, tmp_path, tokenizer, monkeypatch):
    rows = finetune_main(world, tmp_path / "searched.jsonl", "--search", "--seeds", "1", method="ft")
    for row in rows:
        assert row["settings"]["learning_rate"] == [float(rate) for rate in row["tried"]] == finetune.GRID
        assert row["tried"][str(row["learning_rate"])] == row["validation_accuracy"] == max(row["tried"].values())

    model, seen = PromptedT5(make_t5(tokenizer), tokenizer, SENTIMENT), []
    weights = copy.deepcopy(model.t5.state_dict())

    def tune(model, start, training, validation, args, seed):
        assert all(torch.equal(value, weights[name]) for name, value in model.t5.state_dict().items())
        seen.append(args.learning_rate)
        with torch.no_grad():
            model.t5.shared.weight.fill_(args.learning_rate)
        return start, {"validation_accuracy": [0.2, 0.7, 0.7, 0.7, 0.5][len(seen) - 1],
                       "validation_loss": [0.1, 1.2, 1.1, 1.3, 0.1][len(seen) - 1]}

    monkeypatch.setattr(finetune, "tune", tune)
    monkeypatch.setattr(PromptedT5, "evaluate", None)  # so no test split is scored
    _, facts = finetune.search(model, None, [], [], argparse.Namespace(learning_rate=1.0), 1)
    assert seen == finetune.GRID and facts["learning_rate"] == 8e-5
    assert (model.t5.shared.weight == 8e-5).all()


def test_bfloat16_keeps_the_prompt_in_float32(world, tmp_path):
    row, _ = finetune_main(world, tmp_path / "results.jsonl", "--prompt", "random", "--seeds", "1",
                           "--dtype", "bfloat16", "--save", str(tmp_path / "tuned"))
    prompt, _ = load_prompt(tmp_path / "tuned" / "books-random-8-1")
    assert row["settings"]["dtype"] == "bfloat16" and np.isfinite(row["loss"])
    assert not torch.equal(prompt, prompt.bfloat16().float())  # its updates were not rounded


PAIR = Task("pair", "{premise} ? {mask} . {hypothesis}", ["yes", "maybe", "no"])
CHOICE = Task("choice", "{question} A. {a} B. {b} C. {c} {mask}", ["A", "B", "C"])


def make_pair(rng):
    label, plot = rng.randrange(3), rng.choice(["plot", "music", "script", "camera"])
    said = ["fine", "nice", "poor"][label]
    return {"premise": f"the {plot} was fine", "hypothesis": f"{plot} {said}", "label": label}


def make_choice(rng):
    label, answers = rng.randrange(3), ["poor", "poor", "poor"]
    answers[label] = "great"
    return {"question": "the plot ?", **dict(zip("abc", answers)), "label": label}


@pytest.mark.parametrize("task, make", [(PAIR, make_pair), (CHOICE, make_choice)])
def test_pairs_and_choices_through_the_template_alone(tmp_path, tokenizer, task, make):
    rng = random.Random(0)
    data.write_task(tmp_path / task.name, task, {s: [make(rng) for _ in range(120)] for s in ("train", "test")})
    make_t5(tokenizer, dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    finetune.main(["--task", str(tmp_path / task.name), "--model", str(tmp_path / "t5"), "--method", "ft", "pt",
                   "--shots", "60", "--seeds", "1", "--learning-rate", "0.01", "--max-epochs", "20", "--patience", "20",
                   "--prompt-length", "3", "--device", "cpu", "--out", str(tmp_path / "results.jsonl")])
    full, prompt = read_lines(tmp_path / "results.jsonl")
    assert full["accuracy"] > 0.9 and full["macro_f1"] > 0.9 and np.sum(full["confusion"]) == 120
    assert prompt["method"] == "random" and np.shape(prompt["confusion"]) == (3, 3) and prompt["words"] == task.words


def test_macro_f1_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, said = rng.integers(3, size=50), rng.integers(2, size=50)
    confusion = metrics.confusion_matrix(true, said, labels=range(4)).tolist()  # class 3 occurs nowhere
    assert finetune.macro_f1(confusion) == pytest.approx(metrics.f1_score(true, said, average="macro"))


def result(method, accuracy, seed, prompt=None, task="sst5", shots=40, model="google-t5/t5-base", learning_rate=0.003,
           **more):
    return {"task": task, "method": method, "prompt": prompt or f"prompts/{method}", "shots": shots, "seed": seed,
            "digest": "0", "data": "0", "settings": {"model": model, "learning_rate": learning_rate}, "accuracy": accuracy, **more}


def make_report(tmp_path, rows, *flags):
    data.write_examples(tmp_path / "results.jsonl", rows)
    finetune.main(["--report", str(tmp_path / "results.jsonl"), *flags])


def test_report_beside_the_papers_tables(tmp_path, capsys):
    metapt, ppt = [0.45, 0.46, 0.44, 0.47, 0.43], [0.41, 0.45, 0.42, 0.43, 0.44]
    rows = [result("maml", a, seed, clustering="kmeans", clusters=10) for seed, a in enumerate(metapt)]
    rows += [result("ppt", 0.99, 0, digest="of an earlier prompt"), *(result("ppt", a, i) for i, a in enumerate(ppt))]
    rows += [result("maml", 0.43, 0, "prompts/label", clustering="label"), result("maml", 0.9, 0, task="mine"),
             result("maml", 0.42, 0, "prompts/mixed", clustering="random"),
             result("maml", 0.5, 0, "prompts/y", source_task="yelp5", clustering="kmeans"),
             result("ft", 0.44, 0, "none"), result("ft", 0.3, 0, "none", learning_rate=0.1),
             result("ft", 0.99, 0, "none", shots=80), result("ft", 0.2, 0, "none", model="other")]
    make_report(tmp_path, rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in [
            "| t5-base | 40 | MetaPT, label | prompts/label | 43.00 ± 0.00 (1) | - |",
            "| t5-base | 40 | MetaPT | prompts/maml | 45.00 ± 1.58; paper 45.26±0.39, -0.26 | **90.00 ± 0.00** (1) |",
            "| t5-base | 40 | PPT | prompts/ppt | 43.00 ± 1.58; paper 42.90±1.08, +0.10 | - |",
            "| t5-base | 40 | MetaPT(Y) | prompts/y | **50.00 ± 0.00** (1); paper 46.24±0.42, +3.76 | - |",
            "| t5-base | 40 | FT | learning_rate 0.003 | 44.00 ± 0.00 (1); paper 43.57±2.56, +0.43 | - |",
            "| t5-base | 80 | FT | learning_rate 0.003 | **99.00 ± 0.00** (1) | - |",
            "| other | 40 | FT | learning_rate 0.003 | **20.00 ± 0.00** (1) | - |",
            "| t5-base | 40 | label clusters | prompts/label | 43.00 ± 0.00 (1); paper 42.84±0.76, +0.16 |",
            "| t5-base | 40 | random clusters | prompts/mixed | 42.00 ± 0.00 (1); paper 42.95±1.05, -0.95 |",
            "| t5-base | 40 | PPT | prompts/ppt | 43.00 ± 1.58; paper 42.89±1.08, +0.11 |"]:
        assert line in lines, line
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.ttest_rel(np.multiply(100, ppt), np.multiply(100, metapt)).confidence_interval()
    assert f"| t5-base | 40 | PPT | prompts/ppt | -2.00 [{low:+.2f}, {high:+.2f}] | - |" in lines
    make_report(tmp_path, [result("maml", a, i) for i, a in enumerate(metapt)] + [
        result("ppt", a - 0.02 - i / 1000, i) for i, a in enumerate(metapt)], "--against", "prompts/ppt")
    assert "| **+2.20 [+2.00, +2.40]** |" in capsys.readouterr().out
    with pytest.raises(InputError, match="results.jsonl:2: not a line of results"):
        make_report(tmp_path, [result("maml", 0.4, 1), {"task": "sst5"}])


@pytest.mark.parametrize("x", ["shots", "source_size", "clusters"])
def test_figure(tmp_path, x, monkeypatch):
    drawn, savefig = [], pytest.importorskip("matplotlib.figure").Figure.savefig
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, *args, **kwargs: drawn.append(self) or savefig(self, *args, **kwargs))
    rows = [result("maml", 0.4 + at / 1000 + seed / 100, seed, f"prompts/{at}" if x != "shots" else None, task=task,
                   **{"shots": 40, "clusters": 10, "source_size": 1000, x: at})
            for at in (30, 10) for seed in (1, 2) for task in ("sst5", "sst2")]
    rows += [result("ft", 0.3, 1, "none", shots=shots) for shots in (10, 20)]
    make_report(tmp_path, rows, "--figure", str(tmp_path / "figure.png"), "--x", x)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["sst5", "sst2"]
    assert panels[0].get_xscale() == ("linear" if x == "clusters" else "log")
    assert panels[1].lines[0].get_xydata().tolist() == [[10, pytest.approx(42.5)], [30, pytest.approx(44.5)]]
    assert len(panels[0].lines) == (2 if x == "shots" else 1)
    with pytest.raises(InputError, match="no kind of picture"):
        make_report(tmp_path, rows, "--figure", str(tmp_path / "figure.xyz"), "--x", x)


@pytest.mark.parametrize("script, flags, message", [
    ("train_meta.py", ["--source", "nothing.jsonl", "--out", "x", "--model", "{t5}"], "task.json"),
    ("train_meta.py", ["--source", "{demo}/source/examples.jsonl", "--out", "x", "--model", "{t5}"], "no clusters"),
    ("train_meta.py", ["--sources", "x"], "unrecognized arguments"),
    ("train_meta.py", ["--config", "{demo}/ft.json"], "has no flag --task"),
    ("finetune.py", ["--task", "{demo}/books", "--model", "{t5}", "--prompt", "nothing"], "nothing/adapter_config.json: not"),
    ("finetune.py", ["--task", "{demo}/books", "--model", "{demo}"], "cannot be loaded as a T5"),
    ("data.py", ["convert", "sst5", "--input", "{demo}", "--out", "x"], "no file of this dataset here"),
])
def test_bad_input_ends_in_one_line_and_status_2(world, tmp_path, script, flags, message):
    flags = [flag.format(demo=world, t5=world / "t5") for flag in flags]
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *flags], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ hostile input


def bad_line(reader, name, *lines, first=b'{"text": "fine", "label": 2}\n'):
    """Files whose second line is bad: [(reader, file's name, what the message must hold, content)]."""
    return [(reader, name, f"{name}:2: ", first + line + b"\n") for line in lines]


def bad_file(reader, name, *contents):
    """Files that are bad as a whole; the message names the file, or where that is the unit its folder."""
    return [(reader, name, name.split("/")[0], content) for content in contents]


def packed(name, content, cut=0):
    """Writes a packed file, and cuts off its end."""
    def write(path):
        pack(path, {name: content})
        path.write_bytes(path.read_bytes()[:-cut or None])
    return write


def tar_of(name, size=0, **facts):
    """Writes a tar of one member whose header says `facts`."""
    def write(path):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            for fact, value in facts.items():
                setattr(member, fact, value)
            tar.addfile(member)
        member.size = size  # more than there is
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) if size else path.read_bytes())
    return write


def safetensors(header, tensors=b"", size=None):
    """A safetensors file: its header's size, which may be a lie, its header and its tensors."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + tensors


def tensor_file(metadata=None, **tensors):
    def write(path):
        path.parent.mkdir(exist_ok=True)
        save_file({name: torch.as_tensor(values) for name, values in tensors.items()}, path, metadata)
    return write


def facts_file(facts):
    """A checkpoint that is whole, so that its checksum fits, but has wrong facts."""
    tensors = {"prompt": torch.zeros(3, 16), "best": torch.zeros(3, 16)}
    return tensor_file({"facts": facts, "checksum": train_meta.checksum(facts, tensors)}, **tensors)


def read_prompt(path):
    """Reads a prompt of which only the file `path` is bad."""
    with tempfile.TemporaryDirectory() as other:
        good = Path(other) / path.parent.name
        save_prompt(good, torch.zeros(3, 16), make_t5(make_tokenizer()))
        shutil.copy(path, good)
        return load_prompt(good, 16)


def read_checkpoint(path):
    prompt = torch.nn.Parameter(torch.zeros(3, 16))
    train_meta.load_checkpoint(path.parent, prompt, torch.optim.AdamW([prompt]), argparse.Namespace(restart=False))


def read_t5(path):
    """Reads a T5 of which only the file `path` is bad."""
    with tempfile.TemporaryDirectory() as other:
        good = Path(other) / path.parent.name
        make_t5(tokenizer := make_tokenizer()).save_pretrained(good)
        tokenizer.save_pretrained(good)
        if path.suffix == ".bin":
            (good / "model.safetensors").unlink()
        shutil.copy(path, good)
        return metapt.load_t5(good)


def read_clustering(path):
    source = path.with_suffix(".jsonl")
    args = argparse.Namespace(source=source, source_size=None, method="ppt", validation=4, batch_size=1, seed=1,
                              device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "provenance", lambda *args: {})
        patch.setattr(data, "read_examples", lambda *args: [{**review, "cluster": 0} for review in make_examples(20)])
        train_meta.read_source(args, SENTIMENT)


def read_clusters(path):
    train_meta.split_clusters(list(data.read_examples(path, SENTIMENT)), argparse.Namespace(
        source=path, method="maml", validation=2, batch_size=1, seed=1))


def read_progress(path):
    args = argparse.Namespace(labeller="", unit="paragraph", share=1, min_words=1, max_words=9, max_length=9,
                              confidence=[0.9], corpus=[], restart=False, batch_size=2)
    data.label_share(args, SENTIMENT, path.with_suffix(".jsonl"), None)


def read_examples(path):
    return list(data.read_examples(path, SENTIMENT, labelled=".jsonl" in path.name))


def read_corpus(path):
    return list(data.read_corpus([path], "paragraph"))


def read_config(path):
    train_meta.main(["--config", str(path), "--source", "x", "--out", str(path.parent / "out")])


def read_report(path):
    finetune.main(["--report", str(path)])


def convert(name):
    def read(path):
        data.convert(name, path, path.parent / "task", 0)
    read.__name__ = name
    return read


def entities(levels, times=10):
    """The billion laughs: every entity is ten of the one before."""
    grown = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * times}">' for i in range(1, levels))
    return f'<!DOCTYPE x [<!ENTITY e0 "{"ha" * 50}">{grown}]><x>&e{levels - 1};</x>'.encode()


def result_line(**changes):
    return json.dumps({**result("pt", 0.5, 1), **changes}).encode()


BAD_OBJECTS = [b"", b" ", b"{", b'{"a": 1', b"[]", b"null", b'"x"', b"3", b"\xff\xfe{\0}\0", b"\0" * 9, b"[" * 10**5,
               b'{"a":' * 10**5,
               b"9" * 5000, b'{"a": "\\ud800"}', b'{"a": "\xe9"}', b"{'a': 1}", b"\"" * 3]
BAD_LINES = [*filter(bytes.strip, BAD_OBJECTS), b"[" + b"1," * 5 * 10**6, b'{"text": "a"}{}',
             b'{"text": "a\x01", "label": 0}',
             b'{"text": "\\udc80", "label": 0}', b'{"text": "a", "label": 0, "more": "\\ud800"}',
             b'{"text": null, "label": 0}']
BAD_TENSORS = [b"", b"\0", b"\0" * 8, b"\xff" * 100, safetensors({}, size=2**62), safetensors({}, size=2**20),
               safetensors(b"{"),
               safetensors(b"[" * 10**5), safetensors(b"\xff\xfe"), safetensors({"prompt_embeddings": 3}),
               safetensors({}),
               safetensors({"prompt_embeddings": {"dtype": "F32", "shape": [3, 16], "data_offsets": [0, 192]}},
                           bytes(99)),
               safetensors({"prompt_embeddings": {"dtype": "F32", "shape": [3, 16], "data_offsets": [0, 4]}}, bytes(4)),
               safetensors({"prompt_embeddings": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
               safetensors({"prompt_embeddings": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
               b"PK\3\4" + bytes(200), b"\x80\x02}q\x00."]
BAD_INPUTS = [
    *bad_file(Task.load, "task.json", *BAD_OBJECTS, *(json.dumps({**vars(SENTIMENT), **change}).encode() for change in (
        {"name": 3}, {"name": "../up"}, {"template": None}, {"template": "{text}"}, {"template": "{mask"},
        {"words": "bad"},
        {"words": {"bad": 0, "good": 1}}, {"words": [1, 2]}, {"words": []}, {"words": ["good", "good"]})), b"{}"),
    *bad_file(read_config, "c.json", *BAD_OBJECTS, *(json.dumps(flags).encode() for flags in (
        {"alpha": "x"}, {"alpha": [1, 2]}, {"alpha": True}, {"alpha": {}}, {"seed": 1.5}, {"max_steps": math.inf},
        {"method": "sgd"}, {"dtype": "int8"}, {"eval_every": 0}, {"batch_size": -1}, {"nothing": 1}, {"help": True},
        {"config": "x"}, {"prompt_length": math.nan}, {"method": []}, {"seed": 10**30, "patience": 0}))),
    *bad_file(lambda path: data.check_arguments(path, argparse.Namespace(restart=False)), "arguments.json",
              *BAD_OBJECTS),
    *bad_file(read_clustering, "kmeans4.json", *BAD_OBJECTS),
    *bad_file(read_progress, "part.json", *BAD_OBJECTS, b"{}", b'{"settings": {}, "bytes": -1}'),
    *bad_file(read_prompt, "prompt/adapter_config.json", *BAD_OBJECTS, b"{}", b'{"peft_type": "LORA"}',
              b'{"peft_type": []}'),
    *bad_file(read_prompt, "prompt/metapt.json", *BAD_OBJECTS, b'{"arguments": 3}'),
    *bad_file(read_prompt, "prompt/adapter_model.safetensors", *BAD_TENSORS, tensor_file(other=[[0.0]]), *(
        tensor_file(prompt_embeddings=values) for values in (
            [0.0] * 16, [[[0.0] * 16]], [[0.0] * 15], [[math.nan] * 16], [[math.inf] * 16], [[1] * 16], [[True] * 16],
            np.zeros((0, 16))))),
    *bad_file(read_checkpoint, "run/checkpoint.safetensors", *BAD_TENSORS, tensor_file(prompt=np.zeros((3, 16))), *(
        map(facts_file, ("", "[]", "3", "[" * 10**5, "{}", '{"step": 1, "best": 2, "log": []}')))),
    *bad_file(read_t5, "t5/config.json", *BAD_OBJECTS, b"{}", b'{"model_type": "none"}', b'{"model_type": "bert"}',
              b'{"model_type": "t5", "d_model": "x"}', b'{"model_type": "t5", "d_model": -1}', b'{"model_type": []}'),
    *bad_file(read_t5, "t5/model.safetensors", *BAD_TENSORS[:8], tensor_file({"format": "pt"},
        **{"shared.weight": [[0.0]]})),
    *bad_file(read_t5, "t5/pytorch_model.bin", b"", b"\x80\x02}q\x00."),
    *bad_file(read_t5, "t5/tokenizer.json", b"", b"{}", b"[" * 10**5),
    *bad_line(read_examples, "train.jsonl", *BAD_LINES, *(b'{"text": "a", "label": %s}' % value for value in (
        b"true", b"1.0", b'"1"', b"-1", b"5", b"null", b"[1]", b"NaN", b"1e999", b"1" * 4000, b"1" * 9000,
        b'0, "confidence": NaN', b'0, "confidence": -1', b'0, "confidence": "high"', b'0, "confidence": true',
        b'0, "confidence": null', b'0, "cluster": "a"', b'0, "cluster": 1.5', b'0, "cluster": []',
        b'0, "cluster": NaN'))),
    *bad_line(read_examples, "a.txt", b"\xe9t\xe9", b"\xff\xfea\0", b"a\0b", b"\xed\xa0\x80", b"\xff" * 10**7,
              first=b"fine\n"),
    *bad_file(read_examples, "a.txt", "fine".encode("utf-16"), "fine".encode("utf-32")),
    *bad_file(read_examples, "a.jsonl.gz", b"\x1f\x8b", b"no gzip", packed("", "fine\n" * 999, 9)),
    *bad_file(read_examples, "a.txt.xz", b"no xz", packed("", "fine\n" * 999, 9)),
    *bad_file(read_clusters, "s.jsonl", b"",
              b'{"text": "a", "label": 0, "cluster": 0}\n' * 9 + b'{"text": "a", "label": 0}',
              b'{"text": "a", "label": 0}\n' * 9, b'{"text": "a", "label": 0, "cluster": 0}\n'),
    *bad_line(lambda path: cluster.survey(path, SENTIMENT, 9), "source.jsonl", b'{"text": "a"}', b"[" * 10**5),
    *bad_line(lambda path: data.balance([path], SENTIMENT, None, 1), "part.jsonl", b"",
              b'{"text": "a", "label": 300}')[1:],
    *bad_line(read_report, "r.jsonl", *BAD_LINES, b"{}", *(result_line(**change) for change in (
        {"accuracy": "0.5"}, {"accuracy": math.nan}, {"accuracy": 2.0}, {"seed": []}, {"shots": "40"},
        {"method": ["pt"]},
        {"task": None}, {"settings": []}, {"settings": {}}, {"settings": {"model": 3}}, {"prompt": {}})),
        first=result_line() + b"\n"),
    *bad_file(read_report, "none.jsonl", b"", b"\n"),
    *bad_line(convert("sst5"), "train.txt", b"(3 (2 It)", b"It", b"(7 (2 It) (2 is))", b"(3 )", b"\xff",
              b"(2 (2 a\0) (2 b))",
              b"(" * 10**6, b"(0 " * 10**6, b"x" * 10**7, first=b"(2 (2 fine) (2 .))\n"),
    *bad_file(convert("sst2"), "train.txt", b"", b"\n\n", b"(2 (2 only) (2 neutral))"),
    *bad_line(convert("sst2"), "train.tsv", b"a\t2", b"a", b"\t", b"a\xff\t1", b"a\0\t1", b"",
              first=b"sentence\tlabel\n"),
    *bad_file(convert("sst2"), "train.tsv", b"", b"sentence\tlabel\n", b"a\t1\n", "sentence\tlabel\n".encode("utf-16")),
    *bad_line(convert("amazon2"), "train.csv", b'"3","x"', b'"0","x"', b'"1"', b'"1","a" b', b'"1","open',
              b'"1","a\0"', b'"1","\xff"',
              b'"1","a","b","c"', b'"1","' + b"x" * 10**7 + b'"', b"1" * 9000, first=b'"1","fine"\n'),
    *bad_file(convert("yelp5"), "train.csv", b"", b'"1",""\n'),
    *bad_file(convert("sentihood"), "s-train.json", *BAD_OBJECTS, b"{}", b"[1]", b"[{}]",
              b'[{"text": 3, "opinions": []}]',
              b'[{"text": "a", "opinions": 3}]', b'[{"text": "a", "opinions": [3]}]',
              b'[{"text": "a", "opinions": [{"sentiment": []}]}]',
              b'[{"text": "a", "opinions": []}]', b'[{"text": "\\ud800", "opinions": [{"sentiment": "Positive"}]}]'),
    *bad_file(convert("semeval_laptop"), "x.xml", b"", b"\0", b"<", b"<a>", b"<a></b>", b"<a>\xff</a>", b"<a/>",
              b"<a>&no;</a>", entities(9),
              entities(30), b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>', b"<a>" * 10**5,
              b'<?xml version="1.0" encoding="none"?><a/>', b'<?xml version="1.0" encoding="cp932"?><a/>', b"<a>\0</a>",
              b"<x><sentence><text>a</text><Opinions><Opinion polarity='odd'/></Opinions></sentence></x>",
              '<?xml version="1.0" encoding="utf-8"?><a/>'.encode("utf-16"), b"<a>" * 10**5 + b"</a>" * 10**5),
    *bad_file(convert("amazon5"), "a.tar", b"", bytes(10240), packed("train.csv", '"1","x"\n' * 999, 9000),
              packed("other.csv", "x"),
              packed("train.csv", '"9","x"\n'), packed("/train.csv", '"1","x"\n'), packed("../train.csv", '"9","x"\n'),
              tar_of("train.csv", type=tarfile.DIRTYPE), tar_of("train.csv", type=tarfile.SYMTYPE,
                  linkname="/etc/passwd"),
              tar_of("train.csv", type=tarfile.LNKTYPE, linkname="none"), tar_of("train.csv", type=tarfile.FIFOTYPE),
              tar_of("train.csv", size=2**60)),
    *bad_file(convert("amazon5"), "a.tgz", b"\x1f\x8b", packed("train.csv", '"1","x"\n' * 10**5, 50)),
    *bad_file(convert("amazon5"), "a.zip", b"PK\3\4", packed("train.csv", '"1","x"\n', 9), packed("train.csv/", ""),
              packed("a.csv", ""),
              packed("/train.csv", '"1","x"\n'), packed("train.csv", '"9","x"\n')),
    *bad_file(read_corpus, "corpus.tar", packed("a.txt", "x" * 9999, 15000), packed("a.xz", "x"), packed("a.tar",
        bytes(99)),
              packed("a.gz", b"\x1f\x8b\x08"), packed("a.xz", data.lzma.compress(bytes(99))), tar_of("a.txt",
                  size=2**60), tar_of("a.md", size=2**60)),
    *bad_file(read_corpus, "corpus.txt.gz", b"x", b"\x1f\x8b\x08", packed("", "x\n" * 999, 9)),
    *bad_file(read_corpus, "corpus.txt.xz", b"x", b"\xfd7zXZ\0", packed("", "x\n" * 999, 9)),
    *bad_line(read_corpus, "corpus.jsonl", b"[]", b"{", b'{"text": 3}', b"\xff"),
    *bad_file(lambda path: cluster.embed([], 3, path, "none", "cpu"), "e.npy", b"", b"\x93NUMPY",
              b"\x93NUMPY\1\0v\0{'descr': '<f4'",
              b"PK\3\4" + bytes(200), b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, b"\x80\x02}q\x00.", *(
                  lambda path, values=values: np.save(path, values, allow_pickle=True) for values in (
                      np.zeros((2, 4), np.float32), np.zeros((3, 4)), np.zeros(3, np.float32), np.zeros((3, 4),
                          object))),
              lambda path: path.write_bytes((np.save(path, np.zeros((3, 999), np.float32)),
                                             path.read_bytes())[1][:-9])),
    *bad_file(lambda path: data.load_classifier(path.parent, "cpu"), "labeller/config.json", *BAD_OBJECTS[:8], b"{}",
              b'{"model_type": "roberta"}', b'{"model_type": "t5x"}'),
]


@pytest.mark.parametrize("reader, name, expected, content", BAD_INPUTS, ids=[
    f"{name}-{i}" for i, (_, name, *_) in enumerate(BAD_INPUTS)])
def test_a_bad_file_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, reader, name, expected, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content(path) if callable(content) else path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        data.run(lambda: reader(path))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and expected in message and len(message) < 1100, message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("reader, name, content", [
    (read_prompt, "prompt/metapt.json", b"\xef\xbb\xbf{}"), (read_clustering, "kmeans4.json", b'{"method": "lda"}'),
    (read_prompt, "prompt/adapter_model.safetensors", tensor_file(prompt_embeddings=np.zeros((3, 16), np.float16))),
    (read_checkpoint, "run/checkpoint.safetensors", facts_file('{"step": 1, "best": {}, "log": []}')),
    (read_t5, "t5/generation_config.json", b"{}"), (read_clusters, "s.jsonl",
                                                    b'{"text": "a", "label": 0, "cluster": 0}\n' * 9),
    (convert("sst5"), "train.txt", b"\xef\xbb\xbf(3 (2 It) (4 works))\r\n"), (convert("amazon2"), "a.csv",
        b'\xef\xbb\xbf"1","x"\r\n'),
    (convert("sst2"), "train.tsv", b"\xef\xbb\xbfsentence\tlabel\nx\t1\n"), (read_examples, "a.txt",
        b"\xef\xbb\xbffine"),
    (Task.load, "task.json", b'\xef\xbb\xbf{"name": "x", "template": "{text} {mask}", "words": ["bad", "good"]}'),
    (read_examples, "a.jsonl",
     b'\xef\xbb\xbf{"text": "\\ud83d\\ude00", "label": 0, "label": 1}\n' + b" " * 10**7 + b"\n")])
def test_the_same_readers_take_good_files_and_a_byte_order_mark(tmp_path, reader, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content(path) if callable(content) else path.write_bytes(content)
    read = reader(path)
    assert reader is not read_examples or read in ([{"text": "fine"}], [{"text": "😀",
        "label": 1}])  # the last key counts


def test_a_wrong_tokenizer_or_word_is_refused(tokenizer):
    def refused(message, words=("bad", "good"), tokenizer=tokenizer, size=len(tokenizer)):
        with pytest.raises(InputError, match=message):
            PromptedT5(make_t5(tokenizer, vocab_size=size), tokenizer, Task("x", data.TEMPLATE, list(words)))

    refused("'badish' is not one piece", ["badish", "good"])
    refused("'' is not one piece", ["", "good"])
    refused("'Good' is not one piece of the tokenizer, its own", ["Good", "good"])  # this tokenizer knows no capitals
    refused("more pieces than the model knows", size=99)
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    refused("no <pad>", tokenizer=plain)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "bad": 3, "good": 4}, unk_token="<unk>"))
    refused("has no <extra_id_0>", tokenizer=PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"))


def test_an_archive_cannot_name_files_outside_it(tmp_path):
    outside = tmp_path / "train.csv"
    outside.write_text('"1","secret"\n')
    corpus = pack(tmp_path / "c.tar", {"../up.txt": "a", "/abs.txt": "b", str(outside): "no text"})
    before = sorted(tmp_path.rglob("*"))
    assert read_corpus(corpus) == ["a", "b", None] and sorted(tmp_path.rglob("*")) == before
    for name in ("a.tar", "a.zip"):
        archive = pack(tmp_path / name, {str(outside): '"1","x"\n', "../train.csv": '"2","inside"\n'})
        data.convert("amazon2", archive, tmp_path / name[-3:], 0)
        assert [example["text"] for example in read_lines(tmp_path / name[-3:] / "train.jsonl")] == ["inside"]


class Malicious:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("reader, name", [
    (read_t5, "t5/pytorch_model.bin"), (read_t5, "t5/model.safetensors"), (read_prompt,
        "prompt/adapter_model.safetensors"),
    (lambda path: load_prompt(path.parent), "prompt/adapter_model.bin"), (load_prompt, "prompt.pt"),
    (read_checkpoint, "run/checkpoint.safetensors"), (read_checkpoint, "run/checkpoint.pt"),
    (lambda path: data.load_classifier(path.parent, "cpu"), "labeller/pytorch_model.bin"),
    (lambda path: cluster.embed(["a"], 1, path.with_name("e.npy"), str(path.parent), "cpu"),
     "encoder/pytorch_model.bin"),
    (lambda path: cluster.embed([], 1, path, "none", "cpu"), "e.npy")])
def test_no_pickle_is_ever_read(tmp_path, labeller, reader, name):
    path, created = tmp_path / name, tmp_path / "created"
    path.parent.mkdir(exist_ok=True)
    if path.parent.name in ("labeller", "encoder"):
        shutil.copytree(labeller, path.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    if path.parent.name == "prompt":
        (path.parent / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    if path.suffix == ".npy":
        np.save(path, np.array([Malicious(created)], object), allow_pickle=True)
    else:
        torch.save({"prompt_embeddings": Malicious(created)}, path)
    unread = path.name == "checkpoint.pt"  # of another program: the run begins anew beside it
    with nullcontext() if unread else pytest.raises(InputError,
                                                    match=path.stem if path.parent == tmp_path else path.parent.name):
        reader(path)
    assert not created.exists()
    np.load(path, allow_pickle=True) if path.suffix == ".npy" else torch.load(path.open("rb"), weights_only=False)
    assert created.exists()  # as it would have been


# ------------------------------------------------------------------------------------------------------ the benchmark


def with_vmap(model, prompt, supports, queries, alpha):
    """torch.func again, all tasks at once by vmap; for batches of one size without padding."""
    def loss(P, ids, words):
        text = model.t5.get_input_embeddings()(ids)
        inputs = torch.cat([P.expand(len(ids), -1, -1), text], 1)
        answer = model.t5(inputs_embeds=inputs, decoder_input_ids=model.decoder_ids.to(ids.device).expand(len(ids), -1),
                          use_cache=False)
        return torch.nn.functional.cross_entropy(answer.logits[:, 1], words)

    def meta_loss(P):
        def task(support, support_words, query, query_words):
            return loss(P - alpha * torch.func.grad(loss)(P, support, support_words), query, query_words)
        sides = [torch.stack([batch[name] for batch in batches]) for batches in (supports, queries)
                 for name in ("input_ids", "labels")]
        sides[1], sides[3] = model.word_ids[sides[1]], model.word_ids[sides[3]]
        return torch.func.vmap(task)(*[side.to(prompt.device) for side in sides]).sum()
    return torch.func.grad_and_value(meta_loss)(prompt)


def with_higher(model, prompt, supports, queries, alpha):
    """The `higher` library's differentiable optimizer."""
    import higher
    module = torch.nn.ParameterList([torch.nn.Parameter(prompt.clone())])
    optimizer, total = torch.optim.SGD(module.parameters(), alpha), 0
    for support, query in zip(supports, queries):
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (adapted, differentiable):
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
        learner.adapt(model.loss(learner.module[0], support))
        total = total + model.loss(learner.module[0], query)
    return torch.autograd.grad(total, module[0])[0], total.detach()


def peak_memory(function, device):
    """Runs a function; the most memory that it had in use at once, in GiB above what was in use before: the GPU's, or
    the process's by sampling."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - start) / 2**30

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

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
    """Median seconds and peak memory of each function. The memory is measured first, which warms up; then the rounds
    are timed in alternation."""
    memory = {name: peak_memory(function, device) for name, function in contestants.items()}
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}, memory


def through_peft(model, prompt):
    """The same model and prompt by the peft library: batch -> logits at the mask."""
    import peft
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt),
                                     num_transformer_submodules=1)
    theirs = peft.get_peft_model(plain(model).t5, config).eval()
    theirs.base_model.set_attn_implementation("sdpa")
    theirs.prompt_encoder.default.embedding.weight.data.copy_(prompt)

    def logits(batch):
        ids, mask = (batch[name].to(prompt.device) for name in ("input_ids", "attention_mask"))
        decoder_ids = model.decoder_ids.to(prompt.device).repeat(len(ids), 1)
        return theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits[:, 1]
    return theirs, logits


def random_batch(size, tokenizer, args, generator):
    lengths = torch.randint(5, 2 * args.length - 4, (size,), generator=generator)
    lengths = lengths.tolist() if args.ragged else [args.length] * size
    rows = [torch.randint(3, len(tokenizer) - 20, (length,), generator=generator) for length in lengths]
    return {**metapt.pad([(ids, torch.ones_like(ids)) for ids in rows], 0),
            "labels": torch.randint(5, (size,), generator=generator)}


def print_meta_steps(model, prompt, supports, queries, args):
    """The same meta-gradient by us and by others: checked, then timed."""
    rest = [prompt, supports, queries, 0.08]
    step = [plain(model) if args.compare else model, *rest]
    others = {"textbook loop": textbook_loop, "torch.func, loop": functional, "torch.func, vmap": with_vmap,
              "higher": with_higher, "learn2learn": with_learn2learn}
    contestants = {f"ours, {n} tasks a pass": lambda n=n: meta_gradient(model, *rest, tasks_per_pass=n)
                   for n in args.tasks_per_pass}
    contestants |= {name: lambda name=name: others[name](*step) for name in others if name in args.compare}
    if args.ragged:
        contestants.pop("torch.func, vmap", None)
    reference = textbook_loop(*step)[0] if args.compare else None
    for name in list(contestants) if args.compare else ():
        try:
            error = relative_error(contestants[name]()[0], reference)
            print(f"{name:24} differs from the textbook loop by {error:.1e}", flush=True)
        except ImportError as missing:
            print(f"{name:24} not measured: {missing}")
            del contestants[name]

    def forward():
        with torch.no_grad():
            for support in supports:
                step[0](prompt, support)

    seconds, memory = measure({"forward pass F": forward, **contestants}, args.rounds, args.device)
    fastest = min(seconds[name] for name in seconds if name.startswith("ours"))
    print(f"\n{'':24}{'seconds':>10}{'in F':>8}{'of our best':>13}{'peak GiB':>10}")
    for name in seconds:
        print(f"{name:24}{seconds[name]:10.3f}{seconds[name] / seconds['forward pass F']:8.2f}"
              f"{seconds[name] / fastest:13.2f}{memory[name]:10.2f}")


def print_downstream(model, prompt, batch, args):
    """A step of prompt tuning and an evaluation of the same examples, by us and through peft."""
    try:
        theirs, logits = through_peft(model, prompt)
    except ImportError as missing:
        return print(f"\npeft not measured: {missing}")
    words = model.word_ids[batch["labels"]].to(prompt.device)
    weight, ours = theirs.prompt_encoder.default.embedding.weight, prompt.clone().requires_grad_()
    with torch.no_grad():
        print(f"\nlogits through peft differ by {relative_error(logits(batch), model(prompt, batch)):.1e}")
    contestants = {
        "step, ours": lambda: torch.autograd.grad(model.loss(ours, batch), ours),
        "step, peft": lambda: torch.autograd.grad(torch.nn.functional.cross_entropy(logits(batch), words), weight),
        "evaluation, ours": lambda: model.predict(prompt, batch),
        "evaluation, peft": torch.no_grad()(lambda: logits(batch).argmax(-1))}
    seconds, memory = measure(contestants, args.rounds, args.device)
    print(f"{'':24}{'examples/s':>10}{'peak GiB':>10}")
    for name in seconds:
        print(f"{name:24}{len(words) / seconds[name]:10.1f}{memory[name]:10.2f}")


def print_precision(model, prompt, supports, queries):
    """What lower precision costs: the meta-gradient's error against float64."""
    def gradient(dtype, autocast=False):
        copied = copy.deepcopy(model).to(dtype)
        start = prompt.to(torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.autocast(prompt.device.type, torch.bfloat16, enabled=autocast):
            return meta_gradient(copied, start, supports, queries, 0.08)[0].double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5LayerNorm, "forward", layer_norm)
        exact = gradient(torch.float64)
    print(f"\n{'against float64':24}{'error':>10}{'cosine':>10}")
    for name, kind in {"float32": (torch.float32,), "bfloat16 weights": (torch.bfloat16,),
                       "bfloat16 autocast": (torch.float32, True)}.items():
        found = gradient(*kind)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0)
        print(f"{name:24}{relative_error(found, exact):10.1e}{cosine:10.6f}")


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add("--shape", "of the T5, with random weights", "tiny", choices=list(SHAPES))
    parser.add("--tasks", "meta-tasks of a step", 10, type=int)
    parser.add("--m", "support examples of a task, and query examples", 4, type=int)
    parser.add("--length", "tokens of an example", 40, type=int)
    parser.add("--ragged", "draws the lengths evenly from 5 to twice --length", False, action="store_true")
    parser.add("--prompt-length", "vectors of the prompt", 100, type=int)
    parser.add("--rounds", "timed rounds; the median is reported", 5, type=int)
    parser.add("--tasks-per-pass", "of our step", [1, 4, 10], type=int, nargs="+")
    parser.add("--dtype", "of weights and prompt", "float32", choices=["float32", "bfloat16", "float64"])
    parser.add("--device", "cpu or cuda", "cuda" if torch.cuda.is_available() else "cpu")
    parser.add("--threads", "CPU threads; 0 takes the cores that are free", 0, type=int)
    parser.add("--compare", "with what to compare our step", ["textbook loop", "torch.func, loop", "torch.func, vmap",
               "higher", "learn2learn"], nargs="*")
    parser.add("--only", "parts of the benchmark", ["step", "downstream", "precision"], nargs="+")
    args = parser.parse(argv)

    tokenizer, dtype = make_tokenizer(), getattr(torch, args.dtype)
    model = PromptedT5(make_t5(tokenizer, args.shape).to(args.device, dtype), tokenizer, SENTIMENT)
    prompt, generator = model.init_prompt(args.prompt_length).to(dtype), torch.Generator().manual_seed(0)
    supports, queries = ([random_batch(args.m, tokenizer, args, generator) for _ in range(args.tasks)] for _ in "sq")
    print(f"T5 {args.shape}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads: {args.tasks} tasks, "
          f"{args.m} + {args.m} examples of {args.length} tokens{' on average' * args.ragged}, {args.prompt_length} "
          "prompt vectors\n", flush=True)
    if "step" in args.only:
        print_meta_steps(model, prompt, supports, queries, args)
    if "downstream" in args.only:
        print_downstream(model, prompt, random_batch(32, tokenizer, args, generator), args)
    if "precision" in args.only:
        print_precision(model, prompt, supports[:2], queries[:2])


if __name__ == "__main__":
    data.run(main)
