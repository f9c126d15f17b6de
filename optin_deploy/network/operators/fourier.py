"""Fourier transforms: real and imaginary parts lie along the last axis; what is transformed stays whole."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Flow, Row, Unsupported


def _numbers(x: Tensor) -> Tensor:
    """Complex numbers of a tensor whose last axis holds one part or both."""
    return torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]


def _along(node: Node, axis: int | None, rank: int) -> int:
    """Position of the axis that DFT transforms."""
    usual = -2 if node.opset >= 20 else int(node.get("axis", 1))
    return (usual if axis is None else axis) % rank


def dft(node: Node, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """Transform along one axis, cut or filled with zeros to a length."""
    half, back = bool(node.get("onesided", 0)), bool(node.get("inverse", 0))
    if half and (back or x.shape[-1] == 2):
        raise Unsupported("DFT of one side, of complex numbers or backwards")
    along = _along(node, None if axis is None else int(axis), x.dim())
    transform = torch.fft.ifft if back else torch.fft.rfft if half else torch.fft.fft
    return torch.view_as_real(transform(_numbers(x), None if length is None else int(length), along))


def transformed(flow: Flow) -> None:
    """Flow of DFT."""
    axes, known = flow.axes(0), flow.known(2) if flow.has(2) else None
    if flow.has(2) and known is None:
        raise Unsupported("DFT along an axis that only a run tells")
    changed = (_along(flow.node, None if known is None else int(known), len(axes)), len(axes) - 1)
    flow.freeze([axes[position] for position in changed])
    shape = flow.out_shape()
    flow.give(0, [flow.fresh(shape[n], "DFT") if n in changed else axis for n, axis in enumerate(axes)])


def stft(node: Node, x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None) -> Tensor:
    """Transform each window of a signal, (rows, windows, frequencies, 2)."""
    if length is None and window is None:
        raise Unsupported("STFT with neither a window nor its length")
    size = int(length) if length is not None else window.shape[0]  # type: ignore[union-attr]
    frames = _numbers(x).unfold(1, size, int(step))
    half = bool(node.get("onesided", 1)) and not frames.is_complex()
    return torch.view_as_real(
        (torch.fft.rfft if half else torch.fft.fft)(frames if window is None else frames * window)
    )


def windowed(flow: Flow) -> None:
    """Flow of STFT."""
    rows, *signal = flow.axes(0)
    flow.freeze([*signal, *(flow.axes(2) if flow.has(2) else ())])
    flow.give(0, [rows, *(flow.fresh(size, "STFT") for size in flow.out_shape()[1:])])


ROWS = (
    Row("DFT", dft, transformed, numbers=(1, 2)),
    Row("STFT", stft, windowed, numbers=(1, 3)),
)
