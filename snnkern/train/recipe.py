"""Recipes: a training as a TOML file, read into frozen dataclasses.

A recipe names its data, model and neurons and lists its stages, which run one after another with the weights passed on.
An SNN that starts from one with fewer steps (TET's time inheritance training), with more (Dspike's) or from an ANN is
therefore nothing but a list of stages. The published ones are in the folder ``recipes``.

A mistake is a RecipeError, whose message begins with the key as one would override it: ``stage.0.epochs must be ...``.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import torch

try:
    from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError
    from pydantic_core import PydanticCustomError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("training needs pydantic: pip install 'snnkern[train]'") from error

from .. import data, models, nn, surrogate
from ..backend import choose
from ..methods.mtt import Sampler
from ..methods.tet import sdt, tet
from .folder import RecipeError

__all__ = ["FOLDER", "MTT", "Differences", "Loss", "Probe", "Recipe", "RecipeError", "Stage", "Temperature", "load",
           "override", "read", "recipes"]  # fmt: skip

FOLDER = Path(__file__).parents[1] / "recipes"
OPTIMISERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
NEURONS = ("LIF", "SmoothLIF", "IAF")  # of snnkern.nn


Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Listed = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value])  # one stands for a list


@dataclass(frozen=True)
class Loss:
    """A loss of ``snnkern.losses`` and the first epoch that uses it.

    Args:
        name: ``sdt`` or ``tet``.
        lamb, phi: of ``tet``.
        from_epoch: counted from 1.
    """

    name: Literal["sdt", "tet"]
    lamb: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    phi: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 1.0
    from_epoch: Count = 1

    def __call__(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sdt(outputs, target) if self.name == "sdt" else tet(outputs, target, self.lamb, self.phi)


@dataclass(frozen=True)
class Temperature:
    """Dspike's search before every epoch; see ``snnkern.methods.dspike.search``.

    Args:
        start: the first b; None: the one that the stage before ended with, else that of the neuron's surrogate.
        step: distance of the candidates, and the least temperature.
        eps: of the finite differences.
        batch: training samples that the search looks at.
    """

    start: Positive | None = None
    step: Positive = 0.2
    eps: Positive = 0.1
    batch: Count = 100


@dataclass(frozen=True)
class Probe:
    """How close the first layer's gradient is in direction to its finite differences (FDG): the cosine for every
    ``eps``, before each of the first ``iterations`` updates of every epoch.

    Source: Li et al., NeurIPS 2021, section 4.2 and figure 2.
    """

    eps: Annotated[tuple[Positive, ...], Listed, Field(min_length=1)] = (0.2, 0.1, 0.05, 0.01, 0.001)
    iterations: Count = 100


@dataclass(frozen=True)
class Differences:
    """The first layer follows its finite differences at distance ``eps``, all others their gradient.

    Source: Li et al., NeurIPS 2021, section 4.2 and table 1.
    """

    eps: Positive = 0.1


def _granularity(value):
    if value != "network" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PydanticCustomError("granularity", "Input should be a whole number from 1 up or 'network'")
    return value


@dataclass(frozen=True)
class MTT:
    """Mixed time-step training: ``samples`` temporal configurations for every batch, with one update; the stage's
    ``steps`` are their greatest T. ``low``, ``granularity``, ``monotone`` and ``first_fixed`` are those of
    ``snnkern.methods.mtt.Sampler``.

    ``calibration``: after every epoch, estimate the statistics of the batch norms anew from so many batches at the
    greatest T; 0: never, and the networks are tested with the mixture that is left of training, which is worth tens of
    points.
    """

    samples: Count = 3
    low: Count = 1
    granularity: Annotated[int | str, BeforeValidator(_granularity)] = 1
    monotone: Flag = False
    first_fixed: Flag = False
    calibration: Whole = 10


@dataclass(frozen=True)
class Stage:
    """Training with one number of steps, from an earlier stage's last weights or, if it is the first, from scratch.

    Args:
        epochs: passes over the training samples.
        optimiser: ``name`` (SGD, Adam, AdamW), ``lr`` and the other keywords of PyTorch's class.
        loss: those of the stage, by ``from_epoch``; one table or a list of them.
        network: ``snn``; ``ann`` is the same model with ReLU for the neurons.
        steps: T; 1 for an ANN. Frames are cut off after as many.
        schedule: of the learning rate from epoch to epoch: ``cosine`` or ``linear``, to 0, or ``constant``.
        inherit: the number, from 0, of the stage whose weights to start from; None: the one before.
        mtt: train with mixed time steps; ``"none"`` stands for None.
        temperature: search Dspike's temperature before every epoch.
        probe: measure the first layer's gradient against finite differences, in every epoch.
        differences: train the first layer by finite differences.
    """

    epochs: Count
    optimiser: dict
    loss: Annotated[tuple[Loss, ...], Listed]
    network: Literal["snn", "ann"] = "snn"
    steps: Count = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    inherit: Whole | None = None
    mtt: Annotated[MTT | None, BeforeValidator(lambda value: None if value == "none" else value)] = None
    temperature: Temperature | None = None
    probe: Probe | None = None
    differences: Differences | None = None

    def lr(self, epoch: int) -> float:
        """The learning rate after ``epoch`` epochs: a function of nothing else, so that resuming needs no state."""
        done = epoch / self.epochs
        factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.optimiser["lr"] * factor

    def criterion(self, epoch: int) -> Loss:
        return [loss for loss in self.loss if loss.from_epoch <= epoch + 1][-1]

    @property
    def sampler(self) -> Sampler | None:
        mtt = self.mtt
        return mtt and Sampler(mtt.low, self.steps, mtt.granularity, mtt.monotone, mtt.first_fixed)

    @property
    def passes(self) -> int:
        """Over every batch."""
        return self.mtt.samples if self.mtt else 1

    @property
    def cost(self) -> float:
        """Of an epoch: passes over the training samples times steps; with mixed time steps, the mean of those drawn."""
        return self.passes * (self.sampler.mean if self.mtt else self.steps)

    def make_optimiser(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        options = dict(self.optimiser)
        return OPTIMISERS[options.pop("name")](parameters, **options)


@dataclass(frozen=True)
class Recipe:
    """A training. ``seed`` sets everything random; None stands for each of ``range(seeds)`` in turn.

    Args:
        title, source: what it is, and where its numbers come from.
        data: ``name``, ``root`` and the options of ``snnkern.data.load``.
        model: ``name`` in ``snnkern.models.MODELS`` and keywords of that class; ``"none"`` stands for None.
        neuron: keywords of ``nn.LIF`` (``reset = "soft"`` for None) with ``surrogate = {name = ..., ...}``; ``kind``
            names another class. Left out: the model's own.
        batch: samples for one update, of all processes together.
        seeds: how many seeds make the result.
        test_steps: T at which the trained network is tested; default: 1 to the last stage's T.
        amp: ``bfloat16`` or ``float16``: autocast, for float16 with a scaled loss.
        accumulate: a batch is computed in so many parts, whose gradients add up. Batch norm sees one part at a time.
        packed: spikes kept for backward take 1 bit each.
        windows: frames go through the network in windows of so many steps, with the same gradients, and only one's
            activations are in memory; see ``nn.Windows``. 0: all at once.
        channels_last: how images lie in memory.
        compile: the model runs under ``torch.compile``.
        fused: batch norm and neurons run in one pass; false: one after the other.
        device: ``auto`` is the GPU, if there is one.
        backend: of the neurons; see ``snnkern.lif``.
        deterministic: only deterministic algorithms on a GPU, where equal runs otherwise differ in the last bits.
        threads: of the processor; 0: PyTorch's choice. The result depends on it in the last bits.
        workers: processes that load data. The result does not depend on it.
        tensorboard: metrics go to the run's folder ``tensorboard`` too.
        checkpoint_minutes: between checkpoints within an epoch; there is one after each epoch anyway.
    """

    title: str
    source: str
    data: dict
    model: dict
    stage: Annotated[tuple[Stage, ...], Listed]
    batch: Count
    neuron: dict = field(default_factory=dict)
    seed: Whole | None = None
    seeds: Count = 1
    test_steps: Annotated[tuple[Count, ...], Listed] = ()
    amp: Literal["off", "bfloat16", "float16"] = "off"
    channels_last: Flag = False
    compile: Flag = False
    accumulate: Count = 1
    packed: Flag = False
    windows: Whole = 0
    fused: Flag = True
    device: str = "auto"
    backend: str | None = None
    deterministic: Flag = False
    threads: Whole = 0
    workers: Whole = 0
    tensorboard: Flag = False
    checkpoint_minutes: Positive = 10.0

    def __post_init__(self) -> None:
        for name, kept in (("data", data.SETS), ("model", models.MODELS)):
            _choice(f"{name}.name", getattr(self, name).get("name"), kept)
        ours = "classes", "in_channels", "inputs", "size", "steps", "neuron", "backend", "fused"
        _keywords("model", _without_name(self.model), self._model_options(), ours)
        if not self.fused and "fused" not in self._model_options():
            raise RecipeError(f"fused must be true, as {self.model['name']} has no fused layers, got False")
        spiking = "neuron" in self._model_options()
        if self.neuron and not spiking:
            raise RecipeError(f"neuron must be left out, as {self.model['name']} has none, got {self.neuron}")
        _try("neuron", self.make_neuron())
        if self.accumulate > self.batch:
            raise RecipeError(f"accumulate must be at most batch, {self.batch}, got {self.accumulate}")
        if not self.stage:
            raise RecipeError("stage must be one [[stage]] table or more, got none")
        for index, stage in enumerate(self.stage):
            _check_stage(f"stage.{index}", index, stage)
            if stage.network == "snn" and not spiking:
                raise RecipeError(
                    f"stage.{index}.network must be 'ann', as {self.model['name']} has no neurons, got 'snn'"
                )
            if self.windows and (stage.mtt or self.compile):
                other = "compile" if self.compile else f"stage.{index}.mtt"
                raise RecipeError(f"windows must be 0 with {other}, got {self.windows}")
            if stage.mtt and self.compile:
                raise RecipeError(
                    f"compile must be false with stage.{index}.mtt, whose every t would be compiled, got True"
                )
        if self.test_steps != tuple(sorted(set(self.test_steps))):
            raise RecipeError(f"test_steps must be increasing, got {list(self.test_steps)}")

    def runs(self) -> list[Recipe]:
        """One recipe per seed."""
        return [replace(self, seed=seed) for seed in (range(self.seeds) if self.seed is None else [self.seed])]

    def cost(self, index: int, epoch: int) -> float:
        """Passes times steps, over the training samples, before that epoch of that stage."""
        return sum(stage.epochs * stage.cost for stage in self.stage[:index]) + epoch * self.stage[index].cost

    @property
    def total_cost(self) -> float:
        return self.cost(len(self.stage) - 1, self.stage[-1].epochs)

    def settings(self) -> dict:
        """As JSON has it: lists, not tuples."""
        return json.loads(json.dumps(asdict(self)))

    def load_data(self) -> data.Data:
        try:
            return data.load(**{"seed": self.seed or 0, **self.data})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"data: {error}") from error

    def check_backend(self, device_type: str) -> None:
        try:
            choose(device_type, torch.float32, self.backend)
        except (RuntimeError, ValueError) as error:
            raise RecipeError(f"backend: {error}") from error

    def make_model(self, index: int, classes: int, shape: tuple[int, ...]) -> torch.nn.Module:
        """The network of a stage, for ``classes`` and samples of this shape: [C, H, W], [T, C, H, W] or, as a
        sequence, [T, inputs]."""
        stage, allowed = self.stage[index], self._model_options()
        if (len(shape) == 2) != ("inputs" in allowed):
            wanted = "sequences [T, inputs]" if "inputs" in allowed else "images [C, H, W] or frames of them"
            raise RecipeError(f"model: {self.model['name']} takes {wanted}, {self.data['name']} has {tuple(shape)}")
        sizes = {"inputs": shape[-1]} if "inputs" in allowed else {"in_channels": shape[-3], "size": shape[-1]}
        options = {"classes": classes, "steps": stage.steps, **sizes}
        if stage.network == "ann":
            options["neuron"] = torch.nn.ReLU
        elif self.neuron:
            options["neuron"] = self.make_neuron()
        else:
            options["backend"] = self.backend
        given = _without_name(self.model)
        options |= {"fused": self.fused} | {key: None if value == "none" else value for key, value in given.items()}
        model = models.MODELS[self.model["name"]]
        if stage.mtt and not issubclass(model, models.Staged):
            raise RecipeError(f"stage.{index}.mtt needs a model in stages, {self.model['name']} is not")
        try:
            made = model(**{k: v for k, v in options.items() if k in allowed})
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(f"model: {error}") from error
        if self.windows and len(shape) == 3:
            raise RecipeError(f"windows must be 0 for static images, which have no frames, got {self.windows}")
        if self.windows:
            _try("windows", nn.Windows(made, self.windows).check)
        return made

    def make_neuron(self) -> Callable[[], torch.nn.Module]:
        options = dict(self.neuron)
        kind = _choice("neuron.kind", options.pop("kind", "LIF"), NEURONS)
        if "surrogate" in options:
            chosen = options["surrogate"]
            if not isinstance(chosen, dict):
                raise RecipeError(f"neuron.surrogate must be a table with a name, got {chosen!r}")
            names = [name for name in surrogate.__all__ if name[0].isupper() and name not in ("Surrogate", "Table")]
            cls = getattr(surrogate, _choice("neuron.surrogate.name", chosen.get("name"), names))
            _keywords("neuron.surrogate", _without_name(chosen), inspect.signature(cls).parameters)
            options["surrogate"] = _try("neuron.surrogate", partial(cls, **_without_name(chosen)))
        if options.get("reset") == "soft":
            options["reset"] = None
        cls = getattr(nn, kind)
        allowed = inspect.signature(cls).parameters
        _keywords("neuron", options, allowed, ("time_dim", "steps_out", "backend"))
        if "backend" in allowed:
            options["backend"] = self.backend
        return partial(cls, **options)

    def _model_options(self):
        return inspect.signature(models.MODELS[self.model["name"]]).parameters


TABLES = {"": Recipe, "stage": Stage, "loss": Loss, "mtt": MTT, "temperature": Temperature, "probe": Probe,
          "differences": Differences}  # fmt: skip
# Keys that are often given without the table that they belong to.
ELSEWHERE = {each.name: f"stage.{each.name}" for each in fields(Stage)} | {
    "lr": "stage.optimiser.lr",
    "lamb": "stage.loss.lamb",
    "phi": "stage.loss.phi",
    "from_epoch": "stage.loss.from_epoch",
}


def recipes() -> dict[str, Path]:
    """The recipes that come along, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def load(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of this name, or in the file of this path, with ``key=value`` overrides.

    Keys are dotted, as in ``stage.0.epochs=3``; without a number, as in ``stage.epochs=3``, it is all stages, and with
    ``stage.temperature.eps=0.2`` all that have a temperature. Values are TOML; what is not TOML is taken as a string.
    """
    path = recipes().get(name, Path(name))
    if path.suffix != ".toml" or not path.is_file():
        near = difflib.get_close_matches(name, recipes(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "snnkern train --list shows them"
        raise RecipeError(f"recipe must be the name of one or the path of a .toml file, got {name!r}; {hint}")
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    _override_all(table, overrides)
    return read(table)


def read(table: dict) -> Recipe:
    """The recipe in a table as TOML, or ``Recipe.settings``, gives it."""
    return _read(Recipe, table)


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with ``key=value`` overrides, as ``load`` takes them."""
    table = recipe.settings()
    _override_all(table, overrides)
    return read(table)


def _override_all(table: dict, overrides: Iterable[str]) -> None:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise RecipeError(f"an override must be key=value, got {text!r}")
        try:
            value = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # TOML's error is a ValueError
            pass
        _override(table, key.split("."), value, key)


def _override(table, keys: list[str], value, where: str) -> None:
    first, *rest = keys
    if isinstance(table, list) and not first.isdigit():
        having = table
        if rest and first in TABLES:  # a stage need not have what is changed in others, such as a temperature
            having = [item for item in table if isinstance(item, dict) and item.get(first) is not None]
        if not having:
            raise RecipeError(f"{where}: none of the {len(table)} has {first}; a number before it makes one, as in "
                              f"{where.replace(f'.{first}', f'.0.{first}', 1)}")  # fmt: skip
        for item in having:
            _override(item, keys, value, where)
        return
    if isinstance(table, list):
        if int(first) >= len(table):
            raise RecipeError(f"{where}: there are {len(table)}, counted from 0, got {first}")
        first = int(first)
    elif not isinstance(table, dict):
        raise RecipeError(f"{where} must be a key of the recipe: {table!r} has no key {first!r}")
    if rest:
        if isinstance(table, dict) and table.get(first) is None:
            table[first] = {}
        _override(table[first], rest, value, where)
    else:
        table[first] = value


def _read(kind, value, where: str = ""):
    """``value``, as TOML or JSON gives it, as a ``kind``: a type hint of the dataclasses above."""
    try:
        return _reader(kind).validate_python(value, extra="forbid")
    except ValidationError as error:
        found = error.errors(include_url=False)
    unknown = [each for each in found if each["type"] == "unexpected_keyword_argument"]
    first = (unknown or found)[0]  # where a key is misspelt, another is missing
    *inside, key = place = [*filter(None, [where]), *map(str, first["loc"])] or [""]
    if unknown:
        table = TABLES[next((name for name in reversed(inside) if name in TABLES), "")]
        _keywords(".".join(inside), {key: value}, [each.name for each in fields(table)])
    if first["type"] == "missing":
        raise RecipeError(f"{'.'.join(place)} is missing")
    if isinstance(cause := first.get("ctx", {}).get("error"), RecipeError):
        raise cause
    where, (start, _, wanted) = ".".join(place), first["msg"].partition("Input should be ")
    if start:
        raise RecipeError(f"{where}: {start}")
    _wrong(where, "a table" if first["type"] in ("dataclass_type", "dict_type") else wanted, first["input"])


@lru_cache
def _reader(kind) -> TypeAdapter:
    return TypeAdapter(kind)


def _wrong(where: str, wanted: str, value):
    raise RecipeError(f"{where} must be {wanted}, got {value!r}")


def _choice(where: str, value, allowed: Iterable[str]) -> str:
    return value if value in allowed else _wrong(where, f"one of {', '.join(allowed)}", value)


def _keywords(where: str, given: dict, allowed: Iterable[str], but: Iterable[str] = ()) -> None:
    allowed = [key for key in allowed if key not in but]
    for key in given:
        if key not in allowed:
            near = [ELSEWHERE[key]] if key in ELSEWHERE else difflib.get_close_matches(key, allowed, 1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(allowed)}"
            raise RecipeError(f"{where}{'.' * bool(where)}{key} is no key{hint}")


def _without_name(table: dict) -> dict:
    return {key: value for key, value in table.items() if key != "name"}


def _try(where: str, make: Callable):
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_stage(where: str, index: int, stage: Stage) -> None:
    name = _choice(f"{where}.optimiser.name", stage.optimiser.get("name"), OPTIMISERS)
    _keywords(
        f"{where}.optimiser",
        _without_name(stage.optimiser),
        inspect.signature(OPTIMISERS[name]).parameters,
        ("params",),
    )
    _read(Positive, stage.optimiser.get("lr"), f"{where}.optimiser.lr")
    _try(f"{where}.optimiser", lambda: stage.make_optimiser([torch.nn.Parameter(torch.zeros(1))]))
    starts = [loss.from_epoch for loss in stage.loss]
    if starts[:1] != [1] or starts != sorted(set(starts)):
        raise RecipeError(f"{where}.loss must begin with one from_epoch = 1 and go up, got {starts}")
    if stage.inherit is not None and stage.inherit >= index:
        raise RecipeError(f"{where}.inherit must be the number of a stage before, got {stage.inherit}")
    if stage.network == "ann" and stage.temperature is not None:
        raise RecipeError(f"{where}.temperature must be left out: an ann has no surrogate")
    if stage.mtt and (stage.network == "ann" or stage.differences):
        other = f"{where}.differences" if stage.differences else "an ann"
        raise RecipeError(f"{where}.mtt does not go with {other}: leave one of them out")
    if stage.mtt and stage.mtt.low > stage.steps:
        raise RecipeError(f"{where}.mtt.low must be at most steps, {stage.steps}, got {stage.mtt.low}")
