"""The embedded default of `nanokit demo`: a small teacher, the text it was trained on, and a recipe."""
