"""``python -m benchmarks.gpu --part N --out DIR``, on a machine with a GPU and fusedrnn installed.

It installs and compiles nothing and needs torch alone; the tests need pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import compact, machine
from benchmarks.gpu import canaries, checks, micro, points, process, summary, supervise, sweep
from benchmarks.gpu.points import Point, Sizes
from fusedrnn.demo.options import positive_number

# The stages of each part in order, with their shares of the time; later stages get what earlier
# ones leave.
PARTS = {
    1: {"driver": 1.0, "canaries": 2.5, "micro": 1.0, "tests": 4.0},
    2: {"driver": 1.0, "sweep": 8.0},
    3: {"profile": 1.8, "targets": 4.0, "sanitizer": 2.7},
}
RESERVE = 15.0  # seconds for the fit and the summary
PROFILED = (  # kernels for ncu, by group of the sweep
    *("book-lstm-256x2/tf32/forward", "book-lstm-256x2/tf32/backward"),
    *("book-lstm-256x2/float32/forward", "lstm-256/float16/forward"),
    *("flashrnn-lstm-768/float16/forward", "flashrnn-lstm-768/bfloat16/backward"),
)
PROFILED_STEPS = 64  # ncu runs a kernel many times


class Command:
    """One part: its device, clock, logs and findings, with those of earlier parts."""

    def __init__(
        self, part: int, folder: Path, device: str, minutes: float, earlier: dict[str, Any]
    ) -> None:
        self._part, self._folder, self._device = part, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = Path(tempfile.mkdtemp(prefix="fusedrnn-gpu-"))
        self._end = time.monotonic() + minutes * 60 - RESERVE
        self._sizes: Sizes = points.TRY if device == process.EMULATOR else points.CUDA
        where = torch.device("cpu" if device == process.EMULATOR else device)
        self.data: dict[str, Any] = {**earlier, "environment": machine.environment(where)}
        self.data.setdefault("commands", {})
        self._strike()

    def _strike(self) -> None:
        """Has every process from now on leave out the families that failed."""
        if found := self.data.get("canaries", {}).get("found"):
            os.environ[process.CANARIES] = canaries.verdicts(found)

    def run(self) -> None:
        """Runs the stages; a stage that fails does not stop the next, and findings are saved."""
        shares = PARTS[self._part]
        if self._part == 2 and "spec" in self._found("driver").get("driver", {}):
            shares = {name: share for name, share in shares.items() if name != "driver"}
        order = list(shares)
        if self._part > 1 and not self._found("canaries"):
            print("no canaries of part 1: families that hang are not known", flush=True)
        try:
            for i, name in enumerate(order):
                start = time.monotonic()
                share = shares[name] / sum(shares[later] for later in order[i:])
                deadline = start + max(0.0, self._end - start) * share
                print(f"{name}: up to {deadline - start:.0f} s", flush=True)
                stage: Callable[[float], dict[str, Any]] = getattr(self, f"_{name}")
                try:
                    found = stage(deadline)
                except Exception as error:  # including errors of this command
                    found = {**summary.NOTHING, "incomplete": f"{type(error).__name__}: {error}"}
                self.data[name] = {**found, "wall_seconds": time.monotonic() - start}
                if name == "canaries":
                    self._strike()
                self.save()
        finally:
            self.save()
            shutil.rmtree(self._logs)

    def save(self) -> None:
        """At most one archive a part, and two files for all of them."""
        path = self._folder / "gpu.json"
        path.write_text(compact.dumps(self.data, 3))
        (self._folder / "gpu.md").write_text(summary.markdown(path))
        with tarfile.open(self._folder / f"logs-{self._part}.tar.gz", "w:gz") as archive:
            archive.add(self._logs, f"logs-{self._part}")

    def _found(self, stage: str) -> dict[str, Any]:
        return self.data.get(stage, {}).get("found", {})

    # ---- the stages: each returns what it found before a time of time.monotonic() ----

    def _driver(self, deadline: float) -> dict[str, Any]:
        kinds = ("driver", "clusters") if self._part == 1 else ("driver",)
        return self._work("driver", [{"kind": kind, "id": kind} for kind in kinds], deadline)

    def _canaries(self, deadline: float) -> dict[str, Any]:
        only = os.environ.get("FUSEDRNN_GPU_ONLY", "")  # a part of their names: for tests
        spec = self._found("driver").get("driver", {}).get("spec")
        if spec is not None:
            spec = {**spec, "clusters": tuple(spec["clusters"])}  # JSON has made a list of it
        return self._work("canaries", canaries.items(spec, only), deadline)

    def _micro(self, deadline: float) -> dict[str, Any]:
        spec = self._found("driver").get("driver", {}).get("spec", {})
        clusters = spec.get("capability", 90) >= 90
        todo = list(micro.runs(self._sizes.micro_repeats, self._sizes.micro_blocks, clusters))
        return self._work(
            "micro", [{"kind": "micro", "id": m.id, "micro": asdict(m)} for m in todo], deadline
        )

    def _tests(self, deadline: float) -> dict[str, Any]:
        return checks.tests(self._logs, deadline)

    def _sweep(self, deadline: float) -> dict[str, Any]:
        spec = self._found("driver").get("driver", {}).get("spec")
        if spec is None:
            raise RuntimeError("the driver has not answered")
        groups = sweep.groups(self._sizes)
        todo = sweep.in_turns(
            [[g.point(plan) for plan in sweep.chosen(g, spec, self._sizes)] for g in groups]
        )
        found = self._work("sweep", [point.item() for point in todo], deadline)
        found |= {"spec": spec, "groups": {g.id: g.request() for g in groups}}
        if self._device != process.EMULATOR:  # whose cycles mean nothing
            found["rate"] = self._found("micro").get("rate/1/1/0", {}).get("cycles_per_microsecond")
        return {**found, "fit": sweep.fit(found)}

    def _profile(self, deadline: float) -> dict[str, Any]:
        items = [
            Point(
                group.id,
                [replace(work, case=replace(work.case, steps=min(work.case.steps, PROFILED_STEPS)))
                 for work in group.point("").works],
            ).item()
            for group in sweep.groups(self._sizes)
            if group.id in PROFILED
        ]  # fmt: skip
        given = self._logs / "profile.json"
        given.write_text(json.dumps(items))
        ids = [item["id"] for item in items]
        return checks.profile(self._logs, deadline, self._device, given, ids)

    def _targets(self, deadline: float) -> dict[str, Any]:
        named, grid = list(points.named(self._sizes)), points.grid(self._sizes)
        found = self._work("targets", [point.item() for point in [*named, *grid]], deadline)
        return {**found, "grid": len(grid)}

    def _sanitizer(self, deadline: float) -> dict[str, Any]:
        return checks.sanitizer(self._logs, deadline, self._device)

    def _work(self, name: str, items: list[dict[str, Any]], deadline: float) -> dict[str, Any]:
        given, journal = self._logs / f"{name}.json", self._logs / f"{name}.jsonl"
        given.write_text(json.dumps(items))
        command = [sys.executable, "-m", "benchmarks.gpu.worker", str(given), str(journal)]
        outcome = supervise.supervise(
            [*command, "--device", self._device],
            journal,
            self._logs / f"{name}.log",
            deadline,
            checks.SILENCE,
            process.python_path(),
        )
        if len(outcome.found) == len(items):  # complete, however the process ended
            outcome.incomplete = None
        return {
            "found": outcome.found,
            "planned": len(items),
            "incomplete": outcome.incomplete,
        }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Runs one of three parts: 1, whether the kernels work and what their parts "
        "cost; 2, plans against each other; 3, counters, targets against torch.nn, sanitizers. "
        "`python -m benchmarks.gpu build [ARCHS]` compiles the microbenchmarks before, where there "
        "is a CUDA toolkit; `python -m benchmarks.gpu fit FILE` fits the planner's constants to an "
        "earlier run.",
    )
    add = parser.add_argument
    add("--part", type=int, required=True, choices=PARTS, help="which part")
    add("--out", type=Path, required=True, metavar="DIR", help="for gpu.json, gpu.md and logs")
    add("--after", type=Path, metavar="FILE", help="gpu.json of earlier parts (default: in DIR)")
    add("--device", default="cuda", help="default: cuda; emulator tries the command on tiny sizes")
    add("--minutes", type=positive_number, default=8.8, help="total duration (default: 8.8)")
    return parser


def earlier_parts(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The findings of earlier parts, of the same GPU."""
    path = options.after or options.out / "gpu.json"
    if not path.exists():
        if options.after:
            parser.error(f"there is no {path}")
        return {}
    data: dict[str, Any] = json.loads(path.read_text())
    gpu = torch.cuda.get_device_name() if options.device != process.EMULATOR else None
    if data["environment"]["gpu"] != gpu:
        parser.error(f"{path} is of {data['environment']['gpu']}, and this is {gpu}")
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for failed, incorrect or omitted work, 2 for wrong usage."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["build"]:
        print(micro.build(words[1] if len(words) > 1 else ""))
        return 0
    if words[:1] == ["fit"] and len(words) == 2:
        fit = sweep.fit(json.loads(Path(words[1]).read_text())["sweep"])
        for title, lines in summary.fit_tables(fit):
            print(f"{title}\n{summary.aligned(lines)}\n")
        return 0
    parser = make_parser()
    options = parser.parse_args(words)
    if options.device != process.EMULATOR and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device emulator tries the command on tiny sizes")
    earlier = earlier_parts(options, parser)
    if options.device == process.EMULATOR:
        process.stand_in().prepare()
    command = Command(options.part, options.out, options.device, options.minutes, earlier)
    words = ["python", "-m", "benchmarks.gpu", "--part", str(options.part)]
    words += ["--device", options.device] if options.device != "cuda" else []
    words += ["--minutes", f"{options.minutes:g}"] if options.minutes != 8.8 else []
    command.data["commands"][str(options.part)] = shlex.join(words)
    try:
        command.run()
    except KeyboardInterrupt:
        print("interrupted; findings so far:", flush=True)
    print(summary.text(command.data))
    stages = ("environment", *PARTS[options.part])  # earlier parts had exit codes of their own
    return 0 if summary.good({k: v for k, v in command.data.items() if k in stages}) else 1


if __name__ == "__main__":
    sys.exit(main())
