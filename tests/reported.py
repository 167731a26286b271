"""Runs of the tiny models for tests of the report: two methods and two seeds, with samples; and what a page holds."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from interrupted_runs import QUIET

from segadapt import adapt
from segadapt.datasets.toytown import CLASSES
from segadapt.report import data, page
from segadapt.results import run_folders

SEEDS = (0, 1)


def make_runs(root: Path, compose_settings, saved_models) -> dict[tuple[str, int], Path]:
    """(method, seed) -> run folder, below root/source and root/generative."""
    models, made = saved_models(CLASSES), {}
    for method in ("source", "generative"):
        for seed in SEEDS:
            settings = compose_settings(
                *models, "data.corruptions=[fog,contrast]", "data.limit=4", "data.workers=0", "logging.samples=3",
                "tta.optimizer.lr=0.02", f"logging.root={root}", f"experiment.name={method}", f"experiment.seed={seed}",
                f"tta.method={method}",
            )  # fmt: skip
            made[method, seed] = Path(adapt.run(settings, console=QUIET)["folder"])
    return made


def gathered(*folders: Path | str) -> data.Report:
    return data.gather(run_folders(map(str, folders)), resamples=50)


class Page(HTMLParser):
    """What a browser would find: tags with attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside != "style":
            self.words += text

    def json(self, name: str):
        """Of <script type="application/json" id=name>."""
        ids = [attrs.get("id") for tag, attrs in self.tags if tag == "script"]
        return json.loads(self.scripts[ids.index(name)])

    @property
    def values(self) -> list[float | None]:
        """Of the table of scores, line by line."""
        found = [attrs["data-value"] for tag, attrs in self.tags if tag == "td" and "data-value" in attrs]
        return [float(value) if value else None for value in found]

    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)


def rendered(*folders: Path | str) -> Page:
    return Page(page.render(gathered(*folders), title="runs"))
