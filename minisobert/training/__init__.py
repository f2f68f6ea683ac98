"""Training: the step and the loop, optimizers, schedule, checkpoints, and the folder and figures of a run."""
