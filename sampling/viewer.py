"""How a story was uncovered, as a web page or a GIF. A library: `generate.py --trace story.html`.

    trace = Trace(tokenizer, rows)
    for part, state in unmask_rows(step, rows, sampler):
        trace.add(part, state)
    trace.write("story.html", "16 steps, confidence")

The page is viewer.html with the story's data in it: one file, no network.
"""

from cli import atomic_file

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corpus.tokens import BOS, EOS, MASK, PAD
from sampling.loop import State

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VIEWER = Path(__file__).with_name("viewer.html")
TRACE_FORMATS = (".html", ".gif")
LETTER_BYTES = 4  # of UTF-8, at most
GIF_WIDTH, GIF_FRAMES = 72, 80  # characters a line; frames at most
GIF_FRAME, GIF_END = 120, 3000  # milliseconds


class Picture(NamedTuple):
    """What a story tells of."""

    source: str  # a data: URI
    name: str


class Trace:
    """Collects the states of rows (length,) as the sampling loop yields them; with `pictures`, that
    of each row."""

    def __init__(self, tokenizer: "Tokenizer", rows: list[np.ndarray],
                 pictures: list[Picture] | None = None):
        self.tokenizer, self.pictures = tokenizer, pictures
        self.shown = [np.flatnonzero(~np.isin(row, (PAD, BOS, EOS))) for row in rows]
        # tokens as ids; `steps` has (place, id, probability) of what was drawn
        self.stories = [{"start": row[shown], "last": row[shown], "steps": []}
                        for row, shown in zip(rows, self.shown, strict=True)]

    def add(self, part: list[int], state: State) -> None:
        """The state of the rows numbered `part`."""
        for line, number in enumerate(part):
            story, shown = self.stories[number], self.shown[number]
            uncovered, hidden = (np.flatnonzero(marks[line][shown]) for marks in (
                state.uncovered, state.hidden_again))
            story["last"] = state.tokens[line][shown]
            if len(uncovered) or len(hidden):
                story["steps"].append({
                    "drawn": [(int(i), int(story["last"][i]),
                               round(float(state.confidence[line, shown[i]]), 3))
                              for i in uncovered],
                    "hidden": hidden.tolist()})

    def _texts(self, ids: np.ndarray) -> list[str]:
        """The text of each token. A letter cut into several tokens goes to the last of them."""
        texts, start = [], 0
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode([int(i) for i in ids[start:end]])
            if "\ufffd" in text and end < len(ids) and end - start < LETTER_BYTES:
                texts.append("")
                continue
            texts.append(text)
            start = end
        return texts

    def _with_texts(self, story: dict) -> dict:
        """A story with texts in place of ids, for the page."""
        last, start = story["last"], story["start"]
        texts = self._texts(last)

        def text(i: int, token: int) -> str:
            # what was hidden again later stands alone
            return texts[i] if token == last[i] else self.tokenizer.decode([token])

        return {"tokens": [None if token == MASK else text(i, int(token))
                           for i, token in enumerate(start)],
                "steps": [{**step, "drawn": [(i, text(i, token), p)
                                             for i, token, p in step["drawn"]]}
                          for step in story["steps"]]}

    def write(self, path: str | Path, title: str) -> None:
        """Writes a page or a GIF, by the ending of `path`."""
        path = Path(path)
        if path.suffix == ".gif":
            self._write_gif(path, title)
            return
        data = json.dumps({"title": title, "stories": [self._with_texts(s) for s in self.stories],
                           **self._shown_pictures()}, ensure_ascii=False)
        # "</script>" and "<!--" in a story must not end the data
        page = VIEWER.read_text(encoding="utf-8").replace("{{DATA}}", data.replace("<", "\\u003c"))
        with atomic_file(path, "w") as file:
            file.write(page)

    def _shown_pictures(self) -> dict:
        """Each picture once, and which of them each story has; nothing where there are none."""
        if self.pictures is None:
            return {}
        places = {picture: place for place, picture in enumerate(dict.fromkeys(self.pictures))}
        return {"pictures": [{"src": picture.source, "alt": f"What is told of: {picture.name}"}
                             for picture in places],
                "shown": [places[picture] for picture in self.pictures]}

    def _frames(self) -> list[str]:
        """The text of the first story at the start and after every step, hidden tokens as blocks,
        its lines broken where those of the finished story are, so that nothing moves."""
        story = self._with_texts(self.stories[0])
        final, now = self._texts(self.stories[0]["last"]), list(story["tokens"])
        ends = np.cumsum([0, *map(len, final)])
        whole = break_lines("".join(final), GIF_WIDTH)
        broken = [whole[a:b] for a, b in zip(ends, ends[1:], strict=False)]

        def shown(token: str | None, last: str, laid: str) -> str:
            if token is None:
                return "".join("\n" if letter == "\n" else "\u2591" for letter in laid)
            return laid if token == last else token

        frames = ["".join(map(shown, now, final, broken))]
        for step in story["steps"]:
            for i, text, _ in step["drawn"]:
                now[i] = text
            for i in step["hidden"]:
                now[i] = None
            frames.append("".join(map(shown, now, final, broken)))
        return frames

    def _write_gif(self, path: Path, title: str) -> None:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from PIL import Image
        frames = self._frames()
        keep = np.unique(np.linspace(0, len(frames) - 1, GIF_FRAMES).astype(int))
        texts = [frames[k] for k in keep]
        lines = max(text.count("\n") for text in texts) + 3
        figure = plt.figure(figsize=(7.2, 0.22 * lines), dpi=90)
        figure.text(0.02, 1 - 0.4 / lines, title, va="top", fontsize=10, weight="bold")
        words = figure.text(0.02, 1 - 2 / lines, "", va="top", family="monospace", fontsize=10)
        images = []
        for text in texts:
            words.set_text(text.replace("$", "\\$"))  # matplotlib would read mathematics
            figure.canvas.draw()
            images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("P"))
        plt.close(figure)
        with atomic_file(path) as file:
            images[0].save(file, format="GIF", save_all=True, append_images=images[1:], loop=0,
                           duration=[GIF_FRAME] * (len(images) - 1) + [GIF_END])


def break_lines(text: str, width: int) -> str:
    """A text of the same length with line ends in place of the spaces where lines of at most
    `width` letters end (longer where a word is)."""
    letters, start, space = list(text), 0, None
    for i, letter in enumerate(text):
        if letter == "\n":
            start, space = i + 1, None
        elif letter == " ":
            space = i
        if i - start >= width and space is not None:
            letters[space] = "\n"
            start, space = space + 1, None
    return "".join(letters)
