"""The downstream tasks. Each has a file that ends with its record, and TASKS is the only list of these records."""

from minisobert.tasks import closed, labels, ner, obsoletion, pairs, quality, tags

TASKS = {
    task.name: task
    for task in (quality.TASK, closed.TASK, ner.TASK, obsoletion.TASK, labels.TASK, tags.TASK, pairs.TASK)
}
SPLIT_SEED = 0  # for tasks without a split of their own: the same for every model, training seed and corpus
