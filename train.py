"""Pre-train an encoder: config → mesh → data → model → loop.

    python train.py --preset tiny                             one process
    torchrun --nproc_per_node=8 train.py                      one process per GPU: the paper's recipe

The folder --out holds config.json, metrics.jsonl, tokenizer.model and checkpoints/. The same command goes on where an
interrupted run was, bit for bit.
"""

from __future__ import annotations

import sys

import torch

from minisobert.config import TrainConfig, fail, parse
from minisobert.corpus.loader import Rows
from minisobert.corpus.packing import ROW_TOKENS
from minisobert.corpus.shards import open_shards
from minisobert.model import MaskedLM
from minisobert.parallel import mesh as meshes
from minisobert.parallel.mesh import Mesh
from minisobert.training.loop import train
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Run


def main(argv: list[str] | None = None) -> int:
    config = parse(TrainConfig, argv, prog="train.py", description=__doc__.splitlines()[0])
    with meshes.start() as mesh:
        try:
            return pretrain(config, mesh)
        except ValueError as error:  # a user's mistake: found before anything is written, by all ranks alike
            if mesh.is_first:
                fail(f"train.py: {error}")
            return 2


def pretrain(config: TrainConfig, mesh: Mesh) -> int:
    """Returns the exit status: 0, or 128 + the signal that ended the run."""
    # Data
    shards = open_shards(config.data, verify=config.verify)
    training = Rows(shards, shards.training_documents, config.seed)
    validation = Rows(shards, shards.validation_documents, config.seed, purpose="validation")
    config.check(len(training), ROW_TOKENS, mesh.data_parallel)

    # Model and optimizer, as they begin or as the last checkpoint left them
    model_config = config.model(shards.vocab_size)
    run = Run(config, model_config, shards)
    model = MaskedLM(model_config).initialise(config.seed).to(mesh.device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and mesh.device.type == "cuda")
    optimizer = Optimizer(
        model, torch.bfloat16 if bf16 else torch.float32, (config.beta1, config.beta2), config.weight_decay
    )
    progress = run.load(optimizer)

    # Loop
    if mesh.is_first:
        run.begin(progress.step)
        print(
            f"{config.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{'bf16' if bf16 else 'fp32'}, {mesh.data_parallel} × {mesh.device.type}; "
            f"{len(training):,} rows of {ROW_TOKENS:,} tokens an epoch, "
            f"{training.packing.tokens / (len(training) * ROW_TOKENS):.2%} full"
            + (f"; going on after step {progress.step:,}" if progress.step else ""),
            flush=True,
        )
    stopped = train(model, optimizer, training, validation, run, mesh, progress)
    if mesh.is_first:
        print(f"{run.folder}: step {progress.step:,}, loss {progress.loss:.4f}")
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
