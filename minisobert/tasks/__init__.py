"""The downstream tasks, one file each: read, label, split. TASKS is the table of them."""

from minisobert.corpus.html import html_to_text
from minisobert.tasks import closed, ner, obsoletion, quality

TASKS = {"quality": quality.load, "closed": closed.load, "ner": ner.load, "obsoletion": obsoletion.load}
SPLIT_SEED = 0  # where a task has no split of its own: the same for every model, training seed and corpus
CLEANING = {"": str, "html": html_to_text, "markup": quality.normalise, "words": quality.without_markup_words}
