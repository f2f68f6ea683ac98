"""The fine-tuning loop: batches of whole documents, sized by tokens, with early stopping on dev.

A network (`encoder.Network`, `huggingface.Network`) encodes each example and computes the logits of a batch; everything
else is the same for all networks. Documents are shuffled by a counted hash of (seed, epoch). A batch takes the next
documents as long as they have at most tokens_per_batch tokens together. Loss and gradient are means over all classified
places of a batch, weighted by class if that is asked for.

The optimizer is AdamW with the weight decay and betas of the paper's recipe. The learning rate rises linearly over a
tenth of all tokens, then falls linearly to 0, which it would reach one batch after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.standard import Standard
from minisobert.hashing import key, permutation_keys
from minisobert.ops import cross_entropy
from minisobert.tasks.dataset import Dataset, Example
from minisobert.training.optimizer import Optimizer
from minisobert.training.schedule import learning_rate

WARMUP, WEIGHT_DECAY, BETAS, CLIP = 0.1, 0.01, (0.9, 0.999), 1.0
WORSE_EPOCHS = 3  # training ends after this many epochs in a row that are no better than the best
WIDE = 200  # with more classes than this, probabilities are kept in single precision
EVAL_TOKENS = 16_384  # tokens in a batch that needs no gradients


@dataclass(frozen=True)
class Encoded:
    """One example as a network reads it.

    ids: (n,) with the tokenizer's special tokens, cut to the length that the network reads; or windows of at most that
        length, one after the other, each with its special tokens.
    seams: where in ids the windows begin, except the first.
    places: the tokens to classify: the first of each window of a document, or the first piece of each word that was
        not cut off.
    word_indices: (r,) which words these are; 0 for a document.
    targets: (r,) their classes; (1, C) fp32 for a document that may have several, 1 for each that it has; (1,) fp64
        for a document with a number.
    size: the number of words in the example; 1 for a document.
    """

    ids: np.ndarray
    places: np.ndarray
    word_indices: np.ndarray
    targets: np.ndarray
    size: int
    seams: tuple[int, ...] = ()

    @property
    def is_number(self) -> bool:
        return self.targets.ndim == 1 and self.targets.dtype.kind == "f"

    @staticmethod
    def document(
        example: Example, ids: np.ndarray, seams: tuple[int, ...] = (), several: int = 0, number: bool = False
    ) -> Encoded:
        """several: the number of classes if the example may have several of them, else 0. number: it has a number
        instead of a class."""
        targets = np.zeros((1, several), np.float32) if several else np.array([example.label])
        if several:
            targets[0, list(example.tags)] = 1
        if number:
            targets = np.array([example.value], np.float64)
        return Encoded(ids, np.array([0, *seams]), np.array([0]), targets, 1, seams)

    @staticmethod
    def sentence(
        example: Example, ids: np.ndarray, places: np.ndarray, word_indices: np.ndarray, seams: tuple[int, ...] = ()
    ) -> Encoded:
        """The targets are 0 if the example has no tags, as when its classes are to be predicted."""
        tags = np.array(example.tags or [0] * len(example.words), dtype=np.int64)
        return Encoded(ids, places, word_indices, tags[word_indices], len(example.words), seams)


class Network(Protocol):
    format: str  # of its files
    module: nn.Module  # in fp32, on its device
    dtype: torch.dtype  # in which training keeps the parameters

    def encode(self, examples: list[Example]) -> list[Encoded]: ...

    def parts(self, items: list[Encoded], tokens: int) -> list[list[Encoded]]:
        """Cuts a batch into parts, each of which goes through the network as a whole."""

    def logits(self, items: list[Encoded], step: int | None) -> Tensor:
        """(Σ r, classes) logits, or (Σ r, 1) numbers, in the order of the items; the mean of its windows for a document
        that was cut into some. step: the training step, for dropout; None: no dropout."""

    def save(self, folder: Path) -> None:
        """Writes the weights, sizes and tokenizer into a folder, in `format`."""


@dataclass
class Outcome:
    """The result of training with one seed. dev, test: for each example its probabilities (size, classes), or its
    number (1, 1)."""

    seed: int
    score: float  # on dev
    dev: list[np.ndarray]
    test: list[np.ndarray]
    epochs: list[dict] = field(default_factory=list)  # the figures of each epoch
    best_epoch: int | None = None
    network: Network | None = None  # as it was after the best epoch
    before: list[np.ndarray] = field(default_factory=list)  # for pairs: `test` as it was before training


def fit(
    network: Network, data: Dataset, config: FineTuneConfig, seed: int, score: Callable[[list[np.ndarray]], float]
) -> Outcome:
    """Trains the network on data.train. score: rates the probabilities for data.dev; higher is better. Of two epochs
    with the same score, the one with the lower loss on dev is better. Raises ValueError if training diverges."""
    training, dev, test = (network.encode(split) for split in (data.train, data.dev, data.test))
    note_cut(network, data)
    standard = Standard(network.module, np.array([e.value for e in data.train])) if data.number else None
    if standard:
        training, dev = standard.scores(training), standard.scores(dev)
    weights = class_weights(training, len(data.labels)) if config.class_weights else np.ones(len(data.labels))
    weights = torch.tensor(weights, dtype=torch.float32, device=next(network.module.parameters()).device)
    lengths = np.array([len(item.ids) for item in training])

    def backward(batch: list[int], step: int) -> tuple[float, float]:
        return _backward(network, [training[i] for i in batch], config.tokens_per_batch, step, weights)

    def on_dev() -> tuple[float, float, list[np.ndarray]]:
        probabilities = predict(network, dev)
        found = standard.back(probabilities) if standard else probabilities
        return score(found), mean_loss(probabilities, dev), found

    cut_into = partial(batches, lengths, config.tokens_per_batch)
    outcome = train(network, config, seed, lengths, cut_into, backward, on_dev)
    if standard:
        standard.fold(lambda: predict(network, dev[:8]))
    outcome.test = predict(network, test)
    return outcome


def note_cut(network: Network, data: Dataset) -> None:
    """Adds a note that says how many texts the network has cut, at their end or into windows. Later seeds cut the same
    texts and add no other note."""
    if cut := getattr(network, "cut", 0):
        how = f"read in {windows:,} windows" if (windows := getattr(network, "windows", 0)) else "cut at their end"
        note = f"{cut:,} texts were longer than the model reads, and {how}"
        data.notes.extend([note] * (note not in data.notes))
        network.cut = network.windows = 0


def train(
    network: Network,
    config: FineTuneConfig,
    seed: int,
    lengths: np.ndarray,
    cut_into: Callable[[np.ndarray], Iterator[list[int]]],
    backward: Callable[[list[int], int], tuple[float, float]],
    on_dev: Callable[[], tuple[float, float, list[np.ndarray]]],
) -> Outcome:
    """Trains until dev no longer improves, and leaves the network as it was after the best epoch.

    lengths: (n,) tokens in each example. cut_into: cuts indices, given in some order, into batches. backward: given a
    batch and the step, adds the gradient of the batch's summed loss, and returns that loss and the weight by which both
    are divided. on_dev: returns score, loss and predictions. Raises ValueError if training diverges.
    """
    total = config.epochs * int(lengths.sum())
    optimizer = Optimizer(network.module, network.dtype, BETAS, WEIGHT_DECAY)
    done = step = 0
    history: list[dict] = []
    best: tuple[tuple[float, float], dict[str, Tensor], list[np.ndarray]] | None = None
    best_epoch = 0
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"seed {seed}", dynamic_ncols=True, mininterval=1) as bar:
        for epoch in range(1, config.epochs + 1):
            order = np.argsort(permutation_keys(len(lengths), key(seed, "fine-tuning", epoch)))
            loss_sum = weight_sum = 0.0
            for batch in cut_into(order):
                loss, weight = backward(batch, step)
                tokens = int(lengths[batch].sum())
                done, step = done + tokens, step + 1
                # `done` counts this batch already; without one more batch, the last step would have a rate of 0
                rate = learning_rate(done, total + config.tokens_per_batch, config.learning_rate, WARMUP, 0.0)
                _, applied = optimizer.step(rate, max(weight, 1e-12), CLIP)
                if not applied:
                    raise ValueError(
                        f"the gradient of step {step} is not finite at --learning-rate {config.learning_rate}; "
                        "choose a lower one"
                    )
                loss_sum, weight_sum = loss_sum + loss, weight_sum + weight
                bar.update(tokens)
            dev_score, dev_loss, found = on_dev()
            line = {"epoch": epoch, "loss": loss_sum / weight_sum, "dev_loss": dev_loss, "dev_score": dev_score}
            history.append(line)
            bar.set_postfix_str(f"epoch {epoch}: loss {line['loss']:.3f}, dev {line['dev_score']:.4f}")
            merit = dev_score, -dev_loss
            if best is None or merit > best[0]:
                state = {name: p.detach().clone() for name, p in network.module.named_parameters()}
                best, best_epoch = (merit, state, found), epoch
            elif epoch - best_epoch >= WORSE_EPOCHS:
                break
    with torch.no_grad():
        for name, p in network.module.named_parameters():
            p.copy_(best[1][name])
    network.module.zero_grad(set_to_none=True)  # the gradients would live as long as the network
    return Outcome(seed, best[0][0], best[2], [], history, best_epoch, network)


def class_weights(items: list[Encoded], classes: int) -> np.ndarray:
    """(classes,) N / (number of classes that occur × examples of the class), so that all classes that occur weigh the
    same in total; 0 for the others, which contribute to no loss."""
    counts = np.bincount(np.concatenate([item.targets for item in items]), minlength=classes)
    return counts.sum() / ((counts > 0).sum() * np.maximum(counts, 1)) * (counts > 0)


def batches(lengths: np.ndarray, tokens: int, order: np.ndarray) -> Iterator[list[int]]:
    """The indices in `order`, cut wherever the next one would bring a batch over `tokens`."""
    batch: list[int] = []
    inside = 0
    for i in order.tolist():
        if batch and inside + lengths[i] > tokens:
            yield batch
            batch, inside = [], 0
        batch.append(i)
        inside += int(lengths[i])
    if batch:
        yield batch


def _backward(network: Network, items: list[Encoded], tokens: int, step: int, weights: Tensor) -> tuple[float, float]:
    """Adds the gradient of the summed, weighted loss. Returns that loss and the sum of the weights."""
    sums = torch.zeros(2, dtype=torch.float64, device=weights.device)
    for part in network.parts(items, tokens):
        targets = torch.from_numpy(np.concatenate([item.targets for item in part])).to(weights.device)
        if len(targets):
            logits = network.logits(part, step)
            if part[0].is_number:
                losses = (logits[:, 0].float() - targets.float()).square()
                weight = torch.ones_like(losses)
            elif targets.ndim == 2:
                losses = binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)
                weight = torch.ones_like(losses)
            else:
                losses, weight = cross_entropy(logits, targets), weights[targets]
            loss = (losses * weight).sum()
            loss.backward()
            sums += torch.stack([loss.detach(), weight.sum()])
    loss, weight = sums.tolist()
    return loss, weight


@torch.no_grad()
def predict(network: Network, items: list[Encoded]) -> list[np.ndarray]:
    """For each item its probabilities (size, classes), or its number (1, 1). A word that was cut off has class 0 (no
    entity) with probability 1."""
    results: list[np.ndarray] = [np.zeros(0)] * len(items)
    order = np.argsort([len(item.ids) for item in items], kind="stable")
    number = {id(item): i for i, item in enumerate(items)}
    for batch in batches(np.array([len(item.ids) for item in items]), EVAL_TOKENS, order):
        for part in network.parts([items[i] for i in batch], EVAL_TOKENS):
            logits = network.logits(part, None).double()
            if not part[0].is_number:
                logits = logits.sigmoid() if part[0].targets.ndim == 2 else logits.softmax(1)
            found = logits.cpu().numpy()
            if found.shape[1] > WIDE:  # those of a large split would fill the memory
                found = found.astype(np.float32)
            for item, p in zip(part, np.split(found, np.cumsum([len(item.word_indices) for item in part])[:-1])):
                whole = np.zeros((item.size, found.shape[1]), found.dtype)
                whole[:, 0] = 1
                whole[item.word_indices] = p
                results[number[id(item)]] = whole
    return results


def mean_loss(probabilities: list[np.ndarray], items: list[Encoded]) -> float:
    """The mean loss in nats over all places that the network saw; for numbers, the mean squared error."""
    if items[0].is_number:
        return float(np.square(np.concatenate(probabilities)[:, 0] - [item.targets[0] for item in items]).mean())
    of_targets = [
        np.where(item.targets, p, 1 - p)[0] if item.targets.ndim == 2 else p[item.word_indices, item.targets]
        for p, item in zip(probabilities, items)
    ]
    return float(-np.log(np.maximum(np.concatenate(of_targets), 1e-30)).mean())
