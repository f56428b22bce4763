"""Which models a target has no place for, told from the config alone: before an export, or a compression for one."""

from __future__ import annotations

from typing import Any

from mico.adapters.family import Family
from mico.errors import UserError
from mico.exports.gguf_architecture import architecture_of


def check_target(to: str, config: Any, family: Family) -> None:
    """Raise UserError when the export `to` refuses every model of this kind, naming what it lacks."""
    if to == "dense":
        return
    if family.vision:
        raise UserError(f"--to {to}: {family.name} models see images, which the export does not hold: --to dense")
    if any(stream.expert is not None for stream in family.streams):
        raise UserError(f"--to {to}: no form for the experts of {family.name} yet: use --to dense")
    if to == "gguf":
        architecture_of(config)


def check_profile(profile: str, config: Any, family: Family) -> None:
    """Raise UserError when a model of this kind cannot be exported to the target it would be compressed for."""
    try:
        check_target(profile, config, family)
    except UserError as error:
        raise UserError(f"--profile {profile}: `mico export` would refuse it: {error}; leave --profile out") from None
