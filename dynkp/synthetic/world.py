"""Drawn posts: a synthetic data set in which a keyphrase depends on both the image and the text.

The image shows two icons side by side. The text refers to one of them, by its side or its colour, and contains a cue word;
two cue words stand for each slogan. The keyphrase is "<icon referred to> <slogan>", for example "boat season". So the icon
depends on image and text, the slogan on the text. Of the 128 compositions of 16 icons and 8 slogans, 16 are frequent and 64
rare in training, 24 are held out for the test ("unseen": new compositions of known words), and 24 never occur.

Some posts are noise: the reference or the cue is missing in their text, so their keyphrase cannot be derived. They are the
hard posts that a training method should distinguish from easy ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

IMAGE_SIZE = 32
ICON_SIZE = 14
BACKGROUND = 235
DESCRIBE_QUESTION = "describe"
WHICH_QUESTION = "which"

SHAPES = (
    "star", "heart", "moon", "sun", "fish", "tree", "house", "cup",
    "key", "bell", "flag", "boat", "leaf", "cloud", "crown", "kite",
)  # fmt: skip
COLOURS = {
    "red": (215, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 195, 20),
    "purple": (150, 50, 175),
    "black": (25, 25, 25),
}
SLOGANS = {
    "love": ("adore", "sweetest"),
    "vibes": ("cosy", "mellow"),
    "goals": ("dreaming", "someday"),
    "season": ("autumn", "weather"),
    "drama": ("ugh", "crying"),
    "party": ("cheers", "dancing"),
    "magic": ("wow", "sparkling"),
    "sale": ("bargain", "cheap"),
}
FILLERS = ("so", "this", "my", "just", "today", "look", "really", "again", "tonight", "finally", "friends", "yes")

NOISE_SHARE = 0.15
UNSEEN_SHARE = 0.4
FREQUENT_SHARE = 0.6

POST_FEATURES = Features(
    {
        "id": Value("string"),
        "text": Value("string"),
        "keyphrases": List(Value("string")),
        "images": List(Image()),
        "rationale": Value("string"),
        "kind": Value("string"),
        "scene": {
            "left": {"colour": Value("string"), "shape": Value("string")},
            "right": {"colour": Value("string"), "shape": Value("string")},
            "meant": Value("string"),
            "reference": Value("string"),
            "cue": Value("string"),
            "slogan": Value("string"),
        },
    }
)

DESCRIPTION_FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "completion": List({"role": Value("string"), "content": Value("string")}),
    }
)


def compositions() -> dict[str, list[tuple[str, str]]]:
    """Return the 128 (icon, slogan) pairs by their frequency: `frequent`, `rare`, `unseen` and `never`.

    The division does not depend on a seed: for icon i and slogan s it depends on (s - i) mod 8, so that every icon and every
    slogan occurs in each group about equally often.

    Returns:
        Lists of 16, 64, 24 and 24 pairs.

    Example:
        >>> {group: len(pairs) for group, pairs in compositions().items()}
        {'frequent': 16, 'rare': 64, 'unseen': 24, 'never': 24}
    """
    groups: dict[str, list[tuple[str, str]]] = {"frequent": [], "rare": [], "unseen": [], "never": []}
    slogans = list(SLOGANS)
    for i, shape in enumerate(SHAPES):
        for s, slogan in enumerate(slogans):
            distance = (s - i) % len(slogans)
            if distance == 0:
                group = "frequent"
            elif distance <= 4:
                group = "rare"
            elif distance == 5 or (distance == 6 and i < 8):
                group = "unseen"
            else:
                group = "never"
            groups[group].append((shape, slogan))
    return groups


def draw_posts(count: int, *, split: str = "train", seed: int = 0) -> Dataset:
    """Draw posts.

    Args:
        count: number of posts, at least 1.
        split: `"train"` or `"test"`. Training posts are `seen` compositions (60 % of them frequent ones) and 15 % `noise`; of
            the test posts 40 % are `unseen` compositions and the others are drawn as in training.
        seed: the same count, split and seed give the same posts; the two splits use different random numbers.

    Returns:
        Posts with `id`, `text`, `keyphrases` (one), `images` (one, 32x32 pixels), `rationale`, and the further columns `kind`
        (`seen`, `unseen` or `noise`) and `scene` (what was drawn and referred to; `reference` or `cue` is empty in a noise
        post).

    Raises:
        ValueError: if `count` is below 1 or `split` is unknown.

    Example:
        >>> post = draw_posts(1, seed=3)[0]
        >>> post["keyphrases"] == [f"{post['scene'][post['scene']['meant']]['shape']} {post['scene']['slogan']}"]
        True
    """
    if count < 1:
        raise ValueError(f"`count` is {count}, but at least 1 post must be drawn.")
    if split not in ("train", "test"):
        raise ValueError(f"`split` is {split!r}, but there are only the splits 'train' and 'test'.")
    rng = np.random.default_rng([seed, split == "test"])
    groups = compositions()
    rows = []
    for number in range(count):
        if split == "test" and rng.random() < UNSEEN_SHARE:
            kind, group = "unseen", "unseen"
        else:
            kind = "noise" if rng.random() < NOISE_SHARE else "seen"
            group = "frequent" if rng.random() < FREQUENT_SHARE else "rare"
        shape, slogan = _choice(rng, groups[group])
        scene = _draw_scene(rng, shape)
        scene["slogan"] = slogan
        scene["cue"] = _choice(rng, SLOGANS[slogan])
        if kind == "noise":
            scene["reference" if rng.random() < 0.5 else "cue"] = ""
        rows.append(
            {
                "id": f"drawn-{split}-{seed}-{number}",
                "text": _write_text(rng, scene),
                "keyphrases": [f"{shape} {slogan}"],
                "images": [_draw_image(rng, scene)],
                "rationale": _explain(scene),
                "kind": kind,
                "scene": scene,
            }
        )
    return Dataset.from_list(rows, features=POST_FEATURES)


def describe_posts(count: int, *, seed: int = 0) -> Dataset:
    """Draw descriptions of posts, without keyphrases: training data for the skills that a pretrained model has.

    Half of the rows ask for a description of the image, half ask which icon a text refers to. Slogans and cue words occur in
    neither, so the rows contain no information about keyphrases.

    Args:
        count: number of rows, at least 1.
        seed: the same count and seed give the same rows.

    Returns:
        Rows in TRL's conversational prompt-completion format: `images`, `prompt`, `completion`.

    Raises:
        ValueError: if `count` is below 1.

    Example:
        >>> describe_posts(1)[0]["completion"][0]["role"]
        'assistant'
    """
    if count < 1:
        raise ValueError(f"`count` is {count}, but at least 1 row must be drawn.")
    rng = np.random.default_rng([seed, 2])
    rows = []
    for number in range(count):
        scene = _draw_scene(rng, _choice(rng, SHAPES))
        if number % 2:
            question, answer = f"{WHICH_QUESTION} {_write_text(rng, scene)}", f"{_resolve(scene)} ."
        else:
            question, answer = DESCRIBE_QUESTION, _describe(scene)
        rows.append(
            {
                "images": [_draw_image(rng, scene)],
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return Dataset.from_list(rows, features=DESCRIPTION_FEATURES)


def _choice(rng: np.random.Generator, options: Any) -> Any:
    """Choose as `rng.choice` does, without converting the options to an array, which would make strings of pairs."""
    return options[int(rng.integers(len(options)))]


def _draw_scene(rng: np.random.Generator, shape: str) -> dict[str, Any]:
    """Draw a scene in which `shape` is referred to; the other icon differs in shape and colour, so references are unique."""
    other = _choice(rng, [s for s in SHAPES if s != shape])
    colour, other_colour = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2])
    meant, side = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    return {
        meant: {"colour": colour, "shape": shape},
        side: {"colour": other_colour, "shape": other},
        "meant": meant,
        "reference": meant if rng.random() < 0.5 else colour,
        "cue": "",
        "slogan": "",
    }


def _write_text(rng: np.random.Generator, scene: dict[str, Any]) -> str:
    """Write four to six words: the reference and the cue, in either order, among filler words."""
    words = [word for word in (scene["reference"], scene["cue"]) if word]
    fillers = list(rng.permutation(FILLERS)[: int(rng.integers(4, 7)) - len(words)])
    return " ".join(str(word) for word in rng.permutation(words + fillers))


def _name(scene: dict[str, Any], side: str) -> list[str]:
    return [side, scene[side]["colour"], scene[side]["shape"]]


def _resolve(scene: dict[str, Any]) -> str:
    """Name the icon referred to: the reference and the words that follow it in the description."""
    name = _name(scene, scene["meant"])
    start = name.index(scene["reference"]) if scene["reference"] else len(name) - 1
    return " ".join(["the", *name[start:]])


def _describe(scene: dict[str, Any]) -> str:
    return " ".join([*_name(scene, "left"), ",", *_name(scene, "right"), "."])


def _explain(scene: dict[str, Any]) -> str:
    """Write the rationale of a teacher who knows the keyphrase: from image and text to icon and slogan."""
    return f"{_describe(scene)} so {_resolve(scene)} , and {scene['cue'] or 'this'} means {scene['slogan']} ."


def _draw_image(rng: np.random.Generator, scene: dict[str, Any]) -> PILImage.Image:
    """Draw both icons, each in the upper or lower quarter of its side and a little off centre, on a noisy background."""
    paper = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), float(BACKGROUND))
    paper += rng.normal(0, 4, (IMAGE_SIZE, IMAGE_SIZE, 1))
    for side, start in (("left", 0), ("right", IMAGE_SIZE // 2)):
        icon = scene[side]
        x = start + int(rng.integers(0, IMAGE_SIZE // 2 - ICON_SIZE + 1))
        y = int(rng.integers(0, 2)) * (IMAGE_SIZE // 2) + int(rng.integers(0, IMAGE_SIZE // 2 - ICON_SIZE + 1))
        cover = _icon_mask(icon["shape"])[:, :, None]
        area = paper[y : y + ICON_SIZE, x : x + ICON_SIZE]
        area += cover * (np.array(COLOURS[icon["colour"]], dtype=float) - area)
    return PILImage.fromarray(paper.clip(0, 255).astype(np.uint8))


@cache
def _icon_mask(shape: str) -> np.ndarray:
    """Return the share of each pixel that the icon covers, `(ICON_SIZE, ICON_SIZE)` in [0, 1]; drawn at four times the size."""
    scale = 4 * ICON_SIZE
    mask = PILImage.new("L", (scale, scale), 0)
    draw = ImageDraw.Draw(mask)

    def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * scale, y * scale) for x, y in pairs]

    def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
        return [x0 * scale, y0 * scale, x1 * scale - 1, y1 * scale - 1]

    if shape == "star":
        corners = [(0.5 + r * np.sin(a), 0.52 - r * np.cos(a)) for a, r in _rays(10, 0.52, 0.21)]
        draw.polygon(points(*corners), fill=255)
    elif shape == "heart":
        draw.ellipse(box(0.0, 0.08, 0.54, 0.58), fill=255)
        draw.ellipse(box(0.46, 0.08, 1.0, 0.58), fill=255)
        draw.polygon(points((0.04, 0.44), (0.96, 0.44), (0.5, 1.0)), fill=255)
    elif shape == "moon":
        draw.ellipse(box(0.0, 0.0, 1.0, 1.0), fill=255)
        draw.ellipse(box(0.35, -0.1, 1.25, 0.8), fill=0)
    elif shape == "sun":
        for a, _ in _rays(8, 1, 1):
            draw.line(points((0.5, 0.5), (0.5 + 0.5 * np.sin(a), 0.5 - 0.5 * np.cos(a))), fill=255, width=scale // 12)
        draw.ellipse(box(0.27, 0.27, 0.73, 0.73), fill=255)
    elif shape == "fish":
        draw.ellipse(box(0.0, 0.22, 0.72, 0.78), fill=255)
        draw.polygon(points((0.6, 0.5), (1.0, 0.15), (1.0, 0.85)), fill=255)
    elif shape == "tree":
        draw.polygon(points((0.5, 0.0), (0.92, 0.72), (0.08, 0.72)), fill=255)
        draw.rectangle(box(0.4, 0.7, 0.6, 1.0), fill=255)
    elif shape == "house":
        draw.polygon(points((0.5, 0.0), (1.0, 0.46), (0.0, 0.46)), fill=255)
        draw.rectangle(box(0.12, 0.46, 0.88, 1.0), fill=255)
        draw.rectangle(box(0.4, 0.62, 0.6, 1.0), fill=0)
    elif shape == "cup":
        draw.ellipse(box(0.5, 0.22, 1.0, 0.72), fill=255)
        draw.ellipse(box(0.62, 0.34, 0.88, 0.6), fill=0)
        draw.rectangle(box(0.08, 0.12, 0.7, 0.9), fill=255)
    elif shape == "key":
        draw.ellipse(box(0.0, 0.25, 0.5, 0.75), fill=255)
        draw.ellipse(box(0.15, 0.4, 0.35, 0.6), fill=0)
        draw.rectangle(box(0.48, 0.43, 1.0, 0.57), fill=255)
        draw.rectangle(box(0.8, 0.5, 0.94, 0.8), fill=255)
    elif shape == "bell":
        draw.ellipse(box(0.2, 0.02, 0.8, 0.7), fill=255)
        draw.polygon(points((0.2, 0.38), (0.8, 0.38), (1.0, 0.8), (0.0, 0.8)), fill=255)
        draw.ellipse(box(0.4, 0.76, 0.6, 1.0), fill=255)
    elif shape == "flag":
        draw.rectangle(box(0.1, 0.0, 0.22, 1.0), fill=255)
        draw.rectangle(box(0.22, 0.05, 1.0, 0.55), fill=255)
    elif shape == "boat":
        draw.polygon(points((0.0, 0.7), (1.0, 0.7), (0.78, 1.0), (0.22, 1.0)), fill=255)
        draw.polygon(points((0.48, 0.0), (0.48, 0.62), (0.05, 0.62)), fill=255)
        draw.polygon(points((0.58, 0.15), (0.9, 0.62), (0.58, 0.62)), fill=255)
    elif shape == "leaf":
        draw.polygon(points((1.0, 0.0), (0.9, 0.6), (0.55, 0.85), (0.2, 0.8), (0.15, 0.45), (0.4, 0.1)), fill=255)
        draw.line(points((0.0, 1.0), (0.3, 0.7)), fill=255, width=scale // 10)
    elif shape == "cloud":
        draw.ellipse(box(0.0, 0.4, 0.5, 0.85), fill=255)
        draw.ellipse(box(0.22, 0.12, 0.76, 0.66), fill=255)
        draw.ellipse(box(0.5, 0.38, 1.0, 0.85), fill=255)
        draw.rectangle(box(0.22, 0.5, 0.78, 0.85), fill=255)
    elif shape == "crown":
        crown = ((0.0, 0.2), (0.27, 0.55), (0.5, 0.1), (0.73, 0.55), (1.0, 0.2), (0.9, 0.92), (0.1, 0.92))
        draw.polygon(points(*crown), fill=255)
    else:
        draw.polygon(points((0.62, 0.0), (0.95, 0.33), (0.62, 0.72), (0.3, 0.33)), fill=255)
        draw.line(points((0.62, 0.7), (0.35, 0.85), (0.1, 1.0)), fill=255, width=scale // 14)
    return np.asarray(mask.resize((ICON_SIZE, ICON_SIZE), PILImage.Resampling.BOX), dtype=float) / 255


def _rays(count: int, long: float, short: float) -> list[tuple[float, float]]:
    """Return angles around the circle, with a long and a short radius in turn."""
    return [(2 * np.pi * i / count, short if i % 2 else long) for i in range(count)]
