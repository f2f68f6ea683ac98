"""finetuning.compare: the table of results, beside published figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisobert.finetuning import compare
from minisobert.tasks import TASKS

ROOT = Path(__file__).parents[2]


def folder(path: Path, task: str, model: str, mean: dict, std: dict | None = None, test: int = 1_200, **settings):
    path.mkdir()
    seeds = [{"seed": i} for i in range(3 if std else 1)]
    found = {"task": task, "model": model, "counts": {"test": test}, "seeds": seeds, "mean": mean, "settings": settings}
    (path / "metrics.json").write_text(json.dumps(found | ({"std": std} if std else {})))
    return path


def test_results_stand_above_the_published_figures(tmp_path, capsys):
    folders = [
        folder(tmp_path / "a", "quality", "runs/base", {"accuracy": 0.8765, "macro_f1": 0.871, "roc_auc": 0.9},
               {"accuracy": 0.0042, "macro_f1": 0.0049, "roc_auc": 0}),
        folder(tmp_path / "b", "ner", "runs/base", {"f1": 0.6, "macro_f1": 0.5, "accuracy": 0.9}),
        folder(tmp_path / "c", "quality", "chat:gpt, 5-shot", {"accuracy": 0.4, "macro_f1": 0.3}),
    ]  # fmt: skip
    assert compare.main([str(path) for path in folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | quality: accuracy / macro-F1 | closed: ")
    assert lines[2] == "| runs/base | 87.6 ± 0.4 / 87.1 ± 0.5 (n 1,200, 3 seeds) |  | 60.0 (n 1,200) |  |"
    assert lines[3] == "| chat:gpt, 5-shot | 40.0 / 30.0 (n 1,200) |  |  |  |"
    assert "| bert-base-cased † (SELU) | 84.7 / 84.7 | 68.9 / 54.5 |  |  |" in lines
    assert "| SoftNER † (Tabassum et al. 2020) |  |  | 79.10 |  |" in lines
    assert "† Published elsewhere, on other splits: docs/published-results.md." in lines
    assert lines[-1] == "| quality, macro-F1 | runs/base | chat:gpt, 5-shot | +57.10 |  |"  # one seed has no deviation


def test_results_of_other_options_and_sizes_are_told_apart(tmp_path):
    figures = {"accuracy": 0.5, "macro_f1": 0.5}
    plain = folder(tmp_path / "a", "quality", "tfidf", figures, keep_leak=False)
    leak = folder(tmp_path / "b", "quality", "tfidf", figures, keep_leak=True, test=80)
    lines = compare.lines([plain, leak])
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| tfidf", "| tfidf --keep-leak"]
    assert lines[-1].startswith("quality: the results are of 80 and 1,200 test examples")


def test_the_difference_of_two_models_is_measured_in_its_standard_error(tmp_path):
    """The standard error is that of Welch's test, from scipy."""
    one = folder(tmp_path / "a", "ner", "runs/base", {"f1": 0.61}, {"f1": 0.007})
    other = folder(tmp_path / "b", "ner", "random:base", {"f1": 0.58}, {"f1": 0.013})
    stats = pytest.importorskip("scipy.stats")
    t, _ = stats.ttest_ind_from_stats(0.61, 0.007, 3, 0.58, 0.013, 3, equal_var=False)
    last = compare.lines([one, other])[-1]
    assert last == f"| ner, F1 | runs/base | random:base | +3.00 ± {3 / t:.2f} | {t:.1f} standard errors |"


def test_published_figures_are_those_of_their_task():
    rows = [(model, task, cell) for task in TASKS.values() for model, _, cell in task.published]
    assert all(len([float(x) for x in cell.split(" / ")]) == len(task.figures) for _, task, cell in rows)
    assert len(rows) == 11
    assert ("ModernBERT-large", TASKS["closed"], "71.3 / 58.2") in rows and ("SoftNER", TASKS["ner"], "79.10") in rows


def test_the_page_of_published_figures_holds_those_of_the_records():
    header, line, *rows = compare.lines([])[: 2 + 6]
    page = (ROOT / "docs/published-results.md").read_text()
    assert "\n".join([header, line, *(row.replace(f" {compare.MARK}", "") for row in rows)]) + "\n\n" in page


def test_the_page_of_results_holds_what_its_folders_give():
    page = ROOT / "benchmarks/results/tasks.md"
    names = [f"{task}-{model}" for model in ("modern", "tiny", "random", "tfidf") for task in TASKS]
    folders = [folder for name in names if (folder := page.with_suffix("") / name).exists()]
    assert "\n".join(compare.lines(folders)) in page.read_text()


def test_mistakes_end_in_one_line(tmp_path, capsys):
    def refused(*paths: Path) -> str:
        with pytest.raises(SystemExit) as exit:
            compare.main([str(path) for path in paths])
        assert exit.value.code == 2
        return capsys.readouterr().err

    one, two = (folder(tmp_path / n, "ner", "m", {"f1": 0.5}) for n in "ab")
    assert refused(one, two) == (
        f"minisobert.finetuning.compare: {one} and {two} both hold results of m on ner; give one of them\n"
    )
    (two / "metrics.json").write_text("[]")
    assert "metrics.json is not what finetune.py or finetuning.chat writes" in refused(two)
    assert "No such file or directory; give the --out of" in refused(tmp_path / "c")
