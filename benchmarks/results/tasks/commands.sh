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
    --vocab-size 8000 --out data/prepared --decontaminate $(
        for task in ner closed quality; do for file in ${files[$task]}; do echo "$task=$file"; done; done
    ) >runs/logs/prepare.txt

# 2. pre-training: two processes of one thread; a small model and few tokens want small batches, a high rate, no dropout
.venv/bin/torchrun --nproc_per_node=2 train.py --out runs/tiny --preset tiny --train-tokens 46e6 \
    --tokens-per-batch 8192 --micro-batch-rows 2 --dropout 0 --learning-rate 2e-3 --warmup-fraction 0.05 \
    --final-learning-rate-fraction 0 --beta2 0.98 --eval-every-tokens 4e6 --eval-rows 64 \
    --checkpoint-every-tokens 8e6 >runs/logs/train.txt
$python -m minisobert.plot runs/tiny

# 3. fine-tuning: the same settings for both, two at a time
finetune() {    # task, model, name of the model, settings
    $python finetune.py --task $1 --model ${2/ / --tokenizer } --out runs/results/$1-$3 --data ${files[$1]} --seeds 3 ${@:4} \
        >runs/logs/$1-$3.txt
}
both() {
    finetune $1 runs/tiny tiny --dropout 0 ${@:2} &
    finetune $1 "random:tiny runs/tiny" random --dropout 0 ${@:2} &
    wait
}
both ner --epochs 8 --learning-rate 1e-3 --tokens-per-batch 2048
both closed --epochs 3 --learning-rate 5e-4
both quality --epochs 4 --learning-rate 5e-4
for task in closed quality; do finetune $task tfidf tfidf; done

# 4. the table
$python -m benchmarks.tasks runs/results/*-tiny runs/results/*-random runs/results/*-tfidf
