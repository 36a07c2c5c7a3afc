"""Order documents by a reranker's score with a query.

    python examples/rerank.py CHECKPOINT "a question" "a document" "another document" …

CHECKPOINT is a sequence classifier with one label, such as Alibaba-NLP/gte-multilingual-reranker-base, or the bundle
that `gte-export CHECKPOINT` wrote. No reranker is built in.
"""

import sys

import gte_deploy


def main() -> None:
    """Print the documents, best first, and the raw scores that `predict` gives."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    checkpoint, query, *documents = sys.argv[1:]
    with gte_deploy.load(checkpoint) as model:
        for entry in model.rank(query, documents, return_documents=True, truncation=True):
            print(f"{entry['score']:.4f}  {entry['text']}")
        # The same scores in the order of the documents, as CrossEncoder.predict gives them: [N] float32.
        scores = model.predict([(query, document) for document in documents], truncation=True)
        print("in your order:", ", ".join(f"{score:.4f}" for score in scores))


if __name__ == "__main__":
    main()
