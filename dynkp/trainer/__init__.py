"""Drop-in subclasses of `trl.SFTTrainer`, one per method, and their configs."""
