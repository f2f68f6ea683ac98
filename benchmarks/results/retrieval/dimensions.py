"""What TF-IDF finds when its vectors are as short as a small model's: `python dimensions.py DUMP`, from the root.

Latent semantic analysis (Deerwester et al. 1990): the best approximation of its vectors by n numbers each.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from minisobert.cli import table
from minisobert.finetuning import baselines, retrieval
from minisobert.tasks import SPLIT_SEED, metrics, pairs

data = pairs.read([Path(sys.argv[1])], SPLIT_SEED)
task = retrieval.searches(data)[1]
vectorizer, training = baselines.fitted([text for e in data.train for text in (e.text, e.other)])
queries, candidates = vectorizer.transform(task.queries), vectorizer.transform(task.candidates)
rows = []
for n in (64, 128, 256, 512, 1_024, training.shape[1]):
    parts = queries, candidates
    if n < training.shape[1]:
        svd = TruncatedSVD(n, random_state=0).fit(training)
        parts = (normalize(svd.transform(part)) for part in parts)
    figures = metrics.of_ranks(np.stack(retrieval.found(task, *parts))[:, 0])
    rows.append([f"{n:,}", *(f"{100 * x:.1f}" for x in figures.values())])
print("\n".join(table(["numbers in a vector", *figures], rows)))
