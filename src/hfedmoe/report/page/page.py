"""Write the page: figures and tables of one run, or of several beside each other, in one file."""

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.report.page.beside import differing, reached
from hfedmoe.report.page.gained import gains
from hfedmoe.report.page.learned import ACROSS, confusion, curves, examples
from hfedmoe.report.page.plots import SWITCHED, Plot
from hfedmoe.report.page.story import Story, read_story
from hfedmoe.report.page.who import alarms, client_table, expert_plots, split_plot
from hfedmoe.report.personal import personal_cards
from hfedmoe.report.words import decimal, human_bytes, human_seconds, interval_words, machine_words, percent

NAME = "report.html"


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or of several runs; returns its path.

    Args:
        out: the file; None: report.html in the folder of the run, or of the first.

    Raises:
        UserError: a folder is not that of a run or is damaged, nothing was measured yet, or the file cannot be written.
    """
    stories = [read_story(path) for path in runs]
    for story in stories:
        if not story.points:
            raise UserError(f"{story.path}: no round is complete yet; try again after the first one")
    path = out or runs[0] / NAME
    page = one_page(stories)
    with disk_errors(path, "make room, or choose another --out"), replacing(path) as file:
        file.write(page.encode())
    return path


def one_page(stories: Sequence[Story], live: str = "") -> str:
    """The whole page as HTML, with everything that it needs inside; `live`: a script by which it stays up to date."""
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, PackageLoader, select_autoescape

    names = _names(stories)
    parts: dict[str, Any] = {"runs": [_head(story, name) for story, name in zip(stories, names, strict=True)]}
    groups: dict[str, list[Plot]] = {"curves": curves(stories, names)}
    if len(stories) == 1:
        (story,) = stories
        client_names = {client.number: client.name for client in story.clients}
        groups["answers"] = confusion(story)
        groups["experts"] = [] if story.experts is None else expert_plots(story.experts, client_names)
        split = split_plot(story)
        groups["split"] = [] if split is None else [split]
        parts |= {
            "examples": examples(story),
            "completions": bool(story.about.texts) and not story.about.truth,
            "sites": gains(story.sites),
            "personal": story.personal and (story.personal[0], personal_cards(story.personal[1])),
            "alone": any(site.alone is not None for site in story.sites),
            "own": any(site.own is not None for site in story.sites),
            "f1": any(site.reached.macro_f1 is not None for site in story.sites),
            "tuned": next((site.tuning for site in story.sites if site.tuning is not None), None),
            "clients": client_table(story.clients),
            "alarms": [] if story.experts is None else alarms(story.experts),
            "short": story.short,
            "failed": story.failed,
        }
    else:
        parts |= {"reached": reached(stories, names), "differing": differing(stories, names)}
    plots = [plot for group in groups.values() for plot in group]
    document = Document()
    with document.models.freeze():  # else bokeh looks at all figures again after each
        for plot in plots:
            document.add_root(plot.figure)
    script, divs = components([plot.figure for plot in plots]) if plots else ("", ())
    drawn = {id(plot): div for plot, div in zip(plots, divs, strict=True)}
    environment = Environment(
        loader=PackageLoader("hfedmoe.report.page", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    environment.filters |= {
        "size": human_bytes,
        "percent": percent,
        "number": decimal,
        "interval": interval_words,
        "time": human_seconds,
    }
    return environment.get_template("page.html.jinja").render(
        **parts,
        title=", ".join(names),
        live=live,
        across=list(ACROSS),
        switched=SWITCHED,
        groups={key: [(plot, drawn[id(plot)]) for plot in group] for key, group in groups.items()},
        style=files("hfedmoe.report.page").joinpath("page.css").read_text(encoding="utf-8"),
        library=Resources(mode="inline", components=["bokeh"]).render_js() if plots else "",
        script=script,
    )


def _names(stories: Sequence[Story]) -> list[str]:
    """The names of the runs' folders; with their parents where two are alike."""
    short = [story.path.resolve().name for story in stories]
    return [
        name if short.count(name) == 1 else "/".join(story.path.resolve().parts[-2:])
        for name, story in zip(short, stories, strict=True)
    ]


def _head(story: Story, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "again": shlex.join(["hfedmoe", "run", str(story.path / "config.toml"), "--out", "another-folder"]),
        "method": story.config.method.name,
        "model": story.config.model.name,
        "source": story.config.data.source,
        "rounds": story.points[-1].round,
        "asked": story.config.federation.rounds,
        "clients": len(story.clients),
        "before": None if story.before is None else story.before.all,
        "after": None if story.after is None else story.after.all,
        "between": None if story.after is None else story.after.interval("all"),
        "bytes": story.points[-1].bytes,
        "seconds": story.points[-1].seconds,
        "settings": story.settings,
        "machine": machine_words(story.about.machine),
    }
