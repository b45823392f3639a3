"""Is a linear that stays packed faster than a float one on this CPU, and what does it take?

    python eval/packed_linear.py --out results.md

One linear without bias, as ``llmquant.load`` computes it: from codes of several grids, in
float32 and bfloat16, beside float linears in both. All sides run in turns, many times;
each time is a median, and a ratio is the median of the ratios of neighbouring runs, so
that what else the machine does cancels. Between runs, a buffer larger than the caches is
read, because in a model other weights pass between two visits. ``torch int8`` is torch's
kernel for one scale a row, which llmquant does not use. On a machine with other work,
``--cpu-time`` counts the time of this process alone; it needs one thread. The error is that of the outputs,
beside float64 sums over the decoded weights (for float linears, that of their own weights).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from checkout import commit
from int8_speed import cpu
from torch import Tensor, nn

from llmquant import plugins
from llmquant.grid import QuantizedTensor, encode_all, fit_all
from llmquant.inference import weight_bytes
from llmquant.report import markdown
from llmquant.runtime.coded import Coded, linear

BLOCK = 64  # rows that are quantized; the matrix repeats them
GRIDS: dict[str, dict[str, object]] = {
    "4 bits, groups of 128": {"name": "affine", "bits": 4, "group_size": 128},
    "4 bits, groups of 32, zero points": {"name": "affine", "bits": 4, "group_size": 32, "symmetric": False},
    "8 bits, a scale a row": {"name": "affine", "bits": 8, "group_size": -1},
    "q4_k": {"name": "q4_k"},
    "q6_k": {"name": "q6_k"},
    "nf4": {"name": "nf4", "double_quant": False},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Side:
    """What is measured. module: gives [batch, rows]; weight: what it stands for; bytes: of its weight."""

    module: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    weight: Tensor
    bytes: int


def coded(choice: dict[str, object], w: Tensor, repeat: int) -> Coded:
    """Return a matrix on a grid, of the rows of ``w`` again and again."""
    _, config = plugins.configure("grids", choice, "grid")
    grid = config.bind(*w.shape, torch.float16)
    params = fit_all(grid, w, torch.ones(w.shape[1]))
    q = QuantizedTensor(grid, encode_all(grid, w, params), params)

    def levels(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scale, offset = grid.levels(params)
        return scale.flatten(1), offset.flatten(1)

    again = {key: value.repeat(repeat, 1, 1) for key, value in q.params.items()}
    return Coded(q.codes.repeat(repeat, 1), grid.table, again, levels)


def sides(rows: int, cols: int) -> dict[str, Side]:
    """Return all that is measured, the float linears first."""
    block = torch.randn(BLOCK, cols, generator=torch.Generator().manual_seed(0)) / 50
    found = {}
    for name, dtype in DTYPES.items():
        module = nn.Linear(cols, rows, bias=False, dtype=dtype)
        module.weight.copy_(block.repeat(rows // BLOCK, 1))
        found[name] = Side(module, dtype, module.weight[:BLOCK].float(), weight_bytes(module))
    for grid, choice in GRIDS.items():
        matrix = coded(choice, block, rows // BLOCK)
        for name, dtype in DTYPES.items():
            module = linear(matrix, dtype)
            if dtype == torch.float32 or type(module).__name__ == "Int4Linear":
                found[f"{grid}, {name}"] = Side(module, dtype, matrix.decode(slice(0, BLOCK)), weight_bytes(module))
        if grid.startswith("8 bits"):
            codes = (matrix.codes(slice(0, rows)) ^ 128).view(torch.int8)
            scale = matrix.levels(slice(0, rows))[0].flatten().bfloat16()
            product = partial(torch.ops.aten._weight_int8pack_mm, mat2=codes, scales=scale)
            weight = matrix.decode(slice(0, BLOCK))
            found["torch int8, bfloat16"] = Side(product, torch.bfloat16, weight, codes.nbytes + scale.nbytes)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up what all threads take. Add --threads 1")
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    all_sides = sides(args.rows, args.cols)
    others = torch.ones(16 << 20)  # 64 MB
    command = f"--rows {args.rows} --cols {args.cols} --batches {' '.join(map(str, args.batches))}"
    command += f" --threads {args.threads} --repeat {args.repeat}{' --cpu-time' if args.cpu_time else ''}"
    lines = [
        f"# A linear of {args.rows} x {args.cols} that stays packed",
        "",
        f"`python eval/packed_linear.py {command}`, commit {commit()}; {cpu()}, {args.threads} threads, "
        f"torch {torch.__version__}, weights out of cache, medians of runs in turns. Ratios above 1: faster than the "
        "float linear of that dtype.",
    ]
    for batch in args.batches:
        x = torch.randn(batch, args.cols, generator=torch.Generator().manual_seed(1))
        times: dict[str, list[float]] = {name: [] for name in all_sides}
        inputs = {name: x.to(side.dtype) for name, side in all_sides.items()}
        for i in range(args.repeat + 1):
            for name, side in all_sides.items():
                others.sum()
                started = clock()
                side.module(inputs[name])
                if i:
                    times[name].append(clock() - started)
        table = []
        for name, side in all_sides.items():
            exact = inputs[name].double() @ side.weight.double().T
            error = (side.module(inputs[name])[:, :BLOCK] - exact).norm() / exact.norm()
            ratios = (
                statistics.median(a / b for a, b in zip(times[floats], times[name], strict=True)) for floats in DTYPES
            )
            share = side.bytes / all_sides["float32"].bytes
            middle = 1000 * statistics.median(times[name])
            table.append([name, f"{share:.3f}", f"{middle:.2f}", *(f"{ratio:.2f}" for ratio in ratios), f"{error:.1e}"])
            print(batch, *table[-1], flush=True)
        columns = ("weights, computed in", "bytes / float32", "ms", "float32 / it", "bfloat16 / it", "error")
        lines += ["", f"## Batch {batch}", "", markdown(columns, table)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
