"""The engines that are known. To add one, write its script and list it here. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """A program that serves checkpoints.

    Attributes:
        script: ``scripts/verify_<script>.py`` asks it, wherever it is installed.
        get: how it is installed.
        beside: the engine whose Python it is in, if nothing else is said.
    """

    name: str
    script: str
    get: str
    beside: str | None = None

    @property
    def variable(self) -> str:
        """The environment variable that names the Python it is installed in."""
        return f"KVFOLD_PYTHON_{self.script.upper()}"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vllm", "pip install vllm"),
        Engine("vllm+kvfold", "vllm_kvfold", "pip install 'kvfold[vllm]'", beside="vllm"),
        Engine("llama.cpp", "llama_cpp", "llama-server, or pip install xllamacpp"),
        Engine("litgpt", "litgpt", "pip install litgpt"),
        Engine("ctranslate2", "ctranslate2", "pip install ctranslate2 transformers"),
        Engine("mistral.rs", "mistral_rs", "pip install mistralrs"),
    )
}
