"""Models that take texts: a tokenizer inside of the server, and an ensemble of it and the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from optin_deploy.checkpoint.smaller import changed_beside, read_saved, remedy
from optin_deploy.data.pairs import TEXT_PAIRS
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.wall import wall
from optin_deploy.serving.base import Server
from optin_deploy.serving.manifest import Manifest, TensorSpec
from optin_deploy.serving.names import TEXT, text_of, tokenizer_of
from optin_deploy.serving.payload_files import payload
from optin_deploy.serving.repository import Version, hashes


def text_models(folder: Path, model: Manifest, target: Server, seq_len: int) -> list[Version]:
    """The tokenizer of a model, and the two in a row.

    Args: folder: of the transformers model. seq_len: tokens of a text at most, where the options do not say it.
    Raises: BadInput: the server or the model takes no texts, or pairs of them; or there is no fast tokenizer.
    """
    if not target.tokenizes:
        raise BadInput(f"--text: {target.name} runs no tokenizer; it is for triton and kserve.")
    tensors = [tensor.name for tensor in model.inputs]
    if "input_ids" not in tensors:
        raise BadInput(f"--text: {model.name} takes {', '.join(tensors)}, not texts.")
    saved, _ = read_saved(folder)
    if saved.about.get(TEXT_PAIRS):
        raise BadInput(
            f"--text: {model.name} takes pairs of texts: its calibration rows have a second text. The ensemble takes "
            "one text. Leave out --text, and tokenize pairs in the client."
        )
    options = replace(model.options, longest=model.options.longest or seq_len, preferred=())
    contents = tokenizer_files(folder)
    text = TensorSpec(TEXT, "BYTES", (-1, 1))
    tokenizer = replace(
        model,
        name=tokenizer_of(model.name),
        role="tokenizer",
        engine="",
        precision="",
        file="model.py",
        inputs=(text,),
        outputs=model.inputs,
        options=options,
        sha256=hashes(contents),
        size_bytes=len(contents["model.py"]),
        made_from={"source": model.made_from["source"]},
    )
    serves = {"serves": model.name, "tensors": " ".join(tensors)}
    ensemble = replace(
        tokenizer,
        name=text_of(model.name),
        role="text",
        file="",
        outputs=model.outputs,
        sha256={},
        size_bytes=0,
        made_from=serves,
    )
    return [(tokenizer, contents), (ensemble, {})]


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What Triton's python backend needs to tokenize as the model was trained.

    Raises: BadInput: no fast tokenizer lies in the folder. PlanMismatch: a file in it was changed since it was saved.
    """
    from transformers import AutoTokenizer

    changed = changed_beside(folder, read_saved(folder)[0])
    if changed:  # the ids would not be those that the model was calibrated and judged on
        raise PlanMismatch(f"--text: {folder / changed[0]} is not the file that was saved there. {remedy(folder)}")
    with wall(f"--text: {folder} has no fast tokenizer (tokenizer.json)", remedy(folder)):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        graph = tokenizer.backend_tokenizer.to_str().encode()
    if tokenizer.pad_token is None:
        raise BadInput(f'--text: the tokenizer in {folder} has no padding token. Set "pad_token" in its config.')
    padding = {
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_type_id": tokenizer.pad_token_type_id,
        "direction": tokenizer.padding_side,
    }
    saved = folder / "tokenizer.json"
    return {
        "model.py": payload("triton_tokenizer.py"),
        "tokenizer.json": saved.read_bytes() if saved.is_file() else graph,
        "padding.json": json.dumps(padding).encode(),
    }
