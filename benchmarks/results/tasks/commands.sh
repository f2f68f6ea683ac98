# What was run for benchmarks/results/tasks.md, from the repository's root, on two cores: bash benchmarks/results/tasks/commands.sh DATA
# DATA: a folder with text/ (titles, question bodies), dumps/ (.7z of sites) and tasks/ (the sets for fine-tuning)
set -e
python=.venv/bin/python
tasks=$1/tasks
declare -A files=(
    [ner]=$tasks/ner.7z
    [closed]=$tasks/closed_titles.csv.xz
    [quality]="$tasks/quality_preprocessed_train.csv.xz $tasks/quality_preprocessed_test.csv.xz"
)
export OMP_NUM_THREADS=1
mkdir -p runs/logs

# 1. the corpus, without the texts of dev and test
$python -m data.prepare --input "$1"/text/titles.txt.xz "$1"/text/question_bodies.jsonl.xz "$1"/dumps/*.7z \
    --vocab-size 8000 --out runs/prepared --decontaminate $(
        for task in ner closed quality; do for file in ${files[$task]}; do echo "$task=$file"; done; done
    ) >runs/logs/prepare.txt

# 2. pre-training: two processes of one thread; a small model and few tokens want small batches, a high rate, no dropout.
# Of the modern model the last of three layers attends to the whole text: what is classified has seen all of it
pretrain() {    # name, options
    .venv/bin/torchrun --nproc_per_node=2 train.py --data runs/prepared --out runs/$1 --eval-rows 64 \
        --checkpoint-every-tokens 8e6 ${@:2} >runs/logs/train-$1.txt 2>runs/logs/train-$1.progress
    tr '\r' '\n' <runs/logs/train-$1.progress | tail -1 >>runs/logs/train-$1.txt
    awk 'NR % 50 == 0 || /validation/' runs/$1/metrics.jsonl >runs/logs/pretraining-$1.jsonl
}
pretrain tiny --preset tiny --train-tokens 46e6 --tokens-per-batch 8192 --micro-batch-rows 2 --dropout 0 \
    --learning-rate 2e-3 --warmup-fraction 0.05 --final-learning-rate-fraction 0 --beta2 0.98 --eval-every-tokens 4e6
pretrain modern --preset modern-tiny --layers 3 --global-every 2 --train-tokens 20.5e6 --tokens-per-batch 4096 \
    --micro-batch-rows 1 --learning-rate 4e-3 --muon-learning-rate 6e-3 --warmup-fraction 0.03 --eval-every-tokens 2e6
$python -m minisobert.plot runs/tiny runs/modern --png runs/logs/loss.png

# 3. fine-tuning; what each model needs was seen on dev
finetune() {    # task, model, name of the model, settings
    $python finetune.py --task $1 --model ${2/ / --tokenizer } --out runs/results/$1-$3 --data ${files[$1]} --seeds 3 ${@:4} \
        >runs/logs/$1-$3.txt
}
random="random:tiny runs/tiny"
finetune ner runs/tiny tiny --dropout 0 --epochs 8 --learning-rate 1e-3 --tokens-per-batch 2048 &
finetune ner "$random" random --dropout 0 --epochs 8 --learning-rate 1e-3 --tokens-per-batch 2048 &
wait
finetune closed runs/tiny tiny --dropout 0 --epochs 3 --learning-rate 5e-4 &
finetune closed "$random" random --dropout 0 --epochs 3 --learning-rate 5e-4 &
wait
finetune quality runs/tiny tiny --dropout 0 --epochs 4 --learning-rate 5e-4 &
finetune quality "$random" random --dropout 0 --epochs 8 --learning-rate 5e-4 &
wait
for task in closed quality; do finetune $task tfidf tfidf; done
finetune ner runs/modern modern --dropout 0 --epochs 6 --learning-rate 2e-3 --tokens-per-batch 2048
finetune closed runs/modern modern --dropout 0 --epochs 2 --learning-rate 1e-3 --pooling mean
finetune quality runs/modern modern --dropout 0 --epochs 3 --learning-rate 5e-4 --pooling mean

# 4. the table
results=()
for model in modern tiny random tfidf; do for task in quality closed ner; do
    [ -d runs/results/$task-$model ] && results+=(runs/results/$task-$model)
done; done
$python -m minisobert.finetuning.compare ${results[@]}

# 5. closed with fewer titles to train on, the same dev and test
$python - ${files[closed]} <<'PYTHON'
import csv, sys
from pathlib import Path
from minisobert.tasks import SPLIT_SEED, TASKS
data = TASKS["closed"].read([Path(sys.argv[1])], SPLIT_SEED)
for n in (3_000, 12_000):
    folder = Path(f"runs/fewer/{n}")
    folder.mkdir(parents=True)
    for split, part in (("train", data.train[:n]), ("dev", data.dev), ("test", data.test)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = ((e.id, e.text, data.labels[e.label]) for e in part)
            csv.writer(file).writerows([("question_id", "title", "label"), *rows])
PYTHON
settings="--seeds 3 --dropout 0 --epochs 5 --learning-rate 5e-4 --tokens-per-batch 1024"
for n in 3000 12000; do
    closed="$python finetune.py --task closed --data runs/fewer/$n/train.csv runs/fewer/$n/dev.csv runs/fewer/$n/test.csv"
    $closed --model tfidf --out runs/fewer/$n-tfidf
    $closed --model runs/tiny --out runs/fewer/$n-tiny $settings
    $closed --model random:tiny --tokenizer runs/tiny --out runs/fewer/$n-random $settings
done >runs/logs/fewer.txt
