"""The commands that a user can run, each with the sentence that also opens its --help."""

from __future__ import annotations

COMMANDS = {
    "Prepare": {
        "data.prepare": "Turn a dump or your own texts into training data.",
        "data.tasks": "Make labelled examples for finetune.py from a dump.",
        "data.stdlib": "Write the text of Python's standard library to a file.",
    },
    "Train": {
        "demo.py": "Prepare data and train a small model in a few minutes.",
        "train.py": "Pre-train an encoder on a CPU, a GPU or many GPUs.",
        "minisobert.hub import": "Turn a released model into a run, to continue from it.",
    },
    "Look": {
        "minisobert.plot": "Draw the loss and speed of runs in one picture.",
        "minisobert.playground": "Print guesses for [MASK], or open a page to try models.",
    },
    "Use": {
        "minisobert.embed": "Write a vector for each text of a file.",
        "minisobert.hub export": "Write a model as a folder that transformers loads.",
    },
    "Fine-tune": {
        "finetune.py": "Fine-tune and evaluate a model, or apply it to texts.",
        "minisobert.finetuning.chat": "Put the questions of a task to a chat model.",
        "minisobert.finetuning.compare": "Print one table of the results of several models.",
    },
    "Measure": {
        "benchmarks.cpu": "Time training steps on a CPU, beside transformers.",
        "benchmarks.inference": "Time vectors and classes on a CPU, beside transformers.",
        "benchmarks.gpu": "Test and time kernels and training on a GPU.",
        "benchmarks.gpu.predict": "Predict what benchmarks.gpu should find.",
        "benchmarks.compiled": "Compile all kernels for three GPUs without having one.",
        "benchmarks.parallel": "Time a training step on 1, 2 and 4 processes.",
        "benchmarks.recipe": "Measure what each part of the modern recipe is worth.",
        "benchmarks.prepare": "Time data.prepare beside a pipeline of standard tools.",
        "benchmarks.scale": "Measure what data.prepare takes as a dump grows.",
        "benchmarks.packing": "Pack millions of documents into rows, and time it.",
        "benchmarks.loader": "Measure how fast one core loads training data.",
        "benchmarks.lengths": "Count how long the documents of a corpus are.",
        "benchmarks.faults": "Kill training runs many times, and count what is lost.",
    },
}


def sentence(name: str | None) -> str:
    """What COMMANDS says of a command; "" where it has none of this name."""
    return next((commands[name] for commands in COMMANDS.values() if name in commands), "")


def typed(name: str) -> str:
    """A command as a user types it."""
    return f"python {'' if name.endswith('.py') else '-m '}{name}"
