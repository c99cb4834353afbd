"""Writes docs/results.md from result.json files: what every recipe measured, beside what its report printed.

    python docs/results.py [RUN …]

Each RUN is the folder of a finished run; what the page needs of it is kept in `docs/results/`, one file a run, so that
the page can be written again without the runs. The text around the tables is `docs/results.template.md`, in which
{recipe.key} stands for a figure; what the reports printed is `docs/published.toml`.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import read_recipe

HERE = Path(__file__).parent
KEPT = HERE / "results"
PAGE = HERE / "results.md"

Entry = dict[str, Any]


def keep(run: Path) -> None:
    """Copies what the page needs of a run: its result, what was changed in its recipe, and where it ran."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    entry = {
        "time": environment["time"],
        "changed": changes(run),
        "cpus": environment["cpus"],
        "torch": environment["packages"]["torch"],
        **result,
    }
    KEPT.mkdir(exist_ok=True)
    text = json.dumps(entry, indent=1, ensure_ascii=False)
    (KEPT / f"{result['recipe']}-{run.name}.json").write_text(text + "\n", encoding="utf-8")


def changes(run: Path) -> list[str]:
    """What the run changed in its recipe by `--set`, as key=value; where the data lie is left out."""
    recipe = read_recipe(run / "recipe.toml", discover())
    resolved = tomllib.loads((run / "resolved.toml").read_text(encoding="utf-8"))
    before, after = leaves(recipe.resolved), leaves(resolved)
    changed = [key for key in after if after[key] != before.get(key) and key != "data.root"]
    return [f"{key}={json.dumps(after[key])}" for key in changed]


def leaves(table: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key; an array of tables is one value."""
    if not isinstance(table, dict):
        return {prefix[:-1]: list(table) if isinstance(table, tuple) else table}
    return {key: value for name, inner in table.items() for key, value in leaves(inner, f"{prefix}{name}.").items()}


def entries() -> list[Entry]:
    """The kept runs, oldest first; a recipe's runs are told apart by what they changed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in KEPT.glob("*.json")]
    return sorted(found, key=lambda entry: (entry["time"], entry["recipe"]))


def table(header: str, rows: list[list[str]]) -> str:
    """A table in Markdown; columns of nothing but figures are aligned at the right."""
    figures = [
        all(re.fullmatch(r"[\d.]*( to [\d.]+| M)?", cell) for cell in column) for column in zip(*rows, strict=True)
    ]
    rule = "|".join("---:" if right else "---" for right in figures)
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def measured(runs: list[Entry]) -> str:
    """Every kept run, the best mIoU first, with the null models at the end."""
    rows = []
    for run in sorted(runs, key=lambda run: -run["miou"]):
        low, high = run["miou_interval"]
        rows.append(
            [
                title(run),
                f"{run['miou']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{run['pixel_accuracy']:.3f}",
                f"{run['reports_dialect']['miou']:.3f}",
                f"{run['parameters'] / 1e6:.2f} M",
                f"{run['epochs']}",
                f"{run['minutes']:.1f}",
                f"{run['device']} {run['precision']}",
            ]
        )
    nulls = runs[0]["null_models"], runs[0]["reports_dialect"]
    for name, null in nulls[0].items():
        dialect = nulls[1]["null_models"][name]["miou"]
        rows.append(
            [f"*{name}*", f"{null['miou']:.3f}", "", f"{null['pixel_accuracy']:.3f}", f"{dialect:.3f}", *[""] * 4]
        )
    rows.append(["*a perfect prediction*", "1.000", "", "1.000", f"{nulls[1]['ceiling']:.3f}", *[""] * 4])
    header = "Recipe | mIoU | 95 % interval | Pixel accuracy | Reports' metric | Parameters | Epochs | Minutes | Device"
    return table(header, rows)


def beside(runs: list[Entry], published: list[Entry]) -> str:
    """What each report printed, and what our runs of that recipe gave."""
    rows = []
    for figure in published:
        for run in [run for run in runs if run["recipe"] == figure["recipe"]] or [None]:
            ours = ["not run", "", "", ""]
            if run:
                dialect = run["reports_dialect"]
                ours = [title(run), *(f"{v:.3f}" for v in (dialect["miou"], run["miou"], run["pixel_accuracy"]))]
            printed = [f"{figure[key]:.4g}" if key in figure else "" for key in ("iou", "accuracy")]
            rows.append([f"{figure['source']}, {figure['data']}", *printed, *ours])
    return table(
        "Report and data | Its IoU | Its accuracy | Our run on VOC 2007 val | Reports' metric | mIoU | Pixel accuracy",
        rows,
    )


def changed(runs: list[Entry]) -> str:
    """What the runs changed in their recipes, each set of changes once."""
    by_changes: dict[str, list[str]] = {}
    for run in runs:
        shown = " ".join(f"`{change}`" for change in run["changed"]) or "nothing"
        by_changes.setdefault(shown, []).append(title(run))
    return table("Changed by `--set` | In", [[shown, ", ".join(names)] for shown, names in by_changes.items()])


def title(run: Entry) -> str:
    """The recipe, with the encoder it was given instead of its own, and whether it had all of its epochs."""
    encoder = next((c.partition("=")[2].strip('"') for c in run["changed"] if c.startswith("model.encoder=")), None)
    name = f"{run['recipe']} on {encoder}" if encoder else run["recipe"]
    return name if any(c.startswith("train.epochs=") for c in run["changed"]) else f"{name}, full length"


def page() -> str:
    """The whole page."""
    runs = entries()
    published = tomllib.loads((HERE / "published.toml").read_text(encoding="utf-8"))["figure"]
    named = {title(run).replace(" on ", "@"): run for run in reversed(runs)}  # the oldest of equal titles
    missing = [p.stem for p in sorted(bundled("recipes").iterdir()) if p.stem not in {r["recipe"] for r in runs}]
    blocks = {
        "measured": measured(runs),
        "beside": beside(runs, published),
        "changed": changed(runs),
        "runs": str(len(runs)),
        "missing": ", ".join(missing) or "none",
        "torch": ", ".join(sorted({run["torch"] for run in runs})),
        "cpus": ", ".join(sorted({str(run["cpus"]) for run in runs})),
    }

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        if key in blocks:
            return blocks[key]
        recipe, _, path = key.partition(".")
        value: Any = named[recipe]
        for part in path.split("."):
            value = value[part]
        return f"{value:.1f}" if path == "minutes" else f"{value:.3f}" if isinstance(value, float) else str(value)

    template = (HERE / "results.template.md").read_text(encoding="utf-8")
    note = (
        "<!-- Written by docs/results.py from docs/results/*.json. Change those or results.template.md, not this. -->\n"
    )
    return note + re.sub(r"\{([^{}\n]+)\}", fill, template)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        keep(Path(folder))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(entries())} runs")
