"""Export the built-in model to a bundle, and run the bundle with only onnxruntime and tokenizers.

    python examples/onnxruntime_alone.py my-bundle     # exports first if the folder does not exist

`gte_deploy.load` does more: it verifies the bundle, makes batches, and checks the lengths of texts. But a bundle works
without it: docs/bundle.md describes the graph with its inputs and outputs, so other languages can run it, too.
"""

import os
import sys
from pathlib import Path

import numpy as np

# Set before the import: by default, ONNX Runtime for Linux sends telemetry about every session.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def export_to(bundle: Path) -> None:
    """Export the built-in model, for texts of up to 128 tokens, to a bundle that is verified against PyTorch."""
    from gte_deploy.exporters.export import export

    result = export(output=bundle, max_length=128, progress=lambda line: print(line, file=sys.stderr))
    print(f"exported to {result.path}")


def main() -> None:
    """Fill a mask without gte_deploy."""
    bundle = Path(sys.argv[1] if len(sys.argv) > 1 else "gte-en-mlm-tiny-128")
    if not bundle.exists():
        export_to(bundle)

    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    # model.onnx gives the logits of all tokens; this graph computes them only where they are needed.
    session = onnxruntime.InferenceSession(bundle / "onnx" / "model_masked.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([tokenizer.encode("The president of the united [MASK] of America.").ids])  # [1, S] int64
    mask_positions = np.argwhere(ids == tokenizer.token_to_id("[MASK]"))  # [M, 2] int64: row and token
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": mask_positions}
    (logits,) = session.run(["logits"], feed)  # [M, vocabulary] float32
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    for token in np.argsort(-probabilities)[:3]:
        print(f"{probabilities[token]:.4f}  {tokenizer.id_to_token(int(token))}")


if __name__ == "__main__":
    main()
