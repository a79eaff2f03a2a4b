"""A run's settings: what it takes to repeat it, and what it ran on."""

import platform
from argparse import Namespace
from typing import Any

import torch

import fusedrnn
from fusedrnn.demo.ranks import Ranks


def settings_of(
    options: Namespace, ranks: Ranks, device: torch.device, **resolved: Any
) -> dict[str, Any]:
    """For the JSON file: the options, what the run ``resolved`` of them, and its machine."""
    given = {key: value for key, value in vars(options).items() if key not in ("out", "command")}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **given,
        **resolved,
        "text": "pydoc_data.topics" if options.text is None else str(options.text),
        "device": str(device),
        "gpu": gpu,
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": ranks.size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedrnn": fusedrnn.__version__,
    }


def title_of(settings: dict[str, Any]) -> str:
    """One line for the terminal and the figure."""
    s = settings
    where = s["gpu"] or f"{s['device']} with {s['threads']} thread{'s' * (s['threads'] > 1)}"
    integers = ", fusedrnn reads integers" if s["integers"] else ""
    processes = f", {s['processes']} processes" if s["processes"] > 1 else ""
    return (
        f"{s['cell']} {s['vocabulary']}->{s['hidden']} x{s['layers']}, {s['dtype']}, "
        f"{s['steps']} steps of {s['batch']}, {where}{processes}{integers}"
    )
