import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

import snnkern
from snnkern import train as training
from snnkern.cli import app
from snnkern.compare import compare, table
from snnkern.data import digits
from snnkern.models import CNN6
from snnkern.runs import RunError, read_metrics
from snnkern.train import Settings, evaluate, fit

SMALL = Settings(epochs=5, train=200, batch=50)
TINY = ["--epochs", "2", "--batch", "300", "--steps", "2", "--seeds", "1"]


def learnt(folder):
    timing = ("images_per_second", "seconds")
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(folder)]


def interrupt_after(epoch):
    def on_epoch(settings, metrics):
        if metrics["epoch"] == epoch:
            raise KeyboardInterrupt

    return on_epoch


def interrupt_at_call(monkeypatch, owner, name, call, action=lambda *args: None):
    """Makes ``owner.name`` raise KeyboardInterrupt at its ``call``-th call, after ``action`` on its arguments."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action(*args)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of SMALL that nothing interrupted: its folder and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(SMALL, folder)


def assert_same_end(folder, whole):
    ours, theirs = load_file(folder / "model.safetensors"), load_file(whole[0] / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert learnt(folder) == learnt(whole[0])
    ours, theirs = (torch.load(place / "checkpoint.pt") for place in (folder, whole[0]))
    for step, state in ours["optimiser"]["state"].items():
        assert all(torch.equal(value, theirs["optimiser"]["state"][step][key]) for key, value in state.items())
    assert ours["schedule"] == theirs["schedule"]
    assert torch.equal(ours["shuffle"], theirs["shuffle"])


def test_digits():
    (x, y), (test_x, test_y) = digits(seed=1)
    assert x.shape == (600, 1, 8, 8) and y.shape == (600,) and test_x.shape == (597, 1, 8, 8) and test_y.shape == (597,)
    assert x.mean().abs() < 1e-6 and (x.std() - 1).abs() < 1e-6
    assert torch.equal(digits(seed=1)[0][0], x) and not torch.equal(digits(seed=2)[0][1], y)
    (fewer, _), (_, same) = digits(seed=1, train=100)
    assert len(fewer) == 100 and torch.equal(same, test_y)
    (clean, _), _ = digits(seed=1, noise=0.0)
    assert len(clean.unique()) == 17
    with pytest.raises(ValueError, match="train must be between 1 and 1200, got 1201"):
        digits(train=1201)


def test_cnn6_takes_a_static_image_as_equal_frames():
    torch.manual_seed(0)
    model, again = CNN6(steps=3), CNN6(steps=3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 1, 8, 8)
    static, frames = model(x), again(x.expand(3, 5, 1, 8, 8))
    assert static.shape == (3, 5, 10)
    torch.testing.assert_close(static, frames)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], msg=name)
    model.eval()
    torch.testing.assert_close(model(x, 7)[:2], model(x, 2))
    with pytest.raises(ValueError, match="steps must be None or the number of frames, 3, got 4"):
        model(x.expand(3, 5, 1, 8, 8), 4)
    with pytest.raises(ValueError, match=r"x must be .*got shape \(5, 1, 8, 9\)"):
        model(torch.zeros(5, 1, 8, 9))


def test_evaluate_averages_over_time_and_judges_single_moments():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, steps):
            assert not self.training
            return torch.stack([torch.stack([x, -2 * x], -1), torch.stack([x, 5 * x], -1)])[:steps]

    # Step 1 says class 0 where x > 0, step 2 says class 1 there; the mean over both says class 1 (1.5 x against x).
    model, data = Fixed(), (torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tested = evaluate(model, data, steps=2)
    assert tested.accuracy == [0.75, 0.25]
    assert tested.moments == [0.75, 0.25]
    assert tested.tet > tested.sdt > 0
    assert model.training


@pytest.mark.parametrize("loss", ["sdt", "tet"])
def test_training_learns(tmp_path, loss):
    fit(Settings(loss=loss, epochs=10), tmp_path)
    metrics = read_metrics(tmp_path)
    assert [line["epoch"] for line in metrics] == list(range(1, 11))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["train_accuracy"] > 0.75
    assert metrics[-1]["test_accuracy"] > 0.6
    assert all(line["images_per_second"] > 0 for line in metrics)


def test_folder_of_a_run(whole):
    folder, model = whole
    held = json.loads((folder / "settings.json").read_text())
    assert Settings(**held["settings"]) == SMALL
    assert held["versions"]["torch"] == torch.__version__
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    (group,) = torch.load(folder / "checkpoint.pt")["optimiser"]["param_groups"]
    assert group["initial_lr"] == SMALL.lr and group["lr"] == pytest.approx(0, abs=1e-9)  # the cosine has ended
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "metrics.jsonl",
        "model.safetensors",
        "settings.json",
    ]


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_resume_is_bit_for_bit(tmp_path, whole, epoch):
    with pytest.raises(KeyboardInterrupt):
        fit(SMALL, tmp_path, interrupt_after(epoch))
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == epoch
    torch.manual_seed(epoch)  # neither the caller's generator
    torch.set_num_threads(2)  # nor the caller's threads matter
    seen = []
    fit(SMALL, tmp_path, lambda settings, metrics: seen.append(metrics["epoch"]))
    assert seen == list(range(epoch + 1, 6))
    assert torch.get_num_threads() == 2
    assert_same_end(tmp_path, whole)


def test_interrupt_within_an_epoch_keeps_the_last_finished_one(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, training.losses, "tet", 15)  # 4 training batches and 1 test an epoch
        with pytest.raises(KeyboardInterrupt):
            fit(SMALL, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 2
    fit(SMALL, tmp_path)
    assert_same_end(tmp_path, whole)


def test_interrupt_while_writing_a_checkpoint_keeps_the_one_before(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, torch, "save", 3, lambda state, file: file.write(b"half"))
        with pytest.raises(KeyboardInterrupt):
            fit(SMALL, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 2
    assert len(read_metrics(tmp_path)) == 3
    fit(SMALL, tmp_path)
    assert_same_end(tmp_path, whole)


def test_fitting_again_changes_nothing(tmp_path, whole):
    fit(SMALL, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    fit(SMALL, tmp_path, interrupt_after(5))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_damaged_checkpoint_is_named_and_left_alone(tmp_path, keep):
    with pytest.raises(KeyboardInterrupt):
        fit(SMALL, tmp_path, interrupt_after(1))
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"checkpoint.pt is damaged .* move it away"):
        fit(SMALL, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_with_something_else_is_refused(tmp_path, whole):
    before = {path: path.read_bytes() for path in whole[0].iterdir()}
    with pytest.raises(RunError, match=r"other settings \(lr 0.002 there, 0.1 here\); choose another folder"):
        fit(replace(SMALL, lr=0.1), whole[0])
    assert {path: path.read_bytes() for path in whole[0].iterdir()} == before
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match="is not empty and is not a run's folder"):
        fit(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_infinite_loss_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"the loss of epoch \d is (nan|inf); try a smaller lr"):
        fit(replace(SMALL, lr=3e37), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mse"}, "loss must be one of sdt, tet, got 'mse'"),
        ({"steps": 0}, "steps must be a whole number from 1 up, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lamb": 1.1}, r"lamb must be in \[0, 1\], got 1.1"),
        ({"noise": -1.0}, "noise must be finite and not negative"),
    ],
)
def test_settings_name_the_bad_value(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_compare_pairs_by_seed(tmp_path):
    runs = [replace(SMALL, epochs=1, loss=loss, seed=seed) for loss in ("sdt", "tet") for seed in (0, 1, 2)]
    results = compare(runs, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    values = {(run["loss"], run["seed"]): run["test_tet"] for run in results["runs"]}
    assert len(set(values.values())) == 6
    differences = [values["tet", seed] - values["sdt", seed] for seed in (0, 1, 2)]
    row = next(row for row in results["rows"] if row["measure"] == "TET loss, test")
    assert row["difference"]["mean"] == pytest.approx(sum(differences) / 3)
    assert row["difference"]["positive"] == sum(difference > 0 for difference in differences)
    variance = sum((difference - row["difference"]["mean"]) ** 2 for difference in differences) / 2
    assert row["difference"]["sd"] == pytest.approx(variance**0.5)
    _, rows = table(results)
    assert {"accuracy at T = 1, %", "accuracy at T = 4, %", "accuracy at T = 32, %"} < {row[0] for row in rows}
    assert len((tmp_path / "results.md").read_text().splitlines()) == len(rows) + 2
    with pytest.raises(ValueError, match="runs must differ in loss and seed alone"):
        compare(runs[:-1], tmp_path)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_doctor():
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["snnkern"] == snnkern.__version__ and report["torch"] == torch.__version__
    assert report["backends"]["reference"] == "ok" and set(report["backends"]) == set(snnkern.backends())
    text = invoke("doctor").stdout
    assert all(f"backend {name}" in text for name in report["backends"]) and "instruction set" in text


def test_train_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke("train", *TINY, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "TET - SDT" in result.stdout and "accuracy at T = 2, %" in result.stdout
    result = invoke("plot", tmp_path)
    assert result.exit_code == 0, result.output
    for name in ("epochs", "steps", "moments"):
        picture = tmp_path / f"accuracy_{name}.png"
        assert str(picture) in result.stdout
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    again = invoke("train", *TINY[:-4], "--steps", "3", "--out", tmp_path)
    assert again.exit_code == 1 and "other settings (steps 2 there, 3 here)" in again.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, training, "train_epoch", 2)
        result = invoke("train", *TINY, "--loss", "tet", "--out", tmp_path)
    assert result.exit_code == 130
    assert "The same command goes on from there" in result.stderr
    assert torch.load(tmp_path / "tet-seed0" / "checkpoint.pt")["epoch"] == 1
    assert invoke("train", *TINY, "--loss", "tet", "--out", tmp_path).exit_code == 0
    assert [line["epoch"] for line in read_metrics(tmp_path / "tet-seed0")] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "--loss", "hinge"], "--loss"),
        (["train", "--lr", "-1"], "--lr"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--seeds", "0"], "--seeds"),
        (["train", "--backend", "abacus"], "--backend"),
        (["train", "--device", "abacus"], "--device"),
    ],
)
def test_bad_option_is_named(tmp_path, arguments, option):
    result = invoke(*arguments, "--out", tmp_path / "never")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert option in result.stderr.splitlines()[-1] and "Traceback" not in result.output
    assert not (tmp_path / "never").exists()


def test_plot_of_an_unfinished_training(tmp_path):
    result = invoke("plot", tmp_path)
    assert result.exit_code == 1 and "not the folder of a finished" in result.stderr
