"""Writes the folder of results: report.md for people, metrics.json for programs, predictions, plots and the model.

All figures are those on test, averaged over the seeds. Whatever needs a single model (tables, plots, errors,
predictions) comes from the seed that is best on dev.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from minisobert.cli import printable, table
from minisobert.files import write_json
from minisobert.finetuning import baselines, evaluation, figures, marking, retrieval
from minisobert.finetuning.config import FineTuneConfig, task_options
from minisobert.finetuning.evaluation import Evaluation
from minisobert.finetuning.kept import write_task
from minisobert.finetuning.loop import Outcome
from minisobert.tasks import metrics
from minisobert.tasks.dataset import Dataset

WORST = 20
WIDEST = 8  # classes in a table, for which a page has room; a plot has room for MANY
SHOWN = 1_000  # characters of a document among the worst errors
UNUSED = {
    "tfidf": ("epochs", "learning_rate", "tokens_per_batch", "pairs_per_batch", "pair_tokens", "dropout", "long"),
    "hf": ("dropout",),
}  # settings that a model ignores; TF-IDF reads whole texts, however long


def write(folder: Path, config: FineTuneConfig, data: Dataset, outcomes: list[Outcome]) -> None:
    evaluations = [evaluation.evaluate(data, data.test, outcome.test) for outcome in outcomes]
    best = evaluation.best(outcomes)
    evaluated = evaluations[outcomes.index(best)]
    seeds = [
        {"seed": o.seed, **e.figures, f"dev_{evaluation.main_figure(data)}": o.score, "best_epoch": o.best_epoch,
         "epochs": o.epochs}
        for o, e in zip(outcomes, evaluations)
    ]  # fmt: skip
    results = {
        **summary(data, config.model, evaluated), "seeds": seeds, "best_seed": best.seed,
        **evaluation.mean_and_deviation([e.figures for e in evaluations]), "settings": dataclasses.asdict(config),
    }  # fmt: skip
    if data.kind == "pair" or data.number:
        results["beside"] = _beside(data, outcomes)
    write_json(folder / "metrics.json", results)
    write_predictions(folder / "predictions.csv", data, best.test)
    if data.number:
        truth = evaluation.truth_of(data, data.test)
        figures.scatter(folder / "scatter.png", data.labels[0], truth, evaluation.numbers(best.test))
    elif data.kind != "pair" and not data.several:
        figures.confusion(folder / "confusion.png", evaluated.classes, evaluated.confusion, _matrix(evaluated, data))
    if data.kind == "sequence" and not data.number:
        p, truth = np.concatenate(best.test), evaluation.truth_of(data, data.test)
        figures.curves(folder / "curves.png", data.labels, truth, p)
    if best.network:
        (folder / "model").mkdir()
        best.network.save(folder / "model")
        task = {"task": data.task.name, "kind": data.kind, "labels": data.labels, "cleaning": data.cleaning,
                "columns": data.columns, "several": data.several, "number": data.number}  # fmt: skip
        task |= {"format": best.network.format, "pooling": config.pooling, "long": config.long}
        write_task(folder / "model", task)
    (folder / "report.md").write_text("\n".join(_report(results, data, best, evaluated)), encoding="utf-8")


def _beside(data: Dataset, outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Figures to compare with. For pairs: those of TF-IDF, if scikit-learn is installed, and of the model before its
    training. For numbers: those of always predicting the mean."""
    if data.number:
        return {"always the mean of train": evaluation.always_the_mean(data)}
    found = {}
    with suppress(ValueError):
        found["TF-IDF"] = evaluation.evaluate(data, data.test, baselines.ranks(data)[1]).figures
    if before := [evaluation.evaluate(data, data.test, o.before).figures for o in outcomes if o.before]:
        found["the model before this training"] = evaluation.mean_and_deviation(before)["mean"]
    return found


def summary(data: Dataset, model: str, evaluated: Evaluation) -> dict:
    """What metrics.json says about every model."""
    return {
        "task": data.task.name,
        "model": model,
        "counts": {name: len(getattr(data, name)) for name in ("train", "dev", "test")},
        "per_class": {name: scores._asdict() for name, scores in evaluated.per_class.items()},
        "classes": evaluated.classes,
        "confusion": evaluated.confusion.tolist(),
        "notes": data.notes,
    }


def headline(data: Dataset, outcomes: list[Outcome]) -> str:
    """Such as `f1 0.5712 ± 0.0049 on test, 3 seeds`."""
    results = evaluation.mean_and_deviation([evaluation.evaluate(data, data.test, o.test).figures for o in outcomes])
    name = evaluation.main_figure(data)
    return f"{name} {_plus_minus(results, name)} on test, {_count(len(outcomes), 'seed')}"


def write_predictions(path: Path, data: Dataset, probabilities: list[np.ndarray]) -> None:
    """Writes a .csv. It has a row for each document, with its number or the probabilities of all classes (with more
    than MANY classes, of the true and the predicted one); for token tasks a row for each word; for pairs a row for each
    query, with the text that it found first."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if data.number:
            rows.writerow(["id", "label", "predicted"])
            rows.writerows([e.id, e.value, f"{p[0, 0]:.8g}"] for e, p in zip(data.test, probabilities))
        elif data.kind == "pair":
            candidates = retrieval.searches(data)[1].candidates
            rows.writerow(["id", "rank", "found_first"])
            rows.writerows([e.id, rank, candidates[first]] for e, (rank, first) in zip(data.test, probabilities))
        elif data.several:
            wide = data.labels if len(data.labels) <= metrics.MANY else ()
            rows.writerow(["id", "labels", "predicted", *(f"p_{label}" for label in wide)])
            for e, (p,) in zip(data.test, probabilities):
                found = [evaluation.names(data, classes) for classes in (e.tags, np.flatnonzero(p >= 0.5))]
                rows.writerow([e.id, *map(";".join, found), *(f"{each:.6f}" for each in p[: len(wide)])])
        elif data.kind == "sequence" and len(data.labels) > metrics.MANY:
            rows.writerow(["id", "label", "predicted", "p_of_label", "p_of_predicted"])
            for e, (p,) in zip(data.test, probabilities):
                found = p.argmax()
                rows.writerow([e.id, data.labels[e.label], data.labels[found], f"{p[e.label]:.6f}", f"{p[found]:.6f}"])
        elif data.kind == "sequence":
            rows.writerow(["id", "label", "predicted", *(f"p_{label}" for label in data.labels)])
            for e, (p,) in zip(data.test, probabilities):
                rows.writerow([e.id, data.labels[e.label], data.labels[p.argmax()], *(f"{each:.6f}" for each in p)])
        else:
            rows.writerow(["id", "position", "word", "label", "predicted", "probability"])
            for e, found in zip(data.test, probabilities):
                for i, (word, tag, p) in enumerate(zip(e.words, e.tags, found)):
                    rows.writerow([e.id, i, word, data.labels[tag], data.labels[p.argmax()], f"{p.max():.6f}"])


def _report(results: dict, data: Dataset, best: Outcome, evaluated: Evaluation) -> Iterable[str]:
    counts, seeds = results["counts"], results["seeds"]
    unit = {"sequence": "examples", "token": "sentences", "pair": "pairs"}[data.kind]
    yield f"# {results['task']}: `{results['model']}`\n"
    rows = [[name, _plus_minus(results, name)] for name in results["mean"]]
    yield from (*table(["figure, on test", _count(len(seeds), "seed")], rows), "")
    if len(seeds) > 1:
        yield f"Mean ± standard deviation over the seeds; tables, plots and errors below are of seed {best.seed},"
        yield "the best on dev.\n"
    on_dev = f"dev_{evaluation.main_figure(data)}"
    rows = [
        [
            seed["seed"],
            *(evaluation.shown(name, seed[name]) for name in (*results["mean"], on_dev)),
            seed["best_epoch"] or "–",
        ]
        for seed in seeds
    ]
    yield from (*table(["seed", *results["mean"], on_dev, "best epoch"], rows), "")

    if beside := results.get("beside"):
        yield "## Beside others\n"
        if data.kind == "pair":
            yield "On the same pairs; TF-IDF is of words and pairs of words, and learns only how rare they are.\n"
        rows = [
            [n, *(evaluation.shown(figure, x) for figure, x in each.items())]
            for n, each in {**beside, "this model": results["mean"]}.items()
        ]
        yield from (*table(["", *results["mean"]], rows), "")

    yield "## Data\n"
    yield f"{counts['train']:,} {unit} to train on, {counts['dev']:,} in dev, {counts['test']:,} in test.\n"
    yield from (f"- {note}" for note in data.notes)
    yield ""

    if data.kind == "pair":
        yield from _queries(data, best.test)
    elif data.number:
        yield from _numbers(data, best.test)
    else:
        yield from _classes(data, best, evaluated)

    yield "## How it was made\n"
    unused = {"tensorboard", *UNUSED.get(results["model"].partition(":")[0], ()), *task_options()}
    unused |= {"class_weights", "pooling", "long"} if data.kind == "pair" else {"pairs_per_batch", "pair_tokens"}
    unused -= data.task.options.keys()
    given = {n: v for n, v in results["settings"].items() if v not in ("", ()) and n not in unused}
    yield from (*table(["setting", ""], [[f"`{n}`", f"`{v}`"] for n, v in given.items()]), "")
    if best.network:
        out = results["settings"]["out"]
        if data.kind == "pair":
            yield f"`python -m minisobert.embed {out} FILE --out vectors.npy` makes vectors of new texts.\n"
        else:
            yield f"`python finetune.py --predict FILE --model {out}` applies the model to new posts.\n"


def _numbers(data: Dataset, probabilities: list[np.ndarray]) -> Iterable[str]:
    yield "## Predicted and true\n"
    yield "![true and predicted numbers](scatter.png)\n"
    truth, found = evaluation.truth_of(data, data.test), evaluation.numbers(probabilities)
    yield f"## The {WORST} worst errors\n"
    for number, i in enumerate(np.argsort(-np.abs(truth - found), kind="stable")[:WORST], 1):
        e = data.test[i]
        yield f"{number}. `{e.id}`: **{truth[i]:g}**, predicted **{found[i]:g}**\n"
        yield _quoted(_beginning(e.text))


def _queries(data: Dataset, results: list[np.ndarray]) -> Iterable[str]:
    """What the figures of pairs mean, and the queries that found their text last."""
    candidates = retrieval.searches(data)[1].candidates
    yield f"A query of test searches {len(candidates):,} texts, those of all pairs, by the cosine of their vectors."
    yield "recall_at_k: the share of queries that find their own among the first k. mrr: the mean of 1 / rank.\n"
    yield f"## The {WORST} queries that found their text last\n"
    last = sorted(range(len(results)), key=lambda i: -results[i][0])[:WORST]
    for number, i in enumerate((i for i in last if results[i][0] > 1), 1):
        e, (rank, first) = data.test[i], results[i]
        yield f"{number}. `{e.id}`: place {rank:,}. The query, its own text, and what came first:\n"
        for text in (e.text, e.other, candidates[first]):
            yield _quoted(_beginning(text, SHOWN // 2))


def _classes(data: Dataset, best: Outcome, evaluated: Evaluation) -> Iterable[str]:
    yield "## Classes\n"
    shown = list(evaluated.per_class.items())
    if len(shown) > metrics.MANY:
        yield f"The {metrics.MANY} commonest in test of {len(shown):,}; metrics.json has all.\n"
        shown = sorted(shown, key=lambda pair: -pair[1].support)[: metrics.MANY]
    rows = [[n, *(f"{x:.4f}" for x in s[:3]), f"{s.support:,}"] for n, s in shown]
    yield from (*table(["", "precision", "recall", "F1", "in test"], rows), "")
    if data.several:
        yield "A text has the classes that are likelier than not, any number of them; accuracy is that of whole sets.\n"
    else:
        yield from _taken(data, evaluated)
    if data.kind == "sequence":
        yield "## Thresholds\n\nEach class against the others; two classes: the second.\n"
        if len(data.labels) > figures.CURVES:
            yield f"The {figures.CURVES} commonest in test of {len(data.labels):,} classes.\n"
        yield "![ROC and precision-recall curves](curves.png)\n"

    yield f"## The {WORST} worst errors\n"
    yield "Wrong ones whose truth the model found least likely, the least likely first.\n"
    yield from _worst(data, best.test)


def _taken(data: Dataset, evaluated: Evaluation) -> Iterable[str]:
    yield "## What was taken for what\n"
    yield f"Of {'documents' if data.kind == 'sequence' else 'words'}. Rows are the truth, columns the prediction.\n"
    if "of the" in (title := _matrix(evaluated, data)):
        yield f"{title}.\n"
    if len(evaluated.classes) <= WIDEST:
        matrix = zip(evaluated.classes, evaluated.confusion.tolist())
        rows = [[f"**{name}**", *(f"{x:,}" for x in row)] for name, row in matrix]
        yield from (*table(["", *evaluated.classes], rows), "")
    yield "![confusion matrix](confusion.png)\n"


def _worst(data: Dataset, probabilities: list[np.ndarray]) -> Iterable[str]:
    surprise = []  # (-log p(truth), index) of each wrong prediction
    for i, (e, p) in enumerate(zip(data.test, probabilities)):
        if data.several:
            truth = evaluation.truth_of(data, [e])[0]
            if ((p[0] >= 0.5) != truth).any():
                surprise.append((-np.log(np.maximum(np.where(truth, p[0], 1 - p[0]), 1e-30)).sum(), i))
            continue
        truth = [e.label] if data.kind == "sequence" else list(e.tags)
        if (p.argmax(1) != truth).any():
            surprise.append((-np.log(np.maximum(p[np.arange(len(truth)), truth], 1e-30)).sum(), i))
    for number, (_, i) in enumerate(sorted(surprise, key=lambda pair: -pair[0])[:WORST], 1):
        e, p = data.test[i], probabilities[i]
        if data.several:
            found = [evaluation.names(data, classes) for classes in (e.tags, np.flatnonzero(p[0] >= 0.5))]
            truth, found = ("; ".join(each) or "none" for each in found)
            yield f"{number}. `{e.id}`: **{truth}**, taken for **{found}**\n"
            yield _quoted(_beginning(e.text))
        elif data.kind == "sequence":
            truth, found = data.labels[e.label], data.labels[p[0].argmax()]
            yield f"{number}. `{e.id}`: **{truth}**, taken for **{found}** with {p[0].max():.1%}\n"
            yield _quoted(_beginning(e.text))
        else:
            yield f"{number}. `{e.id}`: the truth, and what was found\n"
            yield _quoted(marking.mark_words(e.words, evaluation.names(data, e.tags)))
            yield _quoted(marking.mark_words(e.words, evaluation.names(data, p.argmax(1))))
    if not surprise:
        yield "There are none.\n"


def _matrix(evaluated: Evaluation, data: Dataset) -> str:
    """The title of the confusion matrix, which says which classes it shows."""
    if len(evaluated.classes) <= metrics.MANY:
        return "Confusion matrix"
    count = len(data.labels if data.kind == "sequence" else evaluated.per_class)
    return f"Confusion matrix of the {metrics.MANY} commonest in test of {count:,} classes"


def _beginning(text: str, most: int = SHOWN) -> str:
    return text if len(text) <= most else text[:most] + " …"


def _quoted(text: str) -> str:
    """The text as code inside an item of a list, so that no marks in it are interpreted."""
    return "".join(f"        {line}\n" for line in printable(text).splitlines())


def _plus_minus(results: dict, name: str) -> str:
    deviation = f" ± {evaluation.shown(name, results['std'][name])}" if "std" in results else ""
    return f"{evaluation.shown(name, results['mean'][name])}{deviation}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"
