"""Arms: runs that differ in nothing but the seed, their names, and the table of an ablation that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mico.comparison.measures import Run, differing, options, same_model_same_name

NAMED_BY = 2  # options that may tell two arms of one name apart; by more the arms are numbered


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed, by seed and folder."""

    name: str
    options: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def by_seed(self) -> dict[int, list[Run]]:
        """The runs of every seed; more than one where it was run again."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.seed, []).append(run)
        return found


def group(runs: Sequence[Run]) -> list[Arm]:
    """The arms, in the order in which their first runs are given; which runs make an arm depends on no order."""
    all_options = same_model_same_name([options(run) for run in runs])
    members: dict[str, list[int]] = {}
    for index, one in enumerate(all_options):
        members.setdefault(repr(sorted(one.items())), []).append(index)
    chosen = [all_options[indices[0]] for indices in members.values()]
    stems = [min(runs[index].name for index in indices) for indices in members.values()]
    arms = []
    for name, one, indices in zip(_names(stems, chosen), chosen, members.values(), strict=True):
        ordered = sorted((runs[index] for index in indices), key=lambda run: (run.seed, run.folder))
        arms.append(Arm(name, one, tuple(ordered)))
    return arms


def _names(stems: list[str], chosen: list[dict[str, Any]]) -> list[str]:
    """'mi', or 'mi, n_groups 10' where several arms are called mi, or 'mi 2' where they differ in much."""
    names = []
    for stem, one in zip(stems, chosen, strict=True):
        alike = [other for name, other in zip(stems, chosen, strict=True) if name == stem]
        apart = differing(alike)
        if len(apart) <= NAMED_BY:
            names.append(", ".join([stem, *(f"{name} {one.get(name)}" for name in apart)]))
        else:
            ordered = sorted(repr(sorted(other.items())) for other in alike)
            names.append(f"{stem} {ordered.index(repr(sorted(one.items()))) + 1}")
    return names


# --- ablations ------------------------------------------------------------------------------------------------------


def ablations(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The one table of an ablation, where the arms differ in one or two options: {options, rows, columns, cells}.

    cells: names of arms, a row a value of the first option and a column a value of the second (one column without);
    None where no run was made. The three arms of the field count as one option, 'arm', with all they set. Empty where
    only the arm differs: that is the table of arms itself.
    """
    factors = _factors(arms)
    if not 1 <= len(factors) <= 2 or list(factors) == ["arm"]:
        return []
    names = sorted(factors, key=lambda name: name != "arm")
    rows = _in_order(names[0], factors[names[0]])
    columns = _in_order(names[1], factors[names[1]]) if len(names) == 2 else [None]
    places = {
        (str(factors[names[0]][index]), str(factors[names[1]][index]) if len(names) == 2 else "None"): arm.name
        for index, arm in enumerate(arms)
    }
    cells = [[places.get((str(row), str(column))) for column in columns] for row in rows]
    return [dict(options=names, rows=rows, columns=columns if len(names) == 2 else [], cells=cells)]


def _factors(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """The options in which arms differ, with their values by arm, except those that the name of the arm settles."""
    names = [min(run.name for run in arm.runs) for arm in arms]
    factors: dict[str, list[Any]] = {}
    if len(set(names)) > 1:
        factors["arm"] = list(names)
    for option in differing([arm.options for arm in arms]):
        values = [arm.options.get(option) for arm in arms]
        pairs = {(name, str(value)) for name, value in zip(names, values, strict=True)}
        if "arm" not in factors or len(pairs) > len(set(names)):
            factors[option] = values
    return factors


def _in_order(name: str, values: list[Any]) -> list[Any]:
    """The distinct values: arms as given, numbers by size before words, what is not set last."""
    distinct = list({str(value): value for value in values}.values())
    if name == "arm":
        return distinct
    number = (int, float)
    return sorted(
        distinct, key=lambda v: (v is None, not isinstance(v, number), v if isinstance(v, number) else 0, str(v))
    )
