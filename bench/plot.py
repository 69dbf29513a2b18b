#!/usr/bin/env python3
"""Draws the pictures of the README and of docs/ from what the benchmarks wrote: plot.py TOPIC INPUT... --out DIR.

Each topic is a module of bench/plots with a function draw(inputs, out).
"""

import argparse
import importlib
import pathlib
import sys

try:
    import matplotlib
except ImportError as missing:
    sys.exit(f"plot.py: {sys.executable} has no usable matplotlib ({missing}): run it with another Python, such as /usr/bin/python3 "
             "with Debian's python3-matplotlib, or install matplotlib")

FOLDER = pathlib.Path(__file__).resolve().parent


def main() -> None:
    topics = sorted(path.stem for path in (FOLDER / "plots").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description="draw the benchmarks' results")
    parser.add_argument("topic", choices=topics)
    parser.add_argument("inputs", nargs="+", type=pathlib.Path, help="files that the benchmark wrote")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder for the pictures")
    arguments = parser.parse_args()

    matplotlib.use("Agg")
    sys.path.insert(0, str(FOLDER))
    arguments.out.mkdir(parents=True, exist_ok=True)
    importlib.import_module(f"plots.{arguments.topic}").draw(arguments.inputs, arguments.out)


if __name__ == "__main__":
    main()
