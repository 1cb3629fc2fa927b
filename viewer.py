"""How a story was uncovered, as a web page or a GIF. A library: `generate.py --trace story.html`.

    trace = Trace(tokenizer, rows)
    for part, state in unmask_rows(step, rows, sampler):
        trace.add(part, state)
    trace.write("story.html", "16 steps, confidence")

The page is viewer.html with the story's data in it: one file, no network.
"""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cli import atomic_file
from data_prep import BOS, EOS, MASK, PAD
from sampler import State

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VIEWER = Path(__file__).with_name("viewer.html")
TRACE_FORMATS = (".html", ".gif")
GIF_WIDTH, GIF_FRAMES = 72, 80  # characters a line; frames at most
GIF_FRAME, GIF_END = 120, 3000  # milliseconds


class Trace:
    """Collects the states of rows (length,) as the sampling loop yields them."""

    def __init__(self, tokenizer: "Tokenizer", rows: list[np.ndarray]):
        self.tokenizer = tokenizer
        self.shown = [np.flatnonzero(~np.isin(row, (PAD, BOS, EOS))) for row in rows]
        self.stories = [{"tokens": [None if row[i] == MASK else self._text(row[i]) for i in shown],
                         "steps": []} for row, shown in zip(rows, self.shown, strict=True)]

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([int(token)])

    def add(self, part: list[int], state: State) -> None:
        """The state of the rows numbered `part`."""
        for line, number in enumerate(part):
            shown = self.shown[number]
            uncovered, hidden = (np.flatnonzero(marks[line][shown]) for marks in (
                state.uncovered, state.hidden_again))
            if len(uncovered) or len(hidden):
                self.stories[number]["steps"].append({
                    "drawn": [(int(i), self._text(state.tokens[line, shown[i]]),
                               round(float(state.confidence[line, shown[i]]), 3))
                              for i in uncovered],
                    "hidden": hidden.tolist()})

    def write(self, path: str | Path, title: str) -> None:
        """Writes a page or a GIF, by the ending of `path`."""
        path = Path(path)
        if path.suffix == ".gif":
            self._write_gif(path, title)
            return
        data = json.dumps({"title": title, "stories": self.stories}, ensure_ascii=False)
        # "</script>" and "<!--" in a story must not end the data
        page = VIEWER.read_text(encoding="utf-8").replace("{{DATA}}", data.replace("<", "\\u003c"))
        with atomic_file(path, "w") as file:
            file.write(page)

    def _frames(self) -> list[list[str]]:
        """The tokens of the first story at the start and after every step, hidden as blocks."""
        story = self.stories[0]
        now, frames = list(story["tokens"]), [list(story["tokens"])]
        for step in story["steps"]:
            for i, text, _ in step["drawn"]:
                now[i] = text
            for i in step["hidden"]:
                now[i] = None
            frames.append(list(now))
        return frames

    def _write_gif(self, path: Path, title: str) -> None:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from PIL import Image
        frames = self._frames()
        keep = np.unique(np.linspace(0, len(frames) - 1, GIF_FRAMES).astype(int))
        # a block as wide as the token that comes, so that the text does not move
        texts = ["\n".join(textwrap.wrap("".join(
            "\u2591" * len(last) if token is None else token
            for token, last in zip(frames[k], frames[-1], strict=True)), GIF_WIDTH)) for k in keep]
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
