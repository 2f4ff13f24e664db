"""MNIST, CIFAR-10, CIFAR-100 and ImageNet, read and augmented by torchvision."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from .base import ROOT, Data, DataError, in_a_line, one_of

# Mean and standard deviation of the training pixels, per channel, as the public code of TET and SEENN has them; MNIST's
# is everyone's.
NORMS = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Cutout(torch.nn.Module):
    """Blackens one square of an image [C, H, W], its centre uniform over the pixels, what lies outside cut off.

    Source: DeVries and Taylor 2017, arXiv 1708.04552. The square is black because the hole comes before
    normalisation, as in SEENN's code; with DeVries and Taylor it comes after, hence has the mean colour.
    """

    def __init__(self, length: int = 16) -> None:
        super().__init__()
        self.length = length

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        centre = [int(torch.randint(extent, ())) for extent in image.shape[-2:]]
        rows, columns = (slice(max(at - self.length // 2, 0), at + self.length // 2) for at in centre)
        image = image.clone()
        image[..., rows, columns] = 0
        return image


def vision():
    """torchvision's ``datasets`` and ``transforms``."""
    try:
        from torchvision import datasets, transforms
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MNIST, CIFAR and ImageNet need torchvision: pip install 'snnkern[vision]'"
        ) from error
    except RuntimeError as error:  # torchvision registers operators that its library, made for another torch, lacks
        raise ImportError(
            f"the installed torchvision does not go with torch {torch.__version__} ({error}); install the one that "
            "does, from the index that torch came from"
        ) from error
    return datasets, transforms


def mnist(root: Path | None = None, seed: int = 0) -> Data:
    """MNIST: 60 000 training and 10 000 test images [1, 28, 28], normalised with ``NORMS``.

    Args:
        root: the folder that holds ``MNIST/raw`` with its four files, unpacked.
    """
    kind = vision()[0].MNIST
    parts = [_present(kind, root or ROOT, train=train) for train in (True, False)]
    (mean,), (std,) = NORMS["mnist"]
    train, test = (
        TensorDataset(((part.data.float() / 255 - mean) / std).unsqueeze(1), part.targets.long()) for part in parts
    )
    return Data(train, test, 10, (1, 28, 28), False, train)


def cifar(name: str, root: Path | None = None, seed: int = 0, *, augment: str = "crop-flip") -> Data:
    """CIFAR-10 or CIFAR-100: 50 000 training and 10 000 test images [3, 32, 32], normalised with ``NORMS``.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        augment: ``"crop-flip"``, a random crop of the image padded with 4 zeros, and a horizontal flip with
            probability 1/2: TET, appendix A.1 (the padding is from its code). ``"autoaugment-cutout"``, in the order of
            SEENN's code, which is by Dspike's first author: crop, flip, AutoAugment's policy for CIFAR-10 (on CIFAR-100
            too), one ``Cutout`` of 16: Dspike, section 5.2. The policy is torchvision's; what a shear, rotation or
            translation uncovers is grey (128), as in that code. ``"none"``: the images as they are.
    """
    one_of("augment", augment, ("crop-flip", "autoaugment-cutout", "none"))
    datasets, transforms = vision()
    finish = [transforms.ToTensor(), transforms.Normalize(*NORMS[name])]
    steps = list(finish)
    if augment != "none":
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *finish]
    if augment == "autoaugment-cutout":
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])
        steps[2:3] = [policy, transforms.ToTensor(), Cutout(16)]
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = root or ROOT
    train = _present(kind, root, train=True, transform=transforms.Compose(steps))
    test = _present(kind, root, train=False, transform=transforms.Compose(finish))
    return Data(train, test, len(train.classes), (3, 32, 32), False, _plain(train, test.transform))


def _present(kind, root: Path, **options):
    try:
        return kind(root, **options)
    except (RuntimeError, ValueError, AssertionError) as error:  # missing, another checksum, or cut off
        command = f"from torchvision.datasets import {kind.__name__} as C; C({str(root)!r}, download=True)"
        raise FileNotFoundError(
            f'{kind.__name__} is not in {root}, or not whole. This gets it:\n    python -c "{command}"'
        ) from error


def _plain(train, transform):
    """``train`` with another transform; the samples themselves are shared."""
    plain = copy.copy(train)
    plain.transform = transform
    return plain


def _read(path: str):
    try:
        return vision()[0].folder.pil_loader(path)
    except OSError as error:  # missing, cut off, no image
        raise DataError(f"{path} cannot be read: {in_a_line(error)}") from error


def imagenet(root: Path | None = None, seed: int = 0, *, augment: str = "crop-flip") -> Data:
    """ImageNet, or any folder of images laid out as it is: images [3, 224, 224], normalised with ``NORMS``.

    Test images are scaled to 256 on the shorter side and cut to the central 224.

    Args:
        root: the folder that holds ``train`` and ``val``, each with a folder of images for every class.
            None: ``data/imagenet``.
        augment: ``"crop-flip"``, a crop of random size and shape scaled to 224, and a horizontal flip with probability
            1/2: the "standard augmentation" of TET (A.1) and Dspike (5.3), from TET's code. ``"none"``: as in testing.
    """
    one_of("augment", augment, ("crop-flip", "none"))
    datasets, transforms = vision()
    finish = [transforms.ToTensor(), transforms.Normalize(*NORMS["imagenet"])]
    plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *finish])
    random = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *finish])
    root = root or ROOT / "imagenet"
    try:
        train = datasets.ImageFolder(root / "train", plain if augment == "none" else random, loader=_read)
        test = datasets.ImageFolder(root / "val", plain, loader=_read)
    except FileNotFoundError as error:
        command = f"from torchvision.datasets import ImageNet as I; [I({str(root)!r}, s) for s in ('train', 'val')]"
        raise FileNotFoundError(
            f"ImageNet is not in {root} ({error}). It wants {root}/train/CLASS/*.JPEG and {root}/val/CLASS/*.JPEG. "
            "image-net.org gives ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz to "
            f'those who register; with the three in {root}, this unpacks them:\n    python -c "{command}"'
        ) from error
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{root}: train and val must have the same classes; {differing[0]} is in one of them alone")
    return Data(train, test, len(train.classes), (3, 224, 224), False, _plain(train, plain))
