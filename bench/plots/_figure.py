"""How a picture is finished, the same for every topic."""

import io
import pathlib

import matplotlib.pyplot as plt
import PIL.Image


def save(figure: plt.Figure, path: pathlib.Path, grid: str = "both") -> None:
    """Adds grids, and writes the figure."""
    for axes in figure.axes:
        axes.grid(axis=grid, alpha=0.3)
    write(figure, path)


def write(figure: plt.Figure, path: pathlib.Path) -> None:
    """Writes a PNG of few colours, which is a small one, and closes the figure."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    PIL.Image.open(drawn).convert("P", palette=PIL.Image.ADAPTIVE, colors=64).save(path, optimize=True)
