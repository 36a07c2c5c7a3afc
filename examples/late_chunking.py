"""Search the chunks of a document: embedded in their document (late chunking), and as texts of their own.

    python examples/late_chunking.py FILE "a question"               # the built-in model
    python examples/late_chunking.py FILE "a question" my-bundle     # an embedding model of your own

Each chunk has whole sentences. What "it" is in a chunk such as "It has 3.8 million inhabitants." is said elsewhere in
the document, so late chunking can find it for a question about Berlin. The built-in model was not trained for
similarity: its results show how to call the library, and not how well it works.
"""

import sys
from pathlib import Path

import numpy as np

import gte_deploy

MOST_TOKENS = 64


def main() -> None:
    """Print the three chunks nearest to the question, for each way to embed them."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    document, question = Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]
    with gte_deploy.load(sys.argv[3] if len(sys.argv) > 3 else None) as model:
        query = model.encode_query(question, normalize_embeddings=True)  # [D] float32
        # One pass over the whole document, of any length; each chunk's embedding is the mean of its tokens' states.
        rule = gte_deploy.SentenceChunks(MOST_TOKENS)
        late = model.encode_document(document, chunks=rule, normalize_embeddings=True)
        if not len(late):
            sys.exit(f"{sys.argv[1]} has no text in it")
        alone = model.encode_document(late.texts, normalize_embeddings=True)  # [C, D] float32
    for name, embeddings in (("in their document", late.embeddings), ("alone", alone)):
        print(f"chunks embedded {name}:")
        scores = embeddings @ query
        for chunk in np.argsort(-scores)[:3]:
            start, end = late.offsets[chunk]
            print(f"  {scores[chunk]:.3f}  {start:>6}-{end:<6} {' '.join(document[start:end].split())[:80]}")


if __name__ == "__main__":
    main()
