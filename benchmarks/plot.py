"""The picture of a result file: forward + backward of one layer, per contender."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = ["#0072B2", "#D55E00", "#999999", "#E69F00", "#CC79A7"]  # Okabe and Ito: told apart by every eye


def draw(results: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    content = json.loads(results.read_text())
    rows = [r for r in content["rows"] if r.get("mode") == "forward + backward" and r["contender"] != "Tensor.copy_"]
    cases = list(dict.fromkeys((r["T"], r["N"]) for r in rows))
    names = list(dict.fromkeys(r["contender"] for r in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for row in rows:
            if row["contender"] == name:
                at = cases.index((row["T"], row["N"])) + (i - (len(names) - 1) / 2) * width
                axes.bar(at, row["ms"], width, color=COLOURS[i], label=name)
                label = f"{row['over_snnkern']:.0f}x" if i else f"{row['ms']:.2g} ms"
                axes.annotate(label, (at, row["ms"]), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("ms, forward + backward (log scale)")
    axes.set_xticks(range(len(cases)), [f"T = {steps:,}\nN = {neurons:,}" for steps, neurons in cases])
    axes.set_title(f"One LIF layer, float32, {content['machine']['device']}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
