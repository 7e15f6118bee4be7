"""Sizes of images that a model's processor refuses, found before training."""

from __future__ import annotations

from typing import Any

from PIL import Image

# Images less elongated than this ratio, with sides of at least so many pixels, are taken by every processor of transformers
# (Qwen-VL's refuses ratios above 200, some refuse sides below a patch), so that the processor need not be run for each size.
_USUAL_RATIO, _USUAL_SIDE = 10, 64


class SizeCheck:
    """Returns why a processor refuses images of a size, by running the processor on an image of one colour.

    Args:
        processor: a processor of a vision-language model, or an image processor.

    Example:
        >>> from types import SimpleNamespace
        >>> def refuse(images, return_tensors):
        ...     raise ValueError("absolute aspect ratio must be smaller than 200")
        >>> check = SizeCheck(SimpleNamespace(image_processor=refuse))
        >>> check((640, 480)) is None, check((8000, 10))
        (True, 'absolute aspect ratio must be smaller than 200')
    """

    def __init__(self, processor: Any) -> None:
        self.image_processor = getattr(processor, "image_processor", processor)
        self._reasons: dict[tuple[int, int], str | None] = {}

    def __call__(self, size: tuple[int, int]) -> str | None:
        """Return the processor's error for an image of this size, or None.

        Args:
            size: width and height in pixels.
        """
        if max(size) <= _USUAL_RATIO * min(size) and min(size) >= _USUAL_SIDE:
            return None
        if size not in self._reasons:
            try:
                self.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
                self._reasons[size] = None
            except Exception as error:  # of whatever type the processor raises
                self._reasons[size] = str(error) or type(error).__name__
        return self._reasons[size]
