import math
import re

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from snnkern.data import SETS
from snnkern.methods.dspike import first_weight
from snnkern.nn import BNLIF, LIF, RecurrentLIF, SmoothLIF
from snnkern.surrogate import Dspike, Rectangle, Sigmoid, Triangle
from snnkern.train import fit
from snnkern.train.folder import read_metrics
from snnkern.train.recipe import RecipeError, load, override, read, recipes

# classes and shape of a sample
DATA = {
    "digits": (10, (1, 8, 8)),
    "digits-spikes": (10, (16, 1, 8, 8)),
    "mnist": (10, (1, 28, 28)),
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "imagenet": (1000, (3, 224, 224)),
    "dvs-cifar10": (10, (10, 2, 48, 48)),
    "n-caltech101": (101, (10, 2, 48, 48)),
    "sequential-digits": (10, (64, 1)),
    "sequential-mnist": (10, (784, 1)),
    "shd": (20, (100, 70)),
    "ssc": (35, (100, 70)),
    "n-mnist": (10, (16, 2, 34, 34)),
    "acsf1": (10, (1460, 1)),
    "basic-motions": (4, (100, 6)),
    "japanese-vowels": (9, (29, 12)),
}
DIGITS = [name for name in recipes() if name.startswith("digits-")]


def network(recipe, stage=0):
    with torch.device("meta"):
        return recipe.make_model(stage, *DATA[recipe.data["name"]])


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_short_and_makes_its_networks(name):
    assert len(recipes()[name].read_text().splitlines()) <= 40
    recipe = load(name)
    assert recipe.data["name"] in SETS and recipe.title and recipe.source
    names = [set(network(recipe, stage).state_dict()) for stage in range(len(recipe.stage))]
    assert all(each == names[0] for each in names)  # so that weights can be passed on
    for stage in recipe.stage:
        stage.make_optimiser([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("name", recipes())
def test_settings_read_back_are_the_recipe(name):
    recipe = load(name)
    settings = recipe.settings()
    assert read(settings) == recipe
    for stage in settings["stage"]:  # what runs from before these keys wrote
        assert stage.pop("differences") is None
        if stage["probe"] is None:
            del stage["probe"]
    assert read(settings) == recipe


def stages(name):
    """T (ANN: 0), epochs, learning rate of every stage."""
    return [(s.steps * (s.network == "snn"), s.epochs, s.optimiser["lr"]) for s in load(name).stage]


# Deng et al., appendix A.1; Li et al., sections 5.2 and 5.3; Du et al., A.1, A.2 and A.6
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tet-cifar10", [(2, 300, 0.01), (4, 50, 1e-4), (6, 50, 1e-4)]),
        ("tet-cifar100", [(2, 300, 0.01), (4, 50, 1e-4), (6, 50, 1e-4)]),
        ("tet-imagenet-sew34", [(4, 120, 0.1)]),
        ("tet-imagenet-resnet34", [(4, 90, 0.1), (6, 30, 1e-4)]),
        ("tet-dvs", [(10, 300, 1e-3)]),
        ("tet-dvs-plain", [(10, 300, 1e-3)]),
        ("dspike-cifar10", [(0, 300, 0.01), (6, 300, 0.01), (4, 50, 0.004), (2, 50, 0.004)]),
        ("dspike-cifar100", [(0, 300, 0.01), (6, 300, 0.01), (4, 50, 0.004), (2, 50, 0.004)]),
        ("dspike-cifar10-scratch", [(2, 300, 0.01)]),
        ("dspike-imagenet-resnet34", [(6, 100, 0.04)]),
        ("dspike-imagenet-vgg16", [(5, 100, 0.04)]),
        ("dspike-dvs", [(0, 300, 0.01), (10, 300, 0.01)]),
        ("dspike-fig2", [(6, 5, 0.01)]),
        ("dspike-table1", [(6, 10, 0.01)]),
        ("mtt-cifar10", [(6, 300, 0.1)]),
        ("mtt-cifar100", [(6, 300, 0.1)]),
        ("mtt-resnet18", [(6, 300, 0.1)]),
        ("mtt-vgg14", [(5, 300, 0.1)]),
        ("mtt-bresnet50", [(4, 100, 0.1)]),
        ("mtt-bresnet72", [(4, 100, 0.1)]),
        ("mtt-imagenet", [(6, 160, 0.004)]),
        ("mtt-dvs", [(10, 300, 0.1)]),
        ("mtt-ncaltech101", [(10, 300, 0.1)]),
        ("mtt-shd", [(100, 150, 0.001)]),
        ("mtt-ssc", [(100, 60, 0.001)]),
    ],
)
def test_published_stages(name, wanted):
    assert stages(name) == wanted


def test_published_numbers():
    lamb = {name: {loss.lamb for s in load(name).stage for loss in s.loss} for name in recipes() if "tet-" in name[:4]}
    assert lamb["tet-cifar10"] == lamb["tet-cifar100"] == {0.05}
    assert (
        lamb["tet-dvs"]
        == lamb["tet-dvs-plain"]
        == lamb["tet-imagenet-sew34"]
        == lamb["tet-imagenet-resnet34"]
        == {0.001}
    )
    assert lamb["tet-table1-tet"] == {0.0}
    for name in ("tet-imagenet-sew34", "tet-imagenet-resnet34"):
        assert load(name).stage[0].optimiser == {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 4e-5}
    assert load("tet-dvs-plain").stage[0].optimiser["weight_decay"] == 5e-4
    assert "weight_decay" not in load("tet-dvs").stage[0].optimiser
    for name in recipes():
        if name.startswith("dspike-") and load(name).data["name"] != "mnist":
            decay = {s.optimiser["weight_decay"] for s in load(name).stage}
            assert decay == ({4e-5} if "imagenet" in name else {1e-4})
            searched = [s.temperature for s in load(name).stage if s.network == "snn"]
            assert all((t.step, t.eps) == (0.2, 0.1) for t in searched) and searched[0].start == 1.0
    assert load("dspike-imagenet-vgg16").batch == load("dspike-imagenet-resnet34").batch == 320
    for name in recipes():
        said = re.search(r"([\d,]+) forward passes", recipes()[name].read_text())
        weights = first_weight(network(load(name), -1)).numel()
        assert not said or int(said[1].replace(",", "")) == 2 * weights
    # A T = 6 network by inheritance costs half of one from scratch: 900 of 1800.
    recipe = load("tet-cifar100")
    assert [s.inherit for s in recipe.stage] == [None, 0, 0]
    assert recipe.total_cost - recipe.stage[1].epochs * recipe.stage[1].steps == 900


def test_mixed_time_steps_are_those_published():
    """Du et al., A.2: three samples, from T = 1 up, every block a stage; the batches; calibration on 10 of them."""
    batches = {"mtt-dvs": 50, "mtt-ncaltech101": 50, "mtt-imagenet": 512}
    for name in recipes():
        if name == "mtt-nmnist":  # not published
            continue
        if name.startswith("mtt-") and load(name).data["name"] in DATA and len(DATA[load(name).data["name"]][1]) > 2:
            stage = load(name).stage[0]
            assert (stage.passes, stage.sampler.low, stage.sampler.granularity) == (3, 1, 1)
            assert stage.mtt.calibration == 10 and load(name).batch == batches.get(name, 256)
            assert {lif.settings["decay"] for lif in neurons(load(name))} == {0.5}


def test_sequences_are_those_published():
    """Du et al., A.12: widths, tau and the number of inputs; the first stage at every step, later ones at no more."""
    for name, sizes, decay in (
        ("mtt-seqmnist", (1, 64, 64, 10), 0.99),
        ("mtt-shd", (70, 128, 128, 128, 20), 0.9753),
        ("mtt-ssc", (70, 128, 128, 128, 35), 0.9753),
        ("digits-sequence-mtt", (1, 64, 64, 10), 0.99),
    ):
        recipe = load(name)
        made, sampler = network(recipe), recipe.stage[0].sampler
        linear = [module for module in made.modules() if isinstance(module, torch.nn.Linear)]
        assert (linear[0].in_features, *(layer.out_features for layer in linear)) == sizes
        assert {lif.settings["decay"] for lif in neurons(recipe)} == {decay}
        assert sampler.monotone and sampler.first_fixed and sampler.high == DATA[recipe.data["name"]][1][0]
        assert load(name, ["stage.mtt=none"]).stage[0].mtt is None
    assert override(load("digits-sequence-sdt"), ["title=x", "source=x"]) == load(
        "digits-sequence-mtt", ["stage.mtt=none", "title=x", "source=x"]
    )
    rnn = network(load("mtt-seqmnist-rnn")).rnn
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (1, 64, 2)


def test_long_sequences_have_the_networks_of_their_papers():
    """Cramer et al., time constants of 20 and 10 ms; Yin et al., two layers of 400; both of all channels."""
    for name, widths, step, synapse, threshold in (
        ("long-shd", [128], 1.4, 10, None),
        ("long-ssc", [400, 400], 4.0, None, 150),
    ):
        recipe = load(name)
        assert recipe.data["channels"] == 700 and recipe.stage[0].steps == recipe.data["steps"]
        assert 1000 * recipe.data["window"] / recipe.data["steps"] == step
        decays = {"decay": 20, "synapse_decay": synapse, "threshold_decay": threshold}
        wanted = {key: round(math.exp(-step / tau), 4) for key, tau in decays.items() if tau}
        with torch.device("meta"):
            made = recipe.make_model(0, DATA[recipe.data["name"]][0], (recipe.stage[0].steps, 700))
        layers = [module for module in made.modules() if isinstance(module, RecurrentLIF)]
        assert [layer.features for layer in layers] == widths
        for layer in layers:
            assert {key: layer.settings[key] for key in decays if key in layer.settings} == wanted
    plain = network(load("long-shd", ["model.recurrent=false"]))
    assert not any(isinstance(module, RecurrentLIF) for module in plain.modules())
    for name in recipes():
        if name.startswith("long-"):
            assert load(name).stage[0].steps == load(name).data.get("steps", DATA[load(name).data["name"]][1][0])
    with pytest.raises(RecipeError, match="model: neuron must make a LIF where recurrent is True, got ReLU"):
        network(load("long-digits", ["stage.network=ann"]))


def neurons(recipe, stage=0):
    kinds = LIF, SmoothLIF
    return [module for module in network(recipe, stage).modules() if isinstance(module, kinds)]


def test_neurons_are_those_of_the_recipe():
    for name, decay, threshold, surrogate in (
        ("tet-cifar10", 0.5, 1.0, Triangle(1.0)),
        ("tet-imagenet-sew34", 1.0, 1.0, Triangle(1.0)),
        ("dspike-fig2", 0.25, 0.5, Rectangle(1.0)),
        ("dspike-cifar10-scratch", 0.25, 0.5, Dspike(1.0)),
    ):
        for lif in neurons(load(name)):
            assert (lif.settings["decay"], lif.settings["threshold"]) == (decay, threshold)
            assert lif.settings["surrogate"] == surrogate
    published = {"detach_reset": True, "fire_at_threshold": True}  # what SEW's code has, and no other
    for name in ("tet-imagenet-sew34", "tet-imagenet-resnet34"):
        for lif in neurons(load(name)):
            assert {key: lif.settings[key] for key in published} == (
                published if "sew" in name else dict.fromkeys(published, False)
            )
    assert {lif.spec.surrogate for lif in neurons(load("tet-table2-smooth"))} == {Sigmoid(10.0)}
    assert {lif.settings["reset"] for lif in neurons(load("digits-tet", ["neuron.reset=soft"]))} == {None}
    assert {lif.settings["backend"] for lif in neurons(load("digits-tet", ["backend=reference"]))} == {"reference"}
    fused = [sum(isinstance(m, BNLIF) for m in network(load("digits-tet", [f"fused={flag}"])).modules())
             for flag in ("true", "false")]  # fmt: skip
    assert fused == [6, 0]
    assert not neurons(load("dspike-cifar10"), 0) and len(neurons(load("dspike-cifar10"), 1)) == 19


@pytest.mark.parametrize("name", DIGITS)
def test_digits_recipes_run(tmp_path, name):
    recipe = load(name, ["seed=0", "stage.epochs=1", "data.train=40", "batch=20"])
    recipe = override(recipe, [f"stage.{i}.temperature.batch=4" for i, s in enumerate(recipe.stage) if s.temperature])
    fit(recipe, tmp_path)
    metrics = read_metrics(tmp_path)
    assert [line["stage"] for line in metrics] == list(range(len(recipe.stage)))
    assert all(
        ("b" in line) == (stage.temperature is not None) for line, stage in zip(metrics, recipe.stage, strict=True)
    )


def test_schedules():
    assert load("digits-tet").stage[0].lr(0) == 0.002
    for schedule, wanted in (("cosine", [1.0, 0.75, 0.25]), ("linear", [1.0, 2 / 3, 1 / 3]), ("constant", [1.0] * 3)):
        stage = load("digits-tet", [f"stage.schedule={schedule}", "stage.epochs=3"]).stage[0]
        assert [stage.lr(epoch) / 0.002 for epoch in range(3)] == pytest.approx(wanted)


def test_switch_of_the_loss():
    stage = load("tet-fig3-switch").stage[0]
    assert [stage.criterion(epoch - 1).name for epoch in (1, 200, 201, 300)] == ["sdt", "sdt", "tet", "tet"]


def test_overrides():
    recipe = load("tet-cifar10", ["stage.epochs=3", "stage.1.loss.lamb=0", "data.root=/data", "amp=bfloat16", "seed=7"])
    assert [stage.epochs for stage in recipe.stage] == [3, 3, 3]
    assert [stage.loss[0].lamb for stage in recipe.stage] == [0.05, 0.0, 0.05]
    assert (recipe.data["root"], recipe.amp) == ("/data", "bfloat16")
    assert [run.seed for run in recipe.runs()] == [7]
    assert [run.seed for run in load("tet-cifar10", ["seeds=2"]).runs()] == [0, 1]
    assert network(load("tet-cifar10", ["model.hidden=none"])).head.in_features == 512
    recipe = load("dspike-cifar10", ["stage.temperature.eps=0.2"])  # the ann has none, and gets none
    assert [stage.temperature and stage.temperature.eps for stage in recipe.stage] == [None, 0.2, 0.2, 0.2]
    assert override(recipe, ["stage.temperature.eps=0.1"]) == load("dspike-cifar10")
    made = override(recipe, ["stage.0.probe.iterations=3", "stage.0.differences.eps=0.2"]).stage
    assert made[0].probe.iterations == 3 and made[0].differences.eps == 0.2 and made[1].probe is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs=3", "epochs is no key, did you mean stage.epochs?"),
        ("stage.0.epoch=3", "stage.0.epoch is no key, did you mean epochs?"),
        ("stage.0.epochs=-1", "stage.0.epochs must be greater than or equal to 1, got -1"),
        ("stage.0.epochs=1.5", "stage.0.epochs must be a valid integer, got 1.5"),
        ("stage.0.epochs=true", "stage.0.epochs must be a valid integer, got True"),
        ("stage.3.epochs=1", "stage.3.epochs: there are 1, counted from 0, got 3"),
        ("stage.0.network=cnn", "stage.0.network must be 'snn' or 'ann', got 'cnn'"),
        ("stage.0.inherit=0", "stage.0.inherit must be the number of a stage before, got 0"),
        ("stage.0.optimiser.lr=0", "stage.0.optimiser.lr must be greater than 0, got 0"),
        ("stage.0.optimiser.name=LBFGS", "stage.0.optimiser.name must be one of SGD, Adam, AdamW, got 'LBFGS'"),
        ("stage.0.optimiser.momentum=0.9", "stage.0.optimiser.momentum is no key"),
        ("stage.0.optimiser.weight_decay=-1", "stage.0.optimiser: Invalid weight_decay value: -1"),
        ("stage.0.schedule=step", "stage.0.schedule must be 'cosine', 'linear' or 'constant', got 'step'"),
        ("stage.0.loss.name=mse", "stage.0.loss.0.name must be 'sdt' or 'tet', got 'mse'"),
        ("stage.0.loss.lamb=1.1", "stage.0.loss.0.lamb must be less than or equal to 1, got 1.1"),
        ("stage.0.loss.from_epoch=2", "stage.0.loss must begin with one from_epoch = 1 and go up, got [2]"),
        ("stage.0.temperature.eps=0", "stage.0.temperature.eps must be greater than 0, got 0"),
        ("stage.0.temperature.eps=inf", "stage.0.temperature.eps must be a finite number, got inf"),
        ("stage.temperature.eps=0.2", "stage.temperature.eps: none of the 1 has temperature; a number before it makes "
         "one, as in stage.0.temperature.eps"),
        ("stage.0.temperature=3", "stage.0.temperature must be a table, got 3"),
        ("stage.0.temperature.stop=3", "stage.0.temperature.stop is no key, did you mean step?"),
        ("stage.0.probe.eps=[]", "stage.0.probe.eps: Value should have at least 1 item"),
        ("stage.0.probe.eps=[0.1, -1]", "stage.0.probe.eps.1 must be greater than 0, got -1"),
        ("lamb=0.1", "lamb is no key, did you mean stage.loss.lamb?"),
        ("lr=0.1", "lr is no key, did you mean stage.optimiser.lr?"),
        ("stage.loss={}", "stage.0.loss.0.name is missing"),
        ("packed=1", "packed must be a valid boolean, got 1"),
        ("windows=-1", "windows must be greater than or equal to 0, got -1"),
        ("model=CNN6", "model must be a table, got 'CNN6'"),
        ("test_steps.a.b=1", "test_steps.a.b must be a key of the recipe: 1 has no key 'a'"),
        ("stage.los.lamb=1", "stage.0.los is no key, did you mean loss?"),
        ("stage=[]", "stage must be one [[stage]] table or more, got none"),
        ("model.name=ResNet20", "model.name must be one of CNN6, "),
        ("model.stem=3", "model.stem is no key"),
        ("neuron.kind=IF", "neuron.kind must be one of LIF, SmoothLIF, IAF, got 'IF'"),
        ("neuron.tua=2", "neuron.tua is no key, did you mean tau?"),
        ("neuron.decay=2", "neuron: decay must be in [0, 1], got 2"),
        ("neuron.surrogate=Triangle", "neuron.surrogate must be a table with a name, got 'Triangle'"),
        ("neuron.surrogate.name=Tent", "neuron.surrogate.name must be one of "),
        (
            "neuron.surrogate.gamma=-1",
            "neuron.surrogate: Triangle: gamma must be positive and finite in float32, with its inverse, got -1",
        ),
        ("data.name=svhn", "data.name must be one of digits, "),
        ("amp=half", "amp must be 'off', 'bfloat16' or 'float16', got 'half'"),
        ("accumulate=61", "accumulate must be at most batch, 60, got 61"),
        ("test_steps=[2, 1]", "test_steps must be increasing, got [2, 1]"),
        ("title=3", "title must be a valid string, got 3"),
        ("batch", "an override must be key=value, got 'batch'"),
        ("batch.size=3", "batch.size must be a key of the recipe: 60 has no key 'size'"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(change, message):
    with pytest.raises(RecipeError) as error:
        load("digits-tet", [change])
    assert str(error.value).startswith(message)


def test_mistakes_that_the_data_show():
    with pytest.raises(RecipeError, match="data: digits has no option 'nois'"):
        load("digits-tet", ["data.nois=1"]).load_data()
    with pytest.raises(RecipeError, match="data: noise must be a finite number, not negative, got -1"):
        load("digits-tet", ["data.noise=-1"]).load_data()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "digits-sdt",
            ["model.name=SpikingMLP"],
            r"model: SpikingMLP takes sequences \[T, inputs\], digits has \(1, 8,",
        ),
        (
            "digits-sequence-sdt",
            ["model={name='CNN6'}"],
            r"model: CNN6 takes images .*, sequential-digits has \(64, 1\)",
        ),
        ("digits-sequence-rnn", ["stage.network=snn"], "stage.0.network must be 'ann', as VanillaRNN has no neurons"),
        ("digits-sequence-rnn", ["neuron.decay=0.5"], "neuron must be left out, as VanillaRNN has none, got"),
        ("digits-sdt", ["windows=2"], "windows must be 0 for static images, which have no frames, got 2"),
        ("digits-sequence-sdt", ["windows=8"], "windows: model must have batch norm in eval mode .* got BNLIF"),
        ("digits-sequence-mtt", ["windows=8"], "windows must be 0 with stage.0.mtt, got 8"),
        ("digits-sequence-sdt", ["windows=8", "compile=true"], "windows must be 0 with compile, got 8"),
        ("digits-sequence-sdt", ["model.inputs=3"], "model.inputs is no key; there are hidden, decay, norm"),
    ],
)
def test_mistakes_that_the_model_shows(name, changes, message):
    with pytest.raises(RecipeError, match=message):
        network(load(name, changes))


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(recipes()["digits-tet"].read_text())
    assert load(str(path)) == load("digits-tet")
    path.write_text("title = ")
    with pytest.raises(RecipeError, match=r"mine.toml is not TOML"):
        load(str(path))
    path.write_text('title = "x"')
    with pytest.raises(RecipeError, match="source is missing"):
        load(str(path))
    with pytest.raises(RecipeError, match="did you mean digits-"):
        load("digits-tets")
