"""train.csv: whole rows, and none after the step from which a run resumes."""

import math
import os
from pathlib import Path

from distattn.jobs.curve import COLUMNS, Curve, Row, read


def test_the_curve_is_cut_where_a_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    assert read(path) == []
    rows = [Row(step, 0.1 * step, 1 / 3, None, 1e-30, None, 1e-3, math.inf, 0.4, 5.0) for step in range(1, 6)]
    with Curve(path, 0) as curve:
        curve.add(rows[:2])
        curve.add(rows[2:])
    assert read(path) == rows
    assert path.read_text().startswith(f"{','.join(COLUMNS)}\n1,0.1,")
    path.write_text(path.read_text()[:-40] + "\n")  # torn in the middle of the last row
    assert read(path) == rows[:4]
    with Curve(path, 2) as curve:
        curve.add(rows[2:3])
        curve.flush()
    assert read(path) == rows[:3]
    assert os.listdir(tmp_path) == ["train.csv"]
