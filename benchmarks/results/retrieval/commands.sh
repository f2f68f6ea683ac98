# Can a small encoder be taught to find answers? From the root: bash benchmarks/results/retrieval/commands.sh DATA
# DATA: a folder with text/question_bodies.jsonl.xz and dumps/; runs/modern is made by ../tasks/commands.sh
set -e
python=.venv/bin/python
java=$1/dumps/java-questions-2025.stackoverflow.com.7z
here=runs/search
export OMP_NUM_THREADS=1
mkdir -p $here
xz -dc "$1"/text/question_bodies.jsonl.xz >$here/bodies.jsonl
pairs="$python finetune.py --task pairs --dropout 0"

# 1. two passages of each of 28,845 questions: what belongs together
time $pairs --data $here/bodies.jsonl --text text --model runs/modern --out $here/passages2 --epochs 2 \
    --learning-rate 3e-3 --pairs-per-batch 256 --pair-tokens 128 --tokens-per-batch 65536

# 2. java questions and their answers
time $pairs --data $java --model $here/passages2 --out $here/java3 --epochs 2 --learning-rate 2e-3 --pair-tokens 1024 \
    --tokens-per-batch 32768

# 3. TF-IDF in shorter vectors
PYTHONPATH=. $python benchmarks/results/retrieval/dimensions.py $java >$here/dimensions.txt
