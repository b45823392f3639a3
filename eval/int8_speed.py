"""Is a linear of 8-bit integers faster than one of float32 on this CPU?

    python eval/int8_speed.py --out results.md

One linear without bias, as `eval` and a runtime compute it: the dynamic int8 one finds a
scale for every token, rounds, multiplies in integers and rescales. Both sides run in
turns, many times; each figure is a median, and the ratio is the median of the ratios of
neighbouring runs, so that what else the machine does cancels. ``product`` is the integer
product alone; the rest of int8's time is rounding and rescaling. Between runs, a buffer
larger than the caches is read, because in a model other weights pass between two visits.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checkout import commit

from llmquant.activations import ActivationScheme, Inputs, encode
from llmquant.report import markdown
from llmquant.runtime.linear import QuantizedLinear, int8_product


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cpu() -> str:
    """Return the processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--warm", action="store_true", help="leave the weights in the caches between runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (args.rows, args.cols), generator=generator).to(torch.int8)
    scale = torch.rand(args.rows, 1, generator=generator) / 1000
    inputs = Inputs(ActivationScheme())
    integers, product = QuantizedLinear(weight, scale, inputs), int8_product(weight)
    floats = torch.nn.Linear(args.cols, args.rows, bias=False)
    floats.weight.copy_(weight * scale)
    others = torch.ones(32 << 20)  # 128 MB
    rows = []
    for batch in args.batches:
        x = torch.randn(batch, args.cols, generator=generator)
        codes, _ = encode(inputs, x)
        calls = {
            "float32": lambda x=x: floats(x),
            "int8": lambda x=x: integers(x),
            "product": lambda c=codes: product(c),
        }
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {side: [] for side in calls}
        for _ in range(args.repeat):
            for side, call in calls.items():
                if not args.warm:
                    others.sum()
                times[side].append(seconds(call))
        middle = {side: statistics.median(t) * 1000 for side, t in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["float32"], times["int8"], strict=True))
        bandwidth = weight.numel() / middle["product"] / 1e6
        rows.append([str(batch), *(f"{middle[side]:.2f}" for side in calls), f"{ratio:.2f}", f"{bandwidth:.1f}"])
        print(*rows[-1], flush=True)
    kernel = "oneDNN with VNNI" if torch.cpu._is_vnni_supported() else "torch._int_mm"
    columns = ("batch", "float32 ms", "int8 ms", "product ms", "float32 / int8", "product GB/s")
    lines = [
        f"# A linear of {args.rows} x {args.cols}: dynamic int8 beside float32",
        "",
        f"Commit {commit()}; {cpu()}, {args.threads} threads, {kernel}, torch {torch.__version__}, "
        f"weights {'in cache if they fit' if args.warm else 'out of cache'}, medians of {args.repeat} runs in turns. "
        "The last column is the weights' bytes over the product's time.",
        "",
        markdown(columns, rows),
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
