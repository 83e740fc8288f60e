"""A short README.md beside an adapter or merged weights: what it is, what it was made from, what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.files import write_atomic

SHOWN = ("epochs", "learning_rate", "batch_tokens", "batch_size", "packing", "warmup", "seed", "max_length")
LOW_RANK = ("rank", "alpha", "targets", "dropout")


def write_card(out: Path, report: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> Path:
    """Write README.md from the report in training.json; `measured`: name -> a result to list, if there is any."""
    settings, records, method = report["parameters"], report["records"], report["parameters"]["method"]
    names = {"prompt": ("virtual_tokens",), "prefix": ("virtual_tokens",), "full": ()}.get(method, LOW_RANK)
    left_out = ", ".join(f"{count} {reason}" for reason, count in records["left_out"].items()) or "none"
    what = "All weights of the model were trained." if method == "full" else "Load it over its base."
    lines = [
        f"# {out.name}", "",
        f"A fine-tune of {report['base']['name']} (revision {report['base']['revision']}) by method {method}. {what}",
        "",
        f"- Data: {records['used']} records, {records['learnt_tokens']} learnt tokens; left out: {left_out}; "
        f"content key {report['settings']['records'][:16]}",
        f"- Weights of the base while training: quantization {report['quantization']}",
        f"- Trained numbers: {report['adapter_parameters']:,}",
        "- Settings: " + ", ".join(f"{name} {settings[name]}" for name in (*names, *SHOWN)),
        f"- Training: {report['steps']} steps, {report['tokens']:.0f} tokens, {report['seconds']:.1f} s; loss "
        f"{report['loss']['first']:.4f} at the first step, {report['loss']['last']:.4f} at the last",
    ]  # fmt: skip
    if "start" in report["settings"]:
        lines.append(f"- Goes on from the adapter with SHA-256 {report['settings']['start'][:16]}")
    lines += ["", "## Measured", ""]
    lines += [f"- {name}: {value}" for name, value in (measured or {}).items()] or [
        "Nothing beside the training loss, which says little about answers. Compare it with its base: "
        "wb.evaluate(lm, task, {...})."
    ]
    write_atomic(out / "README.md", "\n".join(lines) + "\n")
    return out / "README.md"
