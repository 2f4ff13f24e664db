"""Long series by the networks of the literature: ``python -m experiments.long`` (see ``--help``).

The recipes ``long-*`` whose data comes in a package, each trained with all ``NETWORKS`` in place of its own neurons.
What is finished stays in the work folder and is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from snnkern.analysis import pictures
from snnkern.files import replacing, versions, write_json
from snnkern.train.compare import compare, run_folder
from snnkern.train.folder import read_metrics
from snnkern.train.recipe import Recipe, load, read

COMMAND = "python -m experiments.long"
NETWORKS = {  # whether they are recurrent, and the keywords of their neurons beside the recipe's
    "feed-forward": (False, {}),
    "feed-forward, current-based": (False, {"synapse_decay": 0.8}),
    "recurrent": (True, {}),
    "recurrent, current-based": (True, {"synapse_decay": 0.8}),
    "recurrent, adaptive": (True, {"threshold_decay": 0.95, "threshold_jump": 0.1}),
}
KNOWN = {  # the name of the data, and what others reach, in %; sources: docs/long.md
    "long-japanese-vowels": ("JapaneseVowels, T = 29", {"InceptionTime": 99.2, "nearest neighbour": 94.1}),
    "long-digits": ("digits pixel by pixel, T = 64", {"nearest neighbour": 98.5}),
    "long-basic-motions": ("BasicMotions, T = 100", {"InceptionTime": 100.0, "nearest neighbour": 57.5}),
    "long-acsf1": ("ACSF1, T = 1,460", {"InceptionTime": 92.0, "nearest neighbour": 54.0}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(COMMAND, description="Long series by the networks of the literature.")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", choices=KNOWN, default=[*KNOWN], help="some recipes")
    parser.add_argument("--networks", nargs="+", metavar="NAME", choices=NETWORKS, default=[*NETWORKS], help="some")
    parser.add_argument("--out", type=Path, default=Path("docs/long"), help="results.json, results.md, accuracy.png")
    parser.add_argument("--work", type=Path, default=Path("runs/long"), help="finished trainings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all recipes, as stage.epochs=1")
    given = parser.parse_args(arguments)
    found = {}
    for name in given.only:
        chosen = {kind.replace(", ", "-"): variant(load(name, given.overrides), kind) for kind in given.networks}
        results = compare(chosen, given.work / name)
        accuracy = {
            kind: [over_epochs(run_folder(given.work / name, folder, seed, len(chosen))) for seed in results["seeds"]]
            for kind, folder in zip(given.networks, chosen, strict=True)
        }
        found[name] = {"recipe": load(name, given.overrides).settings(), "accuracy": accuracy}
        seconds = sum(run["seconds"] for run in results["runs"])
        print(f"{name}: {len(results['runs'])} trainings in {seconds:.0f} s", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "results.json", {"versions": versions(), "networks": NETWORKS, "results": found})
    with replacing(given.out / "results.md") as file:
        file.write(table(found).encode())
    panels = {KNOWN[name][0]: (held["accuracy"], KNOWN[name][1]) for name, held in found.items()}
    pictures.epochs(given.out / "accuracy.png", panels)


def over_epochs(folder: Path) -> list[float]:
    return [100 * epoch["test_accuracy"] for epoch in read_metrics(folder)]


def variant(recipe: Recipe, network: str) -> Recipe:
    """The recipe with one of ``NETWORKS``."""
    settings, (recurrent, states) = recipe.settings(), NETWORKS[network]
    every = {key for _, more in NETWORKS.values() for key in more}
    settings["neuron"] = {key: value for key, value in settings["neuron"].items() if key not in every} | states
    settings["model"]["recurrent"] = recurrent
    return read(settings)


def table(found: dict) -> str:
    """Test accuracy after the last epoch: a line for each network."""
    names = [*found]
    lines = [["test accuracy, %", *(KNOWN[name][0] for name in names)], ["---", *["---:"] * len(names)]]
    for kind in found[names[0]]["accuracy"]:
        last = [[run[-1] for run in found[name]["accuracy"][kind]] for name in names]
        lines.append([kind, *(f"{mean(a):.1f}" + (f" ± {stdev(a):.1f}" if len(a) > 1 else "") for a in last)])
    for method in dict.fromkeys(method for name in names for method in KNOWN[name][1]):
        lines.append([method, *(f"{known[method]}" if (known := KNOWN[name][1]).get(method) else "" for name in names)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
