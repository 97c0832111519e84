"""Send what the record of a run holds to the trackers that `[tracking]` names. See docs/tracking.md.

The server writes the line of a round, then its checkpoint, then tells `Tracking`. Every tracker has a thread (`sender`)
and a process of its own (`child`), so that one that fails, hangs or prints stops neither the run nor the others.

    figures.py    a line of metrics.jsonl -> figures by name       settings.py   what is sent of the configuration
    tracking.py   all trackers of a run                            state.py      tracking.json: what was sent
    sender.py     one tracker: what is to be sent, in order        child.py      the process that talks to its library
    trackers/     one file per library

A new tracker is one file in `trackers/`, its name in `config.tracking`, and an extra.
"""
