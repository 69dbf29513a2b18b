"""The pictures of docs/accuracy.md, from what bench_accuracy --json wrote: one for each study."""

import json
import statistics

import matplotlib.pyplot as plt
import matplotlib.ticker

from . import _figure

FAMILIES = ("smooth", "clusters", "words", "self", "init", "unit")
STYLES = {
    "multipole": ("tab:orange", "*-", "multipole"),
    "nystrom": ("tab:blue", "o-", "Nyströmformer"),
    "shifted-nystrom": ("tab:green", "s-", "spectral shifting"),
    "lifted-softmax": ("tab:red", "^-", "lifted softmax"),
    "skyformer": ("tab:purple", "D-", "Skyformer (Gaussian)"),
    "softmax mean(v)": ("0.5", ":", "mean(v), softmax"),
    "gaussian mean(v)": ("plum", ":", "mean(v), Gaussian"),
    "softmax best rank m": ("0.2", "--", "best rank m, softmax"),
    "gaussian best rank m": ("tab:purple", "--", "best rank m, Gaussian"),
}
LARGEST_ERROR = 10  # errors above it are drawn at the edge


def band(axes, rows, x, figure, color, style, label, width=1.4):
    """The median of a figure against x, and its range over the seeds."""
    at = [row[x] for row in rows]
    median, low, high = ([min(row[figure][which], LARGEST_ERROR) for row in rows] for which in ("median", "min", "max"))
    axes.plot(at, median, style, color=color, label=label, markersize=4, linewidth=width)
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def panels(columns, rows, width=3.1, height=2.7):
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, axes


def family_panels(table, height):
    """A figure, and for each family its panel and its rows."""
    figure, axes = panels(3, 2, 3.4, height)
    for panel, family in zip(axes.flat, FAMILIES):
        panel.set(xscale="log", yscale="log", title=family)
    rows = [[row for row in table["rows"] if row["family"] == family] for family in FAMILIES]
    return figure, list(zip(axes.flat, rows))


def landmark_axis(panel, rows):
    """Marks the numbers of landmarks that the rows have."""
    panel.set(xscale="log")
    panel.set_xticks([row["m"] for row in rows], [str(row["m"]) for row in rows])
    panel.minorticks_off()


def save(figure, path, columns, x="", y=""):
    """With labels and one legend, the first panel's, for all."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=columns, frameon=False, fontsize=9)
    rows = -(-len(labels) // columns)
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.1 + 0.22 * rows) / height))
    _figure.save(figure, path)


def draw_features(table, path):
    sizes = sorted({row["n"] for row in table["rows"]})
    figure, axes = panels(len(FAMILIES), len(sizes), 2.5, 2.4)
    for line, n in zip(axes, sizes):
        for panel, family in zip(line, FAMILIES):
            rows = [row for row in table["rows"] if row["n"] == n and row["family"] == family]
            if not rows:
                panel.set_axis_off()
                continue
            for name, (color, style, label) in STYLES.items():
                if name not in rows[0]:
                    continue
                width = 3.5 if name == "nystrom" else 1.4  # to be seen where spectral shifting does the same
                band(panel, rows, "m", name, color, style, label, width)
            panel.set(yscale="log", ylim=(1e-3, LARGEST_ERROR), title=f"{family}, n = {n}")
            landmark_axis(panel, rows)
            if family != FAMILIES[0]:
                panel.set_yticklabels([])
    save(figure, path, 4, "landmarks m", "relative error, spectral norm")


def draw_shift(table, path):
    figure, axes = panels(1, 1, 6.4, 4.4)
    panel = axes[0][0]
    for name, color, style, label in (
        ("nystrom", "tab:blue", "o-", "Nyströmformer"),
        ("paper", "tab:orange", "v-", "shift, mode paper"),
        ("scalar", "tab:olive", "^-", "shift, mode scalar"),
        ("row", "tab:green", "s-", "shift, mode row"),
        ("best core", "tab:blue", "--", "best core, no shift"),
        ("best core and shift", "tab:green", "--", "best core and shift (oracle)"),
        ("best rank m", "0.2", ":", "best rank m"),
    ):
        band(panel, table["rows"], "share", name, color, style, label)
    first = table["rows"][0]
    panel.set(yscale="log", xlabel="share of noise: the spectrum decays ever more slowly")
    panel.set(ylabel="relative error, Frobenius norm", title=f"q = k, n = {first['n']}, m = {first['m']}")
    save(figure, path, 3)


def draw_pareto(table, path):
    figure, families = family_panels(table, 3.0)
    for panel, rows in families:
        for name in ("multipole", "nystrom", "shifted-nystrom", "lifted-softmax", "skyformer"):
            color, style, label = STYLES[name]
            of_method = [row for row in rows if row["method"] == name]
            points = [(row["ms"]["median"], min(row["error"]["median"], LARGEST_ERROR)) for row in of_method]
            panel.plot(*zip(*points), style, color=color, label=label, markersize=4, linewidth=1.2)
        for target, color in (("softmax", "0.5"), ("gaussian", "plum")):
            mean, exact = ([row for row in rows if row["target"] == target and row["method"] == method][0]
                           for method in ("mean(v)", target))
            panel.axhline(mean["error"]["median"], color=color, linestyle=":", label=f"mean(v), {target}")
            panel.axvline(exact["ms"]["median"], color=color, linestyle="--", label=f"time of exact {target}")
        panel.set(ylim=(0.01, LARGEST_ERROR))
    x = f"ms of a forward pass, n = {table['rows'][0]['n']}, one core"
    save(figure, path, 4, x, "relative error, Frobenius norm")


MODELS = {"whisper": "Whisper tiny.en", "dinov2": "DINOv2 ViT-S", "lightglue": "LightGlue", "minilm": "MiniLM-L6",
          "smollm2": "SmolLM2-135M"}
OF_TENSORS = {
    "multipole": STYLES["multipole"],
    "nystrom": STYLES["nystrom"],
    "shifted-nystrom": STYLES["shifted-nystrom"],
    "lifted-softmax": STYLES["lifted-softmax"],
    "skyformer": STYLES["skyformer"],
    "wildcat": ("tab:brown", "v-", "WildCat"),
    "wildcat, 8 bins": ("tab:brown", "v--", "WildCat, 8 bins"),
    "sampled keys": ("0.5", "x-", "sampled keys"),
}
SMALLEST_ERROR = 1e-3  # smaller ones are left out


def median_of(rows, figure):
    """Over heads, of their medians."""
    return statistics.median(row[figure]["median"] for row in rows)


def draw_model(panel, rows):
    """Lines over the numbers m of each method, medians over the heads; multipole's own choice is marked."""
    for method, (color, style, label) in OF_TENSORS.items():
        by_number = {m: [row for row in rows if row["method"] == method and row["m"] == m]
                     for m in sorted({row["m"] for row in rows if row["method"] == method})}
        points = {m: (median_of(own, "ms"), median_of(own, "error")) for m, own in by_number.items()}
        line = [point for m, point in points.items() if m > 0 and SMALLEST_ERROR < point[1] < LARGEST_ERROR]
        if line:
            panel.plot(*zip(*line), style, color=color, label=label, markersize=4, linewidth=1.2)
        if 0 in points:
            at, error = points[0]
            exact = error < SMALLEST_ERROR
            panel.plot(at, SMALLEST_ERROR if exact else error, "v" if exact else "o", color=color, markersize=10,
                       fillstyle="none", markeredgewidth=1.6, label="multipole by default", clip_on=False)


def draw_tensors(table, path):
    """A panel for each model and length, causal ones last: those that landmarks do not serve."""
    panels_of = {}
    for row in table["rows"]:
        panels_of.setdefault((row["model"], row["n"]), []).append(row)
    is_causal = {key: all(row["method"] != "nystrom" for row in rows) for key, rows in panels_of.items()}
    order = sorted(panels_of, key=lambda key: (is_causal[key], -key[1]))
    columns = 3 if len(order) <= 6 else 4
    figure, axes = panels(columns, -(-len(order) // columns), 3.0, 3.1)
    for panel in axes.flat[len(order):]:
        panel.set_axis_off()
    for panel, key in zip(axes.flat, order):
        rows = panels_of[key]
        draw_model(panel, rows)
        for method, figure_of, line, style, label in (
            ("mean(v)", "error", panel.axhline, ":", "mean(v)"),
            ("softmax", "ms", panel.axvline, "--", "time of exact attention"),
        ):
            at = median_of([row for row in rows if row["method"] == method], figure_of)
            line(at, color="0.5", linestyle=style, label=label)
        heads = len({row["tensor"] for row in rows})
        model, n = MODELS.get(key[0], key[0]), key[1]
        panel.set(xscale="log", yscale="log", ylim=(SMALLEST_ERROR, 2))
        panel.set_title(f"{model}{', causal' if is_causal[key] else ''}\nn = {n}, {heads} head{'s' * (heads > 1)}", fontsize=9)
        panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.tick_params(labelsize=8)
    save(figure, path, 4, "ms of a forward pass, one core", "relative error, Frobenius norm")


def draw_spectra(table, path):
    figure, families = family_panels(table, 2.8)
    for panel, rows in families:
        for name, color, style, label in (
            ("softmax", "tab:blue", "o-", "softmax"),
            ("exp", "tab:orange", "^-", "exp of the scores, no division"),
            ("gaussian", "tab:purple", "D-", "Gaussian"),
        ):
            band(panel, rows, "i", name, color, style, label)
        panel.set(ylim=(1e-9, 2))
    save(figure, path, 3, f"which one, of {table['rows'][0]['n']}", "singular value / the largest")


def draw_loewner(table, path):
    figure, axes = panels(3, 1, 3.4, 3.4)
    gamma = min(row["gamma"] for row in table["rows"])
    colors = dict(zip(FAMILIES, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")))
    markers = dict(zip(FAMILIES, "osv^DX"))
    needed, *shares = axes[0]
    for family in FAMILIES:
        rows = [row for row in table["rows"] if row["family"] == family and row["gamma"] == gamma]
        style = markers[family] + "-"
        band(needed, rows, "m", "highest", colors[family], style, family)
        for panel, tolerance in zip(shares, ("lambda .1", "lambda .3")):
            share = [row[tolerance]["median"] for row in rows]
            panel.plot([row["m"] for row in rows], share, style, color=colors[family], markersize=4)
            panel.set(title=f"share of draws with λ = {tolerance[7:]} |C|", ylim=(-0.05, 1.05))
    needed.set(yscale="log", ylim=(0.01, 1.2), title="λ / |C| that is needed")
    for panel in axes[0]:
        landmark_axis(panel, rows)
    save(figure, path, 6, f"landmarks m, of {2 * table['rows'][0]['n']} tokens in [q; k]")


def draw(inputs, out):
    """Of several inputs, a later one's tables replace an earlier one's."""
    tables = {}
    for path in inputs:
        tables.update(json.loads(path.read_text())["tables"])
    for name, draw_table in (
        ("features", draw_features),
        ("shift", draw_shift),
        ("pareto", draw_pareto),
        ("tensors", draw_tensors),
        ("spectra", draw_spectra),
        ("loewner", draw_loewner),
    ):
        if name in tables:
            draw_table(tables[name], out / f"accuracy_{name}.png")
