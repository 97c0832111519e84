"""One file per library, each with `open_run(start) -> child.Tracker`. Only `child` imports them."""
