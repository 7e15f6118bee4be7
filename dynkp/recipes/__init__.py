"""Recipes: published settings of training, Accelerate and DeepSpeed configurations, installed with the package."""
