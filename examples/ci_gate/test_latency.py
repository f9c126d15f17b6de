"""In pytest: the new model may take at most 5% longer than the released one, here and now."""

from __future__ import annotations

from collections.abc import Callable


def test_the_new_model_is_as_fast(latency_regression: Callable[..., object]) -> None:
    """Both are measured on this machine, where baseline.json says; `optin-deploy` brings the fixture."""
    latency_regression("new/model.onnx", baseline="baseline.json", max_ratio=1.05)
