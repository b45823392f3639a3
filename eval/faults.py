"""Does a run that is killed, or meets a full disk or another run, go on and end with the same bytes?

    python eval/faults.py --out eval/results/faults.md
    unshare -rm sh -c 'mount -t tmpfs -o size=64m tmpfs DISK && python eval/faults.py --disk DISK --out ...'

Kills: a run over the demo model gets SIGKILL at a random moment, and the same command is given again. Full disks:
another run is given fewer bytes than it needs, of the small file system ``--disk`` or (without one) in a single
file; it must end with one message and exit code 2, leave what was written before as it was and nothing half-written,
and go on when there is room. Signals: SIGINT and SIGTERM end with 130 and 143, and say how to go on. Twice: two runs
at once, of which one may be refused. The result of each is compared byte by byte with that of a run left alone.
Each is a fork of a process that has imported everything.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

import torch
from checkout import commit
from forked import begin

from llmquant import demo
from llmquant.report import markdown

TEXT = ["calibration.path=text.txt", "calibration.sequences=8", "calibration.length=128"]
CASES = {
    "rtn": ["quantize", str(demo.MODEL), "rtn-w4g128", "--work", "work"],
    "rtn, no work folder": ["quantize", str(demo.MODEL), "rtn-w4g128"],
    "gptq": ["quantize", str(demo.MODEL), "gptq-plain-w4g128", *(x for change in TEXT for x in ("--set", change))],
    "gguf": ["quantize", str(demo.MODEL), "gguf-q4_k_m"],
    "gptq gguf": [
        *("quantize", str(demo.MODEL), "gptq-q4_k_m", "--set", "mismatch_correction=false", "--set", "transforms=[]"),
        *("--set", "algorithm.two_sided=false", *(x for change in TEXT for x in ("--set", change))),
    ],
}
END = ["--out", "out", "--no-eval"]
VARYING = {"llmquant-report.json", "README.md", "report.html"}  # they tell how long it took
LIMITS = [2000, 3000, 5000, 20_000, 50_000, 150_000, 300_000, 800_000, 2_000_000, 3_400_000]
"""Bytes that a single file may have, where there is no small file system; what a run says has to fit, too."""


@dataclass
class Found:
    """What became of one attempt; problem: empty where all is well."""

    kind: str
    case: str
    moment: str
    problem: str = ""


def contents(folder: Path) -> dict[str, bytes]:
    """Return what must be the same every time: all files but the reports and the card."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in VARYING}


def ended(pid: int) -> int:
    """Return the exit code of a fork, minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Faults:
    """Attempts in a folder of their own.

    place: where they are made. alone, seconds: by case, what a run left alone wrote, and how long it took.
    """

    def __init__(self, place: Path, text: str) -> None:
        self.place = place
        self._text = text
        self.alone: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for case in CASES:
            for _ in range(2):  # the first compiles
                folder = self.fresh()
                started = time.monotonic()
                code = ended(begin([*CASES[case], *END], folder))
                self.seconds[case] = time.monotonic() - started
                if code:
                    raise SystemExit(f"{case}: {(folder / 'output').read_text()}")
            self.alone[case] = contents(folder / "out")

    def fresh(self) -> Path:
        folder = self.place / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "text.txt").write_text(self._text, "utf-8")
        return folder

    def again(self, folder: Path, case: str) -> str:
        """Give the command once more, and return what is wrong with the result."""
        (folder / "output").unlink(missing_ok=True)
        if (folder / "out").exists():  # it had been finished
            return "" if contents(folder / "out") == self.alone[case] else "finished with other bytes"
        code = ended(begin([*CASES[case], *END], folder))
        said = (folder / "output").read_text("utf-8")
        if code:
            return f"does not go on: exit code {code}: {said.strip().splitlines()[-1][:300]}"
        if contents(folder / "out") != self.alone[case]:
            return "ends with other bytes"
        left = sorted(p.name for p in folder.iterdir() if "partial" in p.name or p.name == "out.work")
        return f"leaves {left[0]}" if left else ""

    def kill(self, case: str, rng: random.Random) -> Found:
        folder = self.fresh()
        moment = rng.uniform(0, self.seconds[case])
        pid = begin([*CASES[case], *END], folder)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        work = next((folder / name for name in ("work", "out.work") if (folder / name).exists()), None)
        layers = len(list(work.glob("layer-*.safetensors"))) if work else 0
        state = "finished" if (folder / "out").exists() else "writing" if (folder / "out.partial").exists() else ""
        state = state or (f"{layers} layers finished" if work else "before or without a work folder")
        return Found("SIGKILL", case, f"{moment:.2f} s: {state}", self.again(folder, case))

    def stop(self, case: str, number: signal.Signals, rng: random.Random) -> Found:
        folder = self.fresh()
        moment = rng.uniform(0.3, 0.8) * self.seconds[case]
        pid = begin([*CASES[case], *END], folder)
        time.sleep(moment)
        os.kill(pid, number)
        code, said = ended(pid), (folder / "output").read_text("utf-8").strip()
        found = Found(number.name, case, f"{moment:.2f} s: {said.splitlines()[-1] if said else ''}"[:120])
        if code != 128 + number and not (code == 0 and (folder / "out").exists()):
            found.problem = f"exit code {code}: {said[-300:]}"
        elif code and ("the same command goes on" not in said or "Traceback" in said):
            found.problem = f"does not say how to go on: {said[-300:]}"
        elif code and list(folder.glob("*.partial")):
            found.problem = "leaves something half-written"
        found.problem = found.problem or self.again(folder, case)
        return found

    def full(self, case: str, point: int, disk: bool) -> Found:
        """Let a run meet a full disk at one of ten points, and go on when there is room."""
        folder = self.fresh()
        shutil.copytree(demo.MODEL, folder / "earlier")
        earlier = contents(folder / "earlier")
        ballast = folder / "ballast"

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[point], resource.RLIM_INFINITY))

        out = tempfile.mkdtemp()  # what it prints needs room, too
        (folder / "output").symlink_to(Path(out) / "output")
        pid = begin([*CASES[case], *END], folder, (lambda: None) if disk else limit)
        moment = f"no file above {LIMITS[point]:,} bytes"
        if disk:  # which is full only when the run has begun: it would be refused
            while not any((folder / name).exists() for name in ("work", "out.work", "out.partial")):
                time.sleep(0.001)
            need = sum(map(len, self.alone[case].values()))
            room = int((0.02 + point / 10) * need)
            moment = f"{room:,} bytes free"
            left = shutil.disk_usage(folder).free - room
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(left, 1))
        code = ended(pid)
        said = (Path(out) / "output").read_text("utf-8") if (Path(out) / "output").exists() else ""
        found = Found("disk full", case, moment)
        left_over = sorted(p.name for p in folder.iterdir() if p.name == "out" or "partial" in p.name)
        if code == 0 and "out" in left_over:
            found.moment += ": enough"
        elif code != 2 or "Traceback" in said or not ("cannot be" in said and "same command" in said):
            found.problem = f"exit code {code}: {said[-400:]}"
        elif left_over:
            found.problem = f"leaves {left_over[0]}"
        else:
            found.moment += f": {said.strip()[:100]}"
        if contents(folder / "earlier") != earlier:
            found.problem = "what was there before is changed"
        ballast.unlink(missing_ok=True)
        (folder / "output").unlink()
        shutil.rmtree(out)
        found.problem = found.problem or self.again(folder, case)
        return found

    def twice(self, case: str) -> Found:
        folder = self.fresh()
        pids = [begin([*CASES[case], *END], folder) for _ in range(2)]
        codes = sorted(ended(pid) for pid in pids)
        said = (folder / "output").read_text("utf-8")
        found = Found("two at once", case, f"exit codes {codes[0]} and {codes[1]}")
        if codes not in ([0, 2], [0, 0]) or "Traceback" in said:
            found.problem = said[-300:]
        elif contents(folder / "out") != self.alone[case]:
            found.problem = "ends with other bytes"
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="an empty file system of at most 64 MB or so, to be filled")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    cases = list(CASES)
    with tempfile.TemporaryDirectory(dir=args.disk) as scratch:
        faults = Faults(Path(scratch), demo.text.text("calibration")[:60_000])
        calibrated = [case for case in cases if case.startswith("gptq")]  # runs of many layers: every second kill
        killed = [rng.choice(calibrated) if i % 2 else cases[i // 2 % len(cases)] for i in range(args.kills)]
        tries: list[Callable[[], Found]] = [lambda case=case: faults.kill(case, rng) for case in killed]
        tries += [lambda i=i: faults.full(cases[i % len(cases)], i, args.disk is not None) for i in range(10)]
        signals = (signal.SIGINT, signal.SIGTERM)
        tries += [lambda c=c, s=s: faults.stop(c, s, rng) for c in ("gptq", "gguf") for s in signals]
        tries += [lambda c=c: faults.twice(c) for c in cases]
        found = []
        for attempt in tries:
            found.append(attempt())
            print(*vars(found[-1]).values(), sep="\t", flush=True)
    table = report(found, args.disk is not None)
    if args.out:
        args.out.write_text(table, "utf-8")
    print(table)


def report(found: list[Found], disk: bool) -> str:
    """Return the Markdown table."""
    rows = []
    for kind, case in dict.fromkeys((f.kind, f.case) for f in found):
        of = [f for f in found if (f.kind, f.case) == (kind, case)]
        rows.append([kind, case, str(len(of)), str(sum(not f.problem for f in of))])
    return "\n".join(
        [
            "# Kills, full disks, signals and runs at once",
            "",
            f"Commit {commit()}; the demo model. "
            + ("Full: a small file system." if disk else "Full: no file may be larger than a limit."),
            "",
            markdown(["what", "run", "attempts", "same bytes in the end"], rows),
            "",
            *(f"- {f.kind}, {f.case}, {f.moment}: {f.problem or 'the same bytes'}" for f in found),
            "",
        ]
    )


if __name__ == "__main__":
    main()
