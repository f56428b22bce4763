"""Peak memory of CM-IBQ by parameter and by token, and what it makes of LLaVA-1.5.

    python -m benchmarks.training_memory FOLDER

Both stages are run for two steps on LLaVAs with random weights, of two depths and with two batch sizes, each in a
process of its own, with gradient checkpointing. The difference between the peaks of the two depths gives bytes a
parameter; what the program itself takes drops out. What LLaVA-1.5 would take are sums of these bytes, not measured. On
the CPU everything is float32, and rows that calibration keeps count too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.make_llava import make_llava
from mico.files import read_json
from mico.metrics.vision.grid_files import write_instruct

DEPTHS, BATCHES = (2, 14), (4, 12)  # widths are measured over batches of 4, whatever is trained with
SHAPE = dict(hidden=512, ffn=1376, heads=8, vision_layers=3, vision_hidden=256, vision_ffn=1024, vision_heads=4)
LLAVA = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9}  # parameters
RETURNED = dict(MALLOC_MMAP_THRESHOLD_="1000000", MALLOC_TRIM_THRESHOLD_="1000000")  # what is freed leaves the process
OPTIONS = ("--max-steps", "2", "--save-steps", "1000", "--gradient-checkpointing", "--device", "cpu", "--quiet")


def _made(folder: Path, depth: int) -> float:
    """Parameters of the model that is written there, in bfloat16."""
    return make_llava(folder, depth, **SHAPE) / 2


def peak(folder: Path, stage: int, depth: int, batch: int) -> int:
    """Bytes of the process at the end of the training, at their most."""
    source = folder / f"depth{depth}" if stage == 1 else folder / f"stage1-depth{depth}-batch{batch}"
    run, pairs = folder / f"stage{stage}-depth{depth}-batch{batch}", folder / "pairs"
    options = ["--train-file", str(pairs / "pairs.json"), "--image-folder", str(pairs), "--eval-share", "0.1"]
    options += ["--method", "cmibq", "--stage", str(stage), "--per-device-train-batch-size", str(batch), *OPTIONS]
    command = [sys.executable, "-m", "mico", "finetune", str(source), *options, "--save", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | RETURNED)
    return int(read_json(run / "report.json")["stage_peaks"]["train"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for models and runs")
    folder = parser.parse_args().folder
    write_instruct(folder / "pairs", 2, 0)
    # In a process of its own: one that it starts would inherit its peak.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(_made, [folder / f"depth{depth}" for depth in DEPTHS], DEPTHS)
        parameters = dict(zip(DEPTHS, made, strict=True))
    few, many = DEPTHS
    small, large = BATCHES
    heads = [f"bytes a parameter, batch of {small}", f"of {large}", f"a sample more at depth {many}", *LLAVA]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for stage in (1, 2):
        peaks = {(depth, batch): peak(folder, stage, depth, batch) for depth in DEPTHS for batch in BATCHES}
        spread = parameters[many] - parameters[few]
        each = {batch: (peaks[many, batch] - peaks[few, batch]) / spread for batch in BATCHES}
        more = (peaks[many, large] - peaks[many, small]) / (large - small)
        sums = [f"{each[small] * size / 1e9:.0f} GB" for size in LLAVA.values()]
        told = [f"{each[small]:.1f}", f"{each[large]:.1f}", f"{more / 1e6:.0f} MB", *sums]
        print(f"| stage {stage} | {' | '.join(told)} |", flush=True)
        print({key: round(value / 1e9, 3) for key, value in peaks.items()}, file=sys.stderr)


if __name__ == "__main__":
    main()
