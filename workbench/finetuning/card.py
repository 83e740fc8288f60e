"""A short README.md beside an adapter or merged weights: what it is, what it was made from, what was measured."""

import json
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


def add_measured(out: Path, measured: Mapping[str, Any]) -> Path:
    """Write the README.md of a finished fine-tune again, with these results in it."""
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return write_card(out, report, measured)


def write_merged_card(out: Path, about: Mapping[str, Any], adapter: Path) -> Path:
    """Write README.md beside merged weights; what is known of the adapter's training is repeated from its own card."""
    over = "dequantised NF4 weights of" if about["quantization"] == "nf4" else "weights of"
    base, card = about["base"], adapter / "README.md"
    lines = [
        f"# {out.name}", "",
        f"The {over} {base['name']} (revision {base['revision']}) with an adapter added in float32 and stored in "
        f"{about['dtype']}. Load it with wb.load_model.", "",
        f"- Adapter: {adapter.name}, SHA-256 {about['adapter'][:16]}, strength {about['strength']:g}",
    ]  # fmt: skip
    if card.exists():
        kept = card.read_text(encoding="utf-8").split("\n", 2)[2]
        lines += ["", "## The adapter", "", kept.strip().replace("## Measured", "### Measured")]
    write_atomic(out / "README.md", "\n".join(lines) + "\n")
    return out / "README.md"
