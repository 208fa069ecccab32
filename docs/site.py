"""Puts the benchmarks' pages, which lie beside their scripts, on the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this with the site's files."""
    for path in sorted([*BENCHMARKS.glob("*.md"), *BENCHMARKS.glob("*.png")]):
        name = "index.md" if path.name == "README.md" else path.name
        files.append(File.generated(config, f"benchmarks/{name}", abs_src_path=str(path)))
    return files
