"""Whatever stands in config.json: `load_model` gives a model or BadInput, soon, and without much memory."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optin_deploy.checkpoint.config import SWITCHES
from optin_deploy.checkpoint.loading import load_model
from optin_deploy.errors import BadInput
from support import tiny_checkpoint as tiny

CPU_SECONDS = 10
"""Of this process, not of the clock: a busy machine does not fail the test."""
MOST_MIB = 512
"""By which all cases together may raise the peak of the process."""
MORE = (
    *SWITCHES,
    *("model_type", "architectures", "auto_map", "quantization_config", "num_labels", "id2label", "label2id"),
    *("problem_type", "per_layer_config", "dtype", "torch_dtype", "layer_types", "rope_scaling", "rope_parameters"),
    *("attribute_map", "sub_configs", "to_dict", "validate", "__class__", "_attn_implementation", "text_config"),
    *("is_decoder", "add_cross_attention", "is_encoder_decoder", "tie_word_embeddings", "pruned_heads", "use_cache"),
    *("qkv_bias", "num_channels", "image_size", "patch_size", "pad_token_id", "position_embedding_type"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-4, 200)
    | st.sampled_from([10**5, 10**7, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30])
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["bert", "vit", "gpt2", "gelu", "evil", "float16", "BertModel", "GPT2LMHeadModel", "\ud800"])
)
KEYS = st.text(max_size=6) | st.sampled_from(["0", "1", "model_type", "quant_method", "AutoModel", "hidden_size"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
REMOVED = object()


class Hang(BaseException):
    """No Exception: the wall must not take it for one of transformers'."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hang after CPU_SECONDS."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def hold(model: Callable[[], Path], folder: Path, cases: int, *, derandomize: bool) -> None:
    """Try so many configs, made from the one of a model that loads."""
    path = tiny.copy_of(model(), folder / "model") / "config.json"
    right = json.loads(path.read_text())
    load_model(str(path.parent))  # imports and first forwards are not what is measured
    changes = st.dictionaries(
        st.sampled_from(sorted({*right, *MORE})), VALUES | st.just(REMOVED), min_size=1, max_size=2
    )
    before = peak_mib()

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes)
    def one(change: dict[str, Any]) -> None:
        data = {key: value for key, value in {**right, **change}.items() if value is not REMOVED}
        path.write_text(json.dumps(data))
        with bounded():
            said = ""
            try:
                loaded, _ = load_model(str(path.parent))
                assert not loaded.training
            except BadInput as err:
                said = str(err)
            assert not said or "config.json" in said or "task" in said
            assert "\n" not in said
            said.encode()  # can be printed

    one()
    assert peak_mib() - before < MOST_MIB


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", [tiny.bert, tiny.vit])
def test_any_value_in_a_config_is_loaded_or_refused(model: Callable[[], Path], tmp_path: Path) -> None:
    hold(model, tmp_path, 110, derandomize=True)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("OPTIN_FUZZ"), reason="minutes; OPTIN_FUZZ=1 runs it")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", [tiny.bert, tiny.classifier, tiny.gpt2, tiny.vit])
def test_thousands_of_configs_are_loaded_or_refused(model: Callable[[], Path], tmp_path: Path) -> None:
    hold(model, tmp_path, 1300, derandomize=False)
