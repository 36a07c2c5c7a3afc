"""Sparse embeddings and embeddings of tokens in files, as the model's own methods give them."""

import json

import numpy as np
import pyarrow.parquet
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_tokens
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.core.errors import InputError
from runtime_models import make_texts, make_word_checkpoint

TEXTS = [*make_texts(20, most_words=8), "", "a", "the " * 200]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def test_sparse(source, tmp_path):
    encoder = pytest.importorskip("sentence_transformers.sparse_encoder")
    from sentence_transformers.base.modules import Transformer

    masked_lm = make_word_checkpoint(tmp_path / "mlm", seed=7)
    modules = [Transformer(str(masked_lm), transformer_task="fill-mask"), encoder.modules.SpladePooling("max")]
    judge = encoder.SparseEncoder(modules=modules, device="cpu")
    judge.save_pretrained(str(tmp_path / "model"))
    with gte_deploy.load(tmp_path / "model", backend="torch") as model:
        options, output = BulkOptions(shard_rows=8), tmp_path / "out.parquet"
        summary = encode_files(source, output, model=model, options=options)
        encode_files(source, tmp_path / "out.jsonl", model=model, options=options)
        with pytest.raises(InputError, match=r"sparse.*\.npy"):
            encode_files(source, tmp_path / "out.npy", model=model)
        with pytest.raises(InputError, match="precision is not an option for files"):
            encode_files(source, tmp_path / "out2.jsonl", model=model, encode_options={"precision": "int8"})
    assert (summary.rows, summary.failures, summary.form) == (22, 1, "22 sparse vectors")
    expected = judge.encode(TEXTS[:-1], convert_to_sparse_tensor=False).numpy()
    table = pyarrow.parquet.read_table(output).to_pydict()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for rows in (
        zip(table["embedding_indices"], table["embedding_values"], strict=True),
        ((line["embedding_indices"], line["embedding_values"]) for line in lines),
    ):
        found = np.zeros_like(expected)
        for row, (indices, values) in zip(found, rows, strict=True):
            row[indices] = values
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tokens(precision, source, tmp_path, word_checkpoints):
    judge_class = pytest.importorskip("sentence_transformers").MultiVectorEncoder
    folder = make_word_checkpoint(tmp_path / "colbert", task="embed", seed=4)
    add_tokens(folder, ["[Q] ", "[D] "])
    prompts = {"query": "the query: ", "document": "the "}
    add_multi_vector_modules(folder, library="sentence-transformers", mask={}, config={"prompts": prompts})
    judge = judge_class(str(folder), device="cpu")
    with gte_deploy.load(folder, backend="torch") as model:
        output = tmp_path / "out.parquet"
        options = {"truncation": True, "precision": precision}
        summary = encode_files(source, output, model=model, options=BulkOptions(shard_rows=8), encode_options=options)
        with pytest.raises(InputError, match=r"tokens.*\.npy"):
            encode_files(source, tmp_path / "out.npy", model=model)
    assert summary.rows == len(TEXTS) and "lists of" in summary.form
    found = pyarrow.parquet.read_table(output).column("embedding").to_pylist()
    for own, theirs in zip(found, judge.encode_document(TEXTS), strict=True):
        np.testing.assert_allclose(np.array(own), np.asarray(theirs), atol=2e-5 if precision == "float32" else 1e-3)
