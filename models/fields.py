"""The tables of every field in a checkpoint's files. The readers use them, and the docs show them.

A field is *honoured* (it changes the answers as it changes those of the checkpoint's own library), *fixed* (only the
listed values are supported; another value is refused by name), or *without effect* on the answers. `check_fields`
refuses what a table refuses. docs/checkpoints.md is generated from the tables:

    python -m gte_deploy.models.field_tables > docs/checkpoints.md
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gte_deploy.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """The treatment of one field.

    Args:
        effect: the effect of the field on the answers; see the module.
        note: a sentence for the docs: the meaning of the field, or the reason for ignoring or fixing it.
        allowed: the accepted values of a fixed field; null is always accepted, as if the field were missing.
    """

    effect: Literal["honoured", "fixed", "without effect"]
    note: str
    allowed: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether a file may have this value. Published configs also spell booleans "true" and "false"."""
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if self.effect != "fixed" or value is None:
            return True
        # In Python 1 == True, but a number in a file is not a boolean.
        return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.allowed)


@dataclass(frozen=True)
class FileFields:
    """The fields of one kind of file.

    Args:
        name: the file's name in the docs; for a config.json, the name of the family follows.
        reads: a sentence that says who reads the file, and when.
        fields: name -> treatment; a name that ends in * stands for all names that begin like it.
        unknown: the treatment of other fields: "ignored" if the checkpoint's own library ignores them, "refused" if the
            library would take every field as an argument.
    """

    name: str
    reads: str
    fields: Mapping[str, Field]
    unknown: Literal["ignored", "refused"]

    def field(self, name: str) -> Field | None:
        """Return the treatment of a field, or None if the table does not list the field."""
        found = self.fields.get(name)
        if found is None:
            found = next((f for key, f in self.fields.items() if key.endswith("*") and name.startswith(key[:-1])), None)
        return found


def check_fields(raw: Mapping[str, Any], file: Path, table: FileFields) -> None:
    """Refuse what `table` does not allow in `raw`, the contents of `file`.

    Raises:
        ConfigError: a value is not allowed; the message names the file, the field, its value and the accepted values.
    """
    for name, value in raw.items():
        field = table.field(name)
        if field is None and table.unknown == "refused":
            raise ConfigError(
                f"{file}: {name} is {value!r}; expected no such field: this package does not know it, and leaving it "
                "out could change the answers."
            )
        if field is None:
            logger.debug("%s: the field %s is not known, and nothing reads it", file, name)
        elif not field.accepts(value):
            allowed = " or ".join(map(spelled, field.allowed)) or "none, or null"
            raise ConfigError(f"{file}: {name} is {value!r}; expected {allowed}. {field.note}")


def spelled(value: Any) -> str:
    """Return a value as JSON spells it, or Python, such as true or 'gelu'."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def honoured(note: str) -> Field:
    """Return a field that changes the answers as in the checkpoint's own library; `note` says how."""
    return Field("honoured", note)


def fixed(note: str, *allowed: Any) -> Field:
    """Return a field for which only the values `allowed`, and null, are supported; `note` says what they mean."""
    return Field("fixed", note, allowed)


def ignored(note: str) -> Field:
    """A field without effect on the answers; `note` says why."""
    return Field("without effect", note)


TRAINING = ignored("It says how the model was trained.")
BOOKKEEPING = ignored("It names versions, sources or classes.")
PRINTED = ignored("It changes what transformers returns beside the answer.")

_SIZE = honoured("It is checked against the shapes of the tensors.")

TRANSFORMERS_FIELDS: Mapping[str, Field] = {
    "architectures": honoured("The head in its name determines the task, unless modules.json or `--task` does."),
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"), _SIZE),
    "layer_norm_eps": honoured("Epsilon of every LayerNorm."),
    "pad_token_id": honoured("If it is missing, or differs from the tokenizer's, the tokenizer's is used."),
    "id2label": honoured("Names of a classifier's labels."),
    "label2id": honoured("It is computed from id2label."),
    "num_labels": honoured("It is checked against id2label and the shape of the head."),
    "sentence_transformers": honoured("Its `activation_fn` is what `predict` applies to a reranker's logits."),
    "sbert_ce_default_activation_function": honoured("The older name of `activation_fn`, before version 4."),
    "tie_word_embeddings": fixed("The decoder of the masked-LM head is the word embedding.", True),
    "quantization_config": fixed("Quantised weights are not read; take the checkpoint before quantisation."),
    "is_decoder": fixed("Attention sees both sides.", False),
    "add_cross_attention": fixed("There is no second input to attend to.", False),
    "use_cache": ignored("An encoder has no cache."),
    "torch_dtype": ignored("The tensors have types of their own; PyTorch computes in float32 here."),
    "dtype": ignored("The newer name of torch_dtype."),
    **{f"{name}_token_id": ignored("The tokenizer has its own.") for name in ("bos", "eos", "sep", "cls", "mask")},
    "decoder_start_token_id": ignored("Nothing is generated."),
    "tokenizer_class": ignored("tokenizer_config.json decides; if it names no class, AutoTokenizer reads this field."),
    "problem_type": ignored("It chooses a loss for training."),
    "hidden_dropout_prob": TRAINING,
    "attention_probs_dropout_prob": TRAINING,
    "classifier_dropout": TRAINING,
    "initializer_range": TRAINING,
    "gradient_checkpointing": TRAINING,
    "output_attentions": PRINTED,
    "output_hidden_states": PRINTED,
    "return_dict": PRINTED,
    "auto_map": ignored("It names remote code, which is never run."),
    "_name_or_path": BOOKKEEPING,
    "transformers_version": BOOKKEEPING,
    "finetuning_task": BOOKKEEPING,
    "torchscript": BOOKKEEPING,
}
"""The fields of config.json that mean the same in every family of transformers."""

TOKENIZER = FileFields(
    name="tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, vocab.txt, *.model",
    reads=(
        "`AutoTokenizer` of transformers reads these files, without remote code, and defines the right ids. A bundle "
        "gets one tokenizer.json that gives the same ids by itself."
    ),
    fields={
        "model_max_length": honoured("It limits the tokens of a text, unless another file does."),
        "do_lower_case": honoured("AutoTokenizer applies it."),
        "strip_accents, tokenize_chinese_chars": honoured("AutoTokenizer applies them."),
        "added_tokens_decoder, additional_special_tokens, extra_special_tokens": honoured(
            "AutoTokenizer applies them."
        ),
        "pad_token, unk_token, cls_token, sep_token, mask_token, bos_token, eos_token": honoured(
            "AutoTokenizer applies them."
        ),
        "model_input_names": honoured("If it has token_type_ids and the model has token types, the model gets them."),
        "truncation_side": honoured('"left" keeps the last tokens of a text that is cut.'),
        "clean_up_tokenization_spaces": honoured("It applies to the texts that fill_mask returns."),
        "split_special_tokens": fixed("Special tokens in a text stay whole.", False),
        "padding_side": ignored("Padding is masked, and the runtime pads on the right."),
        "auto_map": ignored("It names remote code, which is never run."),
        "chat_template": ignored("There is no chat."),
    },
    unknown="ignored",
)

MODULES = FileFields(
    name="modules.json",
    reads="The list of modules of sentence-transformers, read for the task to which they belong.",
    fields={
        "idx": ignored("The order of the list determines the order of modules."),
        "name": ignored("It is a label."),
        "path": honoured("Folder of the module's files; config.json may be in the folder of the Transformer."),
        "type": honoured(
            "Transformer, Pooling, Dense, Normalize (and Dropout, which does nothing here) for embeddings; Transformer "
            "for a reranker; MLMTransformer, SpladePooling, Router and SparseStaticEmbedding for sparse embeddings; "
            "Transformer, Dense (also that of PyLate), MultiVectorMask and Normalize for late interaction. Others are "
            "refused by name."
        ),
        "kwargs": fixed("They are arguments for calls of the module.", []),
    },
    unknown="ignored",
)

_ONLY_LATE = "For late interaction; another task refuses a value."
SENTENCE_BERT = FileFields(
    name="sentence_bert_config.json",
    reads=(
        "Settings of the Transformer module. They apply to embeddings, to late interaction, and to rerankers that have "
        "a modules.json."
    ),
    fields={
        "max_seq_length": honoured(
            "It limits the tokens of a text, before tokenizer_config.json does. PyLate replaces it by its own lengths."
        ),
        "do_lower_case": honoured("A Lowercase step comes before the tokenizer's own normalizer."),
        "tokenizer_args": honoured("Arguments of AutoTokenizer; those that load code or other files are refused."),
        "processor_kwargs": honoured("The newer name of tokenizer_args."),
        "config_args": honoured("They replace fields of config.json."),
        "config_kwargs": honoured("The newer name of config_args."),
        "model_args": honoured("Types, devices and kinds of attention do not change the answers; others are refused."),
        "model_kwargs": honoured("The newer name of model_args."),
        "transformer_task": honoured("It must fit the task; else it is refused."),
        "modality_config": honoured("It must be the forward pass over text; else it is refused."),
        "module_output_name": honoured("It must fit modality_config; else it is refused."),
        "processing_kwargs": fixed("Texts are cut and padded in one way.", {}),
        "query_length": honoured(f"Most tokens of a query. {_ONLY_LATE}"),
        "document_length": honoured(f"Most tokens of a document. {_ONLY_LATE}"),
        "query_expansion": honoured(
            "Tokens that lengthen queries: `length`, `token`, `attend`, and `strategy` fixed or min. " + _ONLY_LATE
        ),
        "tokenizer_name_or_path": fixed("The tokenizer is the checkpoint's own."),
        "unpad_inputs": ignored("It changes the speed."),
    },
    unknown="refused",
)

SENTENCE_TRANSFORMERS = FileFields(
    name="config_sentence_transformers.json",
    reads="Settings of the whole model. They apply to embeddings, and to rerankers that have a modules.json.",
    fields={
        "prompts": honoured("Name -> text that is put before an input."),
        "default_prompt_name": honoured("The prompt that is used if the caller names none."),
        "similarity_fn_name": honoured("It goes into the bundle; `Model.spec` has it."),
        "truncate_dim": honoured("Number of leading dimensions that `encode` keeps by default."),
        "max_active_dims": honoured("Number of entries that a sparse vector keeps."),
        "activation_fn": honoured("The function that `predict` applies to a reranker's logits; see below."),
        "model_type": honoured("A file for another kind of model is ignored, as the library ignores it."),
        "keep_in_fp32_modules": ignored("PyTorch computes in float32 here."),
        "__version__": BOOKKEEPING,
        "requirements": ignored("They are for the library's own installation."),
    },
    unknown="ignored",
)

POOLING = FileFields(
    name="1_Pooling/config.json",
    reads="The Pooling module, in the folder that modules.json names.",
    fields={
        "pooling_mode": honoured('"cls" or "mean"; others, and several at once, are refused.'),
        "pooling_mode_*": honoured("The older form, a boolean for each mode."),
        "word_embedding_dimension": ignored("The tensors have it."),
        "embedding_dimension": ignored("The tensors have it."),
        "include_prompt": fixed("The prompt's tokens are pooled as well.", True),
    },
    unknown="refused",
)

DENSE = FileFields(
    name="2_Dense/config.json",
    reads=(
        "Dense modules, in the folders that modules.json names, with their model.safetensors. They project the pooled "
        "embedding or, for late interaction, those of tokens."
    ),
    fields={
        "in_features": honoured("It is checked against the weights."),
        "out_features": honoured("Width of the embedding."),
        "bias": honoured("It is checked against the weights."),
        "activation_function": honoured("One of the functions below. If it is missing: Tanh, and in PyLate none."),
        "use_residual": honoured("The input is added; if the widths differ, a matrix projects it first."),
        "module_input_name": honoured("sentence_embedding or, for late interaction, token_embeddings; else refused."),
        "module_output_name": honoured("As module_input_name."),
    },
    unknown="ignored",
)

_NO_OTHER_WIDTH = "Embeddings of tokens keep all their dimensions."
PYLATE = FileFields(
    name="config_sentence_transformers.json of PyLate",
    reads=(
        "Settings of PyLate for late interaction, if `model_type` is ColBERT or modules.json has a Dense module of "
        "PyLate."
    ),
    fields={
        "query_length": honoured("Most tokens of a query; 32 if it is missing."),
        "document_length": honoured("Most tokens of a document; 180 if it is missing."),
        "query_prefix": honoured('A token after the first special token of a query; "[Q] " if it is missing.'),
        "document_prefix": honoured('A token after the first special token of a document; "[D] " if it is missing.'),
        "do_query_expansion": honoured("Whether mask tokens lengthen a query to query_length; true if it is missing."),
        "attend_to_expansion_tokens": honoured("Whether other tokens attend to these; false if it is missing."),
        "skiplist_words": honoured("Tokens without an embedding in documents; punctuation if it is missing."),
        "prompts": honoured("Name -> text that is put before an input, after the prefix."),
        "default_prompt_name": honoured("The prompt that is used if the caller names none."),
        "similarity_fn_name": honoured("MaxSim, or meanmaxsim of sentence-transformers; others are refused."),
        "truncate_dim": fixed(_NO_OTHER_WIDTH),
        "model_type": honoured("ColBERT."),
        "__version__": BOOKKEEPING,
    },
    unknown="ignored",
)

MULTI_VECTOR_MASK = FileFields(
    name="2_MultiVectorMask/config.json",
    reads="The tokens that have an embedding in a MultiVectorEncoder, in the folder that modules.json names.",
    fields={
        "skiplist_words": honoured("Tokens without an embedding; a word that is no token is ignored."),
        "skiplist_tasks": honoured("query, document or both; documents if it is missing."),
        "keep_only_token_ids": fixed("There are no images."),
    },
    unknown="refused",
)

TOKEN_NORMALIZE = FileFields(
    name="3_Normalize/config.json",
    reads="The Normalize module of a MultiVectorEncoder, in the folder that modules.json names.",
    fields={
        "module_input_name": fixed("It scales each token's embedding to length 1.", "token_embeddings"),
        "module_output_name": fixed("It scales each token's embedding to length 1.", "token_embeddings"),
    },
    unknown="ignored",
)

ARTIFACT = FileFields(
    name="artifact.metadata",
    reads=(
        "Settings of Stanford's ColBERT, if config.json names the architecture HF_ColBERT. The projection is the "
        "tensor `linear.weight` of model.safetensors."
    ),
    fields={
        "query_maxlen": honoured("Mask tokens lengthen each query to so many tokens."),
        "doc_maxlen": honoured("Most tokens of a document."),
        "dim": honoured("Width of an embedding; it is checked against the weights."),
        "query_token_id": honoured("A token after the first special token of a query; [unused0] if it is missing."),
        "doc_token_id": honoured("A token after the first special token of a document; [unused1] if it is missing."),
        "attend_to_mask_tokens": honoured("Whether other tokens attend to those that lengthen a query."),
        "mask_punctuation": honoured("Whether punctuation has no embedding in documents; true if it is missing."),
        "similarity": fixed("Embeddings have length 1, and are compared by their products.", "cosine"),
        "interaction": fixed("All tokens of a query count.", "colbert"),
        "query_token": ignored("query_token_id is the token that is put into a query."),
        "doc_token": ignored("doc_token_id is the token that is put into a document."),
    },
    unknown="ignored",
)

SPLADE = FileFields(
    name="1_SpladePooling/config.json",
    reads="The SpladePooling module of a sparse model, in the folder that modules.json or a Router names.",
    fields={
        "pooling_strategy": honoured('"max" or "sum" over the tokens.'),
        "activation_function": honoured('"relu" for log1p(relu(x)), "log1p_relu" for log1p(log1p(relu(x))).'),
        "embedding_dimension": ignored("It is the vocabulary's size."),
        "word_embedding_dimension": ignored("It is the vocabulary's size."),
        "chunk_size": ignored("It changes the memory that is needed."),
    },
    unknown="refused",
)

ROUTER = FileFields(
    name="router_config.json",
    reads="A Router of a sparse model with the routes query and document; other routes are refused by name.",
    fields={
        "types": honoured(
            "Modules of each route. Documents: MLMTransformer or Transformer, and SpladePooling; queries: the same, or "
            "SparseStaticEmbedding."
        ),
        "structure": honoured("The modules of each route."),
        "parameters": honoured("`default_route` and `allow_empty_key`; `route_mappings` is refused."),
    },
    unknown="ignored",
)

STATIC = FileFields(
    name="query_0_SparseStaticEmbedding/config.json, model.safetensors, idf.json",
    reads="Weights for the words of a query, which then needs no encoder. The bundle has them as query_weights.npy.",
    fields={
        "weight": honoured("float32 [vocabulary], in model.safetensors."),
        "path": honoured("Path of a JSON file of token -> weight, in place of the tensor."),
        "frozen": TRAINING,
    },
    unknown="ignored",
)

ADAPTER = FileFields(
    name="adapter_config.json, adapter_model.safetensors",
    reads=(
        "A PEFT adapter such as LoRA, in place of weights or beside them. It is merged if `peft` is installed, and "
        "refused by name if not."
    ),
    fields={
        "base_model_name_or_path": honoured("The weights to adapt; those of the folder if they are not found."),
        "*": honoured("peft applies it."),
    },
    unknown="ignored",
)

SHARED = (
    TOKENIZER,
    MODULES,
    SENTENCE_BERT,
    SENTENCE_TRANSFORMERS,
    POOLING,
    DENSE,
    PYLATE,
    MULTI_VECTOR_MASK,
    TOKEN_NORMALIZE,
    ARTIFACT,
    SPLADE,
    ROUTER,
    STATIC,
    ADAPTER,
)
"""The tables of the files that every family has alike."""
