"""Order documents by how well they answer a query.

    python examples/rerank.py MODEL "a question" "a document" "another document" …

MODEL is a reranker (a sequence classifier with one label, such as Alibaba-NLP/gte-multilingual-reranker-base) or a
model for late interaction, as a checkpoint or as the bundle that `gte-export CHECKPOINT` wrote. With --demo in its
place, the built-in model compares the tokens of query and document. It was not trained for that: it finds words that
occur in both, and shows how the call works. A checkpoint and --demo need the [torch] extra.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import gte_deploy
from gte_deploy.models import builtin_path


def make_demonstration(folder: Path) -> Path:
    """Write the built-in encoder as a MultiVectorEncoder of sentence-transformers, without a projection."""
    shutil.copytree(builtin_path(), folder)
    (folder / "1_Normalize").mkdir()
    modules = "sentence_transformers.models.Transformer", "sentence_transformers.base.modules.normalize.Normalize"
    paths = "", "1_Normalize"
    listed = [{"idx": i, "name": str(i), "path": paths[i], "type": modules[i]} for i in (0, 1)]
    for name, content in (
        ("modules.json", listed),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}),
        ("1_Normalize/config.json", {"module_input_name": "token_embeddings"}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def main() -> None:
    """Print the documents, best first, and for a reranker the raw scores that `predict` gives."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    name, query, *documents = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        source = make_demonstration(Path(scratch) / "model") if name == "--demo" else name
        with gte_deploy.load(source) as model:
            for entry in model.rank(query, documents, return_documents=True, truncation=True):
                print(f"{entry['score']:.4f}  {entry['text']}")
            if model.spec.task == "classify":
                # The same scores in the order of the documents, as CrossEncoder.predict gives them: [N] float32.
                scores = model.predict([(query, document) for document in documents], truncation=True)
                print("in your order:", ", ".join(f"{score:.4f}" for score in scores))


if __name__ == "__main__":
    main()
