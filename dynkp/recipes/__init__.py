"""Recipes: published settings, Accelerate and DeepSpeed configurations, installed with the package."""
