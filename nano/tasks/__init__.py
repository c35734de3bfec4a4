"""Tasks: read from TOML definitions (those that ship lie here), put to a model, and their answers scored."""
