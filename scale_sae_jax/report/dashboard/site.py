"""The files of a dashboard: fixed pages, and data as scripts, which pages may load from disk.

    index.html  latent.html  expert.html  *.css  *.js  data/overview.js  data/latents-N.js ...

A page of a latent is latent.html#ID; it loads the one file of SHARD latents that holds its record.
"""

import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Int

from scale_sae_jax.errors import telling
from scale_sae_jax.inspection.look import Findings
from scale_sae_jax.interop.files import fresh
from scale_sae_jax.report.dashboard.data import About, Tokens, latent_record, overview

SHARD = 64
PAGES = {  # and their scripts
    "index": ("data/sentences.js", "index.js"),
    "latent": ("latent.js",),
    "expert": ("expert.js",),
}


def site_folder(folder: Path) -> Path:
    """`folder`, made if it is not there. Raises UserError if it holds anything but a dashboard."""
    is_site = all((folder / name).is_file() for name in ("dashboard.css", "latent.html"))
    return folder if is_site else fresh(folder)


def write_site(
    folder: Path,
    findings: Findings,
    about: About,
    tokens: Tokens,
    latents: Int[np.ndarray, " n"],
    sentences: list[dict[str, Any]],
) -> int:
    """Writes the pages of `latents` (ascending ids) into a folder; returns the bytes written.

    Of a dashboard that was there before, only its own files are replaced. Raises UserError if the
    folder cannot be written, or holds something else.
    """
    records = overview(findings, about, tokens, latents)
    scripts = {
        "overview.js": f"dashboard.overview = {script_json(records | {'shard': SHARD})};\n",
        "sentences.js": f"dashboard.sentences = {script_json(sentences)};\n",
    }
    for shard in np.unique(latents // SHARD).tolist():
        ids = latents[latents // SHARD == shard].tolist()
        values = {latent: latent_record(findings, tokens, latent) for latent in ids}
        scripts[f"latents-{shard}.js"] = f"dashboard.shards[{shard}] = {script_json(values)};\n"
    site_folder(folder)
    with telling(f"cannot write {folder}", "name another folder with --to=FOLDER"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for old in (folder / "data").glob("latents-*.js"):
            old.unlink()
        written = sum((folder / name).write_bytes(page) for name, page in fixed_files().items())
        for name, script in scripts.items():
            written += (folder / "data" / name).write_bytes(script.encode("ascii"))
    return written


def fixed_files() -> dict[str, bytes]:
    """The files that are the same in every dashboard, by name."""
    static = files(__package__).joinpath("static")
    found = {file.name: file.read_bytes() for file in static.iterdir() if file.is_file()}
    template = Template(found.pop("page.html").decode())
    for page, scripts in PAGES.items():
        lines = [f'<script defer src="{script}"></script>' for script in scripts]
        found[f"{page}.html"] = template.substitute(scripts="\n  ".join(lines)).encode()
    return found


def script_json(value: Any) -> str:
    """JSON that is safe inside a script: ASCII, and nothing that HTML could take for markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
