#!/bin/sh
# Make gte-en-mlm-tiny, the model that ships inside the package, again: in WORK, from a checkout of the repository.
#
#   pip install -e '.[train]'          # on Debian 12, with `apt-get update` done
#   tools/tiny_model/run.sh WORK       # about an hour and a half on two CPU cores
#   EPOCHS=3 DTYPE=bfloat16 tools/tiny_model/run.sh WORK    # longer: a first stage of three passes over the text
#
# A stopped run goes on with the same command. DTYPE is float32 unless it is set; bfloat16 is faster on recent CPUs.
# WORK/gte-en-mlm-tiny then holds the model, WORK/accuracy.json its accuracy on held-out text.
set -eu

scripts=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: run.sh WORK}
mkdir -p "$work"
cd "$work"

# The text, and a warm-up on short pieces of it.
[ -e corpus/heldout.npz ] || python "$scripts/corpus.py" corpus
[ -e warm-up/config.json ] || python "$scripts/warm_up.py" corpus runs/warm-up warm-up

# The first stage: as the shipped model had it, or with the batch and the learning rate of the recipe and as many steps
# as the passes take at 512 tokens a sequence.
batch=4 steps=1500 rate=6e-4
if [ -n "${EPOCHS:-}" ]; then
    batch=16 rate=1e-3
    steps=$(python -c "
import sys, numpy
tokens = len(numpy.load('corpus/train.npz')['tokens'])
print(round(float(sys.argv[1]) * tokens / (512 * $batch)))" "$EPOCHS")
fi

# The three stages. No text is seen more than a few times, so that dropout would only slow the run down.
sed -i 's/"hidden_dropout_prob": 0.1/"hidden_dropout_prob": 0.0/' warm-up/config.json
gte-train prepare corpus/train.jsonl -o tokens
gte-train run gte-en-mlm-tiny --data tokens -o runs/tiny --set model=warm-up --set "dtype=${DTYPE:-float32}" \
    --set "stages.0.steps=$steps" --set "stages.0.batch_size=$batch" --set "stages.0.learning_rate=$rate" \
    --set stages.0.rope_theta=160000 --set stages.1.steps=50 --set stages.1.batch_size=4 \
    --set stages.1.rope_theta=160000 --set stages.2.steps=8 --set stages.2.learning_rate=1e-4
gte-train export runs/tiny gte-en-mlm-tiny --dtype float16

python "$scripts/evaluate.py" corpus gte-en-mlm-tiny > accuracy.json
cat accuracy.json
