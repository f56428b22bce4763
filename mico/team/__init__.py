"""Several processes that work on one model: `gather(device)` gives the team of this process, `ALONE` is one of one."""

from mico.team.balance import Balance, solving_cost
from mico.team.gather import gather, started_here
from mico.team.team import ALONE, Team

__all__ = ["ALONE", "Balance", "Team", "gather", "solving_cost", "started_here"]
