"""What finding, cutting and running cost, as ratios to what onnx and transformers take for the same network.

Networks are random, in the sizes of real ones: only times and memory are looked at. Each pair is measured by turns in
one process, in either order; peaks are those of processes of their own. Run: `python -m benchmarks.zoo.speed --record`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from torch import Tensor

from benchmarks.record import RESULTS, write_result
from benchmarks.zoo.export import quiet
from optin_deploy.cutting.graph import cut
from optin_deploy.jobs.stage_memory import StageMemory, resident_bytes
from optin_deploy.measuring.stats import bootstrap_ci
from optin_deploy.network.read import read
from optin_deploy.network.run import Place, Program
from optin_deploy.network.write import write
from optin_deploy.reporting.report import to_table
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout

ROUNDS = 6
KEPT = 0.6
KINDS = ("heads", "groups", "neurons", "channels")
MIB = 2**20


def bert_base() -> torch.nn.Module:
    """BERT-base."""
    config = transformers.BertConfig()
    return transformers.BertModel(config, add_pooling_layer=False)


def mask2former() -> torch.nn.Module:
    """Mask2Former with Swin-T."""
    swin = transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
    )
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(backbone_config=swin))


def minilm() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """MiniLM-L6 with a batch of 8 texts of 128 tokens."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    config._attn_implementation = "eager"
    ids = torch.randint(0, 1000, (8, 128))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return transformers.BertModel(config, add_pooling_layer=False), feeds


def vit_small() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """ViT-S/16 with a batch of 4 images."""
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    config._attn_implementation = "eager"
    return transformers.ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(4, 3, 224, 224)}


FILES: Mapping[str, Callable[[], torch.nn.Module]] = {"BERT-base": bert_base, "Mask2Former (Swin-T)": mask2former}
MODELS = {"MiniLM": minilm, "ViT-S": vit_small}


def plan(layout: Layout) -> dict[str, range]:
    """The first units of every group that people cut."""
    return {group.name: range(max(1, round(KEPT * group.units))) for group in layout.groups if group.kind in KINDS}


def load_and_check(path: Path) -> onnx.ModelProto:
    """What onnx does with a file before anything else."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return model


def by_onnx(path: Path) -> None:
    """Load, check and save."""
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(load_and_check(path), Path(folder) / "copy.onnx")


def by_us(path: Path) -> None:
    """Read, find, cut and write."""
    with tempfile.TemporaryDirectory() as folder:
        layout = find(read(path))
        write(cut(layout, plan(layout)), Path(folder) / "smaller.onnx")


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Time both by turns; returns the ratio of the means of logarithms with its interval, and the medians."""
    pairs = []
    for round_ in range(-1, rounds):
        order = (ours, theirs) if round_ % 2 else (theirs, ours)
        taken = {work: seconds(work) for work in order}
        if round_ >= 0:
            pairs.append((taken[ours], taken[theirs]))
    logs = [math.log(one / other) for one, other in pairs]
    return {
        "ratio": math.exp(statistics.mean(logs)),
        "ci95": bootstrap_ci(logs),
        "ours_s": statistics.median(one for one, _ in pairs),
        "theirs_s": statistics.median(other for _, other in pairs),
    }


def peak_ratio(path: Path) -> float:
    """Most memory that a fresh process takes to cut a file, beyond what it held before, in sizes of the file."""
    code = f"import sys; sys.argv = ['', {str(path)!r}]; from benchmarks.zoo import speed; speed.print_peak()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)) / path.stat().st_size


def print_peak() -> None:
    """Cut the file that the command line names, and tell the peak in bytes."""
    from optin_deploy.network.operators import rows

    rows()
    before, memory = resident_bytes(), StageMemory()
    with memory("cut"):
        by_us(Path(sys.argv[1]))
    print(json.dumps(memory.peaks["cut"] - before))


def file_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Find and cut files, beside onnx."""
    found = []
    for name, make in FILES.items():
        path = folder / "network.onnx"
        with quiet():
            write(read(make().eval()), path)
        gc.collect()
        gc.freeze()  # a million objects of the export, which no process holds that only cuts a file
        row = {
            "network": name,
            "size_mib": path.stat().st_size / MIB,
            "nodes": len(read(path).nodes),
            "groups": len(find(read(path)).groups),
            "find": ratios(lambda path=path: find(read(path)), lambda path=path: load_and_check(path), rounds),  # type: ignore[misc]
            "cut": ratios(lambda path=path: by_us(path), lambda path=path: by_onnx(path), rounds),  # type: ignore[misc]
            "peak": peak_ratio(path),
        }
        found.append(row)
        print(json.dumps(row), file=sys.stderr)
    return found


def run_rows(rounds: int) -> list[dict[str, Any]]:
    """Run networks forward and back to their masks, beside transformers' eager attention with the same masks."""
    found = []
    for name, make in MODELS.items():
        model, feeds = make()
        model.eval().requires_grad_(False)
        with quiet():
            network = read(model)
        layout = find(network)
        ours = masks_of(layout)
        theirs = hooked(model, layout)
        program = Program(network)

        def forward(masks: Mapping[Place, Tensor] = ours, run: Program = program, feeds: Any = feeds) -> Tensor:
            return next(iter(run(feeds, masks=masks).outputs.values()))

        def eager(model: torch.nn.Module = model, feeds: Any = feeds) -> Tensor:
            hidden: Tensor = model(**feeds).last_hidden_state
            return hidden

        def back(run: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: run().square().sum().backward()  # type: ignore[no-untyped-call]

        torch.testing.assert_close(forward(), eager(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            row = {"network": name, "masks": (len(ours), theirs), "forward": ratios(forward, eager, rounds)}
        row["back"] = ratios(back(forward), back(eager), rounds)
        found.append(row)
        print(json.dumps(row), file=sys.stderr)
    return found


def masks_of(layout: Layout) -> dict[Place, Tensor]:
    """A multiplier for each head and neuron, where it is consumed."""
    sites = [site for group in layout.groups if group.kind in ("heads", "neurons") for site in group.sites]
    return {(site.node, site.place): torch.ones(site.axis.size, requires_grad=True) for site in sites}


def hooked(model: torch.nn.Module, layout: Layout) -> int:
    """Put the same multipliers into the model; returns how many."""
    weights = {s.weight for group in layout.groups if group.kind in ("heads", "neurons") for s in group.slices}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in weights and f"{name}.bias" not in weights:
            mask = torch.ones(module.in_features, requires_grad=True)
            module.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
            count += 1
    return count


def words(found: Mapping[str, Any]) -> str:
    """A ratio with its interval and both times."""
    low, high = found["ci95"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}] ({found['ours_s']:.2f} / {found['theirs_s']:.2f} s)"


def page(files: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Both tables."""
    return "\n\n".join(
        (
            "# What finding, cutting and running cost",
            "Ratios of our time to theirs, by turns in one process, with the 95% interval; in brackets both medians. "
            "Peaks: most memory beyond what the process held before, in sizes of the file.",
            to_table(
                ("network", "MiB", "nodes", "groups", "read + find / onnx load + check", "read + find + cut + write / onnx load + check + save", "peak"),  # noqa: E501
                [
                    (
                        row["network"], f"{row['size_mib']:.0f}", str(row["nodes"]), str(row["groups"]),
                        words(row["find"]), words(row["cut"]), f"{row['peak']:.2f}",
                    )
                    for row in files
                ],
            ),
            to_table(
                ("network", "forward / transformers, eager attention", "forward and back to all masks"),
                [(row["network"], words(row["forward"]), words(row["back"])) for row in runs],
            ),
        )
    )  # fmt: skip


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = file_rows(Path(folder), options.rounds)
    runs = run_rows(options.rounds)
    text = page(files, runs)
    print(text)
    command = f"python -m benchmarks.zoo.speed --rounds {options.rounds} --threads {options.threads}"
    write_result(RESULTS if options.record else options.out, "zoo_speed", {"files": files, "runs": runs}, text, command)


if __name__ == "__main__":
    main()
