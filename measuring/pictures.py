"""What a picture is worth to a model that reads pictures: for the likelihood of a text, in telling
them apart, and in the stories that are told.

    python evaluate.py pictures --checkpoint pictures/best.pt --data_dir data_emoji

Each text's likelihood given its own picture, that of another subject, and none. Groups of eight
texts of different subjects with their pictures: which of the pictures belongs to a text, and which
text to a picture, by the likelihood alone (a guess: one in eight). Stories told of the pictures:
how often they name what is shown, and how often what another picture shows. Prints a table, writes
pictures.json beside the checkpoint, and a sheet of the first twelve pictures with their stories,
unpicked, as pictures.html and pictures.png.

What is shown is read from the data folder's subjects.jsonl, where prep_image_data.py --emoji and
--scenes write it; without it the subject of a text is its picture, and nothing is named. A joint
model is measured in --mode causal, where its likelihood is exact.
"""

from cli import atomic_file, flag, parse, require, write_json

import dataclasses
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.image_files import data_uri
from corpus.pictures import read_subjects
from corpus.rows import TokenRows, bucket_batches
from corpus.tokens import decode, row_kind
from kinds.kind import Kind
from kinds.likelihood import ratio_error
from kinds.registry import kind_of
from measuring.held_out import HeldOutConfig, find_measurable, open_model, output_file
from network.encoders import reads_pictures
from sampling.sampler import Sampler

GROUP = 8  # texts, and pictures, that are told apart
SHEET = 12
TOGETHER = 8192  # tokens in a batch


@dataclass(frozen=True)
class PicturesConfig(HeldOutConfig):
    """Flags of `evaluate.py pictures`."""

    mode: str | None = flag(None, "of a joint model: causal, row or a block size (default: causal)")
    draws: int = flag(4, "masks drawn for every row, where the likelihood is a bound")
    max_rows: int | None = flag(None, "texts at most, evenly spread over the split")
    num_samples: int = flag(64, "stories told, 0 for none")
    guidance: float = flag(1.0, "of the stories")
    temperature: float = flag(1.0, "of the stories")

    def check(self) -> None:
        super().check()
        self.require_from(1, "draws", "max_rows")
        self.require_from(0, "num_samples")
        self.sampler.check()

    @property
    def sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, guidance=self.guidance)


@dataclass
class Pairs:
    """Whole texts, the pictures that they belong to, and what these show."""

    rows: TokenRows
    pictures: object  # corpus.pictures.PictureRows
    numbers: list[int]
    subjects: list[list[str]]

    @classmethod
    def of(cls, rows: TokenRows, pictures, most: int | None) -> "Pairs":
        shown = read_subjects(rows.data_dir, rows.split)
        known = [line["subjects"] for line in shown] if shown else [[]] * len(rows)
        whole = [i for i in range(len(rows)) if row_kind(rows[i]) == "story"]
        count = min(most or len(whole), len(whole))
        numbers = [whole[i * len(whole) // count] for i in range(count)]
        return cls(rows, pictures, numbers, [known[i] for i in numbers])

    def apart(self, a: int, b: int) -> bool:
        """Whether two of them show other things."""
        if self.subjects[a] or self.subjects[b]:
            return not set(self.subjects[a]) & set(self.subjects[b])
        one, other = (self.pictures.batch([self.numbers[i]]) for i in (a, b))
        return not np.array_equal(one, other)

    def another(self, seed: int) -> list[int]:
        """For each of them one, at random, that shows something else."""
        rng, chosen = np.random.default_rng(seed), []
        for i in range(len(self.numbers)):
            chosen.append(next((int(j) for j in rng.permutation(len(self.numbers))
                                if self.apart(i, int(j))), i))
        require(any(i != j for i, j in enumerate(chosen)), f"{self.rows.data_dir}: all pictures of "
                f"{self.rows.split} show the same; name another --data_dir or --split")
        return chosen

    def groups(self, seed: int) -> list[list[int]]:
        """As many groups of GROUP as there are whose members all show other things."""
        waiting = [int(i) for i in np.random.default_rng(seed).permutation(len(self.numbers))]
        groups = []
        while len(waiting) >= GROUP:
            group: list[int] = []
            for i in list(waiting):
                if all(self.apart(i, j) for j in group):
                    group.append(i)
                    waiting.remove(i)
                if len(group) == GROUP:
                    break
            if len(group) < GROUP:
                break
            groups.append(group)
        return groups


# ---- likelihood ----------------------------------------------------------------------------------

class Likelihood:
    """-log p of texts, each under the same masks whatever picture it is given."""

    def __init__(self, kind: Kind, model: torch.nn.Module, pairs: Pairs, draws: int, seed: int):
        self.kind, self.model, self.pairs, self.draws, self.seed = kind, model, pairs, draws, seed

    def nats(self, texts: Sequence[int], pictures: Sequence[int] | None, what: str,
             ) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of these texts, (N,) each, no text twice, given these pictures or none;
        places in `pairs`."""
        own = self.pairs.numbers
        rows = np.array([own[i] for i in texts])
        given = {} if pictures is None else dict(zip(rows.tolist(), (own[i] for i in pictures),
                                                     strict=True))
        batches = bucket_batches(self.pairs.rows.lengths[rows], TOGETHER, merge=False)
        bar = tqdm(batches, desc=what, unit=" batches", leave=False, disable=None)
        bound = self.kind.nelbo(
            self.model, (self.pairs.rows.batch(rows[part]) for part in bar), self.seed, self.draws,
            numbers=[rows[part] for part in batches],
            conditions=None if pictures is None else lambda numbers: self.pairs.pictures.batch(
                [given[int(i)] for i in numbers]))
        nats, tokens = bound.row_nats()  # in the order of the rows' numbers
        order = rows.argsort().argsort()
        return nats[order], tokens[order]


def value_of_pictures(likelihood: Likelihood, seed: int) -> dict:
    """Nats/token with the text's own picture, with one of another subject, and with none, and what
    its own is worth, paired text by text, each with its standard error."""
    pairs = likelihood.pairs
    texts = list(range(len(pairs.numbers)))
    arms = {"own": texts, "another": pairs.another(seed), "none": None}
    nats = {}
    for name, pictures in arms.items():
        nats[name], tokens = likelihood.nats(texts, pictures, f"picture: {name}")
    figures = {}
    for name, values in nats.items():
        figures[name] = float(values.sum() / tokens.sum())
        figures[f"{name}_standard_error"] = ratio_error(values, tokens)
    for name in ("another", "none"):
        difference = nats[name] - nats["own"]
        figures[f"gain_over_{name}"] = float(difference.sum() / tokens.sum())
        figures[f"gain_over_{name}_standard_error"] = ratio_error(difference, tokens)
    return figures | {"texts": len(texts), "tokens": int(tokens.sum())}


def retrieval(likelihood: Likelihood, seed: int) -> dict | None:
    """How often, of GROUP pictures, the likeliest for a text is its own, and of GROUP texts the one
    whose likelihood a picture raises most; each with its standard error over groups. None where
    there are no GROUP different ones."""
    groups = likelihood.pairs.groups(seed)
    if not groups:
        return None
    flat = [i for group in groups for i in group]
    alone, _ = likelihood.nats(flat, None, "retrieval, no picture")
    own, table = np.arange(GROUP), np.zeros((len(groups), GROUP, GROUP))  # group, text, picture
    for turn in range(GROUP):  # each text with the picture so many places on
        pictures = [group[(i + turn) % GROUP] for group in groups for i in range(GROUP)]
        nats, _ = likelihood.nats(flat, pictures, f"retrieval {turn + 1}/{GROUP}")
        table[:, own, (own + turn) % GROUP] = nats.reshape(len(groups), GROUP)
    gain = alone.reshape(len(groups), GROUP, 1) - table
    picture_of_text = (table.argmin(2) == own).mean(1)  # (groups,)
    text_of_picture = (gain.argmax(1) == own).mean(1)
    return {"groups": len(groups), "chance": 1 / GROUP} | {
        name: {"share": float(hits.mean()), "standard_error": float(
            hits.std(ddof=1) / len(hits) ** 0.5) if len(hits) > 1 else None}
        for name, hits in (("picture_of_text", picture_of_text),
                           ("text_of_picture", text_of_picture))}


# ---- stories -------------------------------------------------------------------------------------

def names(subject: str, text: str) -> bool:
    """Whether a text has the word, as it is or with a plural s."""
    return re.search(rf"\b{re.escape(subject)}s?\b", text, re.IGNORECASE) is not None


def naming(stories: list[str], subjects: list[list[str]]) -> dict:
    """Share of the stories that name all that their picture shows, and the share of pairs of a
    story and a picture of something else in which it names all of that."""
    def all_named(shown: list[str], text: str) -> bool:
        return all(names(subject, text) for subject in shown)
    own = [all_named(shown, text) for shown, text in zip(subjects, stories, strict=True)]
    other = [all_named(subjects[j], text) for i, text in enumerate(stories)
             for j in range(len(stories)) if not set(subjects[i]) & set(subjects[j])]
    count = len(own)
    share = sum(own) / count
    return {"stories": count, "own": share, "own_standard_error":
            (share * (1 - share) / count) ** 0.5, "another": sum(other) / max(1, len(other))}


def told(kind: Kind, model: torch.nn.Module, pairs: Pairs, chosen: list[int], sampler: Sampler,
         seed: int, tokenizer) -> list[str]:
    """A story of each of these pictures."""
    numbers = [pairs.numbers[i] for i in chosen]
    rows = kind.write(model, [int(pairs.rows.lengths[i]) for i in numbers], sampler, seed,
                      pairs.pictures.batch(numbers))
    return [decode(tokenizer, row).strip() for row in rows]


# ---- the sheet -----------------------------------------------------------------------------------

def page(pictures: np.ndarray, stories: list[str], title: str) -> str:
    """HTML: every picture with its story."""
    items = "\n".join(
        f'<figure><img src="{data_uri(picture)}" alt=""><figcaption>{html.escape(story)}'
        "</figcaption></figure>" for picture, story in zip(pictures, stories, strict=True))
    return ('<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>body{{font:16px/1.5 sans-serif;max-width:"
            "50rem;margin:2rem auto;padding:0 1rem}figure{display:flex;gap:1rem;margin:1.5rem 0}"
            "img{width:128px;height:128px;image-rendering:auto}</style>\n"
            f"<h1>{html.escape(title)}</h1>\n{items}\n</html>\n")


def draw_sheet(path: Path, pictures: np.ndarray, stories: list[str], title: str) -> None:
    """The same as a picture, the stories' beginnings beside the pictures."""
    import textwrap

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns, lines = 2, -(-len(pictures) // 2)
    figure, axes = plt.subplots(lines, 2 * columns, figsize=(11, 1.45 * lines + 0.5), squeeze=False,
                                width_ratios=[1, 3] * columns)
    for axis in axes.flat:
        axis.axis("off")
    for i, (picture, story) in enumerate(zip(pictures, stories, strict=True)):
        line, column = i // columns, 2 * (i % columns)
        axes[line, column].imshow(picture[..., :3])
        letters = "".join(letter if letter.isprintable() else " " for letter in story)
        text = "\n".join(textwrap.wrap(letters, 52)[:6])
        axes[line, column + 1].text(0, 0.5, text.replace("$", "\\$"), va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# ---- the command ---------------------------------------------------------------------------------

def tables(result: dict) -> str:
    value, found, named = result["value"], result["retrieval"], result["naming"]
    def cell(name: str) -> str:
        return f"{value[name]:.3f} ± {value[f'{name}_standard_error']:.3f}"
    lines = ["| nats/token with its own picture | another's | none | its own better than another's "
             "by | than none by |", "|---" * 5 + "|",
             "| " + " | ".join(map(cell, ("own", "another", "none", "gain_over_another",
                                          "gain_over_none"))) + " |"]
    if found:
        def share(name: str) -> str:
            error = found[name]["standard_error"]
            return f"{found[name]['share']:.1%}" + (f" ± {error:.1%}" if error is not None else "")
        lines += ["", f"Of {GROUP} pictures the text's own is found in "
                  f"{share('picture_of_text')}, of {GROUP} texts the picture's own in "
                  f"{share('text_of_picture')} of {GROUP * found['groups']} (a guess: "
                  f"{found['chance']:.1%})."]
    if named:
        lines += ["", f"Stories that name what is shown: {named['own']:.1%} ± "
                  f"{named['own_standard_error']:.1%} of {named['stories']}; what another picture "
                  f"shows: {named['another']:.1%}."]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config, given = parse(PicturesConfig, __doc__, argv)
    config.check()
    require(config.num_samples or not given & {"guidance", "temperature"}, "--guidance and "
            "--temperature are of the stories: leave them out, or raise --num_samples")
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "" if kind.conditional else "it reads no pictures; use `python evaluate.py likelihood`"),
        pictures=True)
    require(reads_pictures(checkpoint["encoder"]), f"{path} reads conditions of the sort "
            f"{checkpoint['encoder']}: use `python evaluate.py condition`")
    target = output_file(config.output, path, "pictures.json",
                         lambda target: target.with_suffix(".html"))
    require(target.suffix not in (".html", ".png"), f"--output {target}: the sheet gets that name; "
            "use .json")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    kind = kind_of(checkpoint)
    require(kind.modes or config.mode is None, f"--mode {config.mode}: {path} has one mode only")
    if kind.modes:
        kind = kind.in_mode(config.mode or kind.modes[0])
    require(not kind.exact or "draws" not in given, "--draws: without effect for an exact mode; "
            "leave it out")
    pairs = Pairs.of(rows, model.encoder.conditions_of(rows), config.max_rows)
    likelihood = Likelihood(kind, model, pairs, 1 if kind.exact else config.draws, config.seed)
    result = {"checkpoint": str(path), "step": checkpoint.get("step"), "split": rows.split,
              "data": rows.meta["source"], "mode": getattr(kind, "mode", None),
              "config": dataclasses.asdict(config),
              "value": value_of_pictures(likelihood, config.seed),
              "retrieval": retrieval(likelihood, config.seed), "naming": None}
    chosen = [int(i) for i in np.random.default_rng(config.seed).permutation(len(pairs.numbers))
              [:config.num_samples]]
    if chosen:
        stories = told(kind, model, pairs, chosen, config.sampler, config.seed, tokenizer)
        subjects = [pairs.subjects[i] for i in chosen]
        result["naming"] = naming(stories, subjects) if all(subjects) else None
        result["stories"] = [{"row": pairs.numbers[i], "subjects": pairs.subjects[i],
                              "story": story} for i, story in zip(chosen, stories, strict=True)]
        shown = pairs.pictures.batch([pairs.numbers[i] for i in chosen[:SHEET]])
        title = f"{len(shown)} pictures of {rows.split}, unpicked, and what {path.name} tells"
        with atomic_file(target.with_suffix(".html"), "w") as file:
            file.write(page(shown, stories[:SHEET], title))
        draw_sheet(target.with_suffix(".png"), shown, stories[:SHEET], title)
    write_json(target, result)
    print(f"{path}, step {result['step']}; {result['value']['texts']} texts of {rows.split}"
          + f", mode {result['mode']}" * bool(result["mode"]) + f"; seed {config.seed}\n\n"
          f"{tables(result)}\n\nwrote {target}")
