"""What Google Benchmark wrote, as rows."""

import json
import pathlib
import re

MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}


def read(paths: list[pathlib.Path]) -> list[dict]:
    """The results of all files, each with its label (the name without its sizes), ms, and every size as a number."""
    rows = []
    for path in paths:
        for row in json.loads(path.read_text())["benchmarks"]:
            if row.get("error_occurred"):
                continue
            parts = [part for part in row["run_name"].split("/") if part not in ("real_time", "manual_time")]
            sizes = dict(re.fullmatch(r"(\w+):(\d+)", part).groups() for part in parts if ":" in part)
            label = "/".join(part for part in parts if ":" not in part)
            ms = row["real_time"] * MILLISECONDS[row["time_unit"]]
            rows.append(row | {"label": label, "ms": ms} | {name: int(size) for name, size in sizes.items()})
    if not rows:
        raise SystemExit(f"no results in {', '.join(map(str, paths))}")
    return rows
