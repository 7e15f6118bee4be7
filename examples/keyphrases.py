"""The parts of a training run, in a minute on a CPU and without a download: posts, trainer, predictions, scores.

    python examples/keyphrases.py

Here a post's text names an animal and its image shows a colour; its keyphrases are both. The rationale is what Dynamic CoT
teaches once a post is easy: why people would use these keyphrases. For your own posts, write `load_posts("train.jsonl",
image_dir="images")`; for a pretrained model, give its name as `model` and leave out the processor and the options marked below.
`dynkp train` does all of this from the command line.
"""

from itertools import product
from typing import Any

from PIL import Image

from dynkp import DynamicCoTConfig, DynamicCoTTrainer, generate_keyphrases, load_posts, score_keyphrases
from dynkp.synthetic.tiny_model import build_tiny_vlm


def post(animal: str, colour: str, number: int) -> dict[str, Any]:
    """Make a post; `load_posts` takes such rows, or a file of them."""
    return {
        "id": f"{animal}-{colour}-{number}",
        "text": f"look at my {animal}" if number % 2 else f"the {animal} is back",
        "images": [Image.new("RGB", (32, 32), colour)],
        "keyphrases": [animal, colour],
        "rationale": f"The text is about a {animal} and the image is {colour}.",
    }


pairs = list(product(("beagle", "heron", "otter", "gecko"), ("red", "lime", "blue", "white")))
train_posts = load_posts([post(*pair, number) for number in range(4) for pair in pairs[:-4]])
test_posts = load_posts([post(*pair, 5) for pair in pairs[:-4]])

texts = [f"{row['text']} {'; '.join(row['keyphrases'])} {row['rationale']}" for row in train_posts]
model, processor = build_tiny_vlm(texts, word_level=False, hidden_size=64, layers=2, image_size=32)

args = DynamicCoTConfig(
    output_dir="runs/keyphrases",
    gamma="0.4",  # a post whose direct target costs less than 0.4 nats per token is taught to reason
    max_steps=120,
    per_device_train_batch_size=16,
    learning_rate=3e-3,  # of a model from scratch, as the next two options
    freeze_vision_tower=False,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
trainer = DynamicCoTTrainer(model, args, train_dataset=train_posts, processing_class=processor)
trainer.train()
trainer.save_model()  # with its task: `dynkp predict --model runs/keyphrases --posts ...`

predictions = list(generate_keyphrases(trainer.model, processor, test_posts, task=trainer.task, max_new_tokens=64))
for row in predictions[:3]:
    print(row["id"], row["keyphrases"], row["raw"])
scores = score_keyphrases([row["keyphrases"] for row in predictions], test_posts["keyphrases"], texts=test_posts["text"])
reasoned = sum(row["reasoned"] for row in predictions) / len(predictions)
print(f"F1@3 {scores['all']['f1@3']:.3f}, of keyphrases in the text {scores['present']['f1@3']:.3f}; {reasoned:.0%} reasoned")
