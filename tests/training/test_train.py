"""The loop: what a step computes does not depend on how it is cut, stages hand over, the log is complete."""

import copy
import hashlib
import io
import json
import math

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, GteForMaskedLM

from corpora import write_corpus
from factories import WORDS, write_tokenizer
from gte_deploy.core.errors import CheckpointError, ConfigError, NonFiniteError
from gte_deploy.models import builtin_path
from gte_deploy.models.checkpoint import load_model, save_model
from gte_deploy.training import train as train_module
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.packing import StepSettings, micro_batches, pack, pad_to_static
from gte_deploy.training.data.sampling import ChunkIndex, Chunking
from gte_deploy.training.distributed import World
from gte_deploy.training.export import checkpoint_model, export_checkpoint
from gte_deploy.training.flops import computed_flops, training_flops
from gte_deploy.training.log import read_log
from gte_deploy.training.model import PackedMaskedLM, initial_model, model_source
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import find_checkpoint, stage_seed
from gte_deploy.training.train import accumulate_gradients, train

ALONE = World(0, 1, torch.device("cpu"))


def losses_of(folder) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def run(recipe, corpus_folder, output, **options):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_module, "plot_run", lambda folder: None)  # it takes longer than the run
        return train(recipe_from_dict(recipe), data=corpus_folder, output=output, tensorboard=False, **options)


@pytest.fixture
def index(corpus_folder):
    return ChunkIndex(TokenCorpus.open(corpus_folder), Chunking(32), seed=stage_seed(0, 0))


@pytest.fixture
def module(make_architecture):
    """An untrained model without dropout."""
    folder = make_architecture(hidden_dropout_prob=0.0)
    return PackedMaskedLM(initial_model(starting_from(folder), folder))


def starting_from(model, *, rope_theta=1e4, **changes):
    stage = {"name": "a", "max_length": 64, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    stages = [{**stage, "rope_theta": rope_theta}]
    return recipe_from_dict({"name": "r", "model": str(model), "seed": 1, "stages": stages, **changes})


def step_of(index, *, budget=64, batch_size=16):
    settings = StepSettings(batch_size=batch_size, token_budget=budget, seed=index.seed, masking=Masking())
    return micro_batches(index, 0, settings)


def gradients(module, batches):
    module.zero_grad()
    masked = sum(len(batch.labels) for batch in batches)
    loss = accumulate_gradients(module, batches, world=ALONE, masked_tokens=masked, dtype="float32")
    return loss.item(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def make_checkpoint(make_architecture, tmp_path_factory):
    """`make_checkpoint(rope) -> Path`: weights that were trained with this RoPE."""

    def make(rope):
        config = AutoConfig.from_pretrained(make_architecture())
        config.rope_parameters = rope
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("trained") / "model"
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def long_checkpoint(make_checkpoint):
    return make_checkpoint({"rope_type": "linear", "rope_theta": 160_000.0, "factor": 2.0})


def test_rope_is_kept_with_its_scaling_or_its_change_is_told(long_checkpoint, caplog):
    wanted = AutoModelForMaskedLM.from_pretrained(long_checkpoint).eval()
    kept = initial_model(starting_from(long_checkpoint, rope_theta="keep"), long_checkpoint).eval()
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    assert kept.config.rope_parameters == wanted.config.rope_parameters
    ids = torch.randint(5, 30, (1, 120), generator=torch.Generator().manual_seed(0))
    kept.set_attn_implementation("eager")
    with torch.inference_mode():
        torch.testing.assert_close(kept(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)
    plain = initial_model(starting_from(long_checkpoint, rope_theta=10_000), long_checkpoint)
    assert plain.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert "stages.0.rope_theta=keep goes on with theirs" in caplog.text


def test_a_run_keeps_rope_to_the_end(long_checkpoint, make_recipe, corpus_folder, tmp_path):
    recipe = make_recipe(steps=(1, 1), model=str(long_checkpoint), stage={"rope_theta": "keep"})
    result = run(recipe, corpus_folder, tmp_path / "run")
    start = AutoConfig.from_pretrained(long_checkpoint)
    assert AutoConfig.from_pretrained(result.model).rope_parameters == start.rope_parameters
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint_model(checkpoint).config.rope_parameters == start.rope_parameters


@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_run_goes_on_with_a_model_of_the_hub_in_either_layout(
    layout, make_checkpoint, make_recipe, corpus_folder, tmp_path, monkeypatch
):
    trained, source = make_checkpoint({"rope_type": "default", "rope_theta": 160_000.0}), tmp_path / "source"
    save_model(load_model(trained, task="fill-mask"), source, layout=layout)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: {"owner/mine": str(source)}[name])
    stage = {"rope_theta": "keep", "learning_rate": 1e-12}
    result = run(make_recipe(steps=(1,), model="owner/mine", stage=stage), corpus_folder, tmp_path / "run")
    start, end = (AutoModelForMaskedLM.from_pretrained(path).state_dict() for path in (trained, result.model))
    assert start.keys() == end.keys()
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)


def test_pretrained_takes_the_weights_of_a_preset_and_refuses_a_model_without(make_architecture):
    recipe = starting_from("gte-en-mlm-tiny", pretrained=True, rope_theta="keep")
    folder = model_source(recipe)
    assert folder == builtin_path()
    loaded = initial_model(recipe, folder).gte.embeddings.word_embeddings.weight
    stored = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).gte.embeddings.word_embeddings.weight
    assert torch.equal(loaded, stored)
    assert model_source(starting_from("gte-en-mlm-tiny")) is None  # random weights, as pretraining needs
    empty = make_architecture()
    with pytest.raises(ConfigError, match="has no weights"):
        initial_model(starting_from(empty, pretrained=True), empty)


def rewrite(file, facts):
    """Change state.json and what COMPLETE.json says of it."""
    file.write_text(json.dumps(facts))
    marker = file.with_name("COMPLETE.json")
    complete = json.loads(marker.read_text())
    content = file.read_bytes()
    complete["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    marker.write_text(json.dumps(complete))


def test_an_old_run_with_other_shares_of_languages_does_not_continue(make_recipe, corpus_folder, tmp_path):
    recipe = make_recipe(steps=(4,))
    run(recipe, corpus_folder, tmp_path)
    state = find_checkpoint(tmp_path).path / "state.json"
    facts = json.loads(state.read_text())
    for stage in facts["recipe"]["stages"]:
        del stage["source_weights"]
    del facts["recipe"]["pretrained"]
    rewrite(state, facts)
    assert run(recipe, corpus_folder, tmp_path).finished  # as before: the fields it lacks have their defaults
    facts["recipe"]["stages"][0]["language_exponent"] = 0.5
    rewrite(state, facts)
    with pytest.raises(ConfigError, match="weighted languages by their chunks"):
        run({**recipe, "stages": [{**recipe["stages"][0], "language_exponent": 0.5}]}, corpus_folder, tmp_path)


def test_the_lengths_of_all_stages_are_told_before_the_first(make_recipe, corpus_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run(make_recipe(steps=(1, 1)), corpus_folder, tmp_path)
    told = [each.getMessage() for each in caplog.records if "of the tokens beyond" in each.getMessage()]
    first = next(i for i, each in enumerate(caplog.records) if "from step 0" in each.getMessage())
    assert len(told) == 2 and all("passes over its chunks" in each and "sampled: " in each for each in told)
    assert all("beyond" not in each.getMessage() for each in caplog.records[first:])


# --- what a step computes -------------------------------------------------------------------------------------------


def test_losses_do_not_depend_on_accumulation_or_budget(corpus_folder, make_recipe, index, tmp_path):
    _, chunks = index.samples_at(np.arange(16), seed=index.seed)
    lengths = index.lengths_of(chunks)
    budgets = [max(b for b in range(32, 1025) if len(pack(lengths, token_budget=b)) >= count) for count in (1, 2, 8)]
    assert [len(pack(lengths, token_budget=budget)) for budget in budgets[:2]] == [1, 2]
    losses = {}
    for budget in budgets:
        recipe = make_recipe(steps=(20,), dropout=0.0, tokens_per_micro_batch=budget, stage={"batch_size": 16}, seed=0)
        run(recipe, corpus_folder, tmp_path / str(budget))
        losses[budget] = np.array(losses_of(tmp_path / str(budget)))
    assert len(losses[1024]) == 20 and losses[1024][-1] < losses[1024][0]
    for budget in budgets:
        np.testing.assert_allclose(losses[budget], losses[1024], rtol=0, atol=1e-5)


def test_every_masked_token_weighs_the_same(module, index):
    batches = step_of(index)
    sizes = [len(batch.labels) for batch in batches]
    assert len(set(sizes)) > 1  # or a mean of means would pass as well
    loss, _ = gradients(module, batches)
    singles = [gradients(module, [batch])[0] for batch in batches]
    assert loss == pytest.approx(np.average(singles, weights=sizes), abs=1e-6)
    assert loss != pytest.approx(np.mean(singles), abs=1e-6)


def test_static_padding_changes_neither_loss_nor_gradients(module, index):
    batches = step_of(index)
    padded = [pad_to_static(batch, num_tokens=200, max_length=32, pad_id=0) for batch in batches]
    loss, expected = gradients(module, batches)
    padded_loss, actual = gradients(module, padded)
    assert padded_loss == pytest.approx(loss, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)


def test_first_loss_is_near_that_of_a_uniform_guess(module, index):
    loss, _ = gradients(module, step_of(index))
    assert loss == pytest.approx(math.log(256), abs=0.1)


def test_one_batch_is_learnt_by_heart(module, index):
    batches = step_of(index, batch_size=8, budget=1024)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        masked = sum(len(batch.labels) for batch in batches)
        loss = accumulate_gradients(module, batches, world=ALONE, masked_tokens=masked, dtype="float32").item()
        optimizer.step()
        if loss < 0.05:
            return
    pytest.fail(f"the loss on one batch is still {loss}")


def test_bfloat16_stays_near_float32_and_keeps_float32_weights(module, index):
    batches = step_of(index)
    masked = sum(len(batch.labels) for batch in batches)
    exact, _ = gradients(module, batches)
    module.zero_grad()
    rounded = accumulate_gradients(module, batches, world=ALONE, masked_tokens=masked, dtype="bfloat16").item()
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.02)
    assert {p.dtype for p in module.parameters()} == {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_gradient_checkpointing_is_bitwise_equal_with_dropout(corpus_folder, make_recipe, tmp_path):
    recipe = make_recipe(steps=(4,))
    for flag in (False, True):
        run({**recipe, "gradient_checkpointing": flag}, corpus_folder, tmp_path / str(flag))
    assert losses_of(tmp_path / "True") == losses_of(tmp_path / "False")


@pytest.mark.slow
def test_compile_equals_eager(corpus_folder, make_recipe, tmp_path):
    recipe = make_recipe(steps=(4,), dropout=0.0)
    for flag in (False, True):
        run({**recipe, "compile": flag}, corpus_folder, tmp_path / str(flag))
    np.testing.assert_allclose(losses_of(tmp_path / "True"), losses_of(tmp_path / "False"), rtol=0, atol=1e-5)


def test_clipping_bounds_the_step(module, index):
    gradients(module, step_of(index))
    norm = train_module.gradient_norm(module, clip_norm=None)
    assert train_module.gradient_norm(module, clip_norm=0.5) == norm > 0.5
    assert train_module.gradient_norm(module, clip_norm=None) == pytest.approx(0.5, rel=1e-4)


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_stages(corpus_folder, make_recipe, tmp_path_factory):
    """A run over three stages of growing length, the last with another RoPE base; and its progress output."""
    output, progress = tmp_path_factory.mktemp("three"), io.StringIO()
    recipe = recipe_from_dict(make_recipe(steps=(5, 4, 3), log_every=2))
    result = train(recipe, data=corpus_folder, output=output, progress=progress, peak_flops=1e12)
    return result, output, progress.getvalue()


def test_exported_run_reloads_with_equal_logits(three_stages, tmp_path):
    result, output, _ = three_stages
    assert result.finished and result.model == output / "model"
    input_ids = AutoTokenizer.from_pretrained(result.model)("w7 w8 [MASK] w9", return_tensors="pt")
    trained = checkpoint_model(find_checkpoint(output))
    trained.set_attn_implementation("sdpa")
    native = AutoModelForMaskedLM.from_pretrained(result.model).eval()
    assert isinstance(native, GteForMaskedLM)
    export_checkpoint(find_checkpoint(output), tmp_path / "original", layout="original")
    assert json.loads((tmp_path / "original" / "config.json").read_text())["model_type"] == "new"
    original = load_model(tmp_path / "original")
    with torch.no_grad():
        logits = trained(**input_ids).logits
        assert torch.equal(native(**input_ids).logits, logits)
        assert torch.equal(original(**input_ids).logits, logits)
    assert AutoConfig.from_pretrained(result.model).rope_parameters["rope_theta"] == 160_000


def test_a_stage_with_another_rope_base_gets_its_frequencies(three_stages):
    _, output, _ = three_stages
    for stage, base in (("00-mlm-32-00000005", 1e4), ("02-mlm-128-00000003", 1.6e5)):
        model = checkpoint_model(find_checkpoint(output / "checkpoints" / stage))
        expected = 1.0 / base ** (torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(model.gte.rotary_emb.inv_freq, expected)


def test_weights_pass_from_stage_to_stage(three_stages):
    """With a rate of 0 in its first step, a stage's first loss is the handed-over model's."""
    _, output, _ = three_stages
    records = read_log(output / "log.jsonl")
    last_of_first, first_of_second = records[4]["loss"], records[5]["loss"]
    assert abs(first_of_second - last_of_first) < abs(first_of_second - math.log(256)) or last_of_first < math.log(256)
    paths = [output / "checkpoints" / name for name in ("00-mlm-32-00000005", "01-mlm-64-00000004")]
    first, second = (find_checkpoint(path).model_tensors() for path in paths)
    for name in first:
        moved = (second[name] - first[name]).abs().max()
        assert moved < 4 * 1.5e-3, name  # four steps of AdamW, not another initialisation


def test_log_has_each_step_once(three_stages, corpus_folder):
    _, output, progress = three_stages
    records = read_log(output / "log.jsonl")
    assert [(r["stage"], r["step"]) for r in records] == [
        *[("mlm-32", i) for i in range(1, 6)],
        *[("mlm-64", i) for i in range(1, 5)],
        *[("mlm-128", i) for i in range(1, 4)],
    ]
    assert [r["total_step"] for r in records] == list(range(1, 13))
    seed = stage_seed(3, 0)
    index = ChunkIndex(TokenCorpus.open(corpus_folder), Chunking(32), seed=seed)
    first = micro_batches(index, 0, StepSettings(batch_size=8, token_budget=128, seed=seed, masking=Masking()))
    assert records[0]["tokens"] == sum(len(batch.input_ids) for batch in first)
    assert records[0]["masked_tokens"] == sum(len(batch.labels) for batch in first)
    assert records[-1]["total_tokens"] == sum(r["tokens"] for r in records)
    assert all(r["tokens_per_second"] > 0 and 0 < r["peak_share"] < 1 and r["gradient_norm"] > 0 for r in records)
    lines = progress.splitlines()
    assert lines[0].startswith("mlm-32 2/5  loss 5.") and "% of peak" in lines[0] and "stage ends in 00:" in lines[0]
    assert len(lines) == 3 + 2 + 2  # every second step, and the end of each stage


def test_tensorboard_and_plot_are_written(three_stages):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, output, _ = three_stages
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(r["total_step"], r["loss"]) for r in read_log(output / "log.jsonl")]
    assert logged == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_says_so_again_without_training(three_stages, corpus_folder, make_recipe, monkeypatch):
    result, output, _ = three_stages
    recipe = json.loads((result.checkpoint / "state.json").read_text())["recipe"]
    monkeypatch.setattr(train_module, "accumulate_gradients", None)
    assert run(recipe, corpus_folder, output) == result


def test_weights_of_a_checkpoint_are_the_start(corpus_folder, make_recipe, three_stages, tmp_path):
    result, _, _ = three_stages
    recipe = make_recipe(steps=(1,), model=str(result.model))
    outcome = run(recipe, corpus_folder, tmp_path)
    before = load_model(result.model).state_dict()
    for name, tensor in find_checkpoint(outcome.checkpoint).model_tensors().items():  # the first step's rate is 0
        assert torch.equal(tensor, before[name]), name


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_as_another(three_stages, make_recipe, corpus_folder, tmp_path):
    result, output, _ = three_stages
    recipe = json.loads((result.checkpoint / "state.json").read_text())["recipe"]
    with pytest.raises(ConfigError, match="differs in seed, stages.2.steps|differs in stages.2.steps, seed"):
        run(
            {**recipe, "seed": 4, "stages": [*recipe["stages"][:2], {**recipe["stages"][2], "steps": 9}]},
            corpus_folder,
            output,
        )
    other = write_corpus(tmp_path / "other", [np.arange(5, 60)])
    with pytest.raises(ConfigError, match="trained on another corpus"):
        run(recipe, other, output)


def test_what_does_not_fit_is_refused(make_recipe, make_architecture, corpus_folder, tmp_path):
    for changes, message in [
        ({"vocab_size": 100}, "vocabulary of 256 is above the model's 100 rows"),
        ({"pad_token_id": 3}, "padding id is 0, the model's 3"),
        ({"max_position_embeddings": 16}, "max_length 32 is above the model's 16 positions"),
        ({"attention_probs_dropout_prob": 0.1}, "packed attention has no dropout"),
    ]:
        recipe = make_recipe(steps=(1,), model=str(make_architecture(**changes)))
        with pytest.raises(ConfigError, match=message):
            run(recipe, corpus_folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder 'gte-en-mlm-bass'.* did you mean gte-en-mlm-base"):
        run(make_recipe(steps=(1,), model="gte-en-mlm-bass"), corpus_folder, tmp_path / "out")


def test_a_tokenizer_that_is_not_the_corpuss_is_refused(make_recipe, corpus_folder, tmp_path):
    write_tokenizer(tmp_path, WORDS[:-1])
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="is missing, or is not the tokenizer of"):
            run(make_recipe(steps=(1,)), corpus_folder, tmp_path / "out", tokenizer=folder)


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe, corpus_folder, tmp_path, monkeypatch):
    original = train_module.accumulate_gradients
    calls = iter(range(100))

    def diverging(*args, **kwargs):
        loss = original(*args, **kwargs)
        return loss * math.nan if next(calls) == 3 else loss

    monkeypatch.setattr(train_module, "accumulate_gradients", diverging)
    with pytest.raises(NonFiniteError, match="stage mlm-32 step 4: loss nan"):
        run(make_recipe(steps=(8,)), corpus_folder, tmp_path)
    assert find_checkpoint(tmp_path).state.step == 2
    assert len(losses_of(tmp_path)) == 3


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_flops_equal_those_counted_in_a_pass(module, index):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter leaves this product out.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    # One sequence in each micro-batch: without a GPU, queries of several are padded to the most of one.
    batches = step_of(index, budget=32, batch_size=16)
    batches = [batch for batch in batches if batch.num_sequences == 1 and len(batch.labels)]
    lengths = np.array([len(batch.input_ids) for batch in batches])
    masked = np.array([len(batch.labels) for batch in batches])
    assert len(batches) > 3
    sizes = {"tokens": int(lengths.sum()), "squared_lengths": int((lengths**2).sum()), "masked": int(masked.sum())}
    # It knows no flash attention of the CPU, either.
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        gradients(module, batches)
    config = module.model.config
    computed = computed_flops(config, **sizes, masked_by_lengths=int((lengths * masked).sum()))
    assert counter.get_total_flops() == pytest.approx(computed, rel=1e-6)

    # The published model, with the same work in every layer.
    model = copy.deepcopy(module.model)
    first, last = model.gte.layers[0], model.gte.layers[-1]
    last.__class__, last.self_attn.__class__ = type(first), type(first.self_attn)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            hidden = model.gte(
                input_ids=torch.from_numpy(batch.input_ids)[None],
                cu_seqlens=torch.from_numpy(batch.cu_seqlens),
                max_seqlen=batch.max_seqlen,
            ).last_hidden_state[0]
            model.lm_head(hidden[torch.from_numpy(batch.masked_positions)]).sum().backward()
    assert counter.get_total_flops() == pytest.approx(training_flops(config, **sizes), rel=1e-6)
