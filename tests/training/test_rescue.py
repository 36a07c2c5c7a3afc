"""A run is changed, rolled back, prolonged and branched, and its history tells it."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml

from gte_deploy.core.errors import CheckpointError, ConfigError, NonFiniteError
from gte_deploy.core.exit_codes import FAILURE, OK
from gte_deploy.training import rescue as rescue_module
from gte_deploy.training import train as train_module
from gte_deploy.training.cli import main
from gte_deploy.training.log import RunLog, read_log
from gte_deploy.training.optim import learning_rate
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.rescue import change_run
from gte_deploy.training.state import CheckpointStore, find_checkpoint
from gte_deploy.training.train import train

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def wsd(make_recipe):
    """`wsd(steps, **changes)`: a stage without warm-up, whose plateau does not depend on the number of its steps."""

    def make(steps, **changes):
        stage = {"schedule": "wsd", "warmup_ratio": 0.0, "decay_ratio": 0.3}
        return make_recipe(steps=(steps,), stage=stage, **changes)

    model = make(2)["model"]
    return lambda steps, **changes: make(steps, **{"model": model, **changes})


def run(recipe, corpus_folder, output):
    return train(recipe_from_dict(recipe), data=corpus_folder, output=output, tensorboard=False)


def change(recipe, output, *changes, start_from=None):
    return change_run(recipe_from_dict(recipe), output=output, changes=changes, start_from=start_from)


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(step)`: the next run ends after this step, as by a signal."""
    original = RunLog.write

    def stop(step):
        def write(self, records):
            records = list(records)
            original(self, records)
            if records[-1].total_step == step:
                monkeypatch.setattr(RunLog, "write", original)
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(RunLog, "write", write)

    return stop


def steps_of(output) -> list[int]:
    return [record["total_step"] for record in read_log(output / "log.jsonl")]


def losses_of(output) -> list[float]:
    return [record["loss"] for record in read_log(output / "log.jsonl")]


def assert_same_end(first, second) -> None:
    ends = [find_checkpoint(folder) for folder in (first, second)]
    for read in ("model_tensors", "optimizer_tensors"):
        tensors = [getattr(end, read)() for end in ends]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


@pytest.fixture(scope="module")
def long_run(wsd, corpus_folder, tmp_path_factory):
    """Ten steps with a plateau of seven; checkpoints at 2, 4, 6, 7, 8 and 10 are kept."""
    output = tmp_path_factory.mktemp("long")
    recipe = wsd(10, keep_checkpoints=9)
    run(recipe, corpus_folder, output)
    return output, recipe


# --- changes ----------------------------------------------------------------------------------------------------------


def test_a_change_holds_from_the_next_step_on_and_is_recorded(wsd, corpus_folder, long_run, tmp_path, stop_after):
    recipe = wsd(10)
    stop_after(3)
    run(recipe, corpus_folder, tmp_path)
    told = ["stages.0.learning_rate=5e-4", "stages.0.optimizer.clip_norm=0.25"]
    assert change(recipe, tmp_path, *told).name == "00-mlm-32-00000003.1"
    assert run(recipe, corpus_folder, tmp_path).finished  # the command of before, without the change
    records = read_log(tmp_path / "log.jsonl")
    stages = [recipe_from_dict({**recipe, "stages": [{**recipe["stages"][0], **c}]}).stages[0] for c in ({}, LOWER)]
    assert [r["learning_rate"] for r in records] == [learning_rate(stages[step >= 3], step) for step in range(10)]
    assert losses_of(tmp_path)[:4] == losses_of(long_run[0])[:4] and losses_of(tmp_path) != losses_of(long_run[0])
    (event,) = read_log(tmp_path / "log.jsonl", kind="change")
    expected = {"stages.0.learning_rate": [1e-3, 5e-4], "stages.0.optimizer.clip_norm": [None, 0.25]}
    assert (event["total_step"], event["step"], event["changes"]) == (3, 3, expected)
    (recorded,) = find_checkpoint(tmp_path).state.interventions
    assert recorded == {key: value for key, value in event.items() if key != "kind"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["stages"][0]["learning_rate"] == 5e-4


LOWER = {"learning_rate": 5e-4}


def test_a_changed_recipe_is_accepted_and_a_third_value_is_not(wsd, corpus_folder, tmp_path, stop_after, caplog):
    recipe = wsd(10)
    stop_after(2)
    run(recipe, corpus_folder, tmp_path)
    path = change(recipe, tmp_path, "stages.0.learning_rate=5e-4")
    caplog.set_level("INFO")
    assert change(recipe, tmp_path, "stages.0.learning_rate=5e-4") == path  # a job that is started again
    assert "has these values already" in caplog.text
    edited = {**recipe, "stages": [{**recipe["stages"][0], "learning_rate": 5e-4}]}
    other = {**recipe, "stages": [{**recipe["stages"][0], "learning_rate": 3e-4}]}
    stop_after(3)
    assert not run(edited, corpus_folder, tmp_path).finished
    with pytest.raises(ConfigError, match=r"differs in stages\.0\.learning_rate.*--change KEY=VALUE"):
        run(other, corpus_folder, tmp_path)
    assert change(recipe, tmp_path, "stages.0.learning_rate=3e-4").name == "00-mlm-32-00000003.1"
    assert run(recipe, corpus_folder, tmp_path).finished
    assert [e["changes"]["stages.0.learning_rate"] for e in find_checkpoint(tmp_path).state.interventions] == [
        [1e-3, 5e-4],
        [5e-4, 3e-4],
    ]


@pytest.mark.parametrize(
    ("key_and_value", "message"),
    [
        ("stages.0.batch_size=9", "stages.0.batch_size cannot change in a run; stages.N. can: learning_rate"),
        ("seed=4", "seed cannot change"),
        ("stages.0.learning_rat=1", "did you mean 'learning_rate'"),
        ("stages.0.learning_rate=-1", "expected more than 0"),
        ("log_every=5", "give it with --set log_every=5"),
        ("stages.0.steps=9", r"stages.0.steps=9: 10 steps are done already"),
        ("stages.0.steps=20", r"decays since step 7, and 10 are done; .* --from 00-mlm-32-00000007"),
        ("stages.0.skip_steps=[[3,2]]", "ranges \\[first, last\\]"),
    ],
)
def test_what_cannot_change_is_refused(long_run, key_and_value, message):
    output, recipe = long_run
    before = sorted(path.name for path in (output / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match=message):
        change(recipe, output, key_and_value)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == before


def test_a_stage_that_is_over_does_not_change(make_recipe, corpus_folder, tmp_path, stop_after):
    recipe = make_recipe(steps=(2, 4))
    stop_after(3)
    run(recipe, corpus_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"stages\.0\.learning_rate: stage 0 is over; go back .* --from"):
        change(recipe, tmp_path, "stages.0.learning_rate=1e-4")
    change(recipe, tmp_path, "stages.1.learning_rate=1e-4")


def test_a_run_without_checkpoints_is_not_changed(wsd, tmp_path):
    with pytest.raises(ConfigError, match="has no checkpoint yet.*--set"):
        change(wsd(4), tmp_path, "stages.0.steps=9")
    with pytest.raises(CheckpointError, match="neither a training checkpoint nor"):
        change(wsd(4), tmp_path, start_from=tmp_path / "none")


# --- divergence -------------------------------------------------------------------------------------------------------


def test_the_error_of_a_diverged_run_names_a_command_that_rescues_it(wsd, corpus_folder, tmp_path, monkeypatch, capsys):
    """The batch of step 6 makes every run diverge, however often it is repeated; its skipping does not."""
    original = train_module._compute_gradients

    def diverging(run, module, step, **rest):
        size, loss = original(run, module, step, **rest)
        return size, loss * float("nan") if step.number == 5 else loss

    monkeypatch.setattr(train_module, "_compute_gradients", diverging)
    (tmp_path / "recipe.yaml").write_text(json.dumps(wsd(8)))
    output = tmp_path / "run"
    command = ["run", str(tmp_path / "recipe.yaml"), "--data", str(corpus_folder), "-o", str(output)]
    command += ["--no-tensorboard", "--device=cpu"]
    for _ in range(2):
        assert main(command) == FAILURE
        said = capsys.readouterr().err
        assert "stage mlm-32 step 6: loss nan" in said and "00-mlm-32-00000005" in said
    assert steps_of(output) == [1, 2, 3, 4, 5]  # the steps before it are logged
    (advised,) = re.findall(r"--change '[^']+'", said)
    assert advised == "--change 'stages.0.skip_steps=[[1, 6]]'"
    assert main([*command, *shlex.split(advised)]) == OK
    assert steps_of(output) == [1, 2, 3, 4, 5, 7, 8]
    assert find_checkpoint(output).state.total_step == 8
    assert main(command) == OK  # the command of before goes on with the change
    assert not list(output.glob("rolled-back"))


# --- rolling back -----------------------------------------------------------------------------------------------------


def test_a_run_goes_back_and_ends_as_before(long_run, corpus_folder, tmp_path, wsd, caplog):
    """Without a change it ends in the same weights, bit for bit. What it had done since lies aside."""
    recipe = wsd(10, keep_checkpoints=9)
    run(recipe, corpus_folder, tmp_path)
    old_log = (tmp_path / "log.jsonl").read_text()
    name = Path("00-mlm-32-00000004")
    assert change(recipe, tmp_path, start_from=name).name == "00-mlm-32-00000004.1"
    aside = tmp_path / "rolled-back" / "001"
    assert sorted(path.name for path in aside.iterdir()) == [
        *(f"00-mlm-32-{step:08d}" for step in (6, 7, 8, 10)),
        "log.jsonl",
    ]
    assert (aside / "log.jsonl").read_text() == old_log
    assert CheckpointStore(tmp_path / "checkpoints").latest().state.step == 4
    run(recipe, corpus_folder, tmp_path)
    assert steps_of(tmp_path) == list(range(1, 11))
    assert_same_end(tmp_path, long_run[0])
    caplog.set_level("INFO")
    change(recipe, tmp_path, start_from=name)  # a job that is started again does not go back again
    assert "went on from" in caplog.text and CheckpointStore(tmp_path / "checkpoints").latest().state.step == 10
    change(recipe, tmp_path, "stages.0.optimizer.clip_norm=1", start_from=tmp_path / "checkpoints" / name)
    assert find_checkpoint(tmp_path).state.step == 4 and (tmp_path / "rolled-back" / "002").is_dir()


def test_a_kill_while_checkpoints_move_aside_leaves_a_run_that_goes_on(wsd, corpus_folder, tmp_path, monkeypatch):
    recipe = wsd(10, keep_checkpoints=9)
    run(recipe, corpus_folder, tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(rescue_module, "_move_aside", killed)
        change(recipe, tmp_path, start_from=Path("00-mlm-32-00000004"))
    assert find_checkpoint(tmp_path).state.step == 10
    change(recipe, tmp_path, start_from=Path("00-mlm-32-00000004"))
    assert find_checkpoint(tmp_path).state.step == 4


# --- plateaus ---------------------------------------------------------------------------------------------------------


def test_a_plateau_is_prolonged_in_place_or_in_a_branch(long_run, wsd, corpus_folder, tmp_path):
    """Both end as a run that had the larger number of steps from the start, bit for bit."""
    recipe, longer = wsd(5), wsd(10)
    run(recipe, corpus_folder, tmp_path / "short")
    kept = sorted(path.name for path in (tmp_path / "short" / "checkpoints").iterdir())
    assert "00-mlm-32-00000003" in kept  # the end of the plateau, of which checkpoint_every knows nothing
    run(recipe, corpus_folder, tmp_path / "short")  # it has ended, and looks what it should not keep
    assert sorted(path.name for path in (tmp_path / "short" / "checkpoints").iterdir()) == kept
    before = find_checkpoint(tmp_path / "short").path
    plateau = tmp_path / "short" / "checkpoints" / "00-mlm-32-00000003"
    change(recipe, tmp_path / "branch", "stages.0.steps=10", start_from=plateau)
    assert run(recipe, corpus_folder, tmp_path / "branch").finished
    assert_same_end(tmp_path / "branch", long_run[0])
    assert find_checkpoint(tmp_path / "short").path == before  # the run that it left is as it was
    assert steps_of(tmp_path / "branch") == list(range(4, 11))
    change(recipe, tmp_path / "branch", "stages.0.steps=10", start_from=plateau)  # started again
    assert find_checkpoint(tmp_path / "branch").state.step == 10
    with pytest.raises(ConfigError, match="holds a run already; a branch of"):
        change(recipe, tmp_path / "branch", "stages.0.steps=12", start_from=plateau)

    change(recipe, tmp_path / "short", "stages.0.steps=10", start_from=plateau)
    assert run(recipe, corpus_folder, tmp_path / "short").finished
    assert_same_end(tmp_path / "short", long_run[0])
    with pytest.raises(ConfigError, match=r"differs in stages\.0\.warmup_ratio"):
        run({**longer, "stages": [{**longer["stages"][0], "warmup_ratio": 0.1}]}, corpus_folder, tmp_path / "short")


def test_a_loss_that_is_not_finite_is_no_checkpoint(wsd, corpus_folder, tmp_path, monkeypatch):
    original = train_module._compute_gradients

    def diverging(run, module, step, **rest):
        size, loss = original(run, module, step, **rest)
        return size, loss * float("inf") if step.number == 3 else loss  # step 4, which has a checkpoint

    monkeypatch.setattr(train_module, "_compute_gradients", diverging)
    with pytest.raises(NonFiniteError, match="step 4: loss inf"):
        run(wsd(8), corpus_folder, tmp_path)
    assert find_checkpoint(tmp_path).state.step == 2
