"""The proof itself: it passes what is equal, and fails each way a graph can be wrong."""

import copy
import dataclasses
import functools
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from factories import make_checkpoint  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.core.errors import CheckpointError, ParityError  # noqa: E402
from gte_deploy.core.spec import COMPUTE_PRECISIONS, PRECISIONS, ModelSpec  # noqa: E402
from gte_deploy.exporters.verification import parity as parity_module  # noqa: E402
from gte_deploy.exporters.verification.bounds import TOLERANCES, Tolerance  # noqa: E402
from gte_deploy.exporters.verification.cases import (  # noqa: E402
    Case,
    TokenSource,
    last_row_alone,
    make_batch,
    max_tokens_of,
    parity_cases,
)
from gte_deploy.exporters.verification.differences import compare  # noqa: E402
from gte_deploy.exporters.verification.parity import Comparison, check_parity  # noqa: E402
from gte_deploy.exporters.verification.reference import TorchReference  # noqa: E402
from gte_deploy.exporters.verification.report import format_table  # noqa: E402
from gte_deploy.exporters.verification.results import BoundMissedError  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402

FP32 = TOLERANCES["fp32"]
SPEC = ModelSpec(task="fill-mask", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
CASES = (Case(1), Case(17, 2, ragged=True), Case(40, 8, ragged=True))


def test_every_precision_has_bounds():
    assert set(TOLERANCES) == {*PRECISIONS, *COMPUTE_PRECISIONS}
    assert FP32.max_rel <= 1e-4 and FP32.cosine_min >= 0.99999
    assert TOLERANCES["bf16"].cosine_mean >= 0.9999
    for tolerance in TOLERANCES.values():  # a label has no cosine, and must be bounded all the same
        bound = tolerance.max_rel if tolerance.labels is None else tolerance.labels
        assert 0 < bound <= max(0.05, 1.01 * math.sqrt(2 * (1 - tolerance.cosine_min)))


def test_compare_against_numbers_worked_out_by_hand():
    found = compare(np.array([[3.0, 4.0], [0.0, 2.0]], np.float32), np.array([[3.0, 4.0], [2.0, 0.0]], np.float32))
    assert found.max_abs == 2.0
    assert found.max_rel == 2 / 3, "over the 3 that is the largest of its component"
    assert found.cosine_min == 0.0
    assert found.cosine_mean == 0.5
    assert not found.within(FP32)


def test_compare_in_chunks_is_compare(monkeypatch):
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 50, 7)).astype(np.float32)
    candidate = reference + rng.standard_normal(reference.shape).astype(np.float32) * 1e-3
    whole = compare(reference, candidate)
    monkeypatch.setattr("gte_deploy.exporters.verification.differences.CHUNK_ELEMENTS", 70)
    chunked = compare(reference, candidate)
    assert chunked.max_abs == whole.max_abs and chunked.cosine_min == whole.cosine_min
    assert chunked.cosine_mean == pytest.approx(whole.cosine_mean, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 99])
def test_what_is_not_finite_is_not_within(bad, where, monkeypatch):
    monkeypatch.setattr("gte_deploy.exporters.verification.differences.CHUNK_ELEMENTS", 10)
    reference = np.ones((100, 2), np.float32)
    candidate = reference.copy()
    candidate[where] = bad
    assert not compare(reference, candidate).within(FP32)


def test_compare_of_zeros_and_of_single_labels():
    zeros = np.zeros((2, 3), np.float32)
    assert compare(zeros, zeros).within(FP32)
    assert not compare(zeros, zeros + np.float32(1e-5)).within(FP32)  # a direction where there was none
    label = np.array([[1e-6], [5.0]], np.float32)
    assert compare(label, label - np.float32(2e-6), labels=True).within(FP32)  # a sign near 0 is no direction
    assert not compare(label, label - np.float32(1e-3), labels=True).within(FP32)
    assert not compare(label, label * np.float32(math.nan), labels=True).within(FP32)


def test_compare_refuses_other_shapes():
    with pytest.raises(ParityError, match=r"\[2, 3\].*\[3, 2\]"):
        compare(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("max_length", [8, 17, 100, 512, 2048, 8192])
def test_cases_reach_from_one_token_to_the_longest(max_length):
    cases = parity_cases(max_length)
    lengths = {case.length for case in cases if case.batch == 1}
    assert {1, 2, max_length} <= lengths and max(lengths) == max_length
    assert lengths >= {length for length in (17, 128, 512, 2048) if length <= max_length}
    assert {case.batch for case in cases} == {1, 2, 8}
    assert any(case.ragged for case in cases) and any(not case.ragged and case.batch > 1 for case in cases)
    assert len(set(cases)) == len(cases)


def test_classical_logits_are_compared_within_a_gibibyte():
    spec = dataclasses.replace(SPEC, vocab_size=250_048, logits="all", max_length=8192)
    limit = max_tokens_of(spec)
    assert limit is not None and limit * spec.vocab_size * 4 <= 1 << 30
    cases = parity_cases(spec.max_length, max_tokens=limit)
    assert max(case.length for case in cases) == limit
    assert max_tokens_of(dataclasses.replace(spec, logits="masked")) is None


@pytest.fixture(scope="module")
def tokens(tiny_mlm):
    return TokenSource.from_tokenizer(load_tokenizer(tiny_mlm))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("case", [*CASES, Case(2), Case(3, 2)], ids=str)
def test_batches_are_what_the_case_says(case, tokens, text_first):
    rng = np.random.default_rng(0)
    batch = make_batch(case, SPEC, tokens, rng, text_first=text_first)
    assert batch.input_ids.shape == batch.attention_mask.shape == (case.batch, case.length)
    assert batch.attention_mask.sum(1).tolist() == case.row_lengths()
    assert (batch.input_ids[batch.attention_mask == 0] == SPEC.pad_token_id).all()
    rows, places = batch.mask_positions.T
    assert set(rows) == set(range(case.batch)), "every row is masked somewhere"
    assert batch.attention_mask[rows, places].all()
    assert (batch.input_ids[rows, places] == tokens.mask).all()
    assert len(np.unique(batch.mask_positions, axis=0)) == len(batch.mask_positions)


def test_rows_are_text_and_random_in_turn_between_special_tokens(tokens):
    spec = dataclasses.replace(SPEC, task="embed")
    batch = make_batch(Case(40, 2), spec, tokens, np.random.default_rng(0), text_first=True)
    assert batch.mask_positions is None
    assert (batch.input_ids[:, 0] == 2).all() and (batch.input_ids[:, -1] == 3).all()  # [CLS], [SEP]
    assert (batch.input_ids[0, 1:-1] == np.resize(tokens.text, 38)).all()
    assert len(set(batch.input_ids[1, 1:-1])) > 20


def test_the_shortest_row_alone():
    batch = Batch(
        np.array([[5, 6, 7], [8, 9, 0]]), np.array([[1, 1, 1], [1, 1, 0]]), np.array([[0, 1], [1, 0], [1, 1]])
    )
    alone = last_row_alone(batch)
    assert alone.input_ids.tolist() == [[8, 9]]
    assert alone.attention_mask.tolist() == [[1, 1]]
    assert alone.mask_positions.tolist() == [[0, 0], [0, 1]]


class Wrong:
    """A candidate that spoils what PyTorch answers."""

    def __init__(self, inner, spoil):
        self.inner, self.spoil = inner, spoil

    def run(self, batch, outputs):
        results = {name: value.copy() for name, value in self.inner.run(batch, outputs).items()}
        self.spoil(results, batch)
        return results


@pytest.fixture(scope="module")
def reference(tiny_mlm):
    return TorchReference(load_model(tiny_mlm), task="fill-mask", pooling="mean", logits="masked")


def parity_of(reference, candidate, tokens, *, spec=SPEC, outputs=("last_hidden_state", "logits"), **options):
    candidates = candidate if isinstance(candidate, dict) else {("onnxruntime", "fp32"): candidate}
    precision, texts = options.pop("precision", "fp32"), options.pop("texts", {})
    asked = Comparison(outputs, spec, precision, tokens, cases=CASES, texts=texts)
    return check_parity(reference, candidates, asked, **options)


def test_the_same_model_agrees_with_itself(reference, tokens):
    lines = []
    report = parity_of(reference, reference, tokens, progress=lines.append)
    assert report.passed
    report.require()
    (engine,) = report.engines
    assert 0 < engine.max_rel <= FP32.max_rel / 10  # a row alone is summed in another order
    assert engine.top1 == 1 and all(result.top1 == result.top5 == 1 for result in engine.cases)
    assert [bool(result.alone) for result in engine.cases] == [False, True, True]
    assert lines == [
        "parity 1/3: length 1, batch 1",
        "parity 2/3: length 17, batch 2",
        "parity 3/3: length 40, batch 8",
    ]


def add_to_hidden(results, batch):
    results["last_hidden_state"][0, 0, 0] += 2e-3


def add_to_logits(results, batch):
    results["logits"][-1, 5] += 2e-3


def nan_on_padding(results, batch):
    results["last_hidden_state"][batch.attention_mask == 0] = math.nan


def nan_everywhere(results, batch):
    results["last_hidden_state"][:] = math.nan


def depend_on_the_batch(results, batch):
    if len(batch.input_ids) == 1 and batch.input_ids.shape[1] == 5:  # the last row of the longest case, alone
        results["last_hidden_state"] += 2e-3


@pytest.mark.parametrize(
    "spoil, failed",
    [
        (add_to_hidden, [0, 1, 2]),
        (add_to_logits, [0, 1, 2]),
        (nan_on_padding, [1, 2]),
        (nan_everywhere, [0, 1, 2]),
        (depend_on_the_batch, [2]),
    ],
)
def test_a_wrong_graph_is_found(reference, tokens, spoil, failed):
    report = parity_of(reference, Wrong(reference, spoil), tokens)
    (engine,) = report.engines
    assert [i for i, result in enumerate(engine.cases) if not result.within(FP32)] == failed
    assert not report.passed
    with pytest.raises(BoundMissedError, match=f"in {len(failed)} respects, over 3 cases.*0.0001") as error:
        report.require()
    assert error.value.report is report
    json.dumps(report.to_json(), allow_nan=False)
    assert format_table(report).count("FAILED") == len(failed) + 1


def test_padding_may_hold_anything_finite(reference, tokens):
    def zero_padding(results, batch):
        results["last_hidden_state"][batch.attention_mask == 0] = 0

    assert parity_of(reference, Wrong(reference, zero_padding), tokens).passed


def test_agreement_counts_the_best_tokens(reference, tokens):
    def reverse(results, batch):
        results["logits"] = -results["logits"]

    (engine,) = parity_of(reference, Wrong(reference, reverse), tokens).engines
    assert engine.top1 == 0 and all(result.top1 == 0 and result.top5 == 0 for result in engine.cases)


def test_the_reference_runs_once_a_case_and_each_engine_has_its_own_bounds(reference, tokens):
    class Counting:
        runs = 0

        def run(self, batch, outputs):
            self.runs += 1
            return reference.run(batch, outputs)

    counting = Counting()
    far = Wrong(reference, add_to_hidden)
    candidates = {("onnxruntime", "fp32"): reference, ("openvino", "fp32"): far, ("openvino", "bf16"): far}
    report = parity_of(counting, candidates, tokens)
    assert counting.runs == len(CASES) + 2, "two rows alone, too"
    assert [(found.title, found.passed) for found in report.engines] == [
        ("onnxruntime fp32", True),
        ("openvino fp32", False),
        ("openvino bf16", True),
    ]
    assert report.verified("onnxruntime") == ("fp32",) and report.verified("openvino") == ("bf16",)
    assert [found.tolerance for found in report.engines] == [FP32, FP32, TOLERANCES["bf16"]]
    with pytest.raises(BoundMissedError, match="openvino fp32 differs .* in 3 respects") as error:
        report.require()
    misses, _, advice = str(error.value).partition("No bundle was written.")
    assert "onnxruntime" not in misses and "bf16" not in misses
    assert "onnxruntime fp32 agrees, so openvino is at fault" in advice


def test_a_miss_in_bfloat16_is_told_and_fails_nothing(reference, tokens):
    candidates = {("openvino", "fp32"): reference, ("openvino", "bf16"): Wrong(reference, nan_everywhere)}
    report = parity_of(reference, candidates, tokens)
    assert report.passed and report.verified("openvino") == ("fp32",)
    report.require()
    (sentence,) = report.caveats
    assert "openvino bf16 misses its bounds" in sentence
    assert sentence in format_table(report) and "parity missed" in format_table(report)


def test_a_miss_in_bfloat16_fails_a_bundle_for_bfloat16(reference, tokens):
    wrong = Wrong(reference, nan_everywhere)
    candidates = {("onnxruntime", "fp32"): reference, ("openvino", "fp32"): reference, ("openvino", "bf16"): wrong}
    report = parity_of(reference, candidates, tokens, precision="bf16", emulated=[("openvino", "bf16")])
    assert not report.passed and report.verified("openvino") == ("fp32",)
    assert report.verified("openvino", emulated=True) == ()
    assert [found.tolerance for found in report.engines] == [FP32, FP32, TOLERANCES["bf16"]]
    with pytest.raises(BoundMissedError, match=r"openvino bf16 \(emulated\) differs"):
        report.require()


def test_an_emulation_that_no_bundle_needs_leaves_long_inputs_out(reference, tokens, monkeypatch):
    monkeypatch.setattr(parity_module, "LONGEST_OPTIONAL_EMULATION", 17)
    key = ("openvino", "bf16")
    for precision, lengths in (("int8", [1, 17]), ("bf16", [1, 17, 40])):
        report = parity_of(reference, {key: reference}, tokens, precision=precision, emulated=[key])
        (engine,) = report.engines
        assert [result.case.length for result in engine.cases] == lengths and engine.optional == (precision == "int8")
        title = "openvino bf16 (emulated)" if precision == "bf16" else "openvino int8+bf16 (emulated)"
        assert engine.title == title and report.verified("openvino", emulated=True) == ("bf16",)
    (engine,) = parity_of(reference, {key: reference}, tokens, precision="int8").engines
    assert len(engine.cases) == len(CASES), "the engine itself is quick"


def shrink_masks(count):
    """Answer another token at the first `count` masks of every case, and nothing else."""

    def spoil(results, batch):
        logits = results["logits"]
        for row in range(min(count, len(logits))):
            best, worst = logits[row].argmax(), logits[row].argmin()
            logits[row, [best, worst]] = logits[row, [worst, best]]

    return spoil


class Visible:
    """PyTorch, to which one token of padding in the last row is real."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, batch, outputs):
        mask = batch.attention_mask.copy()
        if (mask[-1] == 0).any():
            mask[-1, mask[-1].sum()] = 1
        return self.inner.run(dataclasses.replace(batch, attention_mask=mask), outputs)


class Double:
    """PyTorch in float64: sound, and rounded otherwise than FP32."""

    def __init__(self, model, **options):
        self.inner = TorchReference(copy.deepcopy(model).double(), **options)

    def run(self, batch, outputs):
        return self.inner.run(batch, outputs)


def scale_last_norm(model, factor):
    norm = model.base_model.layers[-1].post_mlp_layernorm
    norm.weight.mul_(factor), norm.bias.mul_(factor)


def scale_head(model, factor):
    last = model.classifier if hasattr(model, "classifier") else model.lm_head.layer_norm
    last.weight.mul_(factor), last.bias.mul_(factor)


def turn_angles(model):
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.mul_(1.02)


def wrong_weight(model):
    model.base_model.layers[0].self_attn.v_proj.weight[3, 5] += 0.05


def no_bias(model):
    model.base_model.layers[-1].mlp.down_proj.bias.zero_()


def no_label_bias(model):
    model.classifier.bias[0] = 0


SCALES = (1e-3, 1.0, 30.0, 1e4)
TASKS = [("fill-mask", 1), ("embed", 1), ("classify", 1), ("classify", 3), ("token-classify", 4)]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """`changed(task, labels, *changes)`: a copy of a tiny model, with these done to it."""
    folder, loaded = tmp_path_factory.mktemp("scales"), {}

    def change(task, labels, *changes):
        if (task, labels) not in loaded:
            path = make_checkpoint(folder / f"{task}{labels}", task=task, num_labels=labels)
            loaded[task, labels] = load_model(path, task=task)
        model = copy.deepcopy(loaded[task, labels])
        with torch.no_grad():
            for each in changes:
                each(model)
        return model

    return change


def judged(reference_model, candidate, task, tokens):
    spec = dataclasses.replace(SPEC, task=task)
    options = {"task": task, "pooling": "mean", "logits": "masked"}
    if isinstance(candidate, torch.nn.Module):
        candidate = TorchReference(candidate, **options)
    extra = {"embed": "sentence_embedding"}.get(task, "logits")
    reference = TorchReference(reference_model, **options)
    return parity_of(reference, candidate, tokens, spec=spec, outputs=("last_hidden_state", extra))


@pytest.mark.parametrize("factor", SCALES)
@pytest.mark.parametrize(
    ("scale", "task", "labels"),
    [(scale_last_norm, *task) for task in TASKS] + [(scale_head, *task) for task in TASKS if task[0] != "embed"],
)
def test_at_every_scale_what_is_sound_passes_and_what_is_wrong_fails(changed, tokens, scale, task, labels, factor):
    scaled = functools.partial(scale, factor=factor)
    model = changed(task, labels, scaled)
    options = {"task": task, "pooling": "mean", "logits": "masked"}
    report = judged(model, Double(model, **options), task, tokens)
    assert report.passed, report.failures()
    (engine,) = report.engines
    assert 0 < engine.max_rel < FP32.max_rel / 4
    if factor > 1e3 and scale is scale_last_norm:
        assert engine.max_abs > 1e-4, "an absolute bound would refuse it"
    for fault in (turn_angles, wrong_weight, no_bias):
        report = judged(model, changed(task, labels, fault, scaled), task, tokens)
        assert not report.passed and report.engines[0].max_rel > 3 * FP32.max_rel, fault
    assert not judged(model, Visible(TorchReference(model, **options)), task, tokens).passed


@pytest.mark.parametrize("factor", SCALES)
@pytest.mark.parametrize(("task", "labels"), [("classify", 1), ("classify", 3), ("token-classify", 4)])
def test_a_fault_in_the_smallest_of_several_labels_is_found(changed, tokens, task, labels, factor):
    def shrink_the_first(model):
        model.classifier.weight[0] *= 1e-4
        model.classifier.bias[0] *= 1e-4

    changes = (functools.partial(scale_head, factor=factor), shrink_the_first)
    model = changed(task, labels, *changes)
    assert judged(model, Double(model, task=task, pooling="mean", logits="masked"), task, tokens).passed
    report = judged(model, changed(task, labels, *changes, no_label_bias), task, tokens)
    assert [found.max_abs for found in report.engines[0].cases[0].outputs.values()][0] == 0, "the encoder is right"
    assert not report.passed


@pytest.mark.parametrize("factor", SCALES)
def test_a_label_that_is_near_zero_everywhere_is_judged_by_what_it_sums(changed, tokens, factor):
    def cancel(model):
        dense = model.base_model.pooler.dense
        dense.weight.zero_()
        features = torch.tanh(dense.bias)
        model.classifier.bias.copy_(-(model.classifier.weight @ features))

    changes = (functools.partial(scale_head, factor=factor), cancel)
    model = changed("classify", 1, *changes)
    report = judged(model, Double(model, task="classify", pooling="cls", logits="masked"), "classify", tokens)
    logits = [result.outputs["logits"] for result in report.engines[0].cases]
    assert report.passed and max(found.max_abs for found in logits) < 1e-6 * factor
    assert not judged(model, changed("classify", 1, *changes, no_label_bias), "classify", tokens).passed


class Rounding:
    """PyTorch with noise of this relative size, which is another in every run."""

    def __init__(self, inner, size):
        self.inner, self.size, self.rng = inner, size, np.random.default_rng(0)

    def run(self, batch, outputs):
        found = self.inner.run(batch, outputs)
        noise = {name: self.rng.uniform(-1, 1, value.shape) * np.abs(value).max() for name, value in found.items()}
        return {name: (value + self.size * noise[name]).astype(np.float32) for name, value in found.items()}


@pytest.mark.parametrize(
    ("size", "bound"), [(0, (1e-4, 1e-4)), (3e-8, (1e-4, 1e-4)), (5e-6, (1.1e-4, 9.9e-4)), (1e-2, (1e-3, 1e-3))]
)
def test_a_model_that_amplifies_rounding_is_judged_by_how_much_it_does(reference, tokens, size, bound):
    report = parity_of(Rounding(reference, size), Rounding(reference, size), tokens)
    tolerance = report.engines[0].tolerance
    assert bound[0] <= tolerance.max_rel <= bound[1]
    assert report.passed == (size < 1e-3)
    assert not parity_of(Rounding(reference, size), Wrong(reference, shift_hidden), tokens).passed


def shift_hidden(results, batch):
    results["last_hidden_state"][0, 0, 0] += 1e-2


def test_an_output_of_zeros_must_be_zeros(changed, tokens):
    def silence(model):
        model.classifier.weight.zero_(), model.classifier.bias.zero_()

    model = changed("classify", 2, silence)
    assert judged(model, model, "classify", tokens).passed
    assert not judged(
        model, changed("classify", 2, silence, lambda m: m.classifier.bias.add_(1e-6)), "classify", tokens
    ).passed


def test_one_channel_that_dwarfs_the_others_hides_no_fault(changed, tokens):
    def dwarf(model):
        model.base_model.layers[-1].post_mlp_layernorm.bias[7] += 300.0

    def shift(model):
        model.base_model.layers[-1].post_mlp_layernorm.bias[9] += 0.02

    model = changed("embed", 1, dwarf)
    assert judged(model, Double(model, task="embed", pooling="mean", logits="masked"), "embed", tokens).passed
    assert not judged(model, changed("embed", 1, dwarf, shift), "embed", tokens).passed


def test_a_checkpoint_whose_own_numbers_are_not_finite_is_named(changed, tokens):
    def spoil(model):
        model.base_model.layers[0].mlp.down_proj.bias[0] = math.inf

    model = changed("embed", 1, spoil)
    with pytest.raises(CheckpointError, match="PyTorch itself computes last_hidden_state"):
        judged(model, model, "embed", tokens)


LOOSE = Tolerance(cosine_min=-1)


@pytest.mark.parametrize(
    "bound, spoil, says",
    [
        ({"top1": 0.9}, shrink_masks(3), "top-1 agreement over all cases"),
        ({"cosine_mean": 0.99999}, shrink_masks(1), "mean cosine over all cases"),
        ({"max_rel": 1e-5}, add_to_hidden, "relative"),
        ({"top1": 0.9, "cosine_mean": 0.9}, nan_everywhere, "not finite"),
    ],
)
def test_each_bound_can_be_missed_alone(reference, tokens, monkeypatch, bound, spoil, says):
    monkeypatch.setitem(TOLERANCES, "fp32", LOOSE)
    if spoil is not nan_everywhere:
        assert parity_of(reference, Wrong(reference, spoil), tokens).passed
    monkeypatch.setitem(TOLERANCES, "fp32", dataclasses.replace(LOOSE, **bound))
    assert parity_of(reference, reference, tokens).passed
    report = parity_of(reference, Wrong(reference, spoil), tokens)
    with pytest.raises(BoundMissedError, match=says):
        report.require()
    assert "FAILED" in format_table(report)


def test_agreement_is_of_all_masks_alike(reference, tokens):
    (engine,) = parity_of(reference, Wrong(reference, shrink_masks(1)), tokens).engines
    masks = sum(result.masks for result in engine.cases)
    assert masks > len(CASES) and engine.top1 == pytest.approx(1 - len(CASES) / masks)


def test_the_reference_is_transformers_own_forward(tiny_mlm, tokens):
    model = load_model(tiny_mlm)
    batch = make_batch(CASES[1], SPEC, tokens, np.random.default_rng(1), text_first=True)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
        )
    rows, places = batch.mask_positions.T
    every = TorchReference(model, task="fill-mask", pooling="mean", logits="all").run(batch, ())["logits"]
    masked = TorchReference(model, task="fill-mask", pooling="mean", logits="masked").run(batch, ())["logits"]
    np.testing.assert_allclose(every, expected.logits.numpy(), atol=1e-6)
    np.testing.assert_allclose(masked, expected.logits.numpy()[rows, places], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_reference_pools_the_real_tokens(tiny_embed, tokens, pooling):
    spec = dataclasses.replace(SPEC, task="embed")
    reference = TorchReference(load_model(tiny_embed), task="embed", pooling=pooling, logits="masked")
    batch = make_batch(CASES[1], spec, tokens, np.random.default_rng(1), text_first=True)
    results = reference.run(batch, ())
    for row, length in enumerate(CASES[1].row_lengths()):
        hidden = results["last_hidden_state"][row, :length]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(results["sentence_embedding"][row], expected, atol=1e-6)


def test_the_reference_scores_as_the_golden_reranker(golden_dir):
    golden = np.load(golden_dir / "rerank" / "expected.npz")
    reference = TorchReference(load_model(golden_dir / "rerank"), task="classify", pooling="cls", logits="masked")
    results = reference.run(Batch(golden["input_ids"].astype(np.int64), golden["attention_mask"].astype(np.int64)), ())
    np.testing.assert_allclose(results["logits"], golden["scores"], atol=1e-4)
