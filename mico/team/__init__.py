"""Several processes that work on one model: `gather(device)` gives the team of this process, `ALONE` is one of one."""

from mico.team.balance import Balance, solving_cost
from mico.team.gather import gather, started_here
from mico.team.meter import StreamMeter, in_order
from mico.team.team import ALONE, Team

__all__ = ["ALONE", "Balance", "StreamMeter", "Team", "gather", "in_order", "solving_cost", "started_here"]
