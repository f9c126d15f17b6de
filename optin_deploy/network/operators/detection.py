"""Operators behind detectors: they choose by values, so all that they read stays whole."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Row, refuse
from optin_deploy.network.operators.shapes import whole


def corners(node: Node, boxes: Tensor) -> Tensor:
    """Boxes by their lowest and highest corner."""
    if node.get("center_point_box", 0):
        centre, size = boxes[..., :2], boxes[..., 2:]
        return torch.cat([centre - size / 2, centre + size / 2], -1)
    one, other = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(one, other), torch.maximum(one, other)], -1)


def overlap(box: Tensor, others: Tensor) -> Tensor:
    """Area of what two boxes share, as a part of what they cover together."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area, areas = ((each[..., 2:] - each[..., :2]).prod(-1) for each in (box, others))
    return shared / (area + areas - shared)


def suppress(
    node: Node,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    shared: Tensor | None = None,
    lowest: Tensor | None = None,
) -> Tensor:
    """Choose the best boxes of each class that do not overlap; rows of sample, class and box."""
    limit = whole(most)[0] if most is not None else 0
    allowed = float(shared) if shared is not None else 0.0
    found = []
    for sample, (all_boxes, classes) in enumerate(zip(corners(node, boxes), scores, strict=True)):
        for label, values in enumerate(classes):
            order = values.argsort(descending=True, stable=True)
            left = order if lowest is None else order[values[order] > lowest.reshape(())]
            chosen = 0
            while len(left) and chosen < limit:
                found.append([sample, label, int(left[0])])
                chosen += 1
                left = left[1:][overlap(all_boxes[left[0]], all_boxes[left[1:]]) <= allowed]
    return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


ROWS = (
    Row(
        "NonMaxSuppression",
        suppress,
        refuse("NonMaxSuppression chooses boxes by their values"),
        numbers=(2, 3, 4),
    ),
)
