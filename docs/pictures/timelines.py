"""Draws timelines of an optimizer step and of the writing of a checkpoint. Widths are not measured."""

from __future__ import annotations

from svg import SMALL, Picture

HIGH = 34  # pixels: the height of a box
AHEAD = 4  # micro-batches that the loader prepares ahead


class Lanes:
    """Parallel lines with boxes: one line for each thread, device or folder."""

    def __init__(self, p: Picture, left: float, tops: dict[str, float], ruled: int):
        """tops: the lanes' upper edges, by name; a / in a name begins a new line. ruled: how many have a rule below."""
        self.p, self.tops = p, tops
        for i, (name, top) in enumerate(tops.items()):
            p.lines(left - 10, top + HIGH / 2, *name.split("/"), size=SMALL, anchor="end")
            if i < ruled:
                p.line((left, top + HIGH + 5), (880, top + HIGH + 5), look="panel")

    def box(self, lane: str, start: float, stop: float, words: str = "", look: str = "op") -> None:
        self.p.box(start, self.tops[lane], stop - start, HIGH, words, look=look, size=SMALL)

    def note(self, lane: str, x: float, words: str, look: str = "muted", anchor: str = "start") -> None:
        """Words above a lane."""
        self.p.text(x, self.tops[lane] - 14, words, look, SMALL, anchor)


def step() -> Picture:
    """A step in the order of training/loop.py, training/optimizer.py and corpus/loader.py."""
    p = Picture(428, "One optimizer step of one rank over time")
    p.text(24, 26, "One step of one rank, with 3 micro-batches", "bold", anchor="start")
    loader, host, computes, exchange, gradients = names = (
        "loader thread", "host", "GPU computes", "GPUs exchange", "gradients",
    )  # fmt: skip
    lanes = Lanes(p, 134, dict(zip(names, (50, 130, 206, 258, 310))), ruled=5)

    for i in range(3):
        lanes.box(loader, 134 + 88 * i, 218 + 88 * i, f"batch {i + 1 + AHEAD}", "document")
        lanes.box(host, 134 + 46 * i, 176 + 46 * i, f"{i + 1}")
        lanes.box(computes, 150 + 138 * i, 194 + 138 * i, f"F {i + 1}")
        lanes.box(computes, 196 + 138 * i, 286 + 138 * i, f"B {i + 1}", "gradient")
    p.text(412, lanes.tops[loader] + HIGH / 2, "for later steps, four ahead", "muted", SMALL, "start")

    lanes.note(host, 134, "launches")
    lanes.box(host, 276, 340, "counts", "communication")
    lanes.note(host, 276, "hosts meet over gloo")
    lanes.box(host, 344, 688, "waits for the GPU", "panel dashed")
    lanes.box(host, 692, 736, "step")
    lanes.box(host, 740, 846, "waits", "panel dashed")
    lanes.box(host, 850, 880, "log")

    for bucket, (start, stop) in enumerate(((502, 530), (532, 560), (562, 614))):
        lanes.box(exchange, start, stop, str(bucket), "communication")
    lanes.box(computes, 618, 662, "norm")
    lanes.box(exchange, 664, 680, look="communication")
    lanes.box(computes, 702, 764, "step", "weight")
    lanes.box(exchange, 766, 822, "gather", "communication")
    lanes.box(exchange, 826, 842, look="communication")
    for x, words in ((672, "reads the norm"), (834, "reads the loss")):
        p.arrow((x, lanes.tops[exchange]), (x, lanes.tops[host] + HIGH), look="communication")
        lanes.note(host, x, words, anchor="middle")

    for start, stop, words in (
        (286, 424, "of 1"), (424, 562, "of 1 and 2"), (562, 614, "of all 3"), (614, 822, "of all ranks"),
    ):  # fmt: skip
        lanes.box(gradients, start, stop, words, "gradient")
    lanes.box(gradients, 826, 880, "0")
    told = (
        "Each backward pass (B) adds its gradients to one buffer. During the last one, the buckets 0, 1 and 2 of it",
        "are summed over the ranks. The gather is there with a sharded optimizer only. Widths are not measured.",
    )
    p.lines(24, 392, *told, look="muted", size=SMALL, anchor="start")
    return p


def checkpoint() -> Picture:
    """The writing of a checkpoint in the order of training/checkpoint.py."""
    p = Picture(352, "How a checkpoint is written beside the training and gets its name at the end")
    p.text(24, 26, "The checkpoint of step 1,000", "bold", anchor="start")
    training, ranks, first, disk, crash = names = (
        "training", "all ranks,/in background", "rank 0,/in background", "on disk", "after a crash",
    )  # fmt: skip
    lanes = Lanes(p, 136, dict(zip(names, (60, 114, 168, 238, 292))), ruled=3)

    lanes.box(training, 136, 192, "1,000")
    lanes.box(first, 196, 256, "create")
    lanes.box(training, 196, 256, "waits", "panel dashed")
    lanes.box(training, 260, 310, "copy", "weight")
    for i in range(7):
        lanes.box(training, 314 + 81 * i, min(391 + 81 * i, 880), f"1,{i + 1:03}")
    lanes.box(ranks, 314, 422, "write own part")
    lanes.box(ranks, 426, 476, "fsync")
    p.rect(538, lanes.tops[training] - 5, 12, HIGH + 10, "communication", 6)
    lanes.note(training, 544, "each hears that all have written", "communication-ink", "middle")
    for start, stop, words in (
        (554, 688, "sha256, state.json"), (692, 738, "fsync"), (742, 800, "rename"), (806, 880, "prune old"),
    ):  # fmt: skip
        lanes.box(first, start, stop, words)
    for start, stop, look, words in ((196, 801, "disk dashed", ".unfinished-00001000"), (805, 880, "disk", "step-…")):
        lanes.box(disk, start, stop, look=look)
        p.text((start + stop) / 2, lanes.tops[disk] + HIGH / 2, words, "code", SMALL)
    lanes.box(crash, 136, 801, "the checkpoints before it are there", "disk")
    lanes.box(crash, 805, 880, "it too", "disk")
    p.line((803, lanes.tops[first] - 4), (803, lanes.tops[crash] + HIGH + 8), look="op dashed")
    return p
