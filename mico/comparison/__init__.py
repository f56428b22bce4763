"""Several runs compared: arms (runs that differ in nothing but the seed), paired t-tests, ablation tables.

`compare` gives plain values, `sections` the tables made of them and of nothing else. What they and other models found
of suites of questions about images stands in rows of its own: visual.py, visual_tables.py.
"""

from mico.comparison.measures import Run
from mico.comparison.tables import sections
from mico.comparison.values import compare, nothing_compared
from mico.comparison.visual import Evaluated, visual_rows
from mico.comparison.visual_tables import visual_sections

__all__ = ["Evaluated", "Run", "compare", "nothing_compared", "sections", "visual_rows", "visual_sections"]
