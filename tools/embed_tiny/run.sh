#!/bin/sh
# Make gte-en-embed-tiny, an embedding model of the encoder that ships inside the package: in WORK, from a checkout.
#
#   pip install -e '.[train,export]'         # on Debian 12, with `apt-get update` done
#   tools/embed_tiny/run.sh WORK           # hours on two CPU cores; the same command continues a stopped run
#   QUERIES=100 tools/embed_tiny/run.sh WORK --pairs 2048 --epochs 1     # in miniature
#
# Further arguments go to contrastive.py. WORK/run/gte-en-embed-tiny then holds the model, WORK/figures-TEST.json what it
# and its bundle find in held-out texts, beside BM25, the encoder and the teacher, and WORK/bundle its INT8 bundle, which
# ships as models/builtin_embed.
set -eu

scripts=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: run.sh WORK [options of contrastive.py]}
shift
most_bytes=12000000
model=run/gte-en-embed-tiny
mkdir -p "$work"
cd "$work"

[ -e data/manifest.json ] || python "$scripts/pairs.py" data
[ -e run/run.json ] || python "$scripts/contrastive.py" data run "$@"
[ -e bundle/manifest.json ] || gte-export "$model" --output bundle --precision int8

# QUERIES says how many queries of each test are drawn.
queries=${QUERIES:-1000}
teacher=data/teacher
[ -e "$teacher/config.json" ] || teacher=    # with --distil 0 there is none
for test in data/tests/*/; do
    name=$(basename "$test")
    # shellcheck disable=SC2086
    gte-train retrieval gte-en-mlm-tiny $teacher $model bundle --data "$test" --max-queries "$queries" \
        -o "figures-$name.json"
done

python "$scripts/card.py" . --queries "$queries"

# What a download of the package would grow by: its archive is compressed, too.
python -m zipfile -c bundle.zip bundle/
bytes=$(wc -c < bundle.zip)
echo "the bundle has $bytes bytes, compressed" >&2
[ "$bytes" -le "$most_bytes" ] || { echo "that is more than $most_bytes" >&2; exit 1; }
