"""Draws the whole system, from a dump to a Hugging Face folder."""

from __future__ import annotations

from svg import SMALL, Picture

# lengths of the documents in each packed row of 24 tokens; the rest is padding
PACKED = ((15, 9), (9, 8, 7), (24,), (12, 6, 5))
LOOKS = ("document", "document2", "document3")
MASKED = ((4, 9, 18), (2, 13, 20), (6, 7, 21), (3, 11, 16))  # the tokens of each row that the model has to guess


def _stage(p: Picture, x: float, y: float, w: float, *words: str, file: str, look: str = "op") -> None:
    p.box(x, y, w, 52, *words, look=look, size=SMALL)
    p.text(x + w / 2, y + 66, file, "code muted", 12)


def _prepare(p: Picture) -> None:
    p.rect(184, 16, 516, 156, "panel", 8)
    p.text(198, 36, "python -m data.prepare", "code bold", SMALL, "start")
    y = 70
    _stage(p, 198, y, 112, "text of each", "post, cleaned", file="corpus/posts")
    _stage(p, 330, y, 112, "no duplicates", file="corpus/duplicates")
    _stage(p, 584, y, 102, "token ids", file="corpus/tokenizer")
    lengths = sorted((n for row in PACKED for n in row), reverse=True)
    for i, n in enumerate(lengths):
        p.rect(466, y - 16 + 9 * i, 4 * n, 6, LOOKS[i % 3], 1)
    p.text(514, y + 82, "documents", "muted", SMALL)
    for start, stop in ((310, 330), (442, 460), (566, 584)):
        p.arrow((start, y + 26), (stop, y + 26))


def _train(p: Picture) -> None:
    p.rect(60, 212, 640, 230, "panel", 8)
    p.text(74, 232, "torchrun … train.py", "code bold", SMALL, "start")
    p.text(686, 232, "training/loop", "code muted", 12, "end")
    y = 272
    _stage(p, 74, y, 112, "pack and mask", file="corpus/packing")
    for i, (lengths, masked) in enumerate(zip(PACKED, MASKED)):
        x, row = 210, y - 10 + 19 * i
        for n, look in zip(lengths, LOOKS):
            p.rect(x, row, 6 * n, 14, look, 1)
            x += 6 * n
        if x < 354:
            p.rect(x, row, 354 - x, 14, "op", 1)
        for token in masked:
            p.rect(210 + 6 * token, row, 6, 14, "document-ink", 0)
    p.text(282, y - 24, "packed rows", "muted", SMALL)
    for i in range(5):
        p.rect(384, y - 10 + 15 * i, 120, 11, "weight", 2)
    p.text(444, y - 24, "encoder", "muted", SMALL)
    _stage(p, 552, y, 112, "loss of the", "masked tokens", file="ops/cross_entropy")
    p.arrow((186, y + 26), (204, y + 26))
    p.arrow((360, y + 26), (378, y + 26))
    p.arrow((510, y + 14), (546, y + 14))
    p.arrow((546, y + 38), (510, y + 38), look="gradient")

    below = y + 106
    p.box(250, below, 170, 36, "summed over GPUs", look="communication", size=SMALL)
    p.box(462, below, 130, 36, "optimizer step", look="op", size=SMALL)
    p.arrow((404, y + 70), (404, below), look="gradient")
    p.arrow((484, below), (484, y + 70), look="weight")
    p.arrow((420, below + 18), (462, below + 18), look="gradient")
    p.text(394, below - 17, "gradients", "gradient-ink", SMALL, "end")
    p.text(494, below - 17, "new weights", "weight-ink", SMALL, "start")
    p.text(335, below + 48, "parallel/", "code muted", 12)
    p.text(527, below + 48, "training/optimizer", "code muted", 12)
    p.text(444, y + 78, "model", "code muted", 12)
    p.text(130, y + 82, "corpus/masking", "code muted", 12)


def _use(p: Picture) -> None:
    y, bus = 494, 464
    p.line((804, 346), (804, bus), (78, bus))
    for x, w, words in ((20, 116, ("`minisobert.hub", "`export")), (376, 116, ("`finetune.py",)),
                        (724, 160, ("`minisobert.load",))):  # fmt: skip
        p.box(x, y, w, 52, *words, size=SMALL)
        p.arrow((x + w / 2, bus), (x + w / 2, y))
    p.arrow((136, y + 26), (156, y + 26))
    p.disk(156, y - 10, 190, 94, "Hugging Face folder", "model.safetensors", "config.json", "tokenizer.json")
    p.arrow((492, y + 26), (512, y + 26))
    p.disk(512, y - 10, 180, 94, "results/your-task", "report.md", "predictions.csv", "model/")
    p.lines(804, y + 74, "guesses, vectors,", "classes in Python", look="muted", size=SMALL)


def system() -> Picture:
    p = Picture(596, "From a dump to a Hugging Face folder")
    p.disk(16, 44, 144, 96, "dump, or texts", ".7z archives", ".jsonl .csv", ".parquet .txt")
    p.arrow((160, 96), (184, 96))
    _prepare(p)
    p.arrow((700, 96), (724, 96))
    p.disk(724, 40, 160, 112, "data/prepared", "tokens.bin", "documents.npy", "tokenizer.model", "meta.json")
    p.arrow((804, 152), (804, 192), (36, 192), (36, 298), (60, 298))
    _train(p)
    p.arrow((700, 298), (724, 298))
    p.disk(724, 250, 160, 96, "runs/base", "config.json", "metrics.jsonl", "checkpoints/")
    _use(p)
    return p
