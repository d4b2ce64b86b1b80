"""
Groups source data into meta-tasks (Section 4.2, Appendix B): sentence-BERT embeddings, then K-means.

    python cluster.py --source source/examples.jsonl                                 # the paper; source/kmeans10.jsonl
    python cluster.py --source source/examples.jsonl --method lda                    # Table 2; also random, label
    python cluster.py --source source/examples.jsonl --k 3 6 10 --figure tsne.png    # Figure 4

The output holds the source's lines in their order, each with its "cluster". Where it is in another folder than the
source, the source's task.json is copied beside it. Embeddings are stored beside the source and used again. The source
is read line by line, more than once, and never held in memory.
"""

import array
import collections
import hashlib
import itertools
import json
import sys
from pathlib import Path

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.manifold import TSNE
from tqdm import tqdm

import data
from metapt import InputError, Task, first_line, write_beside


def read_texts(source, task):
    for example in data.read_examples(source, task):
        yield " ".join(example[field] for field in task.fields)


def blocks(texts, size):
    """Lists of `size` texts; the last is shorter."""
    return iter(lambda texts=iter(texts): list(itertools.islice(texts, size)), [])


def survey(source, task, words):
    """One pass over the source: its labels [N], a digest of its texts, and the `words` words that most of them hold,
    without English stop words. Raises InputError, so that nothing later meets a broken line."""
    labels, digest, counts = array.array("q"), hashlib.sha256(), collections.Counter()
    analyze = CountVectorizer(stop_words="english").build_analyzer()
    for example in tqdm(data.read_examples(source, task), "reading", disable=None):
        text = " ".join(example[field] for field in task.fields)
        labels.append(example["label"])
        digest.update(text.encode() + b"\n")
        counts.update(set(analyze(text)))
        if len(counts) > 100 * words:  # to bound the memory: rare words are not among the most frequent
            counts = collections.Counter(dict(counts.most_common(50 * words)))
    return np.array(labels), digest, [word for word, _ in counts.most_common(words)] or ["none"]


def embed(texts, count, path, encoder, device, size=20_000):
    """Sentence embeddings of unit length, [N, d] float32, by a sentence-transformers model's name or folder; the
    folder of any transformer serves too, with the mean over its tokens. They are stored at `path`, block after block,
    so that a stopped run continues, and mapped into memory from there. Raises InputError."""
    if path.exists():
        return open_embeddings(path, "r", count)
    try:
        model = SentenceTransformer(encoder, device=device, model_kwargs={"use_safetensors": True})
    except Exception as error:  # sentence-transformers raises all kinds
        raise InputError(f"{encoder}: cannot be loaded by sentence-transformers: {first_line(error)}")
    partial, shape = path.with_suffix(".partial"), (count, model.get_embedding_dimension())
    if not partial.exists():  # written in full, not as a hole: a disk that fills up later kills what is mapped
        write_beside(partial, lambda beside: write_zeros(beside, shape))
    embeddings = open_embeddings(partial, "r+", *shape)
    pool = model.start_multi_process_pool() if device == "cuda" and torch.cuda.device_count() > 1 else None
    start = 0
    for block in blocks(tqdm(texts, "embedding", count, disable=None), size):
        rows = slice(start, start := start + len(block))
        if not embeddings[rows][-1].any():  # rows that are not written yet are zeros
            embeddings[rows] = model.encode(block, batch_size=128, normalize_embeddings=True, pool=pool,
                                            show_progress_bar=sys.stderr.isatty())  # sorts a block by length
            embeddings.flush()
    if pool:
        model.stop_multi_process_pool(pool)
    partial.rename(path)
    return open_embeddings(path, "r", count)


def write_zeros(path, shape):
    with open(path, "wb") as file:
        np.save(file, np.broadcast_to(np.float32(0), shape), allow_pickle=False)


def open_embeddings(path, mode, *shape):
    """Stored embeddings, mapped into memory. Raises InputError where they are others than expected."""
    try:
        embeddings = np.lib.format.open_memmap(path, mode)  # which refuses objects, so nothing is unpickled
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or embeddings.shape[:len(shape)] != shape:
            raise ValueError(f"{embeddings.dtype} of shape {embeddings.shape}")
        return embeddings
    except ValueError as error:
        raise InputError(f"{path}: not the embeddings of {shape[0]:,} texts: {error}; remove it")


def kmeans(embeddings, k, seed):
    """FAISS K-means, the best of five starts: each embedding's cluster [N], and its squared distance to the cluster's
    centroid [N]."""
    model = faiss.Kmeans(embeddings.shape[1], k, niter=50, nredo=5, seed=seed, min_points_per_centroid=1,
                         max_points_per_centroid=len(embeddings), gpu=faiss.get_num_gpus() > 0)
    model.train(embeddings)
    distances, clusters = model.index.search(embeddings, 1)
    return clusters[:, 0], distances[:, 0]


def lda(texts, count, vectorizer, k, seed, size=512, updates=100):
    """Latent Dirichlet allocation, online: as many passes over the texts as make 100 updates of 512 texts. Each
    text's most probable topic [N], and one minus that probability [N]."""
    model = LatentDirichletAllocation(k, learning_method="online", total_samples=count, random_state=seed)
    passes = -(-updates * size // max(count, size))
    for _ in tqdm(range(passes), "LDA, passes", disable=None):
        for block in blocks(texts(), size):
            model.partial_fit(vectorizer.transform(block))
    topics = [(topic.argmax(1), 1 - topic.max(1)) for block in blocks(texts(), size)
              for topic in [model.transform(vectorizer.transform(block))]]
    return tuple(np.concatenate(column) for column in zip(*topics))


def describe(texts, clusters, distances, labels, words, vectorizer):
    """Prints Appendix B.2's manual inspection: every cluster's size, labels, most telling words and the three texts
    nearest to its centroid (where there is one). Returns each cluster's most telling words."""
    names = np.unique(clusters)
    near = {name: (members := np.flatnonzero(clusters == name))[np.argsort(distances[members], kind="stable")[:3]]
            for name in names}
    wanted, found = set(np.concatenate(list(near.values())).tolist()), {}
    counts, start = np.zeros((len(names), len(vectorizer.vocabulary))), 0
    for block in blocks(texts, 10_000):
        matrix = vectorizer.transform(block)
        for row, name in enumerate(names):
            counts[row] += np.asarray(matrix[clusters[start:start + len(block)] == name].sign().sum(0))[0]
        found.update((i, block[i - start]) for i in wanted & set(range(start, start + len(block))))
        start += len(block)
    rest = counts.sum(0) - counts
    share, others = ((table + 0.1) / (table + 0.1).sum(1, keepdims=True) for table in (counts, rest))
    telling = np.argsort(-share * np.log(share / others), 1)[:, :8]  # the terms of a Kullback-Leibler divergence
    telling = {name: vectorizer.get_feature_names_out()[row].tolist() for name, row in zip(names, telling)}
    for name in names:
        histogram = np.bincount(labels[clusters == name], minlength=len(words))
        print(f"cluster {name}: {histogram.sum():,} examples: "
              + ", ".join(f"{count:,} {word}" for count, word in zip(histogram, words))
              + f"\n    words: {' '.join(telling[name])}")
        for index in near[name]:
            print(f"    {' '.join(found[index].split())[:110]}")
    return telling


def draw(path, embeddings, panels, seed, sample=3000):
    """Figure 4: t-SNE of a sample of the embeddings, a panel for every (title, clusters [N], words of each cluster)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:sample])
    points = TSNE(perplexity=min(30, len(rows) / 4), random_state=seed).fit_transform(embeddings[rows])
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 7.5), squeeze=False)
    for axis, (title, clusters, words) in zip(axes[0], panels):
        colours = pyplot.get_cmap("tab10" if len(words) <= 10 else "gist_ncar", max(10, len(words)))
        for i, name in enumerate(words):
            axis.scatter(*points[clusters[rows] == name].T, s=6, color=colours(i), linewidths=0,
                         label=f"{name}: {', '.join(words[name][:3])}")
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=9, markerscale=3, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}: t-SNE of {len(rows):,} examples")


def check_sizes(source, clusters, least, drop_small):
    """Which examples are in clusters of at least `least`, [N] bool. Raises InputError where not all are, unless
    drop_small."""
    sizes = np.bincount(clusters)
    small = np.flatnonzero((sizes > 0) & (sizes < least))
    if len(small) and not drop_small:
        raise InputError(f"{source}: cluster {small[0]} has {sizes[small[0]]} examples, fewer than the {least} that "
                         "support, query and validation take: lower --k or --min-size, or drop it with --drop-small")
    if len(small):
        print(f"dropped {len(small)} clusters of fewer than {least} examples: {sizes[small].sum():,} examples")
    return sizes[clusters] >= least


def make_meta_tasks(args):
    """Clusters args.source by args.method, for every number of clusters in args.k."""
    source, task, sizes = Path(args.source), Task.load(Path(args.source).parent), args.k
    labels, digest, words = survey(source, task, args.vocabulary)
    if not all(2 <= k <= len(labels) for k in sizes):
        raise InputError(f"{source}: {len(labels):,} examples cannot make {sizes} clusters; change --k")
    vectorizer, texts = CountVectorizer(vocabulary=words), lambda: read_texts(source, task)
    if args.method == "kmeans" or args.figure:
        files = [(str(file), file.stat().st_mtime_ns) for file in sorted(Path(args.encoder).glob("*"))]
        digest.update(json.dumps([args.encoder, files]).encode())
        path = source.with_name(f"{data.unpacked_name(source)}.{digest.hexdigest()[:12]}.npy")
        embeddings = embed(texts(), len(labels), path, args.encoder, args.device)
    panels = []
    for k in sizes:
        distances = np.zeros(len(labels))
        if args.method == "kmeans":
            clusters, distances = kmeans(embeddings, k, args.seed)
        elif args.method == "lda":
            clusters, distances = lda(texts, len(labels), vectorizer, k, args.seed)
        elif args.method == "random":
            clusters = np.random.default_rng(args.seed).permutation(len(labels)) % k
        else:
            clusters = labels
        kept = check_sizes(source, clusters, args.min_size or 640 // k + 8, args.drop_small)
        telling = describe(texts(), clusters, distances, labels, task.words, vectorizer)
        panels.append((f"{args.method}, {len(telling)} clusters", clusters, telling))
        out = Path(args.out or source.with_name(f"{args.method}{'' if args.method == 'label' else k}.jsonl"))
        out.parent.mkdir(parents=True, exist_ok=True)
        data.write_examples(out, ({**example, "cluster": int(name)} for example, name, keep in zip(
            data.read_examples(source, task), clusters, kept) if keep))
        if out.parent != source.parent:
            task.save(out.parent)
        data.save_arguments(out.with_suffix(".json"), args)
        print(f"wrote {out}: {kept.sum():,} examples in {len(np.unique(clusters[kept]))} clusters")
    if args.figure:
        draw(args.figure, embeddings, panels, args.seed)


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--source", "the examples to cluster, JSON lines with a task.json beside them", metavar="FILE")
    parser.add("--method", "how to cluster", "kmeans", choices=["kmeans", "lda", "random", "label"])
    parser.add("--k", "clusters; several numbers write a file each (label: one a label)", [10], type=int, nargs="+")
    parser.add("--encoder", "a sentence-BERT by hub name or folder", "sentence-transformers/all-MiniLM-L6-v2")
    parser.add("--figure", "draws the clusters by t-SNE of the embeddings, a panel for each k", metavar="FILE")
    parser.add("--min-size", "examples that a cluster must have (default: 640 / k + 8, which train_meta.py holds out "
               "and draws by default)", type=int)
    parser.add("--drop-small", "leaves smaller clusters out", False, action="store_true")
    parser.add("--vocabulary", "words that LDA and the report count", 10_000, type=int)
    parser.add("--seed", "of K-means, LDA, random clusters and t-SNE", 1, type=int)
    parser.add("--device", "where the encoder runs", "cuda" if torch.cuda.is_available() else "cpu")
    parser.add("--out", "the file to write (default: METHOD and K.jsonl beside the source)", metavar="FILE")
    args = parser.parse(argv)
    if not args.source or args.out and len(args.k) > 1:
        parser.error("--source FILE is needed, and --out goes with one k")
    make_meta_tasks(args)


if __name__ == "__main__":
    data.run(main)
