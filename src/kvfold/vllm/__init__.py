"""An attention backend for vLLM: its scheduler and model, kvfold's kernels and cache formats.

vLLM finds it by itself (entry point ``kvfold`` of ``vllm.general_plugins``) and uses it where it
is asked to: ``vllm serve MODEL --attention-backend KVFOLD``. Only ``backend`` and ``plugin`` import
vLLM; ``pages`` and ``batch`` are what they are made of.
"""
