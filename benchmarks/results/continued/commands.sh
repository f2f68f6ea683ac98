# Is a model that goes on with other data better on it? From the root: bash benchmarks/results/continued/commands.sh DATA
# DATA: a folder with text/ (titles, question bodies), dumps/ (.7z of sites) and tasks/ (the sets for fine-tuning)
set -e
python=.venv/bin/python
quality="$1/tasks/quality_preprocessed_train.csv.xz $1/tasks/quality_preprocessed_test.csv.xz"
java=$1/dumps/java-questions-2025.stackoverflow.com.7z
unseen=$(for file in $quality; do echo quality=$file; done)
here=runs/continued
export OMP_NUM_THREADS=1
mkdir -p $here/logs
xz -dc "$1"/text/titles.txt.xz | head -300000 >$here/titles.txt
xz -dc "$1"/text/question_bodies.jsonl.xz | head -10000 >$here/bodies.jsonl

# 1. a model of titles and questions of all kinds
train="$python train.py --preset modern-tiny --tokens-per-batch 2048 --micro-batch-rows 1 --eval-rows 64
    --eval-every-tokens 1e9 --checkpoint-every-tokens 1e9"
$python -m data.prepare --input $here/titles.txt $here/bodies.jsonl --vocab-size 4000 --out $here/general-data \
    --decontaminate $unseen >$here/logs/general-data.txt
$train --data $here/general-data --out $here/general --train-tokens 4e6 >$here/logs/general.txt

# 2. java posts in its ids: the same model untouched (a step at no rate measures it), continued, and begun from scratch
$python -m data.prepare --input $java --tokenizer $here/general --out $here/java-data --decontaminate $unseen pairs=$java \
    >$here/logs/java-data.txt
$train --data $here/java-data --init $here/general --out $here/untouched --train-tokens 2048 --learning-rate 1e-12 \
    --muon-learning-rate 1e-12 --weight-decay 0 >$here/logs/untouched.txt
$train --data $here/java-data --init $here/general --out $here/continued --train-tokens 1e6 >$here/logs/continued.txt &
$train --data $here/java-data --out $here/scratch --train-tokens 1e6 >$here/logs/scratch.txt
wait
for run in untouched continued scratch; do echo $run; tail -n 1 $here/$run/metrics.jsonl; done >$here/logs/held-out.txt

# 3. a task of java posts: to find the answer to a question
for model in general continued scratch; do
    $python finetune.py --task pairs --model $here/$model --out $here/pairs-$model --data $java --seeds 3 --dropout 0 \
        --epochs 4 --learning-rate 3e-3 --pair-tokens 128 --tokens-per-batch 65536 >$here/logs/pairs-$model.txt &
    [ $model = continued ] && wait
done
wait
$python -m minisobert.finetuning.compare $here/pairs-continued $here/pairs-general $here/pairs-scratch >$here/logs/tasks.txt
