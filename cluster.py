"""
Groups source data into meta-tasks (Section 4.2, Appendix B): sentence-BERT embeddings, then
K-means.

    python cluster.py --source source/examples.jsonl                  # the paper; kmeans10.jsonl
    python cluster.py --source source/examples.jsonl --method lda     # Table 2; also random, label
    python cluster.py --source source/examples.jsonl --k 3 6 10 --figure tsne.png   # Figure 4

The output holds the source's lines in their order, each with its "cluster". Where it is in another
folder than the source, the source's task.json is copied beside it. Embeddings are stored beside the
output and used again.
"""

import script  # first: it sets how PyTorch takes its memory

import math
import sys
from pathlib import Path

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.manifold import TSNE

import data
from metapt import InputError, Task, digest, input_errors, write_atomically, write_json
from script import number

METHODS = ("kmeans", "lda", "random", "label")  # Appendix B.1, Table 2
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # a sentence-BERT; the paper names none

# ------------------------------------------------ Section 4.2 and Appendix B.1: four clusterings


def kmeans(embeddings, k, seed):
    """FAISS K-means (Section 4.2), the best of five starts: each embedding's cluster [N], and its
    squared distance to the cluster's centroid [N]."""
    model = faiss.Kmeans(
        embeddings.shape[1],
        k,
        niter=50,
        nredo=5,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(embeddings),  # all of them, where FAISS would draw some
        gpu=faiss.get_num_gpus() > 0,
    )
    model.train(embeddings)
    distances, clusters = model.index.search(embeddings, 1)
    return clusters[:, 0], distances[:, 0]


def count_words(texts, size):
    """The `size` most frequent English words of N texts but for stop words, or where there are no
    others all words: counts [N, words] and the words."""
    vectorizer = CountVectorizer(stop_words="english", max_features=size)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:  # which scikit-learn calls an empty vocabulary
        vectorizer = CountVectorizer(token_pattern=r"\w+", max_features=size)
        counts = vectorizer.fit_transform(texts)
    return counts, vectorizer.get_feature_names_out()


def lda(counts, k, seed, size=512, updates=100):
    """Latent Dirichlet allocation (Appendix B.1) of word counts [N, words], online: as many passes
    over them as make 100 updates of 512 texts. Each text's most probable topic [N], and one minus
    that probability [N]."""
    passes = math.ceil(updates * size / max(counts.shape[0], size))
    model = LatentDirichletAllocation(
        k, learning_method="online", batch_size=size, max_iter=passes, random_state=seed
    )
    topics = model.fit_transform(counts)
    return topics.argmax(1), 1 - topics.max(1)


def random_clusters(count, k, seed):
    """Clusters of equal size, give or take one, drawn at random [N] (Appendix B.1)."""
    return np.random.default_rng(seed).permutation(count) % k


# ---------------------------------------------------- Appendix B.2: what is in a cluster, Figure 4


def nearest(clusters, distances, count=3):
    """Appendix B.2: {cluster: the numbers of the texts that are nearest to its centroid}."""
    rows = {}
    for name in np.unique(clusters):
        members = np.flatnonzero(clusters == name)
        order = np.argsort(distances[members], kind="stable")
        rows[int(name)] = members[order[:count]].tolist()
    return rows


def telling_words(counts, clusters, words, count=8):
    """Appendix B.2: {cluster: the words that tell it from the others}, by the terms of the
    Kullback-Leibler divergence between the words' shares within and without. counts [N, words]:
    each text's."""
    names = np.unique(clusters)
    held = [counts[clusters == name].sign().sum(0) for name in names]  # texts that hold a word
    held = np.array([np.asarray(row).ravel() for row in held])
    within = held + 0.1
    without = held.sum(0) - held + 0.1
    within /= within.sum(1, keepdims=True)
    without /= without.sum(1, keepdims=True)
    order = np.argsort(-within * np.log(within / without), 1)[:, :count]
    return {int(name): words[row].tolist() for name, row in zip(names, order)}


def plot(embeddings, panels, seed, sample=2500):
    """Figure 4: t-SNE of a sample of the embeddings, with a panel for every (title, clusters [N],
    words of each cluster). Returns the figure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:sample])
    tsne = TSNE(perplexity=min(30, len(rows) / 4), random_state=seed)
    points = tsne.fit_transform(embeddings[rows])
    figure = Figure(figsize=(6 * len(panels), 7.5))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, clusters, words) in zip(axes, panels):
        colours = colormaps["tab10" if len(words) <= 10 else "gist_ncar"]
        colours = colours.resampled(max(10, len(words)))
        for i, name in enumerate(words):
            x, y = points[clusters[rows] == name].T
            label = f"{name}: {', '.join(words[name][:3])}"
            marker = "os^DvPX*<>"[i % 10]  # so that clusters can be told apart without colour
            axis.scatter(x, y, s=9, marker=marker, color=colours(i), linewidths=0, label=label)

        axis.set(title=title, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05), "ncols": 2}
        axis.legend(**below, fontsize=9, markerscale=2.5, frameon=False)

    figure.suptitle(f"{len(rows):,} of {len(embeddings):,} embeddings", y=0.95)
    return figure


# -------------------------------------------------------------------- The run: files, errors, flags


def embed(texts, folder, encoder, device):
    """Section 4.2's sentence embeddings of unit length, [N, d] float32, by a sentence-transformers
    model's name or folder; the folder of any transformer serves too, with the mean over its tokens.
    They are stored in `folder` under the digest of what they are made of. Raises InputError."""
    made_of = {"texts": [digest(text.encode()) for text in texts]}
    made_of["encoder"] = script.contents(encoder)
    path = Path(folder, f"embeddings-{digest(made_of)}.npy")
    if not path.exists():
        with input_errors(encoder, "give a sentence-BERT by hub name or folder"):
            weights = {"use_safetensors": True, "dtype": torch.float32}
            model = SentenceTransformer(encoder, device=device, model_kwargs=weights)

        options = {"batch_size": 128, "show_progress_bar": sys.stderr.isatty()}
        embeddings = model.encode(texts, normalize_embeddings=True, **options)
        embeddings = embeddings.astype(np.float32)
        finite = np.isfinite(embeddings).all(1)
        if not finite.all():
            problem = f"the embedding of {texts[finite.argmin()][:60]!r} is not finite"
            raise InputError(f"{encoder}: {problem}; give another --encoder")
        write_atomically(path, lambda file: np.save(file, embeddings, allow_pickle=False))

    return np.load(path, mmap_mode="r", allow_pickle=False)


def describe(task, texts, labels, clusters, distances, telling):
    """Prints Appendix B.2's manual inspection: every cluster's size, labels, most telling words and
    the three texts nearest to its centroid (its first three, where there is no centroid)."""
    for name, rows in nearest(clusters, distances).items():
        histogram = np.bincount(labels[clusters == name], minlength=len(task.words))
        shares = [f"{count:,} {word}" for count, word in zip(histogram, task.words)]
        print(f"cluster {name}: {histogram.sum():,} examples: {', '.join(shares)}")
        print(f"    words: {' '.join(telling[name])}")
        for row in rows:
            print(f"    {' '.join(texts[row].split())[:110]}")


def make_meta_tasks(args):
    """Section 4.2: clusters args.source by args.method, for every number of clusters in args.k."""
    source = Path(args.source)
    task = Task.load(source.parent)
    examples = list(data.read_examples(source, task))
    texts = [data.text_of(example, task) for example in examples]
    labels = np.array([example["label"] for example in examples])
    if max(args.k) > len(examples):
        raise InputError(f"{source}: {len(examples):,} examples cannot make {args.k} clusters")

    with input_errors(source, "give texts with words, which the report counts"):
        counts, words = count_words(texts, args.vocabulary)
    folder = Path(args.out).parent if args.out else source.parent
    if args.method == "kmeans" or args.figure:
        embeddings = embed(texts, folder, args.encoder, args.device)

    panels = []
    for k in args.k:
        distances = np.zeros(len(examples))
        if args.method == "kmeans":
            clusters, distances = kmeans(embeddings, k, args.seed)
        elif args.method == "lda":
            clusters, distances = lda(counts, k, args.seed)
        elif args.method == "random":
            clusters = random_clusters(len(examples), k, args.seed)
        else:
            clusters = labels

        name = f"{args.method}{'' if args.method == 'label' else k}.jsonl"
        out = Path(args.out or folder / name)
        if source.resolve() in (out.resolve(), out.with_suffix(".json").resolve()):
            raise InputError(f"{source}: its clusters would be written over it; give another --out")
        write_clusters(out, task, examples, clusters, args)
        telling = telling_words(counts, clusters, words)
        describe(task, texts, labels, clusters, distances, telling)
        panels.append((f"{args.method}, {len(telling)} clusters", clusters, telling))
        print(f"wrote {out}: {len(examples):,} examples in {len(telling)} clusters")

    if args.figure:
        script.save_figure(args.figure, plot(embeddings, panels, args.seed))


def write_clusters(out, task, examples, clusters, args):
    """Writes the examples, each with its cluster, their task, and last the arguments with the
    digest of the examples' file, which tells whether they belong to it."""
    pairs = zip(examples, clusters.tolist())
    data.write_lines(out, ({**example, "cluster": name} for example, name in pairs))
    if out.parent != Path(args.source).parent:
        task.save(out.parent)
    notes = {"clusters": digest(out), "method": args.method, "arguments": vars(args)}
    write_json(out.with_suffix(".json"), notes)


def main(argv=None):
    """Reads the flags and makes the meta-tasks."""
    parser = script.Parser(__doc__)
    parser.add_config()
    add = parser.add_argument
    add("--source", required=True, metavar="FILE", help="examples, their task.json beside them")
    add("--out", metavar="FILE", help="to write (default: METHOD and K.jsonl beside the source)")
    add("--method", default="kmeans", choices=METHODS, help="how to cluster, as Table 2 compares")
    add("--k", type=number(2), default=[10], nargs="+", help="clusters; of several a file each")
    add("--encoder", default=ENCODER, help="a sentence-BERT by hub name or folder")
    add("--figure", metavar="FILE", help="a .png, .pdf or .svg: draw t-SNE, a panel for each k")
    add("--vocabulary", type=number(1), default=10_000, help="words that LDA and the report count")
    seed = number(0, 2**31 - 1)  # FAISS takes no larger one
    add("--seed", type=seed, default=1, help="of K-means, LDA, random clusters and t-SNE")
    parser.add_machine()
    args = parser.parse(argv)
    if len(args.k) > 1 and (args.out or args.method == "label"):
        parser.error("--out and --method label go with one --k")
    if args.out and not args.out.endswith(".jsonl"):
        parser.error("--out must end in .jsonl; its arguments go into a .json of the same name")

    script.set_machine(args)
    make_meta_tasks(args)


if __name__ == "__main__":
    script.run(main)
