"Write README.md from nbs/index.ipynb, pictures beside the notebook; --check: only compare."

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent
settings = Config()
settings.RegexRemovePreprocessor.patterns = [r"#\|\s*hide"]
settings.TagRemovePreprocessor.enabled = True
settings.TagRemovePreprocessor.remove_cell_tags = {"remove_cell"}
settings.TagRemovePreprocessor.remove_input_tags = {"remove_input"}
settings.ExtractOutputPreprocessor.output_filename_template = (
    "nbs/index_files/{cell_index}_{index}{extension}"
)
exporter = MarkdownExporter(config=settings)
notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
notebook.metadata.language_info = {"name": "python"}  # nbdev_clean drops it
text, resources = exporter.from_notebook_node(notebook)
text = re.sub(r"\]\((\w+\.(?:svg|ipynb))\)", r"](nbs/\1)", text)  # beside the notebook
files = {root / "README.md": text.strip().encode() + b"\n"} | {
    root / name: data for name, data in resources["outputs"].items()
}

if "--check" in sys.argv:
    stale = [
        str(p.relative_to(root))
        for p, data in files.items()
        if not p.exists() or p.read_bytes() != data
    ]
    if stale:
        sys.exit(
            f"{', '.join(stale)} differ from what .ci/readme.py makes of nbs/index.ipynb: run it"
        )
else:
    for p, data in files.items():
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(data)
