"""What each method does to 96 tokens, as pictures of its matrices; from bench_accuracy --matrices."""

import dataclasses
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize, PowerNorm

SIDE = 2.2  # inches of 96 tokens
NARROWEST = 0.5  # of landmarks
PLOT = 3.4  # of curves
GAP, TOP, BOTTOM = 0.42, 0.62, 0.24


@dataclasses.dataclass
class Panel:
    """A matrix with a title, and the sign in front of it; weights from 0 to top, or signed numbers from -top to top."""

    values: np.ndarray
    title: str
    sign: str = ""
    top: float | None = None
    signed: bool = False
    power: float = 1.0

    def __post_init__(self):
        self.values = np.array(self.values)
        self.top = self.top or float(np.abs(self.values).max())

    @property
    def size(self) -> tuple[float, float]:
        return tuple(max(NARROWEST, SIDE * length / 96) for length in self.values.shape[::-1])

    def draw(self, axes) -> None:
        style = {"cmap": "viridis", "norm": PowerNorm(self.power, 0, self.top, clip=True)}
        if self.signed:
            style = {"cmap": "RdBu_r", "norm": Normalize(-self.top, self.top)}
        axes.imshow(self.values, aspect="auto", interpolation="nearest", **style)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{self.title}\n{'±' if self.signed else '0 to '}{self.top:.2g}", fontsize=9)


def error(approximation: np.ndarray, exact: np.ndarray) -> str:
    return f"{np.linalg.norm(approximation - exact) / np.linalg.norm(exact):.2f}"


def place(panels: list[Panel], more: float = 0) -> tuple[plt.Figure, list, float]:
    """A figure of the panels in a row, each panel's axes, and where in inches `more` of room begins."""
    width = GAP + sum(panel.size[0] + GAP for panel in panels) + more
    height = SIDE + TOP + BOTTOM
    figure = plt.figure(figsize=(width, height))
    x, axes = GAP, []
    for panel in panels:
        w, h = panel.size
        y = BOTTOM + (SIDE - h) / 2
        axes.append(figure.add_axes((x / width, y / height, w / width, h / height)))
        panel.draw(axes[-1])
        figure.text((x - GAP / 2) / width, (BOTTOM + SIDE / 2) / height, panel.sign, ha="center", va="center", fontsize=14)
        x += w + GAP
    return figure, axes, x


def mark(axes, queries, keys) -> None:
    """Landmarks: triangles at their rows, if they are queries, and at their columns, if keys."""
    style = {"linestyle": "", "color": "tab:red", "markersize": 4, "clip_on": False}
    axes.plot(np.full(len(queries), -2.5), queries, marker=">", **style)
    axes.plot(keys, np.full(len(keys), 97.5), marker="^", **style)
    axes.set(xlim=(-0.5, 95.5), ylim=(95.5, -0.5))


def cut(axes, segments: int) -> None:
    """Where segments begin."""
    for line in (axes.axhline, axes.axvline):
        for boundary in np.arange(1, segments) * 96 / segments - 0.5:
            line(boundary, color="white", linewidth=0.4, alpha=0.6)


def plot(figure: plt.Figure, x: float, curves: dict[str, np.ndarray], title: str) -> plt.Axes:
    """Curves over the tokens, in the room that begins at x."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(((x + 0.3) / width, BOTTOM / height, (PLOT - 0.5) / width, SIDE / height))
    for name, values in curves.items():
        axes.plot(values, linewidth=1, label=name)
    axes.set(xticks=[], ylim=(0, 1.25 * max(values.max() for values in curves.values())))
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    return axes


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_softmax(methods: dict) -> plt.Figure:
    own = methods["softmax"]
    return place([
        Panel(own["scores"], "scores s q kᵀ", signed=True),
        Panel(own["S"], "S: exp, rows divided by sums", "→"),
        Panel(own["causal"], "S, causal: keys j ≤ i alone", top=0.2),
    ])[0]


def draw_gaussian(methods: dict) -> plt.Figure:
    own = methods["gaussian"]
    top = float(np.max(own["normalized"]))
    return place([
        Panel(own["C"], "C, raw rows"),
        Panel(own["normalized"], "C, rows divided by sums", "→", top),
        Panel(methods["softmax"]["S"], "softmax of the same tokens", top=top),
    ])[0]


def draw_nystrom(methods: dict) -> plt.Figure:
    own = methods["nystrom"]
    exact, product = np.array(methods["softmax"]["S"]), np.array(own["N"])
    figure, axes, _ = place([
        Panel(exact, "S"),
        Panel(own["F"], "F", "≈"),
        Panel(own["Z"], "Z", "·", signed=True),
        Panel(own["B"], "B", "·"),
        Panel(product, "F Z B", "=", exact.max()),
        Panel(product - exact, f"error {error(product, exact)}", signed=True),
    ])
    for panel in (axes[0], axes[4]):
        cut(panel, len(own["Z"]))
    return figure


def draw_shifted_nystrom(methods: dict) -> plt.Figure:
    exact, nystrom, shifted = (np.array(methods["shifted-nystrom"][name]) for name in "SNR")
    shown = {"top": exact.max(), "power": 0.5}
    figure, _, x = place([
        Panel(exact, "S", **shown),
        Panel(nystrom, f"N = F Z B, error {error(nystrom, exact)}", **shown),
        Panel(shifted, f"shifted, error {error(shifted, exact)}", **shown),
    ], PLOT)
    curves = {"S": np.diag(exact), "shifted": np.diag(shifted), "N": np.diag(nystrom)}
    plot(figure, x, curves, "diagonals, token by token").legend(fontsize=8, ncols=3, loc="upper center")
    return figure


def draw_skyformer(methods: dict) -> plt.Figure:
    own, exact = methods["skyformer"], np.array(methods["gaussian"]["C"])
    product = np.array(own["product"])
    figure, axes, _ = place([
        Panel(exact, "C"),
        Panel(own["left"], "κ(q, L)", "≈"),
        Panel(own["core"], "(κ(L, L) + γ I)⁻¹", "·", signed=True),
        Panel(own["right"], "κ(L, k)", "·"),
        Panel(product, "their product", "=", 1),
        Panel(product - exact, f"error {error(product, exact)}", signed=True),
    ])
    for panel in (axes[0], axes[4]):
        mark(panel, own["queries"], own["keys"])
    return figure


def draw_lifted_softmax(methods: dict) -> plt.Figure:
    own, landmarks, exact = methods["lifted-softmax"], methods["skyformer"], np.array(methods["softmax"]["S"])
    product = np.array(own["product"])
    figure, axes, x = place([
        Panel(exact, "S"),
        Panel(product, "Ã, rows divided by sums", "≈", exact.max()),
        Panel(product - exact, f"error {error(product, exact)}", signed=True),
    ], PLOT)
    for panel in axes[:2]:
        mark(panel, landmarks["queries"], landmarks["keys"])
    plot(figure, x, {"": np.exp(own["log-weights"])}, "weight of each key, exp(s |k|² / 2)")
    return figure


def draw(inputs: list[pathlib.Path], out: pathlib.Path) -> None:
    methods = json.loads(inputs[0].read_text())
    for name, figure_of in (
        ("softmax", draw_softmax),
        ("gaussian", draw_gaussian),
        ("nystrom", draw_nystrom),
        ("shifted-nystrom", draw_shifted_nystrom),
        ("skyformer", draw_skyformer),
        ("lifted-softmax", draw_lifted_softmax),
    ):
        save(figure_of(methods), out / f"method_{name}.png")
