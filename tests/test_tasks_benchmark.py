"""benchmarks.tasks: the table of results beside what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tasks


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
    assert tasks.main([str(path) for path in folders]) == 0
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
    lines = tasks.lines([plain, leak], tasks.PUBLISHED)
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| tfidf", "| tfidf --keep-leak"]
    assert lines[-1].startswith("quality: the results are of 80 and 1,200 test examples")


def test_the_difference_of_two_models_is_measured_in_its_standard_error(tmp_path):
    """That of Welch's test, from scipy."""
    one = folder(tmp_path / "a", "ner", "runs/base", {"f1": 0.61}, {"f1": 0.007})
    other = folder(tmp_path / "b", "ner", "random:base", {"f1": 0.58}, {"f1": 0.013})
    stats = pytest.importorskip("scipy.stats")
    t, _ = stats.ttest_ind_from_stats(0.61, 0.007, 3, 0.58, 0.013, 3, equal_var=False)
    last = tasks.lines([one, other], tasks.PUBLISHED)[-1]
    assert last == f"| ner, F1 | runs/base | random:base | +3.00 ± {3 / t:.2f} | {t:.1f} standard errors |"


def test_the_page_has_the_figures_of_the_issue():
    rows = [(row["model"], row["task"], row["accuracy"], row["F1"]) for row in tasks.published(tasks.PUBLISHED)]
    assert len(rows) == 11
    assert ("ModernBERT-large", "closed", "71.3", "") in rows and ("SoftNER", "ner", "", "79.10") in rows


def test_the_page_of_results_holds_what_its_folders_give():
    page = tasks.PUBLISHED.parents[1] / "benchmarks/results/tasks.md"
    names = [f"{task}-{model}" for model in ("tiny", "random", "tfidf") for task in tasks.FIGURES]
    folders = [folder for name in names if (folder := page.with_suffix("") / name).exists()]
    assert "\n".join(tasks.lines(folders, tasks.PUBLISHED)) in page.read_text()


def test_mistakes_end_in_one_line(tmp_path, capsys):
    def refused(*paths: Path) -> str:
        with pytest.raises(SystemExit) as exit:
            tasks.main([str(path) for path in paths])
        assert exit.value.code == 2
        return capsys.readouterr().err

    one, two = (folder(tmp_path / n, "ner", "m", {"f1": 0.5}) for n in "ab")
    assert refused(one, two) == f"benchmarks.tasks: {one} and {two} both hold m on ner; name one of them\n"
    (two / "metrics.json").write_text("[]")
    assert "metrics.json is not what finetune.py or benchmarks.chat writes" in refused(two)
    assert "No such file or directory; give the --out of" in refused(tmp_path / "c")


@pytest.mark.parametrize("row", ["| m | ner | 1 | 2 | | s |", "| m | fruit | 1 | 2 | | s |", "| m | ner | | | 3 |"])
def test_a_row_of_the_page_that_fits_no_task_is_named(tmp_path, row):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n| {' | '.join(tasks.COLUMNS)} |\n|---|---|---|---|---|---|\n{row}\n")
    with pytest.raises(ValueError, match="must have a task and the figures of it alone"):
        tasks.published(page)
