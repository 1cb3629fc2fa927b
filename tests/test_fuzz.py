"""What comes from a disk may hold anything: damaged files of each kind, found by hypothesis.

Every reader gives what was written or one UserError: no other exception, no code from the file is
run, and no memory beyond what the file justifies. The examples are the same in every run.
"""

from cli import UserError

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus import files
from corpus.rows import TokenRows, load_meta, read_tokenizer_file
from corpus.tokens import BOS, EOS, MASK, decode, length_nats, load_tokenizer, sha256
from data_prep import DataConfig, prepare, verify
from jetson import engine_runtime
from jetson.engine_runtime import BUNDLE_FORMAT, BUNDLE_VERSION, Bundle, read_bundle
from kinds.adapters import adapter_of
from kinds.checkpoints import (
    load_adapted,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
    tokenizer_from_checkpoint,
)
from kinds.files import ENCODER_FORMAT, load_encoder
from model import ConditionalTransformer, DiffusionTransformer
from network.encoders import ImageEncoder
from network.layers import ModelConfig
from sampling.rows import GAP, draw_length, infill_row
from sampling.sampler import Sampler

fuzz = settings(max_examples=1000, derandomize=True, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
fewer = settings(fuzz, max_examples=300)  # where the readers are mostly those of other examples
SPARE = 2**31  # bytes that an example may take


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """A file that asks for a giant array gets a MemoryError, which no reader may let through."""
    if not Path("/proc/self/statm").exists():
        yield  # no limit on this system
        return
    import resource
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder of 40 stories of a few words, and what is built on it."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "s.txt").write_text(files.SEPARATOR.join(
        f"story {i} is " + "so " * (i % 9) + "short" for i in range(40)))
    prepare(DataConfig(source=[str(folder / "s.txt")], data_dir=str(folder / "data"),
                       vocab_size=270, seq_len=16, valid_fraction=0.2))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer((folder / "data" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def spoilt(folder, tmp_path) -> Path:
    """A copy of the data folder to be damaged."""
    shutil.copytree(folder / "data", tmp_path / "data")
    return tmp_path / "data"


# ---- damage --------------------------------------------------------------------------------------

@st.composite
def damage(draw, words: bool = False):
    """A function bytes -> other bytes: some overwritten (whole int64 numbers with `words`), cut off
    or added."""
    place = st.integers(0, 2**20)
    kinds = [st.tuples(st.just("byte"), place, st.integers(0, 255)),
             st.tuples(st.just("cut"), place, st.just(0)),
             st.tuples(st.just("add"), place, st.binary(min_size=1, max_size=16))]
    if words:
        kinds += 2 * [st.tuples(st.just("word"), place, st.integers(-2**63, 2**63 - 1)),
                      st.tuples(st.just("word"), place, st.integers(-2, 40))]
    edits = draw(st.lists(st.one_of(kinds), min_size=1, max_size=4))

    def apply(data: bytes) -> bytes:
        for kind, where, value in edits:
            at = where % max(1, len(data))
            if kind == "byte":
                data = data[:at] + bytes([value]) + data[at + 1:]
            elif kind == "cut":
                data = data[:at]
            elif kind == "add":
                data = data[:at] + value + data[at:]
            else:
                at -= at % 8
                data = data[:at] + value.to_bytes(8, "little", signed=True) + data[at + 8:]
        return data

    return apply


# What a number, a name, a list may be replaced by: the neighbours, the extremes, other types.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(),
    st.sampled_from([2**31, 2**63, 10**30, -1, "", ".", "..", "../x", "/etc/passwd", "\0", "é",
                     "1e999", "story", "train_00000"]), st.text(max_size=8))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6)


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The paths to every value in nested dictionaries and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(
        tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


DEEP = st.integers(1, 10**5).map(b"[".__mul__)  # a reader that calls itself for every bracket
GONE = object()


def changes(count: int = 3):
    """Some (number of a place, new value or GONE)."""
    return st.lists(st.tuples(st.integers(0, 2**16), st.just(GONE) | SCALARS | VALUES), min_size=1,
                    max_size=count)


def changed(tree: dict, edits: list) -> object:
    """A copy of the tree with some of its values replaced or gone."""
    def copied(value):
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        return [copied(inner) for inner in value] if isinstance(value, list) else value

    tree = copied(tree)
    for number, value in edits:
        known = places(tree)
        *way, last = known[number % len(known)] or (None,)
        if last is None:
            return None if value is GONE else value
        inside = tree
        for key in way:
            inside = inside[key]
        if value is GONE:
            del inside[last]
        else:
            inside[last] = value
    return tree


@st.composite
def json_damage(draw):
    """A function (dictionary) -> the bytes of a JSON file that was written, or is, wrong."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        text = draw(st.one_of(st.binary(max_size=40), DEEP,
                              VALUES.map(lambda value: json.dumps(value).encode())))
        return lambda tree: text
    if kind == 1:
        spoil = draw(damage())
        return lambda tree: spoil(json.dumps(tree).encode())
    edits = draw(changes())
    return lambda tree: json.dumps(changed(tree, edits)).encode()


# ---- data ----------------------------------------------------------------------------------------

def read_rows(data_dir: Path, split: str) -> TokenRows:
    """The rows of a split, each asked for; they are what the files hold and of the promised form.
    """
    rows = TokenRows(data_dir, split)
    meta = rows.meta
    every = [rows[i] for i in range(len(rows))]
    assert all(1 <= len(row) <= meta["seq_len"] for row in every)
    assert [len(row) for row in every] == rows.lengths.tolist()
    files = b"".join((data_dir / f"{shard['name']}.bin").read_bytes()
                     for shard in meta["splits"][split]["shards"])
    assert np.concatenate(every).tobytes() == files
    batch = rows.batch(range(len(rows)))
    assert batch.shape[1] % 16 == 0 and batch.max() < meta["vocab_size"]
    return rows


@fuzz
@given(split=st.sampled_from(["train", "val"]), suffix=st.sampled_from([".idx", ".bin"]),
       spoil=damage(words=True))
def test_damaged_shards_are_refused_or_are_rows(spoilt, folder, split, suffix, spoil):
    path = spoilt / f"{split}_00000{suffix}"
    whole = (folder / "data" / path.name).read_bytes()
    path.write_bytes(spoil(whole))
    same = path.read_bytes() == whole
    try:
        read_rows(spoilt, split)
    except UserError as error:
        assert not same and str(spoilt) in str(error)
    try:
        verify(str(spoilt))
        assert same
    except UserError:
        assert not same
    path.write_bytes(whole)


@fuzz
@given(spoil=json_damage())
def test_any_meta_json_is_refused_or_read(spoilt, folder, spoil):
    good = json.loads((folder / "data" / "meta.json").read_bytes())
    (spoilt / "meta.json").write_bytes(spoil(good))
    try:
        meta = load_meta(spoilt)
        valid = read_rows(spoilt, "val")
        read_rows(spoilt, "train")
        assert np.isfinite(length_nats(meta, [valid[0]]))
        draw_length(meta["length_histogram"], 0, 0)
        load_tokenizer(read_tokenizer_file(spoilt, meta))
        verify(str(spoilt))
    except UserError as error:
        assert "\n" not in str(error) and str(spoilt) in str(error)


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_checkpoint(folder) -> Path:
    meta = load_meta(folder / "data")
    model = DiffusionTransformer(ModelConfig(width=8, heads=2, layers=1, max_len=16,
                                             vocab_size=meta["vocab_size"]))
    save_checkpoint(folder / "small.pt", model, read_tokenizer_file(folder / "data", meta),
                    meta["length_histogram"], ema=None, step=1, train_config={"data_dir": "d"})
    return folder / "small.pt"


def use(path: Path) -> dict:
    """Reads a checkpoint as every command does."""
    contents = load_checkpoint(path, kind=None)
    model = model_from_checkpoint(contents)
    tokenizer = tokenizer_from_checkpoint(contents)
    tokens = torch.tensor([[BOS, *tokenizer.encode("so").ids, MASK, EOS]])
    with torch.no_grad():
        model(tokens)
    draw_length(contents["length_histogram"], 0, 0)
    return contents


def same(a: dict, b: dict) -> bool:
    weights, others = a["weights"], b["weights"]
    return (weights.keys() == others.keys()
            and all(torch.equal(weights[name], others[name]) for name in weights)
            and {**a, "weights": 0} == {**b, "weights": 0})


@fuzz
@given(spoil=damage())
def test_a_damaged_checkpoint_is_refused_or_whole(small_checkpoint, tmp_path, spoil):
    whole = load_checkpoint(small_checkpoint)
    path = tmp_path / "x.pt"
    path.write_bytes(spoil(small_checkpoint.read_bytes()))
    try:
        assert same(use(path), whole)  # a byte that nobody reads, as between two entries
    except UserError as error:
        assert str(path) in str(error)


def plain(tree: object) -> object:
    """A checkpoint's contents as nested dictionaries and lists."""
    return {key: plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@fuzz
@given(edits=changes())
def test_a_checkpoint_of_other_contents_is_refused_or_used(small_checkpoint, tmp_path, edits):
    path = tmp_path / "x.pt"
    torch.save(changed(plain(load_checkpoint(small_checkpoint)), edits), path)
    try:
        use(path)
    except UserError:
        pass


@pytest.fixture(scope="module")
def small_adapter(folder, small_checkpoint) -> dict:
    """What a picture adds to the small checkpoint, in the file adapter.pt beside it."""
    base = load_checkpoint(small_checkpoint)
    config = ModelConfig(**base["model_config"] | {"lora_rank": 2, "lora_alpha": 4.0,
                                                   "lora_targets": "query,out"})
    size = ModelConfig(width=8, heads=2, layers=1)
    model = ConditionalTransformer(config, ImageEncoder.create(config, {"size": 8}, size))
    model.load_decoder(base["weights"])
    path = folder / "conditional.pt"
    save_checkpoint(path, model, base["tokenizer"], base["length_histogram"], ema=None, step=1,
                    train_config={"stage": 2}, kind="conditional")
    contents = adapter_of(load_checkpoint(path, kind=None))
    path.unlink()
    torch.save(contents, folder / "adapter.pt")
    return contents


@fewer
@given(edits=changes())
def test_an_adapter_of_other_contents_is_refused_or_used(small_checkpoint, small_adapter, tmp_path,
                                                         edits):
    path = tmp_path / "x.pt"
    torch.save(changed(plain(small_adapter), edits), path)
    try:
        model = model_from_checkpoint(load_adapted(path, small_checkpoint))
    except UserError:
        return
    with torch.no_grad():
        model(torch.full((1, 4), MASK), context=model.encode(model.encoder.example(1)))


@fewer
@given(spoil=damage())
def test_a_damaged_adapter_is_refused_or_whole(small_checkpoint, small_adapter, folder, tmp_path,
                                               spoil):
    path = tmp_path / "x.pt"
    path.write_bytes(spoil((folder / "adapter.pt").read_bytes()))
    try:
        weights = load_adapted(path, small_checkpoint)["weights"]
    except UserError as error:
        assert str(path) in str(error)
        return
    for name, weight in small_adapter["weights"].items():
        assert torch.equal(weights[name], weight)


@fewer
@given(edits=changes())
def test_an_encoder_of_other_contents_is_refused_or_used(small_adapter, tmp_path, edits):
    size = ModelConfig(width=8, heads=2, layers=1)
    encoder = ImageEncoder.create(ModelConfig(), {"size": 8}, size)
    path = tmp_path / "x.pt"
    torch.save(changed(plain({**ENCODER_FORMAT, "encoder": "image", "encoder_config":
                              encoder.settings(), "weights": encoder.state_dict()}), edits), path)
    try:
        encoder = load_encoder(path)
    except UserError:
        return
    with torch.no_grad():
        encoder(encoder.example(1))


class Bomb:
    """Runs code where it is unpickled: the file that it makes tells."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.filterwarnings("ignore")  # of another protocol than torch writes
@fuzz
@given(value=VALUES, zipped=st.booleans(), armed=st.booleans(), spoil=st.none() | damage(),
       protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_a_foreign_pickle_is_refused_and_not_run(small_checkpoint, tmp_path, value, zipped, armed,
                                                 spoil, protocol):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    content = pickle.dumps({"format": value, "bomb": Bomb(str(mark))} if armed else value, protocol)
    with zipfile.ZipFile(small_checkpoint) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    if spoil:  # a pickle of this program with a right checksum, but damaged before
        content = spoil(content if armed else entries["archive/data.pkl"])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (entries | {"archive/data.pkl": content}).items():
            archive.writestr(name, data)
    path.write_bytes(file.getvalue() if zipped else content)
    try:
        use(path)
        assert zipped and spoil and not armed
    except UserError:
        pass
    assert not mark.exists()


# ---- exported bundles ----------------------------------------------------------------------------

class NoGraph:
    """Stands in for a session of ONNX Runtime: bundle.json is what is looked at here."""

    inputs = {"tokens": ([1, 16], np.int32)}

    def __init__(self, path: Path):
        pass


@pytest.fixture
def small_bundle(folder, tmp_path) -> tuple[Path, dict]:
    text = (folder / "data" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "step_fp32.onnx").write_bytes(b"graph")
    return tmp_path, {
        "format": BUNDLE_FORMAT, "format_version": BUNDLE_VERSION, "kind": "diffusion",
        "files": {"fp32": {"name": "step_fp32.onnx", "bytes": 5, "sha256": sha256(b"graph")}},
        "batch": 1, "length": 16, "dynamic": False, "condition_len": None, "guided": False,
        "encoder": {"sort": "image", "size": 64},
        "likeliest": 64, "length_histogram": load_meta(folder / "data")["length_histogram"],
        "tokenizer_sha256": sha256(text.encode())}


@fuzz
@given(spoil=json_damage())
def test_any_bundle_json_is_refused_or_read(small_bundle, monkeypatch, spoil):
    folder, contents = small_bundle
    monkeypatch.setattr(engine_runtime, "OnnxSession", NoGraph)
    (folder / "bundle.json").write_bytes(spoil(contents))
    try:
        read_bundle(folder)
        bundle = Bundle(folder / "step_fp32.onnx")
        bundle.step(Sampler())
        bundle.check(Sampler(top_k=3, guidance=2.0), conditional=True)
        draw_length(bundle.contents["length_histogram"], 0, 0)
        assert bundle.max_len == 16 and bundle.batch == 1
    except UserError as error:
        assert "\n" not in str(error)


# ---- text ----------------------------------------------------------------------------------------

# Everything that a file in UTF-8 can hold, and often what a reader might trip over.
TEXT = st.text(st.characters(exclude_categories=["Cs"])
               | st.sampled_from(" \n\r\t[]:|<>\"\\\ufeff"), max_size=20)
GAPS = st.one_of(st.integers(-1, 20).map("[MASK:{}]".format), TEXT.map("[MASK:{}]".format),
                 st.sampled_from(["[MASK]", "[MASK:03]", "[MASK:]", "[MASK:٣]", "[mask:2]", "[MASK",
                                  "[PAD]", "[EOS]", "[MASK:99999999999]"]))


@fuzz
@given(pieces=st.lists(st.one_of(TEXT, st.sampled_from([" ", "Tom had a", " and a", "é", "日"]),
                                 GAPS), max_size=8))
def test_any_infill_is_refused_or_has_the_text_around_its_gaps(tokenizer, pieces):
    text = "".join(pieces)
    try:
        row = infill_row(text, tokenizer, 64)
    except UserError as error:
        assert "--infill" in str(error)
        sizes = [gap[1] for gap in GAP.finditer(text)]
        right = [size is None or size.isascii() and size.isdigit() and int(size) for size in sizes]
        assert not sizes or not all(right) or "tokens" in str(error)
        return
    assert row[0] == BOS and row[-1] == EOS and len(row) <= 64
    around, sizes = [], []
    end = 0
    for gap in GAP.finditer(text):
        around.append(text[end:gap.start()].removesuffix(" "))
        sizes.append(int(gap[1] or 1))
        end = gap.end()
    around.append(text[end:])
    # the same, read back from the row: what stands between the runs of [MASK]
    expected = [BOS]
    for piece, size in zip(around, [*sizes, 0], strict=True):
        ids = tokenizer.encode(piece).ids
        assert decode(tokenizer, ids) == piece and (not ids or min(ids) > EOS)
        expected += ids + [MASK] * size
    assert row.tolist() == [*expected, EOS]


STORIES = st.lists(TEXT | st.sampled_from(
    ["<|endoftext", "|>", "<", "<|end", "<|<|endoftext|", " a story ", "x" * 40]), max_size=6)


def stripped(stories: list[str]) -> list[str]:
    return [story.strip() for story in stories if story.strip()]


@fuzz
@given(stories=STORIES, block=st.integers(1, 60), last=st.booleans())
def test_stories_of_a_text_file_come_back(tmp_path, monkeypatch, stories, block, last):
    """However the file is cut into blocks for reading."""
    stories = [story for story in stories if files.SEPARATOR not in story]
    text = files.SEPARATOR.join(stories) + files.SEPARATOR * last
    stories = text.split(files.SEPARATOR)  # two that touch may make one more
    path = tmp_path / "s.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(files, "CHUNK", block)
    assert stripped(files.read_files([path])) == stripped(
        [story.removeprefix("\ufeff") if i == 0 else story for i, story in enumerate(stories)])


@fuzz
@given(stories=STORIES, ascii=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
       last=st.booleans())
def test_stories_of_a_jsonl_file_come_back(tmp_path, stories, ascii, end, last):
    path = tmp_path / "s.jsonl"
    lines = [json.dumps({"text": story, "n": i}, ensure_ascii=ascii)
             for i, story in enumerate(stories)]
    path.write_bytes((end.join(lines) + end * last).encode())
    assert list(files.read_files([path])) == stories


@fuzz
@given(lines=st.lists(st.one_of(st.binary(max_size=30), DEEP, VALUES.map(
    lambda value: json.dumps({"text": value}).encode()), VALUES.map(
    lambda value: json.dumps(value).encode())), max_size=4))
def test_any_jsonl_line_is_refused_with_its_number_or_is_a_story(tmp_path, lines):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        for story in files.read_files([path]):
            assert story is None or story.encode() is not None
    except UserError as error:
        assert str(path) in str(error) and ("line " in str(error) or "UTF-8" in str(error))
