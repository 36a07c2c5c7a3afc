"""The public methods of `Model` and `triton.Client`: names, order, kinds and defaults of their arguments are frozen."""

import inspect

import pytest

import gte_deploy
from gte_deploy.model import Model
from gte_deploy.triton import Client

BOTH = {
    "after_fork": "(self, *, idle)",
    "classify_tokens": (
        "(self, inputs, *, aggregation_strategy='none', ignore_labels=('O',), offset_mapping=None, "
        "is_split_into_words=False, delimiter=' ', stride=None, truncation=False, max_length=None, batch_size=32, "
        "max_batch_tokens=None, show_progress_bar=None)"
    ),
    "close": "(self)",
    "default_prompt_name": None,
    "device": None,
    "encode": (
        "(self, inputs=None, prompt_name=None, prompt=None, batch_size=32, show_progress_bar=None, "
        "output_value='sentence_embedding', precision='float32', convert_to_numpy=True, convert_to_tensor=None, "
        "device=None, normalize_embeddings=False, truncate_dim=None, pool=None, chunk_size=None, *, pooling=None, "
        "truncation=False, max_length=None, max_batch_tokens=None, sentences=None, convert_to_sparse_tensor=None, "
        "save_to_cpu=False, max_active_dims=None, chunks=None, window_overlap=None)"
    ),
    "encode_document": "(self, inputs=None, prompt_name=None, prompt=None, *args, **kwargs)",
    "encode_hybrid": (
        "(self, inputs, prompt_name=None, prompt=None, batch_size=32, show_progress_bar=None, *, precision='float32', "
        "normalize_embeddings=False, truncate_dim=None, max_active_dims=None, as_dict=None, convert_to_tensor=False, "
        "truncation=False, max_length=None, max_batch_tokens=None)"
    ),
    "encode_multi_vector": (
        "(self, inputs, prompt_name=None, prompt=None, *, is_query=None, projection=None, skip_words=None, "
        "normalize_embeddings=None, **options)"
    ),
    "encode_query": "(self, inputs=None, prompt_name=None, prompt=None, *args, **kwargs)",
    "encode_sparse": (
        "(self, inputs=None, prompt_name=None, prompt=None, batch_size=32, show_progress_bar=None, "
        "convert_to_tensor=None, convert_to_sparse_tensor=None, save_to_cpu=False, device=None, max_active_dims=None, "
        "pool=None, chunk_size=None, *, truncation=False, max_length=None, max_batch_tokens=None, "
        "route=None, as_dict=None, sentences=None)"
    ),
    "eval": "(self)",
    "fill_mask": (
        "(self, inputs, *, top_k=5, targets=None, truncation=False, max_length=None, batch_size=32, "
        "max_batch_tokens=None, show_progress_bar=None)"
    ),
    "get_embedding_dimension": "(self)",
    "get_max_seq_length": "(self)",
    "get_sentence_embedding_dimension": "(self)",
    "info": "(self)",
    "max_seq_length": None,
    "model_card_data": None,
    "name": None,
    "num_labels": None,
    "predict": (
        "(self, inputs=None, prompt_name=None, prompt=None, batch_size=32, show_progress_bar=None, activation_fn=None, "
        "apply_softmax=False, convert_to_numpy=True, convert_to_tensor=False, device=None, pool=None, chunk_size=None, "
        "*, truncation=False, max_length=None, max_batch_tokens=None, num_workers=None, sentences=None, "
        "activation_fct=None)"
    ),
    "rank": (
        "(self, query, documents, top_k=None, return_documents=False, prompt_name=None, prompt=None, batch_size=32, "
        "show_progress_bar=None, activation_fn=None, device=None, pool=None, chunk_size=None, **kwargs)"
    ),
    "prompts": None,
    "similarity": "(self, embeddings1, embeddings2)",
    "similarity_fn_name": None,
    "similarity_pairwise": "(self, embeddings1, embeddings2)",
    "sparsity": "(embeddings)",
    "tokenizer": None,
    "truncate_dim": None,
}
MODEL_ALONE = {
    "backend": None,
    "checksum": None,
    "decode": "(self, embeddings, top_k=None)",
    "joining": None,
    "tokenize": "(self, texts, *, truncation=False, max_length=None)",
    "warm_up": "(self, lengths=None, rows=None)",
}
LOAD = (
    "(path=None, *, backend='auto', precision='auto', device=None, num_threads=None, max_batch_tokens=None, "
    "streams='auto', compile=False, join_calls=False, task='auto', revision=None, cache_dir=None, token=None, "
    "trusted_keys=None)"
)
CLIENT = (
    "(url='http://localhost:8000', *, timeout_s=60.0, connections=8, max_batch_tokens=16384, headers=None, "
    "tokenizer=None, max_answer_bytes=1073741824)"
)


def shown(function):
    """The signature without annotations, which Python versions write in different ways."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def public(cls):
    members = {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}
    return {name: shown(member) if callable(member) else None for name, member in members.items()}


@pytest.mark.parametrize(("cls", "expected"), [(Model, BOTH | MODEL_ALONE), (Client, BOTH)])
def test_public_methods_take_what_they_took(cls, expected):
    assert public(cls) == expected


def test_what_makes_a_model_takes_what_it_took():
    assert shown(gte_deploy.load) == LOAD and shown(Client) == CLIENT


@pytest.mark.parametrize("name", ["encode", "encode_sparse", "predict", "classify_tokens", "fill_mask", "rank"])
def test_every_argument_is_documented(name):
    method = getattr(Model, name)
    if name == "rank":
        assert "CrossEncoder.rank" in method.__doc__
        return
    for argument in list(inspect.signature(method).parameters)[1:]:
        assert f"{argument}: " in method.__doc__, argument
