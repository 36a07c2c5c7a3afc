#!/bin/sh
# Make gte-en-mlm-tiny, the model that ships inside the package, again: in WORK, from a checkout of the repository.
#
#   pip install -e '.[train]'          # on Debian 12, with `apt-get update` done
#   tools/tiny_model/run.sh WORK       # about an hour and a half on two CPU cores
#
# WORK/gte-en-mlm-tiny then holds the model, WORK/accuracy.json its accuracy on held-out text.
set -eu

scripts=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: run.sh WORK}
mkdir -p "$work"
cd "$work"

# The text, and a warm-up on short pieces of it.
python "$scripts/corpus.py" corpus
python "$scripts/warm_up.py" corpus runs/warm-up warm-up

# The three stages. Most of the text is seen once or not at all, so that dropout would only slow the run down.
sed -i 's/"hidden_dropout_prob": 0.1/"hidden_dropout_prob": 0.0/' warm-up/config.json
gte-train prepare corpus/train.jsonl -o tokens
gte-train run gte-en-mlm-tiny --data tokens -o runs/tiny --set model=warm-up \
    --set stages.0.steps=1500 --set stages.0.batch_size=4 --set stages.0.learning_rate=6e-4 \
    --set stages.0.rope_theta=160000 --set stages.1.steps=50 --set stages.1.batch_size=4 \
    --set stages.1.rope_theta=160000 --set stages.2.steps=8 --set stages.2.learning_rate=1e-4
gte-train export runs/tiny gte-en-mlm-tiny --dtype float16

python "$scripts/evaluate.py" corpus gte-en-mlm-tiny > accuracy.json
cat accuracy.json
