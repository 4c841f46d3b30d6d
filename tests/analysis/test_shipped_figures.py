"""The figures that docs/results holds can be found from its pages."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_every_figure_of_the_results_is_linked_and_no_link_leads_nowhere() -> None:
    there = {path.name for path in (DOCS / "results" / "figures").iterdir()}
    pages = " ".join(path.read_text() for path in DOCS.glob("*.md"))
    linked = set(re.findall(r"\(results/figures/([^)]+)\)", pages))
    assert linked <= there
    # The numbers stand beside their picture under its name.
    assert {name for name in there if name.endswith(".png")} <= linked
