"""Curves of runs: `python -m minisobert.plot RUN [RUN …]` writes loss.png into the first RUN (extra [plot])."""

from __future__ import annotations

from pathlib import Path

from minisobert.cli import Parser, command
from minisobert.training.run import read_metrics


def pyplot():
    """matplotlib.pyplot for files, not for windows. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'minisobert[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(runs: list[Path], path: Path, entropy: float | None = None) -> None:
    """Training and held-out loss of the runs over tokens, as a PNG. entropy: in nats, drawn as a level beside them."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        lines = read_metrics(run)
        tokens = [line["positions"] / 1e6 for line in lines]
        axes.plot(tokens, [line["loss"] for line in lines], color=f"C{i}", alpha=0.25, linewidth=0.8)
        smooth = moving_mean([line["loss"] for line in lines], max(len(lines) // 50, 1))
        axes.plot(tokens, smooth, color=f"C{i}", label=f"{Path(run).name}: training")
        held_out = [(x, line["validation_loss"]) for x, line in zip(tokens, lines) if "validation_loss" in line]
        axes.plot(*zip(*held_out), "o-", color=f"C{i}", markersize=4, linewidth=1, markerfacecolor="white",
                  label=f"{Path(run).name}: held out")  # fmt: skip
    if entropy is not None:
        axes.axhline(entropy, color="black", linewidth=1, linestyle=":", label="unigram entropy of the corpus")
    axes.set(xlabel="million tokens", ylabel="masked-LM loss (nats)", title="Pre-training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def moving_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and the width - 1 before it, as far as there are so many."""
    return [sum(values[max(i - width + 1, 0) : i + 1]) / min(i + 1, width) for i in range(len(values))]


@command("minisobert.plot")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="minisobert.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--png", type=Path, help="where to (default: loss.png in the first run's folder)")
    options = parser.parse_args(argv)
    png = options.png or options.runs[0] / "loss.png"
    plot(options.runs, png)
    print(png)


if __name__ == "__main__":
    main()
