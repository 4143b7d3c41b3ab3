"""What SGLang's server was started with, as far as KV depends on it and neither pools nor the model's name say it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["describe_server"]

_MODEL = (
    "model_path", "revision", "load_format", "json_model_override_args", "dtype", "quantization",
    "quantization_param_path", "kv_cache_dtype",
)  # fmt: skip
_DRAFT = (
    "speculative_algorithm", "speculative_draft_model_path", "speculative_draft_model_revision",
    "speculative_draft_model_quantization", "speculative_draft_kv_cache_dtype",
)  # fmt: skip


def describe_server() -> dict[str, object]:
    """Return the arguments of the server in this process; none outside of one, or where a release has them elsewhere.

    Files and directories count by their real paths.
    """
    try:
        from sglang.srt.runtime_context import get_model, get_spec

        bags = [(get_model(), _MODEL), (get_spec(), _DRAFT)]
    except (ImportError, ValueError):
        return {}
    return {name: _real(getattr(bag, name, None)) for bag, names in bags for name in names}


def _real(value: object) -> object:
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value
