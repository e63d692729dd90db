"""`fit`: the one training loop. A stage brings a step; schedule, gradients over processes, log, checkpoints, resume and signals are here.

Gradients are averaged over the processes by packed all-reduces after the step's backwards, not by DistributedDataParallel: a step goes
backward once per domain (and once more for a discriminator), calls parts of the model on their own, and DDP's hooks fire per forward of the
wrapped whole. The price is that communication does not overlap the backward; the gain is that a step is plain code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from .. import distributed
from ..config import LoopConfig
from ..errors import CheckpointError, DataError, Interrupted, NumericError, OutOfMemory
from ..runs.checkpoint import Checkpoint, CheckpointStore
from ..runs.folder import Run
from ..runs.identity import step_seed
from ..runs.layout import COLUMNS, PHASES, LogLine
from . import memory
from .device import choose_device, move
from .meter import Meter, Values, first_not_finite, numeric_error
from .pace import Closing, Pace
from .progress import Progress
from .resume import checkpoint_to_resume, identity_of
from .signals import StopRequest, stop_requests
from .state import TrainingState

Step = Callable[[Any, int], Values]  # (batch or a tuple of batches, iteration) -> what is logged
NAMES_SHOWN = 16  # file names in an error


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` did. `seconds` and `peak_memory_bytes` cover all the processes' lives that the stage took."""

    steps: int
    resumed_from: int  # 0: from the start
    skipped: bool  # the stage was finished before
    seconds: float
    peak_memory_bytes: int


def fit(
    *,
    stage: str,
    run: Run,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    step: Step,
    batches: Callable[[int], Iterator[Any]],
    iterations: int,
    schedule: Callable[[int], float],
    seed: int,
    settings: LoopConfig,
    identity: Any = None,
    at_checkpoint: Callable[[int], None] | None = None,
    predicted_peak: Callable[[], int | None] | None = None,
    watch: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> FitResult:
    """Train `modules` for `iterations` steps, or what is left of them; afterwards they hold the final state, also if it was there before.

    step(batch, it) goes forward and backward itself and returns tensors by name: 0-dim ones (losses) are logged as the average since the
        last line, `meter.Weighted` by weight, vectors (shares, norms) by their last value.
        It must be a function of the modules, the batch, `it` and torch's default generator, which is seeded
        for every iteration: then a killed and resumed run ends with the same bits as an undisturbed one.
    batches(start) yields the batches of iterations start, start + 1, ...; their `names` tell which files a NaN came from.
    modules: everything with state, saved under `<name>.safetensors`; on several processes they start from those of the first.
    optimizers: the rate of a group at `it` is the one it is given with (its `lr` on entry) times schedule(it).
    identity: settings and inputs of the stage (dataclasses, dicts, values). A checkpoint or a finished stage with others is refused.
    at_checkpoint(done) is called on every process before each regular checkpoint is written: one on the disk means that its call was
        complete. It must leave the modules as it found them, modes too.

    predicted_peak() -> bytes of a step, as predicted, for the log (None: unknown); asked once, before the first step.
    watch(record) sees every log line.

    Raises OutOfMemory (where it can, with the state before that step saved), NumericError (a value that is not finite; no checkpoint ever
    holds one), CheckpointError, DataError (no more batches), Interrupted (a stop signal; state saved). Waits for the device only where a
    line is logged or a checkpoint written.
    """
    whole = identity_of(stage, identity, iterations, seed, settings)
    loop = _Loop(stage, run, TrainingState(modules, optimizers), iterations, seed, settings, whole, predicted_peak)
    with run.exclusive(), stop_requests() as stop:
        if loop.skip_finished():
            return loop.result(skipped=True)
        loop.resume()
        try:
            loop.train(step, batches, schedule, stop, at_checkpoint, watch)
        except KeyboardInterrupt:  # the second Ctrl-C
            loop.interrupted(stop)
        loop.finish()
        stop.raise_if_requested(f"finishing {stage}")
    return loop.result(skipped=False)


class _Loop:
    """The state of one `fit`: how far it is, and where it writes."""

    def __init__(
        self,
        stage: str,
        run: Run,
        state: TrainingState,
        iterations: int,
        seed: int,
        settings: LoopConfig,
        identity: dict[str, Any],
        predicted_peak: Callable[[], int | None] | None,
    ) -> None:
        self.stage, self.run, self.state = stage, run, state
        self.iterations, self.seed, self.settings, self.identity = iterations, seed, settings, identity
        self.device = choose_device(settings.device)
        self.store: CheckpointStore = run.checkpoints(stage, settings.checkpoints_kept)
        self.meter = Meter()
        self.done = 0
        self.whole = True  # weights, optimisers and buffers are those after `done` steps
        self.saved: int | None = None
        self.resumed_from = 0
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.peak_before = 0
        self.names: deque[tuple[int, list[str]]] = deque()
        self.predicted_peak = predicted_peak
        self.predicted: int | None = None
        self.phases: dict[str, int] | None = None  # measured once, at the second step of this process

    # --- before and after --------------------------------------------------------------------------------------------------------------

    def skip_finished(self) -> bool:
        """Whether the stage is finished; then its final state is loaded. One whose last checkpoint is damaged is trained on."""
        main = distributed.is_main()
        if main:
            self.store.remove_leftovers()
        record = self.run.done(self.stage) if main and self.run.is_done(self.stage, self.identity) else None
        checkpoint = self.store.latest() if record is not None else None
        finished = distributed.broadcast_object(checkpoint is not None and checkpoint.step == self.iterations)
        if finished:
            self._restore(checkpoint)
        return finished

    def resume(self) -> None:
        """Go on from a checkpoint as `LoopConfig.resume` says; else make all processes start alike."""
        checkpoint = None
        if distributed.is_main():
            checkpoint = checkpoint_to_resume(self.store, self.settings.resume, self.stage, self.identity)
        if distributed.broadcast_object(checkpoint is not None):
            self._restore(checkpoint)
            self.resumed_from = self.done
            self.run.say(f"{self.stage}: going on from step {self.done} of {self.iterations}")
        else:
            self.state.share_initial()
        self.run.forget_metrics_after(self.stage, self.done)
        if self.device.type == "cpu":
            memory.keep_freed_memory()
        memory.reset_peak(self.device)

    def finish(self) -> None:
        if distributed.is_main():
            facts = {"step": self.done, "seconds": self._seconds(), "peak_memory_bytes": self._peak()}
            self.run.mark_done(self.stage, self.identity, **facts, checkpoint=self.store.paths()[0].name)
        distributed.barrier()

    def result(self, skipped: bool) -> FitResult:
        seconds, peak = (self.seconds_before, self.peak_before) if skipped else (self._seconds(), self._peak())
        return FitResult(self.done, self.resumed_from, skipped, seconds, peak)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        """`checkpoint` is None on the processes that did not read it."""
        header = (checkpoint.step, checkpoint.meta, str(checkpoint.path)) if checkpoint is not None else None
        step, meta, path = distributed.broadcast_object(header)
        tensors = distributed.broadcast_tensors(checkpoint.tensors if checkpoint is not None else None)
        try:
            self.state.restore(tensors, meta["optimizers"])
            self.meter.restore(meta["meter"])
            self.seconds_before, self.peak_before = float(meta["seconds"]), int(meta["peak_memory_bytes"])
        except Exception as error:  # whatever torch makes of a state that is not its own
            raise CheckpointError(f"{path} does not fit this stage's modules and optimisers: {error}") from error
        self.done = self.saved = step
        self.started = time.monotonic()

    # --- training ----------------------------------------------------------------------------------------------------------------------

    def train(
        self,
        step: Step,
        batches: Callable[[int], Iterator[Any]],
        schedule: Callable[[int], float],
        stop: StopRequest,
        at_checkpoint: Callable[[int], None] | None,
        watch: Callable[[Mapping[str, Any]], None],
    ) -> None:
        if self.done >= self.iterations:
            return self._save()
        if self.predicted_peak is not None and distributed.is_main():
            self.predicted = self.predicted_peak()
        feed = iter(batches(self.done))  # after the signal handlers are set: data-loading processes inherit them
        pace = Pace(self.done)
        progress = Progress(self.stage, self.iterations, self.done, self.run.output, self.run.writes)
        with contextlib.closing(Closing(feed)), progress:
            while self.done < self.iterations:
                batch = self._fetch(feed, stop, pace)
                if distributed.any_rank(stop.requested):
                    self._stop(stop)
                with self._measured():
                    self._iterate(step, batch, schedule)
                pace.images += len(self.names[-1][1])
                progress.advance(self.done)
                last = self.done == self.iterations
                if last or self.done % self.settings.log_every == 0:
                    record = self._log(pace)
                    progress.report(record, pace.seconds_left(self.done, self.iterations))
                    watch(record)
                if last or self.done % self.settings.checkpoint_every == 0:
                    if at_checkpoint is not None:
                        at_checkpoint(self.done)
                    self._save()

    def _fetch(self, feed: Iterator[Any], stop: StopRequest, pace: Pace) -> Any:
        if stop.requested:
            return None
        started = time.monotonic()
        try:
            return next(feed)
        except StopIteration:
            raise DataError(
                f"The batches of {self.stage} ended at step {self.done} of {self.iterations}; expected no end."
            ) from None
        except Exception:
            if stop.requested:  # a signal to the whole process group ended the data-loading processes too
                return None
            raise
        finally:
            pace.waited += time.monotonic() - started

    def _iterate(self, step: Step, batch: Any, schedule: Callable[[int], float]) -> None:
        it = self.done
        self.names.append((it, batch_names(batch)))
        torch.manual_seed(step_seed(self.seed, self.stage, it, distributed.rank()))
        self.state.set_rates(schedule(it))
        self.state.remember()
        updating, failed, interrupted = False, False, False
        try:
            values = step(move(batch, self.device), it)
            self.state.reduce_gradients()
            updating, self.whole = True, False
            self.state.update()
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            failed = True
        except KeyboardInterrupt:  # the second one: this step is not waited for
            interrupted = True
        if interrupted:
            self.whole &= self.state.forget_step()
            raise KeyboardInterrupt
        if failed:  # outside of `except`, whose traceback keeps the step's tensors alive
            self._out_of_memory(it, whole=not updating and self.state.forget_step())
        self.meter.add(values, it)
        self.done = it + 1
        self.whole = True

    def _log(self, pace: Pace) -> dict[str, Any]:
        values = self._checked_values()
        self.meter.reset()
        before = LogLine(stage=self.stage, step=self.done, seconds=round(self._seconds(), 3), lr=self.state.rate())
        after = pace.read() | LogLine(
            peak_memory_bytes=self._peak(), predicted_peak_bytes=self.predicted, phase_peak_bytes=self.phases
        )
        record = {key: value for key, value in {**before, **values, **after}.items() if value is not None}
        if not values.keys().isdisjoint(COLUMNS):
            raise ValueError(f"step of {self.stage} returned a name that the log keeps for itself: {sorted(values)}")
        self.run.append_metrics(record)
        return record

    def _checked_values(self) -> dict[str, Any]:
        """Averages since the last line. Raises NumericError on all processes if a value of any was not finite since the last check."""
        reading = self.meter.read()
        if reading.bad:
            name, it = min(reading.bad.items(), key=lambda item: item[1])
            raise self._numeric_error(f"Loss {name!r}", it)
        while len(self.names) > 1:  # the last one stays: weights that its gradients spoilt show in the next step's loss
            self.names.popleft()
        return reading.values

    def _numeric_error(self, what: str, it: int) -> NumericError:
        own = dict(self.names)
        gathered = distributed.gather_objects((own.get(it, []), own.get(it - 1, [])))
        at, before = ([name for part in gathered for name in part[i]][:NAMES_SHOWN] for i in (0, 1))
        paths = self.store.paths()
        good = f"Last good checkpoint: {paths[0]}." if paths else "There is no checkpoint of this stage yet."
        return numeric_error(self.stage, what, it, at, before, good)

    def _save(self) -> None:
        if self.saved == self.done:
            return
        self._checked_values()
        bad = first_not_finite(self.state.tensors())
        bad = next((name for name in distributed.gather_objects(bad) if name is not None), None)
        if bad is not None:
            raise self._numeric_error(f"After the update, {bad!r}", self.done - 1)
        if distributed.is_main():
            self.run.sync_metrics()
            meta = {
                "stage": self.stage,
                "settings": self.identity,
                "optimizers": self.state.optimizer_trees(),
                "meter": self.meter.state(),
                "seconds": self._seconds(),
                "peak_memory_bytes": self._peak(),
                "world_size": distributed.world_size(),
                "torch": torch.__version__,
            }
            self.store.save(self.done, self.state.tensors(), meta)
        self.saved = self.done

    def _stop(self, stop: StopRequest) -> None:
        with stop.held():
            if self.done > 0:
                self._save()
        distributed.barrier()  # a process that leaves early makes torchrun end the one that still writes
        where = f"its state is in {self.store.paths()[0]}" if self.store.paths() else "before its first step"
        raise Interrupted(
            f"Stopped by {stop.name} at step {self.done} of {self.stage}; {where}. Start the same command again to go on."
        )

    def interrupted(self, stop: StopRequest) -> NoReturn:
        """A second Ctrl-C: what it was in the middle of is not waited for. Several processes save nothing: one waits for the others."""
        with stop.held():
            if self.whole and self.done > 0 and distributed.world_size() == 1:
                self._save()
        paths = self.store.paths()
        where = f"the newest state is in {paths[0]}" if paths else "there was no state to save yet"
        raise Interrupted(
            f"Interrupted within step {self.done} of {self.stage}; {where}. Start the same command again to go on."
        )

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """The peak of every phase of the second step: the first one allocates what stays."""
        if self.done != self.resumed_from + 1:
            yield
            return
        peak_so_far = self._peak()
        with memory.recording(memory.PhasePeaks(self.device)) as recorder:
            yield
            recorder.close()
        self.phases = {name: recorder.peaks[name] for name in PHASES if name in recorder.peaks}
        self.peak_before = max(peak_so_far, *self.phases.values())

    def _out_of_memory(self, it: int, whole: bool) -> NoReturn:
        """`whole`: weights, optimisers and buffers are those before the step. Several processes save nothing: one of them hangs."""
        memory.release(self.device)
        if whole and it > 0 and distributed.world_size() == 1:
            self._save()
        paths = self.store.paths()
        saved = f"The newest state is in {paths[0]}" if paths else "There was no step to save yet"
        advice = memory.next_setting(self.settings, self.stage, self.device)
        raise OutOfMemory(f"Out of memory at step {it} of {self.stage} on {self.device}. {saved}. {advice}")

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _peak(self) -> int:
        return max(self.peak_before, memory.peak_bytes(self.device))


def batch_names(batch: Any) -> list[str]:
    """The file names of a batch: of its `names`, and of those inside tuples, lists and dicts of batches."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple) and not hasattr(batch, "names"):
        return [name for part in batch for name in batch_names(part)]
    return [str(name) for name in getattr(batch, "names", [])]
