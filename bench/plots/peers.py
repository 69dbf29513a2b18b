"""Peers as bars, from bench_peers' JSON: medians of the fraction of the FMA peak, with their standard deviations.

Prints how many times attn's time each peer takes for Nyströmformer.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

from . import _figure, _results

PANELS = {  # what follows the peer's name in a label, and the panel's title
    "": "softmax attention, every key",
    "causal": "softmax attention, causal, on half the flops",
    "nystrom": "Nyströmformer, 8 n m d",
}


def series(rows: list[dict], aggregate: str, figure: str) -> dict[str, dict[str, list[float]]]:
    """panel -> peer -> the figure at each length, attn first."""
    found = {panel: {} for panel in PANELS}
    for row in sorted(rows, key=lambda row: (row["label"], row["n"])):
        if row["aggregate_name"] == aggregate:
            peer, _, panel = row["label"].partition("/")
            found[panel].setdefault(peer, []).append(row[figure])
    return found


def print_ratios(rows: list[dict]) -> None:
    medians, deviations = (series(rows, aggregate, "ms")["nystrom"] for aggregate in ("median", "stddev"))
    lengths = series(rows, "median", "n")["nystrom"]
    for peer in medians:
        for i, ms in enumerate(medians[peer]):
            print(f"{peer}, n = {lengths[peer][i]}: {ms:.1f} ± {deviations[peer][i]:.1f} ms, {ms / medians['attn'][i]:.2f} times attn's")


def draw_bars(axes, medians: dict, deviations: dict, colours: dict) -> None:
    width = 0.8 / len(medians)
    for i, (peer, heights) in enumerate(medians.items()):
        places = np.arange(len(heights)) + (i - (len(medians) - 1) / 2) * width
        style = {"label": peer.replace("_", " "), "color": colours[peer], "error_kw": {"linewidth": 0.8}}
        axes.bar(places, heights, width, yerr=deviations[peer], **style)


def draw(inputs: list[pathlib.Path], out: pathlib.Path) -> None:
    rows = _results.read(inputs)
    print_ratios(rows)
    medians, deviations = (series(rows, aggregate, "of_peak") for aggregate in ("median", "stddev"))
    lengths = {panel: sorted({row["n"] for row in rows if row["label"].partition("/")[2] == panel}) for panel in PANELS}
    figure, panels = plt.subplots(
        1, 3, figsize=(15, 4), sharey=True, layout="constrained", width_ratios=[len(n) for n in lengths.values()]
    )
    colours = {peer: f"C{i}" for i, peer in enumerate(medians[""])}
    for axes, (panel, title) in zip(panels, PANELS.items()):
        draw_bars(axes, medians[panel], deviations[panel], colours)
        axes.set_xticks(range(len(lengths[panel])), lengths[panel])
        axes.set(xlabel="tokens n", title=title, ylim=(0, 1))
    panels[0].set_ylabel("fraction of the FMA peak")
    panels[0].legend(fontsize=8, ncols=len(colours), loc="upper center")
    _figure.save(figure, out / "peers.png", grid="y")
