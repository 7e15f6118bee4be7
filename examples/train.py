"""Train a model to predict keyphrases, predict the evaluation posts, score them: what `dynkp train` does, as a script.

    python examples/train.py
    accelerate launch examples/train.py --config examples/recipes/mmkp_dynamic_cot_qwen2_5_vl_3b.yaml \
        --train_file train.jsonl --eval_file test.jsonl --image_dir images

`dynkp train --help` explains the options.
"""

from dynkp.cli.train import main

if __name__ == "__main__":
    main()
