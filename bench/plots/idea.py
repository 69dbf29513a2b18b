"""The library's idea on one screen: what near and far keys, landmarks and the lift make of one head's weights.

Inputs: NAME_q.npy, NAME_k.npy and NAME_v.npy of a head, as in bench/accuracy/tensors. Each approximation is built here
from its definition.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm

from plots import _figure

TOKENS = 512  # of the head's, the first
CLUSTERS, NEAR = 64, 8  # of 8 keys each; groups of 8 queries
LANDMARKS = 128  # on each side, or of queries and keys together
GAMMA = 1e-3  # of the lift's ridge, with weights of tokens of equal norm
BELOW_TOP = 0.998  # of all weights are below the top of the colours


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def bisect(x: np.ndarray, rows: np.ndarray, parts: int) -> list[np.ndarray]:
    """Rows cut into so many parts, a power of two, each halved at the median along its first principal direction."""
    if parts == 1:
        return [rows]
    centred = x[rows] - x[rows].mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    order, half = rows[np.argsort(along, kind="stable")], len(rows) // 2
    return bisect(x, order[:half], parts // 2) + bisect(x, order[half:], parts // 2)


def multipole(q: np.ndarray, k: np.ndarray, v: np.ndarray, groups: list, clusters: list) -> tuple[np.ndarray, np.ndarray]:
    """Its matrix, and which cluster is near to which group."""
    matrix, nearness = np.zeros((len(q), len(k))), np.zeros((len(groups), len(clusters)), bool)
    for g, queries in enumerate(groups):
        mean = q[queries].mean(axis=0)
        inside = [softmax(mean @ k[keys].T) for keys in clusters]
        middles = np.array([r @ k[keys] for r, keys in zip(inside, clusters)])
        bias = np.array([np.log(np.exp(mean @ k[keys].T - mean @ m).sum()) for m, keys in zip(middles, clusters)])
        log_weights = q[queries] @ middles.T + bias
        spread = np.array([
            np.sqrt(r @ ((q[queries] - mean) @ (k[keys] - m).T).var(axis=0) * (r @ ((v[keys] - r @ v[keys]) ** 2).sum(axis=1)))
            for r, m, keys in zip(inside, middles, clusters)
        ])
        weight = np.sqrt((softmax(log_weights) ** 2).mean(axis=0))
        near = np.argsort(-weight * spread)[:NEAR]
        nearness[g, near] = True
        rows = np.zeros((len(queries), len(k)))
        top = log_weights.max(axis=1, keepdims=True)
        for c, keys in enumerate(clusters):
            far = np.exp(log_weights[:, c : c + 1] - top) * inside[c]
            rows[:, keys] = np.exp(q[queries] @ k[keys].T - top) if nearness[g, c] else far
        matrix[queries] = rows / rows.sum(axis=1, keepdims=True)
    return matrix, nearness


def nystrom(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    means = lambda x: x.reshape(LANDMARKS, -1, x.shape[1]).mean(axis=1)
    q_land, k_land = means(q), means(k)
    return softmax(q @ k_land.T) @ np.linalg.pinv(softmax(q_land @ k_land.T), rcond=1e-3) @ softmax(q_land @ k.T)


def lifted(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """exp(q k') is a Gaussian kernel of [q; k], with weights on both sides: that is approximated from sampled rows."""
    tokens = np.concatenate([q, k])
    land = tokens[np.random.default_rng(0).choice(len(tokens), LANDMARKS, replace=False)]
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=-1) / 2)
    core = np.linalg.solve(kernel(land, land) + GAMMA * np.eye(LANDMARKS), kernel(land, k))
    log_weights = (k**2).sum(axis=1) / 2
    rows = kernel(q, land) @ core * np.exp(log_weights - log_weights.max())
    return rows / rows.sum(axis=1, keepdims=True)


def error(approximation: np.ndarray, exact: np.ndarray, v: np.ndarray) -> float:
    """Of the result, relative in the Frobenius norm."""
    return np.linalg.norm((approximation - exact) @ v) / np.linalg.norm(exact @ v)


def outline(axes, nearness: np.ndarray) -> None:
    """A frame around near clusters."""
    group, cluster = TOKENS / nearness.shape[0], TOKENS / nearness.shape[1]
    for g, c in np.argwhere(nearness):
        corner = (c * cluster - 0.5, g * group - 0.5)
        axes.add_patch(plt.Rectangle(corner, cluster, group, fill=False, edgecolor="tab:red", linewidth=0.6))


def explain(axes, top: float) -> None:
    """How to read the picture, in the room of a panel."""
    lines = [
        f"{TOKENS} tokens of a head of a trained model:",
        "a query a row, a key a column, both in the",
        "order of clusters.",
        f"Colours: weights from 0 to {top:.2g}.",
        "Red frames: near, computed exactly.",
        "",
        "On the right, approximation minus softmax:",
        "red is too large a weight, blue too small.",
        "The error is that of the result.",
        "",
        "All three meet about as many numbers",
        "a query, a quarter of the keys.",
    ]
    axes.axis("off")
    axes.text(0, 0.97, "\n".join(lines), fontsize=10, va="top", linespacing=1.5, transform=axes.transAxes)


def draw(inputs: list[pathlib.Path], out: pathlib.Path) -> None:
    q, k, v = (np.load(path).astype(float)[:TOKENS] for path in inputs)
    q, k = (x / q.shape[1] ** 0.25 for x in (q, k))  # scores are q k'
    k = k - k.mean(axis=0)  # which changes no weight of softmax
    exact = softmax(q @ k.T)
    groups, clusters = (bisect(x, np.arange(TOKENS), CLUSTERS) for x in (q, k))
    fields, nearness = multipole(q, k, v, groups, clusters)
    in_order = np.ix_(np.concatenate(groups), np.concatenate(clusters))
    panels = [
        ("exact softmax", f"{TOKENS} keys a query", exact),
        ("near and far: multipole", f"{NEAR * TOKENS // CLUSTERS} near keys, {CLUSTERS - NEAR} far clusters", fields),
        ("landmarks: Nyströmformer", f"means of {LANDMARKS} segments", nystrom(q, k)),
        ("the lift: a Gaussian kernel", f"{LANDMARKS} sampled tokens", lifted(q, k)),
    ]
    top = float(np.quantile(exact, BELOW_TOP))
    figure, axes = plt.subplots(2, 4, figsize=(13, 7), gridspec_kw={"hspace": 0.12, "wspace": 0.04})
    figure.subplots_adjust(left=0.02, right=0.995, top=0.92, bottom=0.01)
    for column, (title, subtitle, matrix) in enumerate(panels):
        upper, lower = axes[:, column]
        upper.imshow(matrix[in_order], cmap="viridis", norm=PowerNorm(0.5, 0, top, clip=True), interpolation="nearest")
        upper.set_title(f"{title}\n{subtitle}", fontsize=11)
        if column == 0:
            continue
        lower.imshow((matrix - exact)[in_order], cmap="RdBu_r", vmin=-top / 2, vmax=top / 2, interpolation="nearest")
        lower.set_title(f"error {100 * error(matrix, exact, v):.1f} %", fontsize=11)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    axes[0, 0].set(ylabel="queries", xlabel="keys")
    explain(axes[1, 0], top)
    outline(axes[0, 1], nearness)
    _figure.write(figure, out / "idea.png")
