"""Asks a chat model the questions of a task, without training: `python -m minisobert.finetuning.chat --task … …`.

The splits and figures are those of finetune.py, and the folder --out holds metrics.json, predictions.csv and report.md
in its format, with the cost of the answers. This needs the extra [chat], and the server's key in OPENAI_API_KEY.

Every test example is asked once, at temperature 0, after --shots examples of train; `prompts.py` has the words. An
answer that cannot be parsed counts as wrong: as no class, or as none of the sentence's entities. So does a question
that the server refuses with status 400, for its length or its content.

Each answer is kept in --cache, on a line of its own, as soon as it comes. The same question is never asked twice of the
same model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from minisobert.cli import Parser, add_argument, command, flag, printable, table
from minisobert.files import new_folder, write_json
from minisobert.finetuning import evaluation, prompts, report
from minisobert.finetuning.config import FineTuneConfig, config_class, task_options
from minisobert.finetuning.evaluation import Evaluation
from minisobert.finetuning.start import read_data
from minisobert.hashing import key, permutation_keys
from minisobert.tasks import TASKS, metrics
from minisobert.tasks.dataset import Dataset

NAME = "minisobert.finetuning.chat"
ABOUT = """\
The test examples and figures are those of finetune.py. It needs the extra [chat], and takes the server's key from \
OPENAI_API_KEY."""
EXAMPLES = """\
python -m minisobert.finetuning.chat --task quality --data test.csv train.csv \\
    --model gpt-4o-mini --limit 500 --out results/quality-chat
"""
UNPARSABLE = "unparsable"  # a class of answers, after those of the task
RETRIES = 5  # by the package itself, after time-outs, lost connections, 429 and 5xx


def main(argv: list[str] | None = None) -> int:
    """Returns 0. A mistake of the user or the server prints one line and exits with 2; Ctrl-C exits with 130."""
    options = _options(argv)
    with command(NAME, f"{options.cache} keeps the answers for the next run"):
        config = config_class()(
            task=options.task, model=f"chat:{options.model}, {options.shots or 'zero'}-shot", data=tuple(options.data),
            out=options.out,
            **{name: type(each.default)(getattr(options, name)) for name, each in task_options().items()},
        )  # fmt: skip
        with new_folder(options.out) as folder:
            data = sample(read_data(config), options.limit)
            if data.several or data.number:
                what = "several" if data.several else "number"
                raise ValueError(f"a chat model is asked for one class per text; leave out --{what}")
            chat = Chat(options.model, options.base_url, options.timeout, Path(options.cache))
            opening = prompts.introduction(data, options.shots)
            with tqdm(data.test, unit="example") as bar:  # so that an error begins on a new line
                texts = [chat.ask([*opening, prompts.question(data, e)]) for e in bar]
            headline = write(folder, options, config, data, texts, chat)
    print(printable(f"{options.out}/report.md: {headline}"))
    return 0


def _options(argv: list[str] | None):
    asked = [name for name, task in TASKS.items() if task.instruction]
    parser = Parser(NAME, ABOUT, EXAMPLES, allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=asked, help="task whose questions to ask")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files of the task, as in finetune.py")
    parser.add_argument("--model", required=True, metavar="NAME", help="name by which the server knows the model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results; it must not exist yet")
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="number of solved examples in each question")
    parser.add_argument("--limit", type=int, metavar="N", help="ask about N examples of test, drawn by chance, not all")
    group = parser.add_argument_group("server and cost")
    group.add_argument("--base-url", default="https://api.openai.com/v1", metavar="URL", help="address of the server")
    group.add_argument("--timeout", type=float, default=60, metavar="X", help="seconds to wait for an answer")
    group.add_argument(
        "--cache", default="runs/chat.jsonl", metavar="FILE", help="file that keeps all answers; none is paid for twice"
    )
    group.add_argument("--price-in", type=float, metavar="X", help="dollars per million tokens of questions")
    group.add_argument("--price-out", type=float, metavar="X", help="dollars per million tokens of answers")
    group = parser.add_argument_group("options of single tasks")
    for name, each in task_options().items():
        add_argument(group, name, type(each.default), default=each.default, help=each.help, metavar="COLUMN")
    options = parser.parse_args(argv)
    for name, least in (("shots", 0), ("limit", 1), ("price_in", 0), ("price_out", 0)):
        if (value := getattr(options, name)) is not None and not least <= value < float("inf"):
            parser.error(f"{flag(name)} is {value}; it must be at least {least}")
    try:
        parts = urlsplit(options.base_url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        sound = False
    if not sound:
        parser.error(f"--base-url is {options.base_url!r}; it must be an address like http://localhost:8000/v1")
    if not 0 < options.timeout < float("inf"):
        parser.error(f"--timeout is {options.timeout}; it must be more than 0")
    if (options.price_in is None) != (options.price_out is None):
        parser.error("--price-in and --price-out go together; give both or none")
    return options


class Chat:
    """A model behind a server, and the cache of its answers. Raises ValueError if something is missing or fails."""

    def __init__(self, model: str, base_url: str, timeout: float, cache: Path):
        try:
            import openai
        except ImportError:
            raise ValueError("the openai package is missing: pip install 'minisobert[chat]'") from None
        if not os.environ.get("OPENAI_API_KEY"):
            raise ValueError("OPENAI_API_KEY is not set; set it, to any word if the server needs no key")
        self.model, self.base_url, self.cache = model, base_url, cache
        self.error, self.refusal = openai.OpenAIError, openai.BadRequestError
        self.client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=RETRIES)
        self.answers = read_cache(cache)
        self.used: list[dict] = []  # for each question of this run, its entry in the cache
        self.asked = 0  # how many of these were not in the cache before

    def ask(self, messages: list[dict]) -> str:
        """The text of the answer; empty if the model gave none."""
        name = hashlib.sha256(json.dumps([self.base_url, self.model, messages]).encode()).hexdigest()
        if name not in self.answers:
            self.answers[name] = self._ask(messages)
            self.asked += 1
            with open(self.cache, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": name, "model": self.model, **self.answers[name]}) + "\n")
        self.used.append(self.answers[name])
        return self.answers[name]["text"]

    def _ask(self, messages: list[dict]) -> dict:
        reply = None
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0)
            text, usage = reply.choices[0].message.content or "", reply.usage
            counts = {n: getattr(usage, n) if usage else None for n in ("prompt_tokens", "completion_tokens")}
            if isinstance(text, str) and all(isinstance(n, (int, type(None))) for n in counts.values()):
                return {"text": text, **counts}
        except self.error as error:
            if isinstance(error, self.refusal) and self.used:  # before the first answer, anything may be wrong
                return {"text": f"refused: {error}", "prompt_tokens": None, "completion_tokens": None}
            raise ValueError(f"{self.base_url}: {error}; {self.cache} keeps the answers so far") from None
        except (ValueError, AttributeError, TypeError, IndexError):
            pass  # the reply is not JSON, or does not follow the protocol
        raise ValueError(f"{self.base_url} sent no chat completion; {self.cache} keeps the answers so far")


def read_cache(path: Path) -> dict[str, dict]:
    """The answers, by the hashes of their questions. If a line was cut off, its question is asked again. Raises
    ValueError for a file that is something else, or that cannot be written."""
    answers = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    answers[entry["key"]] = {n: entry[n] for n in ("text", "prompt_tokens", "completion_tokens")}
                except (ValueError, KeyError, TypeError):
                    continue
            if text.strip() and not answers and text.endswith("\n"):
                raise ValueError(f"--cache {path} holds no answers; name another file")
            if text and not text.endswith("\n"):
                file.write("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--cache {path} is not UTF-8; name another file") from None
    except OSError as error:
        raise ValueError(f"--cache {path}: {error.strerror}") from None
    return answers


def sample(data: Dataset, limit: int | None) -> Dataset:
    """The data with `limit` examples of test: those with the smallest hashes, so a larger sample contains a smaller."""
    if limit is None or limit >= len(data.test):
        return data
    chosen = np.argsort(permutation_keys(len(data.test), key(0, "chat test")))[:limit]
    note = f"{limit:,} of the {len(data.test):,} examples of test, drawn by a hash"
    return dataclasses.replace(data, test=[data.test[i] for i in sorted(chosen)], notes=[*data.notes, note])


def evaluate_answers(data: Dataset, classes: list[list[int]]) -> Evaluation:
    """Evaluates the answers as finetune.py does, without ROC. Answers that cannot be parsed are a column of the
    confusion matrix of documents, but not a class in macro-F1. data: its test examples are those from `prompts.parse`.
    """
    one_hot = [np.eye(len(data.labels) + 1)[each] for each in classes]
    truth = [list(e.tags or [e.label]) for e in data.test]
    accuracy = float(np.mean([a == b for each in zip(truth, classes) for a, b in zip(*each)]))
    if data.kind == "token":
        evaluated = evaluation.evaluate(dataclasses.replace(data, labels=(*data.labels, "O")), data.test, one_hot)
        return dataclasses.replace(evaluated, figures={**evaluated.figures, "accuracy": accuracy})
    truth, found, names = np.concatenate(truth), np.concatenate(classes), (*data.labels, UNPARSABLE)
    scores = dict(zip(data.labels, metrics.per_class(truth, found, len(names))))
    occurs = np.bincount(np.concatenate([truth, found]), minlength=len(names))
    macro_f1 = float(np.mean([s.f1 for s, there in zip(scores.values(), occurs) if there]))
    return Evaluation({"accuracy": accuracy, "macro_f1": macro_f1}, scores, *evaluation.confusion(names, truth, found))


def write(folder: Path, options, config: FineTuneConfig, data: Dataset, texts: list[str], chat: Chat) -> str:
    """Writes the results. Returns what to print, such as
    `f1 0.5712 on test, 3 of 200 answers unparsable, 0.42 dollars`."""
    asked = data.test
    examples, classes = zip(*(prompts.parse(data, e, text) for e, text in zip(asked, texts)))
    data = dataclasses.replace(data, test=list(examples))
    evaluated = evaluate_answers(data, list(classes))
    unparsable = [(e.id, text) for e, text, each in zip(asked, texts, classes) if len(data.labels) in each]
    account = {n: sum(entry[n] or 0 for entry in chat.used) for n in ("prompt_tokens", "completion_tokens")}
    account |= {"answers": len(texts), "asked_now": chat.asked}
    account["without_usage"] = sum(entry["prompt_tokens"] is None for entry in chat.used)
    if options.price_in is not None:
        millions = account["prompt_tokens"] / 1e6, account["completion_tokens"] / 1e6
        account["dollars"] = millions[0] * options.price_in + millions[1] * options.price_out
    results = {
        **report.summary(data, config.model, evaluated), "seeds": [{"seed": 1, **evaluated.figures}],
        **evaluation.mean_and_deviation([evaluated.figures]), "unparsable": len(unparsable), "account": account,
        "invented": sum(len(e.words) - len(before.words) for e, before in zip(examples, asked)),
        "settings": vars(options),
    }  # fmt: skip
    write_json(folder / "metrics.json", results)
    shown = dataclasses.replace(data, labels=(*data.labels, UNPARSABLE))
    report.write_predictions(folder / "predictions.csv", shown, [np.eye(len(shown.labels))[c] for c in classes])
    (folder / "report.md").write_text("\n".join(_report(results, unparsable)) + "\n", encoding="utf-8")
    name = evaluation.main_figure(data)
    cost = f", {account['dollars']:.2f} dollars" if "dollars" in account else ""
    return f"{name} {results['mean'][name]:.4f} on test, {len(unparsable):,} of {len(texts):,} answers unparsable{cost}"


def _report(results: dict, unparsable: list[tuple[str, str]]) -> Iterable[str]:
    yield f"# {results['task']}: `{results['model']}`\n"
    yield from table(["figure, on test", ""], [[n, f"{x:.4f}"] for n, x in results["mean"].items()])
    yield f"\n{len(unparsable):,} of {results['counts']['test']:,} answers are unparsable and count as wrong."
    if TASKS[results["task"]].kind == "token":
        yield f"{results['invented']:,} entities are not in their sentence and count as false positives."
    yield from ("", *(f"- {note}" for note in results["notes"]), "\n## Classes\n")
    rows = [[n, *(f"{s[x]:.4f}" for x in ("precision", "recall", "f1")), f"{s['support']:,}"]
            for n, s in results["per_class"].items()]  # fmt: skip
    yield from table(["", "precision", "recall", "F1", "in test"], rows)
    yield "\n## What the answers cost\n"
    account = results["account"].items()
    yield from table(["", "in all"], [[n, f"{x:,.4f}" if n == "dollars" else f"{x:,}"] for n, x in account])
    if unparsable:
        yield f"\n## Unparsable answers, the first {report.WORST} of them\n"
        yield from (f"- `{name}`: {text[:200]!r}" for name, text in unparsable[: report.WORST])
    yield "\n## How it was made\n"
    yield from table(["setting", ""], [[f"`{n}`", f"`{v}`"] for n, v in results["settings"].items()])


if __name__ == "__main__":
    sys.exit(main())
