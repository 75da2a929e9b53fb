"""The Stable Diffusion ControlNet server; knows no Ray except in the one function below."""
