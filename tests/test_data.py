"""The data sets. torchvision and tonic read files that the tests write, in the formats of the real ones.

Where torchvision has no compiled library for this torch, or a package that tonic imports for sounds is missing, the
package's own ``__init__`` fails; its readers and transformations, which are Python, are then imported without it.
"""

import importlib
import itertools
import math
import os
import pickle
import random
import re
import struct
import sys
import types
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch

import snnkern.data.events as events
from snnkern.data import digits, load
from snnkern.data.images import NORMS, Cutout
from snnkern.data.saccades import recorded_digits, saccades
from snnkern.train.compare import compare, named
from snnkern.train.plot import plot
from snnkern.train.recipe import load as load_recipe

Image = pytest.importorskip("PIL.Image")


@contextmanager
def importable(name, **attributes):
    """``name`` can be imported within; what that left in sys.modules is gone afterwards.

    Args:
        attributes: what the package's ``__init__`` would define and its modules need.
    """

    def forget():
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]

    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        forget()
        package = types.ModuleType(name)
        vars(package).update(attributes, __path__=list(spec.submodule_search_locations), __spec__=spec)
        sys.modules[name] = package
    yield
    forget()


@pytest.fixture(scope="module")
def torchvision():
    with importable("torchvision", get_image_backend=lambda: "PIL"):
        yield


@pytest.fixture(scope="module")
def tonic():
    pytest.importorskip("aedat")
    with importable("tonic"):
        yield


def code_of(error):
    """The Python that an error about missing files says to run."""
    code = re.search(r'python -c "(.*)"$', str(error.value))[1]
    compile(code, "command", "exec")
    return code


def raw(x, name):
    """An image before its normalisation, as whole numbers 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[name])
    return (x * std + mean).mul(255).round().int()


def assert_only_torch_draws(data, index=0):
    def draw(seed, other, count=8):
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        before = random.getstate(), np.random.get_state()[1].tolist()
        drawn = torch.stack([data[index][0] for _ in range(count)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return drawn

    first = draw(1, 1)
    assert torch.equal(first, draw(1, 2))
    assert not torch.equal(first, draw(2, 1))
    assert not torch.equal(first[0], first[1]) or not torch.equal(first[0], first[2])
    torch.manual_seed(1)
    assert torch.equal(pickle.loads(pickle.dumps(data))[index][0], first[0])


# The registry


def test_pixels_are_normalised_as_published():
    assert NORMS == {
        "mnist": ((0.1307,), (0.3081,)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match=r"name must be one of digits, .*, basic-motions, got 'svhn'"):
        load("svhn")
    with pytest.raises(ValueError, match="digits has no option 'augment'; it has noise, train"):
        load("digits", augment="crop-flip")
    with pytest.raises(ValueError, match="noise must be a finite number, not negative, got 'much'"):
        load("digits", noise="much")
    with pytest.raises(ValueError, match=r"train must be a whole number between 1 and 1200, got 0\.5"):
        load("digits", train=0.5)
    with pytest.raises(ValueError, match=r"augment must be one of 'crop-flip', .*'none', got 'mixup'"):
        load("cifar10", augment="mixup")
    with pytest.raises(ValueError, match="augment must be one of 'crop-flip', 'none', got 'autoaugment-cutout'"):
        load("imagenet", augment="autoaugment-cutout")
    with pytest.raises(ValueError, match="by must be one of 'time', 'count', got 'events'"):
        load("dvs-cifar10", by="events")
    with pytest.raises(TypeError, match=r"frames must be an int, got 2\.5"):
        load("dvs-cifar10", frames=2.5)
    with pytest.raises(ValueError, match=r"augment must be one of 'flip-roll-reverse', .*'none', got 'nda'"):
        load("n-caltech101", augment="nda")
    with pytest.raises(ValueError, match="by must be one of 'pixel', 'row', got 'column'"):
        load("sequential-digits", by="column")
    with pytest.raises(ValueError, match="channels must divide 700, got 60"):
        load("shd", channels=60)
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        load("ssc", window=0)
    with pytest.raises(ValueError, match=r"threshold must be in \[0\.1, 1\], got 0.01"):
        load("digits-events", threshold=0.01)


def test_root_may_be_in_the_home_folder(torchvision, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"is not in {tmp_path}/sets, or"):
        load("cifar10", "~/sets")


def test_digits_are_those_of_digits():
    pytest.importorskip("sklearn")
    data = load("digits", seed=3, noise=0.1, train=50)
    (x, y), (test_x, test_y) = digits(seed=3, noise=0.1, train=50)
    assert (data.classes, data.shape, data.events) == (10, (1, 8, 8), False)
    assert all(map(torch.equal, data.train.tensors + data.test.tensors, (x, y, test_x, test_y)))
    assert data.plain is data.train


def test_sequential_digits_are_the_digits_step_by_step():
    pytest.importorskip("sklearn")
    (x, y), (test_x, test_y) = digits(seed=3, noise=0.0, train=50)
    pixels, rows = load("sequential-digits", seed=3, train=50), load("sequential-digits", seed=3, train=50, by="row")
    assert (pixels.shape, rows.shape, pixels.events, pixels.classes) == ((64, 1), (8, 8), True, 10)
    for part, image, label in ((0, x, y), (1, test_x, test_y)):
        assert torch.equal(pixels[part].tensors[0], image.reshape(-1, 64, 1))
        assert torch.equal(rows[part].tensors[0], image[:, 0]) and torch.equal(rows[part].tensors[1], label)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("mnist", "torchvision", "vision"),
        ("cifar100", "torchvision", "vision"),
        ("imagenet", "torchvision", "vision"),
        ("dvs-cifar10", "tonic", "events"),
        ("dvs-cifar10", "aedat", "events"),
        ("n-mnist", "tonic", "events"),
        ("n-caltech101", "tonic", "events"),
        ("shd", "h5py", "events"),
    ],
)
def test_missing_package_is_named_with_its_extra(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, "tonic", types.ModuleType("tonic"))
    monkeypatch.setitem(sys.modules, "tonic.io", types.SimpleNamespace(read_aedat4=None))
    monkeypatch.setitem(sys.modules, "aedat", types.ModuleType("aedat"))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.io", None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs? .*{package}.*pip install 'snnkern\[{extra}\]'"):
        load(name)


def test_torchvision_of_another_torch(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"torchvision does not go with torch .*\(operator torchvision::nms does"):
        load("cifar10")


# MNIST


def write_idx(path, values):
    """The files of MNIST: two zeros, the type (8: bytes), the number of axes, their lengths, the values."""
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def mnist(torchvision, tmp_path):
    """The folder, and images [25, 28, 28] and labels of both parts, 20 to train."""
    drawn = np.random.default_rng(0)
    images, labels = drawn.integers(0, 256, (25, 28, 28), np.uint8), drawn.integers(0, 10, 25, np.uint8)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, part in (("train", slice(20)), ("t10k", slice(20, 25))):
        write_idx(tmp_path / "MNIST" / "raw" / f"{name}-images-idx3-ubyte", images[part])
        write_idx(tmp_path / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte", labels[part])
    return tmp_path, torch.from_numpy(images), torch.from_numpy(labels)


def test_mnist_reads_its_files(mnist):
    root, images, labels = mnist
    data = load("mnist", root)
    assert (len(data.train), len(data.test), data.plain is data.train) == (20, 5, True)
    assert (data.classes, data.shape, data.events) == (10, (1, 28, 28), False)
    x, y = (torch.cat(pair) for pair in zip(data.train.tensors, data.test.tensors, strict=True))
    torch.testing.assert_close(x[:, 0], (images / 255 - 0.1307) / 0.3081)
    assert x.dtype == torch.float32 and torch.equal(y, labels.long())
    with pytest.raises(ValueError, match="mnist has no option 'augment'; it has none"):
        load("mnist", root, augment="none")
    sequence = load("sequential-mnist", root)
    assert (sequence.shape, sequence.events, sequence.classes) == ((784, 1), True, 10)
    assert torch.equal(sequence.train[3][0][5 * 28 + 7], x[3, :, 5, 7])
    assert torch.equal(load("sequential-mnist", root, by="row").test[0][0], x[20, 0])


def test_figure_2_and_table_1_of_dspike_on_mnist(mnist, tmp_path):
    pytest.importorskip("matplotlib")
    small = f"data.root={mnist[0]}", "batch=10", "stage.epochs=2", "seeds=2", "stage.steps=1"
    probe = "dspike-fig2:stage.probe.iterations=1:stage.probe.eps=[0.1,0.01]"
    compare(named([*small, probe, f"{probe}:stage.network=ann"]), tmp_path / "fig2")
    drawn = [path.name for path in plot(tmp_path / "fig2")]
    assert drawn == ["accuracy_epochs.png", "accuracy_steps.png", "accuracy_moments.png", "similarity.png"]
    one = next(path.parent for path in (tmp_path / "fig2").rglob("metrics.jsonl"))
    assert [path.name for path in plot(one)] == ["loss.png", "accuracy.png", "similarity.png"]
    results = compare(
        named([*small, "dspike-table1", "dspike-table1:stage.0.differences.eps=0.1"]), tmp_path / "table1"
    )
    first, second = results["names"]
    assert first == "dspike-table1" and second == "dspike-table1,eps=0.1"
    last = results["rows"][0]
    assert last["measure"] == "last epoch, %" and last["differences"][second]["positive"] in (0, 1, 2)


@pytest.mark.parametrize("problem", ["missing", "cut"])
def test_mnist_that_is_not_whole(mnist, problem):
    path = mnist[0] / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.unlink() if problem == "missing" else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=r"MNIST is not in .*, or not whole") as error:
        load("mnist", mnist[0])
    assert "import MNIST as C" in code_of(error)


# CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the strings of Python 2, in which the real files are."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(object())

    dispatch[str] = dispatch[bytes] = save_string


def dump(content, path):
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def rows_and_columns():
    """An image that says where each of its pixels was: 7 row + 1, 7 column + 1, 200. Zero is none of them."""
    rows, columns = np.mgrid[:32, :32]
    return np.stack([7 * rows + 1, 7 * columns + 1, np.full((32, 32), 200)]).astype(np.uint8)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory, torchvision):
    """A folder with a small CIFAR-10 and a small CIFAR-100, and the images of both: [12, 3, 32, 32], 10 to train."""
    root = tmp_path_factory.mktemp("cifar")
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), np.uint8)
    images[0] = rows_and_columns()
    rows = images.reshape(12, 3072)  # red, then green, then blue, each row by row
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()
    parts = [(f"data_batch_{part + 1}", slice(2 * part, 2 * part + 2)) for part in range(5)]
    for name, part in [*parts, ("test_batch", slice(10, 12))]:
        labels = [index % 10 for index in range(12)][part]
        names = [f"image_{index}.png" for index in range(12)][part]
        dump({"batch_label": name, "labels": labels, "data": rows[part], "filenames": names}, ten / name)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    dump({"num_cases_per_batch": 2, "label_names": names, "num_vis": 3072}, ten / "batches.meta")
    for name, part in [("train", slice(10)), ("test", slice(10, 12))]:
        fine = [9 * (index % 10) for index in range(12)][part]
        coarse = [index // 5 for index in fine]
        dump({"batch_label": name, "fine_labels": fine, "coarse_labels": coarse, "data": rows[part]}, hundred / name)
    dump({"fine_label_names": [f"class{index}" for index in range(100)], "coarse_label_names": []}, hundred / "meta")
    with pytest.MonkeyPatch.context() as patch:  # the checksums are those of the real files
        module = importlib.import_module("torchvision.datasets.cifar")
        patch.setattr(module, "check_integrity", lambda path, md5: os.path.isfile(path))
        yield root, torch.from_numpy(images)


@pytest.mark.parametrize(("name", "classes", "scale"), [("cifar10", 10, 1), ("cifar100", 100, 9)])
def test_cifar_reads_the_python_files(cifar, name, classes, scale):
    root, images = cifar
    data = load(name, root, augment="none")
    assert (len(data.train), len(data.test)) == (10, 2)
    assert (data.classes, data.shape, data.events) == (classes, (3, 32, 32), False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[name])
    for index, (x, y) in enumerate([*map(data.train.__getitem__, range(10)), *map(data.test.__getitem__, range(2))]):
        assert x.dtype == torch.float32 and isinstance(y, int)
        torch.testing.assert_close(x, (images[index] / 255 - mean) / std)
        assert y == scale * (index % 10)
    for augment in ("crop-flip", "autoaugment-cutout"):
        drawn = load(name, str(root), augment=augment)
        assert torch.equal(drawn.test[0][0], data.test[0][0])
        assert all(torch.equal(drawn.plain[index][0], data.train[index][0]) for index in (0, 3, 0))
        assert any(not torch.equal(drawn.train[0][0], data.train[0][0]) for _ in range(5))


def test_crop_flip_moves_by_up_to_four_pixels(cifar):
    train, seen = load("cifar10", cifar[0]).train, set()
    torch.manual_seed(0)
    padded = torch.nn.functional.pad(cifar[1][0].int(), (4, 4, 4, 4))
    for _ in range(600):
        image = raw(train[0][0], "cifar10")
        flipped = bool(image[1, 16, 10] > image[1, 16, 20])
        image = image.flip(-1) if flipped else image
        down, right = (int((image[channel, 16, 16] - 1) // 7 - 16) + 4 for channel in (0, 1))
        assert torch.equal(image, padded[:, down : down + 32, right : right + 32])
        seen.add((down, right, flipped))
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert 0.4 < sum(flipped for _, _, flipped in seen) / len(seen) < 0.6
    assert len(seen) > 140  # of 162: nothing is tied to anything else


def test_autoaugment_cutout_is_in_the_order_of_the_published_code(cifar):
    for name in ("cifar10", "cifar100"):
        train = load(name, cifar[0], augment="autoaugment-cutout").train
        steps = train.transform.transforms
        order = ["RandomCrop", "RandomHorizontalFlip", "AutoAugment", "ToTensor", "Cutout", "Normalize"]
        assert [type(step).__name__ for step in steps] == order
        assert steps[2].policy.value == "cifar10" and steps[2].fill == [128, 128, 128] and steps[4].length == 16
        torch.manual_seed(0)
        for _ in range(20):
            assert (raw(train[1][0], name) == 0).all(0).sum() >= 64  # the hole, cut off at most to a quarter


def test_cutout_blackens_a_square_about_any_pixel():
    torch.manual_seed(0)
    image, seen = torch.ones(3, 20, 32), set()
    for _ in range(3000):
        x = Cutout(6)(image)
        rows, columns = (x[0] == 0).any(1).nonzero().flatten(), (x[0] == 0).any(0).nonzero().flatten()
        expected = image.clone()
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        assert torch.equal(x, expected)
        seen.add((int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])))
    assert image.all()
    spans = [{(max(at - 3, 0), min(at + 2, extent - 1)) for at in range(extent)} for extent in (20, 32)]
    assert {span[:2] for span in seen} == spans[0] and {span[2:] for span in seen} == spans[1]


@pytest.mark.parametrize("augment", ["crop-flip", "autoaugment-cutout"])
def test_cifar_draws_from_torch_alone(cifar, augment):
    assert_only_torch_draws(load("cifar100", cifar[0], augment=augment).train)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(torchvision, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name.upper()} is not in .*, or not whole") as error:
        load(name, tmp_path)
    assert f"import {name.upper()} as C; C({str(tmp_path)!r}, download=True)" in code_of(error)


# ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, torchvision):
    """Two classes. Red rises from left to right, green from top to bottom; 320 x 256 pixels, and larger ones."""
    root = tmp_path_factory.mktemp("imagenet")
    rows, columns = np.mgrid[:256, :320]
    image = Image.fromarray(np.stack([columns * 4 // 5, rows, 0 * rows], -1).astype(np.uint8))
    for part, name in itertools.product(("train", "val"), ("n01440764", "n01443537")):
        folder = root / part / name
        folder.mkdir(parents=True)
        image.save(folder / f"{name}_0.png")
        image.resize((640, 512)).save(folder / f"{name}_1.JPEG", quality=95)
    return root, torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


def test_imagenet_reads_folders(imagenet):
    root, image = imagenet
    data = load("imagenet", root, augment="none")
    assert (len(data.train), len(data.test)) == (4, 4)
    assert (data.classes, data.shape, data.events) == (2, (3, 224, 224), False)
    assert [data.test[index][1] for index in range(4)] == [0, 0, 1, 1]
    for part in (data.train, data.test):
        assert torch.equal(raw(part[0][0], "imagenet"), image[:, 16:240, 48:272])
        difference = raw(part[1][0], "imagenet") - image[:, 16:240, 48:272]
        assert difference[:2].abs().max() <= 4  # JPEG, and scaled from twice the size


def test_imagenet_training_images_are_cut_scaled_and_flipped(imagenet):
    train = load("imagenet", imagenet[0]).train
    torch.manual_seed(0)
    widths, heights, flips = [], [], []
    for _ in range(40):
        x = raw(train[0][0], "imagenet")
        assert x.shape == (3, 224, 224)
        right, down = x[0, 112, -1] - x[0, 112, 0], x[1, -1, 112] - x[1, 0, 112]
        flips.append(bool(right < 0))
        widths.append(abs(int(right)) / 256)
        heights.append(int(down) / 256)
    assert 10 < sum(flips) < 30
    areas = [width * height for width, height in zip(widths, heights, strict=True)]
    assert min(areas) < 0.25 and max(areas) > 0.6 and min(heights) > 0
    assert_only_torch_draws(train)
    plain = load("imagenet", imagenet[0], augment="none").train
    assert torch.equal(load("imagenet", imagenet[0]).plain[0][0], plain[0][0])


def test_missing_imagenet_says_how_to_get_it(torchvision, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"ImageNet is not in .*train/CLASS/\*.JPEG and .*image-net.org"
    ) as error:
        load("imagenet", tmp_path)
    assert f"[I({str(tmp_path)!r}, s) for s in ('train', 'val')]" in code_of(error)


def test_imagenet_with_unequal_classes(torchvision, tmp_path):
    for folder in ("train/cat", "train/dog", "val/cat"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match="train and val must have the same classes; dog is in one of them alone"):
        load("imagenet", tmp_path)


def test_an_image_that_is_cut_off_is_named(imagenet):
    path = min((imagenet[0] / "train").rglob("*_0.png"))
    path.write_bytes(path.read_bytes()[:-1000])
    train = load("imagenet", imagenet[0]).train
    with pytest.raises(ValueError, match=rf"^{path} cannot be read: [^\n]*$"):
        train[[held for held, _ in train.samples].index(str(path))]


# DVS-CIFAR10

EVENT = np.dtype(
    {"names": ["t", "x", "y", "on"], "formats": ["<i8", "<i2", "<i2", "?"], "offsets": [0, 8, 10, 12], "itemsize": 16}
)
STREAMS = (
    b'<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">'
    b'<node name="0" path="/mainloop/Recorder/outInfo/0/"><attr key="compression" type="string">NONE</attr>'
    b'<attr key="originalOutputName" type="string">events</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
    b'<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">128</attr>'
    b'<attr key="sizeY" type="int">128</attr></node></node></node></dv>'
)


def write_aedat4(path, t, x, y, on, packets=1):
    """An uncompressed AEDAT 4.0 file: a header and ``packets``, flatbuffers all, each after its length.

    A flatbuffer: where its table starts, its identifier, the table's layout, the table, then what the table points to.
    https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-4.0.html
    """
    table = np.zeros(len(t), EVENT)
    table["t"], table["x"], table["y"], table["on"] = t, x, y, on
    # layout: own size, table's size, offsets of compression, position of the index of packets, description of streams
    header = struct.pack("<I4s5H2x", 20, b"IOHE", 10, 20, 4, 8, 16) + struct.pack("<iiqII", 12, 0, -1, 4, len(STREAMS))
    header += STREAMS + b"\0" + b"\0" * (-(len(header) + len(STREAMS) + 1) % 4)
    with open(path, "wb") as file:
        file.write(b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header)
        for part in np.array_split(table, packets):
            # layout: own size, table's size, offset of the vector of events, which starts 8 after its pointer
            packet = struct.pack("<I4s3H2xiI4xI", 16, b"EVTS", 6, 8, 4, 8, 8, len(part)) + part.tobytes()
            file.write(struct.pack("<iiI", 0, len(packet) + 4, len(packet)) + packet)


def recording(place, count=400):
    """Events in 0 to 1.2 s at any pixel; then 5 at row ``place`` of column 7, darker, in the last microsecond."""
    drawn = np.random.default_rng(place)
    t = np.sort(drawn.integers(0, 1_200_000, count))
    x, y, on = drawn.integers(0, 128, count), drawn.integers(0, 128, count), drawn.integers(0, 2, count)
    tail = np.ones(5, int)
    return [np.append(a, b) for a, b in ((t, 1_200_000 * tail), (x, 7 * tail), (y, place * tail), (on, 0 * tail))]


@pytest.fixture(scope="module")
def dvs(tmp_path_factory, tonic):
    """The folder: 10 000 names, of which the first and last of both splits of every class have their own recording."""
    root = tmp_path_factory.mktemp("dvs")
    write_aedat4(root / "any", *recording(127))
    for target, name in enumerate(events.CLASSES):
        folder = root / "CIFAR10DVS" / name
        folder.mkdir(parents=True)
        for number in range(1000):
            path = folder / f"cifar10_{name}_{number}.aedat4"
            if number in (0, 899, 900, 999):
                write_aedat4(path, *recording(4 * target + [0, 899, 900, 999].index(number)), packets=3)
            else:
                os.link(root / "any", path)
    return root


def test_frames_of_dspike_stay_zeros_and_ones(dvs):
    """Li et al., NeurIPS 2021, section 5: the first layer takes frames of 0 and 1."""
    recipe = load_recipe("dspike-dvs", [f"data.root={dvs}"])
    for part in (recipe.load_data().train, recipe.load_data().test):
        for index in (0, 1, 99):
            assert part[index][0].unique().tolist() == [0, 1]


def test_frames_by_time_and_by_count():
    t = np.array([100, 101, 109, 110, 119, 120, 129], np.uint64)  # 30 us: blocks from 100, 110 and 120
    x, y = np.array([0, 0, 1, 2, 3, 3, 3], np.uint16), np.array([2, 2, 0, 1, 3, 3, 3], np.uint16)
    on = np.array([1, 1, 0, 1, 0, 1, 1], bool)
    expected = torch.zeros(3, 2, 4, 4)
    expected[0, 1, 2, 0], expected[0, 0, 0, 1] = 2, 1
    expected[1, 1, 1, 2], expected[1, 0, 3, 3] = 1, 1
    expected[2, 1, 3, 3] = 2
    assert torch.equal(events.to_frames(t, x, y, on, 3, sensor=4), expected)
    counted = events.to_frames(t, x, y, on, 3, by="count", sensor=4)
    assert counted.sum((1, 2, 3)).tolist() == [3, 2, 2]
    assert torch.equal(counted[0], expected[0]) and torch.equal(counted[2], expected[2])
    few = events.to_frames(t[:2], x[:2], y[:2], on[:2], 4, by="count", sensor=4)
    assert few.sum((1, 2, 3)).tolist() == [1, 0, 1, 0]
    assert events.to_frames(t[:1], x[:1], y[:1], on[:1], 2, sensor=4)[0, 1, 2, 0] == 1


def test_dvs_splits_by_the_number_of_a_recording(dvs):
    data = load("dvs-cifar10", dvs, augment="none", size=128)
    assert (len(data.train), len(data.test)) == (9000, 1000)
    assert (data.classes, data.shape, data.events) == (10, (10, 2, 128, 128), True)
    assert data.train.targets == [target for target in range(10) for _ in range(900)]
    for target in range(10):
        found = (data.train[900 * target], data.train[900 * target + 899], data.test[100 * target])
        for order, (x, y) in enumerate((*found, data.test[100 * target + 99])):
            expected = recording(4 * target + order)
            assert x.dtype == torch.float32 and y == target
            assert torch.equal(x, events.to_frames(*expected, 10))
            assert x[-1, 0, 4 * target + order, 7] >= 5
    assert torch.equal(data.train[1][0], events.to_frames(*recording(127), 10))
    plain = load("dvs-cifar10", dvs, augment="nda", size=128).plain
    assert len(plain) == 9000 and torch.equal(plain[900][0], data.train[900][0])


def test_dvs_options(dvs):
    whole = load("dvs-cifar10", dvs, augment="none", size=128).test[0][0]
    default = load("dvs-cifar10", dvs).test[0][0]
    with pytest.raises(ValueError, match=r"size must be that of the sensor, \(128, 128\), to see its events, got 48"):
        load("dvs-cifar10", dvs).test.recording(0)
    for frame, scaled in zip(whole.flatten(0, 1), default.flatten(0, 1), strict=True):
        pillow = Image.fromarray(frame.numpy()).resize((48, 48), Image.Resampling.BILINEAR)
        torch.testing.assert_close(scaled, torch.from_numpy(np.array(pillow)), rtol=1e-4, atol=1e-5)
    binary = load("dvs-cifar10", dvs, values="binary", resize="nearest", frames=4, size=32)
    assert binary.shape == binary.train[0][0].shape == (4, 2, 32, 32)
    x = binary.test[0][0]
    assert torch.equal(x, events.to_frames(*recording(2), 4)[..., ::4, ::4].clamp(max=1))
    assert load("dvs-cifar10", dvs, values="binary", size=128).test[0][0].unique().tolist() == [0, 1]
    counted = load("dvs-cifar10", dvs, by="count", size=128).test[0][0]
    assert set(counted.sum((1, 2, 3)).tolist()) == {40.0, 41.0} and counted.sum() == whole.sum() == 405


@pytest.mark.parametrize("augment", ["flip-roll", "nda"])
def test_dvs_draws_from_torch_alone(dvs, augment):
    assert_only_torch_draws(load("dvs-cifar10", dvs, augment=augment).train)


def places():
    """Frames [3, 2, 48, 48] that differ from pixel to pixel, and from frame to frame by 10 000."""
    return torch.arange(48 * 48.0).view(48, 48) + 10_000 * torch.arange(6.0).view(3, 2, 1, 1)


def test_flip_roll_moves_all_frames_alike():
    torch.manual_seed(0)
    frames, seen = places(), set()
    for _ in range(1500):
        x = events.flip_roll(frames)
        flipped = bool(x[0, 0, 24, 20] > x[0, 0, 24, 21])
        at = int((x == 0).nonzero()[0][2]), int((x == 0).nonzero()[0][3])
        down, right = ((at[0] + 24) % 48 - 24, (at[1] + 24 + flipped) % 48 - 24)
        assert torch.equal(x, (frames.flip(-1) if flipped else frames).roll((down, right), (2, 3)))
        seen.add((down, right, flipped))
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(-5, 6))
    assert len(seen) > 230  # of 242


def test_nda_rolls_turns_or_shears(monkeypatch):
    frames = places()
    monkeypatch.setattr(events, "angle_within", lambda degrees: math.radians(3 * degrees))
    assert torch.equal(events.turn(frames), frames.rot90(1, (-2, -1)))
    monkeypatch.setattr(events, "angle_within", lambda degrees: math.atan(2))
    sheared = events.shear(frames)
    assert torch.equal(sheared[..., 24, :-1], frames[..., 24, 1:])  # half a pixel below the middle: 1 to the left
    assert torch.equal(sheared[..., 29, :-11], frames[..., 29, 11:]) and not sheared[..., 29, -11:].any()
    assert torch.equal(sheared[..., 18, 11:], frames[..., 18, :-11])
    monkeypatch.undo()
    torch.manual_seed(0)
    angles = [math.degrees(events.angle_within(30)) for _ in range(500)]
    assert -30 <= min(angles) < -29 and 29 < max(angles) <= 30
    called = []
    for name in ("roll", "turn", "shear"):
        monkeypatch.setattr(events, name, lambda frames, name=name: called.append(name))
    for _ in range(300):
        events.nda(frames)
    assert all(70 < called.count(name) < 130 for name in ("roll", "turn", "shear"))


def test_missing_dvs_says_how_to_get_it(tonic, dvs, tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR10DVS/airplane has 0 recordings") as error:
        load("dvs-cifar10", tmp_path)
    assert f"C({str(tmp_path)!r})" in code_of(error)
    path = dvs / "CIFAR10DVS" / "frog" / "cifar10_frog_17.aedat4"
    path.rename(dvs / "hidden")
    with pytest.raises(FileNotFoundError, match="CIFAR10DVS/frog has 999 recordings, not those numbered 0 to 999"):
        load("dvs-cifar10", dvs)
    (dvs / "hidden").rename(path)


@pytest.mark.parametrize("problem", ["empty", "cut", "outside"])
def test_damaged_recording_is_named(tonic, tmp_path, problem):
    path, columns = tmp_path / "cifar10_cat_1.aedat4", recording(0)
    if problem == "outside":
        columns[1][3] = 128
    write_aedat4(path, *([] if problem == "empty" else column for column in columns))
    if problem == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    data = events.Recordings([path], [0], 10, "time", "counts", 48, "bilinear", None)
    with pytest.raises(ValueError, match=r"cifar10_cat_1.aedat4 is not a recording of 128 x 128 pixels: "):
        data[0]


# N-MNIST, N-Caltech101


def write_bin(path, t, x, y, on):
    """The files of N-MNIST: 5 bytes an event, column, row, then polarity and 23 bits of time. Row 240 is none: a sign
    that the clock of the camera, of 13 bits, has run over: the reader adds 2**13 to what follows."""
    rows, over = [], 0
    for when, column, row, brighter in zip(t, x, y, on, strict=True):
        while when - over * 2**13 >= 2**23:
            rows.append((0, 240, 0, 0, 0))
            over += 1
        when = int(when) - over * 2**13
        rows.append((column, row, brighter << 7 | when >> 16, when >> 8 & 255, when & 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array(rows, np.uint8).tobytes())


def small(place, sensor, until=300_000):
    """Events of a recording on ``sensor`` rows and columns, the last in its corner."""
    drawn = np.random.default_rng(place)
    t = np.append(np.sort(drawn.integers(0, until, 50)), until)
    y, x = (np.append(drawn.integers(0, extent, 50), extent - 1) for extent in sensor)
    return t, x, y, drawn.integers(0, 2, 51)


def test_n_mnist_reads_its_files(tonic, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "NMNIST", {"Train": 20, "Test": 10})
    with pytest.raises(FileNotFoundError, match="NMNIST/Train has 0 recordings of 0 classes, not 20 of 10") as error:
        load("n-mnist", tmp_path)
    assert "import NMNIST as C" in code_of(error)
    for part, place in (("Train", 0), ("Train", 10), ("Test", 20)):
        for digit in range(10):
            until = 9_000_000 if digit == 9 else 300_000  # beyond 23 bits
            columns = small(place + digit, (34, 34), until)
            write_bin(tmp_path / "NMNIST" / part / str(digit) / f"{place + digit:05}.bin", *columns)
    data = load("n-mnist", tmp_path, frames=4)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (20, 10, 10, (4, 2, 34, 34))
    assert data.train.targets == [digit for digit in range(10) for _ in range(2)] and data.plain is data.train
    for digit in (0, 7):
        x, y = data.train[2 * digit + 1]
        assert y == digit and torch.equal(x, events.to_frames(*small(10 + digit, (34, 34)), 4, sensor=34))
    assert torch.equal(data.test[9][0], events.to_frames(*small(29, (34, 34), 9_000_000), 4, sensor=34))
    assert all(map(np.array_equal, data.test.recording(9), small(29, (34, 34), 9_000_000)))
    assert load("n-mnist", tmp_path, values="binary").test[0][0].unique().tolist() == [0, 1]
    (tmp_path / "NMNIST" / "Test" / "3" / "00023.bin").unlink()
    with pytest.raises(FileNotFoundError, match="NMNIST/Test has 9 recordings of 9 classes, not 10 of 10"):
        load("n-mnist", tmp_path)


def test_n_caltech101_reads_its_files(tonic, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "NCALTECH101", (2, 30))
    with pytest.raises(FileNotFoundError, match="NCALTECH101/Caltech101 has 0 recordings of 0 classes") as error:
        load("n-caltech101", tmp_path)
    assert "import NCALTECH101 as C" in code_of(error)
    for name, count in (("accordion", 19), ("yin_yang", 20)):
        for number in range(count):
            path = tmp_path / "NCALTECH101" / "Caltech101" / name / f"image_{number + 1:04}.bin"
            write_bin(path, *small(count * number, (60 + 3 * number, 200)))
    data = load("n-caltech101", tmp_path)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (18 + 18, 1 + 2, 2, (10, 2, 48, 48))
    assert data.train.targets == [0] * 18 + [1] * 18 and data.test.targets == [0, 1, 1]
    assert not {*data.train.files} & {*data.test.files}
    assert [file.stem for file in data.test.files] == ["image_0019", "image_0019", "image_0020"]
    whole = events.to_frames(*small(20 * 18, (60 + 3 * 18, 200)), 10, sensor=(180, 240))
    scaled = torch.nn.functional.interpolate(whole, (48, 48), mode="bilinear", antialias=True)
    assert torch.equal(data.test[1][0], scaled)
    assert_only_torch_draws(data.train, 2)
    assert torch.equal(data.plain[0][0], load("n-caltech101", tmp_path, augment="none").train[0][0])


def test_flip_roll_reverse_takes_one_way_or_none():
    torch.manual_seed(0)
    frames, seen = places(), []
    for _ in range(800):
        x = events.flip_roll_reverse(frames)
        for way, turned in enumerate((frames, frames.flip(-1), frames.flip(0, 1))):
            down, right = (int(at) for at in (x == turned[0, 0, 24, 24]).nonzero()[0][2:] - 24)
            if abs(down) <= 5 and abs(right) <= 5 and torch.equal(x, turned.roll((down, right), (2, 3))):
                seen.append(way)
    assert len(seen) == 800 and 350 < seen.count(0) < 450 and all(150 < seen.count(way) < 250 for way in (1, 2))


# Digits before a moving camera


def test_saccades_of_a_point():
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 1.0
    (t, x, y, on), *_ = saccades(image, 0.5)
    assert t.dtype == np.int64 and (np.diff(t) >= 0).all()
    bright = [(int(row), int(column)) for row, column, brighter in zip(y, x, on, strict=True) if brighter]
    # 2 down and 1 right in the first 100 ms, up and 1 right in the second
    assert 80_000 < t[on == 1][bright.index((5, 5))] < 100_000 < 180_000 < t[on == 1][bright.index((3, 6))] < 200_000
    dark = [when for when, row, column, bright in zip(t, y, x, on, strict=True) if (row, column, bright) == (3, 4, 0)]
    assert dark and dark[0] < 50_000  # it leaves where it was
    net = np.zeros((10, 10), int)
    np.add.at(net, (y, x), 2 * on - 1)
    assert (abs(0.5 * net) < 0.5).all()  # the image is back where it was, up to less than the threshold


def test_saccades_refuse_what_they_cannot_show():
    for images in (torch.zeros(8, 8), torch.zeros(1, 3, 8), torch.full((1, 8, 8), 16.0)):
        with pytest.raises(ValueError, match=r"images must be \[N, H, W\] in \[0, 1\] .*got shape"):
            saccades(images)


def test_digits_events_are_frames_of_the_recorded_digits(monkeypatch):
    pytest.importorskip("sklearn")
    once = cache(recorded_digits)
    monkeypatch.setattr("snnkern.data.saccades.recorded_digits", once)
    data = load("digits-events", seed=2, frames=6, train=20)
    assert (len(data.train), len(data.test), data.shape, data.events) == (20, 597, (6, 2, 10, 10), True)
    (recorded, y), (_, test_y) = once(2, 20, 0.15)
    assert torch.equal(y, digits(seed=2, train=20)[0][1]) and torch.equal(data.test.tensors[1], test_y)
    for index in (0, 19):
        assert torch.equal(data.train[index][0], events.to_frames(*recorded[index], 6, sensor=10))
    assert all(len(each.t) > 200 and (np.diff(each.t) >= 0).all() for each in recorded)
    binary = load("digits-events", seed=2, frames=6, train=20, values="binary").test.tensors[0]
    assert torch.equal(binary, data.test.tensors[0].clamp(max=1)) and not torch.equal(binary, data.test.tensors[0])
    assert once.cache_info().misses == 1


# Spoken words


def write_words(path, times, units, labels):
    """The files of Cramer et al.: times float16, units uint16, both of another length for every word; labels uint16."""
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, kind, values in (("times", np.float16, times), ("units", np.uint16, units)):
            held = file.create_dataset(f"spikes/{name}", (len(values),), h5py.vlen_dtype(kind))
            for index, each in enumerate(values):
                held[index] = np.asarray(each, kind)
        file["labels"] = np.asarray(labels, np.uint16)
        file["extra/keys"] = np.array([b"zero", b"one"])


def test_words_are_counted_by_step_and_channel(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"SHD is not in .*, or not whole \(shd_train.h5: missing\). This gets it"
    ) as error:
        load("shd", tmp_path)
    assert "import SHD as C" in code_of(error)
    times, units = [[0.0, 0.25, 0.26, 0.49, 1.39, 1.5], [0.5]], [[0, 9, 5, 699, 690, 3], [10]]
    for part, order in (("train", 1), ("test", -1)):
        write_words(tmp_path / "SHD" / f"shd_{part}.h5", times[::order], units[::order], [3, 19][::order])
    data = load("shd", tmp_path, steps=7)  # of 0.2 s
    assert (len(data.train), len(data.test), data.classes, data.shape, data.events) == (2, 2, 20, (7, 70), True)
    x, y = data.train[0]
    expected = torch.zeros(7, 70)
    expected[0, 0] = expected[2, 69] = expected[6, 69] = 1
    expected[1, 0] = 2
    assert torch.equal(x, expected) and x.dtype == torch.float32 and y == 3
    assert torch.equal(data.test[1][0], expected) and data.test[0][1] == 19
    assert torch.equal(load("shd", tmp_path, steps=7, values="binary").train[0][0], expected.clamp(max=1))
    narrow = load("shd", tmp_path, steps=2, channels=700, window=0.5).train[0][0]
    assert narrow.nonzero().tolist() == [[0, 0], [1, 5], [1, 9], [1, 699]]
    assert load("shd", tmp_path, steps=1, window=9).train[0][0].sum() == 6
    long = load("shd", tmp_path, steps=1000, channels=140).train[0][0]  # of 1.4 ms, by fives
    assert long.nonzero().tolist() == [[0, 0], [178, 1], [185, 1], [349, 139], [992, 138]] and long.shape == (1000, 140)
    write_words(tmp_path / "SHD" / "shd_test.h5", times, [units[0], [700]], [3, 19])
    with pytest.raises(ValueError, match=r"shd_test.h5: word 1 is not one of 700 channels"):
        load("shd", tmp_path).test[1]


@pytest.mark.parametrize("problem", ["missing", "cut", "labels"])
def test_words_that_are_not_whole(tmp_path, problem):
    for part in ("train", "test"):
        labels = [35] if problem == "labels" and part == "test" else [34]
        write_words(tmp_path / "SSC" / f"ssc_{part}.h5", [[0.1]], [[5]], labels)
    path = tmp_path / "SSC" / "ssc_test.h5"
    if problem == "labels":
        path.rename(tmp_path / "kept")
        write_words(path, [[0.1]], [[5]], [34])
        assert load("ssc", tmp_path).shape == (100, 70) and load("ssc", tmp_path).test[0][1] == 34
        (tmp_path / "kept").replace(path)
    else:
        path.unlink() if problem == "missing" else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=r"SSC is not in .*, or not whole \(ssc_test.h5: ") as error:
        load("ssc", tmp_path)
    assert "split=s) for s in ('train', 'test')]" in code_of(error)


# Time series


def write_ts(path, *series):
    """The format of the archives: a case a line, channels and class with ``:`` between them."""
    path.parent.mkdir(exist_ok=True)
    header = "#12:34:a\n@problemName Two\n@equalLength false\n@classLabel true b a\n@data\n"
    path.write_text(header + "\n".join(series) + "\n")


def test_series_are_standardised_and_padded(tmp_path):
    write_ts(tmp_path / "ACSF1" / "ACSF1_TRAIN.ts", "0,1,2:5,5,9:a", "", "5,-3:1,0:b")
    write_ts(tmp_path / "ACSF1" / "ACSF1_TEST.ts", "1,1,1,2e0:4,4,4,3.5:b")
    data = load("acsf1", tmp_path)
    assert (len(data.train), len(data.test), data.classes, data.shape, data.events) == (2, 1, 2, (4, 2), True)
    assert data.train.tensors[1].tolist() == [1, 0] and data.test.tensors[1].tolist() == [0]
    scale = torch.tensor([[0.0, 1, 2, 5, -3], [5, 5, 9, 1, 0]]).std(1)  # of means 1 and 4
    expected = torch.tensor([[[-1.0, 1], [0, 1], [1, 5], [0, 0]], [[4, -3], [-4, -4], [0, 0], [0, 0]]])
    torch.testing.assert_close(data.train.tensors[0], expected / scale)
    torch.testing.assert_close(data.test.tensors[0], torch.tensor([[[0.0, 0], [0, 0], [0, 0], [1, -0.5]]]) / scale)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (None, "missing"),
        ((), "no series"),
        (("1,2:3,4:a", "1,:3,4:a"), "could not convert string to float"),
        (
            ("1,2:3,4:a", "1,2:a"),
            r"series 2 must have channels of one length, and as many as the first, got 1 of \[2\]",
        ),
        (("1,2:3:a",), r"series 1 must have channels of one length, got 2 of \[1, 2\]"),
        (("1,2:3,nan:a",), "series 1 has a value that is not finite"),
        (("1,2:3,4:c",), "series 1 is of class 'c', not one of b, a"),
        (("1,2:a",), "other channels or classes than those of training"),
    ],
)
def test_series_that_are_not_whole(tmp_path, lines, reason):
    write_ts(tmp_path / "BasicMotions" / "BasicMotions_TRAIN.ts", "1,2:3,4:a")
    if lines is not None:
        write_ts(tmp_path / "BasicMotions" / "BasicMotions_TEST.ts", *lines)
    with pytest.raises(
        FileNotFoundError, match=rf"BasicMotions is not in .*, or not whole \(BasicMotions_TEST.ts: {reason}"
    ):
        load("basic-motions", tmp_path)


def test_series_come_with_aeon(monkeypatch):
    monkeypatch.setattr("snnkern.data.series.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="ACSF1 needs the files of aeon: pip install --no-deps aeon"):
        load("acsf1")
    monkeypatch.undo()
    if importlib.util.find_spec("aeon") is None:
        pytest.skip("aeon is not installed")
    for name, sizes in (
        ("acsf1", (100, 100, 10, (1460, 1))),
        ("japanese-vowels", (270, 370, 9, (29, 12))),
        ("basic-motions", (40, 40, 4, (100, 6))),
    ):
        data = load(name)
        assert (len(data.train), len(data.test), data.classes, data.shape) == sizes
    assert "aeon" not in sys.modules
