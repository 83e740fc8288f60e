"""LoRA and QLoRA steps on packed rows: every variant that computes the same, beside TRL with its own defaults.

Models of real shapes with random weights, made on the device; packed rows of 2,048 tokens in repeating patterns. A
variant with other losses or gradient norms than the reference is marked wrong. MFU counts 4 FLOPs a weight and token
for LoRA: forward, and backward to the activations; frozen weights get no gradient, and recomputation is not counted.

    python -m bench.training --model 1.7B 8B --out training.json     # a GPU; minutes a model, most of them compiling
    python -m bench.training --scale tiny                            # the same code on a CPU in seconds
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback

from bench import static
from workbench.files import write_atomic
from workbench.finetuning.fastest import (
    HALF_TOLERANCE,
    REFERENCE,
    TOLERANCE,
    Measured,
    Variant,
    device_name,
    finish,
    judge,
    measure,
    prepare,
    variants,
)
from workbench.finetuning.packing import IGNORED, Example
from workbench.models import LM, find_blocks, load_model
from workbench.report.tables import format_table

ROW = 2048
# Dense bfloat16 tensor-core FLOPs a second, accumulated in float32: NVIDIA's data sheets, half of "with sparsity"
PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
GOALS = {("1.7B", "lora"): "MFU >= 0.40", ("8B", "qlora"): "peak < 12 GB"}
SHAPES = {
    **static.SHAPES,
    "3B": lambda: (LlamaForCausalLM, LlamaConfig(  # Llama-3.2-3B, from its config.json
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128_256, tie_word_embeddings=True,
    )),
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 640}  # fmt: skip
KERNELS = ("sdpa", "flash_attention_2", "flex_attention")


def random_model(name: str, tokenizer: Any, tiny: bool, device: torch.device) -> LM:
    """A model of that shape with random weights, the same at every call; float32 on a CPU, bfloat16 on a GPU."""
    kind, config = SHAPES[name]()
    for key, value in (TINY if tiny else {}).items():
        setattr(config, key, value)
    config.eos_token_id, config.pad_token_id, config.max_position_embeddings = None, 0, 4 * ROW
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = kind(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
    return LM(f"random {name}", model, tokenizer, find_blocks(model), "random, seed 0", {})


def in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Every linear layer but the head as NF4 with double quantisation, as `load_model(quantization="nf4")` has them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
                packed = Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=model.dtype,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = layer.weight.data
                packed.weight = Params4bit(weight.cpu(), False, quant_type="nf4", compress_statistics=True)
                packed.bias = layer.bias
                packed.support_avx512bf16_for_cpu = False  # see workbench.models
                setattr(parent, name, packed.to(weight.device))
    model.is_loaded_in_4bit = True
    return model


def patterns(tokens: int, row: int, vocabulary: int) -> list[Example]:
    """Records of a repeating pattern of six tokens, an eighth to a half of a row long, the first quarter not learnt."""
    generator = torch.Generator().manual_seed(0)
    examples, total = [], 0
    while total < tokens:
        size = int(torch.randint(row // 8, row // 2, (), generator=generator))
        motif = torch.randint(5, min(vocabulary, 200), (6,), generator=generator).tolist()
        ids = (motif * (size // 6 + 1))[:size]
        examples.append(Example(ids, [IGNORED] * (size // 4) + ids[size // 4 :]))
        total += size
    return examples


def ours(make: Callable[[], LM], variant: Variant, examples: list[Example], row: int, four: bool, out: Path) -> Any:
    """The trainer of `finetune`, one packed row a step."""
    from workbench.finetuning.trainer import make_trainer

    lm = make()
    model = prepare(in_four_bits(lm.model) if four else lm.model, variant)
    trainer = make_trainer(
        model, lm.tokenizer, examples, _lora(), checkpoints=out / "checkpoints", packed_length=row, batch_size=1,
        accumulation=1, epochs=1, learning_rate=1e-3, warmup=0, checkpointing=variant.checkpointing,
        save_steps=10**9, seed=0,
    )  # fmt: skip
    return finish(trainer, variant)


def trl_defaults(make: Callable[[], LM], examples: list[Example], row: int, four: bool, out: Path) -> Any:
    """`SFTTrainer` as it comes: eight padded records a step, checkpointing, its own learning rate."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    lm = make()
    on_gpu = lm.device.type == "cuda"
    arguments = SFTConfig(
        output_dir=str(out), report_to="none", disable_tqdm=True, logging_steps=1, max_length=row, use_cpu=not on_gpu,
        bf16=on_gpu, dataloader_pin_memory=on_gpu,
    )  # fmt: skip
    dataset = datasets.Dataset.from_list([asdict(example) for example in examples])
    model = in_four_bits(lm.model) if four else lm.model
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=lm.tokenizer, peft_config=_lora())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


def sweep(
    name: str, four: bool, tokenizer: Any, *, steps: int, tiny: bool, device: torch.device, kernels: tuple[str, ...],
    compiling: bool = True,
) -> tuple[list[dict[str, Any]], list[Measured]]:  # fmt: skip
    """All variants of one model, judged, as table rows and as measured; TRL's defaults last, beside the competition."""
    row = 128 if tiny else ROW
    make = partial(random_model, name, tokenizer, tiny, device)
    lm = make()
    weights = sum(each.numel() for each in lm.model.parameters())
    if not lm.model.config.tie_word_embeddings:
        weights -= lm.model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    vocabulary, tolerance = lm.model.config.vocab_size, TOLERANCE.get(lm.model.dtype, HALF_TOLERANCE)
    del lm
    gc.collect()
    examples = patterns(row * (steps + 2), row, vocabulary)
    chosen = [one for one in variants(kernels) if compiling or not one.compiled]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for variant in chosen:
            torch.compiler.reset()
            found.append(measure(variant.name, partial(ours, make, variant, examples, row, four, out), steps))
            print(f"  {name} {'qlora' if four else 'lora'}: {found[-1].name}: {found[-1].verdict}", flush=True)
        found = judge(found, tolerance)
        plain = measure("TRL's defaults", partial(trl_defaults, make, examples * 8, row, four, out / "trl"), steps)
    best = max((one for one in found if one.verdict == "ok"), key=lambda one: one.tokens_per_second)
    kind = "qlora" if four else "lora"
    lines = [_line(name, kind, one, weights, plain, one is best) for one in [*found, plain]]
    return lines, [*found, plain]


def _line(name: str, kind: str, one: Measured, weights: int, plain: Measured, best: bool) -> dict[str, Any]:
    peak = next((flops for gpu, flops in PEAK.items() if gpu in device_name()), None)
    rate = one.tokens_per_second
    return {
        "model": name, "kind": kind, "variant": one.name, "tokens/s": rate,
        "times TRL's defaults": rate / plain.tokens_per_second if plain.tokens_per_second else "",
        "MFU": 4 * weights * rate / peak if peak else "", "peak, GB": one.peak_bytes / 1e9 if one.peak_bytes else "",
        "loss at the end": one.losses[-1] if one.losses else "", "verdict": one.verdict + ", chosen" * best,
        "goal": GOALS.get((name, kind), "") if best else "",
    }  # fmt: skip


def lines(tokenizer: Any, names: tuple[str, ...] = ("1.7B",), steps: int = 12) -> list[dict[str, Any]]:
    """Table rows of these models, LoRA and QLoRA, on the GPU."""
    place = torch.device("cuda")
    both = [(name, four) for name in names for four in (False, True)]
    return [
        row
        for name, four in both
        for row in sweep(name, four, tokenizer, steps=steps, tiny=False, device=place, kernels=KERNELS)[0]
    ]


def main(arguments: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["0.5B", "1.7B", "3B", "8B"])
    parser.add_argument("--kind", nargs="+", choices=("lora", "qlora"), default=["lora", "qlora"])
    parser.add_argument("--scale", choices=("real", "tiny"), default="real")
    parser.add_argument("--kernels", nargs="+", choices=("eager", *KERNELS), default=KERNELS)
    parser.add_argument("--no-compile", action="store_true", help="leave compiled variants out")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    options = parser.parse_args(None if arguments is None else list(arguments))
    tiny, device = options.scale == "tiny", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not tiny and device.type == "cpu":
        parser.error("models of real size need a GPU; --scale tiny runs the same code on a CPU")
    tokenizer, table, report = load_model("lab", device="cpu").tokenizer, [], []
    print(f"{device_name()}, torch {torch.__version__}; reference: {REFERENCE.name}", flush=True)
    for name in options.model:
        for kind in options.kind:
            rows, found = sweep(
                name, kind == "qlora", tokenizer, steps=options.steps, tiny=tiny, device=device,
                kernels=tuple(options.kernels), compiling=not options.no_compile,
            )  # fmt: skip
            table += rows
            report.append({"model": name, "kind": kind, "measured": [asdict(one) for one in found], "table": rows})
            if options.out:  # after every sweep: a later one may be killed
                write_atomic(options.out, json.dumps({"device": device_name(), "sweeps": report}, indent=2))
    print(format_table(table), flush=True)
    return table


if __name__ == "__main__":
    main()
