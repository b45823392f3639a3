"""Write a copy of a model with outlier channels, as large models have and small ones do not.

    python eval/outliers.py MODEL OUT

In every layer, the weight of each norm is multiplied by s, channel by channel, and
the columns of the linears behind it are divided by s, so that the function stays
the same (but for the rounding to the model's dtype). s is log-normal, and some
channels, the same in all layers, get 30 to 100.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmquant import calibrate
from llmquant.checkpoint import INDEX, SINGLE
from llmquant.run import load_float
from llmquant.stream import Stream

SPREAD = 0.5  # standard deviation of log(s)
RANGE = (30.0, 100.0)  # of the outliers
SHARE = 0.008  # of the channels are outliers, two at least


@torch.no_grad()
def write_outliers(model: str | Path, out: Path, seed: int = 0) -> None:
    """Write the copy into the new folder ``out``."""
    checkpoint = load_float(model)
    stream = Stream(checkpoint, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    width = stream.hidden_size
    chosen = torch.randperm(width, generator=generator)[: max(round(SHARE * width), 2)]
    tensors = {info.key: checkpoint.read(name) for name, info in checkpoint.infos.items()}
    for index in range(stream.layers):
        with stream.layer(index) as layer:
            for site in stream.spec.sites:
                if not calibrate.foldable(layer, site) or not site.fold.kind.startswith("norm"):
                    continue
                s = (SPREAD * torch.randn(width, generator=generator)).exp()
                s[chosen] = torch.empty(len(chosen)).uniform_(*RANGE, generator=generator)
                name = f"{stream.spec.layers}.{index}.{site.fold.module}.weight"
                scales = calibrate.storable_scales(layer, site, 1 / s, checkpoint.infos[name].dtype)
                calibrate.fold_scales(layer, site, scales)
            for local, parameter in layer.named_parameters():
                info = checkpoint.infos[f"{stream.spec.layers}.{index}.{local}"]
                tensors[info.key] = parameter.to(info.dtype)
    out.mkdir(parents=True)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_outliers(args.model, args.out, args.seed)


if __name__ == "__main__":
    main()
