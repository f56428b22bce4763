"""What a run took: time by stage, memory, what was kept of the activations; as values and as a table."""

from __future__ import annotations

from typing import Any

from mico.tables import NOTHING, Section, duration_text, size_text

NESTED = {"allocate": "compress", "mutual information": "groups", "clustering": "groups"}  # stages inside stages

Report = dict[str, Any]


def costs(report: Report) -> dict[str, float | None]:
    """What a run took; None: not recorded, or no GPU.

    solve_seconds: in the methods, of the slowest process. total_seconds: wall time of the run and of the stages that
    it found finished (reused_seconds), so that runs compare. history_bytes: rows of activations that were kept;
    moments_bytes: the sums and second moments made of all rows, both as they lie on disk.
    """
    reused, kept = report.get("reused_seconds", {}), report.get("activations")
    stages = reused | report["seconds"]
    grouping = report["settings"]["grouping"]
    absent = None if grouping and grouping["kind"] == "mi" else 0.0
    solving = [one["solving_seconds"] for one in report.get("processes", []) if "solving_seconds" in one]
    earlier = sum(value for name, value in reused.items() if name not in NESTED)
    return {
        "mi_seconds": stages.get("mutual information", absent),
        "clustering_seconds": stages.get("clustering", absent),
        "solve_seconds": max(solving, default=None),
        "total_seconds": round(total_seconds(report["seconds"]) + earlier, 3),
        "reused_seconds": round(earlier, 3),
        "peak_host_bytes": report["peak_host_bytes"],
        "peak_device_bytes": report["peak_device_bytes"] or None,
        "history_bytes": None if kept is None else kept.get("history", 0),
        "moments_bytes": None if kept is None else kept.get("moments", 0),
    }


def total_seconds(seconds: dict[str, float]) -> float:
    """Wall time of a run: its own total, or what its stages add up to (those inside others not counted twice)."""
    parts = sum(value for name, value in seconds.items() if name not in NESTED)
    return seconds.get("total", round(parts, 3))


def costs_section(report: Report) -> Section:
    """Stages with their time and the most memory the process had had at their end, then what else the run took."""
    seconds, reused, cost = report["seconds"], report.get("reused_seconds", {}), costs(report)
    peaks = report.get("stage_peaks", {})
    rows = []
    for name in [name for name in seconds if name not in NESTED and name != "total"]:
        rows.append((name, duration_text(seconds[name]), _peak(peaks, name)))
        parts = {part: seconds[part] for part in NESTED if NESTED[part] == name and part in seconds}
        if name == "compress" and cost["solve_seconds"] is not None:
            parts["solving"] = cost["solve_seconds"]
        rows += [(f"· {part}", duration_text(value), _peak(peaks, part)) for part, value in parts.items()]
    whole = size_text(report["peak_host_bytes"])
    rows.append(("total", duration_text(total_seconds(seconds)), whole))
    rows += [(f"{name}, made by an earlier run", duration_text(value), NOTHING) for name, value in reused.items()]
    gpu = cost["peak_device_bytes"]
    more = [("peak host memory", whole), *_processes(report.get("processes", []))]
    more += [("peak GPU memory", "no GPU" if gpu is None else size_text(gpu)), *_kept_rows(cost)]
    rows += [(*row, NOTHING) for row in more]
    resumed = report.get("resumed_blocks", 0)
    lines = ["Host memory: the most that the process had had by the end of the stage."]
    if resumed:
        lines.append(f"Resumed after {resumed} blocks: times and memory are those of the last start.")
    return Section("Time and memory", ("stage", "", "host memory"), tuple(rows), tuple(lines))


def _peak(peaks: dict[str, int], stage: str) -> str:
    return size_text(peaks[stage]) if stage in peaks else NOTHING


def _kept_rows(cost: dict[str, float | None]) -> list[tuple[str, str]]:
    """What is kept of the activations, on disk."""
    names = {"history_bytes": "activation rows kept", "moments_bytes": "second moments kept"}
    sizes = ((label, cost[name]) for name, label in names.items())
    return [(label, "not recorded" if size is None else size_text(size)) for label, size in sizes]


def _processes(processes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What each of several processes had to do."""
    rows = []
    for one in processes if len(processes) > 1 else ():
        solving = f"{duration_text(one['solving_seconds'])} solving ({one['share']:.0%} of the work)"
        rows.append((f"process {one['rank']} on {one['device']}", f"{solving}, {size_text(one['peak_host_bytes'])}"))
    if halvings := max((one.get("batch_halvings", 0) for one in processes), default=0):
        rows.append(("calibration batches", f"halved {halvings} times for want of memory"))
    return rows
