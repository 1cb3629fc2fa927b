"""Writing from the left on the command line: generate.py --block_size, --verify, --stream."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_data, python

import generate
from block_diffusion import causal_pass
from corpus.tokens import BOS, EOS, PAD, decode, load_tokenizer
from generate import main
from kinds import opening
from kinds.autoregressive import before_each
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from kinds.conditional import ConditionalDiffusion
from model import ConditionalTransformer, DiffusionTransformer
from network.attention import GATE_SPEED
from network.draft_head import DraftHead
from network.encoders import TextEncoder
from network.layers import ModelConfig
from sampling import stories
from sampling.cached import CachedModel
from sampling.left_to_right import Piece
from sampling.rows import Vocabulary, lay_out
from sampling.stories import Live

MAX_LEN = 48
SEEDS = {"joint": 11, "twin": 40}  # with which some of seven stories end, and some go on


def network(seed: int, vocab_size: int, causal: bool = False) -> DiffusionTransformer:
    """Random, sure of some tokens, and of [EOS] more often than of others."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=vocab_size,
                                             max_len=MAX_LEN, causal=causal, tied_head=False))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.35)
    torch.nn.init.normal_(model.vocabulary.weight[EOS], std=0.6)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with joint.pt, headless.pt (the same without a draft head), twin.pt, plain.pt,
    conditional.pt, and other.pt, a twin that has another tokenizer."""
    folder = tmp_path_factory.mktemp("left")
    for data, vocab_size, kinds in (
            ("data", 400, {"joint": "joint", "twin": "autoregressive", "plain": "diffusion"}),
            ("other_data", 300, {"other": "autoregressive"})):
        made_up_data(folder / data, max_stories=60, vocab_size=vocab_size, seq_len=256,
                     valid_fraction=0.2)
        tokenizer = (folder / data / "tokenizer.json").read_text(encoding="utf-8")
        histogram = json.loads((folder / data / "meta.json").read_text())["length_histogram"]
        for name, kind in kinds.items():
            model = network(SEEDS.get(name, 1), vocab_size, causal=kind == "autoregressive")
            save_checkpoint(folder / f"{name}.pt", model, tokenizer, histogram, kind=kind,
                            train_config={"block_sizes": "4,row"})
            if kind == "joint":
                (folder / f"{name}.pt").rename(folder / "headless.pt")
                head = DraftHead(model.embedding, model.vocabulary, 5)
                for p in head.parameters():
                    torch.nn.init.normal_(p)
                model.draft, model.config = head, dataclasses.replace(model.config, draft_rank=5)
                save_checkpoint(folder / f"{name}.pt", model, tokenizer, histogram, kind=kind,
                                train_config={"block_sizes": "4,row"})
    joint = load_checkpoint(folder / "joint.pt", "joint")
    plain = model_from_checkpoint(joint)
    told = ConditionalTransformer(plain.config, TextEncoder(dataclasses.replace(
        plain.config, max_len=32, layers=1)))
    told.load_decoder(plain.state_dict())
    told.start_encoder()
    for block in told.blocks:
        torch.nn.init.normal_(block.cross.out.weight, std=0.3)
        torch.nn.init.constant_(block.cross.gate, 1 / GATE_SPEED)
    save_checkpoint(folder / "conditional.pt", told, joint["tokenizer"], joint["length_histogram"],
                    train_config={})
    return folder


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer((models / "data/tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def tell(models, capsys, monkeypatch):
    """What a command prints on stdout and on stderr."""
    monkeypatch.chdir(models)

    def run(words: str, *more: object) -> tuple[str, str]:
        main(["--checkpoint", *words.split(), *map(str, more)])
        return capsys.readouterr()
    return run


@pytest.fixture
def call(tell):
    """The JSON objects, and what stood on stderr."""
    def run(words: str, *more: object) -> tuple[list[dict], str]:
        told, error = tell(words, "--json", *more)
        return [json.loads(line) for line in told.splitlines()], error
    return run


def stories_of(lines: list[dict]) -> list[dict]:
    """Without the pieces, in order."""
    return sorted((line for line in lines if "nfe" in line), key=lambda line: line["row"])


MODES = {
    "causal": "joint.pt --block_size 1",
    "blocks": "joint.pt --block_size 4 --steps 3",
    "adaptive": "joint.pt --block_size 8 --pace threshold --threshold 0.2 --order entropy",
    "again": "joint.pt --block_size 8 --steps 12 --remask remdm_cap --eta 0.4",
    "verified": "joint.pt --verify",
    "of the network": "joint.pt --verify --steps 1",
    "by a twin": "joint.pt --verify --block_size 5 --steps 2 --verify_with twin.pt",
    "twin": "twin.pt"}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


# ---- one story, however it is made ---------------------------------------------------------------

@each_mode
def test_a_story_does_not_depend_on_its_batch_or_on_being_streamed(call, tell, mode, tokenizer):
    lines, error = call(mode, "--num_samples", 7, "--seed", 5)
    told = stories_of(lines)
    assert len(lines) == 7 and len({story["text"] for story in told}) == 7
    for story in told:
        row = story["tokens"]
        assert row[0] == BOS and all(token > EOS for token in row[1:-1])
        assert row[-1] == EOS and len(row) < MAX_LEN or len(row) == MAX_LEN - 1
        assert story["text"] == decode(tokenizer, row)
    assert {story["tokens"][-1] == EOS for story in told} == {True, False}
    for more in (["--batch_size", 1], ["--stream"], ["--stream", "--batch_size", 2]):
        assert stories_of(call(mode, "--num_samples", 7, "--seed", 5, *more)[0]) == told
    assert stories_of(call(mode, "--num_samples", 7)[0]) != told
    assert stories_of(call(mode, "--num_samples", 2, "--seed", 5)[0]) == told[:2]
    # what a person reads
    plain, shown = (tell(mode, "--num_samples", 7, "--seed", 5, *more)[0].rsplit("\n", 2)[0]
                    for more in ([], ["--stream", "--batch_size", 3]))
    assert plain == shown
    assert plain == "\n".join(f"--- {i + 1} ---\n{story['text']}\n"
                              for i, story in enumerate(told))


@each_mode
def test_pieces_are_the_story(call, mode):
    lines, _ = call(mode, "--num_samples", 4, "--stream", "--prompt", "Tom ran")
    for story in stories_of(lines):
        pieces = [line for line in lines if line["row"] == story["row"] and "nfe" not in line]
        assert "".join(piece["text"] for piece in pieces) == story["text"]
        assert sum((piece["tokens"] for piece in pieces), []) == story["tokens"]
        assert [piece["ended"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[0]["text"].startswith("Tom ran") and len(pieces) > 1
        assert lines.index(story) == lines.index(pieces[-1]) + 1  # as soon as it is finished


def test_evaluations_and_the_closing_line(call):
    def cost(mode: str, *more) -> tuple[list[dict], str]:
        lines, error = call(mode, "--num_samples", 4, "--temperature", 2, *more)
        return stories_of(lines), error
    # token by token: one for each, those of a batch together
    told, error = cost(MODES["causal"])
    assert [story["nfe"] for story in told] == [len(story["tokens"]) - 1 for story in told]
    tokens = sum(token > EOS for story in told for token in story["tokens"])
    assert f"{tokens} tokens in 4 stories, {max(s['nfe'] for s in told)} network eval" in error
    _, error = cost(MODES["causal"], "--batch_size", 1)
    assert f" {sum(story['nfe'] for story in told)} network evaluations" in error
    # blocks: the steps, and one more to read it where the story goes on. The first has [BOS].
    for story in cost("joint.pt --block_size 4 --steps 2")[0]:
        if story["tokens"][-1] != EOS:
            assert story["nfe"] == 12 * 3 - 1
    # a draft and its verification; the twin has its own, and the drafter then reads what stands
    for words, each in (("--verify", 1), ("--verify --steps 1", 2), ("--verify --steps 3", 4),
                        ("--verify --verify_with twin.pt", 3)):
        lines, error = call(f"joint.pt {words}", "--num_samples", 4, "--stream")
        told, rounds = stories_of(lines), len(lines) - 8
        assert sum(story["nfe"] for story in told) == each * rounds
        drawn = sum(len(story["tokens"]) - 1 for story in told)
        assert f"({drawn / rounds:.2f} tokens a round)" in error


def test_verified_stories_are_those_of_the_mode_that_verifies(call):
    """Without chance they are the same, and the draft alone changes what they cost."""
    def greedy(mode: str) -> list[list[int]]:
        return [story["tokens"] for story in stories_of(call(
            mode, "--num_samples", 1, "--temperature", 0, "--prompt", "Tom had a")[0])]
    assert greedy("joint.pt --verify --block_size 6") == greedy("joint.pt --block_size 1")
    assert greedy("joint.pt --verify --steps 3") == greedy("joint.pt --block_size 1")
    assert greedy("joint.pt --verify --steps 0") == greedy("joint.pt --block_size 1")
    assert greedy("joint.pt --verify --verify_with twin.pt") == greedy("twin.pt")
    assert greedy("twin.pt") != greedy("joint.pt --block_size 1")


def test_the_defaults(call, tell, monkeypatch):
    def told(mode: str) -> list[dict]:
        return stories_of(call(mode, "--num_samples", 2)[0])
    assert told("twin.pt") == told("twin.pt --block_size 1")
    for words in ("", "--verify", "--stream"):
        assert told(f"joint.pt {words}") == told("joint.pt --verify --block_size 4 --steps 0")
    assert told("joint.pt --no-verify") == told("joint.pt --block_size 1")
    assert told("joint.pt --verify --steps 1") == told(
        "joint.pt --verify --block_size 8 --steps 1")
    assert told("headless.pt --verify") == told("headless.pt --verify --block_size 8 --steps 1")
    for words in ("", "--stream"):
        assert told(f"headless.pt {words}") == told("headless.pt --block_size 1")
    # who asks for an order asks for whole rows; gaps and other models need them
    assert told("joint.pt --steps 4") == told("joint.pt --steps 4 --block_size 0")
    assert told("joint.pt --order margin --length 9") == told(
        "joint.pt --order margin --length 9 --block_size 0")
    assert told("plain.pt --length 9") == told("plain.pt --length 9 --block_size 0")
    assert told("twin.pt") == told("twin.pt --block_size 1")
    text = tell("joint.pt --steps 2 --num_samples 1", "--infill", "Tom [MASK:3] ran.")[0]
    assert text.startswith("--- 1 ---\nTom") and " ran.\n" in text


# ---- prompts -------------------------------------------------------------------------------------

PROMPTS = ("Once upon a time", "Tom had a fri", "Tom a ", "Tom\n\n", "T", "caf\u00e9 \u201c")


@pytest.mark.parametrize("mode, prompt", [
    *((MODES[name], prompt) for name in ("causal", "blocks", "verified") for prompt in PROMPTS),
    *((MODES[name], PROMPTS[1]) for name in ("adaptive", "again", "by a twin", "twin"))])
def test_a_prompt_stays(call, mode, prompt, tokenizer):
    told = stories_of(call(mode, "--num_samples", 6, "--prompt", prompt, "--stream")[0])
    assert all(story["text"].startswith(prompt) for story in told)
    limits = [place for place in lay_out([prompt, 1], tokenizer, Vocabulary(tokenizer))
              if isinstance(place, np.ndarray)]
    assert stories_of(call(mode, "--num_samples", 6, "--prompt", prompt, "--batch_size", 1)[0]
                      ) == told
    plain = stories_of(call(mode, "--num_samples", 6, "--prompt", prompt, "--no-heal")[0])
    ids = [BOS, *tokenizer.encode(prompt[:-1] if prompt[-1] == " " else prompt).ids]
    assert all(story["tokens"][:len(ids)] == ids for story in plain)
    assert (told != plain) == bool(limits)


def test_a_word_is_completed_by_the_causal_mode(call, models, tokenizer):
    *places, _ = lay_out(["Tom had a fri", 1], tokenizer, Vocabulary(tokenizer))
    assert isinstance(places[-1], np.ndarray)
    checkpoint = load_checkpoint(models / "joint.pt", "joint")
    model, row = model_from_checkpoint(checkpoint), [BOS]
    for place in places:
        if isinstance(place, np.ndarray):
            with torch.no_grad():
                inputs = before_each(torch.tensor([[*row, PAD]]))
                logits = model.head(causal_pass(model, inputs)[0, -1], (EOS,))
            place = int(logits.masked_fill(~torch.from_numpy(place), -torch.inf).argmax())
        row.append(place)
    for mode in ("causal", "blocks", "verified"):
        told = stories_of(call(MODES[mode], "--num_samples", 1, "--temperature", 0, "--prompt",
                               "Tom had a fri")[0])
        assert told[0]["tokens"][:len(row)] == row


def test_a_healed_place_has_the_restricted_distribution():
    """Of a reader that says what it is asked, over what it was given."""
    given = []

    class Reader:
        def begin(self, rows):
            self.rows = rows

        def read(self, tokens, logits=0):
            given.append(tokens[0].tolist())
            return np.log(np.tile([1, 1, 1, 1, 8, 4, 2, 1], (len(tokens), 1, 1)))

    allowed = np.isin(np.arange(8), [5, 6, 7])
    count = 4000
    sampler = stories.FromLeft(temperature=1.0)
    rows = stories.complete(Reader(), [BOS, 4, allowed, 4, allowed], sampler, 3, range(count))
    assert given == [[0, BOS, 4], [rows[0, 2], 4]]
    for place in (2, 4):
        shares = np.bincount(rows[:, place], minlength=8) / count
        assert np.abs(shares - np.array([0, 0, 0, 0, 0, 4, 2, 1]) / 7).max() < 0.03
    greedy = dataclasses.replace(sampler, temperature=0.0)
    assert (stories.complete(Reader(), [BOS, allowed], greedy, 3, range(9))[:, 1] == 5).all()


# ---- length --------------------------------------------------------------------------------------

@each_mode
def test_length_is_the_most(call, mode):
    short = stories_of(call(mode, "--num_samples", 5, "--length", 6)[0])
    assert max(len(story["tokens"]) for story in short) == 7
    lines, error = call(mode, "--num_samples", 9, "--length", 3 * MAX_LEN, "--stream")
    told, (usual, quiet) = stories_of(lines), call(mode, "--num_samples", 9)
    assert error.count(f"each token sees the {MAX_LEN} before it") == 1 and "sees" not in quiet
    assert max(len(story["tokens"]) for story in told) > MAX_LEN
    for long, story in zip(told, stories_of(usual), strict=True):
        assert len(long["tokens"]) <= 3 * MAX_LEN + 1
        # the same story, which may go on; its last block is then no shorter than the others
        assert long["tokens"][:40] == story["tokens"][:40]


@pytest.mark.parametrize("mode", ["causal", "blocks", "verified"])
def test_a_prompt_may_be_longer_than_a_row(call, mode, tokenizer):
    prompt = "and then he ran " * 30
    count = len(tokenizer.encode(prompt).ids)
    assert count > 2 * MAX_LEN
    told = stories_of(call(MODES[mode], "--num_samples", 2, "--prompt", prompt, "--length",
                           count + 20, "--stream")[0])
    assert all(story["text"].startswith(prompt) for story in told)
    assert all(len(story["tokens"]) > count for story in told)


def test_a_story_may_be_full_with_its_prompt(call, tokenizer):
    count = len(tokenizer.encode("Tom a").ids)
    for mode in MODES.values():
        for line in stories_of(call(mode, "--prompt", "Tom a ", "--length", count + 1)[0]):
            assert len(line["tokens"]) == count + 2 and line["nfe"] == 1


# ---- streams -------------------------------------------------------------------------------------

def test_characters_are_shown_whole(tokenizer, capsys):
    """Every token a piece of its own, and letters that are cut across tokens."""
    text = "caf\u00e9 \u65e5\u672c \U0001f600\u201cTom\u201d \u00e0"
    ids = tokenizer.encode(text).ids
    live, shown = Live(tokenizer, [], 1, json=False), []
    for token in [BOS, *ids]:
        live.show(Piece(0, np.array([token]), False, 1))
        shown.append(capsys.readouterr().out)
    live.show(Piece(0, np.array([EOS]), True, 1))
    assert "".join(shown) == "--- 1 ---\n" + text and capsys.readouterr().out == "\n\n"
    assert "" in shown[2:]  # half a letter waits
    assert max(len(part) for part in shown[2:]) <= 4 and not any("\ufffd" in p for p in shown)


def test_a_text_that_ends_in_half_a_letter_and_broken_ones(tokenizer, capsys):
    half = tokenizer.encode("Tom \u65e5").ids[:-1]
    rng = np.random.default_rng(3)
    rows = [half, *(rng.integers(EOS + 1, 261, 12).tolist() for _ in range(300))]
    for row in rows:
        live = Live(tokenizer, [], 1, json=True)
        for start in range(0, len(row), 2):
            live.show(Piece(0, np.array(row[start:start + 2]), start + 2 >= len(row), 1))
        pieces = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert "".join(piece["text"] for piece in pieces) == decode(tokenizer, row)
    assert decode(tokenizer, half) == "Tom \ufffd"


def test_stories_are_shown_in_turn(tokenizer, capsys):
    live = Live(tokenizer, ["Once.", "Then.", "Or."], 3, json=False)

    def show(i: int, text: str, ended: bool = False) -> str:
        live.show(Piece(i, np.array([BOS, *tokenizer.encode(text).ids]), ended, 1))
        return capsys.readouterr().out
    assert show(0, "") == show(1, "") == show(2, "") == ""
    assert show(1, " b") == "" and show(2, "c", True) == ""
    assert show(0, "a") == "--- 1 ---\nOnce.\na"
    assert show(0, "d", True) == "d\n\n--- 2 ---\nThen. b"
    assert show(1, "e") == "e"
    assert show(1, "", True) == "\n\n--- 3 ---\nOr.\nc\n\n"


def test_an_interrupted_stream_ends_with_a_whole_character(models):
    process = subprocess.Popen(
        python(ROOT / "generate.py", "--checkpoint", models / "twin.pt", "--stream", "--length",
               10**7, "--num_samples", 300, "--batch_size", 1, "--temperature", 3),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    first = process.stdout.read(200)  # there while it works
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.decode().splitlines()[-1] == "error: interrupted"
    text = (first + rest).decode("utf-8")
    assert text.startswith("--- 1 ---\n") and not text.isascii()


def test_blocks_are_shown_step_by_step(tell):
    words = "joint.pt --block_size 4 --steps 2 --num_samples 2 --length 9 --show_steps --seed 1"
    shown = [line for line in tell(words)[0].splitlines() if line.startswith("[story")]
    assert [line.split("]")[0] for line in shown[:6]] == [
        f"[story {i}, block 1, step {k}" for k in (0, 1, 2) for i in (1, 2)]
    gaps = [line.count(" _") for line in shown]
    assert gaps[:2] == [3, 3] and all(0 < n < 3 for n in gaps[2:4]) and gaps[4:6] == [0, 0]
    assert any(line.startswith("[story 2, block 3, step 1]") for line in shown)
    told, error = tell(words, "--json")
    assert all(json.loads(line) for line in told.splitlines()) and "block 1, step 2]" in error


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    ("plain.pt --block_size 4", "--block_size 4: plain.pt does not write from the left"),
    ("plain.pt --verify", "--verify: plain.pt does not write from the left"),
    ("plain.pt --stream", "--stream: plain.pt does not write from the left"),
    ("joint.pt --stream --steps 4", "--stream: text stands when its row does"),
    ("joint.pt --stream --block_size 0", "add --block_size N or --verify"),
    ("joint.pt --block_size -1", "--block_size -1: must be from 0 to 1024"),
    ("joint.pt --block_size 1025", "--block_size 1025"),
    ("joint.pt --verify --block_size 1", "--block_size 1: leaves --verify no draft"),
    ("joint.pt --verify --block_size 0", "--block_size 0: leaves --verify no draft"),
    ("joint.pt --verify_with twin.pt", "--verify_with belongs to --verify"),
    ("joint.pt --steps 0", "--steps 0"), ("joint.pt --block_size 4 --steps 0", "--steps 0"),
    ("headless.pt --verify --steps 0", "--steps 0: headless.pt has no draft head; train one"),
    ("joint.pt --verify --verify_with plain.pt", "plain.pt: a diffusion model does not write"),
    ("joint.pt --verify --verify_with other.pt", "other.pt has another tokenizer than joint.pt"),
    ("joint.pt --verify --verify_with none.pt", "no checkpoint none.pt"),
    ("twin.pt --block_size 4", "--block_size 4: twin.pt writes token by token alone"),
    ("twin.pt --block_size 0", "--block_size 0: twin.pt writes token by token alone"),
    ("twin.pt --verify", "--verify: twin.pt writes token by token alone"),
    ("twin.pt --order confidence", "--order: token by token"),
    ("twin.pt --infill a[MASK]", "--infill: needs the whole row"),
    ("twin.pt --preset fast", "--preset: token by token"),
    ("joint.pt --block_size 1 --steps 4", "--steps: token by token"),
    ("joint.pt --block_size 1 --show_steps", "--show_steps: token by token"),
    ("joint.pt --block_size 4 --order left --left_share 0.3", "--left_share: blocks know"),
    ("joint.pt --verify --order random", "--order: --verify uncovers a draft from the left"),
    ("joint.pt --verify --pace linear", "--pace: --verify"),
    ("joint.pt --verify --remask none", "--remask: --verify"),
    ("joint.pt --verify --gamma 0.1 --eta 0.1", "--gamma --eta: --verify"),
    ("joint.pt --verify --threshold 0.1", "--threshold: --verify"),
    ("joint.pt --verify --preset fast", "--preset: --verify"),
    ("joint.pt --verify --show_steps", "--show_steps: --verify"),
    ("joint.pt --verify --trace x.html", "--trace: needs the whole row"),
    ("joint.pt --verify --infill a[MASK]", "--infill: needs the whole row"),
    ("joint.pt --block_size 4 --infill a[MASK]", "--infill: needs the whole row"),
    ("joint.pt --block_size 4 --trace x.html", "--trace: needs the whole row"),
    ("joint.pt --block_size 4 --stream --show_steps", "--stream and --show_steps"),
    ("joint.pt --block_size 4 --guidance 2", "--guidance belongs to --condition"),
    ("joint.pt --block_size 4 --length 2 --prompt Tom-had-a-cat", "leaves no room in a story of 2"),
    ("twin.pt --condition Tom.", "conditional or conditional_joint model"),
    ("joint.pt --verify --verify_with twin.pt --condition Tom.",
     "conditional or conditional_joint model"),
    ("joint.pt --block_size 0 --length 47", "--length 47: this model's rows hold at most 46")])
def test_what_is_refused(models, monkeypatch, fails, words, message):
    monkeypatch.chdir(models)
    assert message in fails(main, "--checkpoint", *words.split())
    assert not (models / "x.html").exists()


# ---- which model ---------------------------------------------------------------------------------

def test_the_newest_that_can(models, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("joint", "twin", "plain")):
        (tmp_path / name).mkdir()
        shutil.copy(models / f"{name}.pt", tmp_path / name / "best.pt")
        os.utime(tmp_path / name / "best.pt", (1000 + age, 1000 + age))

    def used(*words: str) -> str:
        main([*words, "--num_samples", "1", "--length", "5", "--json"])
        return json.loads(capsys.readouterr().out)["checkpoint"]
    assert used() == "plain/best.pt" and used("--block_size", "1") == "twin/best.pt"
    assert used("--verify") == "joint/best.pt"
    (tmp_path / "joint/best.pt").unlink()
    assert "joint model; found" in fails(main, "--verify")


TOLD = (["Tom ran."], ["A cat and a dog."], ["Tom ran.", "--guidance", "2", "--stream"],
        ["Tom ran.", "--guidance", "2", "--batch_size", "2"])


def test_a_conditional_kind_that_writes_from_the_left(call, tell, monkeypatch):
    """Once there is one: its reader gets the conditions, guidance costs twice as much."""
    monkeypatch.setattr(ConditionalDiffusion, "from_left", True)
    monkeypatch.setattr(ConditionalDiffusion, "reader", lambda kind, *args: CachedModel(*args))
    for mode in ("--block_size 1", "--block_size 4 --steps 2", "--verify"):
        words = f"conditional.pt {mode} --num_samples 3"
        told, others, guided, whole = (stories_of(call(words, "--condition", *more)[0])
                                       for more in TOLD)
        assert len({str([story["text"] for story in each])
                    for each in (told, others, guided)}) == 3 and whole == guided
        assert all(story["nfe"] % 2 == 0 and story["condition"] == "Tom ran." for story in guided)
        plain, shown = (tell(words, "--condition", "Tom ran.", *more)[0].rsplit("\n", 2)[0]
                        for more in ([], ["--stream"]))
        assert plain == shown and plain.startswith("--- 1 ---\nTom ran.")


def test_an_exported_model_may_have_a_reader(call, fails, monkeypatch, capsys):
    """One that gives probabilities: words are healed, as by the checkpoint."""
    words = ["--num_samples", 2, "--prompt", "Tom had a fri"]
    told = stories_of(call("joint.pt --block_size 4", *words)[0])
    opened = opening.open_checkpoint

    def exported(config, sort, reader=True):
        source = opened(dataclasses.replace(config, checkpoint="joint.pt", onnx=None), sort)
        return source._replace(choice=None, reader=source.reader if reader else None)
    monkeypatch.setattr(generate, "open_exported", exported)
    monkeypatch.setattr(opening, "open_checkpoint", None)
    lines = []
    monkeypatch.setattr(generate, "print_json", lines.append)
    main([*map(str, words), "--onnx", "step.onnx", "--block_size", "4", "--heal", "--json"])
    assert stories_of(lines) == told
    capsys.readouterr()
    monkeypatch.setattr(generate, "open_exported", lambda *args: exported(*args, reader=False))
    assert "does not write from the left" in fails(main, "--onnx", "x.onnx", "--block_size", "4")
    assert "--heal" in fails(main, "--onnx", "x.onnx", "--heal", "--block_size", "0")
    assert "--verify_with: needs" in fails(main, "--onnx", "x.onnx", "--verify", "--verify_with",
                                           "twin.pt")
    assert re.search("--device", fails(main, "--onnx", "x.onnx", "--device", "cpu"))
