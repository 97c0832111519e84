"""Section [data] of a first config: files, columns and the prompt; and what is told about the rows."""

import re

from hfedmoe.data.kinds import kind_of
from hfedmoe.data.known import KNOWN
from hfedmoe.starting import sizes
from hfedmoe.starting.draft import Draft
from hfedmoe.starting.rows import Seen

SHOWN, IN_FILE = 12, 5
"""Labels that are shown by name, and those in the config."""
PLAIN = ("prompt", "text", "input")
"""Columns of prompts that are whole as they are."""
COMMENTS = {
    "text": "column of the texts",
    "label": "column of the labels",
    "completion": "column of the answers",
    "choices": "column of the choices",
    "answer": "column of the right choice",
}


def put_data(files: list[str], seen: Seen, draft: Draft) -> None:
    """Put the settings of the rows, and of the split where the rows leave no choice."""
    roles, rows = seen.roles, len(seen.rows)
    if len(files) == 1:
        draft.put("data.source", files[0], f"{rows:,} rows")
    else:
        draft.put("clients.count", len(files), "as many as files")
        draft.put("data.clients", files, f"one file for each client, {rows:,} rows together")
    for setting, column in roles.columns.items():
        comment = COMMENTS[setting] + (f": {counted(seen, IN_FILE)}" if setting == "label" else "")
        draft.put(f"data.{setting}", column, comment)
    if roles.format in KNOWN or kind_of(seen.tables[0], draft.config().data) != roles.format:
        draft.put("data.format", roles.format, "what a row is")
    if roles.format == "classification":
        draft.put("data.template", _template(roles.columns, "label"), "the prompt; it should ask for the label")
    elif roles.format == "completion" and roles.columns["text"] not in PLAIN:
        draft.put("data.template", _template(roles.columns, "completion"), "the prompt")
    if not draft.has("data.test"):
        draft.put("data.test_share", sizes.test_share_for(rows), 'held out to measure; or test = "held-out.csv"')
    if len(files) == 1 and roles.format != "classification":
        draft.put("partition.scheme", "iid", "rows at random: there are no labels to split by")


def rows_told(files: list[str], seen: Seen) -> list[str]:
    """Lines about the rows."""
    roles = seen.roles
    per_file = "" if len(files) == 1 else f" ({', '.join(f'{len(table):,}' for table in seen.tables)})"
    told = [f"rows:   {len(seen.rows):,}{per_file}; columns {', '.join(seen.rows.names)}"]
    for setting, column in roles.columns.items():
        why = f" ({roles.why[setting]})" if setting in roles.why else ""
        told.append(f'{setting + ":":<7} column "{column}"{why}')
    if not roles.columns:
        told.append(f"form:   {roles.format} ({', '.join(roles.why.values())})")
    if seen.labels:
        told.append(f"labels: {counted(seen)}")
    if roles.site is not None and len(files) == 1:
        told.append(f'client: column "{roles.site}" (its name)')
    return told


def counted(seen: Seen, most: int = SHOWN) -> str:
    """Labels and how often each occurs, the most frequent first, and at most so many."""
    counts = seen.labels.most_common()
    more = f" and {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(f"{label} ({count:,})" for label, count in counts[:most]) + more


def _template(columns: dict[str, str], answer: str) -> str:
    """A prompt of the columns' names, which often say what a text is and what is asked; `answer`: the other setting."""
    asked, answered = (re.sub(r"[^\w]+|_", " ", columns[key]).strip() for key in ("text", answer))
    return f"{(asked or 'text').capitalize()}: {{text}}\n{(answered or 'answer').capitalize()}:"
