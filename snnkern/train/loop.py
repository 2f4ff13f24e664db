"""Training a recipe, stage by stage, in a folder that survives interruption.

On the CPU, with the same versions and numbers of threads and processes, a run that was interrupted, by Ctrl-C in the
middle of an epoch or by a power cut, and started again ends in the same weights, bit for bit, as one that was not: what
is random in a step is a function of the seed and of the step's place (``batches.py``), and a checkpoint holds the rest.
With other versions, another processor or other numbers it goes on too, and ends where rounding leads it.
"""

from __future__ import annotations

import math
import resource
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from ..methods import dspike, mtt
from ..nn import LIF, Windows
from ..ops.pack import packed_spikes
from ..surrogate import Dspike
from . import folder as runs
from .batches import Epoch, fetch, to_device
from .evaluation import test
from .folder import Interrupted, Request, RunError, State
from .processes import World, working
from .progress import Watch
from .recipe import Recipe, RecipeError

__all__ = ["State", "fit"]

LEAST_SCALE = 1e-4  # of float16's loss, as in fairseq: below it, gradients overflow whatever the scale


def fit(recipe: Recipe, folder: str | Path, watch: Watch | None = None) -> nn.Module:
    """Trains in ``folder``, or goes on where an earlier call stopped there; under torchrun, with the other processes.

    Ctrl-C, SIGTERM and a lost terminal are obeyed after the step under way, with a checkpoint; another Ctrl-C at once,
    without.

    Args:
        recipe: with a seed.
        watch: looks on; see ``snnkern.train.progress``.

    Returns: the network of the last stage, after its last epoch.

    Raises:
        RunError: the folder holds something else, another process trains in it, it cannot be written, its checkpoint
            is damaged, the loss is no longer finite, memory ran out, or a process that helps was killed.
        DataError: a sample cannot be read.
        RecipeError: the recipe does not go with its data, or with what is installed.
        Interrupted: on request.
    """
    if recipe.seed is None:
        raise ValueError("recipe must have a seed: Recipe.runs gives one recipe per seed")
    with working(recipe.device, recipe.threads, recipe.deterministic) as where, Request() as request:
        return _Training(recipe, Path(folder), where, request, watch or Watch()).run()


class _Training:
    def __init__(self, recipe: Recipe, folder: Path, where: World, request: Request, watch: Watch) -> None:
        self.recipe, self.folder, self.where, self.request, self.watch = recipe, folder, where, request, watch
        self.data, self.board, self.saved, self.state = recipe.load_data(), None, None, State()
        self.shown = self.kept = time.monotonic()
        self.whole = math.inf  # steps of an epoch
        self.passes: list[tuple[dict, float]] = []  # over the last batch: how the model was called, seconds

    def run(self) -> nn.Module:
        self.recipe.check_backend(self.where.device.type)
        with ExitStack() as until_the_end:
            if self.where.first:
                runs.safetensors()
                runs.prepared(self.folder)
                until_the_end.enter_context(runs.holding(self.folder))
                runs.claim(self.folder, self.recipe.settings())
                self.saved = runs.read_checkpoint(self.folder)
            self.saved = self.where.share(self.saved)
            if self.saved:
                self.state, self.saved = self.saved
                self._check_place()
            if self.where.first and self.recipe.tensorboard:
                self.board = until_the_end.enter_context(runs.board(self.folder, self.state.lines))
            self.watch.start(self.recipe, self.folder, self._cost())
            for stage in range(self.state.stage, len(self.recipe.stage)):
                if stage > self.state.stage:
                    self.state = State(stage, b=self.state.b, lines=self.state.lines)
                self._stage()
        return self.model

    def _check_place(self) -> None:
        """That of a checkpoint."""
        state, stages = self.state, self.recipe.stage
        with runs.whole(self.folder):
            if not (0 <= state.stage < len(stages) and 0 <= state.epoch <= stages[state.stage].epochs):
                raise ValueError(f"there is no epoch {state.epoch + 1} of stage.{state.stage}")
            steps, (_, _, samples) = len(self._plan(state.epoch).batches), state.sums
            if not 0 <= state.step <= steps or (state.step and not samples > 0):
                raise ValueError(f"there is no end of step {state.step} of {steps}, after {samples} samples")

    def _stage(self) -> None:
        recipe, state, where, data = self.recipe, self.state, self.where, self.data
        self.stage = stage = recipe.stage[state.stage]
        if data.events and stage.steps > data.shape[0]:
            raise RecipeError(
                f"stage.{state.stage}.steps must be at most the {data.shape[0]} frames, got {stage.steps}"
            )
        torch.manual_seed(recipe.seed)
        self.model = recipe.make_model(state.stage, data.classes, data.shape).to(where.device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if state.stage and not self.saved:
            source = state.stage - 1 if stage.inherit is None else stage.inherit
            weights = runs.load_weights(self._path(source, "last"))[0] if where.first else None
            self.model.load_state_dict(where.share(weights))
        self.optimiser = stage.make_optimiser(self.model.parameters())
        self.scaler = torch.amp.GradScaler(where.device.type, enabled=recipe.amp == "float16")
        if self.saved:
            with runs.whole(self.folder):
                for name in ("model", "optimiser", "scaler"):
                    getattr(self, name).load_state_dict(self.saved[name])
                _check_optimiser(stage, self.optimiser)
        elif stage.temperature and stage.temperature.start is not None:
            state.b = stage.temperature.start
        self.saved = None
        self._set_temperature()
        self.net = where.parallel(Windows(self.model, recipe.windows) if recipe.windows else self.model)
        if recipe.compile:
            self.net = torch.compile(self.net)
        for epoch in range(state.epoch, stage.epochs):
            self._epoch(epoch)
        self._save_weights("last")

    def _epoch(self, epoch: int) -> None:
        recipe, state, where, samples = self.recipe, self.state, self.where, len(self.data.train)
        lr, criterion = self.stage.lr(epoch), self.stage.criterion(epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        plan = self._plan(epoch)
        if not plan.batches:
            raise RecipeError(f"accumulate must be at most {samples // where.size} here, got {recipe.accumulate}")
        sums = torch.tensor(state.sums, dtype=torch.float64, device=where.device)
        self.sums = sums if where.first else torch.zeros_like(sums)
        self.whole = len(plan.batches)
        if self.stage.temperature and not state.step:
            self._search(criterion, plan)
        self.began, self.before = time.monotonic(), state.seconds
        self.net.train()
        parts = self._parts(plan, state.step, self.whole)
        for step in range(state.step, self.whole):
            batch = list(islice(parts, recipe.accumulate))
            self._step(criterion, batch, len(plan.batches[step]), plan.step_seeds[step])
            state.step = step + 1
            self._pause()
        self._finish(epoch, plan, lr, criterion)

    def _plan(self, *key) -> Epoch:
        least = self.where.size * self.recipe.accumulate  # so that no process gets an empty part
        return Epoch.of((self.recipe.seed, self.state.stage, *key), len(self.data.train), self.recipe.batch, least)

    def _parts(self, plan: Epoch, first: int, last: int):
        """(x, y) of this process's parts of the batches, as they come from the data set."""
        where, count = self.where, self.recipe.accumulate
        mine = [batch[where.rank :: where.size].tensor_split(count) for batch in plan.batches[first:last]]
        mine = [part for parts in mine for part in parts]
        return fetch(self.data.train, mine, plan.sample_seeds, self.recipe.workers)

    def _step(self, criterion, parts: list, size: int, seed: int) -> None:
        """One update. The gradients of a batch's parts, and of its temporal configurations, add up, and DDP averages
        over processes; hence the weights."""
        recipe, where = self.recipe, self.where
        differences = self._differences(criterion, parts, size)
        self.optimiser.zero_grad()
        timings, self.passes = self._timings(seed), []
        for part, (x, y) in enumerate(parts, start=1):
            x, y = self._to_device(x, y)
            torch.manual_seed(seed + where.rank * recipe.accumulate + part)  # after the samples, which have their own
            for timing in timings:
                began = time.monotonic()
                last = part == recipe.accumulate and timing is timings[-1]
                alone = self.net.no_sync() if where.size > 1 and not last else nullcontext()
                with alone, packed_spikes() if recipe.packed else nullcontext():
                    with where.autocast(recipe.amp):
                        outputs = self.net(x, **timing)
                        loss = criterion(outputs, y)
                    self.scaler.scale(loss * (len(y) * where.size / size)).backward()
                right = (outputs.detach().float().mean(0).argmax(-1) == y).sum()
                loss = loss.detach().double()
                self.sums += torch.stack((loss * len(y), right.double(), torch.full_like(loss, len(y))))
                self.passes.append((timing, time.monotonic() - began))
        if differences is not None:
            dspike.first_weight(self.model).grad = differences * self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _timings(self, seed: int) -> list[dict]:
        """How the model is called, once for every pass over a batch; the same in every process."""
        stage = self.stage
        if stage.mtt is None:
            return [{} if self.data.events else {"steps": stage.steps}]
        generator = torch.Generator().manual_seed(seed)
        return [{"t": stage.sampler.draw(self.model.n_stages, generator)} for _ in range(stage.passes)]

    def _calibrate(self, epoch: int) -> None:
        """The batch norms at the greatest T, from batches that the seed and the epoch settle."""
        recipe, stage = self.recipe, self.stage
        parts = self._parts(self._plan(epoch, "calibration"), 0, stage.mtt.calibration)
        steps = None if self.data.events else stage.steps
        with self.where.autocast(recipe.amp):
            mtt.calibrate(self.model, (self._to_device(x, y)[0] for x, y in parts), steps)

    def _differences(self, criterion, parts: list, size: int) -> torch.Tensor | None:
        """Of a batch before its update: measures for the stage's ``probe``; returns what its first layer is to follow
        in place of its gradient, if so."""
        stage, state, where = self.stage, self.state, self.where
        probed = stage.probe.eps if stage.probe and state.step < stage.probe.iterations else ()
        followed = (stage.differences.eps,) if stage.differences else ()
        parts = [self._to_device(*part) for part in parts] if probed or followed else []

        def of_all(function, *more) -> torch.Tensor:
            return where.sum(sum(function(self.model, *xy, criterion, *more) * (len(xy[1]) / size) for xy in parts))

        try:
            options = None, self._progress("differences")
            found = {e: of_all(dspike.finite_differences, e, *options) for e in dict.fromkeys((*probed, *followed))}
        except Interrupted:
            self._save()
            raise
        if probed:
            gradient = of_all(dspike.surrogate_gradient)
            before = state.cosines or [0.0] * len(probed)
            state.cosines = [c + dspike.cosine(gradient, found[e]) for c, e in zip(before, probed, strict=True)]
        return found[followed[0]] if followed else None

    def _pause(self) -> None:
        """Between two steps: whether to save, to stop, to show something."""
        now, state = time.monotonic(), self.state
        stop, save = self.where.any(self.request.stop, now - self.kept > 60 * self.recipe.checkpoint_minutes)
        if stop or save:
            self._save()
        if stop:
            raise Interrupted(self._place())
        if now - self.shown > self.watch.interval:
            self.shown = now
            loss, right, samples = self.sums.tolist()
            rate = min(state.step * self.recipe.batch, len(self.data.train)) / (self.before + now - self.began)
            numbers = {"loss": loss / samples, "accuracy": right / samples, "images_per_second": rate}
            if self.stage.mtt:
                numbers["passes"] = [(fmean(timing["t"]), seconds) for timing, seconds in self.passes]
            self.watch.step(self.recipe, state, self._cost(), numbers | {"memory": _memory(self.where.device)})

    def _finish(self, epoch: int, plan: Epoch, lr: float, criterion) -> None:
        state, stage, where = self.state, self.stage, self.where
        seconds = self.before + time.monotonic() - self.began
        loss, right, samples = self._summed()
        check = self._pause if where.size == 1 else lambda: None  # processes have unequal numbers of test batches
        if stage.mtt and stage.mtt.calibration:
            self._calibrate(epoch)
        tested = test(self.recipe, self.model, self.data, stage.steps, where, check)
        if not math.isfinite(tested.sdt[-1] + tested.tet[-1]):
            raise self._diverged("loss on the test data", tested.sdt[-1] + tested.tet[-1])
        state.accuracy = tested.accuracy[-1]
        if probe := stage.probe:
            count = min(probe.iterations, self.whole)
            state.found["probe"] = [[e, c / count] for e, c in zip(probe.eps, state.cosines, strict=True)]
        metrics = {
            "stage": state.stage,
            "epoch": epoch + 1,
            "network": stage.network,
            "steps": stage.steps,
            "lr": lr,
            "criterion": criterion.name,
            "loss": loss / samples,
            "train_accuracy": right / samples,
            "test_accuracy": state.accuracy,
            "test_sdt": tested.sdt[-1],
            "test_tet": tested.tet[-1],
            "accuracy_over_steps": tested.accuracy,
            "moments": tested.moments,
            **state.found,
            **self._drawn(plan),
            "images_per_second": samples / stage.passes / seconds,
            "seconds": seconds,
            "memory": _memory(where.device),
        }
        if where.first:
            metrics |= self.watch.measure(self.recipe, metrics, self.model)
        best = max(state.best, state.accuracy)
        if state.accuracy > state.best:
            self._save_weights("best", epoch + 1)
        if where.first:
            runs.add_metrics(self.folder, metrics)
            if self.board:
                runs.show_on(self.board, metrics, state.lines + 1)
        done = {"b": state.b, "accuracy": state.accuracy, "best": best, "lines": state.lines + 1}
        self.state = State(state.stage, epoch + 1, **done)
        self.sums.zero_()
        self.before, self.began = 0.0, time.monotonic()
        self._save()
        self.watch.epoch(self.recipe, metrics, self._cost())

    def _summed(self) -> list[float]:
        """Loss, right, samples in this epoch, of all processes; RunError where the loss is lost: no checkpoint then
        takes the place of a better one."""
        sums = self.where.sum(self.sums.clone()).tolist()
        if not math.isfinite(sums[0]):
            raise self._diverged("loss", sums[0] / sums[2])
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise self._diverged("scale of the loss, as gradients overflow float16,", self.scaler.get_scale())
        return sums

    def _diverged(self, what: str, value: float) -> RunError:
        amp = " or another amp" if self.recipe.amp == "float16" else ""
        return RunError(
            f"the {what} of epoch {self.state.epoch + 1} of stage.{self.state.stage} is {value:g}; try a smaller "
            f"lr{amp}, or look for data that is not finite (the checkpoint before it is kept)"
        )

    def _drawn(self, plan: Epoch) -> dict:
        """For the metrics of an epoch with mixed time steps: how many passes every batch had, the mean t_i, and the
        configurations of the first batch."""
        if self.stage.mtt is None:
            return {}
        drawn = [timing["t"] for seed in plan.step_seeds for timing in self._timings(seed)]
        passes = self.stage.passes
        return {"passes": passes, "mean_t": fmean(map(fmean, drawn)), "t": drawn[:passes]}

    def _search(self, criterion, plan: Epoch) -> None:
        """Dspike's algorithm 1, before every epoch, on the epoch's first samples; the same in every process."""
        state, settings, began = self.state, self.stage.temperature, time.monotonic()
        parts = fetch(self.data.train, [torch.cat(plan.batches)[: settings.batch]], plan.sample_seeds)
        x, y = self._to_device(*next(parts))

        width = _surrogate(self.model, state.stage).width
        options = {"b": state.b, "step": settings.step, "eps": settings.eps, "width": width}
        found = dspike.search(self.model, x, y, criterion, **options, progress=self._progress("search"))
        state.b = found.b
        state.found = {"b": found.b, "cosines": list(found.cosines.items()), "evaluations": found.evaluations}
        state.found["search_seconds"] = time.monotonic() - began
        self._set_temperature()

    def _progress(self, what: str):
        """Called among the forward passes of finite differences: whether to stop, to show something."""

        def progress(done: int, total: int) -> None:
            if self.request.stop and self.where.size == 1:
                raise Interrupted(self._place())
            if time.monotonic() - self.shown > self.watch.interval:
                self.shown = time.monotonic()
                self.watch.step(self.recipe, self.state, self._cost(), {what: done / total})

        return progress

    def _place(self) -> str:
        state = self.state
        return f"stage.{state.stage}, epoch {state.epoch + 1}, after step {state.step} of {self.whole}"

    def _set_temperature(self) -> None:
        if self.stage.temperature and self.state.b is None:
            self.state.b = _surrogate(self.model, self.state.stage).temperature
        if self.state.b is not None and self.stage.network == "snn":
            width = _surrogate(self.model, self.state.stage).width
            dspike.set_surrogate(self.model, Dspike(self.state.b, width))

    def _to_device(self, x, y):
        options = self.where.device, self.stage.steps, self.data.events, self.recipe.channels_last
        return to_device(x, y, *options)

    def _cost(self) -> float:
        return self.recipe.cost(self.state.stage, self.state.epoch + self.state.step / self.whole)

    def _save(self) -> None:
        """A checkpoint; all processes call it."""
        self.kept = time.monotonic()
        self.state.sums = self._summed()
        self.state.seconds = self.before + self.kept - self.began if self.state.step else 0.0
        if self.where.first:
            parts = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "scaler")}
            runs.save_checkpoint(self.folder, {"state": asdict(self.state), **parts})

    def _save_weights(self, which: str, epoch: int | None = None) -> None:
        state, data = self.state, self.data
        about = {"stage": state.stage, "epoch": epoch or state.epoch, "test_accuracy": state.accuracy}
        about |= {"classes": data.classes, "shape": list(data.shape), "recipe": self.recipe.settings()}
        if self.where.first:
            runs.save_weights(self._path(state.stage, which), self.model, about)

    def _path(self, stage: int, which: str) -> Path:
        return self.folder / f"stage{stage}-{which}.safetensors"


def _check_optimiser(stage, optimiser: torch.optim.Optimizer) -> None:
    """``load_state_dict`` does not look at what an optimiser holds of each parameter."""
    one = nn.Parameter(torch.zeros(1))
    one.grad, alike = torch.zeros(1), stage.make_optimiser([one])
    alike.step()
    for parameter, held in optimiser.state.items():
        wanted = alike.state[one]
        shapes = {name: value.shape for name, value in held.items() if isinstance(value, torch.Tensor)}
        fits = {name: parameter.shape if value.dim() else value.shape for name, value in wanted.items()
                if isinstance(value, torch.Tensor)}  # fmt: skip
        if held.keys() != wanted.keys() or shapes != fits:
            raise ValueError(f"the optimiser holds {shapes} of a parameter, where {fits} is wanted")


def _surrogate(model: nn.Module, stage: int) -> Dspike:
    for module in model.modules():
        if isinstance(module, LIF) and isinstance(module.settings["surrogate"], Dspike):
            return module.settings["surrogate"]
    raise RecipeError(f"stage.{stage}.temperature needs neurons of kind LIF with surrogate Dspike")


def _memory(device: torch.device) -> float:
    """The most that was in use until now, in GiB: of the GPU, or of this process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if used is None else used) / 2**30
