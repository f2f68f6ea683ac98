"""A floor without a network, on the same data and splits as every model (extra [baseline])."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.loop import Outcome
from minisobert.tasks import TASKS
from minisobert.tasks.dataset import Dataset


class TfIdf:
    """Words and pairs of words, weighted by rarity, and logistic regression."""

    STRENGTHS = (1.0, 4.0, 16.0)  # inverse regularisation; the best on dev is taken, as networks take their best epoch

    def __init__(self, config: FineTuneConfig):
        if TASKS[config.task].kind != "sequence":
            raise ValueError(
                f"--model tfidf classifies whole posts; for --task {config.task} choose a run, random:PRESET or hf:NAME"
            )
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise ValueError("--model tfidf needs scikit-learn: pip install 'minisobert[baseline]'") from None
        self.config = config
        self.outcome: Outcome | None = None

    def train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        """Nothing is drawn: every seed gives what the first one gave."""
        self.outcome = self.outcome or self._train(data, seed, score)
        return dataclasses.replace(self.outcome, seed=seed)

    def _train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        # marks count too: half of a post is code
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"
        )
        training = vectorizer.fit_transform([e.text for e in data.train])
        dev, test = (vectorizer.transform([e.text for e in split]) for split in (data.dev, data.test))
        labels = [e.label for e in data.train]
        weight = "balanced" if self.config.class_weights else None
        best = None
        for strength in self.STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=1_000, class_weight=weight, random_state=seed)
            model.fit(training, labels)
            on_dev = list(model.predict_proba(dev)[:, None])
            if best is None or score(on_dev) > best.score:
                best = Outcome(seed, score(on_dev), on_dev, list(model.predict_proba(test)[:, None]))
        return best
