"""What figures show, by hand: accuracy against a setting, and shares of rounds."""

import pytest

from hfedmoe.compare.figures import against
from hfedmoe.compare.grid import points_of
from hfedmoe.compare.heatmap import expert_maps, shares
from hfedmoe.compare.stored import Block
from hfedmoe.config import load_config
from tests.compare.test_merits import result


def blocks_of(*vary: str) -> list[Block]:
    points = points_of(vary, lambda changes: load_config(None, changes))
    return [
        Block(point, [result("ours", seed, [0.1, 0.2 + number / 10 + seed / 10]) for seed in (0, 1)])
        for number, point in enumerate(points)
    ]


def test_accuracy_stands_against_a_setting_with_numbers() -> None:
    blocks = blocks_of("partition.alpha=1.0|0.1", "method.score=ib|random")
    panels = against(blocks, "partition.alpha")
    assert list(panels) == ["method.score = ib", "method.score = random"]
    x, y, half = panels["method.score = ib"]["ours"]
    assert x == [0.1, 1.0]  # in order, and not as they were written
    assert y == pytest.approx([0.45, 0.25])
    # Two seeds 0.1 apart: t with one degree of freedom times 0.1 / sqrt 2 / sqrt 2.
    assert half == pytest.approx([12.706205 * 0.05] * 2, rel=1e-6)
    assert against(blocks, "method.score") == {}
    assert against(blocks_of("train.lr=0.1"), "train.lr") == {}


def test_a_map_has_the_share_of_rounds() -> None:
    one = result("ours", 0, [0.1, 0.2, 0.3])
    assert expert_maps([one]) is None  # of a version that did not count
    one.layer_experts, one.held, one.trained = [2, 1], [[2, 0, 1], [1, 1, 2]], [[1, 0, 0], [0, 0, 2]]
    assert shares(one, "held") == [[1.0, 0.0, 0.5], [0.5, 0.5, 1.0]]
    assert shares(one, "trained") == [[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]
    figure = expert_maps([result("other", 0, [0.1, 0.2]), one])
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["ours: held", "ours: trained"]
