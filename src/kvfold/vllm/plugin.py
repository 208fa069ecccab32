"""The entry point that vLLM calls in each of its processes. It must cost next to nothing."""

import os
from typing import Any

from kvfold.version import __version__

#: Releases of vLLM whose interfaces the backend was written against and tested with.
KNOWN = ("0.32",)
#: Set to 1: where KVFOLD lacks something, vLLM's own backend is used instead.
FALLBACK = "KVFOLD_VLLM_FALLBACK"
_BACKEND = "kvfold.vllm.backend.KvfoldBackend"


def knows(version: str) -> bool:
    """Whether the backend is for a release of vLLM.

    >>> knows("0.32.1+cpu"), knows("0.3.2")
    (True, False)
    """
    return ".".join(version.split(".")[:2]) in KNOWN


def register() -> None:
    """Let vLLM's ``--attention-backend`` know the name KVFOLD.

    A release that is not in ``KNOWN`` is refused with a line in its log, and left as it is.
    """
    import vllm
    from vllm.logger import init_logger
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not knows(vllm.__version__):
        init_logger("vllm.kvfold").warning(
            "kvfold %s knows vLLM %s, not %s: no attention backend KVFOLD here (pip install"
            " 'vllm==%s.*', or a kvfold that knows it)",
            __version__, ", ".join(KNOWN), vllm.__version__, KNOWN[-1],
        )  # fmt: skip
        return
    if "KVFOLD" in AttentionBackendEnum.__members__:
        return
    register_backend("KVFOLD", _BACKEND)
    # vLLM sends its configuration to processes that have not loaded plugins yet.
    AttentionBackendEnum["KVFOLD"].__reduce_ex__ = lambda protocol: (member, ())
    _let_cpus_choose()


def member() -> Any:
    """KVFOLD among vLLM's backends."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum["KVFOLD"]


def _let_cpus_choose() -> None:
    """vLLM's CPU platform takes its own backend whatever is asked for: ask before it does."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    own = CpuPlatform.get_attn_backend_cls.__func__

    def choose(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is AttentionBackendEnum["KVFOLD"]:
            reasons = _why_not(selected_backend, attn_selector_config)
            if not reasons:
                return _BACKEND
            selected_backend = None
            _refuse_or_warn(reasons)
        found: str = own(cls, selected_backend, attn_selector_config, num_heads)
        return found

    CpuPlatform.get_attn_backend_cls = classmethod(choose)


def _why_not(backend: Any, config: Any) -> list[str]:
    given = config._asdict()
    reasons = backend.get_class().validate_configuration(device_capability=None, **given)
    return [_with_value(reason, given) for reason in reasons]


def _with_value(reason: str, given: dict[str, Any]) -> str:
    """What the reason speaks of, as it was given."""
    name = reason.split(" ")[0]
    return f"{reason} ({name}={given[name]})" if name in given else reason


def _refuse_or_warn(reasons: list[str]) -> None:
    from vllm.logger import init_logger

    lacking = "; ".join(reasons)
    if os.environ.get(FALLBACK) != "1":
        raise ValueError(
            f"attention backend KVFOLD: {lacking}. Set {FALLBACK}=1 to use vLLM's own instead"
        )
    init_logger("vllm.kvfold").warning_once("KVFOLD: %s; vLLM's own attention is used", lacking)
