"""
Groups source data into meta-tasks (Section 4.2, Appendix B.1): sentence-BERT embeddings, then K-means.

    python cluster.py --source source/examples.jsonl --k 10              # the paper; writes source/kmeans10.jsonl
    python cluster.py --source source/examples.jsonl --method random     # Table 2; also label

The output holds the source's lines in their order, each with its "cluster". Where it is in another folder than the
source, the source's task.json is copied beside it.
"""

import sys
from pathlib import Path

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

import data
from metapt import InputError, Task


def embed(texts, encoder, device):
    """Sentence embeddings of unit length, [N, d] float32, by a sentence-transformers model's name or folder; the
    folder of any transformer serves too, with the mean over its tokens. Raises InputError."""
    try:
        model = SentenceTransformer(encoder, device=device)
    except (OSError, ValueError) as error:
        raise InputError(f"{encoder}: cannot be loaded by sentence-transformers: {str(error).strip().splitlines()[0]}")
    return model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=sys.stderr.isatty())


def kmeans(embeddings, k, seed):
    """FAISS K-means, the best of five starts: each embedding's cluster [N], and its squared distance to the cluster's
    centroid [N]."""
    model = faiss.Kmeans(embeddings.shape[1], k, niter=50, nredo=5, seed=seed, min_points_per_centroid=1,
                         max_points_per_centroid=len(embeddings))
    model.train(embeddings)
    distances, clusters = model.index.search(embeddings, 1)
    return clusters[:, 0], distances[:, 0]


def print_clusters(texts, clusters, distances):
    """Every cluster's size and the three texts nearest to its centroid (where there is one): Appendix B.2's manual
    inspection."""
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        print(f"cluster {cluster}: {len(members):,} examples")
        for index in members[np.argsort(distances[members], kind="stable")][:3]:
            print(f"    {' '.join(texts[index].split())[:110]}")


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--source", "the examples to cluster, JSON lines with a task.json beside them", metavar="FILE")
    parser.add("--method", "how to cluster", "kmeans", choices=["kmeans", "random", "label"])
    parser.add("--k", "clusters (label: as many as there are labels)", 10, type=int)
    parser.add("--encoder", "a sentence-BERT by hub name or folder", "sentence-transformers/all-MiniLM-L6-v2")
    parser.add("--seed", "of K-means and of random clusters", 1, type=int)
    parser.add("--device", "where the encoder runs", "cuda" if torch.cuda.is_available() else "cpu")
    parser.add("--out", "the file to write (default: METHOD and K.jsonl beside the source)", metavar="FILE")
    args = parser.parse(argv)
    if not args.source:
        parser.error("--source FILE is needed")
    source = Path(args.source)
    out = Path(args.out or source.with_name(f"{args.method}{'' if args.method == 'label' else args.k}.jsonl"))
    task = Task.load(source.parent)
    examples = list(data.read_examples(source, task))
    texts = [" ".join(example[field] for field in task.fields) for example in examples]
    if not 2 <= args.k <= len(examples):
        raise InputError(f"{source}: {len(examples):,} examples cannot make {args.k} clusters; change --k")

    distances = np.zeros(len(examples))
    if args.method == "kmeans":
        clusters, distances = kmeans(embed(texts, args.encoder, args.device), args.k, args.seed)
    elif args.method == "random":
        clusters = np.random.default_rng(args.seed).permutation(len(examples)) % args.k
    else:
        clusters = np.array([example["label"] for example in examples])
    print_clusters(texts, clusters, distances)
    out.parent.mkdir(parents=True, exist_ok=True)
    data.write_examples(out, ({**example, "cluster": int(c)} for example, c in zip(examples, clusters)))
    if out.parent != source.parent:
        task.save(out.parent)
    data.save_arguments(out.with_suffix(".json"), args)
    print(f"wrote {out}: {len(examples):,} examples in {len(np.unique(clusters))} clusters")


if __name__ == "__main__":
    data.run(main)
