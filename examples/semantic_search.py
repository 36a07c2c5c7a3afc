"""Search a folder of text files by meaning: embed every paragraph once, then compare each with the query.

    python examples/semantic_search.py FOLDER "a question"               # gte-en-embed-tiny, which is in the package
    python examples/semantic_search.py FOLDER "a question" my-bundle     # an embedding model of your own

gte-en-embed-tiny is small: it finds paragraphs about the same thing, and misses what larger models see. For better
results, export an embedding checkpoint (such as Alibaba-NLP/gte-base-en-v1.5) and give its bundle.
"""

import sys
from pathlib import Path

import numpy as np

import gte_deploy


def paragraphs(folder: Path) -> list[tuple[str, str]]:
    """The name of the file and the text of every paragraph of the .txt and .md files in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".txt", ".md"))
    return [
        (file.name, " ".join(paragraph.split()))
        for file in files
        for paragraph in file.read_text(encoding="utf-8").split("\n\n")
        if paragraph.strip()
    ]


def main() -> None:
    """Print the five paragraphs nearest to the query."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder, query = Path(sys.argv[1]), sys.argv[2]
    found = paragraphs(folder)
    if not found:
        sys.exit(f"{folder} has no .txt or .md file with text in it")
    with gte_deploy.load(sys.argv[3] if len(sys.argv) > 3 else "gte-en-embed-tiny") as model:
        # One call for all texts: they are sorted by length, so that little padding is computed.
        texts = [text for _, text in found]
        documents = model.encode_document(texts, normalize_embeddings=True, truncation=True)  # [N, D] float32
        question = model.encode_query(query, normalize_embeddings=True, truncation=True)  # [D] float32
    scores = documents @ question  # cosines, for all vectors have length 1
    for index in np.argsort(-scores)[:5]:
        name, text = found[index]
        print(f"{scores[index]:.3f}  {name}: {text[:80]}")


if __name__ == "__main__":
    main()
