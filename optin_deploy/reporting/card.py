"""The card of a cut model for the Hub: what it is, how it was made, what it measured, and where it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from optin_deploy.common.version import __version__
from optin_deploy.files.hub import hub_id_of, revision_of
from optin_deploy.reporting.artifact_table import artifact_table
from optin_deploy.reporting.findings import StoredReport
from optin_deploy.reporting.report import to_table

PATH = re.compile(r"(?:^|[\s`'(])(?:/|~|\.{1,2}/|[A-Za-z]:\\)\S")
"""A path of the builder's machine."""
HOME = "https://github.com/optin-deploy/optin-deploy"


def card_of(report: StoredReport, repository: str, files: Sequence[str], *, task: str | None = None) -> str:
    """Return a model card in Markdown with the Hub's metadata; nothing in it names a path of the builder's machine.

    Args: repository: its id on the Hub. files: what lies beside the card. task: its name on the Hub.
    """
    base, revision = hub_id_of(report.model), revision_of(report.model)[1]
    entries: dict[str, object] = {"tags": ["optin-deploy", "pruned", "onnx"]}
    entries |= {"pipeline_tag": task} if task else {}
    entries |= {"base_model": base, "base_model_relation": "quantized"} if base else {}
    front = [f"{name}: {json.dumps(value)}" for name, value in entries.items()]
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(report.model).name}`"
    at = "" if revision is None else f" at revision `{revision}`"
    macs = report.macs
    rows = [
        ("parameters", f"{report.params.dense:,.0f}", f"{report.params.pruned:,.0f}"),
        ("MACs of one sample", f"{macs.dense:,.0f}", f"{macs.pruned:,.0f}"),
    ]
    if report.size_bytes.dense is not None:
        rows.append(("bytes of the file", f"{report.size_bytes.dense:,.0f}", f"{report.size_bytes.pruned:,.0f}"))
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {repository.rsplit('/', 1)[-1]}",
        f"A physically smaller {name}{at}: {macs.pruned / max(1, macs.dense):.0%} of its multiply-accumulates stay. "
        f"Units were scored, chosen and cut{_afterwards(report)}, by [optin-deploy]({HOME}) {__version__}.",
        "## What was measured",
        " ".join(report.quality_lines),
        to_table(("", "dense", "pruned"), rows),
        *([to_table(*artifact_table(report.artifacts, report.latency))] if report.artifacts else []),
        *_latency(report),
        "## How it was made",
        f"Plan `{report.hashes.get('plan', '')[:12]}`, network `{report.hashes.get('network', '')[:12]}`; `plan.json` "
        "names every unit that stays. "
        + " ".join(f"{key.replace('_', ' ')}: {value}." for key, value in _settings(report).items()),
        "## How to load it",
        f"```python\nimport onnxruntime\nfrom huggingface_hub import hf_hub_download\n\n"
        f'session = onnxruntime.InferenceSession(hf_hub_download("{repository}", "{files[0]}"))\n```',
        *(
            [
                "In sentence-transformers:\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
                f'model = SentenceTransformer("{repository}", backend="onnx")\n```'
            ]
            if "modules.json" in files
            else []
        ),
        *(
            [
                "As a torch module of its transformers class, whose layers have widths of their own:\n\n"
                f"```python\nimport optin_deploy\nfrom huggingface_hub import snapshot_download\n\n"
                f'model = optin_deploy.load(snapshot_download("{repository}"))\n```'
            ]
            if "optin.json" in files
            else []
        ),
        "## Limits",
        "Quality was measured on the rows above and on nothing else; what the dense model cannot do, this one cannot "
        "either. Times are of one machine. " + " ".join(note for note in report.notes if not PATH.search(note)),
    ]
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def _latency(report: StoredReport) -> list[str]:
    rows = [
        (
            f"{row.engine} {row.precision}, {row.batch}" + ("" if row.seq_len is None else f" x {row.seq_len}"),
            f"{row.dense.p50_ms:.2f}",
            f"{row.pruned.p50_ms:.2f}",
            f"{row.speedup:.2f}x [{row.ci95[0]:.2f}, {row.ci95[1]:.2f}]",
        )
        for row in report.latency
    ]
    if not rows:
        return []
    env = report.environment
    machine = f"Milliseconds on {env.get('cpu_model', 'one machine')}, median of interleaved runs:"
    return [machine, to_table(("engine, batch x length", "dense", "pruned", "speed-up [95% CI]"), rows)]


def _settings(report: StoredReport) -> dict[str, object]:
    """Settings that say how the units were chosen, without paths."""
    names = ("flops", "params", "size", "max_drop", "allocation", "samples", "seed", "precision")
    return {name: report.settings[name] for name in names if report.settings.get(name) is not None}


def _afterwards(report: StoredReport) -> str:
    """What became of the weights that stay, for the middle of a sentence."""
    repaired = "" if report.settings.get("compensation") is False else ", the weights that stay repaired in closed form"
    if report.tuned is not None:
        return f"{repaired} and then tuned towards the dense outputs, without labels"
    return f"{repaired}, without training"
