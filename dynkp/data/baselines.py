"""Two baselines: the most frequent keyphrase for all posts, and the keyphrases of the most similar training post.

Neither uses the images and neither is trained, so a model that does not exceed their scores has learned little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Words and single signs, so that "goal!" and "goal !" are the same tokens and only an empty text has none.
_TOKEN = r"\w+|[^\w\s]"
# Number of rows of the similarity matrix in memory at once: memory grows with the number of training posts only.
_BATCH = 256


def most_frequent_keyphrase(train_posts: Iterable[Mapping[str, Any]]) -> str:
    """Return the keyphrase of the greatest number of training posts.

    Args:
        train_posts: posts with the column `keyphrases` (list of str). A keyphrase counts once per post.

    Returns:
        The keyphrase as written in its first post; the first one of several that are equally frequent.

    Raises:
        ValueError: if no post has a keyphrase.

    Example:
        >>> most_frequent_keyphrase([{"keyphrases": ["nba", "finals"]}, {"keyphrases": ["finals"]}])
        'finals'
    """
    counts = Counter(phrase for post in train_posts for phrase in dict.fromkeys(post["keyphrases"]))
    if not counts:
        raise ValueError("train_posts has no post with a keyphrase: pass the posts that the model is trained on.")
    return counts.most_common(1)[0][0]


def nearest_neighbour_keyphrases(
    train_texts: Sequence[str], train_keyphrases: Sequence[Sequence[str]], texts: Sequence[str]
) -> list[list[str]]:
    """Predict for each post the keyphrases of the training post with the most similar text (TF-IDF cosine, one neighbour).

    Word counts enter as 1 + ln(count); inverse document frequencies are those of the training texts.

    Args:
        train_texts: texts of the N training posts.
        train_keyphrases: their keyphrases, in the same order.
        texts: texts of the M posts to predict.

    Returns:
        M lists of keyphrases; an empty list for a text that shares no word with any training text. Of several equally
        similar training posts, the first is used.

    Raises:
        ValueError: if `train_texts` and `train_keyphrases` differ in length.
        ImportError: if scikit-learn (extra `demo`) is not installed.

    Example:
        >>> nearest_neighbour_keyphrases(["late goal", "rain and thunder"], [["mufc"], ["storm hour"]], ["thunder!"])
        [['storm hour']]
    """
    if len(train_texts) != len(train_keyphrases):
        raise ValueError(
            f"train_texts has {len(train_texts)} entries and train_keyphrases {len(train_keyphrases)}: "
            "pass one list of keyphrases per training text."
        )
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            "The nearest-neighbour baseline needs scikit-learn, which is not installed: pip install 'dynkp[demo]'."
        ) from error
    if not any(text.strip() for text in train_texts):
        return [[] for _ in texts]  # the vectorizer cannot be fitted without a single word

    vectorizer = TfidfVectorizer(token_pattern=_TOKEN, sublinear_tf=True)
    train_vectors = vectorizer.fit_transform(train_texts).T.tocsr()  # rows have unit length: a dot product is a cosine
    predictions: list[list[str]] = []
    for start in range(0, len(texts), _BATCH):
        similarity = (vectorizer.transform(texts[start : start + _BATCH]) @ train_vectors).tocsr()
        nearest = similarity.argmax(axis=1)
        best = similarity.max(axis=1).toarray()
        predictions += [
            list(train_keyphrases[int(index)]) if cosine > 0 else []
            for index, cosine in zip(nearest.flat, best.flat, strict=True)
        ]
    return predictions
