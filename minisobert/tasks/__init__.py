"""The downstream tasks: a file for each, which ends with its record. TASKS lists the records, and nothing else does."""

from minisobert.tasks import closed, labels, ner, obsoletion, pairs, quality, tags

TASKS = {
    task.name: task
    for task in (quality.TASK, closed.TASK, ner.TASK, obsoletion.TASK, labels.TASK, tags.TASK, pairs.TASK)
}
SPLIT_SEED = 0  # where a task has no split of its own: the same for every model, training seed and corpus
