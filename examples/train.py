"""Train a model to predict keyphrases, predict the evaluation posts, score them: what `dynkp train` does, as a script.

    python examples/train.py
    accelerate launch examples/train.py --recipe mmkp_dynamic_cot_qwen2_5_vl_3b \
        --train_file train.jsonl --eval_file test.jsonl --image_dir images

`dynkp train --help` explains the options. A script that shows the parts is examples/keyphrases.py.
"""

import sys

from dynkp.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
