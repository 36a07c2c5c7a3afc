"""Ask a Triton Inference Server that serves a repository of `gte-export --format triton`.

    gte-export --format triton my-bundle my-repository     # its README.md says how to start the server
    python examples/triton_client.py http://localhost:8000

It needs `pip install '.[triton]'`, but no model and no torch. docs/triton-client.md describes the client.
"""

import sys

from gte_deploy import UnavailableError
from gte_deploy.triton import Client


def main() -> None:
    """Embed two texts, and fill a mask if the server's model can."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    try:
        with Client(url, timeout_s=30) as model:
            embeddings = model.encode(["A text.", "Another, longer text."], normalize_embeddings=True)
            print(f"{model.spec.task}: {embeddings.shape[0]} embeddings of {embeddings.shape[1]} numbers")
            print(f"cosine of the two: {embeddings[0] @ embeddings[1]:.4f}")
            if model.spec.task == "fill-mask":
                for answer in model.fill_mask("The president of the united [MASK] of America.", top_k=3):
                    print(f"{answer['score']:.3f}  {answer['sequence']}")
    except UnavailableError as error:  # missing, overloaded or slow: the same call may succeed later
        sys.exit(f"the server does not answer: {error}")


if __name__ == "__main__":
    main()
