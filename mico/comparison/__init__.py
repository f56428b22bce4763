"""Several runs compared: arms (runs that differ in nothing but the seed), paired t-tests, ablation tables.

`compare` gives plain values, `sections` the tables made of them and of nothing else.
"""

from mico.comparison.measures import Run
from mico.comparison.tables import sections
from mico.comparison.values import compare

__all__ = ["Run", "compare", "sections"]
