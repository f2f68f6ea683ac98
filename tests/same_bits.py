"""Checks that a change keeps every result: compares short runs before and after it, bit for bit.

    python -m tests.same_bits COMMIT [DUMP.7z …]

It checks out COMMIT beside the working tree, prepares the same text with both, trains the same runs with both (one
process, 2 data-parallel, 2 tensor-parallel with sequence parallelism; with dropout) and compares shards, losses,
gradient norms, weights and Adam's moments. For each dump it compares tokens.bin. It exits with 1 if anything differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import sentences

ROOT = Path(__file__).parents[1]
COMMON = "--preset tiny --tokens-per-batch 8192 --train-tokens 65536 --eval-every-tokens 32768 --eval-rows 4 --seed 3"
RUNS = {  # name: (processes, options)
    "one": (1, "--micro-batch-rows 2"),
    "one-bf16": (1, "--micro-batch-rows 4 --precision bf16 --recompute --loss-average micro-batch"),
    "data-parallel": (2, "--micro-batch-rows 1 --shard-optimizer"),
    "tensor-parallel": (2, "--micro-batch-rows 4 --tensor-parallel 2 --sequence-parallel"),
}
TIMES = {"tokens_per_second", "dollars"}  # equal runs may differ in these


def run(tree: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{tree.name}: {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}", file=sys.stderr)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def results(tree: Path, texts: Path, dumps: list[Path], out: Path) -> dict[str, str]:
    """The results to compare, by name: checksums of files, and the lines of metrics.jsonl without times."""
    found = {}
    run(tree, "-m", "data.prepare", "--input", str(texts), "--out", str(out / "data"), "--vocab-size", "500")
    for name in ("tokens.bin", "documents.npy", "tokenizer.model"):
        found[f"data {name}"] = sha256(out / "data" / name)
    for name, (processes, options) in RUNS.items():
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = [*COMMON.split(), *options.split(), "--data", str(out / "data"), "--out", str(out / name)]
        run(tree, *(start if processes > 1 else []), "train.py", *words)
        checkpoint = out / name / "checkpoints" / "step-00000008"
        for file in ("model.safetensors", "optimizer.safetensors"):
            found[f"{name} {file}"] = sha256(checkpoint / file)
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        for step, line in enumerate(map(json.loads, lines), 1):
            found[f"{name} step {step}"] = json.dumps({k: v for k, v in line.items() if k not in TIMES})
    for dump in dumps:
        run(tree, "-m", "data.prepare", "--input", str(dump), "--out", str(out / dump.stem), "--vocab-size", "2000")
        found[f"{dump.name} tokens.bin"] = sha256(out / dump.stem / "tokens.bin")
    return found


def main(commit: str, *dumps: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        before, texts = Path(folder) / "tree-before", Path(folder) / "toy.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(2_000, seed=1)))
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(before), commit], cwd=ROOT, check=True)
        try:
            paths = [Path(dump).resolve() for dump in dumps]
            old, new = (
                results(tree, texts, paths, Path(folder) / name) for tree, name in ((before, "old"), (ROOT, "new"))
            )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    differ = [name for name in old | new if old.get(name) != new.get(name) or "missing" in old.get(name, "missing")]
    for name in differ:
        print(f"{name}:\n  before {old.get(name)}\n  after  {new.get(name)}")
    print(f"{len(old | new) - len(differ)} of {len(old | new)} results are equal to the last bit")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
