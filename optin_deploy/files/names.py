"""Names of the files in an output folder."""

from __future__ import annotations

SCORES, DENSE, PRUNED = "scores.safetensors", "dense.onnx", "model.onnx"
MADE_FROM_SCORES = ("curves.json", "plan.json", "scores.png", "sweep.json", "sweep.csv", "sweep.png")
TUNED = "tuned.json"
"""Tells how a network was fine-tuned; a folder that has it holds what no other command makes again."""
JOB = "job.toml"
"""Options of the command that made a folder."""
LOCK = ".optin.lock"
SUPPORT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
    ),
)
"""What lies beside an ONNX file for other loaders."""
TYPES = ("", ".fp16", ".bf16", ".int8")
ARTIFACTS = tuple(
    f"{stem}{suffix}"
    for stem in ("model", "dense")
    for suffix in (
        *(f"{kind}.onnx{data}" for kind in TYPES for data in ("", ".data")),
        *(f"{kind}.pt2" for kind in TYPES),
        *(f"{kind}.engine{log}" for kind in ("", ".rtx") for log in ("", ".log")),
    )
)
NAMES = (
    *("source.json", JOB, SCORES, *MADE_FROM_SCORES, "latency.json", "model", *SUPPORT_FILES),
    *(*ARTIFACTS, "engine.json", "timing.cache", "samples.safetensors", "measurements.json", "operators.json"),
    *(TUNED, "mlperf", "mlperf.json", "report.json", "report.md", "report.html"),
)
"""All that any command writes into an output folder: what others have put there is found before the work begins."""
