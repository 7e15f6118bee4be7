"""Two baselines every trained model is printed beside: one phrase for all posts, and the most similar training post's.

Neither looks at the pictures and neither is trained, so a model that does not beat them has learned little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Words and single signs, so that "goal!" and "goal !" are the same tokens and only a blank text has none.
_TOKEN = r"\w+|[^\w\s]"
# Rows of the similarity matrix held at once: memory grows with the training posts only.
_BATCH = 256


def most_frequent_keyphrase(train_posts: Iterable[Mapping[str, Any]]) -> str:
    """The keyphrase that most training posts carry.

    Args:
        train_posts: Rows with the column `keyphrases` (list of str). A phrase counts once per post.

    Returns:
        The phrase as written in its first post; of several equally frequent ones, the one met first.

    Raises:
        ValueError: If no post has a keyphrase.

    Example:
        >>> most_frequent_keyphrase([{"keyphrases": ["nba", "finals"]}, {"keyphrases": ["finals"]}])
        'finals'
    """
    counts = Counter(phrase for post in train_posts for phrase in dict.fromkeys(post["keyphrases"]))
    if not counts:
        raise ValueError("train_posts has no post with a keyphrase: pass the posts the model is trained on.")
    return counts.most_common(1)[0][0]


def nearest_neighbour_keyphrases(
    train_texts: Sequence[str], train_keyphrases: Sequence[Sequence[str]], texts: Sequence[str]
) -> list[list[str]]:
    """Each post gets the keyphrases of the training post whose text is most similar (TF-IDF cosine, one neighbour).

    Word counts enter as 1 + ln(count), inverse document frequencies are those of the training texts.

    Args:
        train_texts: Texts of the N training posts.
        train_keyphrases: Their keyphrases, in the same order.
        texts: Texts of the M posts to predict.

    Returns:
        M lists of keyphrases, empty for a text that shares no word with any training text. Of several equally
        similar training posts, the first counts.

    Raises:
        ValueError: If `train_texts` and `train_keyphrases` differ in length.
        ImportError: If scikit-learn (extra `demo`) is missing.

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
        return [[] for _ in texts]  # the vectorizer refuses to be fitted without a single word

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
