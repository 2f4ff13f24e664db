"""``python -m snnkern``; under torchrun: ``torchrun --nproc-per-node 4 -m snnkern train RECIPE``."""

from .cli import main

main()
