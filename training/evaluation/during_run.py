"""Evaluates the model of a run on held-out text while it trains, on all ranks together.

The ranks share the batches, and their sums are added up, so the number of ranks changes the scores only by rounding. An
evaluation draws no random number and changes no weight: a run with evaluations ends in the same weights as one without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gte_deploy.core.errors import ConfigError
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.packing import MicroBatch, pad_to_static
from gte_deploy.training.distributed import World
from gte_deploy.training.evaluation.held_out import HeldOutText, MaskedTokenScores, scored, scores_of
from gte_deploy.training.model import micro_batch_tensors
from gte_deploy.training.recipe import Recipe, Stage


class RunEvaluation:
    """The held-out text of a run. Tokens are hidden as the stage hides them, so that the losses can be compared."""

    def __init__(self, corpus: TokenCorpus, recipe: Recipe, world: World) -> None:
        self.corpus, self._recipe, self._world = corpus, recipe, world
        self._texts: dict[str, HeldOutText] = {}

    @classmethod
    def open(cls, recipe: Recipe, training: TokenCorpus, world: World) -> RunEvaluation | None:
        """Open the corpus that a recipe names as `eval_data`; None if it names none.

        Args:
            recipe: the recipe of the run.
            training: the corpus that the run trains on.
            world: the ranks of the run.

        Raises:
            InputError: the folder is no corpus.
            ConfigError: the corpus has another tokenizer, or is part of the training corpus.
        """
        if recipe.eval_data is None:
            return None
        corpus = TokenCorpus.open(Path(recipe.eval_data))
        if corpus.index["tokenizer_sha256"] != training.index["tokenizer_sha256"]:
            raise ConfigError(
                f"{corpus.folder} was prepared with another tokenizer than {training.folder}: prepare it with the same"
            )
        seen = {shard["tokens_sha256"] for shard in training.index["shards"] if shard["tokens"]}
        if any(shard["tokens_sha256"] in seen for shard in corpus.index["shards"]):
            raise ConfigError(
                f"{corpus.folder} holds text of {training.folder}, on which the run trains; hold documents out with "
                "`gte-train prepare --held-out 0.01`"
            )
        return cls(corpus, recipe, world)

    def is_due(self, stage: Stage, steps_done: int) -> bool:
        """Whether the model is evaluated after this step: every `evaluate_every` steps, and at the end of a stage."""
        every = self._recipe.evaluate_every
        return steps_done == stage.steps or (every is not None and steps_done % every == 0)

    def scores(self, module: nn.Module, stage: Stage) -> tuple[MaskedTokenScores, ...]:
        """Evaluate the model of a stage; every rank has to call it. See `held_out.scores_of` for the result.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        recipe, world = self._recipe, self._world
        text = self._text(stage)

        def predict(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            if recipe.compile:  # the shape for which the layers are compiled
                budget, pad_id = recipe.tokens_per_micro_batch, self.corpus.vocab.pad_id
                batch = pad_to_static(batch, num_tokens=budget, max_length=stage.max_length, pad_id=pad_id)
            inner: Any = module.module if isinstance(module, DistributedDataParallel) else module
            with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                return inner.predictions(**micro_batch_tensors(batch, world.device))

        with _evaluating(module):
            batches = text.packed(recipe.tokens_per_micro_batch)
            mine = scored(text, predict, batches, rank=world.rank, world_size=world.size)
        sums = world.sum(torch.from_numpy(mine).to(world.device)).cpu().numpy()
        return scores_of(text, sums)

    def _text(self, stage: Stage) -> HeldOutText:
        if stage.name not in self._texts:
            recipe = self._recipe
            self._texts = {
                stage.name: HeldOutText(
                    self.corpus, stage.max_length, stage.masking, recipe.evaluate_tokens, recipe.seed
                )
            }
        return self._texts[stage.name]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, and leave the module as it was."""
    module.eval()
    try:
        yield
    finally:
        module.train()
        if isinstance(module, FSDPModule):
            module.reshard()  # a checkpoint of this step reads shards, which a forward pass alone leaves gathered
