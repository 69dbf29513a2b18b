"""Peers as bars, from bench_peers' JSON: medians of the fraction of the FMA peak, with their standard deviations."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

from . import _results


def draw(inputs: list[pathlib.Path], out: pathlib.Path) -> None:
    rows = _results.read(inputs)
    lengths = sorted({row["n"] for row in rows})

    def of_peak(label: str, aggregate: str) -> list[float]:
        own = [row for row in rows if row["label"] == label and row["aggregate_name"] == aggregate]
        return [row["of_peak"] for row in sorted(own, key=lambda row: row["n"])]

    labels = sorted({row["label"] for row in rows})  # attn comes first
    causal = [label for label in labels if label.endswith("/causal")]
    full = [label for label in labels if label not in causal]
    widths = [len(full), len(causal)]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained", width_ratios=widths)
    colours = {label: f"C{i}" for i, label in enumerate(full)}
    for axes, shown, title in zip(panels, (full, causal), ("every key", "causal, on half the flops")):
        width = 0.8 / len(shown)
        for i, label in enumerate(shown):
            name = label.removesuffix("/causal")
            places = np.arange(len(lengths)) + (i - (len(shown) - 1) / 2) * width
            style = {"label": name.replace("_", " "), "color": colours[name], "error_kw": {"linewidth": 0.8}}
            axes.bar(places, of_peak(label, "median"), width, yerr=of_peak(label, "stddev"), **style)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set(xlabel="tokens n", title=f"softmax attention, {title}", ylim=(0, 1))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("fraction of the FMA peak")
    panels[0].legend(fontsize=8, ncols=len(full), loc="upper center")
    figure.savefig(out / "peers.png", dpi=100)
