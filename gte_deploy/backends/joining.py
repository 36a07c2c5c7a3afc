"""Joins the rows of all callers into batches: while an engine computes, what comes meanwhile becomes its next batch.

Why it works as it does, and what it costs: docs/decisions/joined-calls.md.

Shapes: B rows, S tokens of the longest row, M masks, of a caller's batch or of a joined one.
"""

import itertools
import logging
import threading
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import WARM_SHAPES, Backend, Batch, LanedBackend
from gte_deploy.backends.checks import check_batch, check_outputs
from gte_deploy.backends.stream_plan import StreamPlan
from gte_deploy.core.calls import Call, JoinOptions, Usage, current_call
from gte_deploy.core.errors import BackendError, OverloadedError
from gte_deploy.core.forking import in_use_for_others
from gte_deploy.core.lanes import as_lane
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.tasks.fill_mask import MAX_LOGITS
from gte_deploy.text.batching import BatchLimits

logger = logging.getLogger(__name__)

Results = dict[str, NDArray[np.float32]]

# Weight of the last batch in the measured speed, and the wait to suggest before anything is measured.
_NEWEST, _UNKNOWN_WAIT_S = 0.2, 1.0


class BatchObserver(Protocol):
    """Is told of each batch that an engine has computed, for metrics."""

    def on_batch(self, rows: int, tokens: int, padded_tokens: int, seconds: float) -> None:
        """Record a batch. The thread computes the next batch afterwards, so this must be fast.

        Args:
            rows: rows of the batch.
            tokens: tokens of the rows, special tokens included.
            padded_tokens: rows times the longest row.
            seconds: time that the engine took.
        """
        ...


@dataclass(eq=False, slots=True)
class _Row:
    """A row that waits.

    Args:
        submission: the batch that it is from.
        index: its number there.
        length: tokens, without the padding behind them.
        masks: numbers of its mask positions there; None if the task has no masks.
        key: rows of one key may share a batch.
        number: order of arrival, from 1.
    """

    submission: "_Submission"
    index: int
    length: int
    masks: NDArray[np.intp] | None
    key: Hashable
    number: int = 0


@dataclass(slots=True)
class _Piece:
    """The results of a computed batch, for the rows that a submission has in it.

    Args:
        results: the engine's results for the whole batch.
        rows: (the row, its number in the computed batch) of each.
        masks: numbers of the rows' mask positions in the computed batch, in the order of the rows.
        is_whole: whether the computed batch is the submission's own.
    """

    results: Results
    rows: list[tuple[_Row, int]]
    masks: NDArray[np.intp] | None
    is_whole: bool


@dataclass(eq=False)
class _Submission:
    """A caller's batch whose rows wait or are computed.

    Args:
        batch: the batch.
        outputs: names of the outputs to compute.
        call: the call that it belongs to.
        is_alone: whether its rows share no batch with rows of others.
        since: time of arrival, of `time.perf_counter`.
    """

    batch: Batch
    outputs: tuple[str, ...]
    call: Call | None
    is_alone: bool
    since: float = field(default_factory=time.perf_counter)
    rows: list[_Row] = field(default_factory=list)
    left: int = 0
    pieces: list[_Piece] = field(default_factory=list)
    error: BaseException | None = None
    is_gone: bool = False
    changed: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait until all rows are computed, or the call is over.

        Raises:
            CancelledCallError, DeadlineError: see `Call.check`; any error of the engine.
        """
        call = self.call
        if call is None or call.remaining_s is None:
            self.changed.wait()
        else:
            while not self.changed.wait(min(call.remaining_s or 0, threading.TIMEOUT_MAX)):
                call.check()
        if call is not None:
            call.check()
        if self.error is not None:
            raise self.error

    def results(self) -> Results:
        """Return the outputs for the rows of the batch; hidden states and other values of padding are zero."""
        if self.pieces[0].is_whole:
            return self.pieces[0].results
        return {name: self._result(name) for name in self.outputs}

    def _result(self, name: str) -> NDArray[np.float32]:
        first = self.pieces[0].results[name]
        rows, tokens = self.batch.input_ids.shape
        positions = self.batch.mask_positions
        if first.ndim == 3:
            result = np.zeros((rows, tokens, *first.shape[2:]), np.float32)
            for piece in self.pieces:
                for row, there in piece.rows:
                    result[row.index, : row.length] = piece.results[name][there, : row.length]
        elif name == "logits" and positions is not None:
            result = np.empty((len(positions), *first.shape[1:]), np.float32)
            for piece in self.pieces:
                assert piece.masks is not None  # a batch with masks is joined with such batches alone
                here = np.concatenate([row.masks for row, _ in piece.rows if row.masks is not None])
                result[here] = piece.results[name][piece.masks]
        else:
            result = np.empty((rows, *first.shape[1:]), np.float32)
            for piece in self.pieces:
                result[[row.index for row, _ in piece.rows]] = piece.results[name][[there for _, there in piece.rows]]
        return result


@dataclass(eq=False, slots=True)
class _Turn:
    """Rows that an engine computes at once.

    Args:
        rows: the rows.
        is_small: whether it is too small for a stream: see `StreamPlan.packed`.
        is_lane: whether more rows wait, so that further batches are computed meanwhile.
    """

    rows: list[_Row]
    is_small: bool
    is_lane: bool

    @property
    def submissions(self) -> list[_Submission]:
        """The submissions that the rows are from."""
        return list(dict.fromkeys(row.submission for row in self.rows))

    @property
    def is_whole(self) -> bool:
        """Whether it is one submission with all its rows."""
        first = self.rows[0].submission
        return len(self.rows) == len(first.rows) and all(row.submission is first for row in self.rows)


class JoiningBackend:
    """A `LanedBackend` over any backend. `run` is called by many threads, and their rows share the engine's batches.

    A thread that finds the engine free computes its own batch, as without joining. Rows that come meanwhile wait. When
    the batch ends, a thread of this object goes on with the row that has waited longest, and with rows of like length
    as far as the limits of a batch allow. An engine with several lanes works on so many batches at once.

    Errors stay with their caller: if a joined batch fails, or gives NaN, the rows of each caller are computed alone.
    """

    def __init__(self, inner: Backend, spec: ModelSpec, limits: BatchLimits, options: JoinOptions) -> None:
        """Put a queue before an engine, which is closed with this object.

        Args:
            inner: the engine.
            spec: the facts about its model.
            limits: bounds on a joined batch. Those of a caller's own batch do not count.
            options: bound of the queue.
        """
        self.name = inner.name
        self.device = inner.device
        self.precision: Precision = inner.precision
        self.num_threads = inner.num_threads
        self.outputs = inner.outputs
        self.inner = inner
        self.plan: StreamPlan | None = getattr(inner, "plan", None)
        """How `StreamedBackend` computes lists; None for other engines."""
        self._spec = spec
        self._limits = limits
        self._options = options
        self._slots = int(getattr(inner, "lanes", 1))
        self.lanes = self._slots + 1  # so that the next batch of a list waits here when one ends
        self._most_masks = max(1, MAX_LOGITS // spec.vocab_size)
        self._least_tokens = 0 if self.plan is None or self.plan.packed else self.plan.least_tokens
        self._observers: list[BatchObserver] = []
        self._threads = ThreadPoolExecutor(self._slots, thread_name_prefix="gte-join")
        self._lock = threading.Lock()  # for all that follows
        self._waiting: OrderedDict[int, _Row] = OrderedDict()  # by number, the oldest first
        self._shelves: dict[Hashable, list[tuple[int, int, _Row]]] = {}  # rows that may share a batch, by length
        self._numbers = itertools.count(1)
        self._queued_tokens = 0
        self._free = self._slots
        self._small_runs = False
        self._tokens_per_s = 0.0
        self._is_closed = False

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens of the rows that wait."""
        return self._queued_tokens

    @property
    def running(self) -> int:
        """Batches that are computed at this moment."""
        return self._slots - self._free

    @property
    def estimated_wait_s(self) -> float:
        """Seconds until what waits now is computed, from the speed of the last batches; 0 before the first."""
        return self._queued_tokens / (self._tokens_per_s * self._slots) if self._tokens_per_s else 0.0

    def observe(self, observer: BatchObserver) -> None:
        """Tell an observer of each batch from now on."""
        self._observers.append(observer)

    def over(self, inner: Backend) -> "JoiningBackend":
        """Return an empty queue with the same options and no observers before another engine, for a forked process."""
        return JoiningBackend(inner, self._spec, self._limits, self._options)

    def run(self, batch: Batch, outputs: Sequence[str]) -> Results:
        """See `Backend.run`.

        Raises:
            OverloadedError: more rows wait than the queue may hold, or than can be computed before the deadline.
            CancelledCallError, DeadlineError: the current `Call` is over.
        """
        check_outputs(outputs, self.outputs)
        check_batch(batch, self._spec)
        call = current_call()
        submission = _Submission(batch, tuple(outputs), call, is_alone=False)
        self._compute(submission)
        results = submission.results()
        if submission.pieces[0].is_whole or all(np.isfinite(values).all() for values in results.values()):
            return results
        # The NaN of another caller's row can spread where INT8 has one scale for a batch.
        submission = _Submission(batch, tuple(outputs), call, is_alone=True)
        self._compute(submission)
        return submission.results()

    def close(self) -> None:
        """See `Backend.close`. Calls that wait raise BackendError."""
        with self._lock:
            self._is_closed = True
            for submission in {row.submission for row in self._waiting.values()}:
                self._remove(submission, _closed())
        self._threads.shutdown(wait=False)
        self.inner.close()

    def shapes_to_warm_up(self) -> list[tuple[int, int]]:
        """See `LanedBackend.shapes_to_warm_up`."""
        return self.inner.shapes_to_warm_up() if isinstance(self.inner, LanedBackend) else list(WARM_SHAPES)

    def warm_up(self, batches: Sequence[Batch], outputs: Sequence[str]) -> None:
        """See `LanedBackend.warm_up`."""
        if isinstance(self.inner, LanedBackend):
            self.inner.warm_up(batches, outputs)
        else:
            for batch in batches:
                self.inner.run(batch, outputs)

    # --- the caller's thread ---------------------------------------------------------------------------------------

    def _compute(self, submission: _Submission) -> None:
        """Compute the rows of a submission, beside others or in this thread."""
        call = submission.call
        if call is not None:
            call.check()
        submission.rows = self._rows(submission)
        submission.left = len(submission.rows)

        def give_up() -> None:
            with self._lock:
                self._remove(submission, None)

        with self._lock:
            if self._is_closed:
                raise _closed()
            if not submission.is_alone:
                self._admit(submission)
            for row in submission.rows:
                self._put(row)
            turns = self._start()
        try:
            if call is not None:
                call.watch(give_up)
            own = next((turn for turn in turns if any(row.submission is submission for row in turn.rows)), None)
            for turn in turns:
                if turn is not own:
                    self._hand_over(turn)
            if own is not None:
                self._lead(own)
            submission.wait()
        finally:
            give_up()
            if call is not None:
                call.unwatch(give_up)

    def _rows(self, submission: _Submission) -> list[_Row]:
        batch = submission.batch
        positions = batch.mask_positions
        key: Hashable = (submission.outputs, positions is None, batch.token_type_ids is None)
        if submission.is_alone:
            key = submission.since, id(submission)
        lengths = _lengths(batch, self._spec)
        masks: list[Any] = [None] * len(lengths)
        if positions is not None:
            order = np.argsort(positions[:, 0], kind="stable")
            counts = np.bincount(positions[:, 0], minlength=len(lengths))
            masks = np.split(order, np.cumsum(counts)[:-1])
        return [_Row(submission, index, lengths[index], masks[index], key) for index in range(len(lengths))]

    def _admit(self, submission: _Submission) -> None:
        call = submission.call
        if call is not None and call.is_admitted:
            return
        if self._queued_tokens:
            self._refuse_if_too_much_waits(submission)
        if call is not None:
            call.is_admitted = True

    def _refuse_if_too_much_waits(self, submission: _Submission) -> None:
        wait, bound, tokens = self.estimated_wait_s, self._options.max_queue_tokens, _tokens(submission.rows)
        remaining = None if submission.call is None else submission.call.remaining_s
        if bound is not None and self._queued_tokens + tokens > bound:
            reason = f"with the {tokens:,} of this call they would be more than max_queue_tokens={bound:,}"
        elif remaining is not None and wait > remaining:
            reason = f"this call has {remaining:.1f} s left, before which they will not be computed"
        else:
            return
        wait = wait or _UNKNOWN_WAIT_S
        raise OverloadedError(
            f"{self._queued_tokens:,} tokens wait already, and {reason}. Try again in {wait:.1f} s.",
            retry_after_s=wait,
        )

    # --- the queue; its lock is held -------------------------------------------------------------------------------

    def _put(self, row: _Row, *, first: bool = False) -> None:
        row.number = next(self._numbers)
        self._waiting[row.number] = row
        if first:
            self._waiting.move_to_end(row.number, last=False)
        insort(self._shelves.setdefault(row.key, []), (row.length, row.number, row))
        self._queued_tokens += row.length

    def _take_out(self, row: _Row) -> None:
        del self._waiting[row.number]
        shelf = self._shelves[row.key]
        del shelf[bisect_left(shelf, (row.length, row.number))]
        if not shelf:
            del self._shelves[row.key]
        self._queued_tokens -= row.length

    def _remove(self, submission: _Submission, error: BaseException | None) -> None:
        """Take what waits of a submission out; what is computed meanwhile is thrown away."""
        for row in submission.rows:
            if row.number in self._waiting:
                self._take_out(row)
        submission.is_gone = True
        submission.error = submission.error or error
        submission.changed.set()

    def _start(self) -> list[_Turn]:
        """Return the turns that can begin now."""
        turns = []
        while self._free and (turn := self._next_turn()) is not None:
            turns.append(turn)
        return turns

    def _next_turn(self) -> _Turn | None:
        """Take the next batch and a slot for it; None if nothing waits, or if more has to come first."""
        if not self._waiting:
            return None
        rows = self._fill(next(iter(self._waiting.values())))
        is_small = len(rows) * max(row.length for row in rows) < self._least_tokens
        if is_small and self._small_runs:
            return None  # such batches run one at a time, so that it may grow meanwhile
        for row in rows:
            self._take_out(row)
        self._free -= 1
        self._small_runs |= is_small
        return _Turn(rows, is_small, is_lane=self._slots > 1 and bool(self._waiting))

    def _fill(self, oldest: _Row) -> list[_Row]:
        """Choose rows that fill a batch with the oldest one: those of the nearest lengths."""
        shelf = self._shelves[oldest.key]
        low = high = bisect_left(shelf, (oldest.length, oldest.number))
        longest = real = oldest.length
        masks = _num_masks(oldest)
        while True:
            count = high - low + 1
            choices = []
            if low > 0:
                shorter = shelf[low - 1][2]
                choices.append((longest - shorter.length, longest, shorter))
            if high + 1 < len(shelf):
                longer = shelf[high + 1][2]
                choices.append(((longer.length - longest) * count, longer.length, longer))
            for _, width, row in sorted(choices, key=lambda choice: choice[0]):
                fits = self._limits.allow(count + 1, width, real + row.length, self._limits.max_tokens)
                if fits and masks + _num_masks(row) <= self._most_masks:
                    break
            else:
                return [row for _, _, row in shelf[low : high + 1]]
            longest, real, masks = width, real + row.length, masks + _num_masks(row)
            if low > 0 and row is shelf[low - 1][2]:
                low -= 1
            else:
                high += 1

    # --- the thread that computes ----------------------------------------------------------------------------------

    def _hand_over(self, turn: _Turn) -> None:
        try:
            self._threads.submit(self._work, turn)
        except RuntimeError:  # no more threads, or the process ends
            self._work(turn)

    def _work(self, turn: _Turn | None) -> None:
        """Compute a turn, and others for as long as rows wait."""
        while turn is not None:
            self._run(turn)
            turn = self._end(turn)

    def _lead(self, turn: _Turn) -> None:
        """Compute a turn in a caller's thread, which leaves further ones to a thread of this object."""
        interrupt = self._run(turn)
        following = self._end(turn)
        if following is not None:
            self._hand_over(following)
        if interrupt is not None:
            raise interrupt

    def _end(self, turn: _Turn) -> _Turn | None:
        """Give the slot of a turn back, and take the next one."""
        with self._lock:
            self._free += 1
            self._small_runs &= not turn.is_small
            return self._next_turn()

    def _run(self, turn: _Turn) -> BaseException | None:
        """Run the engine, and give each submission its results or the error; return Ctrl-C in a caller's thread."""
        try:
            batch = turn.rows[0].submission.batch if turn.is_whole else _joined(turn.rows, self._spec.pad_token_id)
            started = time.perf_counter()
            # The callers are inside `in_use` until they have their results.
            with in_use_for_others(), as_lane(turn.is_lane):
                results = self.inner.run(batch, turn.rows[0].submission.outputs)
            seconds = time.perf_counter() - started
            self._deliver(turn, batch, results, started, seconds)
        except BaseException as error:  # noqa: B036 - it goes to the callers
            self._fail(turn, error)
            return None if isinstance(error, Exception) else error
        for observer in self._observers:
            try:
                observer.on_batch(len(turn.rows), _tokens(turn.rows), batch.input_ids.size, seconds)
            except Exception:  # of the user; the queue must go on
                logger.exception("an observer of batches failed")
        return None

    def _deliver(self, turn: _Turn, batch: Batch, results: Results, started: float, seconds: float) -> None:
        ends = list(itertools.accumulate((_num_masks(row) for row in turn.rows), initial=0))
        own: dict[_Submission, list[tuple[_Row, int]]] = {}
        for there, row in enumerate(turn.rows):
            own.setdefault(row.submission, []).append((row, there))
        pieces: list[tuple[_Submission, _Piece]] = []
        for submission, rows in own.items():
            masks = None
            if batch.mask_positions is not None:
                masks = np.concatenate([np.arange(*ends[there : there + 2]) for _, there in rows])
            pieces.append((submission, _Piece(results, rows, masks, turn.is_whole)))
        with self._lock:
            speed = batch.input_ids.size / max(seconds, 1e-9)
            self._tokens_per_s += (speed - self._tokens_per_s) * (_NEWEST if self._tokens_per_s else 1)
            for submission, piece in pieces:
                if submission.call is not None:
                    padded = len(piece.rows) * batch.input_ids.shape[1]
                    tokens = _tokens([row for row, _ in piece.rows])
                    waited = started - submission.since
                    submission.call.add(Usage(len(piece.rows), tokens, padded, 1, waited, seconds))
                submission.pieces.append(piece)
                submission.left -= len(piece.rows)
                if not submission.left:
                    submission.changed.set()

    def _fail(self, turn: _Turn, error: BaseException) -> None:
        """Give the error to the only submission of a turn, or let the rows of each try again without the others."""
        submissions = turn.submissions
        with self._lock:
            if len(submissions) == 1 or self._is_closed:
                for submission in submissions:
                    self._remove(submission, error)
                return
            for row in reversed(turn.rows):
                if not row.submission.is_gone:
                    row.key = row.submission.since, id(row.submission)
                    self._put(row, first=True)


def _closed() -> BackendError:
    return BackendError("this model is closed; load it again")


def _tokens(rows: Sequence[_Row]) -> int:
    return sum(row.length for row in rows)


def _num_masks(row: _Row) -> int:
    return 0 if row.masks is None else len(row.masks)


def _lengths(batch: Batch, spec: ModelSpec) -> list[int]:
    """Return the tokens of each row without the padding behind them."""
    rows, tokens = batch.input_ids.shape
    # Tokens without attention may have answers of their own, which look like padding.
    has_padding = spec.multi_vector is None or not spec.multi_vector.scores_unattended
    if not has_padding or batch.attention_mask.all():
        return [tokens] * rows
    lengths: list[int] = (tokens - np.argmax(batch.attention_mask[:, ::-1], axis=1)).tolist()
    return lengths


def _joined(rows: Sequence[_Row], pad_token_id: int) -> Batch:
    """Return the batch of these rows; mask positions are in the order of the rows."""
    shape = len(rows), max(row.length for row in rows)
    first = rows[0].submission.batch
    ids, mask = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    types = None if first.token_type_ids is None else np.zeros(shape, np.int64)
    positions: list[NDArray[np.int64]] = []
    for number, row in enumerate(rows):
        batch, end = row.submission.batch, row.length
        ids[number, :end] = batch.input_ids[row.index, :end]
        mask[number, :end] = batch.attention_mask[row.index, :end]
        if types is not None and batch.token_type_ids is not None:
            types[number, :end] = batch.token_type_ids[row.index, :end]
        if row.masks is not None and batch.mask_positions is not None:
            columns = batch.mask_positions[row.masks, 1]
            positions.append(np.stack([np.full_like(columns, number), columns], axis=1))
    return Batch(ids, mask, np.concatenate(positions) if positions else None, types)
