"""Where quantized models run: which files each place reads, how fast its memory is, and where these figures are from.

Bandwidths are peaks that vendors give, so rates that follow from them are the most
there can be. Formats are those that the runtime's own documents list for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Target:
    """A runtime on a device.

    runs: kinds of files (``recommend.kind``) that it computes with as they are packed.
    bandwidth: of the memory that holds the weights, bytes a second, of the device in ``about``.
    program: an estimate of what the runtime itself takes, in bytes.
    batch: tokens of a prompt that it computes together, for which it holds logits and a mask in float32.
    commands: that run what ``quantize`` has written; {out} is the folder, {context} the number of tokens.
    sources: what a figure is of -> the document.
    note: what to know before choosing it.
    """

    about: str
    runtime: str
    runs: tuple[str, ...]
    bandwidth: int
    program: int
    commands: tuple[str, ...]
    sources: Mapping[str, str]
    batch: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"sources": dict(self.sources)}


PACKED = "compressed_tensors: pack-quantized, 4 bits", "compressed_tensors: pack-quantized, 8 bits"
INT8, FP8 = "compressed_tensors: int-quantized", "compressed_tensors: float-quantized"
VLLM = "docs.vllm.ai, Quantization, Supported Hardware (0.15.1)"
VLLM_FP8 = "docs.vllm.ai, FP8 W8A8 (0.32): Turing and Ampere compute with FP8 weights alone"
VLLM_SHARE = (
    "vLLM takes 0.9 of a GPU's memory unless told otherwise (--gpu-memory-utilization): give that as the memory."
)
GGUF_SOURCE = "llama.cpp, README: models in GGUF, on the CPU and by Metal; tools/quantize/README.md: their types"
BUFFER_SOURCE = "llama.cpp, its header: n_ubatch, 512 by default"


def _of_ggufs(about: str, bandwidth: int, source: str) -> Target:
    return Target(
        about,
        "llama.cpp",
        ("gguf",),
        bandwidth,
        program=100_000_000,
        commands=("llama-cli -m {out}/*.gguf -c {context}",),
        sources=MappingProxyType({"bandwidth": source, "formats": GGUF_SOURCE, "runtime": BUFFER_SOURCE}),
        batch=512,
    )


def _vllm(about: str, bandwidth: int, source: str, runs: tuple[str, ...], formats: str, note: str = "") -> Target:
    return Target(
        about,
        "vLLM",
        runs,
        bandwidth,
        program=1_500_000_000,
        commands=("vllm serve {out} --max-model-len {context}",),
        sources=MappingProxyType({"bandwidth": source, "formats": formats}),
        note=f"{VLLM_SHARE}{note and ' '}{note}",
    )


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "laptop": _of_ggufs(
            "a laptop's CPU with two channels of DDR5-5600",
            89_600_000_000,
            "JEDEC JESD79-5, DDR5-5600: 2 channels x 8 bytes x 5600 MT/s",
        ),
        "apple-m4": _of_ggufs(
            "Apple M4",
            120_000_000_000,
            "Apple, press release of 30 October 2024 on M4 Pro and M4 Max: M4, 120GB/s",
        ),
        "apple-m4-max": _of_ggufs(
            "Apple M4 Max with 40 GPU cores",
            546_000_000_000,
            "Apple, press release of 30 October 2024 on M4 Pro and M4 Max: M4 Max, up to 546GB/s",
        ),
        "raspberry-pi-5": _of_ggufs(
            "Raspberry Pi 5",
            17_068_000_000,
            "Raspberry Pi, product brief of Raspberry Pi 5: LPDDR4X-4267; 32 bits wide: 4 bytes x 4267 MT/s",
        ),
        "phone": _of_ggufs(
            "a phone with Snapdragon 8 Gen 3",
            76_800_000_000,
            "Qualcomm, product brief of Snapdragon 8 Gen 3: LPDDR5X at 4800 MHz; 64 bits wide: 8 bytes x 9600 MT/s",
        ),
        "vllm-ampere": _vllm(
            "NVIDIA A100 80GB SXM",
            2_039_000_000_000,
            "NVIDIA, datasheet of A100: 80GB SXM, 2,039 GB/s",
            ("gptq", "awq", *PACKED, INT8, FP8, "bitsandbytes"),
            f"{VLLM}; {VLLM_FP8}",
        ),
        "vllm-hopper": _vllm(
            "NVIDIA H100 SXM",
            3_350_000_000_000,
            "NVIDIA, datasheet of H100: SXM, 3.35TB/s",
            ("gptq", "awq", *PACKED, INT8, FP8, "bitsandbytes"),
            VLLM,
        ),
        "vllm-amd": _vllm(
            "AMD Instinct MI300X",
            5_300_000_000_000,
            "AMD, data sheet of Instinct MI300X: 5.3 TB/s",
            (FP8,),
            VLLM,
            "Its documents list FP8 and GGUF for AMD, and call GGUF experimental.",
        ),
        "transformers": Target(
            "NVIDIA A100 80GB SXM",
            "transformers",
            ("bitsandbytes", "gptq", "awq"),
            2_039_000_000_000,
            program=1_000_000_000,
            commands=(
                "python -c \"from transformers import pipeline; p = pipeline('text-generation', '{out}', "
                "device_map='auto'); print(p('Hello', max_new_tokens=64))\"",
            ),
            sources=MappingProxyType(
                {
                    "bandwidth": "NVIDIA, datasheet of A100: 80GB SXM, 2,039 GB/s",
                    "formats": "transformers 5.23, quantizers/: bitsandbytes, gptq and awq compute with packed "
                    "weights; compressed-tensors makes them float at the first pass",
                }
            ),
            note="GPTQ and AWQ folders need GPTQModel, bitsandbytes folders bitsandbytes.",
        ),
    }
)
