#!/bin/sh
# Make gte-en-embed-tiny, an embedding model of the encoder that ships inside the package: in WORK, from a checkout.
#
#   pip install -e '.[train,onnx]'         # on Debian 12, with `apt-get update` done
#   tools/embed_tiny/run.sh WORK           # hours on two CPU cores; the same command continues a stopped run
#   SAMPLE=100 tools/embed_tiny/run.sh WORK --pairs 2048 --epochs 1     # in miniature
#
# Further arguments go to contrastive.py. WORK/run/model then holds the model, WORK/bundle its INT8 bundle, and
# WORK/figures.json what both find in held-out texts, beside BM25, the encoder and the teacher.
set -eu

scripts=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: run.sh WORK [options of contrastive.py]}
shift
most_bytes=12000000
mkdir -p "$work"
cd "$work"

[ -e data/manifest.json ] || python "$scripts/pairs.py" data
[ -e run/model/model.safetensors ] || python "$scripts/contrastive.py" data run "$@"
[ -e bundle/manifest.json ] || gte-export run/model --output bundle --precision int8

# All queries and documents, unless SAMPLE says how many.
encoder=$(python -c "from gte_deploy.models import builtin_path; print(builtin_path())")
teacher=data/teacher
[ -e "$teacher/config.json" ] || teacher=    # with --distil 0 there is none
# shellcheck disable=SC2086
python "$scripts/retrieval.py" data ${SAMPLE:+--sample "$SAMPLE"} \
    bm25 "$encoder" $teacher run/model bundle > figures.json.part
mv figures.json.part figures.json
cat figures.json

# What a download of the package would grow by: its archive is compressed, too.
python -m zipfile -c bundle.zip bundle/
bytes=$(wc -c < bundle.zip)
echo "the bundle has $bytes bytes, compressed" >&2
[ "$bytes" -le "$most_bytes" ] || { echo "that is more than $most_bytes" >&2; exit 1; }
