"""What every process of a team but the first does: its part of the stages that the first one asks for.

`python -m mico.follow` is how mico starts such a process itself; under a launcher the verbs call `follow`.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import replace
from typing import Any

from mico.console import Console
from mico.ends import quantize_ends
from mico.errors import UserError, exit_code
from mico.runs import fingerprint
from mico.settings import Compression, Grouping, Source
from mico.solve import Solver
from mico.stages import Preparation, measured
from mico.team import Team, started_here


def follow(team: Team, source: Source) -> None:
    """Do what is asked until the first process ends. Raises UserError when this one reads another model or text."""
    preparation = None
    for task in team.tasks():
        if preparation is None:
            preparation = Preparation(source, Console(), team)
        if fingerprint(preparation.identity) != task["identity"]:
            raise UserError("the model or the calibration text differs from that of process 0")
        if task["stage"] == "statistics":
            for _ in measured(preparation, task["finished"]):
                pass
        else:
            _solve(preparation, settings_of(task["settings"]), task["finished"])


def _solve(preparation: Preparation, settings: Compression, finished: int) -> None:
    solver = Solver(preparation, settings, None, preparation.console)
    loaded = preparation.load()
    quantize_ends(loaded, settings.embed_bits)
    solver.pass_through(loaded, finished)
    solver.processes()
    preparation.forget()


def settings_of(known: dict[str, Any]) -> Compression:
    """The settings that `mico.settings.record` made plain."""
    grouping, pattern = known["grouping"], known["pattern"]
    more = dict(grouping=grouping and Grouping(**grouping), pattern=pattern and tuple(pattern))
    return Compression(**known | more)


def main() -> int:
    """A process started by the first one: it says nothing and ends with the other's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal: the first one decides
    warnings.simplefilter("ignore")
    try:
        with started_here() as team:
            follow(team, replace(Source(**team.job()["source"]), device=team.device))
    except Exception as error:  # told to the first process, which tells the user
        return exit_code(error)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: a message on its way to a process that is gone would be waited for
