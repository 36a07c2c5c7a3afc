"""The training loop: stages, steps and micro-batches, from top to bottom.

The same code runs alone on a CPU and under torchrun on many nodes. A step is `batch_size` sequences over all ranks. Its
loss is the sum of the cross-entropies of their masked tokens, divided by the number of masked tokens of the whole step.
The result therefore does not depend on the number of ranks and micro-batches, except for rounding.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.core.errors import ConfigError, MissingDependencyError
from gte_deploy.core.files import names_in_errors, require_utf8, sha256_file, write_text
from gte_deploy.models.checkpoint import copy_tokenizer
from gte_deploy.training.alarms import SpikeDetector
from gte_deploy.training.data.corpus import TokenCorpus, corpus_fingerprint
from gte_deploy.training.data.packing import MicroBatch, Step, StepLoader, StepSettings, pad_to_static
from gte_deploy.training.data.sampling import ChunkIndex, survey
from gte_deploy.training.distributed import (
    World,
    deterministic_algorithms,
    distribute,
    gradient_sync,
    join_world,
    load_optimizer_tensors,
    named_parameters,
    whole_tensor,
)
from gte_deploy.training.evaluation.during_run import RunEvaluation
from gte_deploy.training.export import checkpoint_model, export_checkpoint
from gte_deploy.training.flash_attention import flash_attention
from gte_deploy.training.flops import device_peak_flops
from gte_deploy.training.log import Meter, RunLog, plot_run
from gte_deploy.training.model import PackedMaskedLM, build_model, initial_model, micro_batch_tensors, model_source
from gte_deploy.training.optim import build_optimizer, learning_rate, plateau_end, set_learning_rate
from gte_deploy.training.options import CorpusSource
from gte_deploy.training.recipe import Recipe, Stage, dump_recipe, settled_execution
from gte_deploy.training.rescue import settled_recipe
from gte_deploy.training.run import Run, StepSize, StopRequested, StopSignal
from gte_deploy.training.run_data import TABLES_FOLDER, open_corpus, remove_shared_tables, shared_index, verify_once
from gte_deploy.training.saving import Saver
from gte_deploy.training.state import (
    CHECKPOINTS_FOLDER,
    TOKENIZER_FOLDER,
    Checkpoint,
    CheckpointStore,
    read_checkpoint,
    stage_seed,
    step_seed,
)

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class RunResult:
    """The result of `train`.

    Args:
        finished: False if a signal stopped the run.
        checkpoint: the newest checkpoint.
        model: the folder of the exported model; None for a stopped run.
    """

    finished: bool
    checkpoint: Path | None
    model: Path | None


def train(
    recipe: Recipe,
    *,
    data: Path | str | CorpusSource,
    output: Path,
    device: str | None = None,
    progress: TextIO | None = None,
    tensorboard: bool = True,
    tokenizer: Path | None = None,
    peak_flops: float | None = None,
) -> RunResult:
    """Run a recipe, or continue its run from the checkpoints in `output`.

    Args:
        recipe: the recipe to run.
        data: folder or URL of a prepared TokenCorpus, or that with options for reading it.
        output: folder for checkpoints, logs, the plot and the finished model.
        device: "cuda" or "cpu"; None takes a GPU if there is one.
        progress: stream on which the main process shows its progress line.
        tensorboard: also write TensorBoard events.
        tokenizer: folder with the tokenizer.json of the exported model; None takes the corpus's.
        peak_flops: peak FLOP/s of one device, for the share of the peak in the log; None looks a GPU up by its name.

    Raises:
        ConfigError: recipe, model, corpus and the checkpoints in `output` do not fit together.
        InputError: the corpus is incomplete, or a file of it was altered.
        CheckpointError: `output` has checkpoints, but none is complete.
        NonFiniteError: the loss became NaN or infinite; the earlier checkpoints stay.
        SpikeError: the loss or the gradient norm rose suddenly, and the recipe's alarms stop the run.
    """
    with join_world(device) as world, StopSignal() as stop, contextlib.ExitStack() as stack:
        stack.enter_context(names_in_errors(output))
        stack.enter_context(deterministic_algorithms(world.device, enabled=recipe.deterministic))
        source = data if isinstance(data, CorpusSource) else CorpusSource(data=data)
        corpus = open_corpus(source)
        stack.callback(corpus.close)
        store = CheckpointStore(output / CHECKPOINTS_FOLDER, keep=recipe.keep_checkpoints)
        resumed = _latest_checkpoint(store, world)
        if resumed:
            _require_same_run(corpus, resumed)
            recipe = settled_recipe(recipe, resumed)
        recipe = settled_execution(recipe, on_gpu=world.device.type == "cuda")
        stack.enter_context(flash_attention(recipe.flash_attention, world.device))
        store.milestones = frozenset(_plateau_ends(recipe))
        # A run that was killed while it deleted has one too many. Where later ones were refused, none is too many.
        if resumed and world.is_main and not store.later_than(resumed):
            store.prune()
        model = _model_to_continue(recipe, resumed)
        _require_fit(recipe, corpus, model.config)
        done = resumed.state if resumed else None
        saver = stack.enter_context(Saver(store, world, sharded=recipe.sharding == "fsdp" and world.size > 1))
        meter, spikes = Meter(peak_flops=_peak_of_all(peak_flops, world)), SpikeDetector(recipe.alarms)
        run = Run(recipe, corpus, model.config, world, saver, meter, spikes, tables=output / TABLES_FOLDER)
        run.evaluation = RunEvaluation.open(recipe, corpus, world)
        if resumed:
            run.resume(resumed)
        if world.is_main:
            _prepare_output(output, recipe, corpus, tokenizer or corpus.folder / TOKENIZER_FOLDER)
            run.log = stack.enter_context(RunLog(output, progress=progress, tensorboard=tensorboard))
            run.log.start(total_step=run.total_step)
            run.log_interventions()
            stack.callback(_plot, output)

        if source.verify:
            try:
                verify_once(run.corpora, output, world, stopped=lambda: stop.received is not None)
            except StopRequested:
                _tell_stop(stop, run)
                return RunResult(False, run.saved, None)
        if world.is_main:
            _tell_lengths(recipe, corpus, done=done.stage if done else 0)

        weights: Mapping[str, Tensor] = dict(model.named_parameters())
        for number, stage in enumerate(recipe.stages):
            start = 0
            if done and number <= done.stage:
                start = done.step if number == done.stage else stage.steps
            if start == stage.steps:
                continue
            # A new RoPE base needs a new model (see build_model). It takes the weights; the optimizer starts anew.
            model = build_model(model.config, rope_theta=stage.rope_theta)
            model.load_state_dict(weights, strict=False)
            finished, weights = _train_stage(run, stage, model, number=number, start=start, stop=stop)
            if not finished:
                run.finish_saving()
                _tell_stop(stop, run)
                return RunResult(False, run.saved, None)

        run.finish_saving()
        assert run.saved is not None  # every stage ends with a checkpoint
        if world.is_main:
            export_checkpoint(read_checkpoint(run.saved), output / MODEL_FOLDER)
            remove_shared_tables(run.tables)
        world.barrier()
        return RunResult(True, run.saved, output / MODEL_FOLDER)


def _train_stage(
    run: Run, stage: Stage, model: GteForMaskedLM, *, number: int, start: int, stop: StopSignal
) -> tuple[bool, dict[str, Tensor]]:
    """Train a stage from step `start` on.

    Returns:
        False if a signal stopped the stage; and the weights, gathered on the CPU, or {} for a stopped stage.
    """
    recipe, world = run.recipe, run.world
    run.config = model.config
    module = place_model(model, recipe, world)
    # On the CPU the fused step does not support shards.
    fused = world.device.type == "cuda" or recipe.sharding == "ddp"
    optimizer = build_optimizer(module, stage.optimizer, learning_rate=stage.learning_rate, fused=fused)
    if start:
        assert run.saved is not None  # `start` comes from this checkpoint
        tensors = read_checkpoint(run.saved, verify=False).optimizer_tensors()
        load_optimizer_tensors(module, optimizer, tensors)

    seed = stage_seed(recipe.seed, number)
    index = shared_index(
        run.corpus,
        stage.chunking,
        seed=seed,
        shuffle_shards=recipe.shuffle_shards,
        batch_size=stage.batch_size,
        folder=run.tables,
        world=world,
    )
    logger.info("stage %s from step %d to %d", stage.name, start, stage.steps)
    settings = StepSettings(
        batch_size=stage.batch_size,
        token_budget=recipe.tokens_per_micro_batch,
        seed=seed,
        masking=stage.masking,
        rank=world.rank,
        world_size=world.size,
    )
    loader = StepLoader(
        index,
        settings,
        start_step=start,
        stop_step=stage.steps,
        static_tokens=recipe.tokens_per_micro_batch if recipe.compile else None,
    )
    if start == 0:
        run.spikes.restart()
    if run.total_step == 0 and run.evaluation is not None:
        run.evaluate(stage, module, steps_done=0)
    run.meter.read()  # the time before the first step belongs to no step
    plateau = plateau_end(stage)
    with loader:
        for step in loader:
            run.saver.check()
            steps_done = step.number + 1
            if stage.skips(steps_done):
                run.skip(stage, steps_done=steps_done)
            else:
                rate = learning_rate(stage, step.number)
                set_learning_rate(optimizer, rate)
                try:
                    size, loss = _compute_gradients(run, module, step, index=index, number=number, stop=stop)
                except StopRequested:
                    optimizer.zero_grad()
                    if step.number > start:
                        run.flush(stage)
                        run.save(stage, module, optimizer, number=number, steps_done=step.number)
                    return False, {}
                norm = gradient_norm(module, clip_norm=stage.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                run.count(size, loss, norm, stage=stage, number=number, steps_done=steps_done, rate=rate)

            checkpoint_due = steps_done % recipe.checkpoint_every == 0 or steps_done in (plateau, stage.steps)
            evaluation_due = run.evaluation_is_due(stage, steps_done)
            if checkpoint_due or evaluation_due or steps_done % recipe.log_every == 0:
                run.flush(stage)
            if evaluation_due:
                run.evaluate(stage, module, steps_done=steps_done)
            if checkpoint_due:
                run.save(stage, module, optimizer, number=number, steps_done=steps_done)
    return True, {name: whole_tensor(parameter) for name, parameter in named_parameters(module).items()}


def _compute_gradients(
    run: Run, module: nn.Module, step: Step, *, index: ChunkIndex, number: int, stop: StopSignal
) -> tuple[StepSize, Tensor]:
    """Compute the gradients of a step of stage `number`; return its size, and this rank's share of its loss.

    The ranks vote before each micro-batch whether to stop, so each has the same number of them.

    Raises:
        StopRequested: a signal has asked one of the ranks to stop.
    """
    recipe, world = run.recipe, run.world
    size = _step_size(step.micro_batches, world)
    torch.manual_seed(step_seed(recipe.seed, number, step.number, world.rank))
    micro_batches = _fill_up(step.micro_batches, size, index=index, recipe=recipe)
    loss = accumulate_gradients(
        module,
        micro_batches,
        world=world,
        masked_tokens=size.masked_tokens,
        dtype=recipe.dtype,
        before_each=partial(stop.raise_if_any, world),
    )
    return size, loss


def accumulate_gradients(
    module: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    world: World,
    masked_tokens: int,
    dtype: str,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add up the gradients of one step's loss, over the micro-batches and, in the last one, over the ranks.

    The loss is the mean over all masked tokens of the step. The average of the micro-batches' means would give the
    tokens of small micro-batches a larger weight.

    Args:
        module: PackedMaskedLM, as `distribute` wrapped it.
        micro_batches: the micro-batches of this rank; at least one, because the other ranks wait for its gradients.
        world: the ranks of the run.
        masked_tokens: number of masked tokens of the whole step.
        dtype: "bfloat16" for autocast, or "float32".
        before_each: called before each micro-batch. It may raise an exception, which drops the step.

    Returns:
        This rank's share of the loss, a scalar on the device. The sum over the ranks is the loss of the step.
    """
    total = torch.zeros((), device=world.device)
    for i, batch in enumerate(micro_batches):
        before_each()
        with gradient_sync(module, last=i + 1 == len(micro_batches)):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                nats = module(**micro_batch_tensors(batch, world.device))
            # DDP and FSDP average the gradients over the ranks; `world.size` turns the average into the sum.
            (nats * (world.size / masked_tokens)).backward()
        total += nats.detach()
    return total / masked_tokens


def _step_size(batches: Sequence[MicroBatch], world: World) -> StepSize:
    """Agree with the other ranks on the size of the step."""
    lengths = [np.diff(batch.cu_seqlens[: batch.num_sequences + 1]).astype(np.int64) for batch in batches]
    everyone = world.gather(
        [
            sum(len(batch.labels) for batch in batches),
            sum(int(x.sum()) for x in lengths),
            sum(int((x * x).sum()) for x in lengths),
            len(batches),
        ]
    )
    masked, tokens, squared, counts = zip(*everyone, strict=True)
    return StepSize(max(1, sum(masked)), sum(tokens), sum(squared), max(counts))


def _fill_up(
    batches: Sequence[MicroBatch], size: StepSize, *, index: ChunkIndex, recipe: Recipe
) -> Sequence[MicroBatch]:
    """Add micro-batches without a loss if this rank has fewer than another.

    FSDP gathers the weights in every micro-batch. DDP reduces the gradients in the last one, and once in a run its
    ranks agree on the buckets in the first one. The ranks vote in between. This one would else wait for the others.
    """
    missing = size.micro_batches - len(batches)
    if missing <= 0:
        return batches
    vocab = index.corpus.vocab
    none = np.empty(0, dtype=np.int64)
    empty = MicroBatch(
        input_ids=np.array([vocab.cls_id, vocab.sep_id]),
        position_ids=np.arange(2),
        cu_seqlens=np.array([0, 2], dtype=np.int32),
        max_seqlen=2,
        masked_positions=none,
        labels=none,
        num_sequences=0,
    )
    if recipe.compile:
        budget = recipe.tokens_per_micro_batch
        empty = pad_to_static(empty, num_tokens=budget, max_length=index.chunking.max_length, pad_id=vocab.pad_id)
    return [*batches, *[empty] * missing]


def _latest_checkpoint(store: CheckpointStore, world: World) -> Checkpoint | None:
    """Return the newest complete checkpoint. The main process verifies and chooses it for all ranks."""
    found = None
    if world.is_main:
        store.remove_leftovers()
        found = store.latest()
        if found is not None:
            logger.info("continuing from %s", found.path)
    stage, step, revision = world.gather(found.place if found else [-1, -1, 0])[0]
    if stage < 0 or world.is_main:
        return found
    return store.find(stage=stage, step=step, revision=revision)


def _model_to_continue(recipe: Recipe, resumed: Checkpoint | None) -> GteForMaskedLM:
    if resumed is not None:
        return checkpoint_model(resumed)
    return initial_model(recipe, model_source(recipe))


def _require_same_run(corpus: TokenCorpus, resumed: Checkpoint) -> None:
    stages = resumed.state.recipe["stages"]
    if any(stage.get("language_exponent") is not None and "source_weights" not in stage for stage in stages):
        raise ConfigError(
            f"{resumed.path} was begun by a version that weighted languages by their chunks, not by their tokens; it "
            "cannot continue here. Export it with `gte-train export`, and start from its weights"
        )
    if resumed.state.corpus != corpus_fingerprint(corpus):
        raise ConfigError(f"{resumed.path} was trained on another corpus than {corpus.folder}; use that one")


def _require_fit(recipe: Recipe, corpus: TokenCorpus, config: GteConfig) -> None:
    longest = max(stage.max_length for stage in recipe.stages)
    if longest > config.max_position_embeddings:
        raise ConfigError(f"max_length {longest} is above the model's {config.max_position_embeddings} positions")
    vocab = corpus.vocab
    if vocab.size > config.vocab_size:
        raise ConfigError(f"the corpus's vocabulary of {vocab.size} is above the model's {config.vocab_size} rows")
    if vocab.pad_id != config.pad_token_id:
        raise ConfigError(
            f"the corpus's padding id is {vocab.pad_id}, the model's {config.pad_token_id}; use the model's tokenizer"
        )


def _prepare_output(output: Path, recipe: Recipe, corpus: TokenCorpus, tokenizer: Path) -> None:
    file = tokenizer / "tokenizer.json"
    if not file.is_file() or sha256_file(file) != corpus.index["tokenizer_sha256"]:
        raise ConfigError(
            f"{file} is missing, or is not the tokenizer of {corpus.folder}; name the folder of the corpus's tokenizer"
        )
    require_utf8(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / RECIPE_FILE, dump_recipe(recipe))
    copy_tokenizer(tokenizer, output / TOKENIZER_FOLDER)


def _tell_lengths(recipe: Recipe, corpus: TokenCorpus, *, done: int) -> None:
    """Log what each stage that is left will see, before the first of them runs."""
    for number, stage in enumerate(recipe.stages[done:], done):
        found = survey(corpus, stage.chunking, seed=stage_seed(recipe.seed, number))
        passes = found.passes(stage.steps * stage.batch_size)
        logger.info("stage %s, %.2f passes over its chunks\n%s", stage.name, passes, found)


def place_model(model: GteForMaskedLM, recipe: Recipe, world: World) -> nn.Module:
    """Put a model on its device, with the recipe's gradient checkpointing, compilation and sharding."""
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    module = PackedMaskedLM(model)
    if recipe.compile:
        module.compile_parts()
    return distribute(module.to(world.device), world, sharding=recipe.sharding, dtype=recipe.dtype)


def gradient_norm(module: nn.Module, *, clip_norm: float | None) -> Tensor:
    """Return the norm of all gradients, a scalar on the device. Clip them to `clip_norm` unless it is None."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, whole)
    return whole


def _plateau_ends(recipe: Recipe) -> list[tuple[int, int]]:
    """Number and step of the checkpoints before a decay, from which a stage can be prolonged."""
    ends = [(number, plateau_end(stage)) for number, stage in enumerate(recipe.stages)]
    return [(number, end) for number, end in ends if end is not None]


def _tell_stop(stop: StopSignal, run: Run) -> None:
    signal = stop.received or "a signal to another rank"
    if run.saved is None:
        logger.warning("stopped by %s before the first step; the same command starts again", signal)
    else:
        logger.warning("stopped by %s; the same command continues from %s", signal, run.saved)


def _plot(output: Path) -> None:
    try:
        plot_run(output)
    except (MissingDependencyError, OSError) as error:  # the run itself did not fail, or for a reason of its own
        logger.warning("no plot: %s", error)


def _peak_of_all(peak_flops: float | None, world: World) -> float | None:
    peak = peak_flops or device_peak_flops(world.device)
    return None if peak is None else peak * world.size
