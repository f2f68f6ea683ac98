"""A baseline without a network, on the same data and splits as every model (extra [baseline]).

TF-IDF of words and pairs of words, then a linear model: logistic regression for classes, ridge regression for a number.
With more than MANY_CLASSES, logistic regression would take hours and tens of gigabytes, so the class whose mean is
nearest is taken. Whole texts are read, however long. `Linear.save` writes a folder with

    vocabulary.json    the words and pairs, in the order of the columns
    linear.npz         idf (V,), bias (C,), and weight (C, V) as scipy's sparse rows: data, indices, indptr
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minisobert.finetuning import evaluation, retrieval
from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.loop import WIDE, Outcome
from minisobert.tasks import TASKS
from minisobert.tasks.dataset import Dataset

MANY_CLASSES = 200
CHUNK = 1_024  # texts whose scores are in memory at a time


class Linear:
    """A linear model on the TF-IDF x of a text. The classes' probabilities are softmax(x · weightᵀ + bias), or sigmoids
    if a text may have several; a number is x · weightᵀ + bias itself."""

    format, kind = "tfidf", "sequence"

    def __init__(self, vectorizer, weight, bias: np.ndarray, several: bool = False, number: bool = False):
        """vectorizer: scikit-learn's, fitted. weight: (C, V), NumPy or scipy's sparse; bias: (C,)."""
        self.vectorizer, self.weight, self.bias = vectorizer, weight, bias
        self.several, self.number = several, number

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """(n, C) the probability of each class for each text, or (n, 1) the number of each text."""
        parts = [np.empty((0, len(self.bias)))]
        for start in range(0, len(texts), CHUNK):
            scores = self.vectorizer.transform(texts[start : start + CHUNK]) @ self.weight.T
            scores = (scores if isinstance(scores, np.ndarray) else scores.toarray()) + self.bias
            if self.number:
                shares = scores
            elif self.several:
                shares = 0.5 + 0.5 * np.tanh(scores / 2)  # a sigmoid that does not overflow
            else:
                shares = np.exp(scores - scores.max(1, keepdims=True))
                shares /= shares.sum(1, keepdims=True)
            parts.append(shares.astype(np.float32) if len(self.bias) > WIDE else shares)
        return np.concatenate(parts)

    def save(self, folder: Path) -> None:
        from scipy.sparse import csr_matrix

        (folder / "vocabulary.json").write_text(json.dumps(self.vectorizer.get_feature_names_out().tolist()))
        weight = csr_matrix(self.weight)
        np.savez_compressed(
            folder / "linear.npz", idf=self.vectorizer.idf_, bias=self.bias, data=weight.data.astype(np.float32),
            indices=weight.indices, indptr=weight.indptr,
        )  # fmt: skip


def open_network(folder: Path, task: dict) -> Linear:
    """Opens what `save` wrote. Raises ValueError if scikit-learn is missing."""
    _check_installed()
    from scipy.sparse import csr_matrix

    terms = json.loads((folder / "vocabulary.json").read_text())
    with np.load(folder / "linear.npz", allow_pickle=False) as arrays:
        vectorizer = _vectorizer(vocabulary={term: i for i, term in enumerate(terms)})
        vectorizer.idf_ = arrays["idf"]
        shape = len(task["labels"]), len(terms)
        weight = csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
        return Linear(vectorizer, weight, arrays["bias"], task.get("several", False), task.get("number", False))


class TfIdf:
    """The starting point of --model tfidf."""

    # The best of each on dev is taken, as networks take their best epoch
    STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularisation of logistic regression
    SHARPNESS = (8.0, 16.0, 32.0)  # factors for the cosines
    PENALTIES = (3.0, 1.0, 0.3, 0.1)  # of ridge regression

    def __init__(self, config: FineTuneConfig):
        if TASKS[config.task].kind == "token":
            raise ValueError(
                f"--model tfidf classifies whole posts; for --task {config.task} choose a run, random:PRESET or hf:NAME"
            )
        _check_installed()
        self.config = config
        self.outcome: Outcome | None = None

    def train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        """Trains once. Nothing is random, so every seed gives what the first one gave."""
        self.outcome = self.outcome or self._train(data, seed, score)
        return dataclasses.replace(self.outcome, seed=seed)

    def _train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        if data.kind == "pair":
            dev, test = ranks(data)
            return Outcome(seed, score(dev), dev, test)
        vectorizer, training = fitted([e.text for e in data.train])
        labels, few = evaluation.truth_of(data, data.train), len(data.labels) <= MANY_CLASSES
        if data.several and not few:
            raise ValueError(f"--model tfidf learns up to {MANY_CLASSES} classes with --several; choose another model")
        if data.number:
            learn, choices = self._ridge, self.PENALTIES
        elif few:
            learn, choices = self._regressions if data.several else self._regression, self.STRENGTHS
        else:
            learn, choices = self._means, self.SHARPNESS
        best = None
        for choice in choices:
            model = learn(vectorizer, training, labels, choice, data, seed)
            dev, test = ([e.text for e in split] for split in (data.dev, data.test))
            on_dev = list(model.predict(dev)[:, None])
            if best is None or score(on_dev) > best.score:
                best = Outcome(seed, score(on_dev), on_dev, list(model.predict(test)[:, None]), network=model)
        return best

    def _regression(self, vectorizer, training, labels, strength: float, data: Dataset, seed: int) -> Linear:
        from sklearn.linear_model import LogisticRegression

        weighted = "balanced" if self.config.class_weights else None
        model = LogisticRegression(C=strength, max_iter=1_000, class_weight=weighted, random_state=seed)
        model.fit(training, labels)
        rows = (np.zeros_like(model.coef_), model.coef_) if len(model.classes_) == 2 else (model.coef_,)
        biases = (np.zeros(1), model.intercept_) if len(model.classes_) == 2 else (model.intercept_,)
        weight, bias = np.zeros((len(data.labels), training.shape[1])), np.full(len(data.labels), -np.inf)
        weight[model.classes_] = np.concatenate(rows)  # a class that train lacks has probability 0
        bias[model.classes_] = np.concatenate(biases)
        return Linear(vectorizer, weight, bias)

    def _regressions(self, vectorizer, training, truth, strength: float, data: Dataset, seed: int) -> Linear:
        """One regression for each class. truth: (N, C) bool."""
        from sklearn.linear_model import LogisticRegression

        weight, bias = np.zeros((len(data.labels), training.shape[1])), np.where(truth.any(0), np.inf, -np.inf)
        for c in np.flatnonzero(truth.any(0) & ~truth.all(0)):  # others are in no text, or in all
            model = LogisticRegression(C=strength, max_iter=1_000, random_state=seed).fit(training, truth[:, c])
            weight[c], bias[c] = model.coef_[0], model.intercept_[0]
        return Linear(vectorizer, weight, bias, several=True)

    def _ridge(self, vectorizer, training, values, penalty: float, data: Dataset, seed: int) -> Linear:
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=penalty, random_state=seed).fit(training, values)
        return Linear(vectorizer, model.coef_[None], np.array([model.intercept_]), number=True)

    def _means(self, vectorizer, training, labels, sharpness: float, data: Dataset, seed: int) -> Linear:
        """Rocchio's classifier: the cosine of the text with the mean of each class."""
        from scipy.sparse import csr_matrix
        from sklearn.preprocessing import normalize

        n, classes = len(labels), len(data.labels)
        of_class = csr_matrix((np.ones(n), (labels, np.arange(n))), shape=(classes, n))
        bias = np.where(np.bincount(labels, minlength=classes) > 0, 0.0, -np.inf)
        return Linear(vectorizer, sharpness * normalize(of_class @ training), bias)


def ranks(data: Dataset) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What `retrieval.found` gives for TF-IDF on dev and on test. All that it learns, from train, is which words there
    are and how much they weigh. Raises ValueError if scikit-learn is missing."""
    _check_installed()
    vectorizer, _ = fitted([text for e in data.train for text in (e.text, e.other)])
    results = []
    for task in retrieval.searches(data):
        parts = (vectorizer.transform(part) for part in (task.queries, task.candidates))
        results.append(retrieval.found(task, *parts))
    return results[0], results[1]


def fitted(texts: Sequence[str]):
    """A vectorizer fitted to these texts, and their vectors."""
    vectorizer = _vectorizer(min_df=2, max_features=200_000)
    try:
        return vectorizer, vectorizer.fit_transform(texts)
    except ValueError:
        raise ValueError("no word is in two texts of train, so TF-IDF has nothing to learn; give more texts") from None


def _vectorizer(**options):
    from sklearn.feature_extraction.text import TfidfVectorizer

    # punctuation counts too, since half of a post is code
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]", **options)


def _check_installed() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ValueError("--model tfidf needs scikit-learn: pip install 'minisobert[baseline]'") from None
