"""gte_encoder in front of a TensorRT plan: joins requests to batches that a profile of the plan takes, and runs them.

Triton's batcher has one batch size for all lengths, but a profile takes fewer rows of longer texts. So the batcher
hands over requests of any lengths, and this model joins them, up to the rows that the plan takes at that length. It
pads shorter ones to the length of longer ones if that costs less than another run. Triton's TensorRT backend, which
runs the model gte_plan, chooses the profile of each batch by its shape.

The inputs and outputs are those of a graph for ONNX Runtime: mask positions come by row, and become the (row, token)
pairs that a plan takes; pooled states are computed here if the plan gives only hidden states. Token ids are checked,
because a plan would read outside its tables.

Shapes: B rows of a request, R rows of a batch, S tokens, M masks, H hidden size, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # Triton's own module
from numpy.typing import NDArray

from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.spec import Pooling
from gte_deploy.exporters.triton.serving.exchange import (
    Inputs,
    Settings,
    attempt,
    check_ids,
    failed,
    required,
    response,
)
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.tasks.multi_vector import TOKEN_VECTORS
from gte_deploy.tasks.pooling import pool
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS

_PLAN = "gte_plan"
_HIDDEN, _POOLED, _POSITIONS = "last_hidden_state", "sentence_embedding", "mask_positions"

Tensors = Mapping[str, NDArray[Any]]


@dataclass
class Part:
    """A request: its tensors, one row for each text, and the names of the outputs to give."""

    tensors: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.tensors["input_ids"])

    @property
    def length(self) -> int:
        return int(self.tensors["input_ids"].shape[1])

    @property
    def num_masks(self) -> int:
        """Mask positions of a row, 1 if the plan takes none."""
        return int(self.tensors[_POSITIONS].shape[1]) if _POSITIONS in self.tensors else 1


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings and the profiles of the plan."""
        settings = Settings(args)
        self._spec = settings.spec
        self._inputs = settings.inputs
        self._profiles: list[list[int]] = json.loads(settings.text("profiles"))
        self._dtypes: dict[str, str] = json.loads(settings.text("plan_inputs"))
        self._plan_outputs = settings.text("plan_outputs").split(",")
        self._max_masks = settings.integer("max_masks")
        self._spare_tokens = settings.integer("spare_tokens")
        # Output tensors of the plan may be on the GPU otherwise, where numpy cannot read them.
        self._memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The requested outputs of each request; a wrong request gets its error instead."""
        results = [attempt(partial(self._read, request)) for request in requests]
        parts = [result for result in results if isinstance(result, Part)]
        answers: dict[int, Any] = {}
        for together in self._batches(parts):
            found = attempt(partial(self._answers, together))
            for place, part in enumerate(together):
                answers[id(part)] = found if failed(found) else found[place]
        return [response(answers[id(result)] if isinstance(result, Part) else result) for result in results]

    def _batches(self, parts: Sequence[Part]) -> list[list[Part]]:
        """The requests that run together: those of a length, and shorter ones if all of them fit and cost less.

        A batch may have more rows than the plan takes; it is cut then.
        """
        lengths: dict[tuple[tuple[str, ...], int], list[Part]] = {}
        for part in sorted(parts, key=lambda part: (part.outputs, -part.length)):
            lengths.setdefault((part.outputs, part.length), []).append(part)
        batches: list[list[Part]] = []
        spent = 0
        for (outputs, length), same in lengths.items():
            last = batches[-1] if batches and batches[-1][0].outputs == outputs else None
            cost = 0 if last is None else (last[0].length - length) * sum(part.rows for part in same)
            if last is not None and spent + cost <= self._spare_tokens and self._fits([*last, *same]):
                last.extend(same)
                spent += cost
            else:
                batches.append(list(same))
                spent = 0
        return batches

    def _fits(self, parts: Sequence[Part]) -> bool:
        return sum(part.rows for part in parts) <= self._most_rows(parts)

    def _most_rows(self, parts: Sequence[Part]) -> int:
        """The most rows of one run of requests, of which the first is the longest."""
        masks = max(part.num_masks for part in parts)
        return max(1, min(self._rows_at(parts[0].length), self._max_masks // masks))

    def _read(self, request: Any) -> Part:
        given = Inputs(request)
        tensors = {name: required(given, name) for name in self._inputs}
        ids = tensors["input_ids"]
        check_ids(ids, self._spec.vocab_size)
        self._rows_at(ids.shape[1])
        if (mask := tensors["attention_mask"]).shape != ids.shape:
            raise InputError(f"attention_mask has the shape {list(mask.shape)}, and input_ids {list(ids.shape)}")
        if (positions := tensors.get(_POSITIONS)) is not None and not (
            ((0 <= positions) & (positions < ids.shape[1])).all() and positions.shape[1] <= self._max_masks
        ):
            raise InputError(
                f"mask_positions must have 1 to {self._max_masks} positions a row, from 0 to {ids.shape[1] - 1}"
            )
        if (types := tensors.get("token_type_ids")) is not None and not (
            types.shape == ids.shape and ((0 <= types) & (types < self._spec.type_vocab_size)).all()
        ):
            raise InputError(
                f"token_type_ids must have the shape of input_ids, and types below {self._spec.type_vocab_size}"
            )
        return Part(tensors, tuple(sorted(request.requested_output_names())))

    def _rows_at(self, length: int) -> int:
        """The most rows of `length` tokens that a profile takes."""
        rows = max((rows for first, last, rows in self._profiles if first <= length <= last), default=0)
        if not rows:
            ranges = ", ".join(f"{first:,} to {last:,}" for first, last, _ in self._profiles)
            raise InputError(f"rows of {length:,} tokens fit no profile of the plan; the lengths are {ranges}")
        return rows

    def _answers(self, parts: Sequence[Part]) -> list[dict[str, NDArray[Any]]]:
        """The outputs of requests that run together."""
        length, masks = parts[0].length, max(part.num_masks for part in parts)
        whole = {name: self._joined(name, parts, masks if name == _POSITIONS else length) for name in self._inputs}
        outputs, limit = parts[0].outputs, self._most_rows(parts)
        # One batch after the other: hidden states of several would need much memory.
        runs = [
            self._run({name: values[start : start + limit] for name, values in whole.items()}, outputs)
            for start in range(0, len(whole["input_ids"]), limit)
        ]
        found = runs[0] if len(runs) == 1 else {name: np.concatenate([run[name] for run in runs]) for name in outputs}
        ends = np.cumsum([part.rows for part in parts])
        return [
            {name: self._own(name, values[end - part.rows : end], part) for name, values in found.items()}
            for part, end in zip(parts, ends, strict=True)
        ]

    def _joined(self, name: str, parts: Sequence[Part], width: int) -> NDArray[Any]:
        """The rows of all requests for an input [R, S], or [R, M] for mask positions."""
        filler = self._spec.pad_token_id if name == "input_ids" else 0
        padded = [
            values
            if values.shape[1] == width
            else np.pad(values, _right(width - values.shape[1]), constant_values=filler)
            for values in (part.tensors[name] for part in parts)
        ]
        return padded[0] if len(padded) == 1 else np.concatenate(padded)

    def _own(self, name: str, values: NDArray[Any], part: Part) -> NDArray[Any]:
        """A request's rows of an output, without the tokens and masks that only longer requests have."""
        if name == "logits" and _POSITIONS in part.tensors:
            return np.ascontiguousarray(values[:, : part.num_masks])
        if name in (_HIDDEN, TOKEN_WEIGHTS, TOKEN_VECTORS) or (
            name == "logits" and self._spec.task == "token-classify"
        ):
            return np.ascontiguousarray(values[:, : part.length])
        return values

    def _run(self, batch: Tensors, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the plan on one batch, and compute the outputs [R, …] that it does not give itself."""
        needed = list(dict.fromkeys(self._plan_output(name) for name in outputs))
        feed = {**batch, **({_POSITIONS: _pairs(batch[_POSITIONS])} if _POSITIONS in batch else {})}
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(values, dtype=self._dtypes[name]))
            for name, values in feed.items()
        ]
        request = pb_utils.InferenceRequest(
            model_name=_PLAN, requested_output_names=needed, inputs=tensors, preferred_memory=self._memory
        )
        answer = request.exec()
        if answer.has_error():
            raise BackendError(f"the plan failed: {answer.error().message()}")
        given = {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in needed}
        # Copies: the arrays of `answer` are views of memory that ends with it.
        return {name: np.array(self._output(name, given, batch)) for name in outputs}

    def _plan_output(self, name: str) -> str:
        if not name.startswith("embedding_"):
            return name
        return _POOLED if _POOLED in self._plan_outputs else _HIDDEN

    def _output(self, name: str, given: Tensors, batch: Tensors) -> NDArray[Any]:
        if name == "logits" and _POSITIONS in batch:
            return given[name].reshape(*batch[_POSITIONS].shape, -1)
        if not name.startswith("embedding_"):
            return given[name]
        kinds: dict[str, Pooling] = {"embedding_mean": "mean", "embedding_cls": "cls"}
        kind = kinds.get(name, self._spec.pooling)
        if _POOLED in given:
            pooled = given[_POOLED].astype(np.float32, copy=False)
        else:
            pooled = pool(given[_HIDDEN].astype(np.float32, copy=False), batch["attention_mask"], kind)
        if name in ("embedding_finished", "embedding_normalized"):
            normalize = name == "embedding_normalized"
            request = EmbeddingRequest(
                self._spec, self._spec.pooling, normalize=normalize, truncate_dim=self._spec.truncate_dim
            )
            return request.finished(pooled)
        return pooled


def _pairs(positions: NDArray[Any]) -> NDArray[Any]:
    """The (row, token) pairs [R * M, 2] of mask positions by row [R, M]."""
    rows = np.repeat(np.arange(len(positions), dtype=positions.dtype), positions.shape[1])
    return np.stack([rows, positions.reshape(-1)], axis=1)


def _right(count: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padding of `np.pad` for so many more columns."""
    return (0, 0), (0, count)
