"""Runs of train_listops: curves against steps and seconds, spectra of what was learnt, how unstable learning was.

Takes its --csv and --spectrum files in any order and draws training.png and training_diagnostics.png.
"""

import csv
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np

from . import _figure

ORDER = ["softmax", "nystrom", "shifted-nystrom", "gaussian", "skyformer", "lifted-softmax", "multipole"]


def read(inputs):
    """method -> seed -> column -> values, of the runs and of the spectra."""
    runs, spectra = defaultdict(dict), defaultdict(dict)
    for path in inputs:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise SystemExit(f"{path}: holds no rows")
        kind = spectra if "singular_value" in rows[0] else runs
        numbers = [name for name in rows[0] if name not in ("method", "seed")]
        columns = {name: np.array([float(row[name]) for row in rows]) for name in numbers}
        kind[rows[0]["method"]][rows[0]["seed"]] = columns
    return runs, spectra


def in_order(kind):
    """Methods with their colours, which are the same in every picture."""
    return [(method, f"C{i}", list(kind[method].values())) for i, method in enumerate(ORDER) if method in kind]


def common(seeds, column, at):
    """(seeds, points): where all of them have a value at the same step or index."""
    shared = sorted(set.intersection(*(set(columns[at]) for columns in seeds)))
    return np.array([columns[column][np.isin(columns[at], shared)] for columns in seeds])


def draw_mean(axes, x, values, colour, label):
    """The mean over seeds, between the least and the most."""
    axes.plot(x, values.mean(axis=0), color=colour, label=label, linewidth=1.6)
    if len(values) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def draw_curves(runs, out):
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for method, colour, seeds in in_order(runs):
        for row, column in enumerate(["validation_loss", "validation_accuracy"]):
            values = common(seeds, column, "step")
            label = f"{method} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            draw_mean(panels[row][0], common(seeds, "step", "step")[0], values, colour, label)
            seconds = common(seeds, "cpu_seconds", "step").mean(axis=0)
            draw_mean(panels[row][1], seconds, values, colour, label)
    for axes in panels[1]:
        for column, style in [("root_operator", "--"), ("majority", ":")]:
            level = next(iter(next(iter(runs.values())).values()))[column][0]
            label = column.replace("_", " ")
            axes.axhline(level, color="grey", linestyle=style, linewidth=1, label=label)
    panels[0][0].set_ylabel("validation loss")
    panels[1][0].set_ylabel("validation accuracy")
    panels[1][0].set_xlabel("steps")
    panels[1][1].set_xlabel("processor seconds of training")
    panels[0][1].legend(fontsize=8)
    handles, labels = panels[1][1].get_legend_handles_labels()
    panels[1][1].legend(handles[-2:], labels[-2:], fontsize=8, loc="lower right")
    save(figure, out / "training.png")


def draw_diagnostics(runs, spectra, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for method, colour, seeds in in_order(spectra):
        values = common(seeds, "singular_value", "index")
        draw_mean(left, common(seeds, "index", "index")[0], values, colour, method)
    left.set(yscale="log", ylim=(1e-8, 2), xlabel="index", ylabel="singular value / largest")
    left.set_title("attention of the trained second layer")
    if "softmax" in runs:
        reference = list(runs["softmax"].values())
        for method, colour, seeds in in_order(runs):
            both = common(seeds + reference, "instability", "step")
            score, of_softmax = smooth(both[: len(seeds)]), smooth(both[len(seeds) :])
            steps = common(seeds + reference, "step", "step")[0]
            right.plot(steps, score / of_softmax, color=colour, label=method)
    right.set(ylim=(0, None), xlabel="steps", ylabel="instability / softmax's")
    right.set_title("change of the scores per change of the weights")
    left.legend(fontsize=8)
    save(figure, out / "training_diagnostics.png")


def smooth(scores):
    """The geometric mean over seeds and up to five neighbours: the score of a single step is noisy."""
    logs = np.log(scores).mean(axis=0)
    return np.exp([logs[max(0, i - 2) : i + 3].mean() for i in range(len(logs))])


def save(figure, path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    _figure.save(figure, path)


def draw(inputs, out):
    runs, spectra = read(inputs)
    if runs:
        draw_curves(runs, out)
    if spectra:
        draw_diagnostics(runs, spectra, out)
