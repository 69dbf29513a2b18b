"""Time and fraction of the peak against the length of the sequence, and a table of exponents; from bench_growth."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

from . import _figure, _results

FITTED_FROM = 1024  # tokens
TARGETS = {"multipole": "softmax", "nystrom": "softmax", "shifted-nystrom": "softmax", "lifted-softmax": "softmax"}
TARGETS |= {"skyformer": "gaussian"}


def exponent(n: np.ndarray, cost: np.ndarray) -> float:
    """Of n in the cost, to two digits, by least squares of the logarithms, over lengths from FITTED_FROM on."""
    fitted = n >= FITTED_FROM
    return round(np.polyfit(np.log(n[fitted]), np.log(cost[fitted]), 1)[0], 2) + 0.0  # no -0.00


def crossing(method: dict, exact: dict) -> float:
    """The length from which the method takes less than 0.95 times as long as exact attention: some noise is no lead.

    Between measured lengths by their logarithms.
    """
    n = method["n"][: len(exact["n"])]
    lead = np.log(method["ms"][: len(n)] / exact["ms"][: len(n)] / 0.95)
    slower = np.flatnonzero(lead >= 0)
    if slower.size == 0:
        return n[0]
    last = slower[-1]
    if last + 1 == len(n):
        return np.inf
    return float(np.exp(np.interp(0, -lead[last : last + 2], np.log(n[last : last + 2]))))


def series(rows: list[dict]) -> dict[str, dict]:
    """For each method: n, ascending, and ms, bytes and of_peak there."""
    by_method = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["n"])
        by_method[label.removesuffix("/float")] = {
            name: np.array([row[name] for row in own], dtype=float) for name in ("n", "ms", "bytes", "of_peak")
        }
    return by_method


def print_table(methods: dict[str, dict]) -> None:
    """In Markdown: exponents and figures from FITTED_FROM on, and where exact attention stops being faster."""
    columns = "method", "time grows as", "memory as", "n from 1024 to", "ms", "KiB of memory", "faster than exact from"
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, s in methods.items():
        start = f"n = {crossing(s, methods[TARGETS[name]]):.0f}" if name in TARGETS else ""
        first = np.flatnonzero(s["n"] == FITTED_FROM)[0]
        ms, kib = s["ms"], s["bytes"] / 1024
        print(
            f"| `{name}` | n^{exponent(s['n'], ms):.2f} | n^{exponent(s['n'], kib):.2f} | {s['n'][-1]:.0f} "
            f"| {ms[first]:.2g} to {ms[-1]:.0f} | {kib[first]:.0f} to {kib[-1]:.0f} | {start} |"
        )


def draw(inputs: list[pathlib.Path], out: pathlib.Path) -> None:
    methods = series(_results.read(inputs))
    print_table(methods)
    figure, (time, peak) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, s in methods.items():
        style = {"marker": "o", "markersize": 3, "linestyle": "-" if name in TARGETS else "--"}
        style |= {"linewidth": 2.4 if name == "multipole" else 1.3}
        time.loglog(s["n"], s["ms"], label=f"{name}: n^{exponent(s['n'], s['ms']):.2f}", **style)
        peak.semilogx(s["n"], s["of_peak"], label=name, **style)
    time.set(xlabel="tokens n", ylabel="ms", title="Time of a forward pass: one core, float, d = 64,\n64 landmarks or multipole's own counts")
    peak.set(xlabel="tokens n", ylabel="fraction of the FMA peak", ylim=(0, 1))
    peak.set_title("Fraction of the peak: 4 n² d flops if exact, 8 n m d with\nlandmarks, 4 d for each pair that multipole computes")
    time.legend(fontsize=8)
    _figure.save(figure, out / "growth.png")
