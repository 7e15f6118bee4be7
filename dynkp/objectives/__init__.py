"""The papers' equations as pure tensor functions: no model, no trainer, no state but what an equation itself names."""
