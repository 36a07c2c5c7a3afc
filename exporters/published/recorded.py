"""Numbers that other projects recorded for published checkpoints, each with its source.

A bundle that agrees with PyTorch and with the checkpoint's own library can still be wrong where all of them read a file
in the same wrong way. These numbers come from elsewhere: from the tests of transformers, from FastEmbed, which has ONNX
graphs of its own, from the documents of sentence-transformers, and from model cards.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Quantity = Literal[
    "last_hidden_state",
    "mean_hidden_state",
    "logits",
    "embedding",
    "similarity",
    "sparse",
    "sparse_similarity",
    "multi_vector",
    "words",
]
"""What the values are.

"last_hidden_state" [N, S, H] and "logits" [N, S, V] or [N, L]: of the padded batch. "mean_hidden_state" [N, H]: the
mean over the tokens of each text. "embedding" [N, D]: what `encode` gives. "similarity" [N - 1]: cosines of the first
text's embedding with the others. "sparse" [N, V]: what `encode_sparse` gives. "sparse_similarity" [N]: dot products of
the first text's vector with all. "multi_vector" [T, D]: what `encode_document` gives for the text, or `encode_query`.
"words": the best words for the mask, in order.
"""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Values that somebody recorded for one checkpoint.

    Args:
        source: where they stand: repository, path and commit, or the model card.
        quantity: what the values are; see `Quantity`.
        values: numbers, nested as in the source; words for "words".
        texts: the inputs.
        pairs: pairs of texts, for a reranker, in place of `texts`.
        token_ids: [N, S] token ids, where the source starts from these in place of `texts`.
        attention_mask: [N, S] of them; None for all tokens.
        select: the part of the quantity that the values are, as the source writes it: "[:, 1:4, 1:4]".
        normalized: whether embeddings are scaled to length 1.
        is_query: whether the texts are queries (sparse and multi-vector).
        own_activation: whether logits pass the activation that the checkpoint names.
        scale: factor between the quantity and the values.
        atol, rtol: a value may differ by atol + rtol * |value|; those of the source, or what its digits allow.
        recorded_for: the checkpoint that the source names, if it is another one with the same weights.
        note: why the values may stand for this checkpoint, or why a bound is wider than that of the source.
    """

    source: str
    quantity: Quantity
    values: Any
    texts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    attention_mask: tuple[tuple[int, ...], ...] | None = None
    select: str = "[...]"
    normalized: bool = False
    is_query: bool = False
    own_activation: bool = False
    scale: float = 1.0
    atol: float = 1e-3
    rtol: float = 0.0
    recorded_for: str | None = None
    note: str | None = None


def _transformers(path: str, commit: str, test: str) -> str:
    return f"{test} in https://github.com/huggingface/transformers/blob/{commit}/{path}"


_GTE_TEST = ("tests/models/gte/test_modeling_gte.py", "019760818965c71b0a4d38e95820ee0b6cee4240")
_BERT_TEST = ("tests/models/bert/test_modeling_bert.py", "00c2af6cca1d30a0f180f40ebd2fa214ddb44879")
_ROBERTA_TEST = ("tests/models/roberta/test_modeling_roberta.py", "01edca39fbd26575324af5b1c9481be7d576dd0d")
_XLMR_TEST = ("tests/models/xlm_roberta/test_modeling_xlm_roberta.py", "00ee70b3b94ae2cfcf5b3f17aaaf98326f2ef857")
_MODERNBERT_TEST = (
    "tests/models/modernbert/test_modeling_modernbert.py",
    "052b1dcdbe751ed16e8da95261021318f170a130",
)
_NOMIC_TEST = ("tests/models/nomic_bert/test_modeling_nomic_bert.py", "08ac496a44e36857a948641d71adff26b3c5d795")
_FASTEMBED = "https://github.com/qdrant/fastembed/blob"
_FASTEMBED_TEXT = f"{_FASTEMBED}/00e932f6b6e1ee7ef06e062c0fc17dd7060f31ce/tests/test_text_onnx_embeddings.py"
_FASTEMBED_RERANK = f"{_FASTEMBED}/00e932f6b6e1ee7ef06e062c0fc17dd7060f31ce/tests/test_text_cross_encoder.py"
_FASTEMBED_SPARSE = f"{_FASTEMBED}/01074e80cdcc7d8f33739c159bcc1c80c568c9bc/tests/test_sparse_embeddings.py"
_FASTEMBED_LATE = f"{_FASTEMBED}/01b15e0aed351022d7c4a8f513487a60b93b66be/tests/test_late_interaction_embeddings.py"
_SBERT_DOCS = "documents of sentence-transformers"

_OXYGEN = ("Plants create oxygen.", "Photosynthesis is a process where plants create oxygen.")
_CHINA = ("what is the capital of China?", "how to implement quick sort in python?")
_WEATHER = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
_FRANCE = tuple(
    ("What is the capital of France?", answer)
    for answer in ("Paris is the capital of France.", "Berlin is the capital of Germany.")
)
_BERLIN = tuple(
    ("How many people live in Berlin?", answer)
    for answer in (
        "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
        "Berlin is well known for its museums.",
    )
)
_HALF_PRECISION = "The source ran in half precision; the bound is this project's."


def _of_gte(test: str, quantity: Quantity, values: Any, select: str) -> Recorded:
    return Recorded(
        source=_transformers(*_GTE_TEST, test),
        quantity=quantity,
        values=values,
        texts=_OXYGEN,
        select=select,
        rtol=1e-3,
    )


def _fastembed(
    *values: float, quantity: Quantity = "embedding", atol: float = 1e-3, note: str | None = None
) -> Recorded:
    # FastEmbed scales an embedding to length 1 where its class for the model does so, and gives means as they are.
    return Recorded(
        source=_FASTEMBED_TEXT,
        quantity=quantity,
        values=values,
        texts=("hello world", "flag embedding"),
        select=f"[0, :{len(values)}]",
        normalized=quantity == "embedding",
        atol=atol,
        note=note,
    )


def _fastembed_half(*values: float, quantity: Quantity = "embedding") -> Recorded:
    return _fastembed(*values, quantity=quantity, atol=3e-3, note=_HALF_PRECISION)


def _late(*vectors: tuple[float, ...], is_query: bool = False) -> Recorded:
    """The first five numbers of the vectors of [CLS], [D] or [Q], hello, world and [SEP]."""
    return Recorded(
        source=_FASTEMBED_LATE,
        quantity="multi_vector",
        values=vectors,
        texts=("Hello World",),
        is_query=is_query,
        select=f"[:{len(vectors)}, :5]" if is_query else "[:, :5]",  # [MASK]s follow in a query
    )


def _reranked(*values: float) -> Recorded:
    return Recorded(
        source=_FASTEMBED_RERANK,
        quantity="logits",
        values=values,
        pairs=_FRANCE,
        select="[:, 0]",
    )


_MULTILINGUAL_BASE = _of_gte(
    "test_inference_no_head_multilingual",
    "last_hidden_state",
    (
        ((0.2660, -0.2507, 0.3888), (0.5936, -0.4777, 0.5725), (0.5867, -0.4302, 0.5467)),
        ((0.4506, -0.2547, 0.4193), (0.3973, -0.2549, 0.3836), (0.3309, -0.3932, 0.4126)),
    ),
    "[:, 1:4, 1:4]",
)
_BASE_EN = _of_gte(
    "test_inference_no_head_english_v1_5",
    "last_hidden_state",
    (
        ((-0.0137, -0.4422, 0.5301), (-0.2834, 0.4779, 0.6164), (-0.2570, 0.3076, 0.7647)),
        ((-0.1446, -0.0088, -0.1134), (-0.1478, 0.1888, 0.3145), (-0.1605, 0.1750, 0.1975)),
    ),
    "[:, 1:4, 1:4]",
)
_SNOWFLAKE = _of_gte(
    "test_inference_no_head_snowflake_arctic_embed",
    "last_hidden_state",
    (
        ((1.2827, 0.5775, -0.4335), (1.3125, 0.2771, -0.4684), (1.4864, 0.1338, -0.3023)),
        ((1.6184, -0.2137, -0.8186), (1.6171, -0.2500, -0.5360), (1.4568, -0.3333, -0.5992)),
    ),
    "[:, 1:4, 1:4]",
)
_RERANKER = _of_gte("test_inference_reranker", "logits", ((0.2428,), (0.5710,)), "[:, :]")
_MULTILINGUAL_MLM = _of_gte(
    "test_inference_masked_lm",
    "logits",
    (
        ((-1.9263, 5.8634, 3.9742), (-1.2569, 9.1684, 6.1088), (-1.1027, 6.3202, 8.6400)),
        ((-2.3521, 4.1811, 9.3579), (-2.2531, -0.8155, 5.1775), (-2.1518, 4.4150, 7.3230)),
    ),
    "[:, 1:4, 1:4]",
)


def _converted(name: str, expected: Recorded) -> Recorded:
    """Values that transformers' tests list for the conversion of a model to the native layout."""
    conversion = f"alibaba-nlp-community/{name}"
    note = f"Recorded for {conversion}, which has the same weights in the native layout."
    return dataclasses.replace(expected, recorded_for=conversion, note=note)


_ROBERTA_IDS = ((0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2),)
_XLMR_IDS = ((0, 581, 10269, 83, 99942, 136, 60742, 23, 70, 80583, 18276, 2),)

RECORDED: Mapping[str, tuple[Recorded, ...]] = {
    "alibaba-nlp-community/gte-multilingual-mlm-base": (_MULTILINGUAL_MLM,),
    "alibaba-nlp-community/gte-base-en-v1.5": (_BASE_EN,),
    "alibaba-nlp-community/gte-multilingual-base": (_MULTILINGUAL_BASE,),
    "alibaba-nlp-community/gte-multilingual-reranker-base": (_RERANKER,),
    "Alibaba-NLP/gte-multilingual-mlm-base": (_converted("gte-multilingual-mlm-base", _MULTILINGUAL_MLM),),
    "Alibaba-NLP/gte-base-en-v1.5": (_converted("gte-base-en-v1.5", _BASE_EN),),
    "Alibaba-NLP/gte-multilingual-base": (
        _converted("gte-multilingual-base", _MULTILINGUAL_BASE),
        Recorded(
            source="the model card of Alibaba-NLP/gte-multilingual-base",
            quantity="similarity",
            values=(0.301699697971344, 0.7503870129585266, 0.32030850648880005),
            texts=(*_CHINA, "北京", "快排算法介绍"),
        ),
    ),
    "Alibaba-NLP/gte-multilingual-reranker-base": (
        _converted("gte-multilingual-reranker-base", _RERANKER),
        Recorded(
            source="the model card of Alibaba-NLP/gte-multilingual-reranker-base",
            quantity="logits",
            values=(1.2315, 0.5923, 0.3041),
            pairs=(("中国的首都在哪儿", "北京"), (_CHINA[0], "北京"), (_CHINA[1], "Introduction of quick sort")),
            select="[:, 0]",
            atol=2e-2,
            note=_HALF_PRECISION,
        ),
    ),
    "Snowflake/snowflake-arctic-embed-m-v2.0": (_SNOWFLAKE,),
    "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte": (
        Recorded(
            source=_FASTEMBED_SPARSE,
            quantity="sparse",
            values=(
                *(0.16544909, 0.00529129, 0.0392109, 0.12337475, 0.09640586, 0.05325737, 0.09611791, 0.03159865),
                *(0.01349991, 0.09392473, 0.01928805, 0.05238346, 0.05515401, 0.03156782, 0.98263124),
            ),
            texts=("Hello World",),
            select="[0, 999 1010 1011 1024 1028 1029 1045 1074 1993 2017 2033 2054 2073 2080 2088]",
        ),
        Recorded(
            source=_FASTEMBED_SPARSE,
            quantity="sparse",
            values=(3.42086864, 6.93775654),
            texts=("Hello World",),
            select="[0, 2088 7592]",
            is_query=True,
        ),
    ),
    "answerdotai/ModernBERT-base": (
        Recorded(
            source=_transformers(*_MODERNBERT_TEST, "test_inference_masked_lm"),
            quantity="logits",
            values=(((3.8387, -0.2017, 12.2839), (3.6300, 0.6869, 14.7123), (-5.1137, -3.8122, 11.9874)),),
            texts=("Hello World!",),
            select="[:, :3, :3]",
            atol=1e-4,
            rtol=1e-4,
        ),
        Recorded(
            source=_transformers(*_MODERNBERT_TEST, "test_inference_no_head"),
            quantity="last_hidden_state",
            values=(((0.3151, -0.6417, -0.7027), (-0.7834, -1.5810, 0.4576), (1.0614, -0.7268, -0.0871)),),
            texts=("Hello World!",),
            select="[:, :3, :3]",
            atol=1e-4,
            rtol=1e-4,
        ),
        Recorded(
            source=_transformers(*_MODERNBERT_TEST, "test_export"),
            quantity="words",
            values=("lawyer", "mechanic", "teacher", "doctor", "waiter"),
            texts=("the man worked as a [MASK].",),
        ),
    ),
    "Alibaba-NLP/gte-modernbert-base": (
        Recorded(
            source="the model card of Alibaba-NLP/gte-modernbert-base",
            quantity="similarity",
            values=(42.89073944091797, 71.30911254882812, 33.664554595947266),
            texts=(*_CHINA, "Beijing", "sorting algorithms"),
            scale=100.0,
            atol=0.2,
            note="The card does not say in which precision it ran; the bound is this project's.",
        ),
    ),
    "Alibaba-NLP/gte-reranker-modernbert-base": tuple(
        Recorded(
            source="the model card of Alibaba-NLP/gte-reranker-modernbert-base",
            quantity="logits",
            values=values,
            pairs=(
                (_CHINA[0], "Beijing"),
                (_CHINA[1], "Introduction of quick sort"),
                (_CHINA[1], "The weather is nice today"),
            ),
            select="[:, 0]",
            own_activation=own,
            atol=2e-2,
            note=_HALF_PRECISION,
        )
        for values, own in (((2.1387, 2.4609, -1.6729), False), ((0.8945664, 0.9213594, 0.15742092), True))
    ),
    "nomic-ai/nomic-embed-text-v1.5": (
        Recorded(
            source=_transformers(*_NOMIC_TEST, "test_inference_no_head_absolute_embedding"),
            quantity="last_hidden_state",
            values=(
                ((1.7039, -4.5610, 1.5236), (1.8685, -3.6936, 1.6641), (0.53303, -4.2081, 2.3375)),
                ((0.0026867, -3.7496, 0.90820), (0.018297, -3.3884, 0.35300), (-0.14282, -3.6776, -0.35079)),
            ),
            texts=_OXYGEN,
            select="[:, 1:4, 1:4]",
            rtol=1e-3,
            note="Recorded on a GPU, for the native layout of the pull request refs/pr/56.",
        ),
        _fastembed(-0.15407836, -0.03053198, -3.9138033, 0.1910364, 0.13224715, quantity="mean_hidden_state"),
    ),
    "nomic-ai/nomic-embed-text-v1": (
        _fastembed(0.3708, 0.2031, -0.3406, -0.2114, -0.3230, quantity="mean_hidden_state"),
    ),
    "Snowflake/snowflake-arctic-embed-m-long": (_fastembed(0.0080, -0.0266, -0.0335, 0.0282, 0.0143),),
    "jinaai/jina-embeddings-v2-small-en": (_fastembed(-0.0455, -0.0428, -0.0122, 0.0613, 0.0015),),
    "jinaai/jina-embeddings-v2-base-en": (_fastembed(-0.0332, -0.0509, 0.0287, -0.0043, -0.0077),),
    "jinaai/jina-embeddings-v2-base-de": (_fastembed_half(-0.0085, 0.0417, 0.0342, 0.0309, -0.0149),),
    "jinaai/jina-embeddings-v2-base-es": (_fastembed(-0.0108, -0.0092, -0.0373, 0.0171, -0.0301),),
    "jinaai/jina-embeddings-v2-base-zh": (_fastembed(0.0381, 0.0286, -0.0231, 0.0052, -0.0151),),
    "jinaai/jina-reranker-v1-tiny-en": (_reranked(2.5911, 0.1122),),
    "jinaai/jina-reranker-v1-turbo-en": (_reranked(1.8295, -2.8908),),
    "google-bert/bert-base-uncased": (
        Recorded(
            source=_transformers(*_BERT_TEST, "test_inference_no_head_absolute_embedding"),
            quantity="last_hidden_state",
            values=(((0.4249, 0.1008, 0.7531), (0.3771, 0.1188, 0.7467), (0.4152, 0.1098, 0.7108)),),
            token_ids=((0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2),),
            attention_mask=((0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),),
            select="[:, 1:4, 1:4]",
            atol=1e-4,
            rtol=1e-5,
        ),
    ),
    "BAAI/bge-small-en-v1.5": (_fastembed_half(0.01522374, -0.02271799, 0.00860278, -0.07424029, 0.00386434),),
    "BAAI/bge-base-en-v1.5": (_fastembed_half(0.01129394, 0.05493144, 0.02615099, 0.00328772, 0.02996045),),
    "BAAI/bge-large-en-v1.5": (_fastembed(0.03434538, 0.03316108, 0.02191251, -0.03713358, -0.01577825),),
    "Snowflake/snowflake-arctic-embed-xs": (_fastembed(0.0092, 0.0619, 0.0196, 0.009, -0.0114),),
    "Snowflake/snowflake-arctic-embed-s": (_fastembed(-0.0416, -0.0867, 0.0209, 0.0554, -0.0272),),
    "Snowflake/snowflake-arctic-embed-m": (_fastembed(-0.0329, 0.0364, 0.0481, 0.0016, 0.0328),),
    "Snowflake/snowflake-arctic-embed-l": (_fastembed(0.0189, -0.0673, 0.0183, 0.0124, 0.0146),),
    "sentence-transformers/all-MiniLM-L6-v2": (
        _fastembed(-0.034478, 0.03102, 0.00673, 0.02611, -0.039362),
        Recorded(
            source=_SBERT_DOCS,
            quantity="similarity",
            values=(0.6660, 0.1046),
            texts=_WEATHER,
        ),
    ),
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": (
        _fastembed_half(0.0361, 0.1862, 0.2776, 0.2461, -0.1904, quantity="mean_hidden_state"),
    ),
    "mixedbread-ai/mxbai-embed-large-v1": (_fastembed(0.02295546, 0.03196154, 0.016512, -0.04031524, -0.0219634),),
    "cross-encoder/ms-marco-MiniLM-L6-v2": (
        _reranked(8.500708, -2.541011),
        Recorded(
            source="the model card of cross-encoder/ms-marco-MiniLM-L6-v2",
            quantity="logits",
            values=(8.607138, -4.320078),
            pairs=_BERLIN,
            select="[:, 0]",
        ),
    ),
    "cross-encoder/ms-marco-MiniLM-L12-v2": (_reranked(9.330912, -2.0380247),),
    "prithivida/Splade_PP_en_v1": (
        Recorded(
            source=_FASTEMBED_SPARSE,
            quantity="sparse",
            values=(
                *(0.4219532, 0.43200725, 2.7665801, 0.33145747, 1.39517212, 0.02159592, 0.43770671, 0.00083709),
                *(0.51872098, 0.17124654, 0.14742017, 0.81428194, 2.80326271, 2.19043493, 1.05314457),
            ),
            texts=("Hello World",),
            select="[0, 2040 2047 2088 2299 2748 3011 3376 3795 4774 5304 5798 6160 7592 7632 8484]",
        ),
    ),
    "naver/splade-cocondenser-ensembledistil": (
        Recorded(
            source=_SBERT_DOCS,
            quantity="sparse_similarity",
            values=(35.629, 9.154, 0.098),
            texts=_WEATHER,
            atol=1e-2,
        ),
    ),
    "colbert-ir/colbertv2.0": (
        _late(
            (0.0759, 0.0841, -0.0299, 0.0374, 0.0254),
            (0.0005, -0.0163, -0.0127, 0.2165, 0.1517),
            (-0.0257, -0.0575, 0.0135, 0.2202, 0.1896),
            (0.0846, 0.0122, 0.0032, -0.0109, -0.1041),
            (0.0477, 0.1078, -0.0314, 0.016, 0.0156),
        ),
        _late(
            (0.0824, 0.0872, -0.0324, 0.0418, 0.024),
            (-0.0007, -0.0154, -0.0113, 0.2277, 0.1528),
            (-0.0251, -0.0565, 0.0136, 0.2236, 0.1838),
            (0.0848, 0.0056, 0.0041, -0.0036, -0.1032),
            (0.0574, 0.1072, -0.0332, 0.0233, 0.0209),
            is_query=True,
        ),
    ),
    "FacebookAI/roberta-base": (
        Recorded(
            source=_transformers(*_ROBERTA_TEST, "test_inference_masked_lm"),
            quantity="logits",
            values=(((33.8802, -4.3103, 22.7761), (4.6539, -2.8098, 13.6253), (1.8228, -3.6898, 8.8600)),),
            token_ids=_ROBERTA_IDS,
            select="[:, :3, :3]",
            atol=1e-4,
            rtol=1e-5,
        ),
        Recorded(
            source=_transformers(*_ROBERTA_TEST, "test_inference_no_head"),
            quantity="last_hidden_state",
            values=(((-0.0231, 0.0782, 0.0074), (-0.1854, 0.0540, -0.0175), (0.0548, 0.0799, 0.1687)),),
            token_ids=_ROBERTA_IDS,
            select="[:, :3, :3]",
            atol=1e-4,
            rtol=1e-5,
        ),
        Recorded(
            source=_transformers(*_ROBERTA_TEST, "test_export"),
            quantity="words",
            values=("happiness", "love", "peace", "freedom", "simplicity"),
            texts=("The goal of life is <mask>.",),
        ),
    ),
    "FacebookAI/roberta-large-mnli": (
        Recorded(
            source=_transformers(*_ROBERTA_TEST, "test_inference_classification_head"),
            quantity="logits",
            values=((-0.9469, 0.3913, 0.5118),),
            token_ids=_ROBERTA_IDS,
            select="[:, :]",
            atol=1e-4,
            rtol=1e-5,
        ),
    ),
    "FacebookAI/xlm-roberta-base": (
        Recorded(
            source=_transformers(*_XLMR_TEST, "test_xlm_roberta_base"),
            quantity="last_hidden_state",
            values=(
                (-0.0101, 0.1218, -0.0803, 0.0801, 0.1327, 0.0776, -0.1215, 0.2383, 0.3338, 0.3106, 0.0300, 0.0252),
            ),
            token_ids=_XLMR_IDS,
            select="[:, :, -1]",
        ),
    ),
    "FacebookAI/xlm-roberta-large": (
        Recorded(
            source=_transformers(*_XLMR_TEST, "test_xlm_roberta_large"),
            quantity="last_hidden_state",
            values=(
                (-0.0699, -0.0318, 0.0705, -0.1241, 0.0999, -0.0520, 0.1004, -0.1838, -0.4704, 0.1437, 0.0821, 0.0126),
            ),
            token_ids=_XLMR_IDS,
            select="[:, :, -1]",
        ),
    ),
    "intfloat/multilingual-e5-large": (
        _fastembed(0.4544, -0.0968, 0.1054, -1.3753, 0.1500, quantity="mean_hidden_state"),
    ),
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2": (
        _fastembed(0.0047, 0.1334, -0.0102, 0.0714, 0.1930, quantity="mean_hidden_state"),
    ),
    "BAAI/bge-reranker-base": (_reranked(6.15733337, -3.65939403),),
}
"""Hub id -> the values that are known for it."""
