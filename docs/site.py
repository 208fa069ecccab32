"""Puts the benchmarks' page, which lies beside its scripts, on the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this with the site's files."""
    for path in (BENCHMARKS / "README.md", *sorted(BENCHMARKS.glob("*.png"))):
        name = "index.md" if path.suffix == ".md" else path.name
        files.append(File.generated(config, f"benchmarks/{name}", abs_src_path=str(path)))
    return files
