"""The sanity checks of this folder: the demo, the small T5, the inputs of real text."""

import io
import json
import re
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import data
import demo
import inner_step
import makings
import metapt
import small_t5
from metapt import InputError, PromptedT5, Task

SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The demo, its T5 hardly trained, in a folder with a space in its name; and an eleventh of
    its corpus as a task."""
    folder = demo.demo(tmp_path_factory.mktemp("world") / "a demo", steps=3)
    corpus = read_lines(folder / "corpus" / "train.jsonl")[::11]  # of all grades: they come in turn
    data.write_task(folder / "few", SENTIMENT, {"train": corpus})
    return folder


# ----------------------------------------------------------------------------------------- The demo


def test_the_demo_holds_tasks_from_other_domains(world):
    source = read_lines(world / "source" / "clustered.jsonl")
    assert {example["domain"] for example in source} == set(demo.SOURCE_DOMAINS)
    assert {example["cluster"] for example in source} == {0, 1, 2, 3}
    for domain in demo.TASK_DOMAINS:
        test = read_lines(world / domain / "test.jsonl")
        assert {example["domain"] for example in test} == {domain}
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    ids = model.encode(source)["input_ids"]
    assert model.tokenizer.unk_token_id not in ids


def test_the_demo_stands_once_it_is_whole(world, tmp_path, monkeypatch, capsys):
    assert demo.demo(world) == world and not capsys.readouterr().out
    clusters = tmp_path / "demo" / "source" / "clustered.json"
    clusters.parent.mkdir(parents=True)
    clusters.write_text("{}")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_demo", interrupted)
    with pytest.raises(KeyboardInterrupt, match="makes the demo again from its beginning"):
        demo.demo(tmp_path / "demo", restart=True)
    assert not demo.stands(tmp_path / "demo")


def test_another_making_has_other_seeds_of_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(small_t5, "main", lambda flags: seen.append(flags[-1]))
    monkeypatch.setattr("cluster.main", lambda flags: None)
    seen, found = [], []
    for making in (1, 2):
        demo.write_demo(tmp_path / f"{making}", 3, making)
        read = lambda name: json.loads((tmp_path / f"{making}" / f"{name}.json").read_text())
        found.append((read("maml")["seed"], read("ppt")["seed"], read("ft")["seeds"]))
    assert seen == ["1", "2"]
    assert found == [(1, 1, [1, 2, 3, 4, 5]), (2, 2, [6, 7, 8, 9, 10])]
    one, two = (read_lines(tmp_path / name / "corpus" / "train.jsonl") for name in "12")
    assert one != two


def test_commands_at_once_end_with_the_one_that_failed(capfd):
    demo.at_once(["data.py", "convert", "--help"], ["data.py", "--help"])
    assert capfd.readouterr().out.count("usage: data.py") == 2
    with pytest.raises(SystemExit, match="2"):
        demo.at_once(["data.py", "--help"], ["data.py", "nothing"])


def test_makings_are_compared_over_makings():
    scores = {}
    for shift, method in enumerate(makings.METHODS):
        for task in demo.TASK_DOMAINS:
            scores[task, method] = np.array([[50.0, 52.0], [60.0, 62.0], [55.0, 57.0]]) + shift
    scores["books", "PT"] = scores["books", "MetaPT"] - np.array([[1.0], [2.0], [3.0]])
    rows = {row[0]: row for row in makings.compare(scores, "MetaPT")[1:]}
    deviation = np.std([50, 52, 60, 62, 55, 57], ddof=1)
    assert rows["MetaPT"][1] == f"58.00 ± {deviation:.2f}" and rows["MetaPT"][3] == ""
    half = 4.302653 / 3**0.5  # t of two degrees of freedom, a deviation of 1, three makings
    assert rows["PT"][3] == f"-2.00 [{-2 - half:+.2f}, {-2 + half:+.2f}]"
    assert rows["PPT"][4] == "-1.00 [-1.00, -1.00]"


def test_what_the_inner_step_does_is_measured(world):
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    prompt = model.init_prompt(4)
    batches = list(model.batches(read_lines(world / "few" / "train.jsonl")[:16], 4))
    supports, queries = batches[:2], batches[2:]
    moved, before, after, cosine = inner_step.inner_step(model, prompt, supports, queries, 0.5)
    adapted = [metapt.adapt(model, prompt, support, 0.5).detach() for support in supports]
    shares = [(P - prompt).norm() / prompt.norm() for P in adapted]
    assert moved == pytest.approx(np.mean(shares), rel=1e-4)
    assert before == pytest.approx(np.mean([model.loss(prompt, q).item() for q in queries]))
    losses = [model.loss(P, query).item() for P, query in zip(adapted, queries)]
    assert after == pytest.approx(np.mean(losses)) and after != pytest.approx(before)
    assert 0 < cosine < 0.9999
    assert inner_step.inner_step(model, prompt, supports, queries, 1e-9)[3] > 0.9999


# -------------------------------------------------------------------------- A small T5 from nothing


def test_learn_tokenizer_keeps_words_whole():
    texts = ["an unforgettable film", "a forgettable plot", "the plot of a film"] * 3
    tokenizer = small_t5.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    for word in ("unforgettable", "okay", " Okay"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    ids = tokenizer("The PLOT").input_ids
    assert ids == tokenizer("the plot").input_ids and ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the plot"


@pytest.mark.parametrize("length", [2, 3, 7, 64, 500, 3000])
def test_corrupted_spans_fit_back_into_the_text(length):
    rng, sentinels, end = np.random.default_rng(length), list(range(1000, 1100)), 7
    ids = rng.integers(10, 900, length).tolist()
    source, target = small_t5.corrupt(ids, sentinels, end, rng)
    assert source[-1] == target[-1] == end and (source[-2] in sentinels or length == 2)
    spans, at = {}, None
    for i in target[:-1]:
        if i in sentinels:
            at = i
            spans[at] = []
        else:
            spans[at].append(i)

    last = list(spans)[-1]
    assert spans.pop(last) == [] and list(spans) == sentinels[: len(spans)]
    filled = []
    for i in source[:-1]:
        filled += spans.get(i, [i])
    assert filled == ids
    lost = sum(map(len, spans.values()))
    assert lost == max(1, round(0.15 * length))
    assert length != 500 or len(spans) == round(lost / 3)


def test_windows_are_batches_for_t5(world):
    _, tokenizer = metapt.load_t5(world / "t5")
    stream = np.arange(200, 500)
    batch = small_t5.draw_windows(stream, 6, tokenizer, 20, np.random.default_rng(0))
    lengths = (batch["input_ids"] == tokenizer.eos_token_id).int().argmax(1) + 1
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    assert (batch["labels"] == -100).any() and (
        batch["labels"] == tokenizer.eos_token_id
    ).sum() == 6


def test_excerpts_are_one_to_three_sentences():
    text, found = "One. Two! Three? Four. Five.", set()
    for seed in range(60):
        part = small_t5.excerpt(text, np.random.default_rng(seed))
        assert part in text
        found.add(len(re.findall(r"[.!?]", part)))
    assert found == {1, 2, 3}


def test_labelled_examples_are_drawn_from_every_class_alike_and_a_share_is_cut():
    many, one = [{"text": "One. Two. Three. Four.", "label": 0}] * 99, {"text": "x", "label": 1}
    by_class, rng = small_t5.classes_of([*many, one]), np.random.default_rng(0)
    drawn = small_t5.draw_labelled(by_class, ["text"], 2000, 0.25, rng)
    first = [example for example in drawn if example["label"] == 0]
    assert len(first) / 2000 == pytest.approx(0.5, abs=0.05)
    cut = sum(example["text"] != many[0]["text"] for example in first)
    assert cut / len(first) == pytest.approx(0.25, abs=0.05)


def test_word_runs_see_through_the_forms_of_a_treebank():
    plain = small_t5.word_runs("We don't think it's the best film (of the year) in any way.")
    treebank = small_t5.word_runs("We do n't think it 's the best film -- of the year in any way .")
    assert plain == treebank and len(plain) == 6
    assert small_t5.word_runs("Short one!") == {"short one"}


def make_t5(world, out, *switches, **flags):
    where = ["--corpus", f"{world}/few/train.jsonl", "--task", f"{world}/few", "--out", str(out)]
    words = "--d-model 16 --d-ff 16 --heads 2 --layers 1 --pieces 300 --dtype float32"
    words += " --validation 40 --max-steps 6 --eval-every 4 --batch-size 4 --labelled 4"
    more = []
    for name, value in flags.items():
        more += [f"--{name.replace('_', '-')}", str(value)]
    small_t5.main([*where, *words.split(), *more, *switches])


def test_a_t5_is_made_replaced_and_depends_on_its_seed(world, tmp_path):
    make_t5(world, tmp_path / "t5")
    assert [line["step"] for line in read_lines(tmp_path / "t5" / "log.jsonl")] == [4, 6]
    PromptedT5(*metapt.load_t5(tmp_path / "t5"), SENTIMENT)
    with pytest.raises(InputError, match="t5: a model stands there already; give another --out"):
        make_t5(world, tmp_path / "t5")
    weights = [(tmp_path / "t5" / "model.safetensors").read_bytes()]
    for seed in (1, 2):
        make_t5(world, tmp_path / "t5", "--restart", seed=seed)
        weights.append((tmp_path / "t5" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"pieces": 5}, "train.jsonl: .*; raise --pieces"),
        ({"max_length": 3}, "alone is longer than 3 tokens; raise max_length"),
        ({"learning_rate": 1e30}, "step 4: the loss is not finite; lower --learning-rate"),
        ({"max_length": 5000}, "too little text to pre-train on; give more --corpus"),
    ],
)
def test_a_t5_that_cannot_be_made_leaves_nothing(world, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make_t5(world, tmp_path / "t5", **flags)
    assert not (tmp_path / "t5").exists()


def test_what_shares_words_with_an_excluded_task_is_left_out(world, tmp_path, capsys):
    make_t5(world, tmp_path / "t5", exclude=world / "books")
    printed = capsys.readouterr().out
    left_out = int(re.search(r"train.jsonl: ([\d,]+) of 546 texts", printed)[1])
    assert 0 < left_out < 546
    with pytest.raises(InputError, match="few: --exclude leaves no example of it"):
        make_t5(world, tmp_path / "none", exclude=world / "few")


def test_pretraining_learns_both_of_its_objectives(world):
    examples = read_lines(world / "few" / "train.jsonl")[:200]
    t5, tokenizer = metapt.load_t5(world / "t5")
    model = PromptedT5(t5, tokenizer, SENTIMENT, 48)
    t5.requires_grad_(True)
    ids = tokenizer([example["text"] for example in examples], add_special_tokens=False).input_ids
    stream, by_class = np.concatenate(ids), small_t5.classes_of(examples)

    def draw(step):
        rng = np.random.default_rng(step)
        labelled = model.encode(small_t5.draw_labelled(by_class, ["text"], 16, 0.25, rng))
        return small_t5.draw_windows(stream, 16, tokenizer, 48, rng), model, labelled

    optimizer = small_t5.Adafactor(t5.parameters(), 0.02, relative_step=False)
    steps = small_t5.pretrain(t5, draw, optimizer, range(60), lambda step: 0.02, torch.float32)
    losses = np.array(list(steps))
    assert (losses[-5:, :2].mean(0) < 0.8 * losses[:5, :2].mean(0)).all()


# ------------------------------------------------------------- The inputs of the study on real text


def pack(path, files):
    """Writes {name: text} as a .tar.gz."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pack_downloads(folder, reviews):
    """Writes the four downloads that real.py reads, each of the same reviews."""
    films, products, lines, rated = {}, "", "", ""
    for i, review in enumerate(reviews):
        label, text = review["label"], review["text"]
        films[f"aclImdb/train/{'pos' if label > 2 else 'neg'}/{i}_{2 * label + 1 + i % 2}.txt"] = (
            text
        )
        films[f"aclImdb/train/unsup/{i}_0.txt"] = f"{text}<br /><br />{text}"
        tagged = f"<rating>\n{label + 1}.0\n</rating>\n<review_text>\n{text}\n</review_text>"
        products += f"<review>\n{tagged}\n</review>\n"
        lines += f"{int(label > 2)}\t{text}\n"
        rated += f"{i}\t{label - 2}\t{text}\n"

    domains = {}
    for kind in ("train", "test", "unlabel"):
        domains |= {f"mtl-dataset/{name}.task.{kind}": lines for name in ("MR", "toys")}
    kinds = "amazonReviewSnippets", "nytEditorialSnippets", "tweets"
    inner = {f"hutto_ICWSM_2014/{kind}_GroundTruth.txt": rated for kind in kinds}
    inner = pack(folder / "inner.tgz", inner).read_bytes()
    pack(folder / "aclImdb_v1.tar.gz", films)
    pack(
        folder / "domain_sentiment_data.tar.gz", {"sorted_data_acl/books/positive.review": products}
    )
    pack(folder / "fudan-mtl-dataset.tar.gz", domains)
    vader = {"additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    pack(folder / "vaderSentiment-3.3.2.tar.gz", vader)


def test_the_inputs_of_the_study_are_what_the_downloads_hold(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(HERE / "real.py"))["main"]
    with pytest.raises(InputError, match="aclImdb_v1.tar.gz: No such file .*; download it to the"):
        main()
    reviews = read_lines(world / "few" / "train.jsonl")[:200]
    pack_downloads(tmp_path, reviews)
    main()
    of = lambda name: [(row["text"], row["label"]) for row in read_lines(Path("tasks", name))]
    rated = [(review["text"], review["label"]) for review in reviews]
    assert of("stars/train.jsonl") == of("snippets/train.jsonl") == 2 * rated
    two = [(text, int(label > 2)) for text, label in rated]
    assert of("amazon-two/train.jsonl") == 2 * two  # without the domain of films
    texts = [text for text, _ in rated]
    films = [f"{text} {text}" for text in texts]
    assert Path("imdb-unlabelled.txt").read_text().splitlines() == films
    assert [row["text"] for row in read_lines("amazon-unlabelled.jsonl")] == texts
    opened = [row["text"] for row in read_lines("open.jsonl")]
    assert opened[:200] == texts and sorted(opened[200:]) == sorted(texts)
