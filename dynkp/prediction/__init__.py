"""Prediction: what a model is asked, the engines that answer, resumable runs and their files."""
