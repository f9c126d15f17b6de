"""A small ViT of transformers loses heads and neurons and stays a ViT; it merges tokens too, and becomes a graph."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import optin_deploy
from made_pictures import CLASSES, SIDE, accuracy, pictures, train
from optin_deploy import PrunedModel

KINDS = ("heads", "neurons")
FLOPS = 0.6


def trained() -> ViTForImageClassification:
    """A ViT of three layers and 17 tokens that has learned the made pictures."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 96}
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: place for place, name in enumerate(CLASSES)}}
    config = ViTConfig(image_size=SIDE, patch_size=8, initializer_range=0.1, **sizes, **names)
    network = ViTForImageClassification(config)
    train(network, steps=200, rate=2e-3)
    return network


def tell(what: str, pruned: PrunedModel) -> None:
    """Print what a way of pruning left."""
    macs, params = pruned.report["macs"]["kept"], pruned.report["params"]
    kept = f"{macs:.1%} of the MACs, {params['pruned']:,} of {params['dense']:,} parameters"
    print(f"{what}: {kept}, accuracy {accuracy(pruned.model):.1%}, a {type(pruned.model).__name__}")


def main() -> None:
    """Train, prune in two ways, load one."""
    dense = trained()
    print(f"dense: accuracy {accuracy(dense):.1%}")
    images, _ = pictures(128, seed=2)
    batches = [{"pixel_values": some} for some in images.split(64)]

    pruned = optin_deploy.prune(dense, batches, flops=FLOPS, units=KINDS)
    tell("heads and neurons", pruned)
    pruned.save("out/vit")
    loaded = optin_deploy.load("out/vit")  # in any later process; also a ViTForImageClassification
    print("heads and neurons of the loaded model, layer by layer:")
    for layer in loaded.vit.layers:
        print(f"  {layer.attention.q_proj.out_features // 8} of 6, {layer.mlp.fc1.out_features} of 96")

    # 0.8 of the tokens stay in the mean. What merging saves, the widths may keep.
    merged = optin_deploy.prune(dense, batches, flops=FLOPS, units=KINDS, tokens=0.8)
    tell("heads, neurons and tokens", merged)
    print(f"tokens merged behind the attention of each layer: {list(merged.plan.merges)}")


if __name__ == "__main__":
    main()
