"""Pre-train an encoder: config → data → mesh → model → loop.

The folder --out holds config.json, metrics.jsonl, the tokenizer and checkpoints/. Repeating the command resumes an
interrupted run, bit for bit. A run may also resume on another layout.
"""

from __future__ import annotations

import signal
import sys
import time

if __name__ == "__main__":  # Ctrl-C during the imports below ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from minisobert.cli import PATIENCE, command, parse
from minisobert.config import TrainConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import open_shards
from minisobert.hub.importing import open_init, open_model
from minisobert.model import MaskedLM
from minisobert.parallel import mesh as meshes
from minisobert.parallel import tensor
from minisobert.parallel.mesh import KnownToAll, Mesh
from minisobert.planning.report import report
from minisobert.training.loop import StopSignals, train
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Run

ABOUT = """\
Repeat the command to resume an interrupted run. Every position of a row counts as a token, as in Megatron-LM. Without \
options it trains SOBertBase by its paper's recipe."""
EXAMPLES = """\
python train.py --data data/prepared --preset modern-small --out runs/mine
python train.py --init runs/mine --preset modern-small --data data/java --out runs/java
python train.py --plan --preset large --gpu A100 --gpus 8 --price-per-gpu-hour 1.5
torchrun --nproc_per_node=8 train.py --preset large --tensor-parallel 2 --shard-optimizer
"""


@command("train.py")
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if training failed, or 128 + the number of the signal that ended it. A user's
    mistake raises SystemExit with status 2."""
    config = parse(TrainConfig, argv, prog="train.py", description=ABOUT, examples=EXAMPLES)
    if config.plan:
        print(report(config, open_model(config.init).model.config if config.init else None))
        return 0

    # Open the data and check that everything fits together, before processes wait for each other or write anything
    meshes.check_launch()
    meshes.check_precision(config.precision)
    world = meshes.from_torchrun("WORLD_SIZE", 1)
    shards = open_shards(config.data, verify=config.verify)
    init = open_init(config.init, shards) if config.init else None
    model_config = config.model_config(shards.vocab_size, init and init.model.config)
    meshes.check_layout(model_config, world, config.tensor_parallel, config.row_tokens)
    training = Rows(shards, shards.training_documents, config.seed, config.row_tokens, weights=shards.weights)
    validation = Rows(shards, shards.validation_documents, config.seed, config.row_tokens, purpose="validation")
    config.check(len(training), world // config.tensor_parallel)
    run = Run(config, model_config, shards, init)

    try:
        processes = meshes.start(config.tensor_parallel, config.timeout)
        with StopSignals(speaks=meshes.from_torchrun("RANK", 0) == 0) as stop, processes as mesh, run.claimed(mesh):
            return pretrain(run, training, validation, mesh, stop)
    except KnownToAll as error:  # a failed save, or gradients that are not finite
        if str(error):
            print(f"train.py: {error}; repeat the command to resume from the last checkpoint", file=sys.stderr)
        else:
            time.sleep(PATIENCE)  # torchrun kills all ranks when one exits: the first rank has to print the error
        return 1


def pretrain(run: Run, training: Rows, validation: Rows, mesh: Mesh, stop: StopSignals) -> int:
    config = run.config
    # Model and optimizer, new or from the last checkpoint. Every rank initialises the whole model and keeps its slice,
    # so that the layout cannot change the initial weights
    model = MaskedLM(run.model_config).initialise(config.seed)
    if run.init:
        model.load_state_dict(run.init.model.state_dict())
    parameters = sum(p.numel() for p in model.parameters())
    model = tensor.shard(model, mesh, config.sequence_parallel).to(mesh.device)
    model.encoder.recompute = config.recompute
    automatic = "bf16" if mesh.device.type == "cuda" else "fp32"
    precision = automatic if config.precision == "auto" else config.precision
    if precision == "bf16-products":
        torch.set_float32_matmul_precision("medium")
    optimizer = Optimizer(
        model, torch.bfloat16 if precision == "bf16" else torch.float32, (config.beta1, config.beta2),
        config.weight_decay, mesh, sharded=config.shard_optimizer, sequence_parallel=config.sequence_parallel,
        momentum=config.muon_momentum if config.optimizer == "muon" else None,
    )  # fmt: skip
    progress = run.restore(optimizer, mesh)

    # Loop
    run.begin(progress.step, mesh)
    if mesh.is_first:
        print(
            f"{config.name}: {parameters:,} parameters, {precision}, {mesh.data_parallel} × {mesh.tensor_parallel} "
            f"{mesh.device.type}; "
            f"{len(training):,} rows of {config.row_tokens:,} tokens an epoch, "
            f"{training.packing.tokens / (len(training) * config.row_tokens):.2%} full"
            + (f"; continuing after step {progress.step:,}" if progress.step else ""),
            flush=True,
        )
        epochs = config.train_tokens / (len(training) * config.row_tokens)
        largest = max((weight for _, weight in run.shards.weights), default=1)
        if epochs * largest > 4:
            weighted = f", with weights of up to {largest:g}" if largest != 1 else ""
            print(
                f"--train-tokens is {epochs:,.1f} epochs of this corpus{weighted}; after about 4, repeated text "
                "teaches little (Muennighoff et al. 2023, arXiv 2305.16264)",
                flush=True,
            )
    stopped = train(model, optimizer, training, validation, run, mesh, progress, stop)
    if mesh.is_first:
        print(f"{run.folder}: step {progress.step:,}, loss {progress.loss:.4f}")
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
