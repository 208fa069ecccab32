"""Compile the CPU kernels when the package is built; without a compiler, leave them out."""

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Adds ``kvfold/kernels/libkvfold.so`` to the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        path = Path(self.root) / "src/kvfold/kernels/cpu/build.py"
        spec = importlib.util.spec_from_file_location("kvfold_build", path)
        assert spec is not None
        assert spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        target = path.parents[1] / kernels.NAME
        target.unlink(missing_ok=True)
        if os.environ.get("KVFOLD_NO_KERNELS"):
            self.app.display_warning("kvfold: CPU kernels left out (KVFOLD_NO_KERNELS is set)")
            return
        try:
            kernels.build(target)
        except kernels.BuildError as error:
            self.app.display_warning(f"kvfold: CPU kernels left out: {error}")
            return
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"
        build_data["artifacts"].append("src/kvfold/kernels/*.so")
